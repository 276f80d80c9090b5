//! A simulated disk with a kernel on top: everything that happens is decided by a seed, and everything that may go wrong
//! does. Sectors that were written and not synced can be read, and at a power cut each may be there, or not.

mod file;
mod strike;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use nix::errno::Errno;

use self::file::{Dirty, Fate, SECTOR_BYTES, SimFile, pages, put};
pub use self::strike::{OpKind, Strike};
use super::{Completion, FileId, Op, Purpose, Storage, StorageError};

/// What the simulation did to an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Fault {
    /// The process died while the operation was under way.
    Kill,
    /// The power went while it was under way.
    PowerCut,
    /// A write that was not synced was there in part after a power cut.
    TornWrite,
    /// A write that was not synced was gone after a power cut.
    LostWrite,
    /// A write that was not synced was there after a power cut.
    KeptWrite,
    /// A write of a dead process landed later.
    LateLanding,
    /// The operation failed with `EIO`.
    Error,
    /// The operation failed for lack of space.
    NoSpace,
    /// A sync failed: what it should have made durable can be read, but no later sync makes it so.
    FailedSync,
}

/// How a process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crash {
    /// `kill -9`: what was written can be read, what was under way may still land.
    Kill,
    /// Power cut: of what was not synced anything may be missing.
    PowerCut,
}

/// A small generator of random numbers (SplitMix64).
#[derive(Clone, Debug)]
pub struct SimRng(u64);

impl SimRng {
    /// From a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next_u64() % bound
    }

    /// True once in `times`.
    pub fn one_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }
}

/// The hardware and the kernel: outlives processes.
#[derive(Clone, Debug)]
pub struct SimDisk {
    inner: Arc<Mutex<Inner>>,
}

/// A process's way to the files of a [`SimDisk`].
#[derive(Debug)]
pub struct SimStorage {
    inner: Arc<Mutex<Inner>>,
    process: u64,
    handle: u64,
}

#[derive(Debug)]
struct Inner {
    rng: SimRng,
    files: Vec<SimFile>,
    process: u64,
    in_flight: Vec<InFlight>,
    /// Operations of dead processes that may still land.
    orphans: Vec<InFlight>,
    crash: Option<(u64, Crash, ArmedAt)>,
    /// A death or a failure at an exact operation, and the seed of what becomes of what is not durable then.
    strike: Option<(u64, Strike, u64)>,
    /// Which operations were run, if somebody wants to know.
    run_ops: Option<Vec<OpKind>>,
    errors: Vec<(u64, ArmedAt)>,
    capacity_bytes: u64,
    next_write: u64,
    next_handle: u64,
    coverage: BTreeMap<(Fault, OpKind), u64>,
}

/// Which operations something was armed for.
#[derive(Clone, Copy, Debug)]
enum ArmedAt {
    Any,
    Purpose(Purpose),
    Verb(&'static str),
    Kinds(&'static [OpKind]),
}

impl ArmedAt {
    fn is_met_by(self, kind: OpKind) -> bool {
        match self {
            Self::Any => true,
            Self::Purpose(purpose) => purpose == kind.0,
            Self::Verb(verb) => verb == kind.1,
            Self::Kinds(kinds) => kinds.contains(&kind),
        }
    }
}

#[derive(Debug)]
struct InFlight {
    handle: u64,
    token: u64,
    file: FileId,
    purpose: Purpose,
    op: Op,
    /// Writes up to this one had completed when it was submitted: those a sync makes durable.
    after_write: u64,
}

impl InFlight {
    fn kind(&self) -> OpKind {
        (self.purpose, self.op.verb())
    }
}

impl SimDisk {
    /// An empty disk.
    pub fn new(seed: u64) -> Self {
        let inner = Inner {
            rng: SimRng::new(seed ^ 0x5d15_c0de),
            files: Vec::new(),
            process: 1,
            in_flight: Vec::new(),
            orphans: Vec::new(),
            crash: None,
            strike: None,
            run_ops: None,
            errors: Vec::new(),
            capacity_bytes: u64::MAX,
            next_write: 1,
            next_handle: 1,
            coverage: BTreeMap::new(),
        };
        Self { inner: Arc::new(Mutex::new(inner)) }
    }

    /// A new empty file.
    pub fn add_file(&self) -> FileId {
        let mut inner = self.lock();
        inner.files.push(SimFile::default());
        FileId(inner.files.len() as u32 - 1)
    }

    /// A storage of the living process, which may have several. Handles of dead processes fail.
    pub fn storage(&self) -> SimStorage {
        let mut inner = self.lock();
        let (process, handle) = (inner.process, inner.next_handle);
        inner.next_handle += 1;
        SimStorage { inner: Arc::clone(&self.inner), process, handle }
    }

    /// Lets the process die when it has run this many more operations.
    pub fn arm_crash(&self, after_ops: u64, crash: Crash) {
        self.lock().crash = Some((after_ops, crash, ArmedAt::Any));
    }

    /// Lets the process die when it has run this many more operations of a purpose.
    pub fn arm_crash_at(&self, purpose: Purpose, after_ops: u64, crash: Crash) {
        self.lock().crash = Some((after_ops, crash, ArmedAt::Purpose(purpose)));
    }

    /// Lets the process die when it has run this many more operations of these kinds.
    pub fn arm_crash_at_kinds(&self, kinds: &'static [OpKind], after_ops: u64, crash: Crash) {
        self.lock().crash = Some((after_ops, crash, ArmedAt::Kinds(kinds)));
    }

    /// Lets an operation fail: the one after this many more of its verb.
    pub fn arm_error(&self, after_ops: u64, verb: &'static str) {
        self.lock().errors.push((after_ops, ArmedAt::Verb(verb)));
    }

    /// Lets an operation fail: the one after this many more of these kinds.
    pub fn arm_error_at(&self, kinds: &'static [OpKind], after_ops: u64) {
        self.lock().errors.push((after_ops, ArmedAt::Kinds(kinds)));
    }

    /// Takes all armed faults back.
    pub fn disarm(&self) {
        let mut inner = self.lock();
        (inner.crash, inner.strike) = (None, None);
        inner.errors.clear();
    }

    /// How many bytes all files together may have.
    pub fn set_capacity_bytes(&self, capacity_bytes: u64) {
        self.lock().capacity_bytes = capacity_bytes;
    }

    /// Lets the process die now.
    pub fn crash(&self, crash: Crash) {
        self.lock().die(crash, None);
    }

    /// Whether the process of this handle is dead.
    pub fn is_dead(&self, storage: &SimStorage) -> bool {
        self.lock().process != storage.process
    }

    /// One write of a dead process lands, or is found to have been dropped; false if none is left.
    pub fn land_one(&self) -> bool {
        self.lock().land_one()
    }

    /// What taking the lock on the open file waits for: no I/O of a dead process is under way any more (A4).
    pub fn fence(&self) {
        let mut inner = self.lock();
        while inner.land_one() {}
    }

    /// Flips one bit that was written once; says in which byte.
    pub fn flip_bit(&self, file: FileId, within: std::ops::Range<u64>) -> Option<u64> {
        let mut inner = self.lock();
        let span = within.end.min(inner.files[file.0 as usize].len_bytes).checked_sub(within.start)?;
        let at = within.start + inner.rng.below(span.max(1));
        let bit = 1 << inner.rng.below(8);
        let sim_file = &mut inner.files[file.0 as usize];
        sim_file.flip(at, bit).then_some(at)
    }

    /// A range of a file can't be read any more, page by page, until it is written.
    pub fn break_pages(&self, file: FileId, range: std::ops::Range<u64>) {
        let mut inner = self.lock();
        inner.files[file.0 as usize].broken.extend(pages(range.start, range.end - range.start));
    }

    /// How much space all files take together, in bytes.
    pub fn used_bytes(&self) -> u64 {
        self.lock().files.iter().map(SimFile::used_bytes).sum()
    }

    /// What can be read of a file now.
    pub fn contents(&self, file: FileId) -> Vec<u8> {
        let inner = self.lock();
        let sim_file = &inner.files[file.0 as usize];
        let mut bytes = vec![0; sim_file.len_bytes as usize];
        sim_file.read(0, &mut bytes);
        bytes
    }

    /// Which fault met an operation of which kind, how often.
    pub fn coverage(&self) -> BTreeMap<(Fault, OpKind), u64> {
        self.lock().coverage.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no operation of the simulation panics half-way")
    }
}

impl Storage for SimStorage {
    fn submit(&mut self, file: FileId, token: u64, purpose: Purpose, op: Op) {
        let mut inner = self.inner.lock().expect("as for SimDisk");
        if inner.process == self.process {
            let after_write = inner.next_write;
            inner.in_flight.push(InFlight { handle: self.handle, token, file, purpose, op, after_write });
        }
    }

    /// Runs one of the operations under way, any one.
    fn collect(&mut self, _wait: bool, done: &mut Vec<Completion>) -> Result<(), Errno> {
        let mut inner = self.inner.lock().expect("as for SimDisk");
        if inner.process != self.process {
            return Err(Errno::EOWNERDEAD);
        }
        let own: Vec<usize> = (0..inner.in_flight.len())
            .filter(|index| inner.in_flight[*index].handle == self.handle)
            .collect();
        if own.is_empty() {
            return Ok(());
        }
        let index = own[inner.rng.below(own.len() as u64) as usize];
        let kind = inner.in_flight[index].kind();
        if let Some((ops_left, crash, at)) = inner.crash.as_mut()
            && at.is_met_by(kind)
        {
            if *ops_left == 0 {
                let crash = *crash;
                inner.die(crash, Some(index));
                return Err(Errno::EOWNERDEAD);
            }
            *ops_left -= 1;
        }
        if let Some((ops_left, strike, seed)) = inner.strike.as_mut() {
            if *ops_left == 0 {
                let (strike, seed) = (*strike, *seed);
                if let Some(completion) = inner.strike(index, strike, seed) {
                    done.push(completion);
                    return Ok(());
                }
                return Err(Errno::EOWNERDEAD);
            }
            *ops_left -= 1;
        }
        let flight = inner.in_flight.swap_remove(index);
        inner.note_run(&flight);
        done.push(inner.run(flight));
        Ok(())
    }

    fn file_len_bytes(&mut self, file: FileId) -> Result<u64, Errno> {
        let inner = self.inner.lock().expect("as for SimDisk");
        if inner.process != self.process {
            return Err(Errno::EOWNERDEAD);
        }
        Ok(inner.files[file.0 as usize].len_bytes)
    }
}

impl Inner {
    fn cover(&mut self, fault: Fault, kind: OpKind) {
        *self.coverage.entry((fault, kind)).or_default() += 1;
    }

    /// The operation fails.
    fn fail(&mut self, flight: &InFlight) -> Completion {
        let InFlight { token, file, purpose, ref op, after_write, .. } = *flight;
        let (verb, offset_bytes) = (op.verb(), op.offset_bytes());
        match op {
            // A failed write may have reached the disk, whole or in part, or not.
            Op::Write { .. } if !self.rng.one_in(3) => self.write_part(file, flight.kind(), op),
            Op::Sync => {
                let dirty = self.files[file.0 as usize].dirty.values_mut();
                dirty.filter(|dirty| dirty.write < after_write).for_each(|dirty| dirty.forgotten = true);
            }
            _ => {}
        }
        self.cover(if verb == "fdatasync" { Fault::FailedSync } else { Fault::Error }, flight.kind());
        let errno = Errno::EIO;
        Completion { token, result: Err(StorageError { verb, purpose, offset_bytes, errno }) }
    }

    fn run(&mut self, flight: InFlight) -> Completion {
        let kind = flight.kind();
        if self.takes_error(kind) {
            return self.fail(&flight);
        }
        let InFlight { token, file, purpose, op, after_write, .. } = flight;
        let (verb, offset_bytes) = (op.verb(), op.offset_bytes());
        let error = |errno| Err(StorageError { verb, purpose, offset_bytes, errno });
        let result = match op {
            Op::Read { offset_bytes, mut buffer } => {
                let sim_file = &self.files[file.0 as usize];
                let len_bytes = buffer.len() as u64;
                if offset_bytes + len_bytes > sim_file.len_bytes
                    || sim_file.is_broken(offset_bytes, len_bytes)
                {
                    error(Errno::EIO)
                } else {
                    sim_file.read(offset_bytes, &mut buffer);
                    Ok(Some(buffer))
                }
            }
            Op::Write { offset_bytes, pieces } => {
                let bytes = gather(&pieces);
                if self.has_room(file, kind, offset_bytes, bytes.len() as u64) {
                    self.write(file, kind, offset_bytes, bytes, |_| true);
                    Ok(None)
                } else {
                    error(Errno::ENOSPC)
                }
            }
            Op::Sync => {
                self.files[file.0 as usize].sync(after_write);
                Ok(None)
            }
            Op::Allocate { offset_bytes, len_bytes } => {
                if self.has_room(file, kind, offset_bytes, len_bytes) {
                    let sim_file = &mut self.files[file.0 as usize];
                    sim_file.len_bytes = sim_file.len_bytes.max(offset_bytes + len_bytes);
                    sim_file.reserve(offset_bytes, len_bytes);
                    Ok(None)
                } else {
                    error(Errno::ENOSPC)
                }
            }
            Op::Punch { offset_bytes, len_bytes } => {
                let zeroes = vec![0; len_bytes as usize].into();
                self.write(file, kind, offset_bytes, zeroes, |_| true);
                self.files[file.0 as usize].holes.extend(pages(offset_bytes, len_bytes));
                Ok(None)
            }
            Op::Truncate { len_bytes } => {
                self.files[file.0 as usize].truncate(len_bytes);
                Ok(None)
            }
        };
        Completion { token, result }
    }

    /// Whether the disk has the space that a range of a file lacks.
    fn has_room(&mut self, file: FileId, kind: OpKind, offset_bytes: u64, len_bytes: u64) -> bool {
        let lacking = self.files[file.0 as usize].lacking_bytes(offset_bytes, len_bytes);
        let used: u64 = self.files.iter().map(SimFile::used_bytes).sum();
        let has_room = lacking == 0 || used + lacking <= self.capacity_bytes;
        if !has_room {
            self.cover(Fault::NoSpace, kind);
        }
        has_room
    }

    /// Whether one of the armed errors is this operation's; for each of the others it is one less to wait for.
    fn takes_error(&mut self, kind: OpKind) -> bool {
        let met = |(after_ops, at): &(u64, ArmedAt)| at.is_met_by(kind) && *after_ops == 0;
        let due = self.errors.iter().position(met);
        for (after_ops, _) in self.errors.iter_mut().filter(|(_, at)| at.is_met_by(kind)) {
            *after_ops = after_ops.saturating_sub(1);
        }
        due.map(|index| self.errors.remove(index)).is_some()
    }

    fn write(
        &mut self,
        file: FileId,
        kind: OpKind,
        offset_bytes: u64,
        bytes: Bytes,
        mut keeps: impl FnMut(u64) -> bool,
    ) {
        let write = self.next_write;
        self.next_write += 1;
        let sim_file = &mut self.files[file.0 as usize];
        let len_bytes = bytes.len() as u64;
        sim_file.len_bytes = sim_file.len_bytes.max(offset_bytes + len_bytes);
        sim_file.reserve(offset_bytes, len_bytes);
        pages(offset_bytes, len_bytes).for_each(|page| _ = sim_file.broken.remove(&page));
        for index in 0..(bytes.len() / SECTOR_BYTES) as u64 {
            if !keeps(index) {
                continue;
            }
            let sector = offset_bytes / SECTOR_BYTES as u64 + index;
            let at = index as usize * SECTOR_BYTES;
            let data = bytes.slice(at..at + SECTOR_BYTES);
            let new = Dirty { data, write, kind, forgotten: false };
            if let Some(old) = sim_file.dirty.insert(sector, new)
                && self.rng.one_in(2)
            {
                // The older content may have reached the disk by itself.
                put(&mut sim_file.durable, sector, &old.data);
            }
        }
    }

    /// Part of a write, as a failing disk or a dying process leaves it.
    fn write_part(&mut self, file: FileId, kind: OpKind, op: &Op) {
        let Op::Write { offset_bytes, pieces } = op else { return };
        let bytes = gather(pieces);
        let sectors = (bytes.len() / SECTOR_BYTES) as u64;
        let keep = self.rng.below(sectors + 1);
        self.write(file, kind, *offset_bytes, bytes, |sector| sector < keep);
    }

    fn die(&mut self, crash: Crash, struck: Option<usize>) {
        self.process += 1;
        self.crash = None;
        self.errors.clear();
        let fault = if crash == Crash::Kill { Fault::Kill } else { Fault::PowerCut };
        if let Some(index) = struck {
            self.cover(fault, self.in_flight[index].kind());
        }
        self.orphans.append(&mut self.in_flight);
        if crash == Crash::Kill {
            return;
        }
        // What was under way may have reached the disk in part.
        while let Some(flight) = self.orphans.pop() {
            if self.rng.one_in(2) {
                self.write_part(flight.file, flight.kind(), &flight.op);
            }
        }
        for index in 0..self.files.len() {
            self.cut_power(index);
        }
    }

    fn cut_power(&mut self, index: usize) {
        let dirty = std::mem::take(&mut self.files[index].dirty);
        let mut fates: BTreeMap<u64, Fate> = BTreeMap::new();
        for (sector, dirty) in dirty {
            let rng = &mut self.rng;
            let fate = *fates.entry(dirty.write).or_insert_with(|| {
                let fate = match rng.below(5) {
                    0 | 1 => Fate { fault: Fault::LostWrite, granule: 1, salt: 0 },
                    2 => Fate { fault: Fault::KeptWrite, granule: 1, salt: 0 },
                    3 => Fate { fault: Fault::TornWrite, granule: 1, salt: rng.next_u64() },
                    _ => Fate { fault: Fault::TornWrite, granule: 8, salt: rng.next_u64() },
                };
                *self.coverage.entry((fate.fault, dirty.kind)).or_default() += 1;
                fate
            });
            if fate.keeps(sector) {
                put(&mut self.files[index].durable, sector, &dirty.data);
            } else {
                self.files[index].undo(sector);
            }
        }
    }

    fn land_one(&mut self) -> bool {
        if self.orphans.is_empty() {
            return false;
        }
        let count = self.orphans.len() as u64;
        let index = self.rng.below(count) as usize;
        let flight = self.orphans.swap_remove(index);
        match &flight.op {
            Op::Write { offset_bytes, pieces } if self.rng.one_in(2) => {
                self.cover(Fault::LateLanding, flight.kind());
                let bytes = gather(pieces);
                self.write(flight.file, flight.kind(), *offset_bytes, bytes, |_| true);
            }
            Op::Write { .. } if self.rng.one_in(3) => {
                self.cover(Fault::LateLanding, flight.kind());
                self.write_part(flight.file, flight.kind(), &flight.op);
            }
            _ => {}
        }
        true
    }
}

/// A copy: whoever reads it later must not keep the writer's memory.
fn gather(pieces: &[Bytes]) -> Bytes {
    pieces.concat().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::Blocking;

    #[test]
    fn what_was_synced_stays_and_what_a_failed_sync_forgot_may_go() {
        let (mut lost_after_failed_sync, mut lost_unsynced) = (false, false);
        for seed in 0..40 {
            let disk = SimDisk::new(seed);
            let file = disk.add_file();
            let mut storage = disk.storage();
            let mut io = Blocking::new(&mut storage, file, Purpose::Append);
            io.write(0, vec![1; 4096]).expect("written");
            io.sync().expect("synced");
            io.write(4096, vec![2; 4096]).expect("written");
            disk.arm_error(0, "fdatasync");
            io.sync().expect_err("armed");
            io.sync().expect("synced, it says");
            assert_eq!(&io.read(4096, 4096).expect("readable")[..], [2; 4096]);
            io.write(8192, vec![3; 4096]).expect("written");
            disk.crash(Crash::PowerCut);
            io.read(0, 512).expect_err("dead");
            let bytes = disk.contents(file);
            assert_eq!(bytes[..4096], [1; 4096]);
            lost_after_failed_sync |= bytes[4096..8192] != [2; 4096];
            lost_unsynced |= bytes[8192..12288] != [3; 4096];
        }
        assert!(lost_after_failed_sync && lost_unsynced);
    }
}
