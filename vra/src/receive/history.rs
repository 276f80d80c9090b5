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
    /// Syncs that went through the journal, oldest first.
    syncs: VecDeque<SyncSpan>,
    /// Cut and time of the checkpoints outside of syncs, oldest first.
    counted: VecDeque<(u64, u64)>,
}

/// The numbers from a volume's sync begin to before its end.
#[derive(Clone, Copy, Debug)]
struct SyncSpan {
    volume: u16,
    begin_seq: u64,
    /// None while it is open.
    end_seq: Option<u64>,
}

impl History {
    /// Of a journal that was opened: all its events are durable.
    pub(super) fn new(events: Vec<FooterEvent>) -> Self {
        let mut history = Self {
            events: Vec::new(),
            pending: events.into(),
            open_syncs: BTreeSet::new(),
            syncs: VecDeque::new(),
            counted: VecDeque::new(),
        };
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
        let ((_, from_us), (_, to_us)) = (self.counted.front()?, self.counted.back()?);
        Some(HistorySpan { count: self.counted.len() as u64, from_us: *from_us, to_us: *to_us })
    }

    /// The last number of the newest checkpoint that counts, as of what is durable.
    pub(super) fn newest_cut(&self) -> Option<u64> {
        self.counted.back().map(|(cut, _)| *cut)
    }

    /// Whether a sync was under way at this number (B5).
    pub(super) fn is_inside_sync(&self, seq: u64) -> bool {
        self.syncs
            .iter()
            .any(|sync| seq >= sync.begin_seq && sync.end_seq.is_none_or(|end_seq| seq < end_seq))
    }

    /// Nothing below this number can be opened any more.
    pub(super) fn forget_below(&mut self, oldest_seq: u64) {
        let first = self.events.partition_point(|event| event.position_seq <= oldest_seq);
        self.events.drain(..first);
        while self.counted.pop_front_if(|(cut, _)| *cut < oldest_seq).is_some() {}
        self.syncs.retain(|sync| sync.end_seq.is_none_or(|end_seq| end_seq > oldest_seq));
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
                    let (volume, begin_seq) = (event.record.volume, event.record.seq);
                    if self.open_syncs.insert(volume) {
                        self.syncs.push_back(SyncSpan { volume, begin_seq, end_seq: None });
                    }
                }
                RecordKind::SyncEnd => {
                    let (volume, end_seq) = (event.record.volume, event.record.seq);
                    self.open_syncs.remove(&volume);
                    let open = |sync: &&mut SyncSpan| sync.volume == volume && sync.end_seq.is_none();
                    if let Some(sync) = self.syncs.iter_mut().rev().find(open) {
                        sync.end_seq = Some(end_seq);
                    }
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
        self.syncs.clear();
        self.counted.clear();
    }

    fn count(&mut self, record: &Record) {
        let Ok(Checkpoint { time_us, cut, .. }) = Checkpoint::decode(&record.payload) else { return };
        if cut <= record.seq && !self.is_inside_sync(cut) {
            self.counted.push_back((cut, time_us));
        }
    }
}
