//! One client's connection as a machine: received bytes and the disk's completions in; requests for the disk and replies
//! out. It owns all memory that they use, has a bound on everything that a client can make it keep, and knows no socket.
//!
//! The driver calls it with what happened and then asks, until all three say no: [`Connection::next_request`],
//! [`Connection::next_send`], [`Connection::next_recv`].

use std::sync::Arc;

use zerocopy::FromBytes;

use super::handshake::{Catalog, Entry, Handshake, Offer, Step};
use super::inbox::{INBOX_BYTES, Inbox, Recv, RecvMemory};
use super::jobs::{Done, Jobs};
use super::reply::{Outbox, SendBatch};
use super::request::{Terms, Verdict, Work, judge};
use super::wire::RequestHead;
use crate::arena::Slot;
use crate::serve::{Completion, Extent, Request};

/// Least slots of a connection in transmission: one stays free of reads, so that a client that writes before it takes its
/// replies gets on.
pub const SLOTS_MIN: usize = 2;

/// Payloads above this length make the next receive take a head alone, so that a stream of large writes goes to slots
/// without a copy.
const LARGE_PAYLOAD_BYTES: u32 = 32 << 10;

/// The machine.
pub struct Connection {
    catalog: Arc<dyn Catalog>,
    phase: Phase,
    end: End,
    inbox: Inbox,
    intake: Intake,
    /// The last request had a large payload.
    after_large: bool,
    outbox: Outbox,
    receiving: bool,
    sending: bool,
}

/// A question for the disk about how a range is allocated.
#[derive(Clone, Copy, Debug)]
pub struct ExtentQuery {
    job: u32,
    /// First byte of the range.
    pub offset_bytes: u64,
    /// Length of the range, in bytes.
    pub len_bytes: u64,
    /// How many extents the answer may have.
    pub count_max: usize,
}

impl ExtentQuery {
    pub(super) fn new(job: u32, work: &Work, count_max: usize) -> Self {
        Self { job, offset_bytes: work.offset_bytes, len_bytes: u64::from(work.len_bytes), count_max }
    }
}

impl Connection {
    /// A new connection, which greets its client.
    pub fn new(catalog: Arc<dyn Catalog>) -> Self {
        let mut greeting = Vec::new();
        let handshake = Handshake::new(&mut greeting);
        let mut outbox = Outbox::default();
        outbox.raw(greeting);
        Self {
            catalog,
            phase: Phase::Haggling(handshake),
            end: End::No,
            inbox: Inbox::new(),
            intake: Intake::Head,
            after_large: false,
            outbox,
            receiving: false,
            sending: false,
        }
    }

    /// The client's wish to enter transmission, once; to be answered by [`Connection::enter`] or [`Connection::refuse`].
    pub fn take_entry(&mut self) -> Option<Entry> {
        match &mut self.phase {
            Phase::Entering { entry, .. } => entry.take(),
            _ => None,
        }
    }

    /// Lets the client enter. `slots`, at least [`SLOTS_MIN`] of one arena, serve its requests until the end; no more than
    /// that many pieces are in flight at once.
    pub fn enter(&mut self, offer: &Offer, entry: &Entry, slots: Vec<Slot>) {
        debug_assert!(slots.len() >= SLOTS_MIN);
        let Phase::Entering { handshake, .. } = &mut self.phase else { return };
        let mut out = Vec::new();
        handshake.enter(offer, &mut out);
        self.outbox.raw(out);
        self.phase = Phase::Serving(Box::new(Jobs::new(Terms::new(offer, entry.agreed), slots)));
        self.pump();
    }

    /// Keeps the client out, with an error of [`option_reply`](super::wire::option_reply) and a text for a human.
    pub fn refuse(&mut self, error: u32, text: &str) {
        let phase = std::mem::replace(&mut self.phase, Phase::Over);
        let Phase::Entering { mut handshake, .. } = phase else {
            self.phase = phase;
            return;
        };
        let mut out = Vec::new();
        if matches!(handshake.refuse(error, text, &mut out), Step::Close) {
            self.finish();
        }
        self.outbox.raw(out);
        self.phase = Phase::Haggling(handshake);
        self.pump();
    }

    /// Whether there is a request for the disk.
    pub fn has_requests(&self) -> bool {
        matches!(&self.phase, Phase::Serving(jobs) if jobs.has_requests())
    }

    /// The next request for the disk.
    pub fn next_request(&mut self) -> Option<Request> {
        self.jobs()?.next_request()
    }

    /// The next question about allocation, to be answered at once by [`Connection::answer`].
    pub fn next_query(&mut self) -> Option<ExtentQuery> {
        self.jobs()?.next_query()
    }

    /// Takes the answer to a question.
    pub fn answer(&mut self, query: ExtentQuery, extents: &[Extent]) {
        if let Phase::Serving(jobs) = &mut self.phase {
            jobs.answer(query.job, &query, extents, &mut self.outbox);
        }
        self.pump();
    }

    /// Takes the end of a request.
    pub fn complete(&mut self, completion: Completion) {
        if let Phase::Serving(jobs) = &mut self.phase
            && matches!(jobs.complete(completion, &mut self.outbox), Done::CannotAnswer)
        {
            self.stop();
        }
        self.pump();
    }

    /// The next replies to be sent, one batch at a time; it comes back by [`Connection::sent`].
    pub fn next_send(&mut self) -> Option<SendBatch> {
        if self.sending || self.end == End::Stopped {
            return None;
        }
        let batch = self.outbox.next_batch()?;
        self.sending = true;
        Some(batch)
    }

    /// Takes back a batch that is sent whole, or whose send failed after [`Connection::stop`].
    pub fn sent(&mut self, batch: SendBatch) {
        self.sending = false;
        let mut slots = Vec::new();
        self.outbox.take_back(batch, &mut slots);
        if let Phase::Serving(jobs) = &mut self.phase {
            jobs.give_slots(slots);
        }
        self.pump();
    }

    /// The next receive to be made, one at a time; it comes back by [`Connection::received`].
    pub fn next_recv(&mut self) -> Option<Recv> {
        if self.receiving || self.end != End::No {
            return None;
        }
        let recv = match (&self.phase, &mut self.intake) {
            (Phase::Haggling(_), _) if self.outbox.is_empty() && !self.sending => {
                self.inbox.lend(INBOX_BYTES)
            }
            (Phase::Serving(jobs), Intake::Head) if jobs.takes_more(&self.outbox) => {
                let alone = self.after_large && self.inbox.unread().is_empty();
                self.inbox.lend(if alone { size_of::<RequestHead>() } else { INBOX_BYTES })
            }
            (Phase::Serving(_), Intake::Payload { filling, .. }) => {
                let filling = filling.as_mut();
                filling.and_then(|filling| {
                    let slot = filling.slot.take()?;
                    Some(Recv::into_slot(slot, filling.filled, filling.want))
                })
            }
            (Phase::Serving(_), Intake::Skip { .. }) => self.inbox.lend(INBOX_BYTES),
            _ => None,
        };
        self.receiving = recv.is_some();
        recv
    }

    /// Takes back a receive with `received_bytes` in it; none means that the client sends no more.
    pub fn received(&mut self, recv: Recv, received_bytes: usize) {
        self.receiving = false;
        match recv.into_memory() {
            RecvMemory::Inbox(bytes) => self.inbox.take_back(bytes, received_bytes),
            RecvMemory::Slot(slot) => self.slot_received(slot, received_bytes),
        }
        if self.end == End::Stopped {
            self.stop();
        } else if received_bytes == 0 {
            self.finish();
        }
        self.pump();
    }

    /// Takes back a receive that brought nothing for a passing reason, or failed after [`Connection::stop`].
    pub fn unreceived(&mut self, recv: Recv) {
        self.receiving = false;
        match recv.into_memory() {
            RecvMemory::Inbox(bytes) => self.inbox.take_back(bytes, 0),
            RecvMemory::Slot(slot) => self.slot_received(slot, 0),
        }
        if self.end == End::Stopped {
            self.stop();
        }
    }

    /// Ends the connection at once: nothing more is received or sent, what was received but not given to the disk is thrown
    /// away. Requests at the disk are waited for ([`Connection::is_drained`]).
    pub fn stop(&mut self) {
        self.end = End::Stopped;
        self.inbox.clear();
        let mut slots = Vec::new();
        self.outbox.clear(&mut slots);
        slots.extend(self.abandon_payload());
        if let Phase::Serving(jobs) = &mut self.phase {
            jobs.stop();
            jobs.give_slots(slots);
        }
    }

    /// Lets requests in flight be answered, takes no new ones, then ends.
    pub fn finish(&mut self) {
        if self.end != End::No {
            return;
        }
        self.end = End::Finishing;
        self.inbox.clear();
        let slot = self.abandon_payload();
        if let Phase::Serving(jobs) = &mut self.phase {
            jobs.give_slots(slot);
        }
    }

    /// Whether no request is at the disk, nor will be if the connection was stopped.
    pub fn is_drained(&self) -> bool {
        match &self.phase {
            Phase::Serving(jobs) => jobs.at_disk() == 0,
            _ => true,
        }
    }

    /// Whether nothing is at the disk, and nothing will be.
    pub fn is_over_for_disk(&self) -> bool {
        let jobs = matches!(&self.phase, Phase::Serving(jobs) if jobs.any() || jobs.at_disk() > 0);
        match self.end {
            End::No => false,
            End::Stopped => self.is_drained(),
            End::Finishing => !jobs,
        }
    }

    /// Whether the connection is over and none of its memory is lent: it may be dropped and its socket closed.
    pub fn is_over(&self) -> bool {
        let idle = match self.end {
            End::No => false,
            End::Stopped => self.is_drained(),
            End::Finishing => {
                let no_jobs = !matches!(&self.phase, Phase::Serving(jobs) if jobs.any());
                no_jobs && self.outbox.is_empty()
            }
        };
        idle && !self.receiving && !self.sending
    }

    /// Whether it is ending; a receive in flight should then be ended by shutting the socket for reading.
    pub fn is_ending(&self) -> bool {
        self.end != End::No
    }

    /// Whether it was stopped; a send in flight should then be ended by shutting the socket.
    pub fn is_stopped(&self) -> bool {
        self.end == End::Stopped
    }

    /// Whether the client is still in the handshake.
    pub fn is_haggling(&self) -> bool {
        matches!(self.phase, Phase::Haggling(_) | Phase::Entering { .. })
    }

    fn jobs(&mut self) -> Option<&mut Jobs> {
        match &mut self.phase {
            Phase::Serving(jobs) => Some(jobs),
            _ => None,
        }
    }

    /// Goes on as far as the bytes and the memory at hand allow.
    fn pump(&mut self) {
        loop {
            if let Phase::Serving(jobs) = &mut self.phase {
                jobs.issue(&mut self.outbox);
            }
            if self.end != End::No || self.receiving || !self.take_in() {
                return;
            }
        }
    }

    /// Understands the next piece of what was received. False if it needs more, or must wait.
    fn take_in(&mut self) -> bool {
        match &mut self.phase {
            Phase::Haggling(_) => self.outbox.is_empty() && !self.sending && self.haggle(),
            Phase::Serving(jobs) => match &mut self.intake {
                Intake::Head => jobs.takes_more(&self.outbox) && self.head(),
                Intake::Payload { .. } => self.payload(),
                Intake::Skip { rest_bytes } => {
                    let skipped = self.inbox.unread().len().min(*rest_bytes as usize);
                    self.inbox.consume(skipped);
                    *rest_bytes -= skipped as u32;
                    if *rest_bytes == 0 {
                        self.intake = Intake::Head;
                        return true;
                    }
                    false
                }
            },
            Phase::Entering { .. } | Phase::Over => false,
        }
    }

    fn haggle(&mut self) -> bool {
        let Phase::Haggling(handshake) = &mut self.phase else { return false };
        let mut out = Vec::new();
        let (used, step) = handshake.receive(self.inbox.unread(), self.catalog.as_ref(), &mut out);
        self.inbox.consume(used);
        self.outbox.raw(out);
        match step {
            Step::More => used > 0,
            Step::Close => {
                self.finish();
                false
            }
            Step::Enter(entry) => {
                if let Phase::Haggling(handshake) = std::mem::replace(&mut self.phase, Phase::Over) {
                    self.phase = Phase::Entering { handshake, entry: Some(entry) };
                }
                false
            }
        }
    }

    fn head(&mut self) -> bool {
        let Phase::Serving(jobs) = &mut self.phase else { return false };
        let Ok((head, _)) = RequestHead::read_from_prefix(self.inbox.unread()) else { return false };
        self.inbox.consume(size_of::<RequestHead>());
        self.after_large = false;
        match judge(&head, jobs.terms()) {
            Verdict::Run(work) => {
                if let Some(job) = jobs.begin(head.cookie.get(), work, &mut self.outbox) {
                    self.after_large = work.len_bytes > LARGE_PAYLOAD_BYTES;
                    self.intake = Intake::Payload { job, filling: None };
                }
            }
            Verdict::Refuse { error, text, payload_bytes } => {
                jobs.refuse(head.cookie.get(), error, text, &mut self.outbox);
                if payload_bytes > 0 {
                    self.intake = Intake::Skip { rest_bytes: payload_bytes };
                }
            }
            Verdict::Disconnect => self.finish(),
            Verdict::Broken => self.stop(),
        }
        true
    }

    /// Gets on with a write's payload: a slot for its next piece, and whatever of it came with the head.
    fn payload(&mut self) -> bool {
        let (Phase::Serving(jobs), Intake::Payload { job, filling }) = (&mut self.phase, &mut self.intake)
        else {
            return false;
        };
        if filling.is_none() {
            let fresh = jobs.slot_for_payload(*job);
            *filling = fresh.map(|(slot, want)| Filling { slot: Some(slot), filled: 0, want });
        }
        let Some(Filling { slot: Some(slot), filled, want }) = filling else { return false };
        let unread = self.inbox.unread();
        let copied = unread.len().min(*want - *filled);
        slot[*filled..*filled + copied].copy_from_slice(&unread[..copied]);
        *filled += copied;
        self.inbox.consume(copied);
        let full = filled == want;
        if full {
            self.issue_filled();
        }
        full
    }

    fn slot_received(&mut self, slot: Slot, received_bytes: usize) {
        match &mut self.intake {
            Intake::Payload { filling: Some(filling), .. } if filling.slot.is_none() => {
                filling.filled = filling.want.min(filling.filled + received_bytes);
                let full = filling.filled == filling.want;
                filling.slot = Some(slot);
                if full && received_bytes > 0 {
                    self.issue_filled();
                }
            }
            _ => {
                if let Phase::Serving(jobs) = &mut self.phase {
                    jobs.give_slots([slot]);
                }
            }
        }
    }

    fn issue_filled(&mut self) {
        let (Phase::Serving(jobs), Intake::Payload { job, filling }) = (&mut self.phase, &mut self.intake)
        else {
            return;
        };
        if let Some(Filling { slot: Some(slot), .. }) = filling.take()
            && jobs.issue_payload(*job, slot)
        {
            self.intake = Intake::Head;
        }
    }

    /// Gives up a write whose payload will not come. Pieces of it that are at the disk are waited for.
    fn abandon_payload(&mut self) -> Option<Slot> {
        let Intake::Payload { job, filling } = std::mem::replace(&mut self.intake, Intake::Head) else {
            return None;
        };
        if let Phase::Serving(jobs) = &mut self.phase {
            jobs.abandon(job);
        }
        filling.and_then(|filling| filling.slot)
    }
}

enum Phase {
    Haggling(Handshake),
    /// Waiting for the driver's answer to `entry`, which it takes.
    Entering {
        handshake: Handshake,
        entry: Option<Entry>,
    },
    Serving(Box<Jobs>),
    /// Between two of the others.
    Over,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    No,
    /// No new requests; those in flight are answered.
    Finishing,
    /// Nothing is sent or received any more.
    Stopped,
}

/// What the next bytes are.
enum Intake {
    Head,
    Payload { job: u32, filling: Option<Filling> },
    Skip { rest_bytes: u32 },
}

/// A slot that a write's payload is received into.
struct Filling {
    /// Absent while it is lent to a receive.
    slot: Option<Slot>,
    filled: usize,
    want: usize,
}
