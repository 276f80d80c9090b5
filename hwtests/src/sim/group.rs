//! The VMs of a source host that have checkpoints together, and an application that spans them: a chain of writes, each
//! submitted only after the one before was seen to be written.

use std::sync::Arc;

use journal::batch::{Checkpoint, CheckpointKind, Epoch};
use journal::view::Reader;
use ublk::serve::Op;
use uuid::Uuid;
use vra::checkpoint::{CheckpointRefusal, CommitRefusal, HeldEpoch, LocalHold, Member};

use super::coverage::Happening;
use super::env::Env;
use super::vm::Vm;

pub(super) struct Group {
    /// The coordinator's incarnation.
    nonce: Uuid,
    epoch_counter: u64,
    attempt: Option<Attempt>,
    /// On which VM each link of the chain is; links are numbered from 1.
    links: Vec<usize>,
}

struct Attempt {
    holds: Vec<LocalHold>,
    watched: Vec<Arc<HeldEpoch>>,
    checkpoint: Checkpoint,
}

/// How long a VM is held at most, in microseconds.
const DEADLINE_US: u64 = 1_200;

impl Group {
    pub(super) fn new(seed: u64) -> Self {
        Self { nonce: Uuid::from_u64_pair(0xc00d, seed), epoch_counter: 0, attempt: None, links: Vec::new() }
    }

    pub(super) fn step(&mut self, vms: &mut [Vm], env: &mut Env) -> Result<(), String> {
        self.expire(env);
        match env.rng.below(40) {
            0..12 => self.chain(vms, env),
            12 if self.attempt.is_none() => self.hold(vms, env),
            15..19 => self.release(vms, env),
            19 if env.rng.one_in(8) => self.settle(vms, env),
            _ => Ok(()),
        }
    }

    /// Whether an attempt is under way.
    pub(super) fn is_holding(&self) -> bool {
        self.attempt.is_some()
    }

    /// The thread of the product that lets holds expire.
    fn expire(&self, env: &mut Env) {
        let now = env.now();
        let watched = self.attempt.iter().flat_map(|attempt| &attempt.watched);
        for _ in watched.filter(|held| held.expire_if_due(now)) {
            env.happened(Happening::HoldExpired);
        }
    }

    /// Holds all members: those of one host together, or each as if it were on a host of its own.
    fn hold(&mut self, vms: &mut [Vm], env: &mut Env) -> Result<(), String> {
        let members: Option<Vec<Member>> =
            vms.iter_mut().map(|vm| vm.protected().and_then(|(source, _)| source.member())).collect();
        let Some(members) = members else { return Ok(()) };
        self.epoch_counter += 1;
        let counter = self.epoch_counter;
        let checkpoint = Checkpoint {
            epoch: Epoch { nonce: self.nonce, counter },
            cut: 0,
            member_set_version: 1,
            time_us: env.now().wall_us,
            kind: CheckpointKind::Automatic,
            tag: String::new(),
        };
        let hosts: Vec<&[Member]> =
            if env.rng.one_in(2) { vec![&members] } else { members.chunks(1).collect() };
        let mut attempt = Attempt { holds: Vec::new(), watched: Vec::new(), checkpoint };
        let mut broken = Ok(());
        for host in hosts {
            let now = env.now();
            let begun = LocalHold::begin(host, now, DEADLINE_US, &mut |held| {
                let index = attempt.watched.len();
                attempt.watched.push(Arc::clone(held));
                if let Some((source, _)) = vms[index].protected() {
                    source.note_held(counter, held.cut());
                }
                // The others are not held yet.
                for _ in 0..delay(env) {
                    env.pass(20);
                    broken = broken.clone().and(self.chain(vms, env)).and(sources_step(vms, env));
                }
            });
            broken.clone()?;
            match begun {
                Ok(hold) => attempt.holds.push(hold),
                Err(_) => {
                    env.happened(Happening::HoldRefused);
                    attempt.holds.into_iter().for_each(LocalHold::abort);
                    return Ok(());
                }
            }
        }
        self.attempt = Some(attempt);
        Ok(())
    }

    fn release(&mut self, vms: &mut [Vm], env: &mut Env) -> Result<(), String> {
        let Some(attempt) = self.attempt.take() else { return Ok(()) };
        if env.rng.one_in(8) {
            attempt.holds.into_iter().for_each(LocalHold::abort);
            return Ok(());
        }
        let (count, mut taken) = (attempt.holds.len(), 0);
        for hold in attempt.holds {
            // Some are released, others not yet.
            for _ in 0..delay(env) {
                env.pass(20);
                self.chain(vms, env)?;
                sources_step(vms, env)?;
            }
            match hold.release(&attempt.checkpoint, env.now()) {
                Ok(_) => taken += 1,
                Err(CheckpointRefusal::Commit { refusal: CommitRefusal::Expired, .. }) => {}
                Err(_) => env.happened(Happening::HoldOverflowed),
            }
            for vm in &mut *vms {
                if let Some((source, ledger)) = vm.protected() {
                    source.tap(ledger, env)?;
                }
            }
        }
        if 0 < taken && taken < count {
            env.happened(Happening::CheckpointOfSome);
        }
        Ok(())
    }

    /// The application goes on: the next link, if the last one was seen.
    fn chain(&mut self, vms: &mut [Vm], env: &mut Env) -> Result<(), String> {
        let newest = self.links.len() as u64;
        if let Some(&at) = self.links.last() {
            let Some((source, ledger)) = vms[at].protected() else { return Ok(()) };
            let guest = &source.guest;
            if guest.known_link() < newest {
                if guest.links_waiting(Op::Write, Some(newest)) == 0 {
                    // Its guest ended before it was answered.
                    return source.ask_link(Op::Write, newest, ledger, env);
                }
                if guest.links_waiting(Op::Read, None) == 0 && env.rng.one_in(2) {
                    return source.ask_link(Op::Read, newest, ledger, env);
                }
                return Ok(());
            }
        }
        let next = env.any_index(vms.len());
        let Some((source, ledger)) = vms[next].protected() else { return Ok(()) };
        // Links that a read showed before their writes completed still have their requests.
        if !source.is_up() || source.guest.links_waiting(Op::Write, None) > 2 {
            return Ok(());
        }
        self.links.push(next);
        source.ask_link(Op::Write, newest + 1, ledger, env)
    }

    /// Whatever targets and network do, guests are answered.
    pub(super) fn settle(&mut self, vms: &mut [Vm], env: &mut Env) -> Result<(), String> {
        let watched: Vec<Arc<HeldEpoch>> =
            self.attempt.iter().flat_map(|attempt| attempt.watched.iter().cloned()).collect();
        for vm in vms {
            if let Some((source, ledger)) = vm.protected() {
                source.settle(ledger, env, &mut |env| {
                    watched.iter().for_each(|held| {
                        held.expire_if_due(env.now());
                    });
                })?;
            }
        }
        Ok(())
    }

    /// A checkpoint that all journals list shows a beginning of the chain.
    pub(super) fn compare(&self, vms: &mut [Vm], readers: &[Reader], env: &mut Env) -> Result<(), String> {
        let Some(first) = readers.first() else { return Ok(()) };
        for entry in first.catalogue().checkpoints() {
            let epoch = entry.checkpoint.epoch;
            let cuts: Option<Vec<u64>> = readers
                .iter()
                .map(|reader| {
                    let mut entries = reader.catalogue().checkpoints().iter();
                    entries.find(|entry| entry.checkpoint.epoch == epoch).map(|entry| entry.checkpoint.cut)
                })
                .collect();
            // It isn't the group's: one journal lacks it.
            let Some(cuts) = cuts else { continue };
            let mut found = Vec::new();
            for ((vm, reader), cut) in vms.iter_mut().zip(readers).zip(cuts) {
                let image = vm.image(reader, cut)?;
                let link = vm.protected().map_or(0, |(source, _)| source.guest.link_in(&image));
                found.push(link);
            }
            self.check_chain(&found).map_err(|what| format!("checkpoint {}: {what}", epoch.counter))?;
            if found.len() > 1 {
                env.happened(Happening::GroupCompared);
            }
        }
        Ok(())
    }

    fn check_chain(&self, found: &[u64]) -> Result<(), String> {
        let newest = found.iter().copied().max().unwrap_or_default();
        for (at, link) in found.iter().enumerate() {
            let of_vm = (1..).zip(&self.links).take_while(|(number, _)| *number <= newest);
            let expected =
                of_vm.filter(|(_, vm)| **vm == at).map(|(number, _)| number).last().unwrap_or_default();
            if *link != expected {
                return Err(format!(
                    "link {newest} is there, but VM {at} is at link {link} instead of {expected}"
                ));
            }
        }
        Ok(())
    }
}

/// How much guests do before the next member hears of a hold or its end.
fn delay(env: &mut Env) -> u64 {
    if env.rng.one_in(2) { env.rng.below(60) } else { env.rng.below(4) }
}

fn sources_step(vms: &mut [Vm], env: &mut Env) -> Result<(), String> {
    let index = env.any_index(vms.len());
    vms[index].source_step(env)
}
