//! All VMs that this VRA is target of.

mod ensuring;
mod former;

use std::collections::HashMap;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use journal::crypt::SiteKeys;
use journal::format::{PAGE_BYTES, SUPERBLOCK_OFFSETS, Superblock};
use quinn::{RecvStream, SendStream};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use super::files;
use super::folder::VmFolder;
use super::memory::ReceiveMemory;
use super::outbox::Outbox;
use super::receiver_types::StreamId;
use super::scrub::{ScrubSettings, ScrubThread, TargetVms};
use super::shared_keys::SharedKeys;
use super::stream;
use super::target_error::TargetError;
use super::target_vm::TargetVm;
use super::view_memory::ViewMemory;
use super::worker::{Input, Worker, WorkerThread};
use crate::api::{JournalId, VmId, VpgId, VraId};
use crate::wire::{Refuse, RefuseCode};

pub use ensuring::Prepared;
pub use former::FormerFiles;

/// How much a target may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TargetSettings {
    /// Threads that do the I/O, at least one.
    pub worker_count: usize,
    /// Memory for batches that have arrived and are not durable, of all VMs, in bytes.
    pub memory_bytes: usize,
    /// The same of one VM, in bytes; at least the longest batch.
    pub window_bytes: u32,
    /// The scrub of the journals.
    pub scrub: ScrubSettings,
    /// Most of one disk that is copied for a locked checkpoint which promotion must pass, in bytes. Its space is reserved.
    pub overlay_bytes: u64,
    /// Memory for the indexes of open views, of all VMs, in bytes: what takes more isn't opened.
    pub views_memory_bytes: u64,
}

impl TargetSettings {
    /// What the product uses if nothing else is said.
    pub const STANDARD: Self = Self {
        worker_count: 2,
        memory_bytes: 512 << 20,
        window_bytes: 16 << 20,
        scrub: ScrubSettings::OFF,
        overlay_bytes: 10 << 30,
        views_memory_bytes: 2 << 30,
    };
}

/// All VMs that this VRA is target of.
pub struct TargetHost {
    settings: TargetSettings,
    keys: SharedKeys,
    view_memory: Arc<ViewMemory>,
    memory: ReceiveMemory,
    vms: TargetVms,
    /// What views need of VMs whose files are not open yet.
    awaited: Mutex<HashMap<VmId, Vec<u64>>>,
    /// Held while a VM's files are made, opened, closed or removed.
    changing: tokio::sync::Mutex<()>,
    next_stream: AtomicU64,
    next_key: Arc<AtomicU64>,
    next_worker: AtomicU64,
    /// Before the threads that it asks.
    _scrub: ScrubThread,
    // Last: the threads end when everything else has gone.
    threads: Vec<WorkerThread>,
}

/// How often VMs are looked at that nothing happens to: their history gets older all the same.
const TICK: Duration = Duration::from_secs(1);
/// How often it is looked whether open files are where they were, in ticks.
const FILES_EVERY_TICKS: u64 = 5;

/// How often datastores are looked at, in ticks.
const SPACE_EVERY_TICKS: u64 = 30;

/// Looks at the VMs' files, and at the room on their datastores. Waits for filesystems.
fn look(vms: &[Arc<TargetVm>], looks_at_space: bool) {
    vms.iter().for_each(TargetVm::look_at_files);
    if !looks_at_space {
        return;
    }
    let spaces: Vec<_> = vms.iter().map(|vm| vm.space()).collect();
    let all: Vec<_> = spaces.iter().flatten().copied().collect();
    for (vm, space) in vms.iter().zip(spaces) {
        vm.tell_space(space, &all);
        vm.look_at_journal_size();
    }
}

impl TargetHost {
    /// Starts the threads. To be called within a tokio runtime.
    ///
    /// # Errors
    /// The kernel has no io_uring for us.
    pub fn start(settings: TargetSettings) -> Result<Self, TargetError> {
        let threads =
            (0..settings.worker_count.max(1)).map(WorkerThread::start).collect::<Result<Vec<_>, _>>();
        let threads = threads.map_err(|source| files::host("starting the journal threads", source))?;
        let workers: Vec<_> = threads.iter().map(|thread| thread.worker().clone()).collect();
        let vms = TargetVms::default();
        // Ends with the workers.
        let looked_at = vms.clone();
        let mut looking = None::<JoinHandle<()>>;
        Handle::current().spawn(async move {
            for tick in 1_u64.. {
                tokio::time::sleep(TICK).await;
                if !workers.iter().all(|worker| worker.tell(Input::Tick)) {
                    return;
                }
                // A datastore that hangs holds one thread, not one more with each look.
                let (looks_at_files, looks_at_space) =
                    (tick % FILES_EVERY_TICKS == 0, tick % SPACE_EVERY_TICKS == 0);
                if looks_at_files && looking.as_ref().is_none_or(JoinHandle::is_finished) {
                    let vms: Vec<_> =
                        looked_at.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
                    looking = Some(tokio::task::spawn_blocking(move || look(&vms, looks_at_space)));
                }
            }
        });
        let scrub = ScrubThread::start(settings.scrub, vms.clone());
        let scrub = scrub.map_err(|source| files::host("starting the scrub's thread", source))?;
        Ok(Self {
            settings,
            _scrub: scrub,
            keys: SharedKeys::default(),
            view_memory: ViewMemory::new(settings.views_memory_bytes),
            memory: ReceiveMemory::new(settings.memory_bytes),
            vms,
            awaited: Mutex::default(),
            changing: tokio::sync::Mutex::new(()),
            next_stream: AtomicU64::new(1),
            next_key: Arc::new(AtomicU64::new(1)),
            next_worker: AtomicU64::new(0),
            threads,
        })
    }

    /// The site's keys.
    pub fn keys(&self) -> &SharedKeys {
        &self.keys
    }

    /// Puts other site keys in force, beside those of the host's own file: journals whose keys the former one wrapped get new keys. Those
    /// that couldn't be opened for want of a key are to be tried again.
    ///
    /// # Errors
    /// A journal that is open needs a key that is not among them: its history could not be read after a restart.
    pub async fn set_keys(&self, keys: SiteKeys) -> Result<(), TargetError> {
        let _changing = self.changing.lock().await;
        let all = self.keys.with_own(&keys);
        for vm in self.vms() {
            let missing = vm.site_key_ids().await.into_iter().find(|id| all.find(*id).is_none());
            if let Some(key) = missing {
                return Err(TargetError::SiteKeyMissing { vm: vm.id(), key });
            }
        }
        self.keys.set(&keys);
        for vm in self.vms() {
            if let Err(error) = vm.follow_encryption() {
                tracing::warn!(vm = %vm.id(), error = %super::error_chain(&error), "the journal's encryption doesn't follow");
            }
        }
        Ok(())
    }

    /// Keeps a VM's history from a number on, from the very opening of its files on (C3), until [`TargetHost::stop_awaiting`]. To be called
    /// before that opening.
    pub fn await_view(&self, vm: VmId, seq: u64) {
        self.lock_awaited().entry(vm).or_default().push(seq);
    }

    /// Ends one [`TargetHost::await_view`].
    pub fn stop_awaiting(&self, vm: VmId, seq: u64) {
        if let Some(target) = self.vm(vm) {
            target.stop_awaiting(seq);
        } else if let Some(awaited) = self.lock_awaited().get_mut(&vm)
            && let Some(index) = awaited.iter().position(|awaited| *awaited == seq)
        {
            awaited.swap_remove(index);
        }
    }

    /// The VM, if this VRA is its target.
    pub fn vm(&self, vm: VmId) -> Option<Arc<TargetVm>> {
        self.lock().get(&vm).cloned()
    }

    /// All VMs.
    pub fn vms(&self) -> Vec<Arc<TargetVm>> {
        self.lock().values().cloned().collect()
    }

    /// Serves a data stream until it ends. `source` is who opened it, as its certificate says.
    pub async fn serve(&self, source: VraId, mut send: SendStream, mut recv: RecvStream) {
        let Some(open) = stream::read_open(&mut send, &mut recv).await else { return };
        let refuse = |code, text: &str| Refuse { code, detail: 0, text: text.to_owned() };
        let Some(vm) = self.vm(open.vm) else {
            let text = "this VRA is not the VM's target: its definition may be on its way";
            return stream::send_refusal(&mut send, refuse(RefuseCode::UnknownVm, text)).await;
        };
        if vm.source() != source {
            tracing::warn!(vm = %vm.id(), %source, "refused a stream: the VM's source is another VRA");
            let text = "this VRA is not the VM's source";
            return stream::send_refusal(&mut send, refuse(RefuseCode::NotAllowed, text)).await;
        }
        let Some(key) = vm.key() else {
            let text = "the VM's journal is not open: it failed and is being opened again";
            return stream::send_refusal(&mut send, refuse(RefuseCode::Busy, text)).await;
        };
        let id = StreamId(self.next_stream.fetch_add(1, Ordering::Relaxed));
        let outbox = Arc::new(Outbox::default());
        let worker = vm.worker();
        worker.tell(Input::Open { vm: key, stream: id, open: Box::new(open), outbox: outbox.clone() });
        let memory = self.memory.stream(self.settings.window_bytes as usize);
        let take = |bytes| {
            worker.tell(Input::Batch { vm: key, stream: id, bytes });
        };
        tokio::select! {
            ended = stream::run(send, recv, &memory, outbox, take) => {
                if let Err(error) = ended {
                    tracing::info!(vm = %vm.id(), error = %super::error_chain(&error), "a data stream ended");
                }
            }
            // It is refused when it comes again.
            () = vm.moved_from(source) => {
                tracing::info!(vm = %vm.id(), %source, "ended a data stream: the VM's source is another VRA now");
            }
        }
        worker.tell(Input::Closed { vm: key, stream: id });
    }

    /// Closes a VM's files; they stay.
    ///
    /// # Errors
    /// There is no such VM, or views of it are open.
    pub async fn close(&self, vm: VmId) -> Result<VmFolder, TargetError> {
        let _changing = self.changing.lock().await;
        let target = self.vm(vm).ok_or(TargetError::UnknownVm(vm))?;
        let count = target.pin_count();
        if count > 0 {
            return Err(TargetError::InUse { vm, count });
        }
        self.lock().remove(&vm);
        target.close().await;
        Ok(target.folder().clone())
    }

    /// Removes a VM with its journal and recovery disks.
    ///
    /// # Errors
    /// There is no such VM, views of it are open, or a file can't be removed.
    pub async fn delete(&self, vm: VmId) -> Result<(), TargetError> {
        let folder = self.close(vm).await?;
        tokio::task::spawn_blocking(move || folder.remove())
            .await
            .unwrap_or_else(|error| {
                let (path, source) = (std::path::PathBuf::new(), std::io::Error::other(error));
                Err(super::FolderError::Io { operation: "removing files", path, source })
            })
            .map_err(TargetError::Folder)
    }

    /// The process ends: what views and locks need stays for the next one. To be called before views are let go of.
    pub fn leave(&self) {
        self.vms().iter().for_each(|vm| vm.leave_overlays());
    }

    /// Closes all VMs' files, for a planned end.
    pub async fn shut_down(&self) {
        let _changing = self.changing.lock().await;
        self.leave();
        let vms: Vec<_> = self.lock().drain().map(|(_, vm)| vm).collect();
        for vm in vms {
            vm.close().await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<VmId, Arc<TargetVm>>> {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_awaited(&self) -> MutexGuard<'_, HashMap<VmId, Vec<u64>>> {
        self.awaited.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next_worker(&self) -> &Worker {
        let number = self.next_worker.fetch_add(1, Ordering::Relaxed) as usize;
        self.threads[number % self.threads.len()].worker()
    }
}

/// The folder of a VM in a datastore, whatever the names were when it was made. Folder names hold only the beginning of an id, which VMs made
/// from one template may share: whose a folder is, its journal says.
fn find_folder(datastore: &Path, vpg: VpgId, vm: VmId) -> Option<VmFolder> {
    own_folders(datastore, vpg, vm).next()
}

/// All folders with a journal of a VM.
fn own_folders(datastore: &Path, vpg: VpgId, vm: VmId) -> impl Iterator<Item = VmFolder> {
    let with_end = |path: &Path, end: &str| -> Vec<PathBuf> {
        let Ok(entries) = std::fs::read_dir(path) else { return Vec::new() };
        let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
        paths
            .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().ends_with(end)))
            .collect()
    };
    let groups = with_end(datastore, &format!("-{}", vpg.short()));
    let folders = groups.into_iter().flat_map(move |group| with_end(&group, &format!("-{}", vm.short())));
    folders.map(VmFolder::at).filter(move |folder| {
        superblock_in(folder).is_some_and(|found| (VpgId(found.vpg_id), VmId(found.vm_id)) == (vpg, vm))
    })
}

/// Which journal lies in a folder.
fn journal_id_in(folder: &VmFolder) -> Option<JournalId> {
    superblock_in(folder).map(|found| JournalId(found.journal_id))
}

/// What a folder's journal says of itself; nothing when there is none, or neither superblock can be read.
fn superblock_in(folder: &VmFolder) -> Option<Superblock> {
    let file = std::fs::File::open(folder.journal()).ok()?;
    SUPERBLOCK_OFFSETS.into_iter().find_map(|offset_bytes| {
        let mut page = vec![0; PAGE_BYTES];
        file.read_exact_at(&mut page, offset_bytes).ok()?;
        Superblock::decode(&page).ok()
    })
}
