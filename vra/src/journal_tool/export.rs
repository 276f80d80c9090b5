//! Disks as they were, served over NBD at a unix socket.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use ublk::arena::Arena;
use ublk::nbd::{Address, ExportSettings, NbdServer};
use ublk::reactor::{ReactorSettings, Reactors};

use crate::view::ViewDisk;

/// Memory for requests: slots and their length in bytes. Enough for four busy clients.
const SLOTS: u32 = 128;
const SLOT_BYTES: usize = 128 << 10;
/// Time for requests in flight to end.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// An NBD server of disks.
pub(super) struct Exports {
    server: NbdServer,
    arena: Arena,
}

impl Exports {
    /// None yet.
    pub(super) fn new() -> anyhow::Result<Self> {
        let settings = ReactorSettings { thread_count: 1, ..ReactorSettings::for_this_host() };
        let server = NbdServer::new(Arc::new(Reactors::start(settings)?));
        Ok(Self { server, arena: Arena::new(SLOT_BYTES, SLOTS).context("no memory for requests")? })
    }

    /// One more.
    pub(super) fn add(&self, name: &str, description: String, disk: Arc<ViewDisk>) -> anyhow::Result<()> {
        let settings = ExportSettings {
            name: name.to_owned(),
            description,
            slots_per_connection: ExportSettings::SLOTS_PER_CONNECTION,
        };
        Ok(self.server.add_export(settings, disk, self.arena.clone())?)
    }

    /// Takes one away, and its clients.
    pub(super) fn remove(&self, name: &str) {
        self.server.remove_export(name, STOP_TIMEOUT);
    }

    /// Lets clients in at a socket with mode 0600.
    pub(super) fn listen(&self, socket: &Path) -> anyhow::Result<()> {
        self.server.listen(&Address::Unix { path: socket.to_owned(), mode: 0o600 })?;
        Ok(())
    }

    /// Ends, after what is in flight.
    pub(super) fn stop(&self) {
        if !self.server.stop(STOP_TIMEOUT) {
            tracing::warn!("requests in flight did not end in time");
        }
    }
}

/// A folder for a socket that nobody else can enter. It goes when this is dropped.
pub(super) struct SocketFolder(PathBuf);

impl SocketFolder {
    /// Below the folder for temporary files.
    pub(super) fn new() -> anyhow::Result<Self> {
        let name = format!("vra-journal-{}-{:08x}", std::process::id(), rand::random::<u32>());
        let path = std::env::temp_dir().join(name);
        let mut builder = std::fs::DirBuilder::new();
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        builder.create(&path).with_context(|| {
            format!("cannot create {}; TMPDIR names another place for it", path.display())
        })?;
        Ok(Self(path))
    }

    /// The socket.
    pub(super) fn socket(&self) -> PathBuf {
        self.0.join("nbd")
    }
}

impl Drop for SocketFolder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
