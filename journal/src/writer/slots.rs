//! Which slots of the file are free, and which of them have their space.

use std::collections::BTreeSet;

use super::RESERVED_SLOTS;

/// The free slots. Those whose space is reserved are used first, the lowest of them first, so that the file's end runs empty.
#[derive(Debug, Default)]
pub(super) struct FreeSlots {
    reserved: BTreeSet<u32>,
    /// Their space was given back, or may have been: it is reserved and synced before they are used (C3).
    unreserved: BTreeSet<u32>,
    /// Those of the unreserved that may still have space.
    doubtful: BTreeSet<u32>,
}

/// What is given back to the datastore.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Surplus {
    /// How many slots the file keeps; those after them are cut off.
    pub(super) slot_count: u32,
    /// Slots before that end, to be punched.
    pub(super) punched: Vec<u32>,
}

impl FreeSlots {
    /// After an opening, when nobody knows which have their space.
    pub(super) fn unknown(slots: impl IntoIterator<Item = u32>) -> Self {
        let doubtful: BTreeSet<u32> = slots.into_iter().collect();
        Self { reserved: BTreeSet::new(), unreserved: doubtful.clone(), doubtful }
    }

    pub(super) fn len(&self) -> usize {
        self.reserved.len() + self.unreserved.len()
    }

    /// Whether a slot must get its space before another one is used: those that are kept have theirs too, or an opening on a full datastore
    /// could not copy the last segment (C1).
    pub(super) fn lacks_space(&self) -> bool {
        self.reserved.len() <= RESERVED_SLOTS
    }

    /// These have their space.
    pub(super) fn add_reserved(&mut self, slots: impl IntoIterator<Item = u32>) {
        for slot in slots {
            self.unreserved.remove(&slot);
            self.doubtful.remove(&slot);
            self.reserved.insert(slot);
        }
    }

    /// Those whose space was given back, or may have been, lowest first.
    pub(super) fn unreserved(&self) -> impl Iterator<Item = u32> {
        self.unreserved.iter().copied()
    }

    /// How many that have their space can be used and leave one for an opening.
    pub(super) fn spare_reserved(&self) -> usize {
        self.reserved.len().min(self.len().saturating_sub(1))
    }

    /// Takes the lowest one that has its space.
    pub(super) fn take(&mut self) -> Option<u32> {
        self.reserved.pop_first()
    }

    /// The datastore had no room for this one's space. Says whether another one may have its space still.
    pub(super) fn found_without_space(&mut self, slot: u32) -> bool {
        self.doubtful.remove(&slot);
        !self.doubtful.is_empty()
    }

    /// The one to reserve next: rather one that may have its space still.
    pub(super) fn lowest_unreserved(&self) -> Option<u32> {
        self.doubtful.first().or_else(|| self.unreserved.first()).copied()
    }

    /// How many may hold space that isn't needed if so many are kept.
    pub(super) fn surplus_len(&self, keep: usize) -> usize {
        (self.reserved.len() + self.doubtful.len()).saturating_sub(keep)
    }

    /// What to give back so that `keep` free slots are left with their space, or nothing if there is no surplus: the file's end is cut off,
    /// others are punched.
    pub(super) fn surplus(&self, slot_count: u32, keep: usize) -> Option<Surplus> {
        let (mut over, mut over_with_space) = (self.len().saturating_sub(keep), self.surplus_len(keep));
        let has_space = |slot: &u32| self.reserved.contains(slot) || self.doubtful.contains(slot);
        let mut end = slot_count;
        while let Some(last) = end.checked_sub(1) {
            let is_free = self.reserved.contains(&last) || self.unreserved.contains(&last);
            if !is_free || over == 0 || has_space(&last) && over_with_space == 0 {
                break;
            }
            over -= 1;
            over_with_space -= usize::from(has_space(&last));
            end = last;
        }
        let inside = (0..end).rev().filter(has_space).take(over_with_space);
        let surplus = Surplus { slot_count: end, punched: inside.collect() };
        (surplus.slot_count < slot_count || !surplus.punched.is_empty()).then_some(surplus)
    }

    /// A surplus is being given back: its slots can't be taken any more.
    pub(super) fn give_back(&mut self, surplus: &Surplus) {
        self.reserved.retain(|slot| *slot < surplus.slot_count && !surplus.punched.contains(slot));
        self.unreserved.retain(|slot| *slot < surplus.slot_count);
        self.unreserved.extend(&surplus.punched);
        self.doubtful.retain(|slot| *slot < surplus.slot_count && !surplus.punched.contains(slot));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_the_file_is_cut_first_and_no_more_than_the_surplus_is_given_back() {
        let mut free = FreeSlots::default();
        free.add_reserved([1, 2, 5, 6, 7]);
        assert_eq!(free.surplus(8, 5), None);
        let surplus = free.surplus(8, 3).expect("two too many");
        assert_eq!(surplus, Surplus { slot_count: 6, punched: vec![] });
        let surplus = free.surplus(9, 1).expect("four too many");
        assert_eq!(surplus, Surplus { slot_count: 9, punched: vec![7, 6, 5, 2] }, "slot 8 is in use");
        let surplus = free.surplus(8, 2).expect("three too many");
        assert_eq!(surplus, Surplus { slot_count: 5, punched: vec![] });
        free.give_back(&Surplus { slot_count: 5, punched: vec![2] });
        assert!(free.lacks_space());
        assert_eq!(free.len(), 2);
        assert_eq!(free.take(), Some(1));
        assert_eq!(free.take(), None, "slot 2 must be reserved first");
        assert_eq!(free.lowest_unreserved(), Some(2));
        free.add_reserved([2]);
        assert_eq!(free.take(), Some(2));
    }

    #[test]
    fn slots_in_doubt_are_given_back() {
        let mut free = FreeSlots::unknown([1, 2, 5, 7]);
        assert_eq!(free.surplus(8, 4), None);
        let surplus = free.surplus(8, 2).expect("nobody knows what they hold");
        assert_eq!(surplus, Surplus { slot_count: 7, punched: vec![5] });
        free.give_back(&surplus);
        assert_eq!(free.surplus(7, 2), None, "two stay, whatever they hold");
    }
}
