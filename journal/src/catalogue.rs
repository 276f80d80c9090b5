//! Which checkpoints a journal has.

use std::collections::BTreeMap;

use crate::batch::{Checkpoint, MAX_VOLUMES, RecordKind};
use crate::format::{FooterEvent, Superblock};
use crate::planted::{Bug, planted};

/// A checkpoint that can be opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointEntry {
    /// Number of its record.
    pub seq: u64,
    /// The checkpoint; a view of it is a view at its `cut`.
    pub checkpoint: Checkpoint,
}

/// The checkpoints of a journal, oldest first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Catalogue {
    entries: Vec<CheckpointEntry>,
    syncs: Vec<SyncRange>,
}

/// A stretch of the stream in which a volume was not consistent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SyncRange {
    /// The volume.
    pub volume: u16,
    /// Number of the first sync begin.
    pub begin_seq: u64,
    /// Number of the sync end that closed it; none while it is open.
    pub end_seq: Option<u64>,
}

impl SyncRange {
    /// Whether the volume was inconsistent at this number (B5).
    pub fn contains(&self, seq: u64) -> bool {
        seq >= self.begin_seq && self.end_seq.is_none_or(|end_seq| seq < end_seq)
    }
}

impl Catalogue {
    /// Builds it from all events of the journal in the order of the stream.
    pub fn build<'a>(superblock: &Superblock, events: impl IntoIterator<Item = &'a FooterEvent>) -> Self {
        let (mut entries, mut syncs) = (Vec::new(), Vec::<SyncRange>::new());
        // For each volume the sync that has to end, and which range that will close.
        let mut open: BTreeMap<u16, (u64, usize)> = BTreeMap::new();
        for event in events {
            let record = &event.record;
            match record.kind {
                RecordKind::Checkpoint => {
                    let Ok(checkpoint) = Checkpoint::decode(&record.payload) else { continue };
                    entries.push(CheckpointEntry { seq: record.seq, checkpoint });
                }
                RecordKind::SyncBegin if usize::from(record.volume) < MAX_VOLUMES => {
                    // A sync that begins before the last one ended takes over what that one left.
                    let range = open.get(&record.volume).map(|(_, range)| *range).unwrap_or_else(|| {
                        syncs.push(SyncRange { volume: record.volume, begin_seq: record.seq, end_seq: None });
                        syncs.len() - 1
                    });
                    open.insert(record.volume, (record.sync_id, range));
                }
                RecordKind::SyncEnd => {
                    if open.get(&record.volume).is_some_and(|(sync_id, _)| *sync_id == record.sync_id)
                        && let Some((_, range)) = open.remove(&record.volume)
                    {
                        syncs[range].end_seq = Some(record.seq);
                    }
                }
                _ => {}
            }
        }
        let oldest_seq = superblock.oldest_seq();
        let mut catalogue = Self { entries: Vec::new(), syncs };
        if superblock.state.is_base_sync() {
            return catalogue;
        }
        entries.retain(|entry| {
            let cut = entry.checkpoint.cut;
            cut <= entry.seq && cut >= oldest_seq && catalogue.is_consistent(cut)
        });
        entries.sort_by_key(|entry| (entry.checkpoint.cut, entry.seq));
        catalogue.entries = entries;
        catalogue
    }

    /// Adds a checkpoint.
    pub(crate) fn add(&mut self, entry: CheckpointEntry) {
        let key = |entry: &CheckpointEntry| (entry.checkpoint.cut, entry.seq);
        let at = self.entries.partition_point(|other| key(other) < key(&entry));
        self.entries.insert(at, entry);
    }

    /// The checkpoints, oldest first.
    pub fn checkpoints(&self) -> &[CheckpointEntry] {
        &self.entries
    }

    /// The newest checkpoint at or before a time by the coordinator's clock, µs since the Unix epoch (D4).
    pub fn newest_until(&self, time_us: u64) -> Option<&CheckpointEntry> {
        self.entries.iter().rev().find(|entry| entry.checkpoint.time_us <= time_us)
    }

    /// The stretches in which a volume was inconsistent.
    pub fn syncs(&self) -> &[SyncRange] {
        &self.syncs
    }

    /// Whether no sync was under way at this number.
    pub fn is_consistent(&self, seq: u64) -> bool {
        planted(Bug::CheckpointInsideSyncCounted) || !self.syncs.iter().any(|range| range.contains(seq))
    }
}
