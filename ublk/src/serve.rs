//! The contract between a door (ublk queue, NBD connection) and whatever serves a disk.
//!
//! A door owns a thread with one ring. It hands each guest request to a [`Lane`] and the lane answers later,
//! through the [`Port`] that it is given with every call. The contract has no async and no ring types: a lane
//! is a plain state machine, so the same lane runs behind ublk, behind NBD and under a simulation.
//!
//! Liveness: a lane never blocks and never waits for anything but its own file I/O, its [`Waker`] and
//! preallocated memory. Every [`Request`] is completed exactly once, every [`FileIo`] comes back exactly once
//! through [`Lane::file_done`], and a door drops a lane only when both counts are zero.

use std::sync::Arc;

use crate::arena::{Slot, SlotRef};

/// What a guest asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// Fill the buffer from the disk.
    Read,
    /// Put the buffer onto the disk.
    Write,
    /// Make all completed writes durable.
    Flush,
    /// Deallocate; reads zeroes afterwards (rule E2), else the disk doesn't offer it.
    Discard,
    /// Write zeroes. `unmap` says whether the guest allows deallocation.
    WriteZeroes {
        /// The range may be deallocated.
        unmap: bool,
    },
}

/// One request of a guest, with its buffer.
#[derive(Debug)]
pub struct Request {
    /// The door's name for the request, given back in [`Completion::tag`]; opaque to the lane.
    pub tag: u64,
    /// What is asked.
    pub op: Op,
    /// Where on the disk, in bytes; a multiple of the logical block size, checked by the door.
    pub offset_bytes: u64,
    /// How much, in bytes; zero for a flush. Inside the disk, checked by the door.
    pub len_bytes: u64,
    /// A write that must be durable before it completes.
    pub fua: bool,
    /// Write: the payload in its first `len_bytes`. Read: to be filled there. Absent for the other kinds.
    pub slot: Option<Slot>,
}

/// The answer to a [`Request`].
#[derive(Debug)]
pub struct Completion {
    /// [`Request::tag`].
    pub tag: u64,
    /// An errno for the guest, or success for the whole length: there are no short completions.
    pub result: Result<(), Errno>,
    /// The request's slot, or another one of the same arena if the lane keeps that one. A request that brought
    /// a slot takes one back; a read's data is in its first `len_bytes`.
    pub slot: Option<Slot>,
}

/// A positive errno of Linux.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

/// A file that a lane does I/O to, by its place in [`Disk::files`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileId(pub u32);

/// The memory of a [`FileIo`]. The port keeps it while the kernel may touch it and gives it back in
/// [`Lane::file_done`], so that no buffer can be freed or reused under a transfer.
#[derive(Debug)]
pub enum IoBuffer {
    /// No memory (sync, punch).
    None,
    /// Memory that this I/O owns alone: the only kind that may be read into.
    Owned(Slot),
    /// Memory that others read meanwhile (the shipper of a captured write): write only.
    Shared(SlotRef),
}

/// What to do to a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileOp {
    /// Read into the buffer.
    Read,
    /// Write from the buffer; `dsync` makes it durable before it is done (`RWF_DSYNC`).
    Write {
        /// Durable before it is done.
        dsync: bool,
    },
    /// `fdatasync`.
    Sync,
    /// Deallocate and read zeroes afterwards (`FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE`).
    PunchHole,
    /// Zero and keep allocated (`FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE`).
    ZeroRange,
}

/// One transfer between a file and memory. Short transfers are resubmitted by the port for the rest: a lane sees
/// the whole length or an errno.
#[derive(Debug)]
pub struct FileIo {
    /// The lane's name for it, given back in [`Lane::file_done`]; opaque to the port.
    pub token: u64,
    /// Which file.
    pub file: FileId,
    /// What to do.
    pub op: FileOp,
    /// Where in the file, in bytes.
    pub offset_bytes: u64,
    /// How much, in bytes.
    pub len_bytes: u64,
    /// First byte of the transfer inside the buffer.
    pub buffer_offset_bytes: u32,
    /// The memory, kept by the port while the transfer runs.
    pub buffer: IoBuffer,
}

/// What a lane may do, given with each call. All calls queue; the door submits them together when the lane returns.
pub trait Port {
    /// Starts file I/O; it comes back through [`Lane::file_done`].
    fn submit(&mut self, io: FileIo);
    /// Answers a request.
    fn complete(&mut self, completion: Completion);
    /// A free slot of the door's arena, or none: the lane must then go on without (rule: the guest never waits
    /// for memory).
    fn take_slot(&mut self) -> Option<Slot>;
}

/// Wakes one lane from another thread: the lane's door calls [`Lane::wake`] soon after. Cheap when a wake-up is
/// pending already.
pub trait Wake: Send + Sync {
    /// Asks for a call of [`Lane::wake`].
    fn wake(&self);
}

/// A shared [`Wake`].
pub type Waker = Arc<dyn Wake>;

/// One thread's way into a disk. Not shared: a door has one lane for each of its queues.
pub trait Lane: Send {
    /// Takes a request of the guest.
    fn request(&mut self, request: Request, port: &mut dyn Port);
    /// Takes the end of a [`FileIo`]: its token, its result and its memory.
    fn file_done(&mut self, token: u64, result: Result<(), Errno>, buffer: IoBuffer, port: &mut dyn Port);
    /// Called after [`Wake::wake`]: something that the lane waits for outside its thread may have come.
    fn wake(&mut self, port: &mut dyn Port);
}

/// A disk that doors can serve.
pub trait Disk: Send + Sync {
    /// What the guest sees. Fixed while a door serves the disk, but for the size (E3).
    fn geometry(&self) -> Geometry;
    /// The files that lanes do I/O to, in the order of [`FileId`]. They stay open, and locked as rule A4 says, for as
    /// long as the disk lives.
    fn files(&self) -> &[std::fs::File];
    /// A new way in, for one queue of a door. `waker` reaches the lane's [`Lane::wake`].
    fn lane(self: Arc<Self>, waker: Waker) -> Box<dyn Lane>;
    /// What is known, without I/O to the data, of how a range is allocated: consecutive extents from `offset_bytes` on, at least
    /// one and at most `count_max`, none of zero length, together no longer than `len_bytes`. [`Allocation::Data`] is
    /// always true enough, and so says this default.
    fn extents(&self, offset_bytes: u64, len_bytes: u64, count_max: usize) -> Vec<Extent> {
        let _ = (offset_bytes, count_max);
        vec![Extent { len_bytes, allocation: Allocation::Data }]
    }
}

/// A run of bytes that are allocated alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes.
    pub len_bytes: u64,
    /// How.
    pub allocation: Allocation,
}

/// How a range of a disk is allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocation {
    /// Allocated, or unknown.
    Data,
    /// Allocated, and reads zeroes.
    Zero,
    /// Not allocated, and reads zeroes.
    Hole,
}

/// What a guest sees of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Size in bytes, a multiple of the logical block size.
    pub size_bytes: u64,
    /// Smallest addressable unit, 512 or 4096.
    pub logical_block_bytes: u32,
    /// Smallest unit without read-modify-write.
    pub physical_block_bytes: u32,
    /// A completed write may be lost at power cut until a flush: the guest sends flushes.
    pub volatile_cache: bool,
    /// The disk takes FUA.
    pub fua: bool,
    /// The disk refuses writes.
    pub read_only: bool,
    /// Discard, if offered: then it reads zeroes afterwards.
    pub discard: Option<ZeroLimits>,
    /// Write-zeroes, if offered.
    pub write_zeroes: Option<ZeroLimits>,
}

/// Limits of discard or write-zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ZeroLimits {
    /// Ranges start and end at a multiple of it, in bytes.
    pub granularity_bytes: u32,
    /// Longest range of one request, in bytes.
    pub max_bytes: u32,
}
