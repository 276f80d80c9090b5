//! One VM's part in one epoch: held from its beginning until it commits or expires, whichever comes first.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use journal::batch::Checkpoint;
use thiserror::Error;

use super::state_word::StateWord;
use crate::capture::modes::{HoldRefusal, PublishRefusal};
use crate::capture::numbering::VmCore;
use crate::clock::Now;
use crate::planted::{Planted, is_planted};

/// Tells the holds of this process apart; a VM has one at a time.
static NEXT_HOLD: AtomicU64 = AtomicU64::new(1);

/// A VM that is held, or was.
pub struct HeldEpoch {
    core: Arc<VmCore>,
    hold: u64,
    word: StateWord,
    cut: u64,
    deadline_mono_us: u64,
    /// When its deadline was found to have passed; 0 before.
    expired_mono_us: AtomicU64,
}

/// Why a held VM wrote no checkpoint record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum CommitRefusal {
    /// Its deadline passed first: the guest waits no longer.
    #[error("the hold expired before all members were held")]
    Expired,
    /// Capture stopped meanwhile.
    #[error("{0}")]
    NotPublished(PublishRefusal),
}

impl HeldEpoch {
    /// Holds the VM's completions above the cut that it takes, until `deadline_mono_us` at the latest.
    pub fn begin(core: Arc<VmCore>, deadline_mono_us: u64) -> Result<Self, HoldRefusal> {
        let hold = NEXT_HOLD.fetch_add(1, Ordering::Relaxed);
        let word = StateWord::holding();
        let cut = core.hold(hold)?;
        Ok(Self { core, hold, word, cut, deadline_mono_us, expired_mono_us: AtomicU64::new(0) })
    }

    /// The last number that belongs to the checkpoint.
    pub fn cut(&self) -> u64 {
        self.cut
    }

    /// When it expires, in µs by the monotonic clock.
    pub fn deadline_mono_us(&self) -> u64 {
        self.deadline_mono_us
    }

    /// Whether it has committed or expired.
    pub fn is_over(&self) -> bool {
        self.word.is_over()
    }

    /// All members are held: publishes this VM's record, with its own cut, and lets the held completions go. Returns the
    /// record's number.
    pub fn commit(&self, checkpoint: &Checkpoint, now: Now) -> Result<u64, CommitRefusal> {
        let is_lost = self.expire_if_due(now) || !self.word.commit();
        if is_lost && !is_planted(Planted::RecordAfterExpiry) {
            return Err(CommitRefusal::Expired);
        }
        let body = Checkpoint { cut: self.cut, ..checkpoint.clone() }.encode();
        let committed = self.core.commit(self.hold, body, now.wall_us);
        self.core.release(self.hold);
        committed.map_err(CommitRefusal::NotPublished)
    }

    /// Lets it expire if its time has come. Says whether this call did it.
    pub fn expire_if_due(&self, now: Now) -> bool {
        let expired = now.mono_us >= self.deadline_mono_us && self.expire();
        if expired {
            self.expired_mono_us.store(now.mono_us, Ordering::Relaxed);
        }
        expired
    }

    /// When it expired, if its deadline ended it, in µs by the monotonic clock.
    pub fn expired_mono_us(&self) -> Option<u64> {
        Some(self.expired_mono_us.load(Ordering::Relaxed)).filter(|expired_us| *expired_us > 0)
    }

    /// Lets the held completions go without a record, unless it has committed. Says whether this call did it.
    pub fn expire(&self) -> bool {
        let expired = self.word.expire();
        if expired {
            self.core.release(self.hold);
        }
        expired
    }
}

impl Drop for HeldEpoch {
    fn drop(&mut self) {
        // Whoever forgets a hold must not leave guests waiting.
        self.expire();
    }
}
