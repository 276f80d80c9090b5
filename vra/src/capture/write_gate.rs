//! Whether a disk that several hosts share may be written to from here. Reads and flushes don't come here.
//!
//! Lanes ask before a write enters the core, and tell when it is over. Closing the gate lets the writes that are inside end; those that come
//! later wait, until it opens or they are turned away. The guest's path takes one lock, and only on disks that are shared.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use ublk::serve::Waker;

/// A gate; closed at first.
#[derive(Default)]
pub struct WriteGate {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    is_open: bool,
    /// Nothing goes in any more, and nothing waits.
    is_ended: bool,
    /// Writes that went in and aren't over.
    inside: u64,
    /// Something went in since it was opened.
    was_used: bool,
    /// Since when writes wait for the gate to open.
    waiting_since: Option<Instant>,
    /// How often those that waited were turned away.
    turned_away: u64,
    next_lane: u64,
    lanes: BTreeMap<u64, LaneAtGate>,
}

struct LaneAtGate {
    waker: Waker,
    /// It has writes that wait.
    waits: bool,
    /// It had some when the gate opened, and still has: an overlapping write of another lane, which may be the same client's on another socket,
    /// must not land before them.
    goes_first: bool,
}

impl WriteGate {
    /// A lane comes; it is woken when what it waits for may have come.
    fn join(&self, waker: Waker) -> u64 {
        let mut state = self.lock();
        let lane = state.next_lane;
        state.next_lane += 1;
        state.lanes.insert(lane, LaneAtGate { waker, waits: false, goes_first: false });
        lane
    }

    /// A lane goes.
    fn part(&self, lane: u64) {
        let mut state = self.lock();
        state.lanes.remove(&lane);
        state.lane_waits_no_more();
    }

    /// A write of a lane wants in.
    ///
    /// # Errors
    /// It has to wait, and the lane is woken. The number is how often was turned away before: once it is higher, the write is, too.
    fn enter(&self, lane: u64) -> Result<(), u64> {
        let mut state = self.lock();
        if state.lets_in(lane) {
            state.inside += 1;
            state.was_used = true;
            return Ok(());
        }
        Err(state.wait(lane))
    }

    /// A write of a lane waits behind others.
    fn queue(&self, lane: u64) -> u64 {
        self.lock().wait(lane)
    }

    /// None of a lane's writes waits any more.
    fn drained(&self, lane: u64) {
        let mut state = self.lock();
        if let Some(lane) = state.lanes.get_mut(&lane) {
            (lane.waits, lane.goes_first) = (false, false);
        }
        state.lane_waits_no_more();
    }

    /// A write that went in is over.
    fn leave(&self) {
        self.lock().inside -= 1;
    }

    /// How often those that waited were turned away.
    fn turned_away(&self) -> u64 {
        self.lock().turned_away
    }

    /// From now on writes go in, those that wait first.
    pub fn open(&self) {
        let mut state = self.lock();
        if state.is_ended {
            return;
        }
        (state.is_open, state.was_used, state.waiting_since) = (true, false, None);
        state.lanes.values_mut().for_each(|lane| lane.goes_first = lane.waits);
        state.wake_waiting();
    }

    /// From now on writes wait. Whether none is inside any more.
    pub fn close(&self) -> bool {
        let mut state = self.lock();
        state.is_open = false;
        state.lanes.values_mut().for_each(|lane| lane.goes_first = false);
        if state.lanes.values().any(|lane| lane.waits) {
            state.waiting_since.get_or_insert_with(Instant::now);
        }
        state.inside == 0
    }

    /// Fails the writes that wait.
    pub fn turn_away(&self) {
        let mut state = self.lock();
        state.turned_away = state.turned_away.saturating_add(1);
        state.waiting_since = None;
        state.wake_waiting();
    }

    /// Fails the writes that wait, and all that come later.
    pub fn end(&self) {
        let mut state = self.lock();
        (state.is_open, state.is_ended, state.turned_away) = (false, true, u64::MAX);
        state.waiting_since = None;
        state.wake_waiting();
    }

    /// Since when writes wait, if any do.
    pub fn waiting_since(&self) -> Option<Instant> {
        self.lock().waiting_since
    }

    /// Whether anything went in since it was opened.
    pub fn was_used(&self) -> bool {
        self.lock().was_used
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A lane at the gate of its disk, with its writes that wait.
pub(super) struct LaneGate {
    gate: Arc<WriteGate>,
    /// The lane's number there.
    lane: u64,
    /// Writes that wait, and the gate's count of turning away when they came.
    waiting: VecDeque<(usize, u64)>,
}

impl LaneGate {
    pub(super) fn join(gate: Arc<WriteGate>, waker: &Waker) -> Self {
        let lane = gate.join(waker.clone());
        Self { gate, lane, waiting: VecDeque::with_capacity(EXPECTED_WAITING) }
    }

    /// Whether a write may go on; if not, it waits here.
    pub(super) fn enter(&mut self, index: usize) -> bool {
        // Those that wait go first: an overlapping one must not land before them.
        let entered = match self.waiting.is_empty() {
            true => self.gate.enter(self.lane),
            false => Err(self.gate.queue(self.lane)),
        };
        if let Err(count) = entered {
            self.waiting.push_back((index, count));
        }
        entered.is_ok()
    }

    /// A write that went in is over.
    pub(super) fn leave(&self) {
        self.gate.leave();
    }

    /// The next write that need not wait any longer, and whether it may go on.
    pub(super) fn next(&mut self) -> Option<(usize, bool)> {
        let (index, count) = self.waiting.pop_front()?;
        let turned_away = self.gate.turned_away() > count;
        if !turned_away && self.gate.enter(self.lane).is_err() {
            self.waiting.push_front((index, count));
            return None;
        }
        if self.waiting.is_empty() {
            self.gate.drained(self.lane);
        }
        Some((index, !turned_away))
    }
}

impl Drop for LaneGate {
    fn drop(&mut self) {
        self.gate.part(self.lane);
    }
}

/// Writes of a lane that wait for which there is room without allocating.
const EXPECTED_WAITING: usize = 256;

impl State {
    fn lets_in(&self, lane: u64) -> bool {
        self.is_open && self.lanes.iter().all(|(other, at_gate)| *other == lane || !at_gate.goes_first)
    }

    fn wait(&mut self, lane: u64) -> u64 {
        let goes_on = self.is_ended || self.lets_in(lane);
        if let Some(lane) = self.lanes.get_mut(&lane) {
            lane.waits = true;
            // What it waits behind may go on already, and the wake-up for that be over.
            if goes_on {
                lane.waker.wake();
            }
        }
        if self.is_ended {
            return 0;
        }
        if !self.is_open {
            self.waiting_since.get_or_insert_with(Instant::now);
        }
        self.turned_away
    }

    fn wake_waiting(&self) {
        self.lanes.values().filter(|lane| lane.waits).for_each(|lane| lane.waker.wake());
    }

    /// Others may have waited for it.
    fn lane_waits_no_more(&mut self) {
        if !self.lanes.values().any(|lane| lane.waits) {
            self.waiting_since = None;
        }
        if self.is_open && !self.lanes.values().any(|lane| lane.goes_first) {
            self.wake_waiting();
        }
    }
}

impl std::fmt::Debug for WriteGate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = self.lock();
        f.debug_struct("WriteGate")
            .field("is_open", &state.is_open)
            .field("inside", &state.inside)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use ublk::serve::Wake;

    use super::*;

    #[derive(Default)]
    struct Count(AtomicU32);

    impl Wake for Count {
        fn wake(&self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn lane(gate: &Arc<WriteGate>) -> (LaneGate, Arc<Count>) {
        let count = Arc::new(Count::default());
        let waker: Waker = count.clone();
        (LaneGate::join(Arc::clone(gate), &waker), count)
    }

    #[test]
    fn what_waits_goes_on_in_its_order_and_before_what_comes_later() {
        let gate = Arc::new(WriteGate::default());
        let ((mut lane, woken), (mut other, other_woken)) = (lane(&gate), lane(&gate));
        assert!(!lane.enter(1) && !lane.enter(2) && gate.waiting_since().is_some());
        assert_eq!(lane.next(), None);
        gate.open();
        assert_eq!((woken.0.load(Ordering::Relaxed), gate.was_used()), (1, false));
        assert!(!lane.enter(3), "it must not pass those that wait");
        assert!(!other.enter(9), "nor must another lane's, which may be of the same client");
        assert_eq!((other.next(), other_woken.0.load(Ordering::Relaxed)), (None, 0));
        assert_eq!(
            [lane.next(), lane.next(), lane.next()],
            [Some((1, true)), Some((2, true)), Some((3, true))]
        );
        assert!(lane.next().is_none() && gate.waiting_since().is_none() && gate.was_used());
        assert_eq!((other_woken.0.load(Ordering::Relaxed), other.next()), (1, Some((9, true))));
        // Four are inside.
        for _ in 0..3 {
            assert!(!gate.close());
            lane.leave();
        }
        assert!(!gate.close() && !other.enter(10));
        other.leave();
        assert!(gate.close());
    }

    #[test]
    fn who_is_turned_away_does_not_come_back_and_who_comes_later_is_not_meant() {
        let gate = Arc::new(WriteGate::default());
        let (mut lane, woken) = lane(&gate);
        assert!(!lane.enter(1));
        gate.turn_away();
        assert!(woken.0.load(Ordering::Relaxed) == 1 && gate.waiting_since().is_none());
        assert!(!lane.enter(2) && gate.waiting_since().is_some());
        gate.open();
        assert_eq!([lane.next(), lane.next()], [Some((1, false)), Some((2, true))]);
        assert!(!gate.close(), "one is inside");
        lane.leave();
        assert!(gate.close());
    }

    #[test]
    fn once_it_has_ended_nothing_waits_and_nothing_goes_in() {
        let gate = Arc::new(WriteGate::default());
        let (mut lane, woken) = lane(&gate);
        assert!(!lane.enter(1));
        gate.end();
        assert!(!lane.enter(2), "one that was handed over meanwhile");
        gate.open();
        assert_eq!([lane.next(), lane.next(), lane.next()], [Some((1, false)), Some((2, false)), None]);
        assert!(!lane.enter(3) && woken.0.load(Ordering::Relaxed) == 3 && gate.waiting_since().is_none());
        assert_eq!(lane.next(), Some((3, false)));
        assert!(gate.close(), "none is inside");
    }

    #[test]
    fn a_lane_that_goes_waits_no_more() {
        let gate = Arc::new(WriteGate::default());
        let (mut lane, _) = lane(&gate);
        assert!(!lane.enter(1));
        drop(lane);
        assert!(gate.waiting_since().is_none());
    }
}
