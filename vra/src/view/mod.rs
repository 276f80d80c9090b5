//! A disk as it was at a sequence number, as a disk that doors serve: recovery disk, over it the journal up to that number, over
//! that the scratch of what was written to the view itself.
//!
//! [`ViewDisk`] needs files and a [`VolumeView`], nothing of the daemon: `vra-journal` serves it from a datastore alone.

mod extents;
mod history;
mod lane;
mod layout;
mod plan;
mod preserve;
mod scratch;

use std::any::Any;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use journal::crypt::{Cipher, SiteKeyId};
use journal::format::{PAGE_BYTES, SUPERBLOCK_OFFSETS, Superblock, SuperblockError};
use journal::storage::AlignedBuf;
use journal::view::VolumeView;
use ublk::arena::{Arena, SLOT_ALIGN_BYTES};
use ublk::serve::{Allocation, Disk, Extent, FileId, Geometry, Lane, Waker, ZeroLimits};

use self::history::History;
pub use self::layout::Layout;
use self::plan::PlanLimits;
use self::preserve::Reads;
pub use self::preserve::{Below, PreserveError};
use self::scratch::commit::{Commits, PAGES_AT_ONCE};
pub use self::scratch::error::ScratchError;
pub use self::scratch::file::{ScratchFile, ScratchKeys, remove as remove_scratch, remove_overlay};
pub use self::scratch::format::{ScratchFormatError, ScratchOwner};
use self::scratch::gate::Gate;
pub use self::scratch::map::MapDamage;
use self::scratch::map::{Place, ScratchMap};
pub use self::scratch::{CHUNK_BYTES, SECTOR_BYTES};

/// Memory of one lane for what it fetches: slots and their length in bytes. A request's data is at most a door's slot long, and
/// a fetch a little longer.
const FETCH_SLOTS: u32 = 32;
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
    /// Another view of the same disk at the same number, to whose scratch everything goes that promotion is about to change (C5): what is
    /// in there is read from there.
    pub beneath: Option<Arc<ViewDisk>>,
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
    /// The recovery disk takes direct I/O only in units longer than a page.
    #[error("the recovery disk's unit of direct I/O, {0} bytes, is longer than 4096")]
    AlignmentTooLong(u32),
    /// No memory.
    #[error("no memory for a view")]
    Memory(#[source] io::Error),
    /// The scratch file.
    #[error(transparent)]
    Scratch(#[from] ScratchError),
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
    /// Promotion up to here changes nothing that the view shows: it is in the scratch. 0 if nothing was copied.
    kept_seq: AtomicU64,
    /// The same as those of the disk beneath: what it keeps is promoted when they have ended.
    reads: Arc<Reads>,
    beneath: Option<Arc<Self>>,
    /// Held while something is copied to the scratch.
    preserving: Mutex<()>,
    freshness: Freshness,
    limits: PlanLimits,
    /// How long the recovery disk is at least, in bytes: promotion makes it longer.
    recovery_disk_len: AtomicU64,
    settings: ViewSettings,
    /// In the order of [`plan::JOURNAL_FILE`], [`plan::RECOVERY_DISK_FILE`], [`plan::SCRATCH_FILE`]; last the scratch file of the disk
    /// beneath.
    files: Vec<File>,
    scratch: Option<Scratch>,
    /// How many lanes there are.
    lanes: AtomicUsize,
    /// The history is gone: nothing can be read any more.
    gone: AtomicBool,
    /// Damage that was logged, as record and place; at most [`REPORTS_MAX`].
    reported: Mutex<Vec<(u64, u64)>>,
    /// Dropped last: what keeps the history.
    _keep: Box<dyn Any + Send + Sync>,
}

struct Scratch {
    state: Mutex<ScratchState>,
    /// A sync or a write of the map has failed: what was written before it may be lost, and a later sync would not say so.
    poisoned: AtomicBool,
    /// What reads and writes the data.
    cipher: Cipher,
    /// Where pages of the map are put to be written: for one commit at a time.
    pages: Arena,
}

struct ScratchState {
    map: ScratchMap,
    gate: Gate,
    commits: Commits,
    file: ScratchFile,
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
        let ViewSource { volume, journal, recovery_disk, seq, freshness, beneath, keep } = source;
        let align = ublk::backing::direct_io_align(&recovery_disk).map_err(ViewDiskError::Alignment)?;
        if align as usize > SLOT_ALIGN_BYTES {
            return Err(ViewDiskError::AlignmentTooLong(align));
        }
        // Pages do in any case.
        let journal_align = ublk::backing::direct_io_align(&journal).unwrap_or(PAGE_BYTES as u32);
        let mut files = vec![journal, recovery_disk];
        // What promotion has passed a resize of shows more in the journal than there was then (E3); what keeps it tells its size.
        let kept_bytes = scratch.as_ref().and_then(ScratchFile::disk_bytes);
        let beneath_bytes = beneath.as_ref().map(|beneath| beneath.size_bytes);
        let size_bytes = kept_bytes.into_iter().chain(beneath_bytes).fold(volume.size_bytes(), u64::min);
        let kept_seq = scratch.as_ref().map_or(0, ScratchFile::kept_seq);
        let scratch = match scratch {
            None => None,
            Some(mut file) => {
                files.push(file.duplicate()?);
                let map = file.take_map(size_bytes)?;
                let pages = Arena::new(PAGES_AT_ONCE as usize * PAGE_BYTES, 1);
                let pages = pages.map_err(|errno| ViewDiskError::Memory(errno.into()))?;
                let cipher = file.cipher.clone();
                let state = ScratchState { map, gate: Gate::default(), commits: Commits::default(), file };
                let poisoned = AtomicBool::new(false);
                Some(Scratch { state: Mutex::new(state), poisoned, cipher, pages })
            }
        };
        let kept_file = FileId(files.len() as u32);
        if let Some(scratch) = beneath.as_ref().and_then(|beneath| beneath.scratch.as_ref()) {
            files.push(scratch.lock().file.duplicate()?);
        }
        let layout = match &freshness {
            Freshness::Collected { layout, .. } => Some(layout.clone()),
            Freshness::Flag(_) | Freshness::Superblock => None,
        };
        Ok(Arc::new(Self {
            number: volume.number(),
            size_bytes,
            shown: RwLock::new(Arc::new(Shown { volume, layout })),
            seq,
            kept_seq: AtomicU64::new(kept_seq),
            reads: beneath.as_ref().map(|beneath| Arc::clone(&beneath.reads)).unwrap_or_default(),
            beneath,
            preserving: Mutex::default(),
            freshness,
            limits: PlanLimits {
                fetch_max_bytes: FETCH_SLOT_BYTES as u64,
                disk_align_bytes: u64::from(align),
                journal_align_bytes: u64::from(journal_align),
                kept_file,
            },
            recovery_disk_len: AtomicU64::new(0),
            settings,
            files,
            scratch,
            lanes: AtomicUsize::new(0),
            gone: AtomicBool::new(false),
            reported: Mutex::default(),
            _keep: keep,
        }))
    }

    /// How much of the scratch file is in use, in bytes; none for a read-only view.
    pub fn scratch_used_bytes(&self) -> Option<u64> {
        self.scratch.as_ref().map(|scratch| scratch.lock().map.used_bytes())
    }

    /// The site key that its scratch can't be opened again without, if it lasts and is encrypted.
    pub fn site_key_id(&self) -> Option<SiteKeyId> {
        self.scratch.as_ref()?.lock().file.site_key_id()
    }

    /// Which file its scratch is: filesystem and number.
    pub fn scratch_identity(&self) -> Option<(u64, u64)> {
        let scratch = self.scratch.as_ref()?.lock();
        scratch.file.file.metadata().ok().map(|metadata| (metadata.dev(), metadata.ino()))
    }

    /// Whether a write or sync of the scratch has failed: nothing can be written any more.
    pub fn is_scratch_failed(&self) -> bool {
        self.scratch.as_ref().is_some_and(|scratch| scratch.poisoned.load(Ordering::Acquire))
    }

    /// Makes all that was written durable, so that the scratch can be opened again after a restart of the host. From then on nothing can be
    /// written. False when a lane may write still, or a write has failed: then nothing is done.
    ///
    /// # Errors
    /// [`ScratchError`].
    pub fn close_scratch(&self) -> Result<bool, ScratchError> {
        let Some(scratch) = &self.scratch else { return Ok(true) };
        let mut state = scratch.lock();
        if self.lanes.load(Ordering::Acquire) > 0 || scratch.poisoned.swap(true, Ordering::AcqRel) {
            return Ok(false);
        }
        let ScratchState { map, file, .. } = &mut *state;
        file.close(map).map(|()| true)
    }

    /// Whether the history is gone: all reads fail.
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
            || self.beneath.as_ref().is_some_and(|beneath| beneath.is_gone())
            || matches!(&self.freshness, Freshness::Flag(flag) if flag.load(Ordering::Acquire))
    }

    /// The first damage that was met: the record, and where on the disk, in bytes.
    pub fn first_damage(&self) -> Option<(u64, u64)> {
        self.reported.lock().unwrap_or_else(PoisonError::into_inner).first().copied()
    }

    /// Whether a place, in bytes, is lost on the recovery disk (C5).
    pub fn is_lost(&self, offset_bytes: u64) -> bool {
        self.shown().volume.first_bad(offset_bytes..offset_bytes + 1).is_some()
    }

    /// Where the bytes are, as last found out.
    fn shown(&self) -> Arc<Shown> {
        Arc::clone(&self.shown.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Its size, in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Which volume of its VM it shows.
    pub fn number(&self) -> u16 {
        self.number
    }

    /// The journal's owner, in this process, has moved segments and is about to use their places again: these are the new ones. A read that
    /// is under way by the old ones and finds something else there is done again.
    pub fn repoint(&self, volume: VolumeView) {
        let found = Arc::new(Shown { volume, layout: None });
        *self.shown.write().unwrap_or_else(PoisonError::into_inner) = found;
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

    /// What was promoted since is read from the recovery disk, as soon as it is known what of that can't be trusted (C5). What was read
    /// before this is right: promotion up to the view's own number changes nothing else of the recovery disk than what the journal has.
    fn follow_promotion(&self, now: &Superblock) {
        let is_known = |shown: &Shown| match &shown.layout {
            Some(layout) => layout.knows_bad_ranges(now),
            // The journal's owner notes bad ranges itself: only that there are none can be told from here.
            None => now.bad_list.is_none(),
        };
        let mut shown = self.shown();
        if !is_known(&shown) {
            self.collect_again(now);
            shown = self.shown();
        }
        if is_known(&shown) {
            shown.volume.promoted().raise(now.low_water.seq);
        }
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
    pub(crate) fn set_gone(&self) {
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

    /// What the journal's superblock says, to a view that learns by it whether its history is gone. Waits for the disk.
    fn history(&self) -> Option<History> {
        if !self.freshness.is_superblock() {
            return None;
        }
        let journal = &self.files[plan::JOURNAL_FILE.0 as usize];
        let [first, second] = SUPERBLOCK_OFFSETS.map(|offset_bytes| {
            let mut page = AlignedBuf::zeroed(PAGE_BYTES);
            let read = journal.read_exact_at(&mut page, offset_bytes);
            read.map_err(|_| SuperblockError::Unreadable).and_then(|()| Superblock::decode(&page))
        });
        Some(History::of([first, second], self.kept_seq()))
    }

    /// What the data of a scratch file among [`ViewDisk::files`] is encrypted with.
    fn cipher_of(&self, file: FileId) -> Option<&Cipher> {
        let scratch = if file == self.limits.kept_file {
            self.beneath.as_ref().and_then(|beneath| beneath.scratch.as_ref())
        } else {
            self.scratch.as_ref().filter(|_| file == plan::SCRATCH_FILE)
        };
        scratch.map(|scratch| &scratch.cipher)
    }
}

impl ScratchState {
    /// Begins a commit, which the caller then carries out. False while another lane does: `waker` is called at its end.
    fn begin_commit(&mut self, waker: Option<&Waker>) -> bool {
        self.commits.begin(waker)
    }

    fn end_commit(&mut self, is_durable: bool) {
        if is_durable {
            self.map.end_commit();
        }
        self.commits.end(is_durable);
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
        self.lanes.fetch_add(1, Ordering::AcqRel);
        // Tests open views by the thousand, and no driver looks at their memory.
        let arena = if cfg!(test) { Arena::faulted_in_later } else { Arena::new };
        Box::new(lane::ViewLane::new(self, waker, arena(FETCH_SLOT_BYTES, FETCH_SLOTS).ok()))
    }

    fn extents(&self, offset_bytes: u64, len_bytes: u64, count_max: usize) -> Vec<Extent> {
        let runs = self.runs(offset_bytes, len_bytes);
        let mut extents: Vec<Extent> = Vec::new();
        for run in runs {
            let end_bytes = run.offset_bytes + run.len_bytes;
            let mut at = run.offset_bytes;
            while at < end_bytes {
                let extent = match run.place {
                    Place::Scratch(_) | Place::Kept(_) => {
                        Extent { len_bytes: end_bytes - at, allocation: Allocation::Data }
                    }
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
mod crash_tests;
#[cfg(test)]
mod fixture_tests;
#[cfg(test)]
pub(crate) mod test_guest;
#[cfg(test)]
pub(crate) mod test_journal;
#[cfg(test)]
mod tests;
