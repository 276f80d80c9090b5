//! The real storage: io_uring with O_DIRECT. One ring serves the journals of many VMs on one thread.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use io_uring::{IoUring, opcode, squeue, types};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{AlignedBuf, Completion, FileId, Op, Purpose, Storage, StorageError};
use crate::format::PAGE_BYTES;

/// How a journal or disk file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// To read beside a writer: no lock, no write.
    ReadOnly,
    /// As the only writer, under `flock(LOCK_EX)` on the open file used for I/O (A4).
    Exclusive,
    /// Like `Exclusive`, for a file that must not exist yet.
    Create,
}

/// Why a file can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenFileError {
    /// Another process holds the lock, or its I/O hasn't ended yet.
    #[error("{} is in use by another process: stop it or wait for its last writes", path.display())]
    Busy {
        /// The file.
        path: PathBuf,
    },
    /// The filesystem refuses direct I/O.
    #[error("the filesystem of {} has no direct I/O (O_DIRECT): use ext4, xfs or btrfs", path.display())]
    NoDirectIo {
        /// The file.
        path: PathBuf,
    },
    /// The kernel's own reason.
    #[error("cannot open {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
}

/// A file opened for direct I/O, with its lock if it was asked for.
#[derive(Debug)]
pub struct DirectFile {
    file: Opened,
}

#[derive(Debug)]
enum Opened {
    Plain(File),
    Locked(Flock<File>),
}

impl DirectFile {
    /// Opens a file.
    ///
    /// # Errors
    /// It doesn't exist (or does, for `Create`), is locked, or can't be opened for direct I/O.
    pub fn open(path: &Path, access: Access) -> Result<Self, OpenFileError> {
        let error = |source| OpenFileError::Io { path: path.into(), source };
        let file = OpenOptions::new()
            .read(true)
            .write(access != Access::ReadOnly)
            .create_new(access == Access::Create)
            .custom_flags(libc::O_DIRECT | libc::O_CLOEXEC)
            .mode(0o600)
            .open(path)
            .map_err(|source| match source.raw_os_error() {
                Some(libc::EINVAL) => OpenFileError::NoDirectIo { path: path.into() },
                _ => error(source),
            })?;
        let file = if access == Access::ReadOnly {
            Opened::Plain(file)
        } else {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(file) => Opened::Locked(file),
                Err((_, Errno::EWOULDBLOCK)) => return Err(OpenFileError::Busy { path: path.into() }),
                Err((_, errno)) => return Err(error(errno.into())),
            }
        };
        Ok(Self { file })
    }

    /// The open file.
    pub fn file(&self) -> &File {
        match &self.file {
            Opened::Plain(file) => file,
            Opened::Locked(file) => file,
        }
    }
}

/// Wakes the thread that waits in [`RingStorage::collect`]. Cheap when a wake-up is pending already.
#[derive(Clone, Debug)]
pub struct RingWaker {
    inner: Arc<WakerInner>,
}

#[derive(Debug)]
struct WakerInner {
    event: EventFd,
    pending: AtomicBool,
}

impl RingWaker {
    /// Makes the current or the next waiting [`RingStorage::collect`] return.
    pub fn wake(&self) {
        if !self.inner.pending.swap(true, Ordering::AcqRel) {
            // An eventfd's write fails only when its counter is at its end, and then a wake-up is pending.
            let _ = self.inner.event.write(1);
        }
    }
}

/// A ring with files.
pub struct RingStorage {
    // Dropped first: the kernel must be done with all buffers before the maps below free them.
    ring: IoUring,
    files: Vec<Option<DirectFile>>,
    in_flight: HashMap<u64, InFlight>,
    next_id: u64,
    backlog: Vec<squeue::Entry>,
    waker: RingWaker,
    wake_buffer: Box<u64>,
    wake_armed: bool,
}

struct InFlight {
    token: u64,
    purpose: Purpose,
    verb: &'static str,
    offset_bytes: u64,
    len_bytes: u64,
    memory: Memory,
}

/// What the kernel may touch until the operation has ended.
enum Memory {
    None,
    Read(AlignedBuf),
    Written { _pieces: Vec<Bytes>, _vectors: Vec<libc::iovec> },
}

// SAFETY: the iovecs only point into `Bytes` and the boxed wake buffer, which move along and are `Send` themselves.
unsafe impl Send for RingStorage {}

impl RingStorage {
    /// A ring that keeps up to `depth` operations in the kernel.
    ///
    /// # Errors
    /// The kernel has no io_uring for us, or no memory.
    pub fn new(depth: u32) -> io::Result<Self> {
        let ring = IoUring::builder().setup_clamp().build(depth)?;
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?;
        let waker = RingWaker { inner: Arc::new(WakerInner { event, pending: AtomicBool::new(false) }) };
        Ok(Self {
            ring,
            files: Vec::new(),
            in_flight: HashMap::new(),
            next_id: 0,
            backlog: Vec::new(),
            waker,
            wake_buffer: Box::new(0),
            wake_armed: false,
        })
    }

    /// Takes a file in.
    pub fn add_file(&mut self, file: DirectFile) -> FileId {
        let free = self.files.iter().position(Option::is_none);
        let index = free.unwrap_or_else(|| {
            self.files.push(None);
            self.files.len() - 1
        });
        self.files[index] = Some(file);
        FileId(index as u32)
    }

    /// Gives a file back. Operations still under way keep it open in the kernel, and its lock with it (A4).
    pub fn remove_file(&mut self, file: FileId) -> Option<DirectFile> {
        self.files.get_mut(file.0 as usize).and_then(Option::take)
    }

    /// The file itself.
    pub fn file(&self, file: FileId) -> Option<&File> {
        self.files.get(file.0 as usize)?.as_ref().map(DirectFile::file)
    }

    /// A handle that wakes this ring's thread.
    pub fn waker(&self) -> RingWaker {
        self.waker.clone()
    }

    /// How many operations are under way.
    pub fn in_flight_count(&self) -> usize {
        self.in_flight.len()
    }

    fn flush(&mut self) -> Result<(), Errno> {
        while !self.backlog.is_empty() {
            let mut queue = self.ring.submission();
            let room = (queue.capacity() - queue.len()).min(self.backlog.len());
            for entry in self.backlog.drain(..room) {
                // SAFETY: the memory of the entry lives in `in_flight` (or is the boxed wake buffer) until its completion.
                unsafe { queue.push(&entry) }.expect("room was counted");
            }
            drop(queue);
            if !self.backlog.is_empty() {
                retry(|| self.ring.submit())?;
            }
        }
        Ok(())
    }

    fn arm_waker(&mut self) {
        if !self.wake_armed {
            let fd = types::Fd(self.waker.inner.event.as_raw_fd());
            let entry = opcode::Read::new(fd, (&raw mut *self.wake_buffer).cast(), 8).build();
            self.backlog.push(entry.user_data(WAKE_ID));
            self.wake_armed = true;
        }
    }
}

impl Storage for RingStorage {
    fn submit(&mut self, file: FileId, token: u64, purpose: Purpose, op: Op) {
        let fd = self.file(file).map_or(-1, AsRawFd::as_raw_fd);
        let fd = types::Fd(fd);
        let (verb, offset_bytes, len_bytes) = (op.verb(), op.offset_bytes(), op.len_bytes());
        let (entry, memory) = match op {
            Op::Read { offset_bytes, mut buffer } => {
                let entry =
                    opcode::Read::new(fd, buffer.as_mut_ptr(), buffer.len() as u32).offset(offset_bytes);
                (entry.build(), Memory::Read(buffer))
            }
            Op::Write { offset_bytes, pieces } => {
                let pieces = aligned(pieces);
                let vectors: Vec<libc::iovec> = pieces
                    .iter()
                    .map(|piece| libc::iovec {
                        iov_base: piece.as_ptr().cast_mut().cast(),
                        iov_len: piece.len(),
                    })
                    .collect();
                let entry =
                    opcode::Writev::new(fd, vectors.as_ptr(), vectors.len() as u32).offset(offset_bytes);
                (entry.build(), Memory::Written { _pieces: pieces, _vectors: vectors })
            }
            Op::Sync => {
                let entry = opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC);
                (entry.build(), Memory::None)
            }
            Op::Allocate { offset_bytes, len_bytes } => {
                let entry = opcode::Fallocate::new(fd, len_bytes).offset(offset_bytes);
                (entry.build(), Memory::None)
            }
            Op::Punch { offset_bytes, len_bytes } => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                let entry = opcode::Fallocate::new(fd, len_bytes).offset(offset_bytes).mode(mode);
                (entry.build(), Memory::None)
            }
            Op::Truncate { len_bytes } => (opcode::Ftruncate::new(fd, len_bytes).build(), Memory::None),
        };
        let id = self.next_id;
        self.next_id += 1;
        let flight = InFlight { token, purpose, verb, offset_bytes, len_bytes, memory };
        self.in_flight.insert(id, flight);
        self.backlog.push(entry.user_data(id));
    }

    fn collect(&mut self, wait: bool, done: &mut Vec<Completion>) -> Result<(), Errno> {
        if wait {
            self.arm_waker();
        }
        self.flush()?;
        let wanted = usize::from(wait && done.is_empty() && (!self.in_flight.is_empty() || self.wake_armed));
        retry(|| self.ring.submit_and_wait(wanted))?;
        let ended: Vec<(u64, i32)> =
            self.ring.completion().map(|entry| (entry.user_data(), entry.result())).collect();
        for (id, result) in ended {
            if id == WAKE_ID {
                self.wake_armed = false;
                self.waker.inner.pending.store(false, Ordering::Release);
                continue;
            }
            let Some(flight) = self.in_flight.remove(&id) else { continue };
            let transfers = !matches!(flight.memory, Memory::None);
            let errno = if result < 0 {
                Some(Errno::from_raw(-result))
            } else if transfers && result as u64 != flight.len_bytes {
                Some(Errno::EIO)
            } else {
                None
            };
            let InFlight { token, purpose, verb, offset_bytes, memory, .. } = flight;
            let result = match (errno, memory) {
                (Some(errno), _) => Err(StorageError { verb, purpose, offset_bytes, errno }),
                (None, Memory::Read(buffer)) => Ok(Some(buffer)),
                (None, _) => Ok(None),
            };
            done.push(Completion { token, result });
        }
        Ok(())
    }

    fn file_len_bytes(&mut self, file: FileId) -> Result<u64, Errno> {
        let file = self.file(file).ok_or(Errno::EBADF)?;
        let metadata = file.metadata().map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)))?;
        Ok(metadata.len())
    }
}

impl Drop for RingStorage {
    fn drop(&mut self) {
        // The kernel writes into the buffers of reads until they end: they must not be freed before.
        let mut done = Vec::new();
        while !self.in_flight.is_empty() {
            done.clear();
            if self.collect(true, &mut done).is_err() {
                // Leaking is the only safe way left.
                std::mem::forget(std::mem::take(&mut self.in_flight));
            }
        }
        if self.wake_armed {
            self.waker.inner.pending.store(false, Ordering::Release);
            self.waker.wake();
            let _ = self.collect(true, &mut done);
        }
    }
}

/// Completion of the waker's own read.
const WAKE_ID: u64 = u64::MAX;

/// Pieces that direct I/O takes: themselves, or one gathered copy. `writev` also takes at most 1024 of them.
fn aligned(pieces: Vec<Bytes>) -> Vec<Bytes> {
    let fits = |piece: &Bytes| {
        (piece.as_ptr() as usize).is_multiple_of(PAGE_BYTES) && piece.len().is_multiple_of(PAGE_BYTES)
    };
    if pieces.len() <= libc::UIO_MAXIOV as usize && pieces.iter().all(fits) {
        return pieces;
    }
    vec![AlignedBuf::gather(&pieces).into_bytes()]
}

fn retry(mut call: impl FnMut() -> io::Result<usize>) -> Result<(), Errno> {
    loop {
        match call() {
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))),
        }
    }
}
