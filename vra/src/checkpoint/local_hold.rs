//! All members of a group on this host, held together. A coordinator of several hosts drives one of these on each: `begin`
//! answers its hold message, `release` and `abort` follow its verdict.

use std::sync::Arc;
use std::time::Instant;

use journal::batch::{Checkpoint, CheckpointKind, Epoch};
use thiserror::Error;

use super::freeze::{Freeze, FreezeMark};
use super::held_epoch::{CommitRefusal, HeldEpoch};
use crate::api::VmId;
use crate::capture::modes::HoldRefusal;
use crate::capture::numbering::VmCore;
use crate::clock::Now;

/// A VM of a group.
#[derive(Clone)]
pub struct Member {
    /// Which VM.
    pub vm: VmId,
    /// Its core.
    pub core: Arc<VmCore>,
    /// Whether its guest is frozen.
    pub freeze: Freeze,
}

/// The members, held.
pub struct LocalHold {
    held: Vec<HeldMember>,
    began_mono_us: u64,
}

struct HeldMember {
    vm: VmId,
    epoch: Arc<HeldEpoch>,
    freeze: Freeze,
    /// How its guest was just before its cut was taken.
    mark: FreezeMark,
}

/// A checkpoint of all members on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TakenCheckpoint {
    /// The attempt.
    pub epoch: Epoch,
    /// When, in µs since the Unix epoch.
    pub time_us: u64,
    /// Why.
    pub kind: CheckpointKind,
    /// Its name, or empty.
    pub tag: String,
    /// Cut and record of each member.
    pub members: Vec<TakenMember>,
    /// How long the guests' completions were held, in µs.
    pub held_us: u64,
}

/// A member's part of a [`TakenCheckpoint`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TakenMember {
    /// Which VM.
    pub vm: VmId,
    /// The last number that belongs to it.
    pub cut: u64,
    /// The number of its record.
    pub seq: u64,
}

/// Why there is no checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CheckpointRefusal {
    /// A member can't be held now.
    #[error("VM {vm} can't take part: {refusal}")]
    Hold {
        /// Which VM.
        vm: VmId,
        /// Why not.
        refusal: HoldRefusal,
    },
    /// A member wrote no record.
    #[error("VM {vm} wrote no checkpoint: {refusal}")]
    Commit {
        /// Which VM.
        vm: VmId,
        /// Why not.
        refusal: CommitRefusal,
    },
    /// A guest wasn't frozen for a checkpoint that says so.
    #[error("the guest of VM {vm} isn't frozen")]
    NotFrozen {
        /// Which VM.
        vm: VmId,
    },
    /// The group has no member here.
    #[error("no VM of the group is protected on this host")]
    NoMembers,
}

impl LocalHold {
    /// Holds all members, or none. `watch` is given each hold as soon as it stands, so that it expires even if this thread
    /// doesn't come back.
    pub fn begin(
        members: &[Member],
        now: Now,
        deadline_us: u64,
        watch: &mut dyn FnMut(&Arc<HeldEpoch>),
    ) -> Result<Self, CheckpointRefusal> {
        if members.is_empty() {
            return Err(CheckpointRefusal::NoMembers);
        }
        let mut held = Vec::with_capacity(members.len());
        for member in members {
            // Before the cut: a guest that is frozen only after it wrote in between.
            let mark = member.freeze.mark(Instant::now());
            // An early return drops the holds that stand: they expire.
            let epoch = HeldEpoch::begin(member.core.clone(), now.mono_us + deadline_us)
                .map_err(|refusal| CheckpointRefusal::Hold { vm: member.vm, refusal });
            let epoch = match epoch {
                Ok(epoch) => Arc::new(epoch),
                Err(refusal) => {
                    Self { held, began_mono_us: now.mono_us }.abort();
                    return Err(refusal);
                }
            };
            watch(&epoch);
            held.push(HeldMember { vm: member.vm, epoch, freeze: member.freeze.clone(), mark });
        }
        Ok(Self { held, began_mono_us: now.mono_us })
    }

    /// Each member and the last number that belongs to the checkpoint.
    pub fn cuts(&self) -> impl Iterator<Item = (VmId, u64)> {
        self.held.iter().map(|member| (member.vm, member.epoch.cut()))
    }

    /// Whether a member isn't held any more: the group can't get its checkpoint.
    pub fn is_over(&self) -> bool {
        self.held.iter().any(|member| member.epoch.is_over())
    }

    /// How long completions have been held, in µs: until now, or until the deadline let them go.
    pub fn held_us(&self, now: Now) -> u64 {
        let expired_us = self.held.iter().filter_map(|member| member.epoch.expired_mono_us()).max();
        expired_us.unwrap_or(now.mono_us).saturating_sub(self.began_mono_us)
    }

    /// All members of all hosts are held: writes the records and lets the completions go. `checkpoint` has the group's
    /// fields; each member writes its own cut.
    pub fn release(self, checkpoint: &Checkpoint, now: Now) -> Result<TakenCheckpoint, CheckpointRefusal> {
        let frozen_at = Instant::now();
        let is_thawed = |member: &&HeldMember| !member.mark.lasts_until(member.freeze.mark(frozen_at));
        if checkpoint.kind == CheckpointKind::Application
            && let Some(vm) = self.held.iter().find(is_thawed).map(|member| member.vm)
        {
            self.abort();
            return Err(CheckpointRefusal::NotFrozen { vm });
        }
        let mut members = Vec::with_capacity(self.held.len());
        let mut refused = None;
        for HeldMember { vm, epoch, .. } in &self.held {
            match epoch.commit(checkpoint, now) {
                Ok(seq) => members.push(TakenMember { vm: *vm, cut: epoch.cut(), seq }),
                Err(refusal) => refused = refused.or(Some(CheckpointRefusal::Commit { vm: *vm, refusal })),
            }
        }
        match refused {
            Some(refusal) => Err(refusal),
            None => Ok(TakenCheckpoint {
                epoch: checkpoint.epoch,
                time_us: checkpoint.time_us,
                kind: checkpoint.kind,
                tag: checkpoint.tag.clone(),
                members,
                held_us: now.mono_us.saturating_sub(self.began_mono_us),
            }),
        }
    }

    /// Lets the completions go without records.
    pub fn abort(self) {
        for member in &self.held {
            member.epoch.expire();
        }
    }
}
