use journal::batch::Checkpoint;

use super::group::SpanningGroup;
use super::machine::Holder;
use crate::api::{VmId, VraId};
use crate::capture::modes::HoldRefusal;
use crate::checkpoint::hold_log::HoldLog;
use crate::checkpoint::{CheckpointRefusal, CommitRefusal, LocalHold, Member};
use crate::clock::Now;
use crate::wire::{DeclineCode, GroupEpoch, Held, HeldMember, Hold, Release};

/// A host's part in the attempts at its group's checkpoints: one hold at a time.
#[derive(Default)]
pub(super) struct Participant {
    held: Option<HeldGroup>,
    holds: HoldLog,
}

struct HeldGroup {
    at: GroupEpoch,
    /// Its name on the wire.
    hold: u64,
    coordinator: VraId,
    member_set_version: u64,
    local: LocalHold,
}

/// A hold that ended.
pub(super) struct EndedHold {
    pub(super) held_us: u64,
    /// Every VM has its record, or why not.
    pub(super) taken: Result<(), DeclineCode>,
}

impl Participant {
    /// Whether the group's VMs on this host could be held now.
    pub(super) fn check(group: &SpanningGroup) -> Result<(), (DeclineCode, Option<VmId>)> {
        for member in members_of(group)? {
            let checked = member.core.check_hold();
            checked.map_err(|refusal| refused(CheckpointRefusal::Hold { vm: member.vm, refusal }))?;
        }
        Ok(())
    }

    /// Holds the group's VMs on this host. `name` is one that no other hold of this run has.
    pub(super) fn hold(
        &mut self,
        group: &SpanningGroup,
        from: VraId,
        asked: &Hold,
        name: u64,
        now: Now,
        holder: &mut dyn Holder,
    ) -> Result<Held, (DeclineCode, Option<VmId>)> {
        if asked.member_set_version != group.member_set_version {
            return Err((DeclineCode::MemberSet, None));
        }
        let members = members_of(group)?;
        if let Some(held) = &self.held {
            let (one, other) = (held.at.epoch, asked.at.epoch);
            // A coordinator that asks anew has given up what it asked before.
            let is_newer =
                held.coordinator == from && (one.nonce != other.nonce || one.counter < other.counter);
            if !is_newer && !held.local.is_over() {
                return Err((DeclineCode::Busy, None));
            }
            self.end(now);
        }
        let deadline_us = u64::from(asked.deadline_us).min(group.deadline_us);
        let local = holder.hold(members, deadline_us, now).map_err(refused)?;
        let cuts = local.cuts().map(|(vm, cut)| HeldMember { vm, cut }).collect();
        self.held = Some(HeldGroup {
            at: asked.at,
            hold: name,
            coordinator: from,
            member_set_version: group.member_set_version,
            local,
        });
        Ok(Held { at: asked.at, hold: name, members: cuts })
    }

    /// Writes the records of the hold that is named, if it still stands.
    pub(super) fn release(&mut self, from: VraId, release: &Release, now: Now) -> EndedHold {
        let is_named =
            |held: &mut HeldGroup| (held.at, held.hold, held.coordinator) == (release.at, release.hold, from);
        let Some(held) = self.held.take_if(is_named) else {
            return EndedHold { held_us: 0, taken: Err(DeclineCode::NoSuchHold) };
        };
        let checkpoint = Checkpoint {
            epoch: release.at.epoch,
            cut: 0,
            member_set_version: held.member_set_version,
            time_us: release.time_us,
            kind: release.kind,
            tag: release.tag.clone(),
        };
        let held_us = held.local.held_us(now);
        self.holds.note(held_us);
        let taken = held.local.release(&checkpoint, now).map(drop).map_err(|refusal| match refusal {
            CheckpointRefusal::Commit { refusal: CommitRefusal::Expired, .. } => DeclineCode::Expired,
            CheckpointRefusal::NotFrozen { .. } => DeclineCode::NotFrozen,
            _ => DeclineCode::NotPublished,
        });
        EndedHold { held_us, taken }
    }

    /// The coordinator has given an attempt up.
    pub(super) fn abort(&mut self, from: VraId, at: GroupEpoch, now: Now) {
        if self.held.as_ref().is_some_and(|held| held.at == at && held.coordinator == from) {
            self.end(now);
        }
    }

    /// Lets go of what is held.
    pub(super) fn end(&mut self, now: Now) {
        if let Some(held) = self.held.take() {
            self.holds.note(held.local.held_us(now));
            held.local.abort();
        }
    }

    /// How long completions were held.
    pub(super) fn holds(&self) -> &HoldLog {
        &self.holds
    }
}

fn members_of(group: &SpanningGroup) -> Result<&[Member], (DeclineCode, Option<VmId>)> {
    let members = group.members.as_deref().filter(|members| !members.is_empty());
    members.ok_or((DeclineCode::NotProtected, None))
}

fn refused(refusal: CheckpointRefusal) -> (DeclineCode, Option<VmId>) {
    match refusal {
        CheckpointRefusal::Hold { vm, refusal } => {
            let code = match refusal {
                HoldRefusal::NotStreaming => DeclineCode::NotStreaming,
                HoldRefusal::InSync => DeclineCode::InSync,
                HoldRefusal::AlreadyHolding => DeclineCode::Busy,
            };
            (code, Some(vm))
        }
        CheckpointRefusal::Commit { vm, .. } => (DeclineCode::NotPublished, Some(vm)),
        CheckpointRefusal::NotFrozen { vm } => (DeclineCode::NotFrozen, Some(vm)),
        CheckpointRefusal::NoMembers => (DeclineCode::NotProtected, None),
    }
}
