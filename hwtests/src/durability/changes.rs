//! When a journal was promoted, grew and got shorter: what its superblocks say that stand in a log of its disk's writes.

use std::ops::RangeInclusive;

use anyhow::Result;
use journal::format::{PAGE_BYTES, Superblock};

use crate::powercut::log::{Log, Step};

/// What changes a journal besides what is appended to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Segments go to the recovery disks: from the intent until the low-water mark has moved.
    Promotion,
    /// More slots: from the flush before the one that made their space durable until the one after the superblock's.
    Growth,
    /// Fewer slots: likewise, until what lies behind them is cut off.
    Shrinking,
}

impl Change {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Promotion, Self::Growth, Self::Shrinking];
}

/// The moments of a log at which a journal was being changed.
#[derive(Debug, Default)]
pub struct Changes {
    all: Vec<(Change, RangeInclusive<usize>)>,
}

/// Flushes around the superblock of a growth or of a shrinking that belong to it.
const FLUSHES_AROUND: usize = 2;

impl Changes {
    /// Those of the only journal in a log, from a moment on.
    ///
    /// # Errors
    /// The log can't be read.
    pub fn read(log: &Log, from: usize) -> Result<Self> {
        let mut all = Vec::new();
        let mut announced = None;
        let mut last: Option<Superblock> = None;
        for (index, entry) in log.entries().iter().enumerate() {
            let Step::Write { len_bytes, log_offset_bytes, .. } = entry.step else { continue };
            if len_bytes < PAGE_BYTES as u64 {
                continue;
            }
            let mut page = [0; PAGE_BYTES];
            log.read_data(&mut page, log_offset_bytes)?;
            let Ok(now) = Superblock::decode(&page) else { continue };
            // The other copy comes later, or is settled at an opening.
            if last.as_ref().is_some_and(|last| last.sequence >= now.sequence) && index >= from {
                continue;
            }
            if let Some(last) = last.replace(now.clone()).filter(|_| index >= from) {
                if now.promotion_intent_seq > last.promotion_intent_seq {
                    announced = Some(index + 1);
                }
                if now.low_water.seq > last.low_water.seq
                    && let Some(begin) = announced.take()
                {
                    all.push((Change::Promotion, begin..=index + 1));
                }
                if now.slot_count != last.slot_count {
                    let is_longer = now.slot_count > last.slot_count;
                    let change = if is_longer { Change::Growth } else { Change::Shrinking };
                    all.push((change, around(log, index)));
                }
            }
        }
        Ok(Self { all })
    }

    /// When a kind of change was under way.
    pub fn of(&self, change: Change) -> impl Iterator<Item = RangeInclusive<usize>> {
        self.all.iter().filter(move |(kind, _)| *kind == change).map(|(_, span)| span.clone())
    }

    /// Whether a kind of change was under way at a moment.
    pub fn is_under_way(&self, change: Change, moment: usize) -> bool {
        self.of(change).any(|span| span.contains(&moment))
    }
}

/// The moments from some flushes before an entry to some after it.
fn around(log: &Log, index: usize) -> RangeInclusive<usize> {
    let entries = log.entries();
    let is_flush = |at: &usize| entries[*at].flush;
    let begin = (0..index).rev().filter(is_flush).nth(FLUSHES_AROUND - 1).unwrap_or(0);
    let end = (index + 1..entries.len()).filter(is_flush).nth(FLUSHES_AROUND - 1);
    begin + 1..=end.map_or(entries.len(), |end| end + 1)
}

#[cfg(test)]
mod tests {
    use journal::crypt::Encryption;
    use journal::format::{ChainPoint, JournalState};
    use uuid::Uuid;

    use super::*;
    use crate::powercut::log::tests::{HandmadeLog, Scratch};

    fn superblock(sequence: u64, slot_count: u32, intent_seq: u64, low_water_seq: u64) -> Superblock {
        Superblock {
            sequence,
            journal_id: Uuid::from_u128(1),
            vm_id: Uuid::from_u128(2),
            vpg_id: Uuid::from_u128(3),
            slot_len_bytes: 1 << 20,
            slot_count,
            open_count: 1,
            manifest: None,
            bad_list: None,
            low_water_segment: 1,
            low_water: ChainPoint { seq: low_water_seq, batch_crc: 0 },
            state: JournalState::Consistent,
            promotion_intent_seq: intent_seq,
            tail_generation: Uuid::from_u128(4),
            parent_generation: Uuid::nil(),
            generation_first_seq: 1,
            generation_fork_seq: 0,
            receive_time_us: 1,
            encryption: Encryption::Never,
            volumes: Vec::new(),
        }
    }

    fn put(log: HandmadeLog, superblock: &Superblock) -> HandmadeLog {
        log.entry(8, 8, 0, &superblock.encode()).flush()
    }

    #[test]
    fn each_change_is_where_its_superblocks_are() {
        // Entries 0 and 1, 2 and 3, and so on: a write, and the flush behind it.
        let mut log = put(HandmadeLog::new(), &superblock(1, 4, 0, 0));
        log = put(log, &superblock(2, 5, 0, 0));
        log = put(log, &superblock(3, 5, 70, 0));
        log = put(log.write(900, 7, 8).flush(), &superblock(3, 5, 70, 0));
        log = put(log, &superblock(4, 5, 70, 70));
        log = put(log.write(900, 8, 8).flush(), &superblock(5, 4, 70, 70));
        let scratch = Scratch::new("changes");
        let log = Log::open(&scratch.file("log", &log.write(900, 9, 8).flush().bytes())).expect("good");
        let all = Changes::read(&log, 0).expect("readable");
        let spans = |change| all.of(change).collect::<Vec<_>>();
        assert_eq!(spans(Change::Growth), [1..=6]);
        assert_eq!(spans(Change::Promotion), [5..=11]);
        assert_eq!(spans(Change::Shrinking), [12..=18]);
        assert!(all.is_under_way(Change::Promotion, 8) && !all.is_under_way(Change::Promotion, 12));
        let later = Changes::read(&log, 4).expect("readable");
        assert_eq!(later.of(Change::Growth).count(), 0, "it was before");
        assert_eq!(later.of(Change::Promotion).count(), 1);
    }
}
