//! Bugs planted on purpose, which the tests of the core must catch: each takes out one rule. In a product build
//! (without the feature `sim`) every question is answered "no" at compile time.

/// A rule that can be taken out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Planted {
    /// After a reconnect the sender goes on with what was never sent, instead of what is not durable.
    ResendSkipped,
    /// The target acknowledges as durable what it has received.
    AckBeforeDurable,
    /// Batches of a stream that a newer one replaced are still taken.
    OldStreamNotFenced,
    /// B6: the durable base moves before the recovery disks are synced.
    BaseMovedEarly,
    /// Overlapping writes of one group are put onto the recovery disk in reverse.
    ApplySwapped,
}

#[cfg(any(test, feature = "sim"))]
thread_local! {
    static ACTIVE: std::cell::Cell<Option<Planted>> = const { std::cell::Cell::new(None) };
}

/// Plants one bug, or none, for code that this thread runs.
#[cfg(any(test, feature = "sim"))]
pub fn plant(bug: Option<Planted>) {
    ACTIVE.set(bug);
}

/// Whether `bug` is planted on this thread.
#[cfg(any(test, feature = "sim"))]
pub fn is_planted(bug: Planted) -> bool {
    ACTIVE.get() == Some(bug)
}

/// Whether `bug` is planted: never.
#[cfg(not(any(test, feature = "sim")))]
#[inline(always)]
pub fn is_planted(_bug: Planted) -> bool {
    false
}
