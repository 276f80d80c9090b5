//! A VM at its source: its disks, its core, what it retains, its generation and its syncs.
//!
//! Nothing here runs by itself: [`SourceVm::tick`] does what has become due and says what its owner has to do. The guest's
//! path doesn't come here.

mod growing;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use journal::batch::Record;
use ublk::arena::Arena;
use ublk::serve::{Disk, Waker};

use self::growing::Growth;
use super::modes::{Mode, OverflowReason};
use super::numbering::{Consumer, CoreLimits, VmCore, ring};
use super::payload::DENSE_CHUNK_BYTES;
use super::protected_disk::{Home, ProtectedDisk};
use super::sequence_store::{SEQUENCE_BLOCK, SequenceState, SequenceStore, SequenceStoreError};
use crate::api::GenerationId;
use crate::clock::Now;
use crate::ship::{GenerationStart, Retained};
use crate::sync::{FullSync, SyncLimits, SyncVolume};

pub use growing::{Brought, NewRange};

/// Bounds of a VM's capture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CaptureLimits {
    /// Entries that are retained at most, a power of two.
    pub ring_entries: usize,
    /// Guests' writes in flight at most.
    pub writes_in_flight: usize,
    /// Memory that retained writes may keep, in bytes: dense chunks and the doors' slots together.
    pub retained_bytes: u64,
    /// Memory for small writes, in bytes, a part of `retained_bytes`; allocated at the start.
    pub dense_bytes: u64,
    /// Bounds of syncs.
    pub sync: SyncLimits,
}

impl CaptureLimits {
    /// What the product uses for a VM unless its configuration says otherwise.
    pub const STANDARD: Self = Self {
        ring_entries: 1 << 16,
        writes_in_flight: 4096,
        retained_bytes: 256 << 20,
        dense_bytes: 64 << 20,
        sync: SyncLimits::STANDARD,
    };
}

/// What the owner of a [`SourceVm`] has to do.
#[derive(Debug)]
pub enum SourceAction {
    /// The VM's stream goes on with this generation.
    BeginGeneration(GenerationStart),
    /// This sync has begun: drive it to its end.
    BeginSync(FullSync),
    /// The stream says that a volume is larger: bring what is new of it, then let its guest have it (E3).
    Bring(NewRange),
    /// A volume is larger: its guest may have what is new of it. The next generation says so, and its sync brings it.
    Grown {
        /// The volume's number.
        volume: u16,
        /// Its size, in bytes.
        size_bytes: u64,
    },
    /// Something happened that people must know; it stays visible in the status.
    Alert(SourceAlert),
}

/// What people must know of a source VM.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SourceAlert {
    /// Writes are no longer captured.
    #[error(
        "writes are not captured since number {from_seq}: {reason}; a full sync follows once the target has what is retained"
    )]
    Overflow {
        /// First number that wasn't given.
        from_seq: u64,
        /// Why.
        reason: OverflowReason,
    },
    /// A thread died inside the core.
    #[error("a thread of the VRA died while it captured: restart the VRA to protect the VM again")]
    Lost,
    /// The numbering state can't be saved.
    #[error("{0}")]
    Store(String),
    /// A full sync has begun.
    #[error("a full sync has begun: no checkpoint counts before its end")]
    FullSync,
}

/// A source VM's state, for status.
#[derive(Clone, Debug)]
pub struct SourceSnapshot {
    /// What it is doing.
    pub mode: Mode,
    /// The generation in which it gives numbers.
    pub generation: GenerationStart,
    /// The sync that is under way.
    pub sync_id: Option<u64>,
    /// The highest number given.
    pub last_seq: u64,
    /// Everything up to here is durable at the target and was freed.
    pub freed_through: u64,
    /// When the oldest entry that isn't durable was numbered, in µs since the Unix epoch.
    pub oldest_time_us: Option<u64>,
    /// Since when nothing is captured, in µs since the Unix epoch, if capture has stopped.
    pub uncaptured_since_us: Option<u64>,
    /// Entries retained.
    pub retained_entries: u64,
    /// Memory that they keep, in bytes.
    pub retained_bytes: u64,
    /// Most that they may keep, in bytes.
    pub retained_limit_bytes: u64,
    /// How often capture stopped since the start.
    pub overflow_count: u64,
    /// Why it did so last.
    pub last_overflow: Option<OverflowReason>,
    /// Writes that the local disks failed since the start.
    pub local_errors: u64,
}

/// A VM that this host protects.
pub struct SourceVm {
    core: Arc<VmCore>,
    disks: Vec<Arc<ProtectedDisk>>,
    limits: CaptureLimits,
    store: Arc<dyn SequenceStore>,
    stream: Mutex<StreamEnd>,
    numbering: Mutex<Numbering>,
    /// The newest grant. Apart from `numbering`, which is locked while the state is being saved.
    grant: Mutex<Option<GrantNote>>,
    /// A new generation was asked for, whatever the mode.
    renew: AtomicBool,
    growth: Mutex<Growth>,
}

impl SourceVm {
    /// Takes the disks in, in the order of their volume numbers, in a new generation. They are captured from the first
    /// grant on.
    ///
    /// # Errors
    /// The numbering state can't be read or saved, or there is no memory.
    pub fn protect(
        disks: Vec<Arc<ProtectedDisk>>,
        limits: CaptureLimits,
        store: Arc<dyn SequenceStore>,
        generation: GenerationId,
    ) -> Result<Self, ProtectError> {
        let dense_chunks = (limits.dense_bytes / DENSE_CHUNK_BYTES as u64).max(1);
        let dense_chunks = u32::try_from(dense_chunks).map_err(|_| nix::errno::Errno::ENOMEM)?;
        let dense = Arena::new(DENSE_CHUNK_BYTES, dense_chunks)?;
        Self::protect_with(dense, disks, limits, store, generation)
    }

    /// The same with the caller's memory for small writes, in slots of [`DENSE_CHUNK_BYTES`].
    ///
    /// # Errors
    /// The numbering state can't be read or saved.
    pub fn protect_with(
        dense: Arena,
        disks: Vec<Arc<ProtectedDisk>>,
        limits: CaptureLimits,
        store: Arc<dyn SequenceStore>,
        generation: GenerationId,
    ) -> Result<Self, ProtectError> {
        let state = match store.load()? {
            Some(last) => last.next(generation, last.ceiling_seq),
            None => SequenceState::first(generation),
        };
        store.save(&state)?;
        let (producer, consumer) = ring(limits.ring_entries, state.first_seq);
        let core_limits =
            CoreLimits { writes_in_flight: limits.writes_in_flight, retained_bytes: limits.retained_bytes };
        let core = Arc::new(VmCore::new(producer, core_limits, state.first_seq, state.ceiling_seq));
        for disk in &disks {
            let volume = core.with(|core, _| core.add_volume());
            disk.enter(Home { core: core.clone(), volume, dense: Some(dense.clone()) });
        }
        let stream = Mutex::new(StreamEnd { consumer, ready_through: state.first_seq - 1 });
        let numbering = Mutex::new(Numbering::new(state));
        Ok(Self {
            core,
            disks,
            limits,
            store,
            stream,
            numbering,
            grant: Mutex::new(None),
            renew: AtomicBool::new(false),
            growth: Mutex::default(),
        })
    }

    /// Lets the disks go: they are served on, and nothing is captured any more.
    pub fn unprotect(&self) {
        self.core.with(|core, wakeups| core.overflow(OverflowReason::Requested, wakeups));
        for disk in &self.disks {
            disk.leave();
        }
    }

    /// The core, for checkpoints and syncs.
    pub fn core(&self) -> &Arc<VmCore> {
        &self.core
    }

    /// The disks, by volume number.
    pub fn disks(&self) -> Vec<Arc<dyn Disk>> {
        self.disks.iter().map(|disk| disk.clone() as Arc<dyn Disk>).collect()
    }

    /// Who is told that something was published; see [`VmCore::set_doorbell`].
    pub fn set_doorbell(&self, doorbell: Waker) {
        self.core.set_doorbell(doorbell);
    }

    /// The generation that the stream has to open.
    pub fn generation(&self) -> GenerationStart {
        self.numbering().state.start()
    }

    /// The target has granted the stream for `generation`. `fresh_image` says whether a sync may skip holes. Only notes it:
    /// the next tick acts.
    pub fn granted(&self, generation: GenerationId, fresh_image: bool) {
        *self.grant.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(GrantNote { generation, fresh_image });
    }

    /// Gives up what is retained and begins a new generation with a full sync: the target has lost or can't take what the
    /// stream holds. The next tick does it.
    pub fn renew(&self) {
        self.renew.store(true, Ordering::Release);
        self.core.with(|core, wakeups| core.overflow(OverflowReason::Requested, wakeups));
        self.stream().consumer.free_through(u64::MAX);
    }

    /// Does what has become due; called several times in a second, on a thread that may block. `random` makes ids.
    pub fn tick(&self, now: Now, random: &mut dyn FnMut() -> u128) -> Vec<SourceAction> {
        let mut actions = Vec::new();
        let mut numbering = self.numbering();
        let grant = *self.grant.lock().unwrap_or_else(PoisonError::into_inner);
        numbering.granted = grant
            .filter(|grant| grant.generation == numbering.state.generation)
            .map(|grant| grant.fresh_image);
        if let Err(error) = self.keep_state(&mut numbering) {
            numbering.store_failed(&error, &mut actions);
        }
        self.follow_sizes(&numbering, now, &mut actions);
        match self.core.with(|core, _| core.mode()) {
            Mode::Stopped if self.renew.load(Ordering::Acquire) => {
                self.renew_generation(&mut numbering, random, &mut actions);
            }
            Mode::Stopped => self.start(&mut numbering, now, random, &mut actions),
            Mode::Streaming { .. } => {}
            Mode::Overflow { from_seq, reason } => {
                if numbering.reported_overflow != Some(from_seq) {
                    numbering.reported_overflow = Some(from_seq);
                    numbering.overflow_count += 1;
                    numbering.last_overflow = Some(reason);
                    actions.push(SourceAction::Alert(SourceAlert::Overflow { from_seq, reason }));
                }
                self.renew_generation(&mut numbering, random, &mut actions);
            }
            Mode::Lost => {
                if !std::mem::replace(&mut numbering.reported_lost, true) {
                    actions.push(SourceAction::Alert(SourceAlert::Lost));
                }
            }
        }
        actions
    }

    /// Its state.
    pub fn snapshot(&self) -> SourceSnapshot {
        let (freed_through, oldest_time_us) = {
            let mut stream = self.stream();
            let freed_through = stream.consumer.freed_through();
            (freed_through, stream.consumer.peek(freed_through + 1).map(|entry| entry.time_us))
        };
        let numbering = self.numbering();
        self.core.with(|core, _| {
            let (retained_entries, retained_bytes) = core.retained();
            SourceSnapshot {
                mode: core.mode(),
                generation: numbering.state.start(),
                sync_id: core.sync_id(),
                last_seq: core.numbers().0 - 1,
                freed_through,
                oldest_time_us,
                uncaptured_since_us: core.uncaptured_since_us(),
                retained_entries,
                retained_bytes,
                retained_limit_bytes: self.limits.retained_bytes,
                overflow_count: numbering.overflow_count,
                last_overflow: numbering.last_overflow,
                local_errors: core.local_errors(),
            }
        })
    }

    /// Reserves numbers ahead, and forgets ancestors once the generation is granted.
    fn keep_state(&self, numbering: &mut Numbering) -> Result<(), SequenceStoreError> {
        let (next_seq, ceiling_seq) = self.core.with(|core, _| core.numbers());
        let mut state = numbering.state.clone();
        if ceiling_seq - next_seq < SEQUENCE_BLOCK / 2 {
            state.ceiling_seq = ceiling_seq + SEQUENCE_BLOCK;
        }
        if numbering.granted.is_some() {
            state.ancestors.clear();
        }
        if state != numbering.state {
            self.store.save(&state)?;
            self.core.with(|core, _| core.raise_ceiling(state.ceiling_seq));
            numbering.state = state;
        }
        numbering.store_error = None;
        Ok(())
    }

    /// After an overflow has drained: another generation, which waits for its grant.
    fn renew_generation(
        &self,
        numbering: &mut Numbering,
        random: &mut dyn FnMut() -> u128,
        actions: &mut Vec<SourceAction>,
    ) {
        if !self.is_drained() {
            return;
        }
        let generation = GenerationId(uuid::Builder::from_random_bytes(random().to_le_bytes()).into_uuid());
        let state = numbering.state.next(generation, self.core.with(|core, _| core.numbers().0));
        if let Err(error) = self.store.save(&state) {
            return numbering.store_failed(&error, actions);
        }
        let rested = self.core.with(|core, _| {
            core.raise_ceiling(state.ceiling_seq);
            core.rest()
        });
        if rested.is_ok() {
            self.renew.store(false, Ordering::Release);
            self.growth().forget_said();
            numbering.granted = None;
            numbering.state = state;
            actions.push(SourceAction::BeginGeneration(numbering.state.start()));
        }
    }

    fn is_drained(&self) -> bool {
        self.core.with(|core, _| core.retained().0) == 0
    }

    /// After the grant: captures, beginning with a full sync.
    fn start(
        &self,
        numbering: &mut Numbering,
        now: Now,
        random: &mut dyn FnMut() -> u128,
        actions: &mut Vec<SourceAction>,
    ) {
        let Some(fresh_image) = numbering.granted else { return };
        if !self.disks.iter().all(|disk| disk.is_settled()) {
            return;
        }
        let volumes: Vec<SyncVolume> = (0_u16..)
            .zip(&self.disks)
            .map(|(volume, disk)| {
                let geometry = disk.geometry();
                let (size_bytes, block_bytes) = (geometry.size_bytes, geometry.logical_block_bytes);
                SyncVolume { volume, size_bytes, block_bytes }
            })
            .collect();
        let sizes: Vec<(u16, u64)> =
            volumes.iter().map(|volume| (volume.volume, volume.size_bytes)).collect();
        let sync_id = (random() as u64).max(1);
        let begun = self.core.with(|core, wakeups| {
            core.start_streaming()?;
            // The journal may have missed that disks have grown. Fresh images have no history that would need it.
            let said = match fresh_image {
                true => Ok(0),
                false => core.publish_sizes(&sizes, now.wall_us, wakeups),
            };
            let begun = said.and_then(|_| core.begin_sync(sync_id, &sizes, now.wall_us, wakeups));
            if begun.is_err() {
                core.overflow(OverflowReason::RingFull, wakeups);
            }
            begun
        });
        if begun.is_ok() {
            let sync = FullSync::new(sync_id, volumes, fresh_image, self.limits.sync);
            actions.push(SourceAction::Alert(SourceAlert::FullSync));
            actions.push(SourceAction::BeginSync(sync));
        }
    }

    fn stream(&self) -> MutexGuard<'_, StreamEnd> {
        self.stream.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn numbering(&self) -> MutexGuard<'_, Numbering> {
        self.numbering.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a VM can't be protected.
#[derive(Debug, thiserror::Error)]
pub enum ProtectError {
    /// Its numbering state is not to be had.
    #[error("the VM's numbers are not safe")]
    Store(#[from] SequenceStoreError),
    /// No memory for what it retains.
    #[error("no memory for the VM's retained writes: lower its memory limit, or raise RLIMIT_MEMLOCK")]
    Memory(#[from] nix::errno::Errno),
}

/// The stream's way to what a VM retains.
pub struct RetainedEntries(pub Arc<SourceVm>);

impl Retained for RetainedEntries {
    fn take_ready(&mut self, from_seq: u64, max_bytes: usize, max_records: usize, out: &mut Vec<Record>) {
        let (mut bytes, mut records) = (0, 0);
        self.0.stream().consumer.walk(from_seq, |entry| {
            if records == max_records || (records > 0 && bytes >= max_bytes) {
                return false;
            }
            bytes += entry.payload.len_bytes();
            records += 1;
            out.push(entry.to_record());
            true
        });
    }

    fn free_through(&mut self, seq: u64) {
        self.0.stream().consumer.free_through(seq);
    }

    fn published_through(&self) -> u64 {
        let mut stream = self.0.stream();
        let from_seq = stream.ready_through + 1;
        stream.ready_through = stream.consumer.walk(from_seq, |_| true) - 1;
        stream.ready_through
    }
}

#[derive(Clone, Copy)]
struct GrantNote {
    generation: GenerationId,
    fresh_image: bool,
}

struct StreamEnd {
    consumer: Consumer,
    /// Everything up to here is known to be published.
    ready_through: u64,
}

struct Numbering {
    state: SequenceState,
    /// The target granted `state.generation`; whether its images are fresh.
    granted: Option<bool>,
    reported_overflow: Option<u64>,
    reported_lost: bool,
    overflow_count: u64,
    last_overflow: Option<OverflowReason>,
    /// The store's failure that was reported.
    store_error: Option<String>,
}

impl Numbering {
    fn new(state: SequenceState) -> Self {
        Self {
            state,
            granted: None,
            reported_overflow: None,
            reported_lost: false,
            overflow_count: 0,
            last_overflow: None,
            store_error: None,
        }
    }

    fn store_failed(&mut self, error: &SequenceStoreError, actions: &mut Vec<SourceAction>) {
        let text = match std::error::Error::source(error) {
            Some(source) => format!("{error}: {source}"),
            None => error.to_string(),
        };
        if self.store_error.as_ref() != Some(&text) {
            actions.push(SourceAction::Alert(SourceAlert::Store(text.clone())));
            self.store_error = Some(text);
        }
    }
}

impl SequenceState {
    fn start(&self) -> GenerationStart {
        GenerationStart {
            generation: self.generation,
            ancestors: self.ancestors.clone(),
            first_seq: self.first_seq,
        }
    }
}
