//! Source VMs: capture, stream, syncs and checkpoints of each, as the definitions say.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use quinn::{RecvStream, SendStream};
use ublk::serve::Geometry;
use uuid::Uuid;

use super::linking::SharedLink;
use super::state::State;
use super::volumes::LiveVolume;
use super::vpgs::missing_volumes;
use super::{Daemon, lock};
use crate::api::status::SyncProgress;
use crate::api::vpg::{Priority, VmDefinition, VolumeDefinition, VraEndpoint};
use crate::api::{ApiError, ErrorCode, GenerationId, TimeUs, VmId, VpgDefinition, VpgId};
use crate::capture::modes::OverflowReason;
use crate::capture::{
    CaptureLimits, FileSequenceStore, ProtectedDisk, RetainedEntries, SourceAction, SourceAlert, SourceVm,
    take_over,
};
use crate::checkpoint::{Freeze, Member};
use crate::clock::Clock;
use crate::link::StreamKind;
use crate::report::chain;
use crate::ship::shell::{ConnectError, DataConnector, Shipper, ShipperParts};
use crate::ship::{Doorbell, Sender, SenderEvent, SenderLimits, SenderStatus, StreamIdentity};
use crate::sync::{SyncJob, SyncThread};
use crate::wire::{Refuse, VolumeShape};

/// Time between two looks at each source VM.
const TICK_EVERY: Duration = Duration::from_millis(50);

/// A VM that is protected now.
pub(super) struct LiveSource {
    vpg: VpgId,
    definition: VmDefinition,
    vm: Arc<SourceVm>,
    freeze: Freeze,
    shipper: Shipper,
    /// Where the next stream goes.
    target: Arc<Mutex<VraEndpoint>>,
    /// The last sync, and when it began.
    sync: Mutex<Option<(SyncThread, TimeUs)>>,
    notes: Arc<Mutex<Notes>>,
    /// The VM is no longer a source: set before its capture is ended.
    left: AtomicBool,
    /// Its group is.
    paused: AtomicBool,
    /// What the stream was told of its volumes, and how large their disks are to be, in bytes, by number.
    told: Mutex<(Vec<VolumeShape>, Vec<u64>)>,
}

/// What happened last, for status and alerts.
#[derive(Clone, Debug, Default)]
pub(super) struct Notes {
    /// The target's refusal, until it grants.
    pub refused: Option<Refuse>,
    /// Why the stream ended, until it runs again.
    pub disconnected: Option<String>,
    /// What capture said that stays true until it streams again.
    pub alert: Option<SourceAlert>,
}

impl LiveSource {
    pub(super) fn vpg(&self) -> VpgId {
        self.vpg
    }

    pub(super) fn definition(&self) -> &VmDefinition {
        &self.definition
    }

    pub(super) fn vm(&self) -> &SourceVm {
        &self.vm
    }

    /// As a member of its group.
    pub(super) fn member(&self) -> Member {
        let (core, freeze) = (Arc::clone(self.vm.core()), self.freeze.clone());
        Member { vm: self.definition.id, core, freeze }
    }

    /// Whether its group is paused.
    pub(super) fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Acquire)
    }

    fn set_paused(&self, paused: bool) {
        if self.paused.swap(paused, Ordering::AcqRel) != paused {
            let what = if paused { "replication is paused" } else { "replication goes on" };
            tracing::info!(vm = %self.definition.id, name = self.definition.name, "{what}");
        }
        self.shipper.set_paused(paused);
    }

    /// The target is to be reached elsewhere: by the next stream, the one that runs goes on.
    fn set_target(&self, wanted: &VraEndpoint) {
        let former = std::mem::replace(&mut *lock(&self.target), wanted.clone());
        if former != *wanted {
            let (name, from, to) = (&self.definition.name, former.address, &wanted.address);
            tracing::info!(vm = name, from, to, "the target has another address");
        }
    }

    /// Follows a definition in which volumes are larger (E3). `local` are the sizes that their files have; what they lack is left out.
    fn grow(&self, wanted: &VmDefinition, local: &[u64]) {
        let sizes = wanted.volumes.iter().map(|volume| volume.size_bytes).zip(local);
        let sizes: Vec<u64> = sizes.map(|(defined, local)| defined.min(*local)).collect();
        let shapes: Vec<VolumeShape> = wanted.volumes.iter().map(shape_of).collect();
        let former = std::mem::replace(&mut *lock(&self.told), (shapes.clone(), sizes.clone()));
        // First the stream: it says what the disks have grown by only to a target that takes it.
        if former.0 != shapes {
            self.shipper.set_volumes(shapes);
        }
        if former.1 != sizes {
            self.vm.grow(sizes);
        }
    }

    pub(super) fn sender(&self) -> SenderStatus {
        self.shipper.status()
    }

    pub(super) fn sync_progress(&self) -> Option<SyncProgress> {
        let sync = lock(&self.sync);
        let (sync, started_us) = sync.as_ref().filter(|(sync, _)| !sync.is_over())?;
        let counts = sync.counts();
        Some(SyncProgress {
            done_bytes: counts.done_bytes,
            total_bytes: counts.total_bytes,
            started_us: *started_us,
        })
    }

    pub(super) fn notes(&self) -> Notes {
        lock(&self.notes).clone()
    }
}

impl Daemon {
    /// Starts and stops source VMs so that those run whose volumes are all served. Must be called inside tokio.
    pub(super) fn follow_sources(&self, state: &State) -> Result<(), ApiError> {
        let mut wanted: BTreeMap<VmId, (&VpgDefinition, &VmDefinition, Vec<Arc<ProtectedDisk>>)> =
            BTreeMap::new();
        let mut sources = lock(&self.sources);
        for vpg in state.vpgs.values() {
            for vm in vpg.vms.iter().filter(|vm| vm.source.id == self.vra) {
                // One that runs has its disks: none are made for nothing, which could fail.
                let is_running =
                    |live: &Arc<LiveSource>| live.vpg == vpg.id && is_same_stream(vm, &live.definition);
                let disks = match sources.get(&vm.id).is_some_and(is_running) {
                    true => self.serves_all(state, vm).then(Vec::new),
                    false => self.disks_of(state, vm),
                };
                if let Some(disks) = disks {
                    wanted.insert(vm.id, (vpg, vm, disks));
                }
            }
        }
        let leaving: Vec<VmId> = sources
            .iter()
            .filter(|(id, live)| {
                wanted
                    .get(*id)
                    .is_none_or(|(vpg, vm, _)| vpg.id != live.vpg || !is_same_stream(vm, &live.definition))
            })
            .map(|(id, _)| *id)
            .collect();
        for id in leaving {
            if let Some(live) = sources.remove(&id) {
                live.leave();
                tracing::info!(vm = %id, name = live.definition.name, "no longer a source");
            }
        }
        let mut failed = None;
        for (id, (vpg, vm, disks)) in wanted {
            if let Some(live) = sources.get(&id) {
                live.set_paused(vpg.paused);
                live.set_target(&vm.target);
                live.grow(vm, &self.local_sizes(vm));
                if live.shipper.set_priority(stream_priority(vpg.priority())) {
                    tracing::info!(vm = %id, name = vm.name, priority = %vpg.priority(), "another priority");
                }
                continue;
            }
            match self.start_source(vpg, vm, disks) {
                Ok(live) => {
                    tracing::info!(vm = %id, name = vm.name, target = %vm.target.id, priority = %vpg.priority(), "source");
                    live.grow(vm, &self.local_sizes(vm));
                    sources.insert(id, Arc::new(live));
                }
                Err(error) => failed = Some(error),
            }
        }
        drop(sources);
        self.follow_groups(state);
        failed.map_or(Ok(()), Err)
    }

    /// Does what has become due in each source VM. Ends only when cancelled.
    pub(super) async fn tick_sources(self: Arc<Self>) {
        let clock = Clock::start();
        let mut ticks = tokio::time::interval(TICK_EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let live: Vec<Arc<LiveSource>> = lock(&self.sources).values().cloned().collect();
            for source in live {
                let actions =
                    tokio::task::block_in_place(|| source.vm.tick(clock.now(), &mut rand::random::<u128>));
                // One that has left meanwhile ended its capture by itself: that is no overflow.
                if source.left.load(Ordering::Acquire) {
                    continue;
                }
                for action in actions {
                    match action {
                        // On a task of its own: it waits for the state and for the driver.
                        SourceAction::Grown { volume, size_bytes } => {
                            tokio::spawn(Arc::clone(&self).note_growth(
                                Arc::clone(&source),
                                volume,
                                size_bytes,
                            ));
                        }
                        SourceAction::Bring(new) => Arc::clone(&self).bring_growth(&source, new),
                        action => source.act(action).await,
                    }
                }
            }
        }
    }

    fn start_source(
        &self,
        vpg: &VpgDefinition,
        definition: &VmDefinition,
        disks: Vec<Arc<ProtectedDisk>>,
    ) -> Result<LiveSource, ApiError> {
        let folder = self.config.state_dir.join("numbers");
        super::identity::make_folder(&folder)?;
        let store = FileSequenceStore::new(folder.join(format!("{}.json", definition.id)));
        if let Some(takeover) = definition.takeover {
            take_over(&store, takeover.generation, takeover.first_seq)
                .map_err(|error| ApiError::new(ErrorCode::Io, chain(&error)))?;
        }
        let retained_bytes = u64::from(self.config.memory.retained_per_vm_mib) << 20;
        let standard = CaptureLimits::STANDARD;
        let limits = CaptureLimits {
            retained_bytes,
            dense_bytes: standard.dense_bytes.min(retained_bytes / 4),
            ..standard
        };
        let vm = SourceVm::protect(disks, limits, Arc::new(store), GenerationId::random())
            .map_err(|error| ApiError::new(ErrorCode::Exhausted, chain(&error)))?;
        let vm = Arc::new(vm);
        let doorbell = Arc::new(Doorbell::new());
        vm.set_doorbell(doorbell.clone());
        let identity = StreamIdentity {
            vm: definition.id,
            vpg: vpg.id,
            journal: definition.journal,
            volumes: definition.volumes.iter().map(shape_of).collect(),
        };
        let sender = Sender::new(identity, vm.generation(), SenderLimits::STANDARD, rand::random());
        let notes = Arc::new(Mutex::new(Notes::default()));
        let target = Arc::new(Mutex::new(definition.target.clone()));
        let shipper = Shipper::start(ShipperParts {
            sender,
            retained: Box::new(RetainedEntries(Arc::clone(&vm))),
            doorbell,
            paused: vpg.paused,
            connector: Connector { link: Arc::clone(&self.link), target: Arc::clone(&target) },
            on_event: {
                let (vm, notes, name) = (Arc::clone(&vm), Arc::clone(&notes), definition.name.clone());
                Box::new(move |event| note_event(event, &vm, &mut lock(&notes), &name))
            },
        });
        shipper.set_priority(stream_priority(vpg.priority()));
        Ok(LiveSource {
            vpg: vpg.id,
            definition: definition.clone(),
            vm,
            freeze: self
                .guests
                .freeze_of(definition.id, self.seen().guest_agents.contains_key(&definition.id)),
            shipper,
            target,
            sync: Mutex::default(),
            notes,
            left: AtomicBool::new(false),
            paused: AtomicBool::new(vpg.paused),
            told: Mutex::default(),
        })
    }

    /// Whether all of a VM's disks are served, and none of them is another VRA's now.
    fn serves_all(&self, state: &State, vm: &VmDefinition) -> bool {
        let volumes = lock(&self.volumes);
        let is_served =
            |volume: &VolumeDefinition| volumes.get(&volume.id).is_some_and(LiveVolume::is_writable);
        missing_volumes(state, vm).is_empty()
            && vm.volumes.iter().filter(|volume| !volume.left).all(is_served)
    }

    /// A VM's disks by number, if all are served here.
    fn disks_of(&self, state: &State, vm: &VmDefinition) -> Option<Vec<Arc<ProtectedDisk>>> {
        if !self.serves_all(state, vm) {
            return None;
        }
        let volumes = lock(&self.volumes);
        let disk = |volume: &VolumeDefinition| {
            let stand_in = match (volume.left, volume.swap) {
                (false, false) => return volumes.get(&volume.id)?.disk(),
                (false, true) => volumes.get(&volume.id)?.disk()?.unserved(),
                (true, _) => empty_disk(volume),
            };
            let volume = volume.number;
            let told = stand_in.inspect_err(|error| {
                tracing::warn!(vm = vm.name, volume, %error, "nothing can stand in the stream for a swap disk, or one that has left");
            });
            told.ok().map(Arc::new)
        };
        vm.volumes.iter().map(disk).collect()
    }
}

impl LiveSource {
    /// Ends the capture. Noted before, so that whoever sees its end sees why.
    pub(super) fn leave(&self) {
        self.left.store(true, Ordering::Release);
        self.vm.unprotect();
    }

    /// Whether somebody has asked for what makes this happen.
    fn is_expected(&self, alert: &SourceAlert) -> bool {
        match alert {
            SourceAlert::Overflow { reason: OverflowReason::Requested, .. } => true,
            SourceAlert::Overflow {
                reason: OverflowReason::RingFull | OverflowReason::MemoryFull, ..
            } => self.is_paused(),
            _ => false,
        }
    }

    async fn act(&self, action: SourceAction) {
        match action {
            SourceAction::BeginGeneration(start) => {
                tracing::info!(vm = self.definition.name, generation = %start.generation, "began a new generation");
                self.shipper.begin_generation(start, Box::new(RetainedEntries(Arc::clone(&self.vm)))).await;
            }
            SourceAction::BeginSync(sync) => {
                let job = SyncJob {
                    name: self.definition.name.clone(),
                    core: Arc::clone(self.vm.core()),
                    disks: self.vm.disks(),
                    sync,
                };
                let former = lock(&self.sync).take();
                let started = tokio::task::block_in_place(|| {
                    drop(former);
                    SyncThread::start(job)
                });
                match started {
                    Ok(thread) => *lock(&self.sync) = Some((thread, TimeUs::now())),
                    Err(error) => {
                        tracing::error!(vm = self.definition.name, %error, "can't start a sync: trying again in a new generation");
                        self.vm.renew();
                    }
                }
            }
            // The daemon's.
            SourceAction::Bring(_) | SourceAction::Grown { .. } => {}
            SourceAction::Alert(alert) => {
                if alert == SourceAlert::FullSync {
                    tracing::info!(vm = self.definition.name, "{alert}");
                    lock(&self.notes).alert = None;
                } else if self.is_expected(&alert) {
                    tracing::info!(vm = self.definition.name, "{alert}");
                } else {
                    tracing::warn!(vm = self.definition.name, "{alert}");
                    lock(&self.notes).alert = Some(alert);
                }
            }
        }
    }
}

impl Drop for LiveSource {
    fn drop(&mut self) {
        self.leave();
    }
}

/// On the shipper's task: only notes.
fn note_event(event: SenderEvent, vm: &SourceVm, notes: &mut Notes, name: &str) {
    match event {
        SenderEvent::Granted { generation, fresh_image, durable_through, .. } => {
            tracing::info!(vm = name, %generation, durable_through, "the target took the stream");
            *notes = Notes { alert: notes.alert.take(), ..Notes::default() };
            vm.granted(generation, fresh_image);
        }
        SenderEvent::Disconnected { reason } => {
            if notes.disconnected.is_none() {
                tracing::info!(vm = name, reason, "the stream ended");
            }
            notes.disconnected = Some(reason);
        }
        SenderEvent::Refused(refuse) => {
            if notes.refused.as_ref().is_none_or(|former| former.code != refuse.code) {
                tracing::warn!(vm = name, code = ?refuse.code, "the target refused the stream: {}", refuse.text);
            }
            notes.refused = Some(refuse);
        }
        SenderEvent::Stopped(reason) if reason.needs_new_generation() => {
            tracing::warn!(vm = name, "{reason}");
            vm.renew();
        }
        SenderEvent::Stopped(reason) => tracing::error!(vm = name, "the stream stopped: {reason}"),
    }
}

struct Connector {
    link: SharedLink,
    target: Arc<Mutex<VraEndpoint>>,
}

impl DataConnector for Connector {
    async fn open(&self) -> Result<(SendStream, RecvStream), ConnectError> {
        let link = lock(&self.link).link();
        let link = link.ok_or_else(|| ConnectError("this VRA's link is not up".to_owned()))?;
        let peer = link.peer(&lock(&self.target));
        let opened = peer.open(&link, StreamKind::Data).await;
        opened.map(|(_, send, recv)| (send, recv)).map_err(|error| ConnectError(chain(&error)))
    }
}

/// What stands in a VM's stream for a disk that has left it: nobody serves it, and it reads zeroes, which take next to nothing in a sync.
fn empty_disk(volume: &VolumeDefinition) -> std::io::Result<ProtectedDisk> {
    let file = File::from(memfd_create(c"holdfast-left-disk", MFdFlags::MFD_CLOEXEC)?);
    file.set_len(volume.size_bytes)?;
    let geometry = Geometry {
        size_bytes: volume.size_bytes,
        logical_block_bytes: volume.logical_block_bytes,
        physical_block_bytes: 4096,
        volatile_cache: false,
        fua: false,
        read_only: false,
        discard: None,
        write_zeroes: None,
    };
    Ok(ProtectedDisk::new(file, geometry, Arc::new(|| TimeUs::now().0)))
}

fn shape_of(volume: &VolumeDefinition) -> VolumeShape {
    VolumeShape {
        volume: volume.number,
        id: volume.id,
        logical_block_bytes: volume.logical_block_bytes,
        size_bytes: volume.size_bytes,
        left: volume.left,
    }
}

/// A VPG's priority as that of its VMs' streams. That of the lines between sources is higher than all of them.
fn stream_priority(priority: Priority) -> i32 {
    match priority {
        Priority::Low => -1,
        Priority::Medium => 0,
        Priority::High => 1,
    }
}

/// Whether a changed definition lets the stream of another go on, though volumes may have grown, and the target be elsewhere.
fn is_same_stream(one: &VmDefinition, other: &VmDefinition) -> bool {
    let is_same_disk = |(wanted, live): (&VolumeDefinition, &VolumeDefinition)| {
        let size_bytes = wanted.size_bytes;
        size_bytes >= live.size_bytes && *wanted == VolumeDefinition { size_bytes, ..live.clone() }
    };
    one.journal == other.journal
        && one.volumes.len() == other.volumes.len()
        && one.volumes.iter().zip(&other.volumes).all(is_same_disk)
        && one.target.id == other.target.id
        && one.takeover == other.takeover
}

/// A random id for the checkpointer's run (D1).
pub(super) fn incarnation() -> Uuid {
    Uuid::new_v4()
}
