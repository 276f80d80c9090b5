use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};
use journal::batch::{BatchLink, BatchSealer, PushError, Record, RecordKind, SealedBatch};

use super::{Retained, SenderLimits, StageTimes};
use crate::clock::Now;
use crate::wire::Ack;

/// A sealed batch for the stream.
#[derive(Clone, Debug)]
pub struct OutgoingBatch {
    /// Number of its first record.
    pub first_seq: u64,
    /// Number of its last record.
    pub last_seq: u64,
    /// Its length in bytes.
    pub len_bytes: usize,
    /// Its bytes, in order.
    pub chunks: Vec<Bytes>,
}

/// What a granted stream has taken, sealed and not yet seen acknowledged.
#[derive(Debug)]
pub(super) struct Pipeline {
    link: BatchLink,
    limits: SenderLimits,
    sealer: BatchSealer,
    /// Number of the next record to take.
    next_seq: u64,
    /// Records that were taken and are not sealed.
    pending: VecDeque<Record>,
    pending_bytes: usize,
    /// When the first of `pending` was there at the earliest, by the monotonic clock.
    pending_since_us: u64,
    /// When it was last seen that nothing waits, by the monotonic clock.
    quiet_us: u64,
    /// The owner was told to wait for a publication: the next record has come just now.
    armed: bool,
    /// Look again this long after the last batch, rather than be woken by each record.
    ticking: bool,
    in_flight: VecDeque<InFlight>,
    in_flight_bytes: u64,
    durable_through: u64,
    received_through: u64,
}

#[derive(Debug)]
struct InFlight {
    last_seq: u64,
    len_bytes: u64,
    /// Capture time of its first record, by the system's clock.
    captured_wall_us: u64,
    sealed: Now,
}

/// Small payloads up to this length in bytes are copied together: the QUIC stream searches its chunks from the front for each packet,
/// so a batch of 256 pieces would cost more than the copy.
const COALESCE_MAX_BYTES: usize = 16 << 10;

/// What a record counts beside its payload, in bytes: its header and checksums.
const RECORD_OVERHEAD_BYTES: usize = 64;

impl Pipeline {
    /// A stream that was just granted and goes on with `next_seq`.
    pub(super) fn new(link: BatchLink, limits: SenderLimits, next_seq: u64, now: Now) -> Self {
        Self {
            link,
            limits,
            sealer: BatchSealer::new(),
            next_seq,
            pending: VecDeque::new(),
            pending_bytes: 0,
            pending_since_us: now.mono_us,
            quiet_us: now.mono_us,
            armed: false,
            ticking: false,
            in_flight: VecDeque::new(),
            in_flight_bytes: 0,
            durable_through: next_seq - 1,
            received_through: next_seq - 1,
        }
    }

    /// The next batch to send, if one is due.
    ///
    /// # Errors
    /// The record that no batch can carry, by number: a bug of whoever captured it.
    pub(super) fn poll(
        &mut self,
        now: Now,
        retained: &mut dyn Retained,
    ) -> Result<Option<OutgoingBatch>, PushError> {
        if self.window_is_full() {
            self.armed = false;
            return Ok(None);
        }
        self.take(now, retained);
        let Some(count) = self.due_count(now) else { return Ok(None) };
        self.seal(count, now).map(Some)
    }

    /// When to poll again, if nothing else happens before.
    pub(super) fn wake_at_us(&self) -> Option<u64> {
        if self.window_is_full() {
            return None;
        }
        if !self.pending.is_empty() {
            return Some(self.pending_since_us + self.limits.seal_delay_us);
        }
        self.ticking.then_some(self.quiet_us + self.limits.seal_delay_us)
    }

    /// Whether the next publication should wake.
    pub(super) fn wake_on_publish(&self) -> bool {
        self.armed
    }

    /// Takes an acknowledgement. Gives how long the newest of the batches that it covers spent where.
    ///
    /// # Errors
    /// What in it can't be.
    pub(super) fn ack(&mut self, ack: &Ack, now: Now) -> Result<Option<StageTimes>, &'static str> {
        let sealed_through = self.next_seq - 1 - self.pending.len() as u64;
        if ack.received_through > sealed_through {
            return Err("the target acknowledged what was not sent");
        }
        if ack.durable_through < self.durable_through {
            return Err("the target took an acknowledgement back");
        }
        self.received_through = self.received_through.max(ack.received_through);
        self.durable_through = ack.durable_through;
        let mut newest = None;
        while let Some(batch) = self.in_flight.front()
            && batch.last_seq <= ack.durable_through
        {
            self.in_flight_bytes -= batch.len_bytes;
            newest = self.in_flight.pop_front();
        }
        Ok(newest.map(|batch| {
            let (memory_us, disk_us) = (u64::from(ack.memory_us), u64::from(ack.disk_us));
            let round_trip_us = now.mono_us.saturating_sub(batch.sealed.mono_us);
            StageTimes {
                queue_us: batch.sealed.wall_us.saturating_sub(batch.captured_wall_us),
                wire_us: round_trip_us.saturating_sub(memory_us + disk_us),
                memory_us,
                disk_us,
            }
        }))
    }

    /// Everything up to here has arrived.
    pub(super) fn received_through(&self) -> u64 {
        self.received_through
    }

    /// Bytes of batches that are sealed and not durable.
    pub(super) fn in_flight_bytes(&self) -> u64 {
        self.in_flight_bytes
    }

    /// Capture time of the oldest record that was taken and is not durable, by the system's clock.
    pub(super) fn oldest_wall_us(&self) -> Option<u64> {
        self.in_flight
            .front()
            .map(|batch| batch.captured_wall_us)
            .or_else(|| self.pending.front().map(|record| record.time_us))
    }

    fn window_is_full(&self) -> bool {
        self.in_flight_bytes >= self.limits.window_bytes
    }

    fn take(&mut self, now: Now, retained: &mut dyn Retained) {
        let was_empty = self.pending.is_empty();
        let room_bytes = self.limits.batch_bytes.saturating_sub(self.pending_bytes);
        let room_records = self.limits.batch_records.saturating_sub(self.pending.len());
        if room_bytes > 0 && room_records > 0 {
            let mut taken = Vec::new();
            retained.take_ready(self.next_seq, room_bytes, room_records, &mut taken);
            for record in taken {
                debug_assert_eq!(record.seq, self.next_seq, "retained records have no gaps");
                self.next_seq = record.seq + 1;
                self.pending_bytes += record_bytes(&record);
                self.pending.push_back(record);
            }
        }
        if self.pending.is_empty() {
            // Nothing came since the last look. With batches on the wire the owner looks once more after the seal delay, and only
            // then asks to be woken by the next record: under load that saves the capturing threads all wake-ups.
            let tick_is_over = now.mono_us >= self.quiet_us + self.limits.seal_delay_us;
            self.armed = self.in_flight.is_empty() || !self.ticking || tick_is_over;
            self.ticking &= !self.armed;
            if self.armed {
                self.quiet_us = now.mono_us;
            }
        } else if was_empty {
            self.pending_since_us = if self.armed { now.mono_us } else { self.quiet_us };
            self.armed = false;
        }
    }

    /// How many of the pending records must be sealed now.
    fn due_count(&self, now: Now) -> Option<usize> {
        if self.pending.is_empty() {
            return None;
        }
        if let Some(index) = self.pending.iter().position(|record| record.kind == RecordKind::Checkpoint) {
            return Some(index + 1);
        }
        let due = self.pending_bytes >= self.limits.batch_bytes
            || self.pending.len() >= self.limits.batch_records
            || self.in_flight.is_empty()
            || now.mono_us >= self.pending_since_us + self.limits.seal_delay_us;
        due.then_some(self.pending.len())
    }

    fn seal(&mut self, count: usize, now: Now) -> Result<OutgoingBatch, PushError> {
        let captured_wall_us = self.pending.front().map_or(now.wall_us, |record| record.time_us);
        for _ in 0..count {
            let Some(record) = self.pending.pop_front() else { break };
            let bytes = record_bytes(&record);
            match self.sealer.push(record) {
                Ok(()) => self.pending_bytes -= bytes,
                Err(PushError::Full(record)) => {
                    self.pending.push_front(*record);
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        let batch =
            self.sealer.seal(&self.link, 0).expect("at least one record was taken, and one always fits");
        self.link.prev_batch_crc = batch.crc;
        let len_bytes = batch.len_bytes();
        self.in_flight.push_back(InFlight {
            last_seq: batch.last_seq,
            len_bytes: len_bytes as u64,
            captured_wall_us,
            sealed: now,
        });
        self.in_flight_bytes += len_bytes as u64;
        (self.quiet_us, self.pending_since_us, self.ticking) = (now.mono_us, now.mono_us, true);
        Ok(OutgoingBatch {
            first_seq: batch.first_seq,
            last_seq: batch.last_seq,
            len_bytes,
            chunks: coalesce(&batch),
        })
    }
}

fn record_bytes(record: &Record) -> usize {
    record.payload.len() + RECORD_OVERHEAD_BYTES
}

/// The batch's pieces, with runs of small ones copied together.
fn coalesce(batch: &SealedBatch) -> Vec<Bytes> {
    let mut chunks = Vec::new();
    let mut run = Vec::new();
    for piece in batch.pieces() {
        if piece.len() <= COALESCE_MAX_BYTES {
            run.push(piece);
            continue;
        }
        end_run(&mut run, &mut chunks);
        chunks.push(piece.clone());
    }
    end_run(&mut run, &mut chunks);
    chunks
}

fn end_run(run: &mut Vec<&Bytes>, chunks: &mut Vec<Bytes>) {
    match run[..] {
        [] => {}
        [piece] => chunks.push(piece.clone()),
        _ => {
            let mut together = BytesMut::with_capacity(run.iter().map(|piece| piece.len()).sum());
            run.iter().for_each(|piece| together.extend_from_slice(piece));
            chunks.push(together.freeze());
        }
    }
    run.clear();
}
