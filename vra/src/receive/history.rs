use std::collections::{BTreeSet, VecDeque};

use bytes::Bytes;
use journal::batch::{BatchView, Checkpoint, Record, RecordKind};
use journal::catalogue::Catalogue;
use journal::format::{FooterEvent, Superblock};

use super::receiver_types::HistorySpan;

/// Everything in a journal that isn't data: checkpoints and the borders of syncs, in the order of the stream, so that they can be listed
/// without reading the file.
#[derive(Clone, Debug)]
pub struct History {
    events: Vec<FooterEvent>,
    /// Events of batches that are not durable yet.
    pending: VecDeque<FooterEvent>,
    /// Volumes in a sync, by what is durable.
    open_syncs: BTreeSet<u16>,
    /// Of the checkpoints outside of syncs.
    span: Option<HistorySpan>,
}

impl History {
    /// Of a journal that was opened: all its events are durable.
    pub(super) fn new(events: Vec<FooterEvent>) -> Self {
        let mut history =
            Self { events: Vec::new(), pending: events.into(), open_syncs: BTreeSet::new(), span: None };
        history.durable(u64::MAX);
        history
    }

    /// The checkpoints that can be opened.
    pub fn catalogue(&self, superblock: &Superblock) -> Catalogue {
        Catalogue::build(superblock, &self.events)
    }

    /// Whether a sync goes through the journal now.
    pub fn is_in_sync(&self) -> bool {
        !self.open_syncs.is_empty()
    }

    /// From when to when there are checkpoints, as of what is durable.
    pub fn span(&self) -> Option<HistorySpan> {
        self.span
    }

    /// Takes the events of a batch that was given to the journal.
    pub(super) fn take(&mut self, view: &BatchView<'_>) {
        for record in view.records() {
            if matches!(record.kind(), RecordKind::Void) || record.kind().changes_data() {
                continue;
            }
            let record = Record {
                seq: record.seq(),
                time_us: record.time_us(),
                volume: record.volume(),
                kind: record.kind(),
                offset_bytes: record.offset_bytes(),
                len_bytes: record.len_bytes(),
                sync_id: record.sync_id(),
                argument: record.argument(),
                // A copy, since a handle would keep the whole batch.
                payload: Bytes::copy_from_slice(record.payload()),
            };
            self.pending.push_back(FooterEvent { position_seq: record.seq, record });
        }
    }

    /// Everything up to `seq` is durable.
    pub(super) fn durable(&mut self, seq: u64) {
        while let Some(event) = self.pending.pop_front_if(|event| event.position_seq <= seq) {
            match event.record.kind {
                RecordKind::SyncBegin => {
                    self.open_syncs.insert(event.record.volume);
                }
                RecordKind::SyncEnd => {
                    self.open_syncs.remove(&event.record.volume);
                }
                RecordKind::Checkpoint if self.open_syncs.is_empty() => self.count(&event.record),
                _ => {}
            }
            self.events.push(event);
        }
    }

    /// What was taken and is not durable is not going to be.
    pub(super) fn forget_pending(&mut self) {
        self.pending.clear();
    }

    /// The journal is empty.
    pub(super) fn clear(&mut self) {
        self.events.clear();
        self.pending.clear();
        self.open_syncs.clear();
        self.span = None;
    }

    fn count(&mut self, record: &Record) {
        let Ok(Checkpoint { time_us, .. }) = Checkpoint::decode(&record.payload) else { return };
        let span = self.span.get_or_insert(HistorySpan { count: 0, from_us: time_us, to_us: time_us });
        span.count += 1;
        span.to_us = span.to_us.max(time_us);
    }
}
