//! One VM at its target, for the daemon: its state, its checkpoints, its disks as they were.

mod defining;
mod events;
mod file_watch;
mod journal_size;
mod kept_locks;
mod locks;
mod opening;
mod pins;
mod preserving;
mod reopen;
mod scrubbing;
mod site_keys;
mod space;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use journal::bad_ranges::BadRanges;
use journal::promotion::TransferSizes;
use journal::view::Promoted;
use journal::walk::Finding;
use journal::writer::{ChangeError, Writer};
use tokio::runtime::Handle;
use tokio::sync::{Notify, oneshot};

use super::checkpoint_list::{CheckpointList, ListedCheckpoint};
use super::files::{self, VmFiles};
use super::folder::VmFolder;
use super::manifest::{LockedCheckpoint, Manifest};
use super::receiver::Receiver;
use super::receiver_types::{Pins, ReceiverPolicy, ReceiverStatus};
use super::shared_keys::SharedKeys;
use super::target_error::TargetError;
use super::target_host::TargetSettings;
use super::view_memory::ViewMemory;
use super::worker::{Attached, Input, VmKey, Worker};
use file_watch::OpenedFiles;
use kept_locks::Kept;
use pins::PinBook;

pub use opening::OpenedView;
pub use pins::Pin;

use crate::api::{
    JournalId, TimeUs, VmId, VraId,
    status::{Alert, ScrubStatus, TargetState, TargetVmStatus},
    vpg::{VmDefinition, VpgDefinition},
};

/// What the VMs of a host share.
pub(super) struct HostParts {
    pub(super) settings: TargetSettings,
    pub(super) keys: SharedKeys,
    pub(super) view_memory: Arc<ViewMemory>,
}

/// A VM at its target.
pub struct TargetVm {
    vm: VmId,
    folder: VmFolder,
    worker: Worker,
    runtime: Handle,
    settings: TargetSettings,
    keys: SharedKeys,
    view_memory: Arc<ViewMemory>,
    /// What open views follow.
    promoted: Promoted,
    /// Rung when a lock is told to be in the way.
    lock_told: Notify,
    /// Rung when it follows another definition.
    redefined: Notify,
    /// The process ends.
    is_leaving: Arc<AtomicBool>,
    /// Held while locks change: who takes one back must not take back what another request was promised.
    locking: tokio::sync::Mutex<()>,
    inner: Mutex<Inner>,
}

struct Inner {
    manifest: Manifest,
    /// Where the worker has it; none while its files are closed.
    key: Option<VmKey>,
    next_key: Box<dyn FnMut() -> VmKey + Send>,
    status: Arc<Mutex<ReceiverStatus>>,
    alerts: BTreeMap<&'static str, Alert>,
    /// What the scrub told last, and what it found.
    scrub: Option<ScrubStatus>,
    scrub_damage: BTreeMap<u64, Vec<Finding>>,
    pins: PinBook,
    /// Locks that are in the manifest no more, but may be in the file still: what they keep stays until they aren't.
    releasing: Vec<LockedCheckpoint>,
    /// The files that are open, or were before they failed.
    opened_files: OpenedFiles,
    /// Where each volume's history began when the files were attached.
    volume_bases: Vec<u64>,
    /// What was last told of the recovery disks.
    told_bad_ranges: BadRanges,
    /// What was free on the datastore when it was last looked at.
    datastore_free_bytes: Option<u64>,
    /// How often the files were opened again.
    reopenings: u64,
    /// Since when views can't be kept, by their pins' numbers.
    not_kept_since: BTreeMap<u64, Instant>,
    /// Locks that have overlays, or are to have them again, by their numbers.
    kept_locks: BTreeMap<u64, Kept>,
    /// The locked checkpoint that keeps a full journal from making room.
    lock_in_the_way: Option<u64>,
    /// A task sees to that.
    is_keeping_lock: bool,
    /// Through which number open views are to make way.
    wanted_way: Option<u64>,
    /// A task sees to that.
    is_making_way: bool,
    closed: bool,
    not_open: Option<String>,
}

impl TargetVm {
    /// Attaches opened files to a worker, which keeps the history from the lowest of `awaited` on.
    pub(super) fn attach(
        folder: VmFolder,
        files: VmFiles,
        worker: Worker,
        host: HostParts,
        awaited: Vec<u64>,
        mut next_key: Box<dyn FnMut() -> VmKey + Send>,
    ) -> Arc<Self> {
        let HostParts { settings, keys, view_memory } = host;
        let key = next_key();
        let (mut manifest, vm) = (files.manifest.clone(), files.identity.vm);
        let superblock = &files.opened.superblock;
        let overlays = files.overlays.clone();
        let lost = manifest.forget_stale_locks(superblock, &overlays);
        let is_wanted = |cut: &u64| {
            let is_wanted = manifest.locked.iter().any(|locked| locked.cut == *cut) || awaited.contains(cut);
            is_wanted && *cut < superblock.oldest_seq()
        };
        // What nothing was promoted past yet is copied anew if need be.
        let (wanted, unwanted): (BTreeSet<u64>, BTreeSet<u64>) = overlays.into_iter().partition(is_wanted);
        let mut pins = PinBook::awaiting(awaited);
        let former: Vec<(u64, u64)> =
            wanted.iter().map(|cut| (*cut, pins.await_overlays(*cut, superblock.oldest_seq()))).collect();
        let is_noted = manifest == files.manifest;
        let runtime = Handle::current();
        let bad_ranges = files.opened.bad_ranges.clone();
        let opened_files = OpenedFiles::of(&folder, &files);
        let volume_bases = superblock.volumes.iter().map(|volume| volume.base_seq).collect();
        let target = Arc::new_cyclic(|weak| {
            let needed = pins.needed(&manifest.locked);
            let status =
                attach_files(&worker, key, files, &manifest, settings.window_bytes, needed, weak.clone());
            let inner = Inner {
                manifest,
                key: Some(key),
                next_key,
                status,
                alerts: BTreeMap::new(),
                wanted_way: None,
                is_making_way: false,
                scrub: None,
                scrub_damage: BTreeMap::new(),
                opened_files,
                volume_bases,
                pins,
                releasing: Vec::new(),
                not_kept_since: BTreeMap::new(),
                kept_locks: BTreeMap::new(),
                lock_in_the_way: None,
                is_keeping_lock: false,
                told_bad_ranges: BadRanges::default(),
                datastore_free_bytes: None,
                reopenings: 0,
                closed: false,
                not_open: None,
            };
            let promoted = Promoted::new(&bad_ranges);
            let (locking, inner) = (tokio::sync::Mutex::default(), Mutex::new(inner));
            let (lock_told, redefined) = (Notify::new(), Notify::new());
            let is_leaving = Arc::default();
            Self {
                vm,
                folder,
                worker,
                runtime,
                settings,
                keys,
                view_memory,
                promoted,
                locking,
                lock_told,
                redefined,
                is_leaving,
                inner,
            }
        });
        if !is_noted {
            // Nobody waits for it: should it be lost, it is found out again.
            target.write_manifest(&target.lock());
        }
        target.tell_bad_ranges(&bad_ranges);
        target.tell_lost(&lost);
        unwanted.into_iter().for_each(|cut| target.remove_overlays(cut));
        former.into_iter().for_each(|(cut, pin)| target.await_overlays(cut, pin));
        target
    }

    /// The VM.
    pub fn id(&self) -> VmId {
        self.vm
    }

    /// Where its files are.
    pub fn folder(&self) -> &VmFolder {
        &self.folder
    }

    /// Its journal.
    pub fn journal(&self) -> JournalId {
        self.definition().journal
    }

    /// The VRA that may write to it.
    pub fn source(&self) -> VraId {
        self.definition().source.id
    }

    /// Waits until another VRA than this one may write to it.
    pub(super) async fn moved_from(&self, source: VraId) {
        loop {
            let redefined = self.redefined.notified();
            if self.source() != source {
                return;
            }
            redefined.await;
        }
    }

    /// Its definition.
    pub fn definition(&self) -> VmDefinition {
        self.lock().manifest.vm().expect("checked when the manifest was read or set").clone()
    }

    /// Its group.
    pub fn vpg(&self) -> VpgDefinition {
        self.lock().manifest.vpg.clone()
    }

    /// Its state.
    pub fn status(&self) -> TargetVmStatus {
        let inner = self.lock();
        let definition = inner.manifest.vm().expect("checked when the manifest was read or set");
        let status = inner.status.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let open = inner.key.is_some();
        let forecast = match inner.datastore_free_bytes {
            Some(free_bytes) => {
                let used_bytes = status.journal_used_bytes;
                status.forecast.within_datastore(used_bytes, free_bytes, definition.history_s)
            }
            None => status.forecast,
        };
        TargetVmStatus {
            vm: self.vm,
            name: definition.name.clone(),
            vpg: inner.manifest.vpg.id,
            source: definition.source.id,
            state: if open { status.state } else { TargetState::Poisoned },
            connected: open && status.connected,
            journal: definition.journal,
            generation: status.generation,
            durable_through: status.durable_through,
            history_from_us: status.history.map(|history| TimeUs(history.from_us)),
            history_to_us: status.history.map(|history| TimeUs(history.to_us)),
            checkpoint_count: status.history.map_or(0, |history| history.count),
            journal_used_bytes: status.journal_used_bytes,
            journal_limit_bytes: status.journal_limit_bytes,
            write_rate_bytes_per_s: forecast.write_rate_bytes_per_s,
            reachable_history_s: forecast.reachable_history_s,
            limit_reached_in_s: forecast.limit_reached_in_s,
            site_key: status.site_key.map(|id| id.to_string()),
            scrub: inner.scrub,
            received_bytes: status.received_bytes,
            folder: self.folder.path().to_owned(),
        }
    }

    /// When the last batch came, by the system's clock, in microseconds since the Unix epoch.
    pub fn last_receive_us(&self) -> Option<TimeUs> {
        let status = self.lock().status.clone();
        let last = status.lock().unwrap_or_else(PoisonError::into_inner).last_receive_wall_us;
        last.map(TimeUs)
    }

    /// What is wrong now.
    pub fn alerts(&self) -> Vec<Alert> {
        self.lock().alerts.values().cloned().collect()
    }

    /// Its checkpoints, oldest first, with those that are locked and older than the history.
    ///
    /// # Errors
    /// Its files are not open.
    pub async fn checkpoints(&self) -> Result<CheckpointList, TargetError> {
        let mut list = self.history().await?;
        let inner = self.lock();
        for locked in inner.manifest.locked.iter().filter(|locked| inner.kept_locks.contains_key(&locked.cut))
        {
            let listed = ListedCheckpoint::from(locked);
            if list.get(listed.key()).is_none() {
                list.push(listed);
            }
        }
        Ok(list)
    }

    /// The checkpoints of the history.
    async fn history(&self) -> Result<CheckpointList, TargetError> {
        let (answer, checkpoints) = oneshot::channel();
        let told = self.lock().key.is_some_and(|vm| self.worker.tell(Input::Checkpoints { vm, answer }));
        let not_open = || TargetError::NotOpen { vm: self.vm, reason: self.lock().not_open.clone() };
        if !told {
            return Err(not_open());
        }
        checkpoints.await.map_err(|_| not_open())
    }

    /// Whether the VM had this volume at a number of its journal.
    pub fn has_volume_at(&self, volume: u16, seq: u64) -> bool {
        let inner = self.lock();
        let has_joined = inner.volume_bases.get(usize::from(volume)).is_some_and(|base_seq| *base_seq <= seq);
        has_joined && inner.manifest.left.get(&volume).is_none_or(|left_seq| seq < *left_seq)
    }

    /// Writes the manifest. None if the files are closed; what comes fails if they fail before it is durable.
    fn write_manifest(&self, inner: &Inner) -> Option<oneshot::Receiver<Result<(), ChangeError>>> {
        let (answer, written) = oneshot::channel();
        let (vm, text) = (inner.key?, inner.manifest.to_text());
        self.worker.tell(Input::SetManifest { vm, text, answer: Some(answer) }).then_some(written)
    }

    /// Seals the journal and closes the files.
    pub(super) async fn close(&self) {
        let (answer, closed) = oneshot::channel();
        let key = {
            let mut inner = self.lock();
            inner.closed = true;
            inner.key.take()
        };
        // None is made after that.
        self.close_overlays();
        if let Some(vm) = key
            && self.worker.tell(Input::Detach { vm, answer })
        {
            // Fails when the files failed meanwhile: then they are closed too.
            let _ = closed.await;
        }
    }

    /// How many views are open.
    pub(super) fn pin_count(&self) -> usize {
        self.lock().pins.count()
    }

    pub(super) fn key(&self) -> Option<VmKey> {
        self.lock().key
    }

    pub(super) fn worker(&self) -> &Worker {
        &self.worker
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn policy(
    vpg: &VpgDefinition,
    definition: &VmDefinition,
    slot_bytes: u64,
    window_bytes: u32,
) -> ReceiverPolicy {
    // Segments end anywhere between checkpoints: the oldest one that is left shall be as old as the history.
    let spare_us = 2 * u64::from(vpg.checkpoint_interval_ms) * 1000;
    ReceiverPolicy {
        limits: files::limits(definition, slot_bytes),
        history_us: definition.history_s.saturating_mul(1_000_000).saturating_add(spare_us),
        promotion: TransferSizes::default(),
        give_up_history: definition.give_up_history,
        window_bytes,
    }
}

fn attach_files(
    worker: &Worker,
    key: VmKey,
    files: VmFiles,
    manifest: &Manifest,
    window_bytes: u32,
    pins: Pins,
    vm: Weak<TargetVm>,
) -> Arc<Mutex<ReceiverStatus>> {
    let VmFiles { mut identity, opened, events, journal, disks, .. } = files;
    let definition = manifest.vm().expect("checked when the manifest was read or set");
    let policy = policy(&manifest.vpg, definition, opened.superblock.slot_len_bytes, window_bytes);
    if let Ok(wanted) = files::identity(definition)
        && identity.may_become(&wanted.volumes)
    {
        // What the file doesn't say yet.
        identity.volumes = wanted.volumes;
    }
    // The space of one that has left is given back as its history goes.
    let reserved: Vec<bool> =
        identity.volumes.iter().map(|volume| manifest.disks_reserved && !volume.left).collect();
    let writer = Writer::new(opened, policy.limits);
    let receiver = Receiver::new(identity, policy, writer, events, &reserved);
    let status = Arc::new(Mutex::new(receiver.status()));
    let on_event = Box::new(move |event| {
        if let Some(vm) = vm.upgrade() {
            vm.event(event);
        }
    });
    worker.tell(Input::Attach(Box::new(Attached {
        key,
        receiver,
        journal,
        disks,
        pins,
        on_event,
        status: status.clone(),
    })));
    status
}

#[cfg(test)]
mod tests;
