//! The file behind a journal: what can be asked of it, and memory that direct I/O takes. [`ring`] is the real one,
//! `sim` (feature `sim`) the one that crashes on purpose.

pub mod ring;
#[cfg(feature = "sim")]
pub mod sim;

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use bytes::Bytes;
use nix::errno::Errno;

use crate::format::PAGE_BYTES;

/// A file of a storage, by the storage's own count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId(pub u32);

/// What an operation is for: named in errors, and what the simulation aims its faults at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Purpose {
    /// Looking for what is there, at opening.
    Survey,
    /// Making a new journal.
    Create,
    /// The copy of the last segment that an opening makes (C1).
    Carry,
    /// Batches, with a segment's header where one begins.
    Append,
    /// Footer and trailer of a full segment.
    Seal,
    /// A superblock copy that the next step depends on.
    Superblock,
    /// The other superblock copy.
    SuperblockMirror,
    /// The manifest.
    Manifest,
    /// The list of bad ranges.
    BadList,
    /// More slots.
    Grow,
    /// Giving slots back.
    Shrink,
    /// Space for a slot that was given back before.
    Reserve,
    /// The record that announces a promotion (C2).
    Intent,
    /// What a promotion reads of the journal.
    PromotionRead,
    /// What a promotion does to a recovery disk.
    Promotion,
    /// A view or a tool reads.
    View,
    /// The recovery disk of a volume.
    RecoveryDisk,
}

/// One operation on a file. All places and lengths are multiples of [`PAGE_BYTES`].
#[derive(Debug)]
pub enum Op {
    /// Fill the buffer.
    Read {
        /// Where, in bytes.
        offset_bytes: u64,
        /// What to fill.
        buffer: AlignedBuf,
    },
    /// Write the pieces one after the other. Pieces in aligned memory are written from where they are; if any isn't,
    /// all are gathered into one aligned buffer.
    Write {
        /// Where, in bytes.
        offset_bytes: u64,
        /// What.
        pieces: Vec<Bytes>,
    },
    /// `fdatasync`: all writes that completed before are durable.
    Sync,
    /// Reserve space and make the file at least this long.
    Allocate {
        /// Where, in bytes.
        offset_bytes: u64,
        /// How much, in bytes.
        len_bytes: u64,
    },
    /// Give space back; reads zeroes.
    Punch {
        /// Where, in bytes.
        offset_bytes: u64,
        /// How much, in bytes.
        len_bytes: u64,
    },
    /// Make the file this long: what lies behind is gone.
    Truncate {
        /// The new length, in bytes.
        len_bytes: u64,
    },
}

impl Op {
    /// Where it begins, in bytes; 0 for a sync and for a truncation.
    pub fn offset_bytes(&self) -> u64 {
        match *self {
            Self::Read { offset_bytes, .. }
            | Self::Write { offset_bytes, .. }
            | Self::Allocate { offset_bytes, .. }
            | Self::Punch { offset_bytes, .. } => offset_bytes,
            Self::Sync | Self::Truncate { .. } => 0,
        }
    }

    /// How much it covers, in bytes; 0 for a sync.
    pub fn len_bytes(&self) -> u64 {
        match self {
            Self::Read { buffer, .. } => buffer.len() as u64,
            Self::Write { pieces, .. } => pieces.iter().map(|piece| piece.len() as u64).sum(),
            Self::Allocate { len_bytes, .. } | Self::Punch { len_bytes, .. } => *len_bytes,
            Self::Sync | Self::Truncate { .. } => 0,
        }
    }

    fn verb(&self) -> &'static str {
        match self {
            Self::Read { .. } => "read",
            Self::Write { .. } => "write",
            Self::Sync => "fdatasync",
            Self::Allocate { .. } => "allocate",
            Self::Punch { .. } => "punch",
            Self::Truncate { .. } => "truncate",
        }
    }
}

/// An operation that failed. Short transfers count as failed with `EIO`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{verb} at {offset_bytes} ({purpose:?}) failed: {errno}")]
pub struct StorageError {
    /// What failed.
    pub verb: &'static str,
    /// What it was for.
    pub purpose: Purpose,
    /// Where, in bytes.
    pub offset_bytes: u64,
    /// Why.
    pub errno: Errno,
}

impl StorageError {
    /// Whether the place on the disk is broken, and not the file as a whole.
    pub fn is_medium(&self) -> bool {
        matches!(self.errno, Errno::EIO | Errno::ENODATA | Errno::EREMOTEIO | Errno::EILSEQ | Errno::EBADMSG)
    }

    /// Whether the datastore is full (or a quota is reached), which is a state and not a broken file.
    pub fn is_no_space(&self) -> bool {
        matches!(self.errno, Errno::ENOSPC | Errno::EDQUOT)
    }
}

/// The end of an operation.
#[derive(Debug)]
pub struct Completion {
    /// What [`Storage::submit`] was given.
    pub token: u64,
    /// A read's buffer, or the error.
    pub result: Result<Option<AlignedBuf>, StorageError>,
}

/// Files with operations that end later, in any order. One thread uses a storage.
pub trait Storage {
    /// Starts an operation; it comes back through [`Self::collect`] with its token.
    fn submit(&mut self, file: FileId, token: u64, purpose: Purpose, op: Op);

    /// Appends the operations that ended; with `wait` waits for at least one (or a wake-up) if any is under way.
    ///
    /// # Errors
    /// The storage itself is broken; no operation can be relied upon any more.
    fn collect(&mut self, wait: bool, done: &mut Vec<Completion>) -> Result<(), Errno>;

    /// Length of a file, in bytes.
    ///
    /// # Errors
    /// The kernel's.
    fn file_len_bytes(&mut self, file: FileId) -> Result<u64, Errno>;
}

/// Runs operations one by one or many at once until all have ended: for opening and for tools. Nothing else may be
/// under way in the storage.
pub struct Blocking<'a, S: Storage> {
    storage: &'a mut S,
    file: FileId,
    purpose: Purpose,
}

impl<'a, S: Storage> Blocking<'a, S> {
    /// For one file and one purpose.
    pub fn new(storage: &'a mut S, file: FileId, purpose: Purpose) -> Self {
        Self { storage, file, purpose }
    }

    /// The same for another purpose.
    pub fn purpose(&mut self, purpose: Purpose) -> &mut Self {
        self.purpose = purpose;
        self
    }

    /// Length of the file, in bytes.
    ///
    /// # Errors
    /// The kernel's.
    pub fn file_len_bytes(&mut self) -> Result<u64, StorageError> {
        let purpose = self.purpose;
        self.storage.file_len_bytes(self.file).map_err(|errno| StorageError {
            verb: "stat",
            purpose,
            offset_bytes: 0,
            errno,
        })
    }

    /// Runs one operation.
    ///
    /// # Errors
    /// Its error.
    pub fn run(&mut self, op: Op) -> Result<Option<AlignedBuf>, StorageError> {
        let mut results = self.run_all(vec![op]);
        results.pop().expect("as many results as operations")
    }

    /// Reads a range.
    ///
    /// # Errors
    /// The read's.
    pub fn read(&mut self, offset_bytes: u64, len_bytes: usize) -> Result<AlignedBuf, StorageError> {
        let buffer = self.run(Op::Read { offset_bytes, buffer: AlignedBuf::zeroed(len_bytes) })?;
        Ok(buffer.expect("a read gives its buffer back"))
    }

    /// Writes a range.
    ///
    /// # Errors
    /// The write's.
    pub fn write(&mut self, offset_bytes: u64, bytes: impl Into<Bytes>) -> Result<(), StorageError> {
        self.run(Op::Write { offset_bytes, pieces: vec![bytes.into()] }).map(drop)
    }

    /// Makes all that was written durable.
    ///
    /// # Errors
    /// The sync's.
    pub fn sync(&mut self) -> Result<(), StorageError> {
        self.run(Op::Sync).map(drop)
    }

    /// Runs operations, at most [`BLOCKING_DEPTH`] at once; gives their results in the given order.
    pub fn run_all(&mut self, ops: Vec<Op>) -> Vec<Result<Option<AlignedBuf>, StorageError>> {
        let mut results: Vec<_> = ops
            .iter()
            .map(|op| {
                // Of one that never ended, since the storage itself is broken: no place on the disk is to blame.
                let errno = Errno::ECANCELED;
                let (verb, offset_bytes) = (op.verb(), op.offset_bytes());
                Err(StorageError { verb, purpose: self.purpose, offset_bytes, errno })
            })
            .collect();
        let (mut under_way, mut done) = (0, Vec::new());
        let mut waiting = ops.into_iter().enumerate();
        loop {
            while under_way < BLOCKING_DEPTH
                && let Some((index, op)) = waiting.next()
            {
                self.storage.submit(self.file, index as u64, self.purpose, op);
                under_way += 1;
            }
            if under_way == 0 {
                return results;
            }
            if self.storage.collect(true, &mut done).is_err() {
                return results;
            }
            for completion in done.drain(..) {
                under_way -= 1;
                results[completion.token as usize] = completion.result;
            }
        }
    }
}

/// How many operations [`Blocking::run_all`] keeps under way.
pub const BLOCKING_DEPTH: usize = 64;

/// Memory aligned to [`PAGE_BYTES`], as direct I/O wants it, zeroed when made.
pub struct AlignedBuf {
    start: NonNull<u8>,
    len_bytes: usize,
}

impl AlignedBuf {
    /// `len_bytes` of zeroes.
    pub fn zeroed(len_bytes: usize) -> Self {
        if len_bytes == 0 {
            return Self { start: NonNull::dangling(), len_bytes };
        }
        let layout = Self::layout(len_bytes);
        // SAFETY: the layout's size is not zero.
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else { handle_alloc_error(layout) };
        Self { start, len_bytes }
    }

    /// A copy of the pieces, one after the other.
    pub fn gather(pieces: &[Bytes]) -> Self {
        let mut buffer = Self::zeroed(pieces.iter().map(Bytes::len).sum());
        let mut at = 0;
        for piece in pieces {
            buffer[at..at + piece.len()].copy_from_slice(piece);
            at += piece.len();
        }
        buffer
    }

    /// The buffer as a shared handle, without a copy.
    pub fn into_bytes(self) -> Bytes {
        Bytes::from_owner(self)
    }

    fn layout(len_bytes: usize) -> Layout {
        Layout::from_size_align(len_bytes, PAGE_BYTES).expect("no buffer is near half of the address space")
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `len_bytes` initialised bytes at `start` belong to this buffer alone (none if the length is 0).
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len_bytes) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `deref`, and `&mut self` excludes every other reference.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len_bytes) }
    }
}

impl AsRef<[u8]> for AlignedBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AlignedBuf").field("len_bytes", &self.len_bytes).finish()
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        if self.len_bytes > 0 {
            // SAFETY: allocated in `zeroed` with this very layout.
            unsafe { dealloc(self.start.as_ptr(), Self::layout(self.len_bytes)) };
        }
    }
}

// SAFETY: plain memory with one owner.
unsafe impl Send for AlignedBuf {}
// SAFETY: shared references only read.
unsafe impl Sync for AlignedBuf {}
