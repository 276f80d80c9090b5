//! What a seed's world is like.

use super::super::env::Env;

/// The bounds of a world.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) kind: WorldKind,
    pub(super) host_count: usize,
    /// VMs of each host at most.
    pub(super) most_vms: u64,
    pub(super) interval_us: u64,
    pub(super) deadline_us: u64,
    /// A message takes so long at most.
    pub(super) delay_us: u64,
    /// One message in so many is lost; 0: none.
    pub(super) lost_one_in: u64,
    /// One message in so many comes twice; 0: none.
    pub(super) repeated_one_in: u64,
    /// One message in so many takes much longer than others, as if its stream had been replaced; 0: none.
    pub(super) stale_one_in: u64,
    /// One step in so many a VM's stream sends what it has.
    pub(super) ships_one_in: u64,
    /// How long the world lasts.
    pub(super) lasts_us: u64,
}

/// What may go wrong in a world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WorldKind {
    /// Nothing, and messages are quick.
    Smooth,
    /// Messages are late and some are lost.
    Slow,
    /// Everything.
    Rough,
}

impl Shape {
    pub(super) fn any(seed: u64, env: &mut Env) -> Self {
        let kind = match seed % 8 {
            0 => WorldKind::Smooth,
            1 => WorldKind::Slow,
            _ => WorldKind::Rough,
        };
        let rough = kind == WorldKind::Rough;
        let delay_us = match kind {
            WorldKind::Smooth => 800,
            WorldKind::Slow => 50_000,
            WorldKind::Rough => [800, 10_000, 50_000, 150_000][env.any_index(4)],
        };
        let lost_one_in = match kind {
            WorldKind::Smooth => 0,
            WorldKind::Slow => 100,
            WorldKind::Rough => [0, 100, 20, 5][env.any_index(4)],
        };
        Self {
            kind,
            host_count: if rough { 2 + env.any_index(3) } else { 3 },
            most_vms: 1 + env.rng.below(2),
            interval_us: if rough { [100_000, 300_000, 1_000_000][env.any_index(3)] } else { 1_000_000 },
            deadline_us: if rough { [30_000, 100_000, 400_000][env.any_index(3)] } else { 100_000 },
            delay_us,
            lost_one_in,
            repeated_one_in: if rough { 50 } else { 0 },
            stale_one_in: if rough { 60 } else { 0 },
            ships_one_in: if rough { [3, 30, 300][env.any_index(3)] } else { 3 },
            lasts_us: match kind {
                WorldKind::Smooth => 20_000_000,
                // A share of so few epochs as fit into less says little.
                WorldKind::Slow => 60_000_000,
                WorldKind::Rough => 4_000_000 + env.rng.below(10_000_000),
            },
        }
    }

    /// Nothing is wrong with messages any more.
    pub(super) fn calm_down(&mut self) {
        self.delay_us = 2_000;
        (self.lost_one_in, self.repeated_one_in, self.stale_one_in) = (0, 0, 0);
    }
}
