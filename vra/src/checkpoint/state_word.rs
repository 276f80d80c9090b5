//! The one word that decides whether an epoch of a VM is committed or expired (D2).

use std::sync::atomic::{AtomicU8, Ordering};

/// HOLDING, then for ever COMMITTED or EXPIRED.
#[derive(Debug)]
pub(super) struct StateWord(AtomicU8);

const HOLDING: u8 = 0;
const COMMITTED: u8 = 1;
const EXPIRED: u8 = 2;

impl StateWord {
    pub(super) fn holding() -> Self {
        Self(AtomicU8::new(HOLDING))
    }

    /// Whether the caller is the one that commits.
    pub(super) fn commit(&self) -> bool {
        self.0.compare_exchange(HOLDING, COMMITTED, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Whether the caller is the one that lets it expire.
    pub(super) fn expire(&self) -> bool {
        self.0.compare_exchange(HOLDING, EXPIRED, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Whether it is decided.
    pub(super) fn is_over(&self) -> bool {
        self.0.load(Ordering::Acquire) != HOLDING
    }
}
