//! A client's connection on a reactor thread: the machine, its socket, and a lane of the disk.

use std::sync::Arc;

use io_uring::{opcode, types};

use super::connection::{Connection, SLOTS_MIN};
use super::handshake::Entry;
use super::inbox::Recv;
use super::reply::SendBatch;
use super::server::{Export, View};
use super::session::{Member, PeerSocket};
use super::socket::ClientSocket;
use super::wire::option_reply;
use crate::arena::Slot;
use crate::reactor::lane_host::LaneHost;
use crate::reactor::ring::{SourceRing, Token};
use crate::reactor::{Source, SourceBuilder};

/// Time for a client to get through the handshake, in seconds: qemu and libnbd need milliseconds.
const HANDSHAKE_DEADLINE_S: u64 = 30;

const RECV: Token = Token { kind: 0, key: 0 };
const SEND: Token = Token { kind: 1, key: 0 };
const DEADLINE: Token = Token { kind: 2, key: 0 };
const CANCEL: Token = Token { kind: 3, key: 0 };

/// Makes the source of a client's connection.
pub(super) fn builder(socket: ClientSocket, view: View) -> SourceBuilder {
    Box::new(move |ring| {
        let view = Arc::new(view);
        let mut door = Door {
            socket: Arc::new(socket),
            connection: Connection::new(Arc::clone(&view) as _),
            view,
            entering: None,
            serving: None,
            recv: None,
            send: None,
            deadline: Deadline::start(ring),
            shut: Shut::No,
        };
        door.drive(ring);
        Ok(Box::new(door) as Box<dyn Source>)
    })
}

struct Door {
    socket: Arc<ClientSocket>,
    view: Arc<View>,
    connection: Connection,
    /// A client whose session is not ready yet.
    entering: Option<(Entry, Arc<Export>, Member)>,
    serving: Option<Serving>,
    recv: Option<Recv>,
    send: Option<Send>,
    deadline: Deadline,
    shut: Shut,
}

struct Serving {
    export: Arc<Export>,
    lane: LaneHost,
    /// Given up once nothing of a connection that ends can reach the disk any more.
    member: Option<Member>,
}

/// A send in flight, with all memory that the kernel may look at.
struct Send {
    batch: SendBatch,
    pieces: Vec<libc::iovec>,
    head: Box<libc::msghdr>,
}

// SAFETY: the raw pointers in `pieces` and `head` name memory that `batch` and `pieces` own, which move with them
// without changing their address; nobody else uses them.
unsafe impl std::marker::Send for Send {}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shut {
    No,
    Reading,
    Both,
}

impl Source for Door {
    fn completed(&mut self, token: Token, result: i32, _flags: u32, ring: &mut SourceRing<'_>) {
        match token {
            RECV => self.received(result),
            SEND => self.sent(result, ring),
            DEADLINE => {
                self.deadline.armed = false;
                if self.connection.is_haggling() && self.entering.is_none() {
                    self.connection.stop();
                }
            }
            CANCEL => {}
            Token { kind: Token::LANE_IO, key } => {
                if let Some(serving) = &mut self.serving {
                    serving.lane.file_completed(key, result, ring);
                }
            }
            _ => debug_assert!(false, "a token that was never given: {token:?}"),
        }
        self.drive(ring);
    }

    fn woken(&mut self, ring: &mut SourceRing<'_>) {
        if let Some(serving) = &mut self.serving {
            serving.lane.wake(ring);
        }
        self.drive(ring);
    }

    fn stopping(&mut self, ring: &mut SourceRing<'_>) {
        self.connection.finish();
        if self.connection.is_haggling() {
            self.connection.stop();
        }
        self.drive(ring);
    }

    fn finished(&self) -> bool {
        self.connection.is_over() && self.serving.as_ref().is_none_or(Serving::is_idle)
    }
}

impl Door {
    /// Does all that can be done now.
    fn drive(&mut self, ring: &mut SourceRing<'_>) {
        let evicted = |member: &Member| member.is_evicted();
        if self.serving.as_ref().and_then(|serving| serving.member.as_ref()).is_some_and(evicted)
            || self.entering.as_ref().is_some_and(|(_, _, member)| evicted(member))
        {
            self.connection.stop();
        }
        self.enter(ring);
        if let Some(serving) = &mut self.serving {
            serving.carry(&mut self.connection, self.socket.as_ref(), ring);
        }
        self.push_send(ring);
        self.push_recv(ring);
        if !self.connection.is_haggling() || self.connection.is_ending() {
            self.deadline.cancel(ring);
        }
        self.shut_if_ending();
        if self.connection.is_ending() {
            self.entering = None;
            self.leave_when_drained();
        }
    }

    /// Gets a client on from its wish to enter to a session of its export.
    fn enter(&mut self, ring: &mut SourceRing<'_>) {
        while let Some(entry) = self.connection.take_entry() {
            let Some(export) = self.view.find_export(&entry.export) else {
                self.connection.refuse(option_reply::ERR_UNKNOWN, "the export has gone");
                continue;
            };
            let socket = Arc::clone(&self.socket) as Arc<dyn PeerSocket>;
            let member = if export.is_read_only() {
                export.sessions.attend(socket, ring.waker())
            } else {
                export.sessions.join(self.socket.peer(), socket, ring.waker())
            };
            self.entering = Some((entry, export, member));
        }
        if let Some((entry, export, member)) = self.entering.take_if(|(_, _, member)| member.is_admitted()) {
            self.serve(&entry, export, member, ring);
        }
    }

    fn serve(&mut self, entry: &Entry, export: Arc<Export>, member: Member, ring: &mut SourceRing<'_>) {
        let slots: Vec<Slot> =
            std::iter::from_fn(|| export.arena.take()).take(export.slots_per_connection).collect();
        if slots.len() < SLOTS_MIN {
            tracing::warn!(export = %export.name, "no buffers left for an NBD connection: refused");
            self.connection.refuse(option_reply::ERR_POLICY, "no buffers left for another connection");
            return;
        }
        match LaneHost::open(Arc::clone(&export.disk), export.arena.clone(), ring) {
            Ok(lane) => {
                self.connection.enter(&self.view.offer(&export), entry, slots);
                self.serving = Some(Serving { export, lane, member: Some(member) });
            }
            Err(error) => {
                tracing::warn!(export = %export.name, %error, "cannot open the disk for an NBD connection");
                self.connection.refuse(option_reply::ERR_POLICY, "the server cannot open the disk");
            }
        }
    }

    fn received(&mut self, result: i32) {
        let Some(recv) = self.recv.take() else { return };
        match usize::try_from(result) {
            Ok(received_bytes) => {
                self.connection.received(recv, received_bytes);
            }
            Err(_) => {
                if !matches!(-result, libc::EINTR | libc::EAGAIN) {
                    self.connection.stop();
                }
                self.connection.unreceived(recv);
            }
        }
    }

    fn sent(&mut self, result: i32, ring: &mut SourceRing<'_>) {
        let Some(mut send) = self.send.take() else { return };
        let all_sent = match usize::try_from(result) {
            Ok(sent_bytes) => send.batch.advance(sent_bytes),
            Err(_) => {
                if !matches!(-result, libc::EINTR | libc::EAGAIN) {
                    self.connection.stop();
                }
                false
            }
        };
        if all_sent || self.connection.is_stopped() {
            self.connection.sent(send.batch);
        } else {
            self.submit_send(send.batch, send.pieces, ring);
        }
    }

    fn push_recv(&mut self, ring: &mut SourceRing<'_>) {
        if self.recv.is_some() {
            return;
        }
        let Some(recv) = self.connection.next_recv() else { return };
        let recv = self.recv.insert(recv);
        let flags = if recv.wants_all() { libc::MSG_WAITALL } else { 0 };
        let buffer = recv.buffer();
        let entry = opcode::Recv::new(types::Fd(self.socket.raw()), buffer.as_mut_ptr(), buffer.len() as u32)
            .flags(flags)
            .build();
        // SAFETY: `self.recv` owns the memory, at this address, until the completion takes it; the socket is open for as long as
        // the source.
        unsafe { ring.push(RECV, entry) };
    }

    fn push_send(&mut self, ring: &mut SourceRing<'_>) {
        if self.send.is_none()
            && let Some(batch) = self.connection.next_send()
        {
            self.submit_send(batch, Vec::new(), ring);
        }
    }

    fn submit_send(&mut self, batch: SendBatch, mut pieces: Vec<libc::iovec>, ring: &mut SourceRing<'_>) {
        pieces.clear();
        pieces.extend(
            batch.slices().map(|slice| libc::iovec {
                iov_base: slice.as_ptr().cast_mut().cast(),
                iov_len: slice.len(),
            }),
        );
        // SAFETY: a msghdr of zeroes is valid: no name, no pieces, no control data.
        let mut head: Box<libc::msghdr> = Box::new(unsafe { std::mem::zeroed() });
        head.msg_iov = pieces.as_mut_ptr();
        head.msg_iovlen = pieces.len();
        let send = self.send.insert(Send { batch, pieces, head });
        let entry = opcode::SendMsg::new(types::Fd(self.socket.raw()), &raw const *send.head)
            .flags((libc::MSG_NOSIGNAL | libc::MSG_WAITALL) as u32)
            .build();
        // SAFETY: `self.send` owns head, pieces and what they name, at these addresses, until the completion takes it.
        unsafe { ring.push(SEND, entry) };
    }

    /// Ends what is in flight on the socket of a connection that ends.
    fn shut_if_ending(&mut self) {
        let wanted = match (self.connection.is_stopped(), self.connection.is_ending()) {
            (true, _) => Shut::Both,
            (false, true) if self.recv.is_some() => Shut::Reading,
            _ => return,
        };
        if self.shut != Shut::Both && self.shut != wanted {
            self.socket.shut(wanted == Shut::Both);
            self.shut = wanted;
        }
    }

    /// Leaves the session once nothing of this connection can reach the disk any more.
    fn leave_when_drained(&mut self) {
        if let Some(serving) = &mut self.serving
            && serving.member.is_some()
            && serving.is_idle()
            && self.connection.is_over_for_disk()
        {
            serving.member = None;
        }
    }
}

impl Serving {
    /// Carries requests to the lane and completions back until neither has more.
    fn carry(&mut self, connection: &mut Connection, socket: &dyn PeerSocket, ring: &mut SourceRing<'_>) {
        loop {
            let mut moved = false;
            if connection.has_requests()
                && let Some(member) = &self.member
            {
                let lane = &mut self.lane;
                let current = member.hand_over(socket, || {
                    while let Some(request) = connection.next_request() {
                        lane.request(request, ring);
                    }
                });
                if !current {
                    connection.stop();
                }
                moved = true;
            }
            while let Some(query) = connection.next_query() {
                let extents = self.export.disk.extents(query.offset_bytes, query.len_bytes, query.count_max);
                connection.answer(query, &extents);
                moved = true;
            }
            for completion in self.lane.completions() {
                connection.complete(completion);
                moved = true;
            }
            if !moved {
                return;
            }
        }
    }

    fn is_idle(&self) -> bool {
        self.lane.transfer_count() == 0
    }
}

/// The timer of the handshake.
struct Deadline {
    /// Where the kernel reads the time when the timer is pushed; boxed, because it holds the address.
    _time: Box<types::Timespec>,
    armed: bool,
    cancelled: bool,
}

impl Deadline {
    fn start(ring: &mut SourceRing<'_>) -> Self {
        let time = Box::new(types::Timespec::new().sec(HANDSHAKE_DEADLINE_S));
        // SAFETY: the time is boxed and lives as long as the source.
        unsafe { ring.push(DEADLINE, opcode::Timeout::new(&raw const *time).build()) };
        Self { _time: time, armed: true, cancelled: false }
    }

    fn cancel(&mut self, ring: &mut SourceRing<'_>) {
        if self.armed && !self.cancelled {
            self.cancelled = true;
            ring.cancel(CANCEL, DEADLINE);
        }
    }
}
