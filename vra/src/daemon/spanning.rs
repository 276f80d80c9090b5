//! Checkpoints of VPGs that span hosts: the machine of [`crate::checkpoint::hosts`] with a clock and the link.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use journal::batch::CheckpointKind;
use tokio::sync::{Notify, oneshot};
use uuid::Uuid;

use super::linking::SharedLink;
use super::spanning_lines::Lines;
use super::{Daemon, lock};
use crate::api::vpg::VraEndpoint;
use crate::api::{VpgId, VraId};
use crate::checkpoint::hosts::{
    AskId, EpochFailure, Holder, SpanningGroup, SpanningGroups, SpanningOutput, SpanningStatus, TakenByHosts,
};
use crate::checkpoint::{CheckpointRefusal, Checkpointer, LocalHold, Member};
use crate::clock::{Clock, Now};
use crate::wire::GroupMessage;

/// How long a checkpoint that was asked for is tried again while others are in the way.
const ASK_FOR: Duration = Duration::from_secs(3);

/// The machine's owner.
pub(super) struct Spanning {
    clock: Clock,
    machine: Mutex<Machine>,
    /// Something is due earlier than before.
    changed: Notify,
    lines: Lines,
}

struct Machine {
    groups: SpanningGroups,
    asked: BTreeMap<AskId, oneshot::Sender<Result<TakenByHosts, EpochFailure>>>,
}

struct Holding<'a>(&'a Checkpointer);

impl Holder for Holding<'_> {
    fn hold(&mut self, members: &[Member], deadline_us: u64, _: Now) -> Result<LocalHold, CheckpointRefusal> {
        self.0.hold(members, deadline_us)
    }
}

impl Spanning {
    pub(super) fn new(own: VraId, incarnation: Uuid, clock: Clock) -> Self {
        let machine = Machine { groups: SpanningGroups::new(own, incarnation), asked: BTreeMap::new() };
        Self { clock, machine: Mutex::new(machine), changed: Notify::new(), lines: Lines::default() }
    }

    /// Follows the groups that there are, and the ways to their VRAs. Must be called inside tokio.
    pub(super) fn follow(
        &self,
        groups: Vec<SpanningGroup>,
        ways: &BTreeMap<VraId, VraEndpoint>,
        link: &SharedLink,
    ) {
        let wanted: BTreeSet<VpgId> = groups.iter().map(|group| group.vpg).collect();
        let mut machine = lock(&self.machine);
        let now = self.clock.now();
        let gone: Vec<VpgId> = machine.groups.groups().filter(|vpg| !wanted.contains(vpg)).collect();
        gone.into_iter().for_each(|vpg| machine.groups.remove_group(vpg, now));
        groups.into_iter().for_each(|group| machine.groups.set_group(group, now));
        // First: aborts for VRAs that are no peers any more need their lines.
        self.dispatch(&mut machine);
        let peers = machine.groups.peers().filter_map(|peer| ways.get(&peer));
        self.lines.follow(peers, link);
        drop(machine);
        self.changed.notify_one();
    }

    /// Whether a VRA is in one of the groups.
    pub(super) fn is_peer(&self, vra: VraId) -> bool {
        lock(&self.machine).groups.peers().any(|peer| peer == vra)
    }

    /// Lines to and from peers.
    pub(super) fn lines(&self) -> &Lines {
        &self.lines
    }

    /// Takes a message that came on the line of a VRA.
    pub(super) fn receive(&self, from: VraId, message: GroupMessage, checkpointer: &Checkpointer) {
        let mut machine = lock(&self.machine);
        machine.groups.receive(from, message, self.clock.now(), &mut Holding(checkpointer));
        self.dispatch(&mut machine);
        drop(machine);
        self.changed.notify_one();
    }

    /// Makes a checkpoint as soon as can be.
    pub(super) async fn take(
        &self,
        vpg: VpgId,
        kind: CheckpointKind,
        tag: &str,
    ) -> Result<TakenByHosts, EpochFailure> {
        let (sender, ended) = oneshot::channel();
        {
            let mut machine = lock(&self.machine);
            let patience_us = u64::try_from(ASK_FOR.as_micros()).unwrap_or(u64::MAX);
            let until_mono_us = self.clock.now().mono_us + patience_us;
            let ask = machine.groups.ask(vpg, kind, tag, until_mono_us);
            machine.asked.insert(ask, sender);
            self.dispatch(&mut machine);
        }
        self.changed.notify_one();
        ended.await.unwrap_or(Err(EpochFailure::Changed))
    }

    /// How a group's checkpoints go; none if it doesn't span hosts.
    pub(super) fn status(&self, vpg: VpgId) -> Option<SpanningStatus> {
        lock(&self.machine).groups.status(vpg, self.clock.now())
    }

    /// Lets go of everything, and tells those that it holds: the VRA ends.
    pub(super) async fn stop(&self) {
        {
            let mut machine = lock(&self.machine);
            let now = self.clock.now();
            let all: Vec<VpgId> = machine.groups.groups().collect();
            all.into_iter().for_each(|vpg| machine.groups.remove_group(vpg, now));
            self.dispatch(&mut machine);
        }
        self.lines.close().await;
    }

    /// Does what has become due, and sleeps until the next thing is. Ends only when cancelled.
    async fn run(&self, checkpointer: &Checkpointer) {
        loop {
            let next_us = {
                let mut machine = lock(&self.machine);
                machine.groups.tick(self.clock.now(), &mut Holding(checkpointer));
                self.dispatch(&mut machine);
                machine.groups.next_wake_us(self.clock.now())
            };
            match next_us {
                Some(next_us) => {
                    let due = tokio::time::sleep_until(self.clock.instant(next_us).into());
                    tokio::select! {
                        () = due => {}
                        () = self.changed.notified() => {}
                    }
                }
                None => self.changed.notified().await,
            }
        }
    }

    fn dispatch(&self, machine: &mut Machine) {
        while let Some(output) = machine.groups.poll_output() {
            match output {
                SpanningOutput::Send { to, message } => self.lines.send(to, message),
                SpanningOutput::Ended { asked: Some(ask), result, .. } => {
                    // Whoever asked may have gone.
                    if let Some(asked) = machine.asked.remove(&ask) {
                        let _ = asked.send(result);
                    }
                }
                // It is in the status.
                SpanningOutput::Ended { asked: None, .. } => {}
            }
        }
    }
}

impl Daemon {
    /// Drives the checkpoints that span hosts. Ends only when cancelled.
    pub(super) async fn drive_spanning(self: Arc<Self>) {
        self.spanning.run(&self.checkpointer).await;
    }
}
