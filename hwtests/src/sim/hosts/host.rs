//! A source VRA: its process with the product's machine, and what outlives it.

use std::collections::BTreeSet;
use std::sync::Arc;

use uuid::Uuid;
use vra::api::{VpgId, VraId};
use vra::checkpoint::hosts::{
    GroupHost, Holder, SpanningGroup, SpanningGroups, SpanningOutput, SpanningStatus,
};
use vra::checkpoint::{CheckpointRefusal, HeldEpoch, LocalHold, Member};
use vra::clock::Now;
use vra::wire::GroupMessage;

use super::super::env::Env;
use super::group_vm::GroupVm;

/// Clocks of hosts differ by so much at most, in µs.
const CLOCK_SPREAD_US: u64 = 3_000_000;

/// A definition of the group, as the manager gives it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Definition {
    pub(super) member_set_version: u64,
    pub(super) interval_us: u64,
    pub(super) deadline_us: u64,
}

pub(super) struct Host {
    pub(super) vra: VraId,
    /// Which of the world's VMs are on it.
    pub(super) vms: Vec<usize>,
    /// The last definition that it was given.
    pub(super) definition: Definition,
    /// Deadlines of former ones, and until when a hold that began under them may last.
    former_deadlines: Vec<(u64, u64)>,
    process: Option<Process>,
    /// When a dead one starts again.
    pub(super) starts_us: u64,
    /// Until then its process does nothing but let holds expire, which has a thread of its own.
    pub(super) stalled_until_us: u64,
    mono_offset_us: u64,
    wall_offset_us: u64,
}

struct Process {
    groups: SpanningGroups,
    /// What the product's thread for deadlines has.
    watched: Vec<Arc<HeldEpoch>>,
}

struct Watching<'a>(&'a mut Vec<Arc<HeldEpoch>>);

impl Holder for Watching<'_> {
    fn hold(
        &mut self,
        members: &[Member],
        deadline_us: u64,
        now: Now,
    ) -> Result<LocalHold, CheckpointRefusal> {
        LocalHold::begin(members, now, deadline_us, &mut |held| self.0.push(Arc::clone(held)))
    }
}

impl Host {
    pub(super) fn new(vra: VraId, vms: Vec<usize>, definition: Definition, env: &mut Env) -> Self {
        Self {
            vra,
            vms,
            definition,
            former_deadlines: Vec::new(),
            process: None,
            starts_us: 0,
            stalled_until_us: 0,
            mono_offset_us: env.rng.below(1_000_000_000),
            wall_offset_us: env.rng.below(CLOCK_SPREAD_US),
        }
    }

    /// It is given another definition.
    pub(super) fn define(&mut self, definition: Definition, env: &Env) {
        let former = std::mem::replace(&mut self.definition, definition);
        self.former_deadlines.push((former.deadline_us, env.now().mono_us + former.deadline_us));
    }

    /// How long its VMs may be held by its own definition, whatever a coordinator asks for; and by a former one while holds may be left that
    /// began under it.
    pub(super) fn longest_hold_us(&mut self, slack_us: u64, env: &Env) -> u64 {
        let now_us = env.now().mono_us;
        self.former_deadlines.retain(|(_, until_us)| now_us <= until_us + slack_us);
        let former = self.former_deadlines.iter().map(|(deadline_us, _)| *deadline_us).max();
        self.definition.deadline_us.max(former.unwrap_or(0))
    }

    pub(super) fn is_up(&self) -> bool {
        self.process.is_some()
    }

    pub(super) fn now(&self, env: &Env) -> Now {
        let now = env.now();
        Now { mono_us: now.mono_us + self.mono_offset_us, wall_us: now.wall_us + self.wall_offset_us }
    }

    pub(super) fn start(&mut self, env: &mut Env) {
        let incarnation = Uuid::from_u64_pair(env.rng.below(u64::MAX), env.rng.below(u64::MAX));
        self.process =
            Some(Process { groups: SpanningGroups::new(self.vra, incarnation), watched: Vec::new() });
    }

    pub(super) fn kill(&mut self) {
        self.process = None;
    }

    /// The machine follows the definition and the VMs' cores.
    pub(super) fn follow(&mut self, vpg: VpgId, hosts: &[GroupHost], vms: &[GroupVm], env: &Env) {
        let now = self.now(env);
        let Some(process) = &mut self.process else { return };
        let group = SpanningGroup {
            vpg,
            member_set_version: self.definition.member_set_version,
            interval_us: self.definition.interval_us,
            deadline_us: self.definition.deadline_us,
            hosts: hosts.to_vec(),
            members: self.vms.iter().map(|vm| vms[*vm].member()).collect(),
        };
        process.groups.set_group(group, now);
    }

    pub(super) fn receive(&mut self, from: VraId, message: GroupMessage, env: &Env) {
        let now = self.now(env);
        if let Some(Process { groups, watched }) = &mut self.process {
            groups.receive(from, message, now, &mut Watching(watched));
        }
    }

    /// Does what is due; says how many holds have expired.
    pub(super) fn tick(&mut self, env: &Env) -> usize {
        let now = self.now(env);
        let Some(Process { groups, watched }) = &mut self.process else { return 0 };
        let expired = watched.iter().filter(|held| held.expire_if_due(now)).count();
        watched.retain(|held| !held.is_over());
        if env.now().mono_us < self.stalled_until_us {
            return expired;
        }
        if groups.next_wake_us(now).is_some_and(|at_us| at_us <= now.mono_us) {
            groups.tick(now, &mut Watching(watched));
        }
        expired
    }

    pub(super) fn ask(&mut self, vpg: VpgId, tag: &str, env: &Env) {
        let now = self.now(env);
        if let Some(process) = &mut self.process {
            let until_mono_us = now.mono_us + 2_000_000;
            process.groups.ask(vpg, journal::batch::CheckpointKind::Tagged, tag, until_mono_us);
        }
    }

    pub(super) fn poll_output(&mut self) -> Option<SpanningOutput> {
        self.process.as_mut()?.groups.poll_output()
    }

    pub(super) fn status(&self, vpg: VpgId, env: &Env) -> Option<SpanningStatus> {
        self.process.as_ref()?.groups.status(vpg, self.now(env))
    }

    /// As the definition names it.
    pub(super) fn of_group(&self, vms: &[GroupVm]) -> GroupHost {
        let ids: BTreeSet<_> = self.vms.iter().map(|vm| vms[*vm].vm).collect();
        GroupHost { vra: self.vra, vms: ids }
    }
}
