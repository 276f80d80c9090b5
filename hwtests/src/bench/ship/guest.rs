//! A guest behind a door that lives in this process: what ublk would do, without its kernel part.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use ublk::arena::{Arena, Slot};
use ublk::serve::{Completion, Disk, FileIo, Lane, Op, Port, Request, Wake};

use super::replication::Replication;
use super::{Payload, RUN_BYTES, WRITE_BYTES};
use std::sync::Arc;

/// Writes in flight at once.
const DEPTH: u64 = 32;

/// How far the guest may be ahead of what is durable: a guest that is always faster than the link would only measure how long its memory
/// lasts.
const AHEAD_BYTES: u64 = 64 << 20;

/// Memory of the door: twice what the guest is ahead, so that no write is ever copied for lack of a slot.
const ARENA_SLOTS: u32 = (2 * AHEAD_BYTES / WRITE_BYTES as u64) as u32;

/// Writes [`RUN_BYTES`] and gives the time from the first write until the last is durable at the target.
pub(super) fn write_all(replication: &Replication, payload: &Payload) -> Result<Duration> {
    let mut door = Door {
        arena: Arena::new(WRITE_BYTES, ARENA_SLOTS)?,
        submitted: Vec::with_capacity(DEPTH as usize),
        answered: Vec::with_capacity(DEPTH as usize),
    };
    let mut lane = replication.disk().lane(Arc::new(NoBell));
    let before_seq = replication.durable_through();
    let write_count = RUN_BYTES / WRITE_BYTES as u64;
    let ahead_count = AHEAD_BYTES / WRITE_BYTES as u64;
    let began = Instant::now();
    let mut number = 0;
    while number < write_count {
        replication.wait_durable((before_seq + number + DEPTH).saturating_sub(ahead_count))?;
        for tag in number..write_count.min(number + DEPTH) {
            let offset_bytes = tag * WRITE_BYTES as u64;
            let mut slot = door.take_slot().context("the door has run out of slots")?;
            // The driver's copy of the guest's data.
            slot.copy_from_slice(&payload.part(offset_bytes, WRITE_BYTES));
            let (op, len_bytes) = (Op::Write, WRITE_BYTES as u64);
            let request = Request { tag, op, offset_bytes, len_bytes, fua: false, slot: Some(slot) };
            lane.request(request, &mut door);
        }
        number = write_count.min(number + DEPTH);
        door.finish_all(&mut *lane)?;
    }
    replication.wait_durable(before_seq + write_count)?;
    Ok(began.elapsed())
}

/// A door whose local disk takes what it is given at once, so that the way to the target is what is measured.
struct Door {
    arena: Arena,
    submitted: Vec<FileIo>,
    answered: Vec<Completion>,
}

impl Door {
    /// Ends all writes to the local disk, which answers the guest.
    fn finish_all(&mut self, lane: &mut dyn Lane) -> Result<()> {
        while let Some(io) = self.submitted.pop() {
            lane.file_done(io.token, Ok(()), io.buffer, self);
        }
        for completion in self.answered.drain(..) {
            ensure!(completion.result.is_ok(), "write {}: {:?}", completion.tag, completion.result);
        }
        Ok(())
    }
}

impl Port for Door {
    fn submit(&mut self, io: FileIo) {
        self.submitted.push(io);
    }

    fn complete(&mut self, completion: Completion) {
        self.answered.push(completion);
    }

    fn take_slot(&mut self) -> Option<Slot> {
        self.arena.take()
    }
}

/// A lane with one thread and no overlapping writes is never woken.
struct NoBell;

impl Wake for NoBell {
    fn wake(&self) {}
}
