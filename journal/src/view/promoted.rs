//! How far promotion has come beneath open views.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::bad_ranges::BadRanges;
use crate::planted::{Bug, planted};

/// How far promotion has come since a view was opened, shared by all who must know. What it has promoted is read from the recovery
/// disk: the slots are used again (C3).
#[derive(Clone, Debug, Default)]
pub struct Promoted(Arc<State>);

#[derive(Debug, Default)]
struct State {
    through_seq: AtomicU64,
    /// There are bad ranges: only then anybody takes the lock.
    has_bad: AtomicBool,
    bad_ranges: Mutex<Arc<BadRanges>>,
}

impl Promoted {
    /// Of recovery disks of which this can't be trusted (C5).
    pub fn new(bad_ranges: &BadRanges) -> Self {
        let promoted = Self::default();
        promoted.set_bad_ranges(bad_ranges.clone());
        promoted
    }

    /// The recovery disks hold everything up to here, durably, but for the bad ranges. To be noted before the slots are freed.
    pub fn advance(&self, through_seq: u64, bad_ranges: &BadRanges) {
        let mut all = bad_ranges.clone();
        if self.through_seq() > through_seq {
            // A later promotion ended, and the file doesn't know yet: what that one found damaged is bad, too.
            self.all_bad_ranges().iter().for_each(|bad| all.add(bad));
        }
        // The number comes last: see [`Self::snapshot`].
        self.set_bad_ranges(all);
        self.0.through_seq.fetch_max(through_seq, Ordering::AcqRel);
    }

    /// The same as far as a superblock tells, if that names the list of bad ranges that is known here: what it promoted damaged is in a
    /// newer list, and the recovery disk has wrong bytes there (C5).
    pub fn raise(&self, through_seq: u64) {
        self.0.through_seq.fetch_max(through_seq, Ordering::AcqRel);
    }

    /// The journal was opened anew in this process; what is bad from now on. A promotion counts here before it counts in the file: what
    /// the file then says, `low_water_seq` and `bad_ranges`, is older, and lacks what that promotion found damaged.
    pub fn reopened(&self, low_water_seq: u64, bad_ranges: &BadRanges) -> Arc<BadRanges> {
        let mut all = bad_ranges.clone();
        if self.through_seq() > low_water_seq {
            // What it healed counts as bad until it is done again: an error for a while, and no wrong data.
            self.all_bad_ranges().iter().for_each(|bad| all.add(bad));
        }
        self.set_bad_ranges(all);
        self.all_bad_ranges()
    }

    /// Everything up to here is read from the recovery disks.
    pub fn through_seq(&self) -> u64 {
        self.0.through_seq.load(Ordering::Acquire)
    }

    /// The number through which the recovery disks hold everything, and what of them can't be trusted, if anything can't.
    ///
    /// The ranges are at least as new as the number, since that is stored last and loaded first. The other way round, a read could come by
    /// the list of before a promotion and by the number of after it, and take what that promotion found damaged for good. Newer ranges do
    /// no harm: a record above the number is looked for in the journal, and every range that is new, or is no longer bad, is covered by such
    /// a record, or is one that the disk couldn't give back anyway.
    pub(super) fn snapshot(&self) -> (u64, Option<Arc<BadRanges>>) {
        let through_seq = self.through_seq();
        if !self.0.has_bad.load(Ordering::Acquire) || planted(Bug::BadRangesIgnored) {
            return (through_seq, None);
        }
        (through_seq, Some(self.all_bad_ranges()))
    }

    fn all_bad_ranges(&self) -> Arc<BadRanges> {
        Arc::clone(&self.0.bad_ranges.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn set_bad_ranges(&self, bad_ranges: BadRanges) {
        if self.0.has_bad.load(Ordering::Acquire) || !bad_ranges.is_empty() {
            let has_bad = !bad_ranges.is_empty();
            *self.0.bad_ranges.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(bad_ranges);
            self.0.has_bad.store(has_bad, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bad_ranges::BadRange;

    fn bad(seqs: &[u64]) -> BadRanges {
        let mut all = BadRanges::default();
        for seq in seqs {
            all.add(BadRange { volume: 0, offset_bytes: seq * 4096, len_bytes: 4096, seq: *seq });
        }
        all
    }

    fn seqs(promoted: &Promoted) -> Vec<u64> {
        promoted.snapshot().1.map_or(Vec::new(), |bad| bad.iter().map(|bad| bad.seq).collect())
    }

    /// A reader that sees a promotion sees what it found damaged, whenever it looks.
    #[test]
    fn who_sees_a_promotion_sees_its_bad_ranges() {
        const PROMOTIONS: u64 = 300_000;
        let promoted = Promoted::default();
        std::thread::scope(|scope| {
            scope.spawn(|| (1..=PROMOTIONS).for_each(|seq| promoted.advance(seq, &bad(&[seq]))));
            loop {
                let (through_seq, ranges) = promoted.snapshot();
                let newest = ranges.and_then(|ranges| ranges.iter().next()).map_or(0, |bad| bad.seq);
                assert!(newest >= through_seq, "through {through_seq} with the ranges of {newest}");
                if through_seq == PROMOTIONS {
                    return;
                }
            }
        });
    }

    #[test]
    fn a_journal_that_is_opened_anew_does_not_take_back_what_a_promotion_found_damaged() {
        let promoted = Promoted::new(&bad(&[3]));
        promoted.advance(20, &bad(&[3, 15]));
        // It failed before the low-water mark was durable.
        assert_eq!(promoted.reopened(10, &bad(&[3])).len(), 2);
        assert_eq!(seqs(&promoted), [3, 15]);
        promoted.advance(20, &bad(&[15]));
        assert_eq!(seqs(&promoted), [15], "the promotion that is done again says what is so");
        // Now the file knows as much as we do.
        assert!(promoted.reopened(20, &bad(&[])).is_empty());
        assert_eq!((promoted.through_seq(), seqs(&promoted)), (20, vec![]));
    }
}
