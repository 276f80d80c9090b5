//! Time as the machines take it: they never read a clock themselves.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A moment by both clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// Microseconds that never go back or jump, from an origin of this process: for deadlines and durations.
    pub mono_us: u64,
    /// Microseconds since the Unix epoch by the system's clock, which may jump: for comparing with other stamps.
    pub wall_us: u64,
}

/// Reads both clocks.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    origin: Instant,
}

impl Clock {
    /// A clock whose monotonic time begins now.
    pub fn start() -> Self {
        Self { origin: Instant::now() }
    }

    /// The time.
    pub fn now(&self) -> Now {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Now { mono_us: micros(self.origin.elapsed()), wall_us: micros(wall) }
    }

    /// When monotonic time `mono_us` is.
    pub fn instant(&self, mono_us: u64) -> Instant {
        self.origin + Duration::from_micros(mono_us)
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
