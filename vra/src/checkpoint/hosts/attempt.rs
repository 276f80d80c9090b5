use std::collections::BTreeSet;

use journal::batch::{CheckpointKind, Epoch};

use super::failure::EpochFailure;
use super::group::GroupHost;
use super::machine::AskId;
use crate::api::{VmId, VraId};
use crate::wire::{DeclineCode, Held, HeldMember};

/// One attempt at a checkpoint, at its coordinator.
pub(super) struct Attempt {
    pub(super) epoch: Epoch,
    pub(super) kind: CheckpointKind,
    pub(super) tag: String,
    /// Who asked for it, and until when it may be tried again; none for one by the clock.
    pub(super) asked: Option<(AskId, u64)>,
    pub(super) began_mono_us: u64,
    /// Of the holds, in µs.
    pub(super) deadline_us: u64,
    /// When all were held, by both clocks.
    pub(super) released: Option<(u64, u64)>,
    hosts: Vec<AttemptHost>,
}

struct AttemptHost {
    vra: VraId,
    vms: BTreeSet<VmId>,
    /// The name of its hold.
    hold: Option<u64>,
    cuts: Vec<HeldMember>,
    recorded: bool,
}

impl Attempt {
    pub(super) fn new(
        epoch: Epoch,
        (kind, tag): (CheckpointKind, String),
        asked: Option<(AskId, u64)>,
        hosts: &[GroupHost],
        (began_mono_us, deadline_us): (u64, u64),
    ) -> Self {
        let host = |host: &GroupHost| AttemptHost {
            vra: host.vra,
            vms: host.vms.clone(),
            hold: None,
            cuts: Vec::new(),
            recorded: false,
        };
        let hosts = hosts.iter().map(host).collect();
        Self { epoch, kind, tag, asked, began_mono_us, deadline_us, released: None, hosts }
    }

    /// A host is held. An answer that comes again changes nothing.
    pub(super) fn held(&mut self, from: VraId, held: &Held) -> Result<(), EpochFailure> {
        let Some(host) = self.hosts.iter_mut().find(|host| host.vra == from) else { return Ok(()) };
        if host.hold.is_some() {
            return Ok(());
        }
        let vms: BTreeSet<VmId> = held.members.iter().map(|member| member.vm).collect();
        if vms != host.vms || vms.len() != held.members.len() {
            return Err(EpochFailure::OtherVms { vra: from });
        }
        host.hold = Some(held.hold);
        host.cuts.clone_from(&held.members);
        Ok(())
    }

    /// The hosts that haven't answered.
    pub(super) fn unheld(&self) -> impl Iterator<Item = VraId> {
        self.hosts.iter().filter(|host| host.hold.is_none()).map(|host| host.vra)
    }

    /// The hosts and the names of their holds.
    pub(super) fn holds(&self) -> impl Iterator<Item = (VraId, u64)> {
        self.hosts.iter().filter_map(|host| Some((host.vra, host.hold?)))
    }

    /// What became of a host's records. Says whether all have theirs now.
    pub(super) fn recorded(
        &mut self,
        from: VraId,
        refused: Option<DeclineCode>,
    ) -> Result<bool, EpochFailure> {
        if self.released.is_none() {
            return Ok(false);
        }
        if let Some(host) = self.hosts.iter_mut().find(|host| host.vra == from && !host.recorded) {
            if let Some(code) = refused {
                return Err(EpochFailure::NotRecorded { vra: from, code });
            }
            host.recorded = true;
        }
        Ok(self.hosts.iter().all(|host| host.recorded))
    }

    /// Why it has failed, if its time is over. The coordinator itself, `own`, is held only after the others: it is never late.
    pub(super) fn overdue(&self, own: VraId, now_us: u64) -> Option<EpochFailure> {
        if now_us < self.due_mono_us() {
            return None;
        }
        match self.released {
            // The first that were held have let go by now.
            None => self
                .hosts
                .iter()
                .find(|host| host.hold.is_none() && host.vra != own)
                .map(|host| EpochFailure::Late { vra: host.vra, deadline_us: self.deadline_us }),
            Some(_) => self
                .hosts
                .iter()
                .find(|host| !host.recorded)
                .map(|host| EpochFailure::Unconfirmed { vra: host.vra }),
        }
    }

    /// When it is overdue, in µs by the monotonic clock.
    pub(super) fn due_mono_us(&self) -> u64 {
        let from_mono_us = self.released.map_or(self.began_mono_us, |(mono_us, _)| mono_us);
        from_mono_us + self.deadline_us
    }

    pub(super) fn hosts(&self) -> impl Iterator<Item = VraId> {
        self.hosts.iter().map(|host| host.vra)
    }

    /// Every member and its cut.
    pub(super) fn cuts(&self) -> Vec<HeldMember> {
        self.hosts.iter().flat_map(|host| host.cuts.iter().copied()).collect()
    }
}
