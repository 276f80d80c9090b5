use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::api::VmId;
use crate::config::{Store, StoreError};

const FORMAT: u32 = 1;

/// Guests that are frozen, or are just going to be, or may still be: a file that is written before a guest is frozen.
pub struct FrozenGuests {
    store: Mutex<Store<BTreeMap<VmId, FrozenGuest>>>,
}

/// A guest that may be frozen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrozenGuest {
    /// Its VM's name.
    pub name: String,
    /// Its agent's socket.
    pub socket: PathBuf,
}

impl FrozenGuests {
    /// Those noted in a folder.
    ///
    /// # Errors
    /// The file can't be read.
    pub fn open(folder: &Path) -> Result<Self, StoreError> {
        let store = Store::open(&folder.join("frozen-guests.json"), FORMAT, BTreeMap::new())?;
        Ok(Self { store: Mutex::new(store) })
    }

    /// Those that may be frozen.
    pub fn all(&self) -> BTreeMap<VmId, FrozenGuest> {
        self.lock().get().clone()
    }

    /// Notes one; it may be frozen once this has returned.
    ///
    /// # Errors
    /// The file can't be written: it must not be frozen.
    pub fn note(&self, vm: VmId, guest: FrozenGuest) -> Result<(), StoreError> {
        self.lock().update(|all| all.insert(vm, guest)).map(drop)
    }

    /// One that is thawed for certain.
    ///
    /// # Errors
    /// The file can't be written: it is thawed once more at the next start, which is harmless.
    pub fn forget(&self, vm: VmId) -> Result<(), StoreError> {
        let mut store = self.lock();
        if !store.get().contains_key(&vm) {
            return Ok(());
        }
        store.update(|all| all.remove(&vm)).map(drop)
    }

    fn lock(&self) -> MutexGuard<'_, Store<BTreeMap<VmId, FrozenGuest>>> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
