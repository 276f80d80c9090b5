use std::collections::VecDeque;

use crate::api::status::HoldTimes;

/// How many holds median and 99th percentile are taken over.
const RECENT_HOLDS: usize = 1000;

/// How long completions were held, hold by hold.
#[derive(Clone, Debug, Default)]
pub(super) struct HoldLog {
    times: HoldTimes,
    recent_us: VecDeque<u64>,
}

impl HoldLog {
    pub(super) fn note(&mut self, held_us: u64) {
        self.times.count += 1;
        self.times.last_us = held_us;
        self.times.max_us = self.times.max_us.max(held_us);
        if self.recent_us.len() == RECENT_HOLDS {
            self.recent_us.pop_front();
        }
        self.recent_us.push_back(held_us);
    }

    pub(super) fn times(&self) -> HoldTimes {
        let mut sorted: Vec<u64> = self.recent_us.iter().copied().collect();
        sorted.sort_unstable();
        let at = |percent: usize| {
            let place = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
            sorted.get(place).copied().unwrap_or_default()
        };
        HoldTimes { median_us: at(50), p99_us: at(99), ..self.times }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_recent_holds_and_the_longest_of_all() {
        let mut log = HoldLog::default();
        assert_eq!(log.times(), HoldTimes::default());
        log.note(90_000);
        (1..=1000).for_each(|us| log.note(us));
        let times = log.times();
        assert_eq!((times.count, times.last_us, times.max_us), (1001, 1000, 90_000));
        assert_eq!((times.median_us, times.p99_us), (500, 990));
    }
}
