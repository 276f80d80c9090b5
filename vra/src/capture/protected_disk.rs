//! A disk whose writes can be captured: a local file or block device behind a door, and the core that numbers its writes.
//!
//! The disk always belongs to a core. An unprotected one has a core of its own that captures nothing; protecting it moves
//! it to its VM's core, and back, while it is served. A move closes the volume in the old core, so that each lane comes to
//! the new one with its next request; writes in flight end in the core that they began in.

use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ublk::arena::Arena;
use ublk::serve::{Disk, Geometry, Lane, Waker};

use super::numbering::{CoreLimits, VmCore, ring};
use super::protected_lane::ProtectedLane;
use super::write_gate::WriteGate;

/// The system's clock, as µs since the Unix epoch. Called on the guest's path.
pub type WallClock = Arc<dyn Fn() -> u64 + Send + Sync>;

/// Where a disk's writes are numbered.
#[derive(Clone)]
pub struct Home {
    /// The core.
    pub core: Arc<VmCore>,
    /// The disk's number in it.
    pub volume: u16,
    /// Memory for small writes, of [`DENSE_CHUNK_BYTES`](super::payload::DENSE_CHUNK_BYTES) slots; none where nothing is
    /// captured.
    pub dense: Option<Arena>,
}

impl Home {
    /// A core of the disk's own that captures nothing.
    fn alone() -> Self {
        let (producer, _consumer) = ring(1, 1);
        let limits = CoreLimits { writes_in_flight: ALONE_WRITES_IN_FLIGHT, retained_bytes: 0 };
        let core = Arc::new(VmCore::new(producer, limits, 1, 1));
        let volume = core.with(|core, _| core.add_volume());
        Self { core, volume, dense: None }
    }

    fn is_idle(&self) -> bool {
        self.core.with(|core, _| core.is_idle(self.volume))
    }
}

/// A local disk, protected or not.
pub struct ProtectedDisk {
    file: [File; 1],
    /// But for the size.
    geometry: Geometry,
    /// What guests see of the file, in bytes. Only grows (E3).
    size_bytes: AtomicU64,
    clock: WallClock,
    /// Of a disk that several hosts share.
    gate: Option<Arc<WriteGate>>,
    homes: Mutex<Homes>,
    /// Counts the moves, so that lanes notice one without the lock.
    moves: AtomicU64,
}

impl ProtectedDisk {
    /// A disk over an open file or block device, opened with `O_DIRECT` and locked as A4 says, with what it really can.
    pub fn new(file: File, geometry: Geometry, clock: WallClock) -> Self {
        Self {
            file: [file],
            size_bytes: AtomicU64::new(geometry.size_bytes),
            geometry,
            clock,
            gate: None,
            homes: Mutex::new(Homes { current: Home::alone(), earlier: Vec::new() }),
            moves: AtomicU64::new(1),
        }
    }

    /// The same, with guests' writes behind a gate.
    #[must_use]
    pub fn behind(self, gate: Arc<WriteGate>) -> Self {
        Self { gate: Some(gate), ..self }
    }

    /// The same file as another disk, which nobody serves: a sync reads it, and what guests write to this one isn't captured there.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn unserved(&self) -> std::io::Result<Self> {
        Ok(Self::new(self.file[0].try_clone()?, self.geometry(), Arc::clone(&self.clock)))
    }

    /// What guests see of the file, in bytes.
    pub(super) fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Acquire)
    }

    /// From now on guests may see so much of the file, in bytes; its stream has said so (E3). Less than before changes nothing.
    pub fn grow(&self, size_bytes: u64) {
        self.size_bytes.fetch_max(size_bytes, Ordering::Release);
    }

    /// From now on the writes belong to `home`.
    pub fn enter(&self, home: Home) {
        let mut homes = self.homes();
        let old = std::mem::replace(&mut homes.current, home);
        self.moves.fetch_add(1, Ordering::Release);
        old.core.with(|core, wakeups| core.close_volume(old.volume, wakeups));
        homes.earlier.retain(|home| !home.is_idle());
        homes.earlier.push(old);
    }

    /// From now on nothing is captured.
    pub fn leave(&self) {
        self.enter(Home::alone());
    }

    /// Whether no write of an earlier home is under way any more. Until then a sync must not begin: its reads aren't
    /// watched against them.
    pub fn is_settled(&self) -> bool {
        let mut homes = self.homes();
        homes.earlier.retain(|home| !home.is_idle());
        homes.earlier.is_empty()
    }

    /// The home, and the count of moves that brought the disk there.
    pub(super) fn home(&self) -> (Home, u64) {
        let homes = self.homes();
        (homes.current.clone(), self.moves())
    }

    /// How often the disk has moved.
    pub(super) fn moves(&self) -> u64 {
        self.moves.load(Ordering::Acquire)
    }

    pub(super) fn gate(&self) -> Option<&Arc<WriteGate>> {
        self.gate.as_ref()
    }

    pub(super) fn now_us(&self) -> u64 {
        (self.clock)()
    }

    fn homes(&self) -> MutexGuard<'_, Homes> {
        self.homes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Disk for ProtectedDisk {
    fn geometry(&self) -> Geometry {
        Geometry { size_bytes: self.size_bytes(), ..self.geometry.clone() }
    }

    fn files(&self) -> &[File] {
        &self.file
    }

    fn lane(self: Arc<Self>, waker: Waker) -> Box<dyn Lane> {
        Box::new(ProtectedLane::new(self, waker))
    }
}

impl std::fmt::Debug for ProtectedDisk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ProtectedDisk").field("geometry", &self.geometry).finish_non_exhaustive()
    }
}

/// Writes in flight of an unprotected disk; more wait.
const ALONE_WRITES_IN_FLIGHT: usize = 1024;

struct Homes {
    current: Home,
    /// Homes that the disk has left, until their writes have landed.
    earlier: Vec<Home>,
}
