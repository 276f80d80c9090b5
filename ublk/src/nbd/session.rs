//! Who may write to an export (rule E1): one session at a time.
//!
//! A client that lost its connection resends what was not answered, and then writes on. Were the old socket's bytes read after
//! that, an old write would land over a new one. So a new session first evicts the old one: the old sockets are shut, what they
//! hold unread is discarded, requests already received are waited for, and only then is the new client's handshake answered.
//!
//! NBD names no sessions, so the server must tell a further socket of the same client (multi-conn) from a new one:
//!
//! - On a unix socket the kernel names the peer process. A further socket belongs to the session if it comes from the same
//!   process and none of the session's sockets has been closed by the peer: a client that reconnects closes its dead socket
//!   first, and the kernel shows that at once.
//! - Everywhere else each handshake begins a new session, and multi-conn is not offered to writers.
//!
//! A client with several sockets may also resend over one that lives when another is lost, and then write on. So requests go
//! to the disk only under the session's lock ([`Member::hand_over`]), and while there are several sockets only if their
//! own is still open at the peer: what the disk has was there before any resend, the rest never gets there. (Of
//! overlapping writes in flight the disk keeps the order in which it got them.)

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::serve::Waker;

/// Who is at the other end of a socket, as far as the kernel tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Peer {
    /// A process of this host.
    Process { pid: i32, uid: u32 },
    /// Somebody: never the same as anybody else.
    Unknown,
}

/// The socket of a member.
pub(super) trait PeerSocket: Send + Sync {
    /// Whether the peer has closed it, or its sending half.
    fn closed_by_peer(&self) -> bool;
}

/// The sessions of one export: the present one, and what is left of earlier ones.
#[derive(Clone, Default)]
pub(super) struct Sessions {
    shared: Arc<Shared>,
}

impl Sessions {
    /// A socket wants in. Its member is admitted at once, or later, when `waker` is called.
    pub(super) fn join(&self, peer: Peer, socket: Arc<dyn PeerSocket>, waker: Waker) -> Member {
        let mut state = self.shared.lock();
        let id = state.next_id;
        state.next_id += 1;
        let flags = Arc::new(Flags::default());
        let place = Place { id, socket, waker, flags: Arc::clone(&flags) };
        if !state.is_of_session(peer) {
            state.begin(peer);
        }
        state.waiting.push(place);
        state.admit_if_drained();
        self.shared.publish(&state);
        drop(state);
        Member { shared: Arc::clone(&self.shared), id, flags }
    }

    /// A socket of a read-only export wants in: any number may, and it is admitted at once.
    pub(super) fn attend(&self, socket: Arc<dyn PeerSocket>, waker: Waker) -> Member {
        let mut state = self.shared.lock();
        let id = state.next_id;
        state.next_id += 1;
        let flags = Arc::new(Flags::default());
        flags.admitted.store(true, Ordering::Release);
        state.readers.push(Place { id, socket, waker, flags: Arc::clone(&flags) });
        drop(state);
        Member { shared: Arc::clone(&self.shared), id, flags }
    }

    /// Evicts everybody: the export goes away.
    pub(super) fn evict_all(&self) {
        let mut state = self.shared.lock();
        state.begin(Peer::Unknown);
        for place in state.readers.drain(..) {
            place.evict();
        }
        self.shared.publish(&state);
    }

    /// How many sockets the present session has, or how many readers there are.
    pub(super) fn socket_count(&self) -> usize {
        let state = self.shared.lock();
        state.members.len() + state.readers.len()
    }

    /// How many sockets the present session has whose peers have not closed them.
    pub(super) fn live_count(&self) -> usize {
        let state = self.shared.lock();
        state.members.iter().filter(|place| !place.socket.closed_by_peer()).count()
    }
}

/// A socket's place in a session. Dropping it says that all its requests are done and none will come.
pub(super) struct Member {
    shared: Arc<Shared>,
    id: u64,
    flags: Arc<Flags>,
}

impl Member {
    /// Whether the handshake may be answered.
    pub(super) fn is_admitted(&self) -> bool {
        self.flags.admitted.load(Ordering::Acquire)
    }

    /// Whether another session has begun: stop, drain, and drop the member.
    pub(super) fn is_evicted(&self) -> bool {
        self.flags.evicted.load(Ordering::Acquire)
    }

    /// Hands requests to the disk by calling `hand_over`, in turn with the session's other sockets. False, and nothing done, if the
    /// session has other sockets and the peer has closed `socket`: the requests may have been sent again.
    pub(super) fn hand_over(&self, socket: &dyn PeerSocket, hand_over: impl FnOnce()) -> bool {
        let _turn = self.shared.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let stale = self.has_siblings() && socket.closed_by_peer();
        if !stale {
            hand_over();
        }
        !stale
    }

    fn has_siblings(&self) -> bool {
        self.shared.members.load(Ordering::Acquire) > 1
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.members.retain(|place| place.id != self.id);
        state.waiting.retain(|place| place.id != self.id);
        state.readers.retain(|place| place.id != self.id);
        state.draining.retain(|id| *id != self.id);
        state.admit_if_drained();
        self.shared.publish(&state);
    }
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// Length of `state.members`, for a look without the lock.
    members: AtomicUsize,
    /// Whose requests go to the disk.
    turn: Mutex<()>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self, state: &State) {
        self.members.store(state.members.len(), Ordering::Release);
    }
}

#[derive(Default)]
struct State {
    next_id: u64,
    peer: Option<Peer>,
    members: Vec<Place>,
    /// Of the same session, until `draining` is empty.
    waiting: Vec<Place>,
    /// Members of earlier sessions with requests in flight.
    draining: Vec<u64>,
    /// Sockets of a read-only export.
    readers: Vec<Place>,
}

struct Place {
    id: u64,
    socket: Arc<dyn PeerSocket>,
    waker: Waker,
    flags: Arc<Flags>,
}

impl Place {
    fn evict(&self) {
        self.flags.evicted.store(true, Ordering::Release);
        self.waker.wake();
    }
}

#[derive(Default)]
struct Flags {
    admitted: AtomicBool,
    evicted: AtomicBool,
}

impl State {
    fn is_of_session(&self, peer: Peer) -> bool {
        let mut sockets = self.members.iter().chain(&self.waiting).map(|place| &place.socket);
        let known = matches!(peer, Peer::Process { .. }) && self.peer == Some(peer);
        known && !sockets.any(|socket| socket.closed_by_peer())
    }

    fn begin(&mut self, peer: Peer) {
        self.peer = Some(peer);
        for place in self.members.drain(..) {
            self.draining.push(place.id);
            place.evict();
        }
        for place in self.waiting.drain(..) {
            place.evict();
        }
    }

    fn admit_if_drained(&mut self) {
        if !self.draining.is_empty() {
            return;
        }
        for place in self.waiting.drain(..) {
            place.flags.admitted.store(true, Ordering::Release);
            place.waker.wake();
            self.members.push(place);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::Wake;

    #[derive(Default)]
    struct Socket {
        closed: AtomicBool,
    }

    impl PeerSocket for Socket {
        fn closed_by_peer(&self) -> bool {
            self.closed.load(Ordering::Relaxed)
        }
    }

    struct Silent;

    impl Wake for Silent {
        fn wake(&self) {}
    }

    const CLIENT: Peer = Peer::Process { pid: 10, uid: 0 };
    const OTHER: Peer = Peer::Process { pid: 11, uid: 0 };

    fn join(sessions: &Sessions, peer: Peer) -> (Member, Arc<Socket>) {
        let socket = Arc::new(Socket::default());
        (sessions.join(peer, Arc::clone(&socket) as _, Arc::new(Silent)), socket)
    }

    #[test]
    fn sockets_of_one_process_are_one_session() {
        let sessions = Sessions::default();
        let (first, _) = join(&sessions, CLIENT);
        assert!(first.is_admitted() && !first.has_siblings());
        let (second, _) = join(&sessions, CLIENT);
        assert!(second.is_admitted() && first.has_siblings() && !first.is_evicted());
        drop(second);
        assert!(!first.has_siblings());
    }

    #[test]
    fn a_reconnect_waits_until_the_old_sockets_have_drained() {
        let sessions = Sessions::default();
        let (first, lost) = join(&sessions, CLIENT);
        let (second, _) = join(&sessions, CLIENT);
        lost.closed.store(true, Ordering::Relaxed);
        let (again, _) = join(&sessions, CLIENT);
        assert!(first.is_evicted() && second.is_evicted() && !again.is_admitted());
        let (sibling, _) = join(&sessions, CLIENT);
        assert!(!sibling.is_admitted() && !again.is_evicted());
        drop(first);
        assert!(!again.is_admitted());
        drop(second);
        assert!(again.is_admitted() && sibling.is_admitted() && again.has_siblings());
    }

    #[test]
    fn another_client_takes_over_and_one_who_waits_gives_way() {
        let sessions = Sessions::default();
        let (first, _) = join(&sessions, CLIENT);
        let (waiting, _) = join(&sessions, OTHER);
        assert!(first.is_evicted() && !waiting.is_admitted());
        let (last, _) = join(&sessions, CLIENT);
        assert!(waiting.is_evicted() && !last.is_admitted());
        drop(waiting);
        assert!(!last.is_admitted(), "the first client's requests still count");
        drop(first);
        assert!(last.is_admitted());
    }

    #[test]
    fn a_closed_socket_hands_nothing_over_while_a_sibling_lives() {
        let sessions = Sessions::default();
        let (first, socket) = join(&sessions, CLIENT);
        let (second, _) = join(&sessions, CLIENT);
        let mut handed = 0;
        assert!(first.hand_over(socket.as_ref(), || handed += 1));
        socket.closed.store(true, Ordering::Relaxed);
        assert!(!first.hand_over(socket.as_ref(), || handed += 1));
        drop(second);
        assert!(first.hand_over(socket.as_ref(), || handed += 1), "alone, nobody can have resent");
        assert_eq!(handed, 2);
    }

    #[test]
    fn a_socket_that_its_peer_has_closed_is_no_client_any_more() {
        let sessions = Sessions::default();
        let (_first, socket) = join(&sessions, CLIENT);
        assert_eq!(sessions.live_count(), 1);
        socket.closed.store(true, Ordering::Relaxed);
        assert_eq!((sessions.live_count(), sessions.socket_count()), (0, 1));
        let (_next, _) = join(&sessions, OTHER);
        assert_eq!(sessions.live_count(), 0, "it waits until the first one's requests are done");
    }

    #[test]
    fn unknown_peers_are_never_the_same() {
        let sessions = Sessions::default();
        let (first, _) = join(&sessions, Peer::Unknown);
        let (second, _) = join(&sessions, Peer::Unknown);
        assert!(first.is_evicted() && !second.is_admitted());
    }

    #[test]
    fn a_withdrawn_export_evicts_all() {
        let sessions = Sessions::default();
        let (first, _) = join(&sessions, CLIENT);
        let (second, _) = join(&sessions, OTHER);
        sessions.evict_all();
        assert!(first.is_evicted() && second.is_evicted());
        assert_eq!(sessions.socket_count(), 0);
    }
}
