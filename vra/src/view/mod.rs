//! A disk as it was at a sequence number, as a disk that doors serve: recovery disk, over it the journal up to that number, over
//! that the scratch of what was written to the view itself.
//!
//! [`ViewDisk`] needs files and a [`VolumeView`], nothing of the daemon: `vra-journal` serves it from a datastore alone.

mod lane;
mod layout;
mod plan;
mod scratch;

use std::any::Any;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use journal::format::{PAGE_BYTES, SUPERBLOCK_OFFSETS, Superblock};
use journal::storage::AlignedBuf;
use journal::view::{VolumeView, still_there};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use ublk::arena::{Arena, SLOT_ALIGN_BYTES};
use ublk::serve::{Allocation, Disk, Extent, Geometry, Lane, Waker, ZeroLimits};

pub use self::layout::Layout;
use self::plan::PlanLimits;
pub use self::scratch::{CHUNK_BYTES, SECTOR_BYTES};
use self::scratch::{Gate, Place, ScratchMap};

/// Memory of one lane for what it fetches: slots and their length in bytes. A request's data is at most a door's slot long, and
/// a fetch a little longer.
const FETCH_SLOTS: u32 = 8;
const FETCH_SLOT_BYTES: usize = 256 << 10;

/// Longest discard or write-zeroes of one request, in bytes: it is only noted down.
const ZERO_MAX_BYTES: u32 = 1 << 31;

/// What a view is made of.
pub struct ViewSource {
    /// Where each byte was.
    pub volume: VolumeView,
    /// The journal's file, opened for direct I/O.
    pub journal: File,
    /// The recovery disk of the volume, opened for direct I/O.
    pub recovery_disk: File,
    /// The sequence number that the view shows.
    pub seq: u64,
    /// How the view learns that its history is gone.
    pub freshness: Freshness,
    /// Held as long as the view lives: what keeps the history (C3).
    pub keep: Box<dyn Any + Send + Sync>,
}

/// How a view learns that its history is gone: then all reads fail, because the recovery disk has moved on (C2).
pub enum Freshness {
    /// The journal's owner is in this process and sets the flag before it touches the recovery disk.
    Flag(Arc<AtomicBool>),
    /// The owner may be another process: the journal's superblock is read after each read of the recovery disk.
    Superblock,
    /// The same, and that process may open the journal anew meanwhile, which moves the newest segment: what seems damaged then is
    /// looked for again before it is called so.
    Collected {
        /// Where the segments were when the view was made.
        layout: Layout,
        /// Finds the segments again. It waits for the disk, so it is for processes that serve nothing else.
        collect: Collect,
    },
}

impl Freshness {
    /// Whether the superblock tells.
    fn is_superblock(&self) -> bool {
        matches!(self, Self::Superblock | Self::Collected { .. })
    }
}

/// Makes a view of the same disk at the same number from what the file holds now.
pub type Collect = Box<dyn Fn() -> anyhow::Result<(VolumeView, Layout)> + Send + Sync>;

/// How a view looks to its guest.
#[derive(Clone, Copy, Debug)]
pub struct ViewSettings {
    /// The disk's smallest unit, in bytes: what the source's disk had, or partition tables are misread.
    pub logical_block_bytes: u32,
    /// Asks the filesystem for holes of the recovery disk, so that clients can skip them. It may wait for metadata, so it is for
    /// processes that serve nothing else.
    pub look_for_holes: bool,
}

/// Why a view cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ViewDiskError {
    /// The filesystem does not say how it can be read.
    #[error("cannot find out the unit of direct I/O of the recovery disk")]
    Alignment(#[source] io::Error),
    /// No memory for what lanes fetch.
    #[error("the recovery disk's unit of direct I/O, {0} bytes, is longer than 4096")]
    AlignmentTooLong(u32),
    /// The scratch file.
    #[error("cannot make the scratch file {}", path.display())]
    Scratch {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The scratch file's space.
    #[error(
        "no space for {} MiB of scratch at {}: free space, or ask for less scratch", len_bytes >> 20, path.display()
    )]
    ScratchSpace {
        /// The file.
        path: PathBuf,
        /// Its length, in bytes.
        len_bytes: u64,
    },
}

/// What is written to a view: a file of a fixed length, removed when the view ends.
#[derive(Debug)]
pub struct ScratchFile {
    file: File,
    path: PathBuf,
    len_bytes: u64,
}

impl ScratchFile {
    /// Makes a scratch file that holds up to `len_bytes` (rounded up to [`CHUNK_BYTES`]) of written data, with its space reserved if the
    /// filesystem can. A file of that name, left by a view that was cut short, is replaced.
    ///
    /// # Errors
    /// [`ViewDiskError::Scratch`] or [`ViewDiskError::ScratchSpace`].
    pub fn create(path: &Path, len_bytes: u64) -> Result<Self, ViewDiskError> {
        let len_bytes = len_bytes.max(1).next_multiple_of(CHUNK_BYTES);
        let error = |source| ViewDiskError::Scratch { path: path.into(), source };
        match std::fs::remove_file(path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => return Err(error(source)),
            _ => {}
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        let direct = options.custom_flags(libc::O_DIRECT | libc::O_CLOEXEC).open(path);
        let file = match direct {
            // Guests write single sectors; where the filesystem wants longer direct I/O the page cache puts them together.
            Ok(file) if ublk::backing::direct_io_align(&file).is_ok_and(|align| align <= 512) => file,
            _ => {
                options.create_new(false).create(true).custom_flags(libc::O_CLOEXEC);
                options.open(path).map_err(error)?
            }
        };
        let scratch = Self { file, path: path.into(), len_bytes };
        scratch.file.set_len(len_bytes).map_err(error)?;
        match fallocate(&scratch.file, FallocateFlags::empty(), 0, len_bytes as i64) {
            Ok(()) | Err(Errno::EOPNOTSUPP) => Ok(scratch),
            Err(Errno::ENOSPC | Errno::EDQUOT) => {
                Err(ViewDiskError::ScratchSpace { path: path.into(), len_bytes })
            }
            Err(errno) => Err(error(errno.into())),
        }
    }
}

impl Drop for ScratchFile {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove a scratch file: remove it by hand");
        }
    }
}

/// Where the bytes of a view are, as found out at one time.
struct Shown {
    volume: VolumeView,
    layout: Option<Layout>,
}

/// A view as a disk.
pub struct ViewDisk {
    number: u16,
    size_bytes: u64,
    shown: RwLock<Arc<Shown>>,
    seq: u64,
    freshness: Freshness,
    limits: PlanLimits,
    /// How long the recovery disk is at least, in bytes: promotion makes it longer.
    recovery_disk_len: AtomicU64,
    settings: ViewSettings,
    /// In the order of [`plan::JOURNAL_FILE`], [`plan::RECOVERY_DISK_FILE`], [`plan::SCRATCH_FILE`].
    files: Vec<File>,
    scratch: Option<Scratch>,
    /// The history is gone: nothing can be read any more.
    gone: AtomicBool,
    /// Damage that was logged, as record and place; at most [`REPORTS_MAX`].
    reported: Mutex<Vec<(u64, u64)>>,
    /// Dropped last: what keeps the history.
    _keep: Box<dyn Any + Send + Sync>,
}

struct Scratch {
    state: Mutex<ScratchState>,
    /// A sync has failed: what was written before it may be lost, and a later sync would not say so.
    poisoned: AtomicBool,
    _file: ScratchFile,
}

struct ScratchState {
    map: ScratchMap,
    gate: Gate,
}

/// Places of damage that one view logs; more of them say nothing new.
const REPORTS_MAX: usize = 64;

impl ViewDisk {
    /// A view, read-only without `scratch`.
    ///
    /// # Errors
    /// [`ViewDiskError`].
    pub fn new(
        source: ViewSource,
        settings: ViewSettings,
        scratch: Option<ScratchFile>,
    ) -> Result<Arc<Self>, ViewDiskError> {
        let ViewSource { volume, journal, recovery_disk, seq, freshness, keep } = source;
        let align = ublk::backing::direct_io_align(&recovery_disk).map_err(ViewDiskError::Alignment)?;
        if align as usize > SLOT_ALIGN_BYTES {
            return Err(ViewDiskError::AlignmentTooLong(align));
        }
        let mut files = vec![journal, recovery_disk];
        let scratch = match scratch {
            None => None,
            Some(scratch) => {
                let path = scratch.path.clone();
                let file = scratch.file.try_clone();
                files.push(file.map_err(|source| ViewDiskError::Scratch { path, source })?);
                let map = ScratchMap::new(scratch.len_bytes);
                let state = Mutex::new(ScratchState { map, gate: Gate::default() });
                Some(Scratch { state, poisoned: AtomicBool::new(false), _file: scratch })
            }
        };
        let layout = match &freshness {
            Freshness::Collected { layout, .. } => Some(layout.clone()),
            Freshness::Flag(_) | Freshness::Superblock => None,
        };
        Ok(Arc::new(Self {
            number: volume.number(),
            size_bytes: volume.size_bytes(),
            shown: RwLock::new(Arc::new(Shown { volume, layout })),
            seq,
            freshness,
            limits: PlanLimits {
                fetch_max_bytes: FETCH_SLOT_BYTES as u64,
                disk_align_bytes: u64::from(align),
            },
            recovery_disk_len: AtomicU64::new(0),
            settings,
            files,
            scratch,
            gone: AtomicBool::new(false),
            reported: Mutex::default(),
            _keep: keep,
        }))
    }

    /// How much of the scratch file is in use, in bytes; none for a read-only view.
    pub fn scratch_used_bytes(&self) -> Option<u64> {
        self.scratch.as_ref().map(|scratch| scratch.lock().map.used_bytes())
    }

    /// Whether the history is gone: all reads fail.
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
            || matches!(&self.freshness, Freshness::Flag(flag) if flag.load(Ordering::Acquire))
    }

    /// The first damage that was met: the record, and where on the disk, in bytes.
    pub fn first_damage(&self) -> Option<(u64, u64)> {
        self.reported.lock().unwrap_or_else(PoisonError::into_inner).first().copied()
    }

    /// Where the bytes are, as last found out.
    fn shown(&self) -> Arc<Shown> {
        Arc::clone(&self.shown.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// How long the recovery disk is, in bytes, as far as a read up to `end_bytes` must know.
    fn recovery_disk_len(&self, end_bytes: u64) -> u64 {
        let known = self.recovery_disk_len.load(Ordering::Acquire);
        if end_bytes <= known {
            return known;
        }
        let found = self.files[plan::RECOVERY_DISK_FILE.0 as usize].metadata().map(|metadata| metadata.len());
        // What can't be told is found out by reading.
        found.map_or(u64::MAX, |found| self.recovery_disk_len.fetch_max(found, Ordering::AcqRel).max(found))
    }

    /// Something could not be read as expected: finds the segments again if they may lie elsewhere now. Waits for the disk.
    fn collect_again(&self, now: &Superblock) {
        let Freshness::Collected { collect, .. } = &self.freshness else { return };
        let shown = self.shown();
        let Some(layout) = shown.layout.as_ref().filter(|layout| layout.may_have_changed(now)) else {
            return;
        };
        match collect() {
            Ok((_, found)) if found == *layout => {}
            Ok((volume, found)) => {
                let found = Arc::new(Shown { volume, layout: Some(found) });
                *self.shown.write().unwrap_or_else(PoisonError::into_inner) = found;
            }
            Err(error) => {
                let error = crate::report::chain(error.as_ref());
                tracing::warn!(
                    event = "view_not_collected",
                    error,
                    "the journal changed and cannot be read again"
                );
            }
        }
    }

    /// Notes that the history is gone.
    fn set_gone(&self) {
        if !self.gone.swap(true, Ordering::AcqRel) {
            let (seq, volume) = (self.seq, self.number);
            tracing::error!(
                event = "view_checkpoint_gone",
                seq,
                volume,
                "the checkpoint of an open view is gone"
            );
        }
    }

    /// Logs damage once for each place.
    fn report(&self, error: &journal::view::ViewError) {
        let journal::view::ViewError::Corrupt { seq, volume, offset_bytes } = *error else {
            tracing::error!(event = "view_read_failed", %error, "a view cannot be read");
            return;
        };
        let mut reported = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
        if reported.len() < REPORTS_MAX && !reported.contains(&(seq, offset_bytes)) {
            reported.push((seq, offset_bytes));
            tracing::error!(
                event = "view_checksum",
                seq,
                volume,
                offset_bytes,
                "a record of the journal is damaged: the view reads EIO there"
            );
        }
    }

    /// Holes of the recovery disk as the filesystem knows them; data where it doesn't say.
    fn recovery_disk_extent(&self, offset_bytes: u64, len_bytes: u64) -> Extent {
        let data = Extent { len_bytes, allocation: Allocation::Data };
        if !self.settings.look_for_holes {
            return data;
        }
        let fd = self.files[plan::RECOVERY_DISK_FILE.0 as usize].as_raw_fd();
        let seek = |whence| {
            // SAFETY: no memory is involved; nobody uses the descriptor's position.
            let place = unsafe { libc::lseek(fd, offset_bytes as libc::off_t, whence) };
            u64::try_from(place).ok()
        };
        let next_data = match seek(libc::SEEK_DATA) {
            Some(place) => place,
            None if Errno::last() == Errno::ENXIO => u64::MAX,
            None => return data,
        };
        if next_data > offset_bytes {
            // Promotion may have punched what was data at the view's moment: who skips it reads nothing that would tell.
            if !self.is_still_there() {
                self.set_gone();
                return data;
            }
            return Extent {
                len_bytes: len_bytes.min(next_data - offset_bytes),
                allocation: Allocation::Hole,
            };
        }
        let until = seek(libc::SEEK_HOLE).filter(|place| *place > offset_bytes);
        Extent { len_bytes: until.map_or(len_bytes, |until| len_bytes.min(until - offset_bytes)), ..data }
    }

    /// Whether the journal's owner still keeps the history, as far as another process can know. Waits for the disk.
    fn is_still_there(&self) -> bool {
        if !self.freshness.is_superblock() {
            return !self.is_gone();
        }
        let journal = &self.files[plan::JOURNAL_FILE.0 as usize];
        let copies = SUPERBLOCK_OFFSETS.map(|offset_bytes| {
            let mut page = AlignedBuf::zeroed(PAGE_BYTES);
            journal.read_exact_at(&mut page, offset_bytes).ok()?;
            Superblock::decode(&page).ok()
        });
        let newest = copies.into_iter().flatten().max_by_key(|copy| copy.sequence);
        newest.is_some_and(|superblock| still_there(&superblock, self.seq).is_ok())
    }

    /// What was never written in the view, from the start of the range on.
    fn extent_below(&self, offset_bytes: u64, len_bytes: u64) -> Extent {
        match self.shown().volume.index().overlapping(offset_bytes, len_bytes).next() {
            Some((piece, extent)) if piece.offset_bytes <= offset_bytes => {
                let zeroes = extent.payload_offset_bytes.is_none();
                let allocation = if zeroes { Allocation::Hole } else { Allocation::Data };
                Extent { len_bytes: len_bytes.min(piece.end_bytes - offset_bytes), allocation }
            }
            Some((piece, _)) => self.recovery_disk_extent(offset_bytes, piece.offset_bytes - offset_bytes),
            None => self.recovery_disk_extent(offset_bytes, len_bytes),
        }
    }
}

impl Scratch {
    fn lock(&self) -> MutexGuard<'_, ScratchState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Disk for ViewDisk {
    fn geometry(&self) -> Geometry {
        let writable = self.scratch.is_some();
        let zeroes = ZeroLimits { granularity_bytes: SECTOR_BYTES as u32, max_bytes: ZERO_MAX_BYTES };
        let zeroes = writable.then_some(ZeroLimits {
            granularity_bytes: zeroes.granularity_bytes.max(self.settings.logical_block_bytes),
            ..zeroes
        });
        Geometry {
            size_bytes: self.size_bytes,
            logical_block_bytes: self.settings.logical_block_bytes,
            physical_block_bytes: PAGE_BYTES as u32,
            volatile_cache: writable,
            fua: writable,
            read_only: !writable,
            discard: zeroes,
            write_zeroes: zeroes,
        }
    }

    fn files(&self) -> &[File] {
        &self.files
    }

    fn lane(self: Arc<Self>, waker: Waker) -> Box<dyn Lane> {
        Box::new(lane::ViewLane::new(self, waker, Arena::new(FETCH_SLOT_BYTES, FETCH_SLOTS).ok()))
    }

    fn extents(&self, offset_bytes: u64, len_bytes: u64, count_max: usize) -> Vec<Extent> {
        let runs = match &self.scratch {
            Some(scratch) => scratch.lock().map.find(offset_bytes, len_bytes),
            None => vec![scratch::Run { offset_bytes, len_bytes, place: Place::Below }],
        };
        let mut extents: Vec<Extent> = Vec::new();
        for run in runs {
            let end_bytes = run.offset_bytes + run.len_bytes;
            let mut at = run.offset_bytes;
            while at < end_bytes {
                let extent = match run.place {
                    Place::Scratch(_) => Extent { len_bytes: end_bytes - at, allocation: Allocation::Data },
                    Place::Zeroes => Extent { len_bytes: end_bytes - at, allocation: Allocation::Hole },
                    Place::Below => self.extent_below(at, end_bytes - at),
                };
                let count = extents.len();
                match extents.last_mut() {
                    Some(last) if last.allocation == extent.allocation => last.len_bytes += extent.len_bytes,
                    _ if count == count_max => return extents,
                    _ => extents.push(extent),
                }
                at += extent.len_bytes;
            }
        }
        extents
    }
}

#[cfg(test)]
pub(crate) mod test_journal;
#[cfg(test)]
mod tests;
