//! Which VRA this is, and which ZVM may control it.

use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::api::{VraId, ZvmId};
use crate::config::{Config, Store, StoreError};

const FORMAT: u32 = 1;

/// `<state>/identity.json`: made at the first start or enrolment, then only the ZVM and what it calls the VRA change.
#[derive(Debug)]
pub struct LocalIdentity {
    store: Store<Content>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Content {
    vra: VraId,
    zvm: Option<ZvmId>,
    #[serde(default)]
    name: Option<String>,
}

impl LocalIdentity {
    /// The identity in the state folder; a new one where there is none.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn open(config: &Config) -> Result<Self, StoreError> {
        make_folder(&config.state_dir)?;
        let path = config.state_dir.join("identity.json");
        let is_new = !path.exists();
        let mut store = Store::open(&path, FORMAT, Content { vra: VraId::random(), zvm: None, name: None })?;
        if is_new {
            store.update(|_| ())?;
        }
        Ok(Self { store })
    }

    /// This VRA's id.
    pub fn vra(&self) -> VraId {
        self.store.get().vra
    }

    /// The ZVM that enrolled it.
    pub fn zvm(&self) -> Option<ZvmId> {
        self.store.get().zvm
    }

    /// What that ZVM calls it.
    pub fn name(&self) -> Option<&str> {
        self.store.get().name.as_deref()
    }

    /// Notes the ZVM that enrolled it, and what that calls it.
    ///
    /// # Errors
    /// [`StoreError::Write`].
    pub fn set_zvm(&mut self, zvm: ZvmId, name: Option<String>) -> Result<(), StoreError> {
        self.store.update(|content| (content.zvm, content.name) = (Some(zvm), name))
    }
}

/// Makes the state folder, mode 0700, if it isn't there.
pub(super) fn make_folder(folder: &Path) -> Result<(), StoreError> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .map_err(|source| StoreError::Folder { path: folder.to_owned(), source })
}

/// Makes the folder of sockets, mode 0755: the sockets in it are 0600.
pub(super) fn make_run_folder(folder: &Path) -> Result<(), StoreError> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(folder)
        .map_err(|source| StoreError::Folder { path: folder.to_owned(), source })
}
