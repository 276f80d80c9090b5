//! One thread's way into a view.

mod durable;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use journal::format::{PAGE_BYTES, SUPERBLOCK_OFFSETS, Superblock, SuperblockError};
use journal::view::ViewError;
use ublk::arena::{Arena, Slot, SlotRef};
use ublk::serve::{Completion, Errno, FileIo, FileOp, IoBuffer, Lane, Op, Port, Request, Waker};

use self::durable::{COMMIT_JOB, Undurable};
use super::history::History;
use super::plan::{Fetch, JOURNAL_FILE, Plan, SCRATCH_FILE, plan};
use super::preserve::Reading;
use super::scratch::commit::Commit;
use super::scratch::gate::Pass;
use super::scratch::map::Place;
use super::{Scratch, Shown, ViewDisk};

/// A lane of a [`ViewDisk`].
pub(super) struct ViewLane {
    disk: Arc<ViewDisk>,
    waker: Waker,
    /// Where fetches go; without it the lane can only read what needs none.
    arena: Option<Arena>,
    jobs: Jobs,
    /// Fetches that wait for a slot: job and number.
    fetches: VecDeque<(u32, u32)>,
    /// Changes that wait for an overlapping one.
    blocked: Vec<(Pass, Request)>,
    /// Reads that wait for the word that the history is still there.
    unconfirmed: Vec<u32>,
    check: Option<Check>,
    /// Answers that wait until the scratch is durable.
    undurable: Vec<Undurable>,
    /// The commit of the scratch that this lane carries out.
    commit: Option<Commit>,
}

/// A look at the superblocks, for reads that ended before it began.
struct Check {
    jobs: Vec<u32>,
    /// What each copy said, as far as read.
    copies: [Result<Superblock, SuperblockError>; 2],
}

enum Job {
    Read(Box<ReadJob>),
    Write(WriteJob),
}

struct ReadJob {
    tag: u64,
    offset_bytes: u64,
    len_bytes: u64,
    /// Absent while the recovery disk is read into it.
    slot: Option<Slot>,
    plan: Plan,
    /// What it was planned by.
    shown: Arc<Shown>,
    /// How far promotion had come when it was planned.
    promoted_seq: u64,
    /// Until it ends, nothing is promoted that it was planned without.
    _reading: Reading,
    /// Fetched before the recovery disk's data was there.
    early: Vec<(u32, Slot)>,
    /// Transfers and waiting fetches.
    out: u32,
    error: Option<Errno>,
    /// What was found damaged: logged only if the history is still there, else it was overwritten rightly.
    damage: Option<ViewError>,
}

struct WriteJob {
    tag: u64,
    offset_bytes: u64,
    len_bytes: u64,
    pass: Pass,
    /// Held beside the transfers' own handles, to become the request's slot again.
    slot: SlotRef,
    fua: bool,
    /// The write is durable with its data.
    dsync: bool,
    out: u32,
    error: Option<Errno>,
}

/// Parts of a token: job above, part below.
const PART_DIRECT: u32 = u32::MAX;
/// The job part of a token of [`Check`], whose part is the copy's number.
const CHECK_JOB: u32 = u32::MAX;
const EIO: Errno = Errno(libc::EIO);

impl ViewLane {
    pub(super) fn new(disk: Arc<ViewDisk>, waker: Waker, arena: Option<Arena>) -> Self {
        Self {
            disk,
            waker,
            arena,
            jobs: Jobs::default(),
            fetches: VecDeque::new(),
            blocked: Vec::new(),
            unconfirmed: Vec::new(),
            check: None,
            undurable: Vec::new(),
            commit: None,
        }
    }

    fn take_slot(&self) -> Option<Slot> {
        self.arena.as_ref()?.take()
    }

    fn read(&mut self, request: Request, port: &mut dyn Port) {
        let Request { tag, offset_bytes, len_bytes, slot, .. } = request;
        if self.disk.is_gone() {
            port.complete(Completion { tag, result: Err(EIO), slot });
            return;
        }
        let reading = Reading::begin(&self.disk);
        let runs = self.disk.runs(offset_bytes, len_bytes);
        let shown = self.disk.shown();
        let promoted_seq = shown.volume.promoted().through_seq();
        let plan = match plan(&shown.volume, &runs, &self.disk.limits, |end| self.disk.recovery_disk_len(end))
        {
            Ok(plan) if plan.fetches.is_empty() || self.arena.is_some() => plan,
            Ok(_) => {
                port.complete(Completion { tag, result: Err(Errno(libc::ENOMEM)), slot });
                return;
            }
            Err(error) => {
                self.disk.report(&error);
                port.complete(Completion { tag, result: Err(EIO), slot });
                return;
            }
        };
        let direct =
            plan.direct.as_ref().map(|direct| (direct.file, direct.file_offset_bytes, direct.range.clone()));
        let fetch_count = plan.fetches.len() as u32;
        let out = fetch_count + u32::from(direct.is_some());
        let job = ReadJob {
            tag,
            offset_bytes,
            len_bytes,
            slot,
            plan,
            shown,
            promoted_seq,
            _reading: reading,
            early: Vec::new(),
            out,
            error: None,
            damage: None,
        };
        let index = self.jobs.insert(Job::Read(Box::new(job)));
        if let (Some((file, file_offset_bytes, range)), Some(Job::Read(job))) = (direct, self.jobs.get(index))
            && let Some(slot) = job.slot.take()
        {
            port.submit(FileIo {
                token: token(index, PART_DIRECT),
                file,
                op: FileOp::Read,
                offset_bytes: file_offset_bytes,
                len_bytes: range.end - range.start,
                buffer_offset_bytes: (range.start - offset_bytes) as u32,
                buffer: IoBuffer::Owned(slot),
            });
        }
        self.fetches.extend((0..fetch_count).map(|number| (index, number)));
        self.start_fetches(port);
        self.finish_read(index, port);
    }

    fn start_fetches(&mut self, port: &mut dyn Port) {
        while let Some(&(index, number)) = self.fetches.front() {
            let Some(slot) = self.take_slot() else { return };
            self.fetches.pop_front();
            let Some(Job::Read(job)) = self.jobs.get(index) else { continue };
            let Fetch { file, offset_bytes, len_bytes, .. } = job.plan.fetches[number as usize];
            port.submit(FileIo {
                token: token(index, number),
                file,
                op: FileOp::Read,
                offset_bytes,
                len_bytes,
                buffer_offset_bytes: 0,
                buffer: IoBuffer::Owned(slot),
            });
        }
    }

    fn read_done(&mut self, index: u32, part: u32, result: Result<(), Errno>, buffer: IoBuffer) {
        let (Some(Job::Read(job)), IoBuffer::Owned(mut slot)) = (self.jobs.get(index), buffer) else {
            return;
        };
        job.out -= 1;
        match result {
            Ok(()) => job.decrypt(part, &mut slot, &self.disk),
            Err(errno) => _ = job.error.get_or_insert(errno),
        }
        if part == PART_DIRECT {
            let checked = job.plan.direct.as_ref().map(|direct| direct.check(&slot, job.offset_bytes));
            if let (Ok(()), Some(Err(damage))) = (result, checked) {
                (job.error, job.damage) = (Some(EIO), Some(damage));
            }
            job.slot = Some(slot);
            for (number, slot) in std::mem::take(&mut job.early) {
                job.apply(number, &slot);
            }
        } else if job.slot.is_none() {
            job.early.push((part, slot));
        } else if result.is_ok() {
            job.apply(part, &slot);
        }
    }

    /// Answers a read when all is there and the history still is.
    fn finish_read(&mut self, index: u32, port: &mut dyn Port) {
        let Some(Job::Read(job)) = self.jobs.get(index) else { return };
        if job.out > 0 {
            return;
        }
        job.fill_zeroes();
        let doubtful = job.plan.uses_recovery_disk || job.error.is_some();
        match &self.disk.freshness {
            freshness if doubtful && freshness.is_superblock() => {
                self.unconfirmed.push(index);
                self.start_check(port);
            }
            _ => self.answer_read(index, port),
        }
    }

    fn answer_read(&mut self, index: u32, port: &mut dyn Port) {
        let Some(Job::Read(job)) = self.jobs.remove(index) else { return };
        let gone = self.disk.is_gone();
        let has_moved = job.shown.volume.promoted().through_seq() > job.promoted_seq
            || !Arc::ptr_eq(&job.shown, &self.disk.shown());
        if !gone && has_moved && (job.error.is_some() || job.damage.is_some()) {
            // The slots of what was promoted meanwhile may have been used again: it is on the recovery disk now. Those of what was
            // copied elsewhere, too.
            let ReadJob { tag, offset_bytes, len_bytes, slot, .. } = *job;
            return self.read(Request { tag, op: Op::Read, offset_bytes, len_bytes, fua: false, slot }, port);
        }
        if gone {
            self.disk.set_gone();
        } else if let Some(damage) = &job.damage {
            self.disk.report(damage);
        }
        let error = if gone { Some(EIO) } else { job.error };
        port.complete(Completion { tag: job.tag, result: error.map_or(Ok(()), Err), slot: job.slot });
    }

    /// Reads both superblocks, once for all reads that have ended.
    fn start_check(&mut self, port: &mut dyn Port) {
        if self.check.is_some() || self.unconfirmed.is_empty() {
            return;
        }
        let Some(slot) = self.take_slot() else { return };
        let jobs = std::mem::take(&mut self.unconfirmed);
        let copies = [Err(SuperblockError::Unreadable), Err(SuperblockError::Unreadable)];
        self.check = Some(Check { jobs, copies });
        submit_check(0, slot, port);
    }

    fn fail_read(&mut self, index: u32) {
        if let Some(Job::Read(job)) = self.jobs.get(index) {
            job.error.get_or_insert(EIO);
        }
    }

    fn has_failed(&mut self, index: u32) -> bool {
        matches!(self.jobs.get(index), Some(Job::Read(job)) if job.error.is_some())
    }

    fn check_done(&mut self, copy: u32, result: Result<(), Errno>, buffer: IoBuffer, port: &mut dyn Port) {
        let (Some(check), IoBuffer::Owned(slot)) = (&mut self.check, buffer) else { return };
        if result.is_ok() {
            check.copies[copy as usize] = Superblock::decode(&slot[..PAGE_BYTES]);
        }
        if copy == 0 {
            submit_check(1, slot, port);
            return;
        }
        drop(slot);
        let Some(check) = self.check.take() else { return };
        match History::of(check.copies, self.disk.kept_seq()) {
            History::Kept(superblock) => {
                self.disk.follow_promotion(&superblock);
                if check.jobs.iter().any(|job| self.has_failed(*job)) {
                    self.disk.collect_again(&superblock);
                }
            }
            History::Gone => self.disk.set_gone(),
            // Better no data than wrong data; the guest may ask again.
            History::Unknown => check.jobs.iter().for_each(|job| self.fail_read(*job)),
        }
        for index in check.jobs {
            self.answer_read(index, port);
        }
    }

    /// A write, discard or write-zeroes: after those that it overlaps.
    fn change(&mut self, request: Request, port: &mut dyn Port) {
        let disk = Arc::clone(&self.disk);
        let Some(scratch) = &disk.scratch else {
            port.complete(Completion {
                tag: request.tag,
                result: Err(Errno(libc::EROFS)),
                slot: request.slot,
            });
            return;
        };
        let (pass, runs) = scratch.lock().gate.enter(request.offset_bytes, request.len_bytes, &self.waker);
        if runs {
            self.run_change(scratch, pass, request, port);
        } else {
            self.blocked.push((pass, request));
        }
    }

    fn run_change(&mut self, scratch: &Scratch, pass: Pass, request: Request, port: &mut dyn Port) {
        let Request { tag, op, offset_bytes, len_bytes, fua, slot } = request;
        let mut state = scratch.lock();
        let slot = match (op, slot) {
            // The slot goes back with the refusal: whoever brought it can't go on without.
            (_, slot) if scratch.poisoned.load(Ordering::Acquire) => Err((EIO, slot)),
            (Op::Write, Some(slot)) => Ok(slot),
            (Op::Write, None) => Err((Errno(libc::EINVAL), None)),
            (_, slot) => {
                let zeroed = state.map.zero(offset_bytes, len_bytes);
                state.gate.leave(pass);
                drop(state);
                match zeroed {
                    Ok(()) if fua => self.answer_when_durable(scratch, tag, slot, port),
                    zeroed => {
                        let result = zeroed.map_err(|_| Errno(libc::ENOSPC));
                        port.complete(Completion { tag, result, slot });
                    }
                }
                return;
            }
        };
        let placed = slot.and_then(|slot| match state.map.place(offset_bytes, len_bytes) {
            Ok(runs) => Ok((runs, slot)),
            Err(_) => Err((Errno(libc::ENOSPC), Some(slot))),
        });
        let (runs, slot) = match placed {
            Ok(placed) => placed,
            Err((errno, slot)) => {
                state.gate.leave(pass);
                drop(state);
                port.complete(Completion { tag, result: Err(errno), slot });
                return;
            }
        };
        // What overlaps waits, so that this stays so until the write has landed.
        let dsync = fua && state.map.is_in_place(offset_bytes, len_bytes);
        drop(state);
        let mut slot = slot;
        for run in &runs {
            if let Place::Scratch(from) = run.place {
                let begin = (run.offset_bytes - offset_bytes) as usize;
                scratch.cipher.encrypt(from, &mut slot[begin..begin + run.len_bytes as usize]);
            }
        }
        let slot = slot.share();
        let out = runs.len() as u32;
        let job =
            WriteJob { tag, offset_bytes, len_bytes, pass, slot: slot.clone(), fua, dsync, out, error: None };
        let index = self.jobs.insert(Job::Write(job));
        for (number, run) in (0_u32..).zip(runs) {
            let Place::Scratch(from) = run.place else { continue };
            port.submit(FileIo {
                token: token(index, number),
                file: SCRATCH_FILE,
                op: FileOp::Write { dsync },
                offset_bytes: from,
                len_bytes: run.len_bytes,
                buffer_offset_bytes: (run.offset_bytes - offset_bytes) as u32,
                buffer: IoBuffer::Shared(slot.clone()),
            });
        }
    }

    fn write_done(&mut self, index: u32, result: Result<(), Errno>, port: &mut dyn Port) {
        let Some(Job::Write(job)) = self.jobs.get(index) else { return };
        job.out -= 1;
        if let Err(errno) = result {
            job.error.get_or_insert(errno);
        }
        if job.out > 0 {
            return;
        }
        let Some(Job::Write(job)) = self.jobs.remove(index) else { return };
        if let Some(scratch) = &self.disk.scratch {
            let mut state = scratch.lock();
            match job.error {
                None => state.map.written(job.offset_bytes, job.len_bytes),
                Some(_) if job.dsync => scratch.poisoned.store(true, Ordering::Release),
                Some(_) => {}
            }
            state.gate.leave(job.pass);
        }
        let slot = job.slot.try_unshare().ok();
        match (&self.disk.scratch, job.error) {
            (Some(_), None) if job.fua && !job.dsync => {
                let disk = Arc::clone(&self.disk);
                let Some(scratch) = &disk.scratch else { return };
                self.answer_when_durable(scratch, job.tag, slot, port);
            }
            (_, error) => {
                port.complete(Completion { tag: job.tag, result: error.map_or(Ok(()), Err), slot });
            }
        }
    }

    fn flush(&mut self, request: Request, port: &mut dyn Port) {
        let Request { tag, slot, .. } = request;
        let disk = Arc::clone(&self.disk);
        match &disk.scratch {
            None => port.complete(Completion { tag, result: Ok(()), slot }),
            Some(scratch) => self.answer_when_durable(scratch, tag, slot, port),
        }
    }
}

impl Lane for ViewLane {
    fn request(&mut self, request: Request, port: &mut dyn Port) {
        match request.op {
            Op::Read => self.read(request, port),
            Op::Flush => self.flush(request, port),
            Op::Write | Op::Discard | Op::WriteZeroes { .. } => self.change(request, port),
        }
    }

    fn file_done(&mut self, token: u64, result: Result<(), Errno>, buffer: IoBuffer, port: &mut dyn Port) {
        let (index, part) = ((token >> 32) as u32, token as u32);
        if index == CHECK_JOB {
            self.check_done(part, result, buffer, port);
        } else if index == COMMIT_JOB {
            self.commit_done(result, buffer, port);
        } else {
            match self.jobs.get(index) {
                Some(Job::Read(_)) => {
                    self.read_done(index, part, result, buffer);
                    self.finish_read(index, port);
                }
                Some(Job::Write(_)) => {
                    drop(buffer);
                    self.write_done(index, result, port);
                }
                None => debug_assert!(false, "an end of nothing: token {token:#x}"),
            }
        }
        self.start_check(port);
        self.start_fetches(port);
    }

    fn wake(&mut self, port: &mut dyn Port) {
        let disk = Arc::clone(&self.disk);
        let Some(scratch) = &disk.scratch else { return };
        for (pass, request) in std::mem::take(&mut self.blocked) {
            let runs = scratch.lock().gate.may_run(pass);
            if runs {
                self.run_change(scratch, pass, request, port);
            } else {
                self.blocked.push((pass, request));
            }
        }
        self.go_on_committing(scratch, port);
    }
}

impl Drop for ViewLane {
    fn drop(&mut self) {
        self.disk.lanes.fetch_sub(1, Ordering::AcqRel);
    }
}

impl ReadJob {
    fn decrypt(&self, part: u32, read: &mut [u8], disk: &ViewDisk) {
        let ciphers = self.shown.volume.ciphers();
        match (part, &self.plan.direct) {
            (PART_DIRECT, Some(direct)) => direct.decrypt(ciphers, read, self.offset_bytes),
            (PART_DIRECT, None) => {}
            _ => {
                let fetch = &self.plan.fetches[part as usize];
                fetch.decrypt(ciphers, disk.cipher_of(fetch.file), read);
            }
        }
    }

    fn apply(&mut self, number: u32, fetched: &[u8]) {
        let Some(slot) = &mut self.slot else { return };
        if self.error.is_some() {
            return;
        }
        let fetch = &self.plan.fetches[number as usize];
        let into = &mut slot[..self.len_bytes as usize];
        if let Err(error) = fetch.apply(fetched, into, self.offset_bytes) {
            self.error = Some(EIO);
            self.damage = Some(error);
        }
    }

    fn fill_zeroes(&mut self) {
        let Some(slot) = &mut self.slot else { return };
        for range in &self.plan.zeroes {
            slot[(range.start - self.offset_bytes) as usize..(range.end - self.offset_bytes) as usize]
                .fill(0);
        }
    }
}

fn submit_check(copy: u32, slot: Slot, port: &mut dyn Port) {
    port.submit(FileIo {
        token: token(CHECK_JOB, copy),
        file: JOURNAL_FILE,
        op: FileOp::Read,
        offset_bytes: SUPERBLOCK_OFFSETS[copy as usize],
        len_bytes: PAGE_BYTES as u64,
        buffer_offset_bytes: 0,
        buffer: IoBuffer::Owned(slot),
    });
}

fn token(job: u32, part: u32) -> u64 {
    u64::from(job) << 32 | u64::from(part)
}

/// Jobs by small numbers that are used again.
#[derive(Default)]
struct Jobs {
    places: Vec<Option<Job>>,
    free: Vec<u32>,
}

impl Jobs {
    fn insert(&mut self, job: Job) -> u32 {
        let index = self.free.pop().unwrap_or_else(|| {
            self.places.push(None);
            (self.places.len() - 1) as u32
        });
        self.places[index as usize] = Some(job);
        index
    }

    fn get(&mut self, index: u32) -> Option<&mut Job> {
        self.places.get_mut(index as usize)?.as_mut()
    }

    fn remove(&mut self, index: u32) -> Option<Job> {
        let job = self.places.get_mut(index as usize)?.take()?;
        self.free.push(index);
        Some(job)
    }
}
