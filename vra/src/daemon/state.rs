//! What must survive a restart.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use tokio::sync::MutexGuard;

use crate::api::{DoorRequest, FormerVm, SetTrust, ViewId, ViewInfo, VmId, VolumeId, VpgDefinition, VpgId};
use crate::config::{Store, StoreError};

const FORMAT: u32 = 1;

/// The daemon's state, `<state>/vra.json`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct State {
    /// Attached volumes.
    pub volumes: BTreeMap<VolumeId, VolumeRecord>,
    /// Definitions of the VPGs that this VRA has a part in.
    pub vpgs: BTreeMap<VpgId, VpgDefinition>,
    /// VMs that left their groups, whose files are still to go.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub letting_go: Vec<LettingGo>,
    /// The list of revoked certificates.
    pub trust: SetTrust,
    /// Views.
    #[serde(default)]
    pub views: BTreeMap<ViewId, ViewRecord>,
    /// Sockets of guests' agents.
    #[serde(default)]
    pub guest_agents: BTreeMap<VmId, PathBuf>,
    /// Cookies of ublk devices that belong to no view any more: to be deleted at start. Releases whose views ended with the daemon left them.
    pub view_cookies: Vec<u32>,
}

/// A VM that left its group, and whose files are to go, or to be set aside.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct LettingGo {
    /// The group.
    pub vpg: VpgId,
    /// Its name then.
    pub vpg_name: String,
    /// The VM.
    pub former: FormerVm,
}

/// A view.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct ViewRecord {
    /// As its opener was told; without disks before it is open.
    pub info: ViewInfo,
    /// How its disks are offered.
    pub door: DoorRequest,
    /// What it consists of, by VM and number.
    pub disks: Vec<ViewDiskRecord>,
    /// How far it is.
    pub stage: ViewStage,
}

/// What a view has of a volume.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct ViewDiskRecord {
    /// Its VM.
    pub vm: VmId,
    /// The volume.
    pub volume: VolumeId,
    /// The volume's number in the VM.
    pub number: u16,
    /// Marks its ublk device; 0 if it has none.
    pub cookie: u32,
    /// The scratch file, if it can be written.
    pub scratch: Option<PathBuf>,
}

/// How far a view is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum ViewStage {
    /// Nobody was told of it: a daemon that starts does away with it.
    Opening,
    /// It is open, and is to be after a restart.
    Open,
    /// It is to go.
    Closing,
}

/// An attached volume.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct VolumeRecord {
    /// Its VM.
    pub vm: VmId,
    /// Its VM's name.
    pub vm_name: String,
    /// Its number in the VM.
    pub number: u16,
    /// The raw file or block device.
    pub path: PathBuf,
    /// How the guest gets it.
    pub door: DoorRequest,
    /// Marks its ublk device as this volume's.
    pub cookie: u32,
    /// The ublk device's number, which it gets again.
    pub device: Option<u32>,
    /// Size in bytes when it was attached.
    pub size_bytes: u64,
    /// Logical block size when it was attached.
    pub logical_block_bytes: u32,
    /// Several VRAs serve it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub shared: bool,
}

impl State {
    /// The VPG that a VM belongs to.
    pub(super) fn vpg_of(&self, vm: VmId) -> Option<&VpgDefinition> {
        self.vpgs.values().find(|vpg| vpg.vms.iter().any(|member| member.id == vm))
    }

    /// Whether a view shows disks of a VM.
    pub(super) fn has_views_of(&self, vm: VmId) -> bool {
        self.views.values().flat_map(|record| &record.disks).any(|disk| disk.vm == vm)
    }

    /// A cookie that no device of ours has.
    pub(super) fn fresh_cookie(&self) -> u32 {
        loop {
            let cookie = rand::random();
            let used = self.volumes.values().any(|volume| volume.cookie == cookie);
            if cookie != 0 && !used && !self.view_cookies.contains(&cookie) && self.view_of(cookie).is_none()
            {
                return cookie;
            }
        }
    }

    /// The view that a ublk device belongs to.
    pub(super) fn view_of(&self, cookie: u32) -> Option<&ViewRecord> {
        self.views.values().find(|view| view.disks.iter().any(|disk| disk.cookie == cookie))
    }
}

/// The state on disk. Whoever changes what the daemon does holds [`StateFile::change`] meanwhile, so that such requests come one after the
/// other; whoever only looks uses [`StateFile::seen`] and waits for nobody.
pub(super) struct StateFile {
    store: tokio::sync::Mutex<Store<State>>,
    seen: Mutex<Arc<State>>,
}

/// The right to change the state.
pub(super) struct Change<'a> {
    store: MutexGuard<'a, Store<State>>,
    seen: &'a Mutex<Arc<State>>,
}

impl StateFile {
    /// The state in a folder; an empty one where there is none.
    pub(super) fn open(folder: &Path) -> Result<Self, StoreError> {
        let store = Store::open(&folder.join("vra.json"), FORMAT, State::default())?;
        let seen = Mutex::new(Arc::new(store.get().clone()));
        Ok(Self { store: tokio::sync::Mutex::new(store), seen })
    }

    /// The state as it was last written.
    pub(super) fn seen(&self) -> Arc<State> {
        Arc::clone(&self.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits for its turn to change the state.
    pub(super) async fn change(&self) -> Change<'_> {
        Change { store: self.store.lock().await, seen: &self.seen }
    }
}

impl Change<'_> {
    /// The state.
    pub(super) fn get(&self) -> &State {
        self.store.get()
    }

    /// Changes it, on disk first.
    pub(super) fn update<R>(&mut self, change: impl FnOnce(&mut State) -> R) -> Result<R, StoreError> {
        let result = self.store.update(change)?;
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(self.store.get().clone());
        Ok(result)
    }
}
