//! Wall time in the unit that everything here keeps: microseconds since the Unix epoch.

use std::sync::atomic::{AtomicU64, Ordering};

/// A clock whose readings strictly increase within the process, so that they order events.
#[derive(Debug, Default)]
pub struct Clock {
    last_us: AtomicU64,
}

impl Clock {
    /// A clock that has not been read.
    pub fn new() -> Self {
        Self::default()
    }

    /// Now, microseconds since the Unix epoch; larger than every reading before.
    pub fn now_us(&self) -> u64 {
        let wall_us = u64::try_from(jiff::Timestamp::now().as_microsecond()).unwrap_or(0);
        let mut now_us = wall_us;
        // The closure always answers, so the update cannot fail.
        let _ = self.last_us.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |last_us| {
            now_us = wall_us.max(last_us + 1);
            Some(now_us)
        });
        now_us
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readings_strictly_increase() {
        let clock = Clock::new();
        let readings: Vec<u64> = (0..1000).map(|_| clock.now_us()).collect();
        assert!(readings.windows(2).all(|pair| pair[0] < pair[1]));
    }
}
