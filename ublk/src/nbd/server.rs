//! The NBD server: exports, listeners, and the connections that they bring to the reactor threads.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::connection::SLOTS_MIN;
use super::door;
use super::handshake::{Catalog, Offer};
use super::session::{Peer, Sessions};
use super::socket::{Address, ClientSocket, ListenError, Listener};
use super::wire::MAX_STRING_BYTES;
use crate::arena::Arena;
use crate::reactor::{Reactors, SourceHandle};
use crate::serve::Disk;

/// How a disk is offered.
#[derive(Clone, Debug)]
pub struct ExportSettings {
    /// The name that clients ask for.
    pub name: String,
    /// Text for a human.
    pub description: String,
    /// Pieces of requests that one connection may have in flight, each with a slot of the arena that stays with the connection.
    pub slots_per_connection: usize,
}

impl ExportSettings {
    /// Slots of a connection when nothing else is said: qemu sends at most 16 requests at once.
    pub const SLOTS_PER_CONNECTION: usize = 32;
}

/// Why an export cannot be added.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ExportError {
    /// The name is taken.
    #[error("there is an NBD export named {name:?} already; choose another name")]
    Exists {
        /// The name.
        name: String,
    },
    /// The name is no name in NBD.
    #[error(
        "{name:?} cannot be the name of an NBD export: names are 1 to {MAX_STRING_BYTES} bytes without NUL"
    )]
    BadName {
        /// The name.
        name: String,
    },
    /// The arena or the number of slots is too small.
    #[error("an NBD connection needs at least {SLOTS_MIN} slots of the arena, of at least one block each")]
    TooFewSlots,
}

/// What an export is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportStatus {
    /// Its name.
    pub name: String,
    /// Whether it refuses writes.
    pub read_only: bool,
    /// Sockets of clients now.
    pub sockets: usize,
}

/// Connections at once; more are hung up on.
const CONNECTIONS_MAX: usize = 1024;

/// A server of NBD exports over any number of addresses. Dropping it stops listening, and ends the connections without waiting.
pub struct NbdServer {
    reactors: Arc<Reactors>,
    exports: Arc<Exports>,
    connections: Arc<Mutex<Vec<SourceHandle>>>,
    acceptors: Mutex<Vec<Acceptor>>,
}

impl NbdServer {
    /// A server without exports and addresses, whose connections live on `reactors`.
    pub fn new(reactors: Arc<Reactors>) -> Self {
        Self { reactors, exports: Arc::default(), connections: Arc::default(), acceptors: Mutex::default() }
    }

    /// Offers a disk; buffers of its connections come from `arena`. The first export is also the default one (the empty name).
    ///
    /// # Errors
    /// [`ExportError`].
    pub fn add_export(
        &self,
        settings: ExportSettings,
        disk: Arc<dyn Disk>,
        arena: Arena,
    ) -> Result<(), ExportError> {
        let ExportSettings { name, description, slots_per_connection } = settings;
        if name.is_empty() || name.len() > MAX_STRING_BYTES || name.contains('\0') {
            return Err(ExportError::BadName { name });
        }
        let block_bytes = disk.geometry().logical_block_bytes as usize;
        if slots_per_connection < SLOTS_MIN || !arena.slot_len_bytes().is_multiple_of(block_bytes.max(1)) {
            return Err(ExportError::TooFewSlots);
        }
        let mut table = self.exports.write();
        if table.by_name.contains_key(&name) {
            return Err(ExportError::Exists { name });
        }
        let export = Export {
            name: name.clone(),
            description,
            disk,
            arena,
            slots_per_connection,
            sessions: Sessions::default(),
        };
        table.default.get_or_insert_with(|| name.clone());
        table.by_name.insert(name, Arc::new(export));
        Ok(())
    }

    /// Withdraws an export: clients are cut off, requests in flight end. True once nothing of the server holds the
    /// disk any more, false if that took longer than `timeout`.
    pub fn remove_export(&self, name: &str, timeout: Duration) -> bool {
        let export = {
            let mut table = self.exports.write();
            let Some(export) = table.by_name.remove(name) else { return true };
            if table.default.as_deref() == Some(name) {
                table.default = table.by_name.keys().next().cloned();
            }
            export
        };
        export.sessions.evict_all();
        let deadline = Instant::now() + timeout;
        while Arc::strong_count(&export) > 1 {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        true
    }

    /// Listens at a further address; the result is where exactly.
    ///
    /// # Errors
    /// [`ListenError`].
    pub fn listen(&self, address: &Address) -> Result<Address, ListenError> {
        let listener = Listener::bind(address)?;
        let bound = listener.address().clone();
        let system = |source| ListenError::System { address: bound.clone(), source };
        let stop = Arc::new(eventfd().map_err(system)?);
        let accepting = Accepting {
            listener,
            stop: Arc::clone(&stop),
            reactors: Arc::clone(&self.reactors),
            exports: Arc::clone(&self.exports),
            connections: Arc::clone(&self.connections),
        };
        let thread = std::thread::Builder::new()
            .name("nbd-accept".to_owned())
            .spawn(move || accepting.run())
            .map_err(system)?;
        lock(&self.acceptors).push(Acceptor { stop, thread: Some(thread) });
        Ok(bound)
    }

    /// How many sockets clients have open now that may write to an export. One that the client has closed doesn't count, even if its
    /// requests aren't done.
    pub fn live_writers(&self, name: &str) -> usize {
        self.exports.read().by_name.get(name).map_or(0, |export| export.sessions.live_count())
    }

    /// All exports.
    pub fn status(&self) -> Vec<ExportStatus> {
        let table = self.exports.read();
        let status = table.by_name.values().map(|export| ExportStatus {
            name: export.name.clone(),
            read_only: export.is_read_only(),
            sockets: export.sessions.socket_count(),
        });
        status.collect()
    }

    /// Stops listening and ends all connections; requests in flight are answered first. True once all have ended, false if
    /// that took longer than `timeout`.
    pub fn stop(&self, timeout: Duration) -> bool {
        lock(&self.acceptors).clear();
        let connections = std::mem::take(&mut *lock(&self.connections));
        connections.iter().for_each(SourceHandle::stop);
        let deadline = Instant::now() + timeout;
        connections
            .iter()
            .all(|connection| connection.wait(deadline.saturating_duration_since(Instant::now())))
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        self.stop(Duration::ZERO);
    }
}

impl std::fmt::Debug for NbdServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NbdServer").field("exports", &self.status()).finish_non_exhaustive()
    }
}

/// A disk as it is offered.
pub(super) struct Export {
    pub(super) name: String,
    description: String,
    pub(super) disk: Arc<dyn Disk>,
    pub(super) arena: Arena,
    pub(super) slots_per_connection: usize,
    pub(super) sessions: Sessions,
}

impl Export {
    pub(super) fn is_read_only(&self) -> bool {
        self.disk.geometry().read_only
    }
}

/// The exports of a server.
#[derive(Default)]
pub(super) struct Exports {
    table: RwLock<ExportTable>,
}

#[derive(Default)]
struct ExportTable {
    by_name: BTreeMap<String, Arc<Export>>,
    default: Option<String>,
}

impl Exports {
    fn read(&self) -> std::sync::RwLockReadGuard<'_, ExportTable> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, ExportTable> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The exports as a client sees them through its socket.
pub(super) struct View {
    exports: Arc<Exports>,
    /// The kernel tells who the client is, so that its further sockets can be told from another's: only then are several
    /// sockets offered to writers.
    peer_known: bool,
}

impl View {
    pub(super) fn new(exports: Arc<Exports>, peer: Peer) -> Self {
        Self { exports, peer_known: peer != Peer::Unknown }
    }

    pub(super) fn find_export(&self, name: &str) -> Option<Arc<Export>> {
        let table = self.exports.read();
        let name = if name.is_empty() { table.default.as_deref()? } else { name };
        table.by_name.get(name).map(Arc::clone)
    }

    pub(super) fn offer(&self, export: &Export) -> Offer {
        let geometry = export.disk.geometry();
        Offer {
            name: export.name.clone(),
            description: export.description.clone(),
            multi_conn: geometry.read_only || self.peer_known,
            geometry,
            slot_len_bytes: export.arena.slot_len_bytes(),
        }
    }
}

impl Catalog for View {
    fn names(&self) -> Vec<String> {
        self.exports.read().by_name.keys().cloned().collect()
    }

    fn find(&self, name: &str) -> Option<Offer> {
        self.find_export(name).map(|export| self.offer(&export))
    }
}

/// A thread that waits for clients; dropping it ends the thread.
struct Acceptor {
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Acceptor {
    fn drop(&mut self) {
        let one = 1_u64.to_le_bytes();
        // SAFETY: the descriptor is open for as long as `self`, and eight bytes are read from a local array.
        let written = unsafe { libc::write(self.stop.as_raw_fd(), one.as_ptr().cast(), one.len()) };
        debug_assert_eq!(written, 8, "an eventfd takes eight bytes");
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Accepting {
    listener: Listener,
    stop: Arc<OwnedFd>,
    reactors: Arc<Reactors>,
    exports: Arc<Exports>,
    connections: Arc<Mutex<Vec<SourceHandle>>>,
}

impl Accepting {
    fn run(self) {
        let address = self.listener.address();
        loop {
            match self.listener.accept(self.stop.as_fd()) {
                Ok(Some(socket)) => self.host(socket),
                Ok(None) => return,
                Err(error) => {
                    tracing::warn!(%address, %error, "cannot accept an NBD client");
                    std::thread::sleep(ACCEPT_RETRY);
                }
            }
        }
    }

    fn host(&self, socket: ClientSocket) {
        let address = self.listener.address();
        let mut connections = lock(&self.connections);
        connections.retain(|connection| !connection.has_ended());
        if connections.len() >= CONNECTIONS_MAX {
            tracing::warn!(%address, "{CONNECTIONS_MAX} NBD clients are connected: hung up on another");
            return;
        }
        let view = View::new(Arc::clone(&self.exports), socket.peer());
        match self.reactors.attach(door::builder(socket, view)) {
            Ok(handle) => connections.push(handle),
            Err(error) => tracing::warn!(%address, %error, "cannot host an NBD client"),
        }
    }
}

/// Pause after a failed accept: the usual reason is a lack of descriptors, which passes.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

fn eventfd() -> io::Result<OwnedFd> {
    // SAFETY: no memory is involved.
    let raw = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
    if raw < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call above made this descriptor and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
