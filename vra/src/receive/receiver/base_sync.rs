//! The receiver's part that is about base syncs: batches that go to the recovery disks (B6).

use std::collections::{BTreeSet, VecDeque};

use bytes::Bytes;
use journal::batch::{BatchView, RecordKind};
use journal::format::{ChainPoint, VolumeState};
use journal::writer::{Change, OfferError};

use super::Receiver;
use crate::clock::Now;
use crate::planted::{Planted, is_planted};

/// Where a base sync stands.
#[derive(Debug, Default)]
pub(super) struct BaseSync {
    /// The sync that the disks' content belongs to.
    pub(super) sync_id: u64,
    /// Volumes that it has ended.
    pub(super) ended: BTreeSet<u16>,
    /// The last batch that the next group has, if any.
    pub(super) gathered: Option<ChainPoint>,
    /// The last batch of the group that is being applied.
    pub(super) applying: Option<ChainPoint>,
    /// The group that is gathered or being applied ends the sync.
    pub(super) ends: bool,
    /// The last ticket of an advance that isn't durable yet.
    pub(super) advance_ticket: Option<u64>,
    /// The change after which the disks may be written for the first time.
    pub(super) written_ticket: Option<u64>,
    /// Batches after the sync's end, for the journal, until the end is durable.
    pub(super) after_end: VecDeque<(Bytes, u64)>,
}

impl BaseSync {
    /// Some of the volumes' end records have come, others not. The base stays before them: the superblock doesn't know which have ended.
    pub(super) fn is_between_ends(&self) -> bool {
        !self.ended.is_empty() && !self.ends
    }
}

impl Receiver {
    pub(super) fn take_for_base(
        &mut self,
        bytes: &Bytes,
        view: &BatchView<'_>,
        now: Now,
    ) -> Result<(), OfferError> {
        let stamp_us = self.stamp_us(now);
        let point = self.writer.accept_for_base(view, stamp_us)?;
        self.base.gather(bytes, view);
        self.base_sync.gathered = Some(point);
        for record in view.records() {
            match record.kind() {
                RecordKind::SyncBegin if record.sync_id() != self.base_sync.sync_id => {
                    self.base_sync.sync_id = record.sync_id();
                    self.base_sync.ended.clear();
                    let change = Change::BeginBaseSync { sync_id: record.sync_id() };
                    if self.writer.change(change).is_err() {
                        return Err(OfferError::WrongState);
                    }
                }
                RecordKind::SyncEnd if record.sync_id() == self.base_sync.sync_id => {
                    self.base_sync.ended.insert(record.volume());
                }
                _ => {}
            }
        }
        self.base_sync.ends = self.base_sync.ended.len() == self.identity.volumes.len();
        Ok(())
    }

    pub(super) fn begin_base_group(&mut self, now: Now) {
        if self.base.is_busy() || self.base_sync.applying.is_some() || self.base_sync.is_between_ends() {
            return;
        }
        let Some(through) = self.base_sync.gathered else { return };
        // What is written now may belong to a sync that never ends: a later one must not skip holes over it. And without history there is
        // nothing that would need the sizes of before (E3).
        let volumes = &self.writer.superblock().volumes;
        let sizes = self.identity.volumes.iter().map(|volume| volume.size_bytes);
        let written: Vec<VolumeState> = volumes
            .iter()
            .zip(sizes)
            .map(|(volume, size_bytes)| VolumeState { fresh_image: false, size_bytes, ..*volume })
            .collect();
        if *volumes != written {
            if self.base_sync.written_ticket.is_none() {
                self.base_sync.written_ticket = self.writer.change(Change::SetVolumes(written)).ok();
            }
            return;
        }
        self.base_sync.gathered = None;
        self.base_sync.applying = Some(through);
        self.group_began_us = now.mono_us;
        if is_planted(Planted::BaseMovedEarly) {
            self.move_base(through);
        }
        if self.base.begin() {
            self.group_applied();
        }
    }

    pub(super) fn group_applied(&mut self) {
        let Some(through) = self.base_sync.applying.take() else { return };
        if !is_planted(Planted::BaseMovedEarly) {
            self.move_base(through);
        }
    }

    /// The recovery disks hold everything up to `through`, durably.
    pub(super) fn move_base(&mut self, through: ChainPoint) {
        let end = self.base_sync.ends && self.base_sync.gathered.is_none();
        self.base_sync.advance_ticket = self.writer.change(Change::AdvanceBase { through, end }).ok();
    }
}
