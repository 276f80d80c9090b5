//! What an opening decides, as tables: every combination of facts matches exactly one row.

use crate::format::SuperblockError;
use crate::planted::{Bug, planted};

/// What one superblock copy is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Copy {
    /// The page never was a superblock.
    Absent,
    /// It was one and is damaged.
    Damaged,
    /// A newer release wrote it.
    Newer,
    /// Valid.
    Valid,
}

impl Copy {
    pub(crate) fn of<T>(decoded: &Result<T, SuperblockError>) -> Self {
        match decoded {
            Ok(_) => Self::Valid,
            Err(SuperblockError::Magic) => Self::Absent,
            Err(SuperblockError::Version(_) | SuperblockError::Features(_)) => Self::Newer,
            Err(SuperblockError::Crc | SuperblockError::Unreadable | SuperblockError::Field(_)) => {
                Self::Damaged
            }
        }
    }
}

/// What to do about the superblocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    First,
    Second,
    /// A newer release is needed, whatever the other copy says: it may be the older one.
    RefuseNewer,
    /// There is no journal here.
    NotAJournal,
    /// There was one: both copies are damaged.
    BothDamaged,
}

#[derive(Clone, Copy, Debug)]
struct Copies {
    first: Copy,
    second: Copy,
    /// Meaningful if both are valid.
    second_newer: bool,
}

impl Copies {
    fn any(self, kind: Copy) -> bool {
        self.first == kind || self.second == kind
    }
}

/// A row: which facts it is for, and what is decided then.
type Row<F, R> = (fn(F) -> bool, R);

/// Each update completes one copy before it begins the other, and counts only when both are durable: a single copy that is damaged, or that
/// the disk can't give back, never hides a state that anything was done in.
const CHOICES: [Row<Copies, Choice>; 7] = [
    (|it| it.any(Copy::Newer), Choice::RefuseNewer),
    (|it| it.first == Copy::Valid && it.second == Copy::Valid && !it.second_newer, Choice::First),
    (|it| it.first == Copy::Valid && it.second == Copy::Valid && it.second_newer, Choice::Second),
    (|it| it.first == Copy::Valid && matches!(it.second, Copy::Absent | Copy::Damaged), Choice::First),
    (|it| it.second == Copy::Valid && matches!(it.first, Copy::Absent | Copy::Damaged), Choice::Second),
    (|it| it.first == Copy::Absent && it.second == Copy::Absent, Choice::NotAJournal),
    (|it| it.any(Copy::Damaged) && !it.any(Copy::Valid) && !it.any(Copy::Newer), Choice::BothDamaged),
];

/// Chooses between the copies. The sequences matter only if both are valid.
pub(crate) fn choose_superblock(first: Copy, second: Copy, first_seq: u64, second_seq: u64) -> Choice {
    let second_newer = second_seq > first_seq;
    one_match(&CHOICES, Copies { first, second, second_newer })
}

/// What is known of a slot whose header or trailer names a segment of this journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SegmentFacts {
    /// The number is the one after the segments found so far.
    pub(crate) wanted: bool,
    /// The number is higher than that.
    pub(crate) above: bool,
    /// Its open count is one that the superblock knows.
    pub(crate) opened: bool,
    /// It begins exactly where the stream stands.
    pub(crate) follows: bool,
    /// It begins after where the stream stands.
    pub(crate) ahead: bool,
    /// A trailer proves that all its batches were durable.
    pub(crate) sealed: bool,
    /// All batches that its header says were copied are there.
    pub(crate) carried: bool,
}

/// What a slot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The next segment.
    Use,
    /// Left over from an earlier time, or never finished: free.
    Free,
    /// To be looked at again when the stream stands further on; proof of damage if it never gets there.
    Later,
}

const VERDICTS: [Row<SegmentFacts, Verdict>; 6] = [
    // An opening that isn't in the superblock never acknowledged anything.
    (|it| !it.opened, Verdict::Free),
    // Promoted, given up, or replaced.
    (|it| it.opened && !it.wanted && !it.above, Verdict::Free),
    // A segment begins only when all before it is durable, so the stream must get there.
    (|it| it.opened && (it.wanted || it.above) && it.ahead, Verdict::Later),
    // It branches off before the stream's end, or has another number than the one that belongs there: a later opener
    // went another way.
    (|it| it.opened && (it.wanted || it.above) && !it.ahead && !(it.wanted && it.follows), Verdict::Free),
    // A copy that was not finished was never relied upon: the one that it copies is still there.
    (|it| it.opened && it.wanted && it.follows && !it.ahead && !it.sealed && !it.carried, Verdict::Free),
    (|it| it.opened && it.wanted && it.follows && !it.ahead && (it.sealed || it.carried), Verdict::Use),
];

/// Judges a slot.
pub(crate) fn judge(mut facts: SegmentFacts) -> Verdict {
    facts.carried |= planted(Bug::HalfCarriedSegmentTaken);
    one_match(&VERDICTS, facts)
}

fn one_match<F: std::marker::Copy + std::fmt::Debug, R: std::marker::Copy>(
    table: &[Row<F, R>],
    facts: F,
) -> R {
    let mut matching = table.iter().filter(|(holds, _)| holds(facts));
    let row = matching.next().expect("the tables' tests enumerate all facts: one row matches");
    debug_assert!(matching.next().is_none(), "two rows match {facts:?}");
    row.1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_of_superblocks_matches_one_row() {
        let kinds = [Copy::Absent, Copy::Damaged, Copy::Newer, Copy::Valid];
        for first in kinds {
            for second in kinds {
                for second_newer in [false, true] {
                    let it = Copies { first, second, second_newer };
                    let count = CHOICES.iter().filter(|(holds, _)| holds(it)).count();
                    assert_eq!(count, 1, "{it:?}");
                }
            }
        }
        assert_eq!(choose_superblock(Copy::Valid, Copy::Valid, 4, 5), Choice::Second);
        assert_eq!(choose_superblock(Copy::Valid, Copy::Valid, 6, 5), Choice::First);
        assert_eq!(choose_superblock(Copy::Damaged, Copy::Valid, 0, 5), Choice::Second);
        assert_eq!(choose_superblock(Copy::Newer, Copy::Valid, 0, 5), Choice::RefuseNewer);
        assert_eq!(choose_superblock(Copy::Absent, Copy::Damaged, 0, 0), Choice::BothDamaged);
    }

    #[test]
    fn every_slot_matches_one_row() {
        for bits in 0..1_u32 << 7 {
            let bit = |index: u32| bits & (1 << index) != 0;
            let facts = SegmentFacts {
                wanted: bit(0),
                above: bit(1),
                opened: bit(2),
                follows: bit(3),
                ahead: bit(4),
                sealed: bit(5),
                carried: bit(6),
            };
            if (facts.wanted && facts.above) || (facts.follows && facts.ahead) {
                continue;
            }
            let count = VERDICTS.iter().filter(|(holds, _)| holds(facts)).count();
            assert_eq!(count, 1, "{facts:?}");
        }
    }
}
