//! Copy-on-promote (C5): what a promotion past the view's number is about to change beneath it goes to the view's scratch first, so that
//! a view that stays open for long does not stop replication.
//!
//! The view reads the same before, meanwhile and after: the scratch has what was beneath it. The order is what matters: data and map are
//! durable, reads that were planned before have ended, and the file says how far it is complete, before anybody promotes.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use journal::storage::ring::{DirectFile, RingStorage};
use journal::storage::{AlignedBuf, FileId, Purpose, StorageError};
use journal::view::ViewError;
use nix::errno::Errno as SystemErrno;
use ublk::arena::Slot;
use ublk::serve::{Completion, Disk, Errno, FileIo, FileOp, IoBuffer, Lane, Op, Port, Request, Wake};

use super::scratch::map::{Place, ScratchFull};
use super::{CHUNK_BYTES, SECTOR_BYTES, Scratch, ScratchError, ViewDisk};

/// Why a view cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum PreserveError {
    /// It has no scratch that outlives the process.
    #[error("the view is read-only: it has no scratch")]
    NoScratch,
    /// Nothing serves its disks: they could not be opened again after a start.
    #[error("its disks are not served: `vra status` says why")]
    NotServed,
    /// It can't be read or written any more.
    #[error("the view can't be used any more")]
    Gone,
    /// A write or sync of its scratch has failed: what was copied before may be lost.
    #[error("a sync of its scratch has failed: nothing can be copied there until the VRA is started again")]
    Poisoned,
    /// The scratch is used up.
    #[error("the view's scratch is full")]
    Full,
    /// What is beneath can't be read.
    #[error("what the view shows cannot be read")]
    Read(#[from] ViewError),
    /// The scratch can't be written.
    #[error("the view's scratch cannot be written")]
    Write(#[source] io::Error),
    /// The scratch's header can't be written.
    #[error(transparent)]
    Scratch(#[from] ScratchError),
    /// Reads that began before don't end.
    #[error("reads of the view have not ended within {} s", DRAIN_LIMIT.as_secs())]
    Reads,
}

impl PreserveError {
    /// Whether trying again can help.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::NoScratch | Self::Gone | Self::Full => false,
            Self::Read(error) => !matches!(error, ViewError::Corrupt { .. } | ViewError::Gone { .. }),
            Self::NotServed | Self::Poisoned | Self::Write(_) | Self::Scratch(_) | Self::Reads => true,
        }
    }
}

impl From<ScratchFull> for PreserveError {
    fn from(_: ScratchFull) -> Self {
        Self::Full
    }
}

/// How long reads that began before may take to end.
const DRAIN_LIMIT: Duration = Duration::from_secs(30);
/// How often somebody looks who waits for another thread, in case that its word was missed.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// The files beneath a view, for reading what is to be copied.
pub struct Below {
    storage: RingStorage,
    journal: FileId,
    recovery_disk: File,
    align_bytes: u64,
}

impl Below {
    /// The journal and the volume's recovery disk, each opened for direct I/O.
    ///
    /// # Errors
    /// The kernel has no io_uring, or doesn't say how the disk can be read.
    pub fn new(journal: DirectFile, recovery_disk: &DirectFile) -> io::Result<Self> {
        let mut storage = RingStorage::new(64)?;
        let journal = storage.add_file(journal);
        let recovery_disk = recovery_disk.file().try_clone()?;
        let align_bytes = u64::from(ublk::backing::direct_io_align(&recovery_disk)?).max(SECTOR_BYTES);
        Ok(Self { storage, journal, recovery_disk, align_bytes })
    }
}

/// Reads of a view that are under way, by what they were planned on: those of before a change of the plan, and those of after it.
#[derive(Debug, Default)]
pub(super) struct Reads {
    epoch: AtomicUsize,
    under_way: [AtomicUsize; 2],
}

/// A read that is under way.
pub(super) struct Reading {
    reads: Arc<Reads>,
    parity: usize,
}

impl Reading {
    /// Begins before the read is planned.
    pub(super) fn begin(disk: &ViewDisk) -> Self {
        let reads = Arc::clone(&disk.reads);
        loop {
            let epoch = reads.epoch.load(Ordering::SeqCst);
            let parity = epoch % 2;
            reads.under_way[parity].fetch_add(1, Ordering::SeqCst);
            // Whoever waits for the former ones has not seen this one if the epoch is another now.
            if reads.epoch.load(Ordering::SeqCst) == epoch {
                return Self { reads, parity };
            }
            reads.under_way[parity].fetch_sub(1, Ordering::SeqCst);
        }
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.reads.under_way[self.parity].fetch_sub(1, Ordering::SeqCst);
    }
}

impl Reads {
    /// Waits until all reads have ended that began before. One at a time.
    fn drain(&self) -> Result<(), PreserveError> {
        let former = self.epoch.fetch_add(1, Ordering::SeqCst) % 2;
        let deadline = Instant::now() + DRAIN_LIMIT;
        while self.under_way[former].load(Ordering::SeqCst) > 0 {
            if Instant::now() > deadline {
                return Err(PreserveError::Reads);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

impl ViewDisk {
    /// Everything up to here may be promoted, and the view reads the same: its own number, or what was preserved.
    pub fn kept_seq(&self) -> u64 {
        let beneath = self.beneath.as_ref().map_or(0, |beneath| beneath.kept_seq());
        self.kept_seq.load(Ordering::SeqCst).max(self.seq).max(beneath)
    }

    /// Copies what the view shows of `ranges`, which are what the records up to `through_seq` write that the view doesn't show and that
    /// weren't preserved before. When this returns they may be promoted. Waits for the disk.
    ///
    /// # Errors
    /// The view can't be kept: promotion past its number would show in it.
    pub fn preserve(
        self: &Arc<Self>,
        through_seq: u64,
        ranges: &[Range<u64>],
        below: &mut Below,
    ) -> Result<(), PreserveError> {
        let _alone = self.preserving.lock().unwrap_or_else(PoisonError::into_inner);
        let scratch = self.scratch.as_ref().ok_or(PreserveError::NoScratch)?;
        if !scratch.lock().file.is_lasting() {
            return Err(PreserveError::NoScratch);
        }
        let bell = Arc::new(Bell::default());
        // Open until the end: the scratch isn't closed meanwhile.
        let mut lane = Arc::clone(self).lane(Arc::clone(&bell) as _);
        for range in ranges {
            let end = range.end.min(self.size_bytes);
            let mut at = range.start;
            while at < end {
                let until = (at / CHUNK_BYTES * CHUNK_BYTES + CHUNK_BYTES).min(end);
                self.copy_up(scratch, at..until, below, &bell)?;
                at = until;
            }
        }
        flush(&mut *lane, self, &bell)?;
        // What promotion changes is nowhere else then: a page of the map that goes bad must not bring back what it said before.
        scratch.lock().map.catch_up();
        flush(&mut *lane, self, &bell)?;
        self.reads.drain()?;
        let noting = scratch.lock().file.keeping(through_seq)?;
        // A failed sync may have taken the word of what a guest flushes next with it.
        let noted = noting.write().inspect_err(|_| scratch.poisoned.store(true, Ordering::Release))?;
        scratch.lock().file.kept(noted);
        self.kept_seq.fetch_max(through_seq, Ordering::SeqCst);
        if self.is_gone() { Err(PreserveError::Gone) } else { Ok(()) }
    }

    /// Copies what of a range within one chunk is not in the scratch yet. Changes that overlap it wait.
    fn copy_up(
        &self,
        scratch: &Scratch,
        range: Range<u64>,
        below: &mut Below,
        bell: &Arc<Bell>,
    ) -> Result<(), PreserveError> {
        let len_bytes = range.end - range.start;
        let (pass, mut runs_now) =
            scratch.lock().gate.enter(range.start, len_bytes, &(Arc::clone(bell) as _));
        while !runs_now {
            bell.wait();
            runs_now = scratch.lock().gate.may_run(pass);
        }
        let copied = self.copy_alone(scratch, &range, below);
        scratch.lock().gate.leave(pass);
        copied
    }

    fn copy_alone(
        &self,
        scratch: &Scratch,
        range: &Range<u64>,
        below: &mut Below,
    ) -> Result<(), PreserveError> {
        if self.is_gone() {
            return Err(PreserveError::Gone);
        }
        if scratch.poisoned.load(Ordering::Acquire) {
            return Err(PreserveError::Poisoned);
        }
        let found = scratch.lock().map.find(range.start, range.end - range.start);
        for run in found.into_iter().filter(|run| run.place == Place::Below) {
            let mut bytes = AlignedBuf::zeroed(run.len_bytes as usize);
            self.read_beneath(run.offset_bytes, &mut bytes, below)?;
            let placed = scratch.lock().map.place(run.offset_bytes, run.len_bytes)?;
            for part in &placed {
                let Place::Scratch(from) = part.place else { continue };
                let begin = (part.offset_bytes - run.offset_bytes) as usize;
                let bytes = &mut bytes[begin..begin + part.len_bytes as usize];
                scratch.cipher.encrypt(from, bytes);
                // A page at its start, as direct I/O wants it.
                let mut aligned = AlignedBuf::zeroed(bytes.len());
                aligned.copy_from_slice(bytes);
                let file = &self.files[super::plan::SCRATCH_FILE.0 as usize];
                file.write_all_at(&aligned, from).map_err(PreserveError::Write)?;
            }
            scratch.lock().map.written(run.offset_bytes, run.len_bytes);
        }
        Ok(())
    }
}

impl ViewDisk {
    /// Reads what the view shows beneath its scratch. A promotion that ends meanwhile frees slots that are being read: then it is on the
    /// recovery disk.
    fn read_beneath(&self, offset_bytes: u64, into: &mut [u8], below: &mut Below) -> Result<(), ViewError> {
        loop {
            let shown = self.shown();
            let promoted_seq = shown.volume.promoted().through_seq();
            let disk = (&below.recovery_disk, below.align_bytes);
            let read_disk = |_: &mut RingStorage, offset_bytes: u64, into: &mut [u8]| {
                read_aligned(disk, offset_bytes, into)
            };
            let read = shown.volume.read(&mut below.storage, below.journal, offset_bytes, into, read_disk);
            let has_moved =
                shown.volume.promoted().through_seq() > promoted_seq || !Arc::ptr_eq(&shown, &self.shown());
            if read.is_ok() || !has_moved {
                return read;
            }
        }
    }
}

/// Reads a recovery disk, which is zero behind its end until promotion comes to a resize.
fn read_aligned(
    (file, align_bytes): (&File, u64),
    offset_bytes: u64,
    into: &mut [u8],
) -> Result<(), StorageError> {
    let start = offset_bytes / align_bytes * align_bytes;
    let end = (offset_bytes + into.len() as u64).next_multiple_of(align_bytes);
    let mut buffer = AlignedBuf::zeroed((end - start) as usize);
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], start + done as u64) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                let errno = SystemErrno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
                return Err(StorageError {
                    verb: "read",
                    purpose: Purpose::RecoveryDisk,
                    offset_bytes,
                    errno,
                });
            }
        }
    }
    let begin = (offset_bytes - start) as usize;
    into.copy_from_slice(&buffer[begin..begin + into.len()]);
    Ok(())
}

/// Makes the scratch durable, through a lane: other lanes may be doing the same.
fn flush(lane: &mut dyn Lane, disk: &ViewDisk, bell: &Bell) -> Result<(), PreserveError> {
    let mut port = BlockingPort::default();
    let request = Request { tag: 1, op: Op::Flush, offset_bytes: 0, len_bytes: 0, fua: false, slot: None };
    lane.request(request, &mut port);
    loop {
        if let Some(result) = port.answered {
            let failed = |errno: Errno| PreserveError::Write(io::Error::from_raw_os_error(errno.0));
            return result.map_err(failed);
        }
        match port.io.pop_first() {
            Some((_, io)) => {
                let result = carry_out(disk, &io);
                lane.file_done(io.token, result, io.buffer, &mut port);
            }
            None => {
                bell.wait();
                lane.wake(&mut port);
            }
        }
    }
}

fn carry_out(disk: &ViewDisk, io: &FileIo) -> Result<(), Errno> {
    let file = &disk.files[io.file.0 as usize];
    let range = io.buffer_offset_bytes as usize..io.buffer_offset_bytes as usize + io.len_bytes as usize;
    let done = match (io.op, &io.buffer) {
        (FileOp::Write { dsync }, IoBuffer::Shared(slot)) => file
            .write_all_at(&slot[range], io.offset_bytes)
            .and_then(|()| if dsync { file.sync_data() } else { Ok(()) }),
        (FileOp::Sync, _) => file.sync_data(),
        // A flush does nothing else.
        _ => Err(io::ErrorKind::Unsupported.into()),
    };
    done.map_err(|error| Errno(error.raw_os_error().unwrap_or(libc::EIO)))
}

/// What a lane asks for, to be carried out by the thread that drives it.
#[derive(Default)]
struct BlockingPort {
    io: BTreeMap<u64, FileIo>,
    next: u64,
    answered: Option<Result<(), Errno>>,
}

impl Port for BlockingPort {
    fn submit(&mut self, io: FileIo) {
        self.io.insert(self.next, io);
        self.next += 1;
    }

    fn complete(&mut self, completion: Completion) {
        self.answered = Some(completion.result);
    }

    fn take_slot(&mut self) -> Option<Slot> {
        None
    }
}

/// Wakes a thread.
#[derive(Default)]
struct Bell {
    rung: Mutex<bool>,
    changed: Condvar,
}

impl Bell {
    fn wait(&self) {
        let rung = self.rung.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_timeout_while(rung, LOOK_EVERY, |rung| !*rung);
        *waited.unwrap_or_else(PoisonError::into_inner).0 = false;
    }
}

impl Wake for Bell {
    fn wake(&self) {
        *self.rung.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }
}
