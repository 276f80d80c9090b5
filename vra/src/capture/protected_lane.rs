//! One queue's way into a protected disk: a plain state machine between the door's port and the core.

use std::collections::VecDeque;
use std::sync::Arc;

use ublk::arena::{Slot, SlotRef};
use ublk::serve::{
    Completion, Disk, Errno, FileId, FileIo, FileOp, IoBuffer, Lane, Op, Port, Request, Waker,
};

use super::numbering::{ByteRange, Drained, NewWrite, Offer, Received, Ticket, Wakeups};
use super::payload::{DENSE_MAX_BYTES, DenseWriter, Piece};
use super::protected_disk::{Home, ProtectedDisk};
use super::write_gate::LaneGate;

/// A lane of a [`ProtectedDisk`].
///
/// Requests wait in `pending`, whose index is the token to the port and to the core. A write goes: through the gate of a
/// shared disk, offered to the core (`deferred` if the core doesn't take it now), issued at once or when the core says so,
/// landed, and completed, or `held` first.
pub(super) struct ProtectedLane {
    disk: Arc<ProtectedDisk>,
    waker: Waker,
    homes: Vec<Option<LaneHome>>,
    /// Index of the disk's home in `homes`.
    current: usize,
    /// The disk's count of moves when `current` was set.
    moves: u64,
    /// It has moved since what waits was last looked at.
    has_moved: bool,
    pending: Vec<Option<Pending>>,
    free: Vec<usize>,
    gate: Option<LaneGate>,
    deferred: VecDeque<usize>,
    held: Vec<usize>,
    wakeups: Wakeups,
    drained: Drained,
}

impl ProtectedLane {
    pub(super) fn new(disk: Arc<ProtectedDisk>, waker: Waker) -> Self {
        let (home, moves) = disk.home();
        let first = LaneHome::enter(home, &waker);
        let gate = disk.gate().map(|gate| LaneGate::join(Arc::clone(gate), &waker));
        Self {
            gate,
            disk,
            waker,
            homes: vec![Some(first)],
            current: 0,
            moves,
            has_moved: false,
            pending: Vec::with_capacity(EXPECTED_DEPTH),
            free: Vec::with_capacity(EXPECTED_DEPTH),
            deferred: VecDeque::with_capacity(EXPECTED_DEPTH),
            held: Vec::with_capacity(EXPECTED_DEPTH),
            wakeups: Wakeups::with_room(),
            drained: Drained::default(),
        }
    }

    /// Takes a write of the guest: into the core, or to the gate.
    fn admit(&mut self, index: usize, port: &mut dyn Port) {
        if let Some(gate) = &mut self.gate
            && !gate.enter(index)
        {
            return;
        }
        self.offer(index, port);
    }

    /// The gate may have opened, or turned away what waits.
    fn pass_gate(&mut self, port: &mut dyn Port) {
        while let Some((index, passed)) = self.gate.as_mut().and_then(LaneGate::next) {
            if passed {
                self.offer(index, port);
                continue;
            }
            let pending = self.pending[index].as_mut().expect("a request at the gate is kept");
            pending.result = Err(Errno(libc::EIO));
            self.answer(index, port);
        }
    }

    /// Offers a write to the core, which may begin it, let it wait, or put it off.
    fn offer(&mut self, index: usize, port: &mut dyn Port) {
        self.follow_moves();
        let now_us = self.disk.now_us();
        loop {
            let current = self.current;
            let home = self.homes[current].as_mut().expect("the current home is kept");
            let pending = self.pending[index].as_mut().expect("the caller keeps the request");
            if home.home.core.is_capturing() {
                pending.prepare(home, port);
            }
            let new = NewWrite {
                lane: home.lane,
                token: index as u64,
                volume: home.home.volume,
                range: pending.range(),
            };
            match home.home.core.receive(&new, &mut pending.offer, now_us, &mut self.wakeups) {
                Received::Issue(ticket) => {
                    pending.entered(ticket, current);
                    home.writes += 1;
                    return self.issue(index, port);
                }
                Received::Wait(ticket) => {
                    pending.entered(ticket, current);
                    home.writes += 1;
                    return;
                }
                Received::PrepareFirst => pending.prepare(home, port),
                Received::Deferred => return self.deferred.push_back(index),
                Received::Moved => self.follow_moves(),
            }
        }
    }

    /// Starts the local I/O.
    fn issue(&mut self, index: usize, port: &mut dyn Port) {
        let pending = self.pending[index].as_mut().expect("the caller keeps the request");
        let (op, buffer) = match pending.op {
            Op::Read => (FileOp::Read, pending.slot.take().map_or(IoBuffer::None, IoBuffer::Owned)),
            Op::Write => (FileOp::Write { dsync: pending.fua }, pending.write_buffer()),
            Op::Flush => (FileOp::Sync, IoBuffer::None),
            Op::Discard => (FileOp::PunchHole, IoBuffer::None),
            Op::WriteZeroes { unmap } if unmap && self.disk.geometry().discard.is_some() => {
                (FileOp::PunchHole, IoBuffer::None)
            }
            Op::WriteZeroes { .. } => (FileOp::ZeroRange, IoBuffer::None),
        };
        port.submit(FileIo {
            token: index as u64,
            file: FileId(0),
            op,
            offset_bytes: pending.offset_bytes,
            len_bytes: pending.len_bytes,
            buffer_offset_bytes: 0,
            buffer,
        });
    }

    /// The local disk is done with a write.
    fn write_done(&mut self, index: usize, port: &mut dyn Port) {
        let pending = self.pending[index].as_ref().expect("file I/O belongs to a request");
        let (Some(ticket), at) = (pending.ticket, pending.home) else { return self.complete(index, port) };
        let home = self.homes[at].as_ref().expect("a home is kept while it has writes");
        let landed = home.home.core.landed(ticket, pending.result.is_ok(), &mut self.wakeups);
        if landed.held {
            self.held.push(index);
        } else {
            self.write_over(index, port);
        }
        if landed.own_ready {
            self.drain(at, port);
        }
    }

    /// A read is done; the guest may have to wait for it while a checkpoint holds what it may have seen (D2).
    fn read_done(&mut self, index: usize, port: &mut dyn Port) {
        self.follow_moves();
        if self.read_is_held(index) {
            self.held.push(index);
        } else {
            self.complete(index, port);
        }
    }

    fn read_is_held(&self, index: usize) -> bool {
        let pending = self.pending[index].as_ref().expect("a read belongs to a request");
        let home = self.homes[self.current].as_ref().expect("the current home is kept");
        pending.result.is_ok() && home.home.core.read_is_held(home.lane, home.home.volume, pending.range())
    }

    /// A write has left the core.
    fn write_over(&mut self, index: usize, port: &mut dyn Port) {
        let at = self.pending[index].as_ref().expect("a write belongs to a request").home;
        if let Some(home) = self.homes[at].as_mut() {
            home.writes -= 1;
        }
        self.complete(index, port);
        self.forget_home(at);
    }

    fn complete(&mut self, index: usize, port: &mut dyn Port) {
        let op = self.pending[index].as_ref().map(|pending| pending.op);
        if let (Some(gate), Some(Op::Write | Op::Discard | Op::WriteZeroes { .. })) = (&self.gate, op) {
            gate.leave();
        }
        self.answer(index, port);
    }

    fn answer(&mut self, index: usize, port: &mut dyn Port) {
        let pending = self.pending[index].take().expect("a request is completed once");
        self.free.push(index);
        let slot = pending.slot.or(pending.replacement);
        port.complete(Completion { tag: pending.tag, result: pending.result, slot });
    }

    /// Does what the core of a home asks for.
    fn drain(&mut self, at: usize, port: &mut dyn Port) {
        let mut drained = std::mem::take(&mut self.drained);
        if let Some(home) = &self.homes[at] {
            home.home.core.drain(home.lane, &mut drained);
        }
        for token in drained.ready.drain(..) {
            self.issue(token as usize, port);
        }
        if std::mem::take(&mut drained.retry) {
            self.retry_deferred(port);
        }
        if std::mem::take(&mut drained.recheck_held) {
            self.recheck_held(port);
        }
        self.drained = drained;
    }

    fn retry_deferred(&mut self, port: &mut dyn Port) {
        for _ in 0..self.deferred.len() {
            if let Some(index) = self.deferred.pop_front() {
                self.offer(index, port);
            }
        }
    }

    fn recheck_held(&mut self, port: &mut dyn Port) {
        let mut at = 0;
        while at < self.held.len() {
            let index = self.held[at];
            let pending = self.pending[index].as_ref().expect("a held request is kept");
            let may_go = match (pending.ticket, &self.homes[pending.home]) {
                (Some(ticket), Some(home)) => home.home.core.complete_held(ticket, &mut self.wakeups),
                _ => !self.read_is_held(index),
            };
            if !may_go {
                at += 1;
                continue;
            }
            self.held.swap_remove(at);
            if self.pending[index].as_ref().is_some_and(|pending| pending.ticket.is_some()) {
                self.write_over(index, port);
            } else {
                self.complete(index, port);
            }
        }
    }

    /// Goes where the disk has gone.
    fn follow_moves(&mut self) {
        if self.moves == self.disk.moves() {
            return;
        }
        let (home, moves) = self.disk.home();
        let entered = Some(LaneHome::enter(home, &self.waker));
        let left = self.current;
        self.current = match self.homes.iter().position(Option::is_none) {
            Some(at) => {
                self.homes[at] = entered;
                at
            }
            None => {
                self.homes.push(entered);
                self.homes.len() - 1
            }
        };
        self.moves = moves;
        // The core that was left would have told when they may go on, and may be forgotten before it does.
        if !self.deferred.is_empty() || !self.held.is_empty() {
            self.has_moved = true;
            self.waker.wake();
        }
        self.forget_home(left);
    }

    /// Leaves a home that isn't the disk's any more, once nothing of this lane is under way there.
    fn forget_home(&mut self, at: usize) {
        if at != self.current
            && let Some(home) = self.homes[at].take_if(|home| home.writes == 0)
        {
            home.leave();
        }
    }

    fn keep(&mut self, request: Request) -> usize {
        let pending = Pending {
            tag: request.tag,
            op: request.op,
            offset_bytes: request.offset_bytes,
            len_bytes: request.len_bytes,
            fua: request.fua,
            slot: request.slot,
            shared: None,
            replacement: None,
            offer: Offer::Nothing,
            ticket: None,
            home: self.current,
            result: Ok(()),
        };
        match self.free.pop() {
            Some(index) => {
                self.pending[index] = Some(pending);
                index
            }
            None => {
                self.pending.push(Some(pending));
                self.pending.len() - 1
            }
        }
    }
}

impl Lane for ProtectedLane {
    fn request(&mut self, request: Request, port: &mut dyn Port) {
        let index = self.keep(request);
        match self.pending[index].as_ref().map(|pending| pending.op) {
            Some(Op::Write | Op::Discard | Op::WriteZeroes { .. }) => self.admit(index, port),
            _ => self.issue(index, port),
        }
    }

    fn file_done(&mut self, token: u64, result: Result<(), Errno>, buffer: IoBuffer, port: &mut dyn Port) {
        let index = token as usize;
        let pending = self.pending[index].as_mut().expect("file I/O belongs to a request");
        pending.result = result;
        if let IoBuffer::Owned(slot) = buffer {
            pending.slot = Some(slot);
        }
        match pending.op {
            Op::Read => self.read_done(index, port),
            Op::Flush => self.complete(index, port),
            Op::Discard | Op::WriteZeroes { .. } if pending.fua && result.is_ok() => {
                // These have no durable form of their own.
                pending.fua = false;
                port.submit(FileIo {
                    token,
                    file: FileId(0),
                    op: FileOp::Sync,
                    offset_bytes: 0,
                    len_bytes: 0,
                    buffer_offset_bytes: 0,
                    buffer: IoBuffer::None,
                });
            }
            Op::Write | Op::Discard | Op::WriteZeroes { .. } => self.write_done(index, port),
        }
    }

    fn wake(&mut self, port: &mut dyn Port) {
        self.pass_gate(port);
        for at in 0..self.homes.len() {
            self.drain(at, port);
        }
        if std::mem::take(&mut self.has_moved) {
            self.retry_deferred(port);
            self.recheck_held(port);
        }
    }
}

impl Drop for ProtectedLane {
    fn drop(&mut self) {
        for home in self.homes.drain(..).flatten() {
            home.leave();
        }
    }
}

/// Requests of one queue for which there is room without allocating.
const EXPECTED_DEPTH: usize = 256;

/// One in this many of an arena's slots is left to the doors: retained writes must not keep a guest from being served.
const SLOTS_FOR_DOORS: usize = 8;

/// This lane in one home of the disk.
struct LaneHome {
    home: Home,
    /// The lane's number in the home's core.
    lane: u32,
    dense: Option<DenseWriter>,
    /// Writes of this lane that the core knows.
    writes: usize,
}

impl LaneHome {
    fn enter(home: Home, waker: &Waker) -> Self {
        let lane = home.core.add_lane(waker.clone());
        let dense = home.dense.clone().map(DenseWriter::new);
        Self { home, lane, dense, writes: 0 }
    }

    fn leave(self) {
        self.home.core.with(|core, _| core.remove_lane(self.lane));
    }
}

struct Pending {
    tag: u64,
    op: Op,
    offset_bytes: u64,
    len_bytes: u64,
    fua: bool,
    /// The request's slot while it isn't lent to the port.
    slot: Option<Slot>,
    /// The request's slot once it is shared with the stream.
    shared: Option<SlotRef>,
    /// What the guest's queue gets for it.
    replacement: Option<Slot>,
    offer: Offer,
    ticket: Option<Ticket>,
    /// Index of the lane's home that gave the ticket.
    home: usize,
    result: Result<(), Errno>,
}

impl Pending {
    fn range(&self) -> ByteRange {
        ByteRange::new(self.offset_bytes, self.len_bytes)
    }

    fn entered(&mut self, ticket: Ticket, home: usize) {
        self.ticket = Some(ticket);
        self.home = home;
        // What the core didn't take wasn't captured.
        self.offer = Offer::Nothing;
    }

    /// Makes the offer ready: a copy of a small write, the slot itself of a longer one.
    fn prepare(&mut self, home: &mut LaneHome, port: &mut dyn Port) {
        if matches!(self.offer, Offer::Data(_) | Offer::Zeroes) {
            return;
        }
        if self.op != Op::Write {
            self.offer = Offer::Zeroes;
            return;
        }
        let is_small = self.len_bytes as usize <= DENSE_MAX_BYTES;
        let offer = if is_small {
            self.copy(home).or_else(|| self.lend(port))
        } else {
            self.lend(port).or_else(|| self.copy(home))
        };
        self.offer = offer.map_or(Offer::NoMemory, Offer::Data);
    }

    /// A copy of the data, if the VM has memory for it.
    fn copy(&self, home: &mut LaneHome) -> Option<Piece> {
        home.dense.as_mut()?.copy(self.data()?)
    }

    /// The slot itself, if there is another for the guest's queue and enough for the doors besides.
    fn lend(&mut self, port: &mut dyn Port) -> Option<Piece> {
        if self.shared.is_none() {
            let arena = self.slot.as_ref()?.arena();
            if arena.free_count() <= arena.slot_count() / SLOTS_FOR_DOORS {
                return None;
            }
            self.replacement = Some(port.take_slot()?);
            self.shared = self.slot.take().map(Slot::share);
        }
        self.shared.as_ref().map(|shared| Piece::of_slot(shared.clone(), self.len_bytes as usize))
    }

    fn data(&self) -> Option<&[u8]> {
        let slot: &[u8] = match (&self.slot, &self.shared) {
            (Some(slot), _) => slot,
            (None, shared) => shared.as_ref()?,
        };
        slot.get(..self.len_bytes as usize)
    }

    fn write_buffer(&mut self) -> IoBuffer {
        match self.shared.take() {
            Some(shared) => IoBuffer::Shared(shared),
            None => self.slot.take().map_or(IoBuffer::None, IoBuffer::Owned),
        }
    }
}
