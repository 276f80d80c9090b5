//! One seed's hosts, and what happens to them.

use std::collections::BTreeSet;

use journal::batch::Epoch;
use uuid::Uuid;
use vra::api::{CheckpointId, VmId, VpgId, VraId};
use vra::checkpoint::hosts::{EpochFailure, GroupHost, SpanningOutput};
use vra::wire::DeclineCode;

use super::super::env::Env;
use super::chain::Chain;
use super::group_vm::GroupVm;
use super::host::{Definition, Host};
use super::network::Network;
use super::offered::Journals;
use super::reached::{Reached, ReachedCount};
use super::shape::{Shape, WorldKind};

/// Longest time between two things that happen, in µs.
const STEP_US: u64 = 700;
/// Two things happen so much apart at most: a hold that is due ends at the next one.
const SLACK_US: u64 = 3 * STEP_US;
/// Before the end nothing goes wrong any more for so long, in µs: long enough for dead VRAs to be noticed, and to be live again.
const CALM_US: u64 = 7_000_000;
/// A checkpoint that comes so long after that was begun after it, in µs.
const SETTLED_US: u64 = 4_000_000;
/// A busy host does nothing for so long at most, in µs.
const STALLED_US: u64 = 500_000;
/// Writes that a guest has under way at most, besides the chain's.
const DEPTH: usize = 3;

pub(super) struct HostsWorld {
    env: Env,
    shape: Shape,
    vpg: VpgId,
    hosts: Vec<Host>,
    vms: Vec<GroupVm>,
    network: Network,
    chain: Chain,
    /// As the manager has it; it is off half of the time.
    definition: Definition,
    /// The targets that the journals are spread over.
    target_count: usize,
    reached: ReachedCount,
    /// What coordinators said was made.
    confirmed: BTreeSet<CheckpointId>,
}

impl HostsWorld {
    pub(super) fn new(seed: u64, traced: bool) -> Self {
        let mut env = Env::new(seed ^ 0x9057_5000, traced);
        let shape = Shape::any(seed, &mut env);
        let definition = Definition {
            member_set_version: 1,
            interval_us: shape.interval_us,
            deadline_us: shape.deadline_us,
        };
        let (mut hosts, mut vms) = (Vec::new(), Vec::new());
        for index in 0..shape.host_count {
            let first = vms.len();
            for _ in 0..=env.rng.below(shape.most_vms) {
                vms.push(GroupVm::new(VmId(Uuid::from_u128(0x100 + vms.len() as u128))));
            }
            let vra = VraId(Uuid::from_u128(0x10 + index as u128));
            hosts.push(Host::new(vra, (first..vms.len()).collect(), definition, &mut env));
        }
        let target_count = 1 + env.any_index(2);
        Self {
            env,
            shape,
            vpg: VpgId(Uuid::from_u128(0x7)),
            hosts,
            vms,
            network: Network::default(),
            chain: Chain::new(),
            definition,
            target_count,
            reached: ReachedCount::default(),
            confirmed: BTreeSet::new(),
        }
    }

    pub(super) fn run(mut self) -> Result<ReachedCount, String> {
        for host in 0..self.hosts.len() {
            self.start(host, 0)?;
        }
        // One step in so many is a disturbance.
        let calm = 60 << self.env.rng.below(5);
        while self.env.now().mono_us < self.shape.lasts_us {
            self.step()?;
            if self.shape.kind == WorldKind::Rough && self.env.rng.one_in(calm) {
                self.disturb()?;
            }
        }
        if self.shape.kind == WorldKind::Rough {
            self.settle()?;
        }
        self.end()
    }

    fn step(&mut self) -> Result<(), String> {
        self.env.pass(STEP_US);
        while let Some((from, to, message)) = self.network.arrived(&self.env)? {
            let stalled_until_us = self.hosts[to].stalled_until_us;
            if self.env.now().mono_us < stalled_until_us {
                self.network.put_off((from, to), &message, stalled_until_us);
                continue;
            }
            let from = self.hosts[from].vra;
            self.env.note(|| format!("{from} to host {to}: {message:?}"));
            self.hosts[to].receive(from, message, &self.env);
            self.outputs(to)?;
        }
        for host in 0..self.hosts.len() {
            if !self.hosts[host].is_up() && self.hosts[host].starts_us <= self.env.now().mono_us {
                let sync_us = 1 + self.env.rng.below(400_000);
                self.start(host, sync_us)?;
            }
            for _ in 0..self.hosts[host].tick(&self.env) {
                self.reached.note(Reached::Expired);
            }
            self.outputs(host)?;
        }
        let mut longest_us = vec![0; self.vms.len()];
        for host in &mut self.hosts {
            let of_host_us = host.longest_hold_us(SLACK_US, &self.env) + SLACK_US;
            host.vms.iter().for_each(|vm| longest_us[*vm] = of_host_us);
        }
        for (vm, longest_us) in self.vms.iter_mut().zip(longest_us) {
            for link in vm.complete(longest_us, &self.env, &mut self.reached)? {
                self.chain.acknowledged(link, &mut self.env);
            }
            if self.env.rng.one_in(self.shape.ships_one_in) {
                vm.ship(&self.env)?;
            }
            if vm.waiting_count() < DEPTH && self.env.rng.one_in(4) {
                vm.write(0, &mut self.env)?;
            }
        }
        self.renew()?;
        if let Some((link, vm)) = self.chain.next(self.vms.len(), &mut self.env) {
            self.vms[vm].write(link, &mut self.env)?;
        }
        Ok(())
    }

    fn renew(&mut self) -> Result<(), String> {
        let mut renewed = false;
        for vm in &mut self.vms {
            renewed |= vm.go_on(&mut self.env)?;
        }
        if renewed {
            (0..self.hosts.len()).for_each(|host| self.follow(host));
        }
        Ok(())
    }

    fn start(&mut self, host: usize, sync_us: u64) -> Result<(), String> {
        self.env.note(|| format!("host {host} starts"));
        for vm in self.hosts[host].vms.clone() {
            self.vms[vm].start(sync_us, &mut self.env)?;
        }
        self.hosts[host].start(&mut self.env);
        self.follow(host);
        Ok(())
    }

    fn kill(&mut self, host: usize) {
        if !self.hosts[host].is_up() {
            return;
        }
        self.env.note(|| format!("host {host} dies"));
        if self.hosts[host].vms.iter().any(|vm| self.vms[*vm].is_holding()) {
            self.reached.note(Reached::HeldDied);
        }
        let is_held = |vm: &GroupVm| vm.is_holding();
        if self.vms.iter().any(is_held)
            && self.hosts[host]
                .status(self.vpg, &self.env)
                .is_some_and(|status| status.coordinator == Some(self.hosts[host].vra))
        {
            self.reached.note(Reached::CoordinatorDied);
        }
        self.hosts[host].kill();
        for vm in &self.hosts[host].vms {
            self.vms[*vm].stop(&mut self.reached);
        }
        let most_us = [200_000, 5_000_000][self.env.any_index(2)];
        self.hosts[host].starts_us = self.env.now().mono_us + self.env.rng.below(most_us);
    }

    fn follow(&mut self, host: usize) {
        let hosts: Vec<GroupHost> = self.hosts.iter().map(|host| host.of_group(&self.vms)).collect();
        self.hosts[host].follow(self.vpg, &hosts, &self.vms, &self.env);
    }

    fn outputs(&mut self, host: usize) -> Result<(), String> {
        while let Some(output) = self.hosts[host].poll_output() {
            match output {
                SpanningOutput::Send { to, message } => {
                    let to = self.hosts.iter().position(|host| host.vra == to).ok_or("a stranger")?;
                    self.network.send((host, to), &message, &self.shape, &mut self.env, &mut self.reached);
                }
                SpanningOutput::Ended { asked, result, .. } => {
                    self.env.note(|| format!("host {host}: {result:?}"));
                    if asked.is_none() {
                        self.reached.epochs += 1;
                        if host > 0 && matches!(result, Err(EpochFailure::Missing { .. })) {
                            self.reached.note(Reached::NextSaidMissing);
                        }
                    }
                    match result {
                        Ok(taken) => {
                            if asked.is_some() {
                                self.reached.note(Reached::Tagged);
                            }
                            self.confirmed.insert(id_of(taken.epoch));
                        }
                        Err(failure) => {
                            let status = self.hosts[host].status(self.vpg, &self.env);
                            let interval_us = self.hosts[host].definition.interval_us;
                            if status.is_some_and(|status| status.interval_us > interval_us) {
                                self.reached.note(Reached::BackedOff);
                            }
                            self.failed(&failure);
                        }
                    }
                }
            }
        }
        Ok(())
    }

    fn failed(&mut self, failure: &EpochFailure) {
        let reached = match failure {
            EpochFailure::Missing { .. } => Reached::Missing,
            EpochFailure::Late { .. } => Reached::Late,
            EpochFailure::Declined { code, .. } => match code {
                DeclineCode::Busy => Reached::Collided,
                DeclineCode::MemberSet => Reached::OtherMemberSet,
                DeclineCode::NotStreaming | DeclineCode::InSync | DeclineCode::NotProtected => {
                    Reached::NotReady
                }
                _ => return,
            },
            EpochFailure::NotRecorded { code: DeclineCode::NoSuchHold, .. } => Reached::NoSuchHold,
            _ => return,
        };
        self.reached.note(reached);
    }

    /// Something rare.
    fn disturb(&mut self) -> Result<(), String> {
        let host = self.env.any_index(self.hosts.len());
        match self.env.rng.below(15) {
            0 => self.kill(host),
            1 => {
                // Who coordinates dies, best with an attempt under way.
                let own = |host: &&Host| {
                    let status = host.status(self.vpg, &self.env);
                    status.is_some_and(|status| status.coordinator == Some(host.vra))
                };
                if let Some(vra) = self.hosts.iter().find(own).map(|host| host.vra)
                    && let Some(host) = self.hosts.iter().position(|host| host.vra == vra)
                {
                    self.kill(host);
                }
            }
            2..4 => {
                let other = self.env.any_index(self.hosts.len());
                if host != other {
                    let for_us = 1 + self.env.rng.below(5_000_000);
                    let both = self.env.rng.one_in(2);
                    self.network.cut((host, other), for_us, both, &self.env);
                    self.reached.note(Reached::Partitioned);
                }
            }
            4..6 => {
                let vm = self.env.any_index(self.vms.len());
                let held = self.vms[vm].is_holding();
                if self.vms[vm].overflow(&mut self.env) && held {
                    self.reached.note(Reached::Overflowed);
                }
            }
            6 => self.definition.member_set_version += 1,
            7 => {
                self.definition.interval_us = 50_000 + self.env.rng.below(1_000_000);
                self.definition.deadline_us = self.shape.deadline_us / (1 + self.env.rng.below(3));
            }
            // The manager is on, and reaches this host.
            8..10 => self.give_definition(host),
            10..13 => {
                let now_us = self.env.now().mono_us;
                self.hosts[host].stalled_until_us = now_us + self.env.rng.below(STALLED_US);
                self.reached.note(Reached::Stalled);
            }
            _ => self.hosts[host].ask(self.vpg, "by hand", &self.env),
        }
        self.outputs(host)
    }

    fn give_definition(&mut self, host: usize) {
        self.hosts[host].define(self.definition, &self.env);
        self.follow(host);
    }

    /// Everything is well again: then there are checkpoints again.
    fn settle(&mut self) -> Result<(), String> {
        self.shape.calm_down();
        for host in 0..self.hosts.len() {
            self.hosts[host].starts_us = self.env.now().mono_us;
            self.hosts[host].stalled_until_us = 0;
            self.give_definition(host);
        }
        self.network = Network::default();
        // Attempts that have backed off come again only so much later, and the next one may still meet a host that is just starting.
        let statuses = self.hosts.iter().filter_map(|host| host.status(self.vpg, &self.env));
        let longest_us = statuses.map(|status| status.interval_us).max().unwrap_or(0);
        let began_us = self.env.now().mono_us;
        let mut before = None;
        while self.env.now().mono_us < began_us + CALM_US + 3 * longest_us {
            self.step()?;
            // What is confirmed first may have begun before.
            let is_calm = self.env.now().mono_us >= began_us + SETTLED_US;
            match before {
                None if is_calm => before = Some(self.confirmed.len()),
                Some(before) if self.confirmed.len() > before => return Ok(()),
                _ => {}
            }
        }
        let statuses: Vec<_> = self.hosts.iter().map(|host| host.status(self.vpg, &self.env)).collect();
        Err(format!("no checkpoint comes though all is well: {statuses:?}"))
    }

    fn end(mut self) -> Result<ReachedCount, String> {
        for vm in &mut self.vms {
            vm.ship(&self.env)?;
        }
        let journals = Journals::of(self.vpg, &self.vms, self.target_count)?;
        let mut newest = Vec::new();
        for (id, cuts) in journals
            .offered
            .iter()
            .map(|(id, cuts)| (*id, cuts.clone()))
            .chain(Journals::by_id_alone(&self.vms))
        {
            let shows = |vm: usize, link| {
                let vm: &GroupVm = &self.vms[vm];
                cuts.get(&vm.vm).is_some_and(|cut| vm.shows(link, *cut))
            };
            newest.push(self.chain.check(shows).map_err(|what| format!("checkpoint {id}: {what}"))?);
        }
        let offered = journals.offered.len() as u64;
        (0..offered).for_each(|_| self.reached.note(Reached::Offered));
        (0..journals.in_some).for_each(|_| self.reached.note(Reached::RecordedBySome));
        self.reached.links = self.chain.len();
        let least_percent = match self.shape.kind {
            WorldKind::Smooth => 99,
            WorldKind::Slow => 60,
            WorldKind::Rough => return Ok(self.reached),
        };
        if let Some(lost) = self.confirmed.iter().find(|id| !journals.offered.contains_key(id)) {
            return Err(format!("checkpoint {lost} was confirmed and isn't offered"));
        }
        if offered * 100 < self.reached.epochs * least_percent || self.reached.epochs < 15 {
            let epochs = self.reached.epochs;
            return Err(format!("{offered} of {epochs} epochs are offered, not {least_percent} %"));
        }
        newest.sort_unstable();
        newest.dedup();
        match newest.windows(2).map(|pair| pair[1] - pair[0]).min() {
            Some(least) if least >= 20 => Ok(self.reached),
            least => Err(format!("the chain does {least:?} steps between two checkpoints")),
        }
    }
}

fn id_of(epoch: Epoch) -> CheckpointId {
    CheckpointId { nonce: epoch.nonce.as_u128(), counter: epoch.counter }
}
