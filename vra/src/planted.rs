//! Bugs planted on purpose, which the tests of the core must catch: each takes out one rule. In a product build
//! (without the feature `sim`) every question is answered "no" at compile time.

/// A rule that can be taken out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Planted {
    /// A1: the number is taken in one critical section, insertion and publication happen in another.
    NumberOutsideLock,
    /// A1: the local issue doesn't wait for earlier overlapping writes.
    OverlapIgnored,
    /// A2: the number word is stored before the entry.
    WordBeforeEntry,
    /// B3: sync data is published whatever was written meanwhile.
    SyncOverWrites,
    /// D2: the hold flag is set after the cut is read and the lock is gone.
    FlagAfterCut,
    /// D2: the last write was received after the cut was read and before the flag was set, as a race of threads has it: it isn't
    /// held.
    WriteBetweenCutAndFlag,
    /// D2: reads are not held.
    ReadsNotHeld,
    /// D2: a hold that has expired writes its record all the same.
    RecordAfterExpiry,
    /// D1: an epoch is a counter alone.
    EpochWithoutNonce,
    /// D2: a coordinator releases each host as soon as it is held, without the others.
    ReleasedBeforeAllHold,
    /// D3: where a journal lacks a checkpoint of the group, its newest older one stands for it.
    MemberSubstituted,
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
    /// C2: a promotion applies records before its intent is durable.
    PromotionNotAnnounced,
    /// C2: a promotion goes past an open view.
    PromotionPastPin,
    /// B5: a promotion ends inside a sync, whose begin is forgotten with its segment.
    PromotionEndsInSync,
    /// C6: history ages by the system's clock.
    WallClockAges,
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

/// Points of the publication of a write where a process may be killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The number is taken.
    NumberTaken,
    /// The range is in the in-flight set.
    RangeInserted,
    /// The entry is stored, the number word isn't.
    EntryStored,
    /// The number word is stored.
    WordStored,
}

#[cfg(any(test, feature = "sim"))]
thread_local! {
    static KILL_AT: std::cell::Cell<Option<Step>> = const { std::cell::Cell::new(None) };
}

/// Lets this thread die by a panic the next time that it comes to `step`.
#[cfg(any(test, feature = "sim"))]
pub fn kill_at(step: Step) {
    KILL_AT.set(Some(step));
}

/// Dies here if the test asked for it.
#[cfg(any(test, feature = "sim"))]
pub fn pass(step: Step) {
    if KILL_AT.get() == Some(step) {
        KILL_AT.set(None);
        panic!("killed at {step:?} as the test asked");
    }
}

/// A step of a product build: nothing.
#[cfg(not(any(test, feature = "sim")))]
#[inline(always)]
pub fn pass(_step: Step) {}
