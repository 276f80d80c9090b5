//! A server on its own reactor threads and a unix socket in a folder of its own.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use ublk::arena::Arena;
use ublk::nbd::{Address, ExportSettings, NbdServer};
use ublk::reactor::{ReactorSettings, Reactors};
use ublk::serve::Disk;

pub(crate) struct TestServer {
    pub(crate) server: NbdServer,
    pub(crate) address: Address,
    pub(crate) arena: Arena,
    folder: PathBuf,
}

impl TestServer {
    pub(crate) fn start(disk: Arc<dyn Disk>, slots_per_connection: usize) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("holdfast-nbd-{}-{count}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("folder");
        let settings = ReactorSettings { thread_count: 2, ring_entries: 64 };
        let reactors = Arc::new(Reactors::start(settings).expect("reactors"));
        let server = NbdServer::new(reactors);
        let arena = Arena::new(128 << 10, 256).expect("arena");
        let name = "disk".to_owned();
        let settings = ExportSettings { name, description: "a test".to_owned(), slots_per_connection };
        server.add_export(settings, disk, arena.clone()).expect("export");
        let path = folder.join("nbd.sock");
        let address = server.listen(&Address::Unix { path, mode: 0o600 }).expect("listen");
        Self { server, address, arena, folder }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.path("nbd.sock")
    }

    /// As libnbd and qemu name it.
    pub(crate) fn uri(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.socket().display())
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}
