//! Drives a [`FullSync`]: one small thread for each sync, with plain direct reads through the disks' own open files.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};
use std::time::Duration;

use nix::errno::Errno;
use ublk::arena::{Arena, Slot};
use ublk::serve::{Disk, Wake};

use super::{CHUNK_BYTES, Extent, FullSync, SyncCounts, SyncStep};
use crate::capture::numbering::{ByteRange, VmCore};
use crate::capture::payload::Piece;
use crate::clock::Clock;

/// Reads that wait for the target at most: memory of a sync is this many chunks.
const BUFFERS: u32 = 64;

/// A sync to be driven.
pub struct SyncJob {
    /// Whose sync, for the log.
    pub name: String,
    /// The VM's core, in which the sync has begun.
    pub core: Arc<VmCore>,
    /// The VM's disks, by volume number.
    pub disks: Vec<Arc<dyn Disk>>,
    /// The sync.
    pub sync: FullSync,
}

/// A running sync. Dropping it ends the thread; the sync then stays open in the core until capture stops.
pub struct SyncThread {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl SyncThread {
    /// Starts it.
    ///
    /// # Errors
    /// No memory for the reads, or no thread.
    pub fn start(job: SyncJob) -> io::Result<Self> {
        let buffers = Arena::new(CHUNK_BYTES as usize, BUFFERS)?;
        let counts = Mutex::new(job.sync.counts());
        let shared = Arc::new(Shared { stop: AtomicBool::new(false), over: AtomicBool::new(false), counts });
        let name = format!("sync-{}", job.name);
        let of_thread = shared.clone();
        let thread = std::thread::Builder::new()
            .name(name.chars().take(15).collect())
            .spawn(move || run(job, &buffers, &of_thread))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// How far it is.
    pub fn counts(&self) -> SyncCounts {
        self.shared.counts()
    }

    /// Whether it is complete or aborted.
    pub fn is_over(&self) -> bool {
        self.shared.over.load(Ordering::Acquire)
    }
}

impl Drop for SyncThread {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // A panic of the thread was reported by its hook; there is nothing left to do for it.
            let _ = thread.join();
        }
    }
}

struct Shared {
    stop: AtomicBool,
    over: AtomicBool,
    counts: Mutex<SyncCounts>,
}

impl Shared {
    fn counts(&self) -> SyncCounts {
        *self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(&self) {
        self.0.unpark();
    }
}

fn run(mut job: SyncJob, buffers: &Arena, shared: &Shared) {
    let clock = Clock::start();
    let waker = Arc::new(Unpark(std::thread::current()));
    job.core.with(|core, _| core.set_syncer(waker));
    let mut buffer: Option<Slot> = None;
    let mut failed_before = false;
    while !shared.stop.load(Ordering::Acquire) {
        if buffer.is_none() {
            buffer = buffers.take();
        }
        match job.sync.next(&job.core, clock.now(), buffer.is_some()) {
            SyncStep::Probe { volume, range } => match probe(&job, volume, range) {
                Ok(extent) => job.sync.probed(&job.core, extent, clock.now()),
                Err(error) => fail(&mut job, &clock, volume, range, &error, &mut failed_before),
            },
            SyncStep::Read { volume, range } => {
                let Some(slot) = buffer.take() else { continue };
                match read(&job, volume, range, slot) {
                    Ok(data) => {
                        job.sync.read(&job.core, data, clock.now());
                        failed_before = false;
                    }
                    Err(error) => fail(&mut job, &clock, volume, range, &error, &mut failed_before),
                }
            }
            SyncStep::Wait { until_us } => {
                let wait_us = until_us.saturating_sub(clock.now().mono_us);
                std::thread::park_timeout(Duration::from_micros(wait_us));
            }
            SyncStep::Done | SyncStep::Aborted => break,
        }
        *shared.counts.lock().unwrap_or_else(PoisonError::into_inner) = job.sync.counts();
    }
    if shared.stop.load(Ordering::Acquire) {
        job.sync.cancel(&job.core);
    }
    shared.over.store(true, Ordering::Release);
}

fn fail(
    job: &mut SyncJob,
    clock: &Clock,
    volume: u16,
    range: ByteRange,
    error: &io::Error,
    failed_before: &mut bool,
) {
    if !std::mem::replace(failed_before, true) {
        tracing::warn!(
            vm = job.name,
            volume,
            offset_bytes = range.start,
            len_bytes = range.len_bytes(),
            %error,
            "the sync can't read the local disk and tries again: the target stays inconsistent until it can"
        );
    }
    job.sync.read_failed(&job.core, clock.now());
}

/// Whether there is data or a hole at the range's start. Where the file can't tell, all is data.
fn probe(job: &SyncJob, volume: u16, range: ByteRange) -> io::Result<Extent> {
    let data_start = match seek(job, volume, range.start, libc::SEEK_DATA) {
        Ok(start) => start,
        Err(Errno::ENXIO) => return Ok(Extent { is_data: false, end: range.end }),
        Err(Errno::EINVAL | Errno::EOPNOTSUPP) => return Ok(Extent { is_data: true, end: range.end }),
        Err(errno) => return Err(errno.into()),
    };
    if data_start > range.start {
        return Ok(Extent { is_data: false, end: data_start });
    }
    let end = seek(job, volume, range.start, libc::SEEK_HOLE)?;
    Ok(Extent { is_data: true, end })
}

/// Moves the position of the open file, which nobody uses: all I/O to it names its place.
fn seek(job: &SyncJob, volume: u16, offset_bytes: u64, whence: i32) -> Result<u64, Errno> {
    let offset = libc::off_t::try_from(offset_bytes).map_err(|_| Errno::EINVAL)?;
    let file = job.disks[usize::from(volume)].files()[0].as_raw_fd();
    // SAFETY: lseek touches no memory; the descriptor belongs to the disk, which lives as long as `job`.
    let found = Errno::result(unsafe { libc::lseek(file, offset, whence) })?;
    Ok(u64::try_from(found).expect("lseek gives no negative position"))
}

/// Reads the range; none if it is all zeroes.
fn read(job: &SyncJob, volume: u16, range: ByteRange, mut slot: Slot) -> io::Result<Option<Piece>> {
    let file = &job.disks[usize::from(volume)].files()[0];
    let len_bytes = range.len_bytes() as usize;
    file.read_exact_at(&mut slot[..len_bytes], range.start)?;
    if slot[..len_bytes].chunks(ZEROES.len()).all(|chunk| chunk == &ZEROES[..chunk.len()]) {
        return Ok(None);
    }
    Ok(Some(Piece::of_slot(slot.share(), len_bytes)))
}

const ZEROES: [u8; 4096] = [0; 4096];
