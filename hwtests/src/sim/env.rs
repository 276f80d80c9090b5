//! What every part of a world needs: chance, time, and the count of what was reached.

use journal::storage::sim::{Crash, SimRng};
use vra::clock::Now;

use super::coverage::{Coverage, Disturbance, Happening, Moment};

#[derive(Debug)]
pub(super) struct Env {
    pub(super) rng: SimRng,
    pub(super) coverage: Coverage,
    /// What happens is printed.
    traced: bool,
    /// Things go wrong that nobody arranged.
    rough: bool,
    mono_us: u64,
    /// What the system's clock adds to the monotonic one; it jumps.
    wall_offset_us: u64,
}

/// An arbitrary moment from which the system's clocks start, in microseconds since the Unix epoch.
const WALL_START_US: u64 = 1_700_000_000_000_000;
/// How far the system's clock jumps at most, in microseconds: an hour, or many years of simulated time.
const JUMP_US: u64 = 3_600_000_000;

impl Env {
    pub(super) fn new(seed: u64, traced: bool) -> Self {
        let rng = SimRng::new(seed);
        Self {
            rng,
            coverage: Coverage::default(),
            traced,
            rough: true,
            mono_us: 1,
            wall_offset_us: WALL_START_US,
        }
    }

    /// The same, where nothing goes wrong but what is arranged.
    pub(super) fn smooth(seed: u64, traced: bool) -> Self {
        Self { rough: false, ..Self::new(seed, traced) }
    }

    /// Whether things go wrong that nobody arranged.
    pub(super) fn is_rough(&self) -> bool {
        self.rough
    }

    /// Prints what happens, if somebody looks.
    pub(super) fn note(&self, what: impl FnOnce() -> String) {
        if self.traced {
            println!("{:>9} {}", self.mono_us, what());
        }
    }

    pub(super) fn now(&self) -> Now {
        Now { mono_us: self.mono_us, wall_us: self.mono_us + self.wall_offset_us }
    }

    /// Time goes on.
    pub(super) fn pass(&mut self, most_us: u64) {
        self.mono_us += 1 + self.rng.below(most_us);
    }

    /// So long nothing happens.
    pub(super) fn wait(&mut self, us: u64) {
        self.mono_us += us;
    }

    /// The system's clock jumps, forth or back.
    pub(super) fn jump(&mut self) {
        self.wall_offset_us = WALL_START_US - JUMP_US + self.rng.below(2 * JUMP_US);
    }

    pub(super) fn any_crash(&mut self) -> Crash {
        if self.rng.one_in(2) { Crash::Kill } else { Crash::PowerCut }
    }

    pub(super) fn any_index(&mut self, len: usize) -> usize {
        self.rng.below(len as u64) as usize
    }

    pub(super) fn happened(&mut self, happening: Happening) {
        *self.coverage.happenings.entry(happening).or_default() += 1;
    }

    pub(super) fn met(&mut self, disturbance: Disturbance, moment: Moment) {
        *self.coverage.meetings.entry((disturbance, moment)).or_default() += 1;
    }
}
