//! What a VM's capture is doing, and why it may say no.

use thiserror::Error;

/// Whether writes are captured: a function of the number, changed only under the VM's lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Nothing is captured: no generation has been granted yet, or the disk isn't protected.
    Stopped,
    /// Every write from `from_seq` on is captured.
    Streaming {
        /// First number of this stretch.
        from_seq: u64,
    },
    /// Nothing from `from_seq` on is captured; what was retained before it still ships. Ends with a new generation.
    Overflow {
        /// First number that wasn't given.
        from_seq: u64,
        /// Why.
        reason: OverflowReason,
    },
    /// A thread died inside the core: nothing is captured until this process restarts.
    Lost,
}

/// Why a VM stopped capturing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum OverflowReason {
    /// As many entries wait for the target as the ring holds.
    #[error("the retained ring is full: the target doesn't keep up or is away")]
    RingFull,
    /// Retained writes keep all the memory they may.
    #[error("retained memory is full: the target doesn't keep up or is away")]
    MemoryFull,
    /// The local disk failed a captured write, so source and target may differ there.
    #[error("the local disk failed a write that was captured")]
    LocalWriteError,
    /// The durable reservation of numbers didn't keep up.
    #[error("no number was reserved in time: the state directory is slow or failing")]
    NumbersExhausted,
    /// Asked for by the operator or the daemon, such as a change of the set of volumes.
    #[error("a new full sync was asked for")]
    Requested,
}

/// Why a VM can't take part in a checkpoint now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum HoldRefusal {
    /// It isn't captured now.
    #[error("the VM is not streaming")]
    NotStreaming,
    /// Its target is inconsistent until the sync ends.
    #[error("the VM is in a sync")]
    InSync,
    /// Another epoch holds it.
    #[error("another checkpoint holds the VM")]
    AlreadyHolding,
}

/// Why an entry of our own couldn't be published.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum PublishRefusal {
    /// Nothing is captured now, or what the entry belonged to is over.
    #[error("the VM is not streaming")]
    NotStreaming,
    /// No cell or no number is free now.
    #[error("the retained ring has no room now")]
    NoRoom,
    /// The target doesn't hold everything of the last stretch yet.
    #[error("earlier entries are not durable at the target yet")]
    NotDrained,
    /// Another sync is under way.
    #[error("another sync is under way")]
    InSync,
}
