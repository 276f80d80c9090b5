//! What lanes and the core say to each other.

use ublk::serve::Waker;

use crate::capture::payload::Piece;

use super::in_flight::{ByteRange, Ticket};
use super::primitives::AtomicBool;

/// Bounds of a core.
#[derive(Clone, Copy, Debug)]
pub struct CoreLimits {
    /// Writes in flight or held at once; more wait before they take a number.
    pub writes_in_flight: usize,
    /// Memory that the guest's retained writes may keep, in bytes; above it the VM overflows.
    pub retained_bytes: u64,
}

/// A write, write-zeroes or discard that a lane has received.
#[derive(Clone, Copy, Debug)]
pub struct NewWrite {
    /// The lane's number in the core.
    pub lane: u32,
    /// The lane's name for the request, given back when a waiting write may be issued.
    pub token: u64,
    /// The volume's number within the VM.
    pub volume: u16,
    /// Where it goes.
    pub range: ByteRange,
}

/// What a lane offers to have published for its write.
#[derive(Debug)]
pub enum Offer {
    /// Nothing is prepared: right as long as nothing is captured.
    Nothing,
    /// The range reads zeroes afterwards.
    Zeroes,
    /// The data, complete.
    Data(Piece),
    /// There was no memory for the data.
    NoMemory,
}

/// The core's answer to a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// The local issue may start.
    Issue(Ticket),
    /// The local issue waits; the lane's token comes back through [`Drained::ready`].
    Wait(Ticket),
    /// The core captures, and the lane has prepared nothing: prepare and ask again.
    PrepareFirst,
    /// Not now, and no number was taken: keep it, ask again when [`Drained::retry`] says so.
    Deferred,
    /// The volume has left this core: ask its new one.
    Moved,
}

/// The core's answer to a landed write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Landed {
    /// The guest must not hear of it yet: ask [`Core::complete_held`](super::Core::complete_held) when [`Drained::recheck_held`] says so.
    pub held: bool,
    /// The lane itself has writes that may now be issued: drain.
    pub own_ready: bool,
}

/// What a lane has to do.
#[derive(Debug, Default)]
pub struct Drained {
    /// Tokens of waiting writes whose local issue may start.
    pub ready: Vec<u64>,
    /// Deferred writes may be offered again.
    pub retry: bool,
    /// Held completions may go now.
    pub recheck_held: bool,
}

/// Wake-ups to give once the lock is gone.
#[derive(Default)]
pub struct Wakeups {
    list: Vec<Waker>,
    /// Something was published, or the mode changed: the stream's doorbell is to be rung.
    pub(super) published: bool,
}

impl Wakeups {
    /// An empty list with room, so that the guest's path doesn't allocate.
    pub fn with_room() -> Self {
        Self { list: Vec::with_capacity(16), published: false }
    }

    /// Gives them.
    pub(super) fn fire(&mut self, doorbell: Option<&Waker>) {
        if std::mem::take(&mut self.published)
            && let Some(doorbell) = doorbell
        {
            doorbell.wake();
        }
        for waker in self.list.drain(..) {
            waker.wake();
        }
    }

    pub(super) fn add(&mut self, waker: &Waker) {
        self.list.push(waker.clone());
    }
}

/// What lanes read without the lock.
pub struct Flags {
    /// A hold is on; set before its cut is read (D2).
    pub holding: AtomicBool,
    /// Writes are captured, so lanes prepare payloads. A hint: the lock decides.
    pub capturing: AtomicBool,
}
