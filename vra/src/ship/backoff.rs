/// How long to wait before the next attempt: doubles with each failure, up to a bound, and differs by a quarter between VMs so that
/// a target that comes back is not met by all at once.
#[derive(Clone, Debug)]
pub(super) struct Backoff {
    min_us: u64,
    max_us: u64,
    failures: u32,
    random: u64,
}

impl Backoff {
    pub(super) fn new(min_us: u64, max_us: u64, seed: u64) -> Self {
        Self { min_us, max_us, failures: 0, random: seed | 1 }
    }

    /// An attempt failed: how long to wait, in microseconds.
    pub(super) fn failed(&mut self) -> u64 {
        let wait_us = self.min_us.saturating_mul(1 << self.failures.min(30)).min(self.max_us);
        self.failures = self.failures.saturating_add(1);
        self.spread(wait_us)
    }

    /// The next attempt shall come after about `wait_us`, whatever failed before.
    pub(super) fn spread(&mut self, wait_us: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        wait_us - self.random % (wait_us / 4 + 1)
    }

    /// Something worked: the next failure starts from the shortest wait.
    pub(super) fn reset(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_the_bound_and_start_again() {
        let mut backoff = Backoff::new(100, 1000, 7);
        let waits: Vec<u64> = (0..40).map(|_| backoff.failed()).collect();
        assert!((75..=100).contains(&waits[0]), "{waits:?}");
        assert!((300..=400).contains(&waits[2]), "{waits:?}");
        assert!(waits[4..].iter().all(|wait| (750..=1000).contains(wait)), "{waits:?}");
        backoff.reset();
        assert!(backoff.failed() <= 100);
    }
}
