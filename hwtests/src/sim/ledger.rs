//! What was published, sent and acknowledged of one VM, and what each of its checkpoints must show.

use std::collections::HashSet;

use journal::batch::{Checkpoint, Record, RecordKind};
use journal::format::ChainPoint;

use super::env::Env;

/// All disks of a VM at one moment.
pub(super) type Image = Vec<Vec<u8>>;

/// A checkpoint whose record was published, and what a view of it must show.
#[derive(Clone, Debug)]
pub(super) struct Promise {
    pub(super) checkpoint: Checkpoint,
    /// Its record's number.
    pub(super) seq: u64,
    /// The guest's disks at the cut.
    pub(super) image: Image,
    /// No sync was under way at the cut: it counts (B5).
    pub(super) counts: bool,
}

#[derive(Debug)]
pub(super) struct Ledger {
    volume_bytes: Vec<usize>,
    /// Every record that the target may have, in order.
    stream: Vec<Record>,
    promises: Vec<Promise>,
    /// Where batches ended that were sent.
    sent: HashSet<ChainPoint>,
    /// What the target said is durable.
    acked: u64,
}

impl Ledger {
    pub(super) fn new(volume_bytes: Vec<usize>) -> Self {
        let sent = HashSet::from([ChainPoint::default()]);
        Self { volume_bytes, stream: Vec::new(), promises: Vec::new(), sent, acked: 0 }
    }

    pub(super) fn volume_bytes(&self) -> &[usize] {
        &self.volume_bytes
    }

    pub(super) fn published(&mut self, record: Record) {
        self.stream.push(record);
    }

    pub(super) fn promised(&mut self, promise: Promise) {
        self.promises.push(promise);
    }

    pub(super) fn promises(&self) -> &[Promise] {
        &self.promises
    }

    pub(super) fn sent(&mut self, point: ChainPoint) {
        self.sent.insert(point);
    }

    /// Whether a batch of this history ended here.
    pub(super) fn was_sent(&self, point: ChainPoint) -> bool {
        self.sent.contains(&point)
    }

    pub(super) fn acked(&self) -> u64 {
        self.acked
    }

    /// The target says that everything up to here is durable.
    pub(super) fn acknowledged(&mut self, seq: u64) -> Result<(), String> {
        if seq < self.acked {
            return Err(format!("durable through {seq}, but {} was acknowledged", self.acked));
        }
        self.acked = seq;
        Ok(())
    }

    /// A generation that begins with `first_seq` continues the history at `tail_seq`: what lies between is in no history.
    pub(super) fn forked(&mut self, tail_seq: u64, first_seq: u64) {
        let stays = |seq: u64| seq <= tail_seq || seq >= first_seq;
        self.stream.retain(|record| stays(record.seq));
        self.promises.retain(|promise| stays(promise.seq));
        self.sent.retain(|point| stays(point.seq));
    }

    /// Whether the record of this number ends a sync.
    pub(super) fn ends_sync(&self, seq: u64) -> bool {
        let found = self.stream.binary_search_by_key(&seq, |record| record.seq);
        found.is_ok_and(|index| self.stream[index].kind == RecordKind::SyncEnd)
    }

    /// Any number of the stream from one to another; one of the first of them more often than by chance, since what is near the base
    /// was sent by turns to the recovery disks and to the journal.
    pub(super) fn any_seq(&self, from_seq: u64, until_seq: u64, env: &mut Env) -> Option<u64> {
        let within = |seq: u64| (from_seq..=until_seq).contains(&seq);
        let seqs: Vec<u64> = self.stream.iter().map(|record| record.seq).filter(|seq| within(*seq)).collect();
        let most = if env.rng.one_in(2) { seqs.len().min(10) } else { seqs.len() };
        (most > 0).then(|| seqs[env.any_index(most)])
    }

    /// The disks as the stream leaves them at a number, or nothing if a sync was under way.
    pub(super) fn replay(&self, seq: u64) -> Option<Image> {
        let mut image: Image = self.volume_bytes.iter().map(|len_bytes| vec![0; *len_bytes]).collect();
        let mut open_syncs = 0_usize;
        let mut sync_id = 0;
        for record in self.stream.iter().take_while(|record| record.seq <= seq) {
            apply(&mut image, record);
            match record.kind {
                RecordKind::SyncBegin if record.sync_id == sync_id => open_syncs += 1,
                RecordKind::SyncBegin => (sync_id, open_syncs) = (record.sync_id, 1),
                RecordKind::SyncEnd => open_syncs -= 1,
                _ => {}
            }
        }
        (open_syncs == 0).then_some(image)
    }
}

/// What a record does to the disks.
pub(super) fn apply(image: &mut Image, record: &Record) {
    let range = record.offset_bytes as usize..(record.offset_bytes + record.len_bytes) as usize;
    match record.kind {
        RecordKind::Write | RecordKind::SyncData => {
            image[usize::from(record.volume)][range].copy_from_slice(&record.payload);
        }
        RecordKind::Zeroes => image[usize::from(record.volume)][range].fill(0),
        _ => {}
    }
}

/// Where two images differ.
pub(super) fn difference(expected: &Image, found: &Image) -> Option<String> {
    // What compares memory is much faster than what looks for the place.
    if expected == found {
        return None;
    }
    for (volume, (expected, found)) in expected.iter().zip(found).enumerate() {
        if let Some(at) = expected.iter().zip(found).position(|(left, right)| left != right) {
            return Some(format!("at {at} of volume {volume}"));
        }
    }
    (expected.len() != found.len()).then(|| "in the number of volumes".into())
}
