//! Checkpoints and syncs of a journal that is being written.

use std::collections::{BTreeMap, VecDeque};

use journal::batch::{BatchView, Checkpoint, RecordKind};
use journal::format::{FooterEvent, Gap};

use super::checkpoint_list::{CheckpointList, ListedCheckpoint};
use super::receiver_types::HistorySpan;

/// What of a journal isn't data, as far as it is needed while the journal is written: its checkpoints and the borders of syncs.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// Of batches that are not durable yet, by the number that makes them so.
    pending: VecDeque<(u64, Happened)>,
    /// Volumes in a sync, and which one has to end, by what is durable.
    open_syncs: BTreeMap<u16, OpenSync>,
    /// Syncs that went through the journal, oldest first.
    syncs: VecDeque<SyncSpan>,
    /// The checkpoints outside of syncs.
    checkpoints: CheckpointList,
    newest_cut: Option<u64>,
}

#[derive(Clone, Debug)]
enum Happened {
    SyncBegin { volume: u16, sync_id: u64 },
    SyncEnd { volume: u16, sync_id: u64 },
    Checkpoint(ListedCheckpoint),
}

/// The newest sync of a volume that has not ended: it takes over what those left that began before.
#[derive(Clone, Copy, Debug)]
struct OpenSync {
    /// What has to end; 0 if that is none that has begun yet.
    sync_id: u64,
    begin_seq: u64,
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
            history.note(*position_seq, record.kind, record.volume, record.sync_id, &record.payload);
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
            self.note(record.seq(), record.kind(), record.volume(), record.sync_id(), record.payload());
        }
    }

    fn note(&mut self, position_seq: u64, kind: RecordKind, volume: u16, sync_id: u64, payload: &[u8]) {
        let happened = match kind {
            RecordKind::SyncBegin => Happened::SyncBegin { volume, sync_id },
            RecordKind::SyncEnd => Happened::SyncEnd { volume, sync_id },
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
                Happened::SyncBegin { volume, sync_id } => {
                    // One that begins before the last one ended takes over what that one left.
                    if self.open_syncs.insert(volume, OpenSync { sync_id, begin_seq: seq }).is_none() {
                        self.syncs.push_back(SyncSpan { volume, begin_seq: seq, end_seq: None });
                    }
                }
                Happened::SyncEnd { volume, sync_id } => {
                    if self.open_syncs.get(&volume).is_none_or(|open| open.sync_id != sync_id) {
                        continue;
                    }
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

    /// Records of the journal turned out to be lost: from the first of them on nothing counts, until a sync that began behind them has
    /// ended (B5).
    pub(super) fn gap(&mut self, gap: Gap, volume_count: u16) {
        for volume in 0..volume_count {
            let begin_seq = gap.first_seq;
            let is_open = |sync: &&mut SyncSpan| sync.volume == volume && sync.end_seq.is_none();
            let begun_behind = |sync: &&mut SyncSpan| sync.volume == volume && sync.begin_seq > gap.last_seq;
            match self.open_syncs.get_mut(&volume) {
                Some(open) => {
                    if let Some(sync) = self.syncs.iter_mut().rev().find(is_open) {
                        sync.begin_seq = sync.begin_seq.min(begin_seq);
                    }
                    // One that began behind the lost records ends what they left, whatever was told before. Another one ends nothing.
                    if open.begin_seq <= gap.last_seq {
                        *open = OpenSync { sync_id: 0, begin_seq };
                    }
                }
                None => match self.syncs.iter_mut().find(begun_behind) {
                    Some(sync) => sync.begin_seq = begin_seq,
                    None => {
                        // The id 0 is no sync's.
                        self.open_syncs.insert(volume, OpenSync { sync_id: 0, begin_seq });
                        self.syncs.push_back(SyncSpan { volume, begin_seq, end_seq: None });
                    }
                },
            }
        }
        let listed: Vec<ListedCheckpoint> = self.checkpoints.iter_from(0).cloned().collect();
        self.checkpoints.clear();
        for checkpoint in listed {
            if !self.is_inside_sync(checkpoint.cut) {
                self.checkpoints.push(checkpoint);
            }
        }
        self.newest_cut = self.checkpoints.newest().map(|newest| newest.cut);
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

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use journal::batch::{CheckpointKind, Epoch, Record};
    use uuid::Uuid;

    use super::*;

    const SIZE_BYTES: u64 = 1 << 20;

    fn history(records: Vec<Record>) -> History {
        let events: Vec<_> =
            records.into_iter().map(|record| FooterEvent { position_seq: record.seq, record }).collect();
        History::new(&events, 0)
    }

    fn begin(seq: u64, sync_id: u64) -> Record {
        Record::sync_begin(seq, 1, 0, SIZE_BYTES, sync_id)
    }

    fn end(seq: u64, sync_id: u64) -> Record {
        Record::sync_end(seq, 1, 0, SIZE_BYTES, sync_id)
    }

    fn checkpoint(cut: u64) -> Record {
        let epoch = Epoch { nonce: Uuid::from_u128(7), counter: cut };
        let (kind, tag) = (CheckpointKind::Automatic, String::new());
        let checkpoint = Checkpoint { epoch, cut, member_set_version: 1, time_us: cut, kind, tag };
        Record::checkpoint(cut + 1, 1, &checkpoint)
    }

    fn cuts(history: &History) -> Vec<u64> {
        history.checkpoints().iter_from(0).map(|checkpoint| checkpoint.cut).collect()
    }

    #[test]
    fn only_the_end_of_the_latest_sync_counts() {
        let history = history(vec![begin(1, 5), begin(3, 6), end(5, 5), checkpoint(7)]);
        assert!(history.is_in_sync() && cuts(&history).is_empty());
    }

    #[test]
    fn what_is_behind_a_gap_counts_again_after_a_sync_that_began_there() {
        let gap = Gap { first_seq: 10, last_seq: 20 };
        let all = vec![checkpoint(8), checkpoint(25), begin(30, 5), end(40, 5), checkpoint(50)];
        let mut synced = history(all.clone());
        assert_eq!(cuts(&synced), [8, 25, 50]);
        synced.gap(gap, 1);
        assert_eq!((cuts(&synced), synced.newest_cut()), (vec![8, 50], Some(50)));
        assert!(synced.is_inside_sync(10) && synced.is_inside_sync(39) && !synced.is_inside_sync(40));

        let mut not_synced = history(all[..2].to_vec());
        not_synced.gap(gap, 1);
        assert_eq!((cuts(&not_synced), not_synced.newest_cut()), (vec![8], Some(8)));
        // What comes now decides.
        for record in &all[2..] {
            let payload: &Bytes = &record.payload;
            not_synced.note(record.seq, record.kind, record.volume, record.sync_id, payload);
        }
        not_synced.durable(100);
        assert_eq!(cuts(&not_synced), [8, 50]);
        assert!(!not_synced.is_in_sync());
    }

    /// Each try of a promotion tells it again.
    #[test]
    fn a_gap_that_is_told_again_leaves_the_sync_that_ends_it() {
        let gap = Gap { first_seq: 10, last_seq: 20 };
        let mut history = history(vec![checkpoint(8)]);
        history.gap(gap, 1);
        history.note(30, RecordKind::SyncBegin, 0, 5, &[]);
        history.durable(30);
        history.gap(gap, 1);
        history.note(40, RecordKind::SyncEnd, 0, 5, &[]);
        let later = checkpoint(50);
        history.note(later.seq, later.kind, 0, 0, &later.payload);
        history.durable(100);
        assert_eq!((cuts(&history), history.is_in_sync()), (vec![8, 50], false));
    }

    #[test]
    fn a_sync_that_began_before_a_gap_does_not_end_it() {
        let mut history = history(vec![checkpoint(2), begin(5, 5)]);
        history.gap(Gap { first_seq: 10, last_seq: 20 }, 1);
        history.note(30, RecordKind::SyncEnd, 0, 5, &[]);
        history.durable(100);
        assert!(history.is_in_sync() && history.is_inside_sync(31));
    }
}
