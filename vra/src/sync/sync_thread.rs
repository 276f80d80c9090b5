//! Drives a [`FullSync`]: one small thread for each sync, with plain direct reads through the disks' own open files.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};
use std::time::Duration;

use ublk::arena::{Arena, Slot};
use ublk::serve::{Disk, Wake};

use super::local_disk::{probe, read};
use super::{CHUNK_BYTES, FullSync, SyncCounts, SyncStep};
use crate::capture::numbering::{ByteRange, VmCore};
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

impl SyncJob {
    fn file(&self, volume: u16) -> &File {
        &self.disks[usize::from(volume)].files()[0]
    }
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
            SyncStep::Probe { volume, range } => match probe(job.file(volume), range) {
                Ok(extent) => job.sync.probed(&job.core, extent, clock.now()),
                Err(error) => fail(&mut job, &clock, volume, range, &error, &mut failed_before),
            },
            SyncStep::Read { volume, range } => {
                let Some(slot) = buffer.take() else { continue };
                match read(job.file(volume), range, slot) {
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
