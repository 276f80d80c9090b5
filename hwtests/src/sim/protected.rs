//! A source that is the product's own from the guest's request on: lanes, numbering, retained ring, full syncs, sender. Its
//! process may die; the guest, its disks and the saved numbers don't die with it.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use journal::batch::{Checkpoint, Record, RecordKind};
use ublk::arena::{Arena, Slot};
use ublk::serve::{Disk, FileOp, Geometry, IoBuffer, Lane, Op, Request, ZeroLimits};
use uuid::Uuid;
use vra::api::GenerationId;
use vra::capture::modes::{Mode, OverflowReason};
use vra::capture::payload::{DENSE_CHUNK_BYTES, Piece};
use vra::capture::{CaptureLimits, ProtectedDisk, RetainedEntries, SourceAction, SourceAlert, SourceVm};
use vra::checkpoint::{Freeze, Member};
use vra::ship::{Retained, SenderEvent, StopReason, StreamIdentity};
use vra::sync::{CHUNK_BYTES, Extent, FullSync, SyncLimits, SyncStep};

use super::coverage::Happening;
use super::door::{Bell, Door, Store};
use super::env::Env;
use super::guest::{Asked, Guest, has_buffer};
use super::ledger::{Image, Ledger, Promise};
use super::shipper::Shipper;
use super::streams::{Answer, StreamKey, Streams};
use super::vm::DISK_BYTES;

/// Queues of each disk.
const LANES_PER_DISK: usize = 2;
/// One in so many of the local disks' operations fails.
const LOCAL_ERROR_ONE_IN: u64 = 700;
/// Steps within which local disks, wake-ups and deadlines answer a guest, whatever replication does.
const PATIENCE: usize = 4_000;

pub(super) struct Protected {
    identity: StreamIdentity,
    limits: CaptureLimits,
    most_records: usize,
    /// The guest asks once in so many chances.
    pace: u64,
    wall_us: Arc<AtomicU64>,
    store: Arc<Store>,
    pub(super) guest: Guest,
    process: Option<Process>,
    /// The cut that the VM is held at, with the epoch's count, and its disks there.
    held: Option<(u64, u64, Image)>,
    last_time_us: u64,
}

struct Process {
    lanes: Vec<Box<dyn Lane>>,
    bells: Vec<Arc<Bell>>,
    door: Door,
    vm: Arc<SourceVm>,
    retained: RetainedEntries,
    shipper: Shipper,
    sync: Option<FullSync>,
    /// A read of the sync that was made and not yet handed over.
    sync_answer: Option<SyncAnswer>,
    sync_buffers: Arena,
    sync_buffer: Option<Slot>,
    /// The next number that is to be published.
    next_seq: u64,
}

enum SyncAnswer {
    Probed(Extent),
    Read(Option<Piece>),
    Failed,
}

impl Protected {
    pub(super) fn new(identity: StreamIdentity, volume_bytes: &[usize], env: &mut Env) -> Self {
        let limits = CaptureLimits {
            ring_entries: 64 << env.rng.below(3),
            writes_in_flight: 8,
            retained_bytes: (96 << 10) << env.rng.below(3),
            dense_bytes: 512 << 10,
            sync: SyncLimits { fill_percent_max: 50, bytes_per_second: u64::MAX, pause_us: 1, retry_us: 20 },
        };
        let most_records = if env.rng.one_in(4) { 1 } else { 12 };
        Self {
            identity,
            limits,
            most_records,
            pace: 1 << env.rng.below(4),
            wall_us: Arc::new(AtomicU64::new(env.now().wall_us)),
            store: Arc::default(),
            guest: Guest::new(volume_bytes),
            process: None,
            held: None,
            last_time_us: 0,
        }
    }

    pub(super) fn is_up(&self) -> bool {
        self.process.is_some()
    }

    pub(super) fn shipper(&self) -> Option<&Shipper> {
        self.process.as_ref().map(|process| &process.shipper)
    }

    /// As a member of its group.
    pub(super) fn member(&self) -> Option<Member> {
        let process = self.process.as_ref()?;
        let core = Arc::clone(process.vm.core());
        Some(Member { vm: self.identity.vm, core, freeze: Freeze::default() })
    }

    /// Starts the process: a new generation over the disks as they are. What the guest was not answered is asked again.
    pub(super) fn start(&mut self, env: &mut Env) -> Result<(), String> {
        self.store.failing.store(false, Ordering::Relaxed);
        let disks = self.guest.disks.iter().map(|disk| self.open_disk(disk.bytes().len() as u64));
        let disks = disks.collect::<Result<Vec<Arc<ProtectedDisk>>, String>>()?;
        let count = disks.len() * LANES_PER_DISK;
        let bells: Vec<Arc<Bell>> = (0..count).map(|_| Arc::default()).collect();
        let lanes = (0..count).map(|lane| disks[lane / LANES_PER_DISK].clone().lane(bells[lane].clone()));
        let lanes = lanes.collect();
        let generation = GenerationId(Uuid::from_u128(random(env)));
        let dense = memory(DENSE_CHUNK_BYTES, (self.limits.dense_bytes / DENSE_CHUNK_BYTES as u64) as u32)?;
        let vm = SourceVm::protect_with(dense, disks, self.limits, self.store.clone(), generation)
            .map_err(|error| format!("can't protect: {error}"))?;
        let vm = Arc::new(vm);
        let start = vm.generation();
        env.note(|| format!("the source starts: {start:?}"));
        let next_seq = start.first_seq;
        let sync_buffers = memory(CHUNK_BYTES as usize, 4)?;
        self.process = Some(Process {
            lanes,
            bells,
            door: Door::new()?,
            retained: RetainedEntries(vm.clone()),
            vm,
            shipper: Shipper::new(self.identity.clone(), start, self.most_records, env),
            sync: None,
            sync_answer: None,
            sync_buffers,
            sync_buffer: None,
            next_seq,
        });
        for (id, asked) in self.guest.waiting() {
            env.happened(Happening::Reissued);
            self.request(id, &asked, env)?;
        }
        Ok(())
    }

    /// Its memory is the simulation's own, so the file behind it is none.
    fn open_disk(&self, size_bytes: u64) -> Result<Arc<ProtectedDisk>, String> {
        let zeroes = ZeroLimits { granularity_bytes: 512, max_bytes: size_bytes as u32 };
        let geometry = Geometry {
            size_bytes,
            logical_block_bytes: 512,
            physical_block_bytes: 4096,
            volatile_cache: true,
            fua: true,
            read_only: false,
            discard: Some(zeroes),
            write_zeroes: Some(zeroes),
        };
        let file = File::open("/dev/null").map_err(|error| format!("/dev/null: {error}"))?;
        let wall_us = Arc::clone(&self.wall_us);
        Ok(Arc::new(ProtectedDisk::new(file, geometry, Arc::new(move || wall_us.load(Ordering::Relaxed)))))
    }

    /// The process dies, and with its host sometimes the guest. Of what was under way at the local disks some lands.
    pub(super) fn die(&mut self, guest_dies: bool, streams: &mut Streams, env: &mut Env) {
        let Some(mut process) = self.process.take() else { return };
        let link_place = self.guest.link_place();
        for (lane, mut io) in process.door.queue.drain(..) {
            let volume = (lane / LANES_PER_DISK) as u16;
            // A link that was seen by a read must not be lost, or the chain would not be one even at the source.
            let is_link = volume == 0 && io.offset_bytes >= link_place.start;
            if is_link || env.rng.one_in(2) {
                self.guest.perform(volume, &mut io, false, env);
            }
        }
        process.shipper.die(streams, env);
        self.guest.process_died(guest_dies);
        self.held = None;
    }

    /// Something happens at the source.
    pub(super) fn step(&mut self, ledger: &mut Ledger, env: &mut Env) -> Result<(), String> {
        self.wall_us.store(env.now().wall_us, Ordering::Relaxed);
        for _ in 0..1 + env.rng.below(5) {
            match env.rng.below(20) {
                0..3 => {
                    if self.process.is_some()
                        && env.rng.one_in(self.pace)
                        && let Some((id, asked)) = self.guest.ask(env)
                    {
                        self.request(id, &asked, env)?;
                    }
                }
                3..9 => self.local_io(LOCAL_ERROR_ONE_IN, env)?,
                9..12 => self.wake_lanes(env)?,
                12 => self.tick(env)?,
                _ => self.sync_step(env),
            }
            self.tap(ledger, env)?;
        }
        if env.rng.one_in(40) {
            self.store.failing.store(env.rng.one_in(20), Ordering::Relaxed);
        }
        Ok(())
    }

    /// Asks for a link of the chain, or for a read that may show it.
    pub(super) fn ask_link(
        &mut self,
        op: Op,
        link: u64,
        ledger: &mut Ledger,
        env: &mut Env,
    ) -> Result<(), String> {
        if self.process.is_none() {
            return Ok(());
        }
        let (id, asked) = self.guest.ask_link(op, link);
        self.request(id, &asked, env)?;
        self.tap(ledger, env)
    }

    fn request(&mut self, id: u64, asked: &Asked, env: &mut Env) -> Result<(), String> {
        let Some(process) = &mut self.process else { return Ok(()) };
        let slot = if has_buffer(asked.op) {
            let Some(mut slot) = process.door.free.pop() else {
                return Err("a buffer of the doors did not come back".into());
            };
            slot[..asked.data.len()].copy_from_slice(&asked.data);
            Some(slot)
        } else {
            None
        };
        let lane = usize::from(asked.volume) * LANES_PER_DISK + env.any_index(LANES_PER_DISK);
        let request = Request {
            tag: id,
            op: asked.op,
            offset_bytes: asked.range.start,
            len_bytes: asked.range.len_bytes(),
            fua: env.rng.one_in(8),
            slot,
        };
        process.door.lane = lane;
        process.lanes[lane].request(request, &mut process.door);
        self.answers()
    }

    /// One operation of the local disks ends, any one.
    fn local_io(&mut self, error_one_in: u64, env: &mut Env) -> Result<(), String> {
        let Some(process) = &mut self.process else { return Ok(()) };
        if process.door.queue.is_empty() {
            return Ok(());
        }
        let at = env.any_index(process.door.queue.len());
        let (lane, mut io) = process.door.queue.swap_remove(at);
        let fails = error_one_in > 0 && env.rng.one_in(error_one_in);
        let is_write = !matches!(io.op, FileOp::Read | FileOp::Sync);
        let done = self.guest.perform((lane / LANES_PER_DISK) as u16, &mut io, fails, env);
        if !done && is_write {
            env.happened(Happening::LocalWriteFailed);
        }
        let result = if done { Ok(()) } else { Err(ublk::serve::Errno(libc::EIO)) };
        process.door.lane = lane;
        let buffer = std::mem::replace(&mut io.buffer, IoBuffer::None);
        process.lanes[lane].file_done(io.token, result, buffer, &mut process.door);
        self.answers()
    }

    fn wake_lanes(&mut self, _env: &mut Env) -> Result<(), String> {
        let Some(process) = &mut self.process else { return Ok(()) };
        for (lane, bell) in process.bells.iter().enumerate() {
            if bell.take() {
                process.door.lane = lane;
                process.lanes[lane].wake(&mut process.door);
            }
        }
        self.answers()
    }

    fn answers(&mut self) -> Result<(), String> {
        let Some(process) = &mut self.process else { return Ok(()) };
        for completion in std::mem::take(&mut process.door.answers) {
            self.guest.answered(&completion)?;
            process.door.free.extend(completion.slot);
        }
        Ok(())
    }

    fn tick(&mut self, env: &mut Env) -> Result<(), String> {
        let Some(process) = &mut self.process else { return Ok(()) };
        let now = env.now();
        for action in process.vm.tick(now, &mut || random(env)) {
            match action {
                SourceAction::BeginGeneration(start) => {
                    process.next_seq = start.first_seq;
                    env.note(|| format!("the source begins: {start:?}"));
                    process.retained = RetainedEntries(process.vm.clone());
                    process.shipper.begin_generation(start, env);
                    env.happened(Happening::GenerationAfterOverflow);
                }
                SourceAction::BeginSync(sync) => (process.sync, process.sync_answer) = (Some(sync), None),
                SourceAction::Alert(SourceAlert::Overflow { reason, .. }) => {
                    env.happened(match reason {
                        OverflowReason::RingFull => Happening::OverflowRing,
                        OverflowReason::MemoryFull => Happening::OverflowMemory,
                        OverflowReason::LocalWriteError => Happening::OverflowLocalError,
                        OverflowReason::Requested => Happening::OverflowRequested,
                        OverflowReason::NumbersExhausted => return Err("numbers ran out".into()),
                    });
                }
                SourceAction::Alert(SourceAlert::Lost) => return Err("the core is lost".into()),
                SourceAction::Alert(SourceAlert::Store(_)) => env.happened(Happening::NumbersNotSaved),
                SourceAction::Alert(SourceAlert::FullSync) => {}
                SourceAction::Bring(_) | SourceAction::Grown { .. } => {
                    return Err("no disk was to grow".into());
                }
            }
        }
        Ok(())
    }

    fn sync_step(&mut self, env: &mut Env) {
        let Some(process) = &mut self.process else { return };
        let Some(mut sync) = process.sync.take() else { return };
        let (core, now) = (process.vm.core(), env.now());
        match process.sync_answer.take() {
            Some(SyncAnswer::Probed(extent)) => sync.probed(core, extent, now),
            Some(SyncAnswer::Read(data)) => sync.read(core, data, now),
            Some(SyncAnswer::Failed) => sync.read_failed(core, now),
            None => {
                process.sync_buffer = process.sync_buffer.take().or_else(|| process.sync_buffers.take());
                match sync.next(core, now, process.sync_buffer.is_some()) {
                    SyncStep::Probe { volume, range } => {
                        let extent = self.guest.disks[usize::from(volume)].probe(range);
                        process.sync_answer = Some(SyncAnswer::Probed(extent));
                    }
                    SyncStep::Read { volume, range } => {
                        let bytes = &self.guest.disks[usize::from(volume)].bytes()
                            [range.start as usize..range.end as usize];
                        process.sync_answer = Some(if env.rng.one_in(60) {
                            SyncAnswer::Failed
                        } else if bytes.iter().all(|byte| *byte == 0) {
                            SyncAnswer::Read(None)
                        } else {
                            SyncAnswer::Read(process.sync_buffer.take().map(|mut slot| {
                                slot[..bytes.len()].copy_from_slice(bytes);
                                Piece::of_slot(slot.share(), bytes.len())
                            }))
                        });
                    }
                    SyncStep::Wait { .. } => {}
                    SyncStep::Done => return env.happened(Happening::SyncPublished),
                    SyncStep::Aborted => return env.happened(Happening::SyncAborted),
                }
                let counts = sync.counts();
                if counts.ranges_held > 0 {
                    env.happened(Happening::SyncRangeHeld);
                }
                if counts.reads_repeated > 0 {
                    env.happened(Happening::SyncReadRepeated);
                }
            }
        }
        process.sync = Some(sync);
    }

    pub(super) fn drive(
        &mut self,
        streams: &mut Streams,
        ledger: &mut Ledger,
        env: &mut Env,
    ) -> Result<(), String> {
        let Some(process) = &mut self.process else { return Ok(()) };
        for event in process.shipper.drive(&mut process.retained, streams, ledger, env)? {
            match event {
                SenderEvent::Granted { generation, fresh_image, .. } => {
                    process.vm.granted(generation, fresh_image);
                    if fresh_image {
                        env.happened(Happening::FreshImage);
                    }
                }
                SenderEvent::Stopped(reason @ StopReason::Refused(_)) => {
                    return Err(format!("the only source was stopped: {reason}"));
                }
                SenderEvent::Stopped(reason) => return Err(format!("the sender stopped: {reason}")),
                SenderEvent::Disconnected { .. } | SenderEvent::Refused(_) => {}
            }
        }
        Ok(())
    }

    pub(super) fn answer_dial(&mut self, reachable: bool, streams: &mut Streams, env: &Env) {
        if let Some(process) = &mut self.process {
            process.shipper.answer_dial(reachable, streams, env);
        }
    }

    pub(super) fn take(&mut self, key: StreamKey, answers: Vec<Answer>, env: &Env) {
        if let Some(process) = &mut self.process {
            process.shipper.take(key, answers, &process.retained, env);
        }
    }

    /// Somebody asks for a new full sync: what is retained is given up.
    pub(super) fn renew(&mut self) {
        if let Some(process) = &self.process {
            process.vm.renew();
        }
    }

    /// The VM was just held.
    pub(super) fn note_held(&mut self, counter: u64, cut: u64) {
        self.held = Some((counter, cut, self.guest.truth().clone()));
    }

    /// Learns what was published since the last time.
    pub(super) fn tap(&mut self, ledger: &mut Ledger, env: &mut Env) -> Result<(), String> {
        let Some(process) = &mut self.process else { return Ok(()) };
        let mut records = Vec::new();
        process.retained.take_ready(process.next_seq, usize::MAX, usize::MAX, &mut records);
        for record in records {
            if record.seq != process.next_seq {
                return Err(format!("record {} follows {}", record.seq, process.next_seq - 1));
            }
            process.next_seq += 1;
            if record.time_us < self.last_time_us && record.seq != process.vm.generation().first_seq {
                return Err(format!("the stamp of record {} is earlier than the last", record.seq));
            }
            self.last_time_us = record.time_us;
            match record.kind {
                RecordKind::Write => self.guest.numbered(&record)?,
                RecordKind::Zeroes if record.sync_id == 0 => self.guest.numbered(&record)?,
                RecordKind::Checkpoint => {
                    let (held, checkpoint) = (self.held.take(), Checkpoint::decode(&record.payload));
                    let checkpoint = checkpoint.map_err(|error| format!("a bad checkpoint: {error}"))?;
                    let of = (checkpoint.epoch.counter, checkpoint.cut);
                    let Some((_, _, image)) = held.filter(|(counter, cut, _)| (*counter, *cut) == of) else {
                        return Err(format!("a checkpoint at {} of another hold", checkpoint.cut));
                    };
                    ledger.promised(Promise { checkpoint, seq: record.seq, image, counts: true });
                    env.happened(Happening::CheckpointTaken);
                }
                RecordKind::SyncBegin | RecordKind::SyncData | RecordKind::SyncEnd | RecordKind::Zeroes => {}
                // The sizes with which a generation begins.
                RecordKind::Resize if record.len_bytes == DISK_BYTES[usize::from(record.volume)] as u64 => {}
                kind => return Err(format!("record {} is a {kind:?}", record.seq)),
            }
            // A copy: a handle would keep the memory that capture goes by.
            let payload = Bytes::copy_from_slice(&record.payload);
            ledger.published(Record { payload, ..record });
        }
        Ok(())
    }

    /// Whatever the target and the network do, each request of the guest is answered: by the local disks, wake-ups, the sync's own
    /// reads and the holds' deadlines, which `expire` sees to.
    pub(super) fn settle(
        &mut self,
        ledger: &mut Ledger,
        env: &mut Env,
        expire: &mut dyn FnMut(&Env),
    ) -> Result<(), String> {
        for _ in 0..PATIENCE {
            if self.process.is_none() || !self.guest.is_waiting() {
                break;
            }
            env.pass(20);
            expire(env);
            self.local_io(0, env)?;
            self.wake_lanes(env)?;
            self.sync_step(env);
            self.tap(ledger, env)?;
        }
        if self.process.is_some() {
            if self.guest.is_waiting() {
                return Err(format!("a guest waits for ever: {:?}", self.guest.waiting().first()));
            }
            self.guest.check_settled()?;
            env.happened(Happening::GuestSettled);
        }
        Ok(())
    }

    pub(super) fn is_overflowed(&self) -> bool {
        self.process.as_ref().is_some_and(|process| {
            matches!(process.vm.core().with(|core, _| core.mode()), Mode::Overflow { .. })
        })
    }

    pub(super) fn is_held(&self) -> bool {
        self.process.as_ref().is_some_and(|process| process.vm.core().is_holding())
    }
}

/// Arenas come and go with each process, and most of their memory is never used.
fn memory(slot_len_bytes: usize, slot_count: u32) -> Result<Arena, String> {
    Arena::faulted_in_later(slot_len_bytes, slot_count).map_err(|error| format!("no memory: {error}"))
}

fn random(env: &mut Env) -> u128 {
    u128::from(env.rng.next_u64()) << 64 | u128::from(env.rng.next_u64())
}
