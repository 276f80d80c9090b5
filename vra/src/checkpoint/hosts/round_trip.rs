use std::collections::BTreeMap;

use crate::api::VraId;

/// Shortest deadline of a hold that is asked of other hosts, in µs, if the group allows as much: a busy host takes its time.
pub const LEAST_DEADLINE_US: u64 = 50_000;

/// What is added to the measured time, in µs.
const MARGIN_US: u64 = 10_000;

/// How long VRAs take from being asked to hold to the answer's arrival.
#[derive(Debug, Default)]
pub(super) struct RoundTrips {
    by_vra: BTreeMap<VraId, RoundTrip>,
}

/// Smoothed as TCP does it (RFC 6298), in µs.
#[derive(Clone, Copy, Debug)]
struct RoundTrip {
    smooth_us: u64,
    spread_us: u64,
}

impl RoundTrips {
    pub(super) fn note(&mut self, vra: VraId, took_us: u64) {
        let former = self.by_vra.get(&vra).copied();
        let next = match former {
            None => RoundTrip { smooth_us: took_us, spread_us: took_us / 2 },
            Some(RoundTrip { smooth_us, spread_us }) => RoundTrip {
                smooth_us: (smooth_us * 7 + took_us) / 8,
                spread_us: (spread_us * 3 + smooth_us.abs_diff(took_us)) / 4,
            },
        };
        self.by_vra.insert(vra, next);
    }

    pub(super) fn retain(&mut self, is_peer: impl Fn(VraId) -> bool) {
        self.by_vra.retain(|vra, _| is_peer(*vra));
    }

    /// How long holds may last so that a release comes in time: the slowest host's answer and the way of the release, at most
    /// `most_us`. As long as one of them wasn't measured it is that.
    pub(super) fn deadline_us(&self, hosts: impl Iterator<Item = VraId>, most_us: u64) -> u64 {
        let mut slowest_us = 0;
        for vra in hosts {
            let Some(trip) = self.by_vra.get(&vra) else { return most_us };
            slowest_us = slowest_us.max(trip.smooth_us + 4 * trip.spread_us);
        }
        (slowest_us + slowest_us / 2 + MARGIN_US).clamp(LEAST_DEADLINE_US.min(most_us), most_us)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deadline_follows_the_slowest_host_within_its_bounds() {
        let (fast, slow) = (VraId::random(), VraId::random());
        let mut trips = RoundTrips::default();
        let deadline = |trips: &RoundTrips| trips.deadline_us([fast, slow].into_iter(), 200_000);
        trips.note(fast, 500);
        assert_eq!(deadline(&trips), 200_000, "nothing is known of the other");
        (0..50).for_each(|_| trips.note(slow, 500));
        assert_eq!(deadline(&trips), LEAST_DEADLINE_US);
        (0..50).for_each(|_| trips.note(slow, 60_000));
        assert!((90_000..130_000).contains(&deadline(&trips)), "{}", deadline(&trips));
        trips.note(slow, 900_000);
        assert_eq!(deadline(&trips), 200_000);
        assert_eq!(trips.deadline_us([fast].into_iter(), 20_000), 20_000);
        trips.retain(|vra| vra == fast);
        assert_eq!(deadline(&trips), 200_000);
    }
}
