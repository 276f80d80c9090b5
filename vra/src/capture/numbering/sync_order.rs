//! The place of sync data in the order of a VM's writes (B3).
//!
//! A read of the local disk is watched from before it begins. Its content gets a number only if no overlapping write was
//! in flight or received since; otherwise old data would be put over new. After a few tries the range is held: overlapping
//! writes are deferred before they take a number, those in flight land, and the next read is clean for certain.

use journal::batch::RecordKind;
use ublk::serve::Waker;

use crate::capture::entry::{Entry, Payload};
use crate::capture::modes::PublishRefusal;
use crate::capture::payload::Piece;
use crate::planted::{Planted, is_planted};

use super::in_flight::ByteRange;
use super::machine::{Core, MAX_WATCHES, Watch};
use super::terms::Wakeups;

/// One watched read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WatchId {
    index: u32,
    /// Tells this use of the place from earlier ones.
    serial: u64,
}

/// What a watched read found.
#[derive(Debug)]
pub enum SyncContent {
    /// Data.
    Data(Piece),
    /// The range reads zeroes.
    Zeroes,
    /// Nothing to send: a hole that the target's fresh image has too.
    Skip,
}

/// Whether a watched read got its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Confirmed {
    /// It has a number, or nothing needed to be sent.
    Done,
    /// A write came between: read again.
    ReadAgain,
}

impl Core {
    /// Begins a sync of the given volumes with their sizes in bytes: publishes a begin record for each. No checkpoint is
    /// taken until its end.
    pub fn begin_sync(
        &mut self,
        sync_id: u64,
        volumes: &[(u16, u64)],
        now_us: u64,
        wakeups: &mut Wakeups,
    ) -> Result<u64, PublishRefusal> {
        if self.sync_id.is_some() {
            return Err(PublishRefusal::InSync);
        }
        let entries = marks(RecordKind::SyncBegin, sync_id, volumes);
        let seq = self.publish_own(entries, self.data_reserve(), now_us, wakeups)?;
        self.sync_id = Some(sync_id);
        Ok(seq)
    }

    /// Ends the sync: everything that it had to send is published.
    pub fn end_sync(
        &mut self,
        sync_id: u64,
        volumes: &[(u16, u64)],
        now_us: u64,
        wakeups: &mut Wakeups,
    ) -> Result<u64, PublishRefusal> {
        if self.sync_id != Some(sync_id) {
            return Err(PublishRefusal::NotStreaming);
        }
        let entries = marks(RecordKind::SyncEnd, sync_id, volumes);
        let seq = self.publish_own(entries, 0, now_us, wakeups)?;
        self.sync_id = None;
        Ok(seq)
    }

    /// Says how large the given volumes are from now on, in bytes: published before a guest can reach what is new of them (E3). Not while a sync
    /// is under way, which is about their former sizes.
    pub fn publish_sizes(
        &mut self,
        volumes: &[(u16, u64)],
        now_us: u64,
        wakeups: &mut Wakeups,
    ) -> Result<u64, PublishRefusal> {
        if self.sync_id.is_some() {
            return Err(PublishRefusal::InSync);
        }
        self.publish_own(marks(RecordKind::Resize, 0, volumes), self.data_reserve(), now_us, wakeups)
    }

    /// Gives what the local disk has in a range its place in the order. No guest may reach the range yet: it lies behind the end that doors show.
    pub fn publish_new(
        &mut self,
        volume: u16,
        range: ByteRange,
        piece: Piece,
        now_us: u64,
        wakeups: &mut Wakeups,
    ) -> Result<u64, PublishRefusal> {
        let entry = Entry {
            volume,
            offset_bytes: range.start,
            len_bytes: range.len_bytes(),
            payload: Payload::Piece(piece),
            ..Entry::control(RecordKind::Write)
        };
        self.publish_own(std::iter::once(entry), self.data_reserve(), now_us, wakeups)
    }

    /// Watches a range that is about to be read. None when too many reads are watched or no sync is under way.
    pub fn watch(&mut self, volume: u16, range: ByteRange) -> Option<WatchId> {
        self.sync_id?;
        let index = match self.watches.iter().position(Option::is_none) {
            Some(index) => index,
            None if self.watches.len() < MAX_WATCHES => {
                self.watches.push(None);
                self.watches.len() - 1
            }
            None => return None,
        };
        self.next_watch_serial += 1;
        let serial = self.next_watch_serial;
        let dirty = self.in_flight.has_unlanded(volume, range);
        self.watches[index] = Some(Watch { serial, volume, range, dirty });
        Some(WatchId { index: index as u32, serial })
    }

    /// Gives the content of `range`, a part of what is watched, its place in the order, if nothing came between. The watch
    /// ends.
    pub fn confirm(
        &mut self,
        watch_id: WatchId,
        range: ByteRange,
        content: &SyncContent,
        now_us: u64,
        wakeups: &mut Wakeups,
    ) -> Result<Confirmed, PublishRefusal> {
        let (Some(sync_id), Some(watch)) = (self.sync_id, self.end_watch(watch_id)) else {
            return Err(PublishRefusal::NotStreaming);
        };
        debug_assert!(watch.range.start <= range.start && range.end <= watch.range.end);
        if watch.dirty && !is_planted(Planted::SyncOverWrites) {
            return Ok(Confirmed::ReadAgain);
        }
        let (kind, payload) = match content {
            SyncContent::Data(piece) => (RecordKind::SyncData, Payload::Piece(piece.clone())),
            SyncContent::Zeroes => (RecordKind::Zeroes, Payload::None),
            SyncContent::Skip => return Ok(Confirmed::Done),
        };
        let entry = Entry {
            volume: watch.volume,
            offset_bytes: range.start,
            len_bytes: range.len_bytes(),
            sync_id,
            payload,
            ..Entry::control(kind)
        };
        self.publish_own(std::iter::once(entry), self.data_reserve(), now_us, wakeups)?;
        Ok(Confirmed::Done)
    }

    /// Ends a watch whose read is of no use.
    pub fn end_watch(&mut self, watch_id: WatchId) -> Option<Watch> {
        let place = self.watches.get_mut(watch_id.index as usize)?;
        if place.as_ref()?.serial != watch_id.serial {
            return None;
        }
        place.take()
    }

    /// Defers writes to the range from now on, before they take a number. One range of a volume at a time.
    pub fn hold_range(&mut self, volume: u16, range: ByteRange) -> Result<(), PublishRefusal> {
        if self.sync_id.is_none() {
            return Err(PublishRefusal::NotStreaming);
        }
        self.volumes[usize::from(volume)].held_range = Some(range);
        Ok(())
    }

    /// Whether no write to the range is still under way at the local disk; if one is, the syncer is woken when it lands.
    pub fn is_range_drained(&mut self, volume: u16, range: ByteRange) -> bool {
        let drained = !self.in_flight.has_unlanded(volume, range);
        self.syncer.asleep = !drained;
        drained
    }

    /// Lets deferred writes of the volume go on.
    pub fn release_range(&mut self, volume: u16, wakeups: &mut Wakeups) {
        if self.volumes[usize::from(volume)].held_range.take().is_some() {
            self.wake_deferred(wakeups);
        }
    }

    /// Who is woken when a held range has drained, and when the mode changes.
    pub fn set_syncer(&mut self, waker: Waker) {
        self.syncer.waker = Some(waker);
        self.syncer.asleep = true;
    }
}

fn marks(
    kind: RecordKind,
    sync_id: u64,
    volumes: &[(u16, u64)],
) -> impl ExactSizeIterator<Item = Entry> + use<'_> {
    volumes.iter().map(move |&(volume, size_bytes)| Entry {
        volume,
        len_bytes: size_bytes,
        sync_id,
        ..Entry::control(kind)
    })
}
