//! The requests of one connection: cut into pieces for the disk as memory allows, and answered when their pieces are back.
//!
//! Without structured replies a read's data must follow its head in one run, so a read of several pieces has the
//! stream for itself from its first data to its last. Pieces are cut in the order of the requests, so all of its pieces have
//! their slots before any later request has one, and the run always ends.

use std::collections::{BTreeMap, VecDeque};

use super::connection::{ExtentQuery, SLOTS_MIN};
use super::reply::Outbox;
use super::request::{Kind, Piece, PieceMemory, Plan, Terms, Work};
use super::wire;
use crate::arena::Slot;
use crate::serve::{Allocation, Completion, Errno, Extent, Op, Request};
use crate::table::Table;

/// Requests of one connection in flight.
pub(super) const JOBS_MAX: usize = 128;
/// Replies of one connection waiting to be sent, above which no further requests are taken.
pub(super) const REPLIES_MAX: usize = 256;
/// Pieces without memory (flush, discard, write zeroes) of one connection at the disk.
const BARE_PIECES_MAX: usize = 16;
/// Extents in one answer to a block status.
const EXTENTS_MAX: usize = 512;

/// Whether the client can still be answered truthfully.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(super) enum Done {
    /// It can.
    Fine,
    /// A read failed after its head went out as a success: the connection must be broken.
    CannotAnswer,
}

/// All requests of one connection.
#[derive(Debug)]
pub(super) struct Jobs {
    terms: Terms,
    /// Slots that nobody uses.
    slots: Vec<Slot>,
    jobs: Table<Job>,
    /// Jobs with pieces to be cut, but for writes, whose payload comes in by itself.
    to_cut: VecDeque<u32>,
    requests: VecDeque<Request>,
    queries: VecDeque<ExtentQuery>,
    /// Pieces at the disk or in `requests`.
    pieces: usize,
    bare_pieces: usize,
    /// The read whose data is going out as one run.
    running: Option<u32>,
    /// Answers that wait for the end of that run.
    behind_run: VecDeque<SimpleAnswer>,
    stopped: bool,
}

impl Jobs {
    pub(super) fn new(terms: Terms, slots: Vec<Slot>) -> Self {
        Self {
            terms,
            slots,
            jobs: Table::new(),
            to_cut: VecDeque::new(),
            requests: VecDeque::new(),
            queries: VecDeque::new(),
            pieces: 0,
            bare_pieces: 0,
            running: None,
            behind_run: VecDeque::new(),
            stopped: false,
        }
    }

    pub(super) fn terms(&self) -> &Terms {
        &self.terms
    }

    /// Whether a further request may be taken.
    pub(super) fn takes_more(&self, outbox: &Outbox) -> bool {
        self.jobs.len() < JOBS_MAX && outbox.len() + self.behind_run.len() < REPLIES_MAX
    }

    pub(super) fn at_disk(&self) -> usize {
        self.pieces
    }

    pub(super) fn any(&self) -> bool {
        self.jobs.len() > 0 || !self.behind_run.is_empty()
    }

    pub(super) fn give_slots(&mut self, slots: impl IntoIterator<Item = Slot>) {
        self.slots.extend(slots);
    }

    pub(super) fn has_requests(&self) -> bool {
        !self.requests.is_empty()
    }

    pub(super) fn next_request(&mut self) -> Option<Request> {
        self.requests.pop_front()
    }

    pub(super) fn next_query(&mut self) -> Option<ExtentQuery> {
        self.queries.pop_front()
    }

    /// Begins a request. The job is returned if its payload must be received.
    pub(super) fn begin(&mut self, cookie: u64, work: Work, outbox: &mut Outbox) -> Option<u32> {
        let plan = Plan::new(&work, &self.terms.geometry);
        let several = work.kind == Kind::Read && work.len_bytes as usize > self.terms.slot_len_bytes;
        let parked = (several && !self.terms.agreed.structured).then(Parked::default);
        let job = Job { cookie, work, plan, pieces: 0, cut: 0, error: None, parked, abandoned: false };
        let (index, _) = self.jobs.insert(job);
        match work.kind {
            Kind::BlockStatus { one } => {
                let count_max = if one { 1 } else { EXTENTS_MAX };
                self.queries.push_back(ExtentQuery::new(index, &work, count_max));
            }
            _ if plan.is_done() => self.answer_if_done(index, outbox),
            Kind::Write => return Some(index),
            _ => self.to_cut.push_back(index),
        }
        None
    }

    /// Answers a request with an error.
    pub(super) fn refuse(&mut self, cookie: u64, error: u32, text: &str, outbox: &mut Outbox) {
        if self.terms.agreed.structured {
            outbox.error_chunk(cookie, error, text);
        } else {
            self.answer_simple(SimpleAnswer { cookie, error, data: None }, outbox);
        }
    }

    /// Cuts what memory allows.
    pub(super) fn issue(&mut self, outbox: &mut Outbox) {
        while let Some(&index) = self.to_cut.front() {
            let Some(job) = self.jobs.get_mut(index) else {
                self.to_cut.pop_front();
                continue;
            };
            let Some(piece) = job.plan.peek(&self.terms) else {
                self.to_cut.pop_front();
                self.answer_if_done(index, outbox);
                continue;
            };
            let slot = match piece.memory {
                PieceMemory::None if self.bare_pieces >= BARE_PIECES_MAX => return,
                PieceMemory::None => None,
                _ if self.slots.len() < SLOTS_MIN => return,
                memory => {
                    let mut slot = self.slots.pop();
                    if let (PieceMemory::Zeroes, Some(slot)) = (memory, &mut slot) {
                        slot[..piece.len_bytes as usize].fill(0);
                    }
                    slot
                }
            };
            self.cut(index, piece, slot);
        }
    }

    /// A slot for the next piece of a write's payload and the piece's length in bytes, or none when no slot is free.
    pub(super) fn slot_for_payload(&mut self, index: u32) -> Option<(Slot, usize)> {
        let job = self.jobs.get(index)?;
        let piece = job.plan.peek(&self.terms)?;
        Some((self.slots.pop()?, piece.len_bytes as usize))
    }

    /// Sends the next piece of a write's payload to the disk. True when it was the last.
    pub(super) fn issue_payload(&mut self, index: u32, slot: Slot) -> bool {
        let job = self.jobs.get_mut(index);
        let Some(piece) = job.and_then(|job| job.plan.peek(&self.terms)) else { return true };
        self.cut(index, piece, Some(slot));
        self.jobs.get(index).is_none_or(|job| job.plan.is_done())
    }

    /// A write whose payload will not come whole: it gets no answer.
    pub(super) fn abandon(&mut self, index: u32) {
        if let Some(job) = self.jobs.get_mut(index) {
            job.abandoned = true;
            if job.pieces == 0 {
                self.remove(index);
            }
        }
    }

    /// Takes the end of a piece.
    pub(super) fn complete(&mut self, completion: Completion, outbox: &mut Outbox) -> Done {
        let Completion { tag, result, slot } = completion;
        let (index, number) = ((tag >> 32) as u32, tag as u32);
        let Some(job) = self.jobs.get_mut(index) else {
            debug_assert!(false, "a completion of nothing: tag {tag:#x}");
            self.slots.extend(slot);
            return Done::Fine;
        };
        self.pieces -= 1;
        job.pieces -= 1;
        let (bare, result) = match job.work.kind {
            Kind::Read if slot.is_none() => (false, result.and(Err(Errno(libc::EIO)))),
            Kind::Read | Kind::Write => (false, result),
            _ => (slot.is_none(), result),
        };
        self.bare_pieces -= usize::from(bare);
        if let Err(errno) = result {
            job.error.get_or_insert(errno);
            // What waited for its turn will not be sent, and the pieces still to be cut need the slots.
            if let Some(parked) = &mut job.parked {
                self.slots.extend(std::mem::take(&mut parked.pieces).into_values());
            }
        }
        if self.stopped || job.abandoned {
            self.slots.extend(slot);
            if job.pieces == 0 {
                self.remove(index);
            }
            return Done::Fine;
        }
        match slot {
            Some(slot) if job.work.kind == Kind::Read && result.is_ok() => {
                self.read_done(index, number, slot, outbox);
            }
            slot => self.slots.extend(slot),
        }
        let Some(job) = self.jobs.get(index) else { return Done::Fine };
        if job.error.is_some() && self.running == Some(index) {
            return Done::CannotAnswer;
        }
        self.answer_if_done(index, outbox);
        Done::Fine
    }

    /// Answers a block status.
    pub(super) fn answer(
        &mut self,
        index: u32,
        query: &ExtentQuery,
        extents: &[Extent],
        outbox: &mut Outbox,
    ) {
        let Some(job) = self.jobs.get(index) else { return };
        let mut rest_bytes = query.len_bytes;
        let mut told: Vec<Extent> = Vec::new();
        for extent in extents.iter().take(query.count_max) {
            let len_bytes = extent.len_bytes.min(rest_bytes);
            if len_bytes == 0 {
                break;
            }
            told.push(Extent { len_bytes, ..*extent });
            rest_bytes -= len_bytes;
        }
        if told.is_empty() {
            told.push(Extent { len_bytes: query.len_bytes, allocation: Allocation::Data });
        }
        outbox.status_chunk(job.cookie, &told);
        self.remove(index);
    }

    /// Throws away all that is not at the disk yet.
    pub(super) fn stop(&mut self) {
        self.stopped = true;
        for request in std::mem::take(&mut self.requests) {
            self.pieces -= 1;
            self.slots.extend(request.slot);
            if let Some(job) = self.jobs.get_mut((request.tag >> 32) as u32) {
                job.pieces -= 1;
            }
        }
        self.to_cut.clear();
        self.queries.clear();
        self.behind_run.clear();
        let idle: Vec<u32> =
            self.jobs.iter().filter(|(_, job)| job.pieces == 0).map(|(index, _)| index).collect();
        idle.into_iter().for_each(|index| self.remove(index));
    }

    fn remove(&mut self, index: u32) {
        if let Some(job) = self.jobs.remove(index) {
            let parked = job.parked.into_iter().flat_map(|parked| parked.pieces.into_values());
            self.slots.extend(parked);
        }
    }

    fn cut(&mut self, index: u32, piece: Piece, slot: Option<Slot>) {
        let Some(job) = self.jobs.get_mut(index) else { return };
        job.plan.advance(&piece);
        job.pieces += 1;
        let tag = u64::from(index) << 32 | u64::from(job.cut);
        job.cut += 1;
        self.pieces += 1;
        self.bare_pieces += usize::from(slot.is_none());
        self.requests.push_back(Request {
            tag,
            op: piece.op,
            offset_bytes: piece.offset_bytes,
            len_bytes: piece.len_bytes,
            fua: job.work.fua && self.terms.geometry.fua && !matches!(piece.op, Op::Read | Op::Flush),
            slot,
        });
    }

    /// Sends, or parks, what a piece of a read brought.
    fn read_done(&mut self, index: u32, number: u32, slot: Slot, outbox: &mut Outbox) {
        let slot_len = self.terms.slot_len_bytes as u64;
        let Some(job) = self.jobs.get_mut(index) else { return };
        let from = u64::from(number) * slot_len;
        let len_bytes = (u64::from(job.work.len_bytes) - from).min(slot_len) as usize;
        if job.error.is_some() {
            self.slots.push(slot);
            return;
        }
        if self.terms.agreed.structured {
            let last = job.pieces == 0 && job.plan.is_done();
            outbox.data_chunk(job.cookie, last, job.work.offset_bytes + from, slot, len_bytes);
            if last {
                self.remove(index);
            }
            return;
        }
        match &mut job.parked {
            Some(parked) => {
                parked.pieces.insert(number, slot);
                if self.running.is_none() {
                    self.start_run(outbox);
                } else if self.running == Some(index) {
                    self.go_on_with_run(outbox);
                }
            }
            None => {
                let cookie = job.cookie;
                self.remove(index);
                self.answer_simple(SimpleAnswer { cookie, error: 0, data: Some((slot, len_bytes)) }, outbox);
            }
        }
    }

    /// Starts the run of a read whose first piece is there, if any.
    fn start_run(&mut self, outbox: &mut Outbox) {
        let starts = |job: &Job| {
            job.error.is_none() && job.parked.as_ref().is_some_and(|parked| parked.pieces.contains_key(&0))
        };
        let ready = self.jobs.iter().find(|(_, job)| starts(job)).map(|(index, job)| (index, job.cookie));
        if let Some((index, cookie)) = ready {
            outbox.simple(cookie, 0);
            self.running = Some(index);
            self.go_on_with_run(outbox);
        }
    }

    fn go_on_with_run(&mut self, outbox: &mut Outbox) {
        let Some(index) = self.running else { return };
        let Some(job) = self.jobs.get_mut(index) else { return };
        let Some(parked) = &mut job.parked else { return };
        let total_bytes = job.work.len_bytes as usize;
        while let Some(slot) = parked.pieces.remove(&parked.next) {
            let from = parked.next as usize * self.terms.slot_len_bytes;
            outbox.data(slot, (total_bytes - from).min(self.terms.slot_len_bytes));
            parked.next += 1;
        }
        if job.pieces == 0 && job.plan.is_done() && parked.pieces.is_empty() && job.error.is_none() {
            self.remove(index);
            self.running = None;
            for answer in std::mem::take(&mut self.behind_run) {
                answer.send(outbox);
            }
            self.start_run(outbox);
        }
    }

    fn answer_simple(&mut self, answer: SimpleAnswer, outbox: &mut Outbox) {
        if self.running.is_some() {
            self.behind_run.push_back(answer);
        } else {
            answer.send(outbox);
        }
    }

    /// Answers a request of which nothing is left to do; a read that succeeded has been answered by its data.
    fn answer_if_done(&mut self, index: u32, outbox: &mut Outbox) {
        let Some(job) = self.jobs.get(index) else { return };
        let answered_by_run = job.parked.is_some() && job.error.is_none();
        if job.pieces > 0 || !job.plan.is_done() || answered_by_run {
            return;
        }
        let (cookie, error) = (job.cookie, job.error);
        self.remove(index);
        match (self.terms.agreed.structured, error) {
            (true, None) => outbox.none_chunk(cookie),
            (true, Some(errno)) => outbox.error_chunk(cookie, wire::error_of(errno), ""),
            (false, error) => {
                let error = error.map_or(0, wire::error_of);
                self.answer_simple(SimpleAnswer { cookie, error, data: None }, outbox);
            }
        }
    }
}

#[derive(Debug)]
struct Job {
    cookie: u64,
    work: Work,
    plan: Plan,
    /// Pieces cut and not back yet.
    pieces: u32,
    /// Pieces cut so far: the next one's number.
    cut: u32,
    /// The first error of a piece.
    error: Option<Errno>,
    /// For a read whose data must go out in one run of several pieces.
    parked: Option<Parked>,
    /// It gets no answer.
    abandoned: bool,
}

/// Pieces of a read that wait for their turn in the run.
#[derive(Debug, Default)]
struct Parked {
    pieces: BTreeMap<u32, Slot>,
    /// The piece that goes out next.
    next: u32,
}

#[derive(Debug)]
struct SimpleAnswer {
    cookie: u64,
    error: u32,
    data: Option<(Slot, usize)>,
}

impl SimpleAnswer {
    fn send(self, outbox: &mut Outbox) {
        outbox.simple(self.cookie, self.error);
        if let Some((slot, len_bytes)) = self.data {
            outbox.data(slot, len_bytes);
        }
    }
}
