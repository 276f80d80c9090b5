//! The order of overlapping changes.

use std::collections::VecDeque;
use std::ops::Range;

use ublk::serve::Waker;

/// Puts overlapping changes in the order in which they came: a later one waits for the earlier.
#[derive(Default)]
pub(in crate::view) struct Gate {
    changes: VecDeque<Change>,
    next_id: u64,
}

/// A change's name at the [`Gate`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::view) struct Pass(u64);

struct Change {
    id: u64,
    range: Range<u64>,
    waker: Waker,
    waits: bool,
}

impl Gate {
    /// A change of a range comes. True if it may run now, else `waker` is called when it may.
    pub(in crate::view) fn enter(
        &mut self,
        offset_bytes: u64,
        len_bytes: u64,
        waker: &Waker,
    ) -> (Pass, bool) {
        let range = offset_bytes..offset_bytes + len_bytes;
        let waits = self.changes.iter().any(|change| overlap(&change.range, &range));
        let id = self.next_id;
        self.next_id += 1;
        self.changes.push_back(Change { id, range, waker: waker.clone(), waits });
        (Pass(id), !waits)
    }

    /// Whether a change that waited may run now.
    pub(in crate::view) fn may_run(&self, pass: Pass) -> bool {
        self.changes.iter().any(|change| change.id == pass.0 && !change.waits)
    }

    /// A change is done.
    pub(in crate::view) fn leave(&mut self, pass: Pass) {
        let Some(index) = self.changes.iter().position(|change| change.id == pass.0) else { return };
        let Some(done) = self.changes.remove(index) else { return };
        for later in index..self.changes.len() {
            let range = self.changes[later].range.clone();
            if !self.changes[later].waits || !overlap(&range, &done.range) {
                continue;
            }
            let blocked = self.changes.iter().take(later).any(|change| overlap(&change.range, &range));
            if !blocked {
                self.changes[later].waits = false;
                self.changes[later].waker.wake();
            }
        }
    }
}

fn overlap(one: &Range<u64>, other: &Range<u64>) -> bool {
    one.start < other.end && other.start < one.end
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use ublk::serve::Wake;

    use super::*;

    struct Silent;

    impl Wake for Silent {
        fn wake(&self) {}
    }

    #[test]
    fn overlapping_changes_run_in_their_order() {
        let waker: Waker = Arc::new(Silent);
        let mut gate = Gate::default();
        let (first, runs) = gate.enter(0, 10, &waker);
        assert!(runs);
        let (second, runs) = gate.enter(5, 10, &waker);
        assert!(!runs);
        let (third, runs) = gate.enter(12, 10, &waker);
        assert!(!runs, "it overlaps one that waits");
        let (apart, runs) = gate.enter(100, 10, &waker);
        assert!(runs);
        gate.leave(first);
        assert!(gate.may_run(second) && !gate.may_run(third));
        gate.leave(apart);
        gate.leave(second);
        assert!(gate.may_run(third));
    }
}
