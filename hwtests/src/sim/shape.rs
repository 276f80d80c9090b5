//! What a target is like: its limits, its keys, how much it transfers at once.

use journal::crypt::{Encryption, NewKey, SiteKey, SiteKeys};
use journal::promotion::TransferSizes;
use journal::writer::Limits;
use vra::receive::{ReceiverPolicy, VmIdentity};

use super::env::Env;

pub(super) struct SiteShape {
    pub(super) policy: ReceiverPolicy,
    /// Of the new journal.
    pub(super) encryption: Encryption,
    /// The recovery disks' space stays reserved.
    pub(super) reserved: bool,
}

impl SiteShape {
    pub(super) fn any(identity: &VmIdentity, env: &mut Env) -> Self {
        let max_slots = 3 + env.rng.below(12) as u32;
        let limits = Limits {
            max_slots,
            // Some keep a part of what they may have.
            min_slots: if max_slots.is_multiple_of(3) { max_slots / 2 } else { 0 },
            grow_slots: 1 + env.rng.below(3) as u32,
            group_bytes: 4096 << env.rng.below(6),
        };
        let policy = ReceiverPolicy {
            limits,
            // Steps of the world are short: a history of none, of some hundred steps, or of all.
            history_us: [0, 5_000, 20_000, u64::MAX / 2][env.any_index(4)],
            promotion: TransferSizes {
                run_max_bytes: 4096 << env.rng.below(5),
                punch_min_bytes: 1024 << env.rng.below(5),
                chunk_bytes: 4096 << env.rng.below(6),
            },
            give_up_history: env.rng.one_in(2),
            window_bytes: 1 << 20,
        };
        // Some journals are encrypted from the start; others become so.
        let encryption = if env.rng.one_in(3) { any_encryption(identity, env) } else { Encryption::Never };
        Self { policy, encryption, reserved: env.rng.one_in(2) }
    }
}

/// The keys of the simulated site.
pub(super) fn site_keys() -> SiteKeys {
    SiteKeys::new(vec![SiteKey::new([0x51; SiteKey::LEN_BYTES].into())])
}

pub(super) fn any_encryption(identity: &VmIdentity, env: &mut Env) -> Encryption {
    if env.rng.one_in(4) { Encryption::Off } else { some_key(identity, env.rng.below(u64::MAX)) }
}

/// A key of the journal's own, made from a seed.
pub(super) fn some_key(identity: &VmIdentity, seed: u64) -> Encryption {
    site_keys().current().map_or(Encryption::Off, |site_key| {
        Encryption::On(NewKey::seeded(seed).wrap(identity.journal.0, site_key))
    })
}
