//! Checkpoints and syncs of a journal that is being written.

use std::collections::{BTreeSet, VecDeque};

use journal::batch::{BatchView, Checkpoint, RecordKind};
use journal::format::FooterEvent;

use super::checkpoint_list::{CheckpointList, ListedCheckpoint};
use super::receiver_types::HistorySpan;

/// What of a journal isn't data, as far as it is needed while the journal is written: its checkpoints and the borders of syncs.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// Of batches that are not durable yet, by the number that makes them so.
    pending: VecDeque<(u64, Happened)>,
    /// Volumes in a sync, by what is durable.
    open_syncs: BTreeSet<u16>,
    /// Syncs that went through the journal, oldest first.
    syncs: VecDeque<SyncSpan>,
    /// The checkpoints outside of syncs.
    checkpoints: CheckpointList,
    newest_cut: Option<u64>,
}

#[derive(Clone, Debug)]
enum Happened {
    SyncBegin { volume: u16 },
    SyncEnd { volume: u16 },
    Checkpoint(ListedCheckpoint),
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
    pub(super) fn new(events: &[FooterEvent], oldest_seq: u64) -> Self {
        let mut history = Self::default();
        for FooterEvent { position_seq, record } in events {
            history.note(*position_seq, record.kind, record.volume, &record.payload);
        }
        history.durable(u64::MAX);
        history.forget_below(oldest_seq);
        history
    }

    /// The checkpoints that can be opened, as of what is durable.
    pub fn checkpoints(&self) -> &CheckpointList {
        &self.checkpoints
    }

    /// Whether a sync goes through the journal now.
    pub fn is_in_sync(&self) -> bool {
        !self.open_syncs.is_empty()
    }

    /// From when to when there are checkpoints, as of what is durable.
    pub fn span(&self) -> Option<HistorySpan> {
        let (from, to) = (self.checkpoints.first()?, self.checkpoints.last()?);
        let count = self.checkpoints.len() as u64;
        Some(HistorySpan { count, from_us: from.time_us.0, to_us: to.time_us.0 })
    }

    /// The last number of the newest checkpoint that counts, as of what is durable.
    pub(super) fn newest_cut(&self) -> Option<u64> {
        self.newest_cut
    }

    /// Whether a sync was under way at this number (B5).
    pub(super) fn is_inside_sync(&self, seq: u64) -> bool {
        self.syncs
            .iter()
            .any(|sync| seq >= sync.begin_seq && sync.end_seq.is_none_or(|end_seq| seq < end_seq))
    }

    /// Nothing below this number can be opened any more.
    pub(super) fn forget_below(&mut self, oldest_seq: u64) {
        self.checkpoints.forget_below(oldest_seq);
        self.newest_cut = self.newest_cut.filter(|cut| *cut >= oldest_seq);
        self.syncs.retain(|sync| sync.end_seq.is_none_or(|end_seq| end_seq > oldest_seq));
    }

    /// Takes the events of a batch that was given to the journal.
    pub(super) fn take(&mut self, view: &BatchView<'_>) {
        for record in view.records() {
            self.note(record.seq(), record.kind(), record.volume(), record.payload());
        }
    }

    fn note(&mut self, position_seq: u64, kind: RecordKind, volume: u16, payload: &[u8]) {
        let happened = match kind {
            RecordKind::SyncBegin => Happened::SyncBegin { volume },
            RecordKind::SyncEnd => Happened::SyncEnd { volume },
            RecordKind::Checkpoint => match Checkpoint::decode(payload) {
                Ok(checkpoint) if checkpoint.cut <= position_seq => {
                    Happened::Checkpoint(ListedCheckpoint::of(&checkpoint))
                }
                _ => return,
            },
            _ => return,
        };
        self.pending.push_back((position_seq, happened));
    }

    /// Everything up to `seq` is durable.
    pub(super) fn durable(&mut self, seq: u64) {
        while let Some((seq, happened)) = self.pending.pop_front_if(|(position_seq, _)| *position_seq <= seq)
        {
            match happened {
                Happened::SyncBegin { volume } => {
                    if self.open_syncs.insert(volume) {
                        self.syncs.push_back(SyncSpan { volume, begin_seq: seq, end_seq: None });
                    }
                }
                Happened::SyncEnd { volume } => {
                    self.open_syncs.remove(&volume);
                    let open = |sync: &&mut SyncSpan| sync.volume == volume && sync.end_seq.is_none();
                    if let Some(sync) = self.syncs.iter_mut().rev().find(open) {
                        sync.end_seq = Some(seq);
                    }
                }
                Happened::Checkpoint(checkpoint) => {
                    if self.open_syncs.is_empty() && !self.is_inside_sync(checkpoint.cut) {
                        self.newest_cut = Some(checkpoint.cut);
                        self.checkpoints.push(checkpoint);
                    }
                }
            }
        }
    }

    /// What was taken and is not durable is not going to be.
    pub(super) fn forget_pending(&mut self) {
        self.pending.clear();
    }

    /// The journal is empty.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}
