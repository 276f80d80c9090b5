//! How far a journal reaches at the rate at which writes come.

/// The rate of a VM's writes, as of about the last hour.
#[derive(Clone, Debug, Default)]
pub(super) struct WriteRate {
    /// Taken since the last step, in bytes.
    pending_bytes: u64,
    /// When that was, by the monotonic clock; none before the first call.
    stepped_us: Option<u64>,
    /// Bytes per second, weighted: what is long ago counts less.
    weighted: f64,
    /// The sum of the weights.
    weight: f64,
}

/// What becomes of a journal if writes go on as they came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Forecast {
    /// What is journaled, in bytes per second.
    pub write_rate_bytes_per_s: u64,
    /// How much history the journal's limit has room for at this rate, in seconds; none without writes.
    pub reachable_history_s: Option<u64>,
    /// When history will have to be shortened for room, in seconds from now; none if it won't.
    pub limit_reached_in_s: Option<u64>,
}

/// The rate is worked out anew after so long, in microseconds.
const STEP_US: u64 = 10_000_000;
/// What is so long ago counts e times less, in seconds.
const FADING_S: f64 = 3600.0;

impl WriteRate {
    /// The journal takes so many bytes.
    pub(super) fn taken(&mut self, bytes: u64) {
        self.pending_bytes += bytes;
    }

    /// Time has passed.
    pub(super) fn step(&mut self, mono_us: u64) {
        let since_us = mono_us.saturating_sub(*self.stepped_us.get_or_insert(mono_us));
        if since_us < STEP_US {
            return;
        }
        let since_s = since_us as f64 / 1e6;
        let fading = (-since_s / FADING_S).exp();
        let rate = std::mem::take(&mut self.pending_bytes) as f64 / since_s;
        self.weighted = self.weighted * fading + rate * (1.0 - fading);
        self.weight = self.weight * fading + (1.0 - fading);
        self.stepped_us = Some(mono_us);
    }

    /// For a journal with room for `room_bytes` of batches, `used_bytes` of which hold history that is to be kept for `history_s`.
    pub(super) fn forecast(&self, used_bytes: u64, room_bytes: u64, history_s: u64) -> Forecast {
        let rate = if self.weight > 0.0 { self.weighted / self.weight } else { 0.0 };
        if rate < 1.0 {
            return Forecast::default();
        }
        let reachable_s = room_bytes as f64 / rate;
        let left_s = room_bytes.saturating_sub(used_bytes) as f64 / rate;
        Forecast {
            write_rate_bytes_per_s: rate as u64,
            reachable_history_s: Some(reachable_s as u64),
            limit_reached_in_s: (reachable_s < history_s as f64).then_some(left_s as u64),
        }
    }
}

impl Forecast {
    /// The same on a datastore with `free_bytes` left, which a journal that holds `used_bytes` may run out of before its own limit.
    pub(super) fn within_datastore(self, used_bytes: u64, free_bytes: u64, history_s: u64) -> Self {
        let Some(by_limit_s) = self.reachable_history_s.filter(|_| self.write_rate_bytes_per_s > 0) else {
            return self;
        };
        let reachable_s = used_bytes.saturating_add(free_bytes) / self.write_rate_bytes_per_s;
        if by_limit_s <= reachable_s {
            return self;
        }
        let left_s = free_bytes / self.write_rate_bytes_per_s;
        let ends_s = (reachable_s < history_s).then_some(left_s);
        Self { reachable_history_s: Some(reachable_s), limit_reached_in_s: ends_s, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn after(seconds: u64, bytes_per_s: u64) -> WriteRate {
        let mut rate = WriteRate::default();
        for second in 0..=seconds {
            rate.step(second * 1_000_000);
            rate.taken(bytes_per_s);
        }
        rate
    }

    #[test]
    fn a_steady_rate_is_known_after_the_first_step() {
        let forecast = after(20, 1 << 20).forecast(GIB, 10 * GIB, 3600);
        assert!((1 << 20..=1_160_000).contains(&forecast.write_rate_bytes_per_s), "{forecast:?}");
        assert!(forecast.reachable_history_s.is_some_and(|seconds| (9_000..=10_240).contains(&seconds)));
        assert_eq!(forecast.limit_reached_in_s, None, "an hour fits");
        let forecast = after(20, 1 << 20).forecast(GIB, 10 * GIB, 24 * 3600);
        assert!(forecast.limit_reached_in_s.is_some_and(|seconds| (8_000..=9_216).contains(&seconds)));
    }

    #[test]
    fn what_was_long_ago_fades_and_nothing_says_nothing() {
        assert_eq!(after(600, 0).forecast(0, GIB, 60), Forecast::default());
        let mut rate = after(3600, 10 << 20);
        for second in 3600..6 * 3600 {
            rate.step(second * 1_000_000);
        }
        let left = rate.forecast(0, GIB, 60).write_rate_bytes_per_s;
        assert!(left < 200 << 10, "{left}");
    }

    #[test]
    fn a_datastore_that_is_nearly_full_ends_it_before_the_limit() {
        let forecast = after(600, 1 << 20).forecast(GIB, 10 * GIB, 7200);
        assert_eq!(forecast.within_datastore(GIB, 20 * GIB, 7200), forecast, "the limit comes first");
        let full = forecast.within_datastore(GIB, GIB, 7200);
        assert!(
            full.reachable_history_s.is_some_and(|seconds| (2_000..=2_100).contains(&seconds)),
            "{full:?}"
        );
        assert!(
            full.limit_reached_in_s.is_some_and(|seconds| (1_000..=1_050).contains(&seconds)),
            "{full:?}"
        );
        assert_eq!(forecast.within_datastore(GIB, GIB, 1800).limit_reached_in_s, None, "half an hour fits");
        assert_eq!(Forecast::default().within_datastore(0, 0, 7200), Forecast::default());
    }
}
