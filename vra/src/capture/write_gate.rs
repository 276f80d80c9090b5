//! Whether a disk that several hosts share may be written to from here. Reads and flushes don't come here.
//!
//! Lanes ask before a write enters the core, and tell when it is over. Closing the gate lets the writes that are inside end; those that come
//! later wait, until it opens or they are turned away. The guest's path takes one lock, and only on disks that are shared.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
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
    /// Writes that went in and aren't over.
    inside: u64,
    /// Something went in since it was opened.
    was_used: bool,
    /// Since when writes wait.
    waiting_since: Option<Instant>,
    /// How often those that waited were turned away.
    turned_away: u64,
    next_lane: u64,
    lanes: BTreeMap<u64, LaneAtGate>,
}

struct LaneAtGate {
    waker: Waker,
    waits: bool,
}

impl WriteGate {
    /// A lane comes; it is woken when what it waits for may have come.
    pub(super) fn join(&self, waker: Waker) -> u64 {
        let mut state = self.lock();
        let lane = state.next_lane;
        state.next_lane += 1;
        state.lanes.insert(lane, LaneAtGate { waker, waits: false });
        lane
    }

    /// A lane goes.
    pub(super) fn part(&self, lane: u64) {
        let mut state = self.lock();
        state.lanes.remove(&lane);
        state.note_whether_any_waits();
    }

    /// A write of a lane wants in.
    ///
    /// # Errors
    /// It has to wait, and the lane is woken. The number is how often was turned away before: once it is higher, the write is, too.
    pub(super) fn enter(&self, lane: u64) -> Result<(), u64> {
        let mut state = self.lock();
        if state.is_open {
            state.inside += 1;
            state.was_used = true;
            return Ok(());
        }
        Err(state.wait(lane))
    }

    /// A write of a lane waits behind others.
    pub(super) fn queue(&self, lane: u64) -> u64 {
        self.lock().wait(lane)
    }

    /// A write that went in is over.
    pub(super) fn leave(&self) {
        self.lock().inside -= 1;
    }

    /// How often those that waited were turned away.
    pub(super) fn turned_away(&self) -> u64 {
        self.lock().turned_away
    }

    /// From now on writes go in.
    pub fn open(&self) {
        let mut state = self.lock();
        state.is_open = true;
        state.was_used = false;
        state.wake_all();
    }

    /// From now on writes wait. Whether none is inside any more.
    pub fn close(&self) -> bool {
        let mut state = self.lock();
        state.is_open = false;
        state.inside == 0
    }

    /// Fails the writes that wait.
    pub fn turn_away(&self) {
        let mut state = self.lock();
        state.turned_away += 1;
        state.wake_all();
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

impl State {
    fn wait(&mut self, lane: u64) -> u64 {
        if let Some(lane) = self.lanes.get_mut(&lane) {
            lane.waits = true;
            // What waits behind others may have come after the wake-up for them.
            if self.is_open {
                lane.waker.wake();
            }
        }
        self.waiting_since.get_or_insert_with(Instant::now);
        self.turned_away
    }

    fn wake_all(&mut self) {
        for lane in self.lanes.values_mut().filter(|lane| lane.waits) {
            lane.waits = false;
            lane.waker.wake();
        }
        self.waiting_since = None;
    }

    fn note_whether_any_waits(&mut self) {
        if !self.lanes.values().any(|lane| lane.waits) {
            self.waiting_since = None;
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
