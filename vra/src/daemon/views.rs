//! Disks as they were, behind doors.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use journal::view::ViewError;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use ublk::serve::Disk;

use super::checkpoints::members_at;
use super::definition::check_name;
use super::doors::Door;
use super::state::{Change, State, ViewDiskRecord, ViewRecord, ViewStage};
use super::{Daemon, lock};
use crate::api::view::{ViewDiskInfo, ViewSubject};
use crate::api::vpg::VmDefinition;
use crate::api::{
    ApiError, CheckpointInfo, CloseView, DoorAddress, DoorRequest, ErrorCode, OpenView, PointInTime, TimeUs,
    ViewId, ViewInfo, ViewMode, VmId, VpgId,
};
use crate::receive::{OpenedView, TargetError, TargetVm};
use crate::report::chain;
use crate::view::{
    ScratchError, ScratchFile, ScratchOwner, ViewDisk, ViewDiskError, ViewSettings, remove_scratch,
};

/// Most views that are open at once.
const MAX_VIEWS: usize = 256;

/// VMs whose journals are read at once for a new view: one waits for the disk while another one's index is put in order.
const OPENINGS_AT_ONCE: usize = 4;

/// A view that is to be open.
pub(super) struct LiveView {
    pub(super) info: ViewInfo,
    pub(super) disks: Vec<LiveDisk>,
    /// What [`crate::receive::TargetHost::await_view`] keeps for it.
    pub(super) awaited: Vec<(VmId, u64)>,
}

/// A disk of a view.
pub(super) enum LiveDisk {
    /// Behind its door.
    Served {
        /// The door.
        door: Door,
        /// The disk.
        disk: Arc<ViewDisk>,
    },
    /// It should be there and isn't.
    Failed(ApiError),
}

/// A disk that is ready to be offered.
pub(super) struct ReadyDisk {
    pub(super) info: ViewDiskInfo,
    pub(super) disk: Arc<ViewDisk>,
}

/// Where a view's scratch comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ScratchFrom {
    /// It is made.
    New,
    /// It was there before the daemon's start.
    Former {
        /// So long its lock is waited for.
        lock_until: Instant,
    },
}

impl LiveView {
    /// The view as its users may see it.
    fn shown(&self) -> ViewInfo {
        ViewInfo { problem: self.problem(), ..self.info.clone() }
    }

    /// Why disks of it can't be used.
    pub(super) fn problem(&self) -> Option<String> {
        let mut problems: Vec<String> = self.disks.iter().filter_map(LiveDisk::problem).collect();
        problems.dedup();
        (!problems.is_empty()).then(|| problems.join("; "))
    }
}

impl LiveDisk {
    fn problem(&self) -> Option<String> {
        match self {
            Self::Failed(error) => Some(error.message.clone()),
            Self::Served { disk, .. } if disk.is_gone() => {
                Some("the history that it shows is gone".to_owned())
            }
            Self::Served { disk, .. } if disk.is_scratch_failed() => {
                Some("its scratch takes no writes any more, since one has failed".to_owned())
            }
            Self::Served { .. } => None,
        }
    }
}

impl Daemon {
    /// Opens all disks of a VPG or a VM as they were.
    pub(super) async fn open_view(&self, open: OpenView) -> Result<ViewInfo, ApiError> {
        let began = std::time::Instant::now();
        if let Some(label) = &open.label {
            check_name("the label's", label)?;
        }
        let view = open.view.unwrap_or_else(ViewId::random);
        let mut change = self.state.change().await;
        match change.get().views.get(&view).map(|record| record.stage) {
            Some(ViewStage::Open) => return self.shown(view),
            // What an earlier request has left goes first.
            Some(ViewStage::Opening | ViewStage::Closing) => self.end_view(&mut change, view)?,
            None => {}
        }
        if change.get().views.len() >= MAX_VIEWS {
            let message = format!("{MAX_VIEWS} views are open, the most that are possible");
            return Err(ApiError::new(ErrorCode::Exhausted, message).remedy("close one"));
        }
        let (vpg, vms) = self.vms_of(open.subject)?;
        // The pins come first: what is looked up must not be given up before it is opened (C3).
        let _pins: Vec<_> = vms.iter().map(TargetVm::pin).collect();
        let (checkpoint, at) = self.moment(&vms, open.at).await?;
        let vms = match &checkpoint {
            Some(checkpoint) => members_at(vms, checkpoint),
            None => vms,
        };
        let disks = self.disks_to_open(change.get(), view, &vms, &open, |vm| match (&checkpoint, at) {
            (Some(checkpoint), _) => {
                checkpoint.vms.iter().find(|place| place.vm == vm).map_or(u64::MAX, |place| place.cut)
            }
            (None, PointInTime::Sequence { sequence }) => sequence,
            (None, _) => u64::MAX,
        });
        let has_own_address = matches!(open.door, DoorRequest::Nbd { listen: Some(_) });
        if has_own_address && disks.len() > 1 {
            return Err(ApiError::new(
                ErrorCode::BadRequest,
                format!("an NBD address of your own is for a single disk, this view has {}", disks.len()),
            )
            .remedy("use the common NBD socket"));
        }
        let info = ViewInfo {
            view,
            vpg,
            label: open.label,
            checkpoint,
            mode: open.mode,
            opened_us: TimeUs::now(),
            open_duration_us: 0,
            disks: Vec::new(),
            problem: None,
        };
        let record = ViewRecord { info, door: open.door, disks, stage: ViewStage::Opening };
        // First the record: devices and files that a crash leaves must be known as a view's.
        change.update(|state| state.views.insert(view, record.clone()))?;
        let mut live = LiveView { info: record.info.clone(), disks: Vec::new(), awaited: Vec::new() };
        let mut opened = self.open_disks(&mut live, &record, &vms, at).await;
        live.info.open_duration_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        let info = live.info.clone();
        lock(&self.views).insert(view, live);
        if opened.is_ok() {
            let noted = change.update(|state| {
                if let Some(record) = state.views.get_mut(&view) {
                    (record.info, record.stage) = (info.clone(), ViewStage::Open);
                }
            });
            opened = noted.map_err(ApiError::from);
        }
        if let Err(error) = opened {
            if let Err(left) = self.end_view(&mut change, view) {
                tracing::warn!(%view, error = %left, "a view that could not be opened has left something behind");
            }
            return Err(error);
        }
        tracing::info!(%view, %vpg, disks = info.disks.len(), "opened a view");
        Ok(info)
    }

    /// Closes a view. One that isn't open is closed already.
    pub(super) async fn close_view(&self, close: CloseView) -> Result<(), ApiError> {
        let mut change = self.state.change().await;
        if !change.get().views.contains_key(&close.view) {
            return Ok(());
        }
        self.end_view(&mut change, close.view)?;
        tracing::info!(view = %close.view, "closed a view");
        Ok(())
    }

    /// Ends a view: its doors, its scratch, its record. What fails can be tried again.
    pub(super) fn end_view(&self, change: &mut Change<'_>, view: ViewId) -> Result<(), ApiError> {
        let Some(record) = change.get().views.get(&view).cloned() else { return Ok(()) };
        if record.stage != ViewStage::Closing {
            change.update(|state| {
                if let Some(record) = state.views.get_mut(&view) {
                    record.stage = ViewStage::Closing;
                }
            })?;
        }
        let live = lock(&self.views).remove(&view);
        let (disks, awaited) = live.map(|live| (live.disks, live.awaited)).unwrap_or_default();
        let ended = tokio::task::block_in_place(|| self.end_disks(&record, disks));
        for (vm, seq) in awaited {
            self.targets.stop_awaiting(vm, seq);
        }
        if let Err(error) = ended {
            let disks = vec![LiveDisk::Failed(error.clone())];
            let live = LiveView { info: record.info, disks, awaited: Vec::new() };
            lock(&self.views).insert(view, live);
            return Err(error);
        }
        change.update(|state| state.views.remove(&view))?;
        Ok(())
    }

    fn end_disks(&self, record: &ViewRecord, disks: Vec<LiveDisk>) -> Result<(), ApiError> {
        let mut result = Ok(());
        // Without the driver there is no device either.
        let has_ublk = ublk::host::require_ublk().is_ok();
        let mut live = disks.into_iter();
        for disk in &record.disks {
            let closed = match live.next() {
                Some(LiveDisk::Served { door, .. }) => self.doors.close(door),
                _ if disk.cookie != 0 && has_ublk => self.delete_left_device(disk.cookie, true),
                _ => Ok(()),
            };
            result = closed.and(result);
            if let Some(path) = &disk.scratch {
                let live = self.live_map_path(record.info.view, disk.vm, disk.number);
                result = remove_scratch(path, &live).map_err(ApiError::from).and(result);
            }
        }
        result
    }

    /// The views, oldest first.
    pub(super) fn view_infos(&self) -> Vec<ViewInfo> {
        let mut infos: Vec<_> = lock(&self.views).values().map(LiveView::shown).collect();
        infos.sort_by_key(|info| (info.opened_us, info.view));
        infos
    }

    /// Whether a view shows a VM of this VPG.
    pub(super) fn has_views_of(&self, vpg: VpgId) -> bool {
        self.seen().views.values().any(|record| record.info.vpg == vpg)
    }

    /// A view that is open, or why it isn't.
    fn shown(&self, view: ViewId) -> Result<ViewInfo, ApiError> {
        let shown = lock(&self.views).get(&view).map(LiveView::shown);
        match shown {
            Some(info) if info.problem.is_none() => Ok(info),
            shown => {
                let problem = shown.and_then(|info| info.problem);
                let why = problem.map(|problem| format!(": {problem}")).unwrap_or_default();
                Err(ApiError::new(ErrorCode::NotReady, format!("view {view} can't be served{why}")).remedy(
                    "see the alerts in `vra status`; `vra view close` ends the view, with its scratch",
                ))
            }
        }
    }

    fn vms_of(&self, subject: ViewSubject) -> Result<(VpgId, Vec<Arc<TargetVm>>), ApiError> {
        match subject {
            ViewSubject::Vpg { vpg } => Ok((vpg, self.target_vms_of(&self.vpg(vpg)?)?)),
            ViewSubject::Vm { vm } => {
                let target = self.targets.vm(vm).ok_or_else(|| {
                    ApiError::new(ErrorCode::NotFound, format!("no journal of VM {vm} is open here"))
                        .remedy("see `vra status`; the journal is at the VM's target VRA")
                })?;
                Ok((target.vpg().id, vec![target]))
            }
        }
    }

    /// What a moment stands for: a checkpoint, except for a sequence number of a single VM.
    async fn moment(
        &self,
        vms: &[Arc<TargetVm>],
        at: PointInTime,
    ) -> Result<(Option<CheckpointInfo>, PointInTime), ApiError> {
        if let (PointInTime::Sequence { .. }, [_]) = (at, vms) {
            return Ok((None, at));
        }
        let checkpoint = self.group_checkpoint_at(vms, at).await?;
        let at = PointInTime::Checkpoint { checkpoint: checkpoint.id };
        Ok((Some(checkpoint), at))
    }

    /// What a view will have of each volume that there was; `seq_of` gives the number that it shows of a VM.
    fn disks_to_open(
        &self,
        state: &State,
        view: ViewId,
        vms: &[Arc<TargetVm>],
        open: &OpenView,
        seq_of: impl Fn(VmId) -> u64,
    ) -> Vec<ViewDiskRecord> {
        let mut disks = Vec::new();
        for vm in vms {
            let seq = seq_of(vm.id());
            for volume in vm.definition().volumes.iter().filter(|volume| vm.has_volume_at(volume.number, seq))
            {
                let scratch = match open.mode {
                    ViewMode::ReadOnly => None,
                    ViewMode::Scratch => Some(vm.folder().scratch(view, volume.number)),
                };
                let cookie = match open.door {
                    DoorRequest::Ublk { .. } => state.fresh_cookie(),
                    DoorRequest::Nbd { .. } => 0,
                };
                let (vm, volume, number) = (vm.id(), volume.id, volume.number);
                disks.push(ViewDiskRecord { vm, volume, number, cookie, scratch });
            }
        }
        disks
    }

    /// Opens all disks of a new view, or fails half-way.
    async fn open_disks(
        &self,
        live: &mut LiveView,
        record: &ViewRecord,
        vms: &[Arc<TargetVm>],
        at: PointInTime,
    ) -> Result<(), ApiError> {
        for (vm, mut opened) in vms.iter().zip(open_each(vms, at).await?) {
            let wanted: Vec<_> = record.disks.iter().filter(|disk| disk.vm == vm.id()).collect();
            let ready = self.ready_disks(&mut opened, vm, record, &wanted, ScratchFrom::New);
            for (wanted, ready) in wanted.into_iter().zip(ready) {
                let ReadyDisk { mut info, disk } = ready?;
                let export = export_name(record.info.view, wanted);
                let served = Arc::clone(&disk) as Arc<dyn Disk>;
                let door = tokio::task::block_in_place(|| {
                    self.doors.open_door(served, &record.door, &export, wanted.cookie, None)
                })?;
                info.door = door.address();
                live.info.disks.push(info);
                live.disks.push(LiveDisk::Served { door, disk });
            }
        }
        Ok(())
    }

    /// Disks of a VM as they were before a restart, each for itself. The door is still to be filled in.
    ///
    /// # Errors
    /// The VM can't be opened as it was.
    pub(super) async fn former_disks(
        &self,
        vm: &Arc<TargetVm>,
        at: PointInTime,
        record: &ViewRecord,
        wanted: &[&ViewDiskRecord],
        lock_until: Instant,
    ) -> Result<Vec<Result<ReadyDisk, ApiError>>, ApiError> {
        // Its scratch may have what was promoted meanwhile.
        let mut kept_seq = None::<u64>;
        for path in wanted.iter().filter_map(|disk| disk.scratch.as_ref()) {
            let kept = tokio::task::block_in_place(|| ScratchFile::kept_seq_at(path, lock_until))?;
            kept_seq = Some(kept_seq.map_or(kept, |least| least.min(kept)));
        }
        let opened = vm.open_former_view(at, kept_seq.unwrap_or_default()).await;
        if let Err(TargetError::View(ViewError::Gone { seq, .. })) = &opened {
            // What was kept for it before the files were open keeps it no more.
            vm.stop_awaiting(*seq);
        }
        Ok(self.ready_disks(&mut opened?, vm, record, wanted, ScratchFrom::Former { lock_until }))
    }

    fn ready_disks(
        &self,
        opened: &mut OpenedView,
        vm: &TargetVm,
        record: &ViewRecord,
        wanted: &[&ViewDiskRecord],
        scratch: ScratchFrom,
    ) -> Vec<Result<ReadyDisk, ApiError>> {
        let definition = vm.definition();
        let ready = wanted.iter().map(|disk| {
            tokio::task::block_in_place(|| self.disk_as_it_was(opened, &definition, record, disk, scratch))
        });
        ready.collect()
    }

    fn disk_as_it_was(
        &self,
        opened: &mut OpenedView,
        definition: &VmDefinition,
        record: &ViewRecord,
        wanted: &ViewDiskRecord,
        scratch: ScratchFrom,
    ) -> Result<ReadyDisk, ApiError> {
        let volume = definition.volumes.iter().find(|volume| volume.id == wanted.volume);
        let volume = volume.ok_or_else(|| {
            let message = format!("VM {} has no volume {} any more", definition.name, wanted.number);
            ApiError::new(ErrorCode::NotFound, message)
        })?;
        let source = opened.source(volume.number)?;
        let seq = opened.view.seq();
        let owner = ScratchOwner {
            vra: self.vra.0,
            view: record.info.view.0,
            vm: definition.id.0,
            journal: definition.journal.0,
            volume: volume.id.0,
            number: volume.number,
            seq,
            disk_bytes: source.volume.size_bytes(),
            logical_block_bytes: volume.logical_block_bytes,
        };
        let keys = opened.scratch_keys();
        let live = self.live_map_path(record.info.view, wanted.vm, wanted.number);
        let scratch = match (&wanted.scratch, scratch) {
            (None, _) => None,
            (Some(path), ScratchFrom::Former { lock_until }) => {
                Some(ScratchFile::open(path, &live, &owner, &keys, lock_until)?)
            }
            (Some(path), ScratchFrom::New) => {
                let limit_bytes = u64::from(self.config.target.scratch_mib) << 20;
                Some(ScratchFile::make(path, &live, &owner, &keys, limit_bytes)?)
            }
        };
        let settings =
            ViewSettings { logical_block_bytes: volume.logical_block_bytes, look_for_holes: false };
        let disk = ViewDisk::new(source, settings, scratch)?;
        let info = ViewDiskInfo {
            vm: definition.id,
            vm_name: definition.name.clone(),
            volume: volume.id,
            number: volume.number,
            size_bytes: disk.size_bytes(),
            sequence: seq,
            // Stands until the door is open.
            door: DoorAddress::NbdUnix { path: PathBuf::new(), export: String::new() },
        };
        opened.pin.shows(&disk)?;
        Ok(ReadyDisk { info, disk })
    }

    /// Where the map of a scratch file lies while the daemon has it: in memory, and for a daemon that follows a killed one.
    pub(super) fn live_map_path(&self, view: ViewId, vm: VmId, number: u16) -> PathBuf {
        self.config.run_dir.join(format!("scratch-{view}-{vm}-{number}.map"))
    }
}

impl From<ViewDiskError> for ApiError {
    fn from(error: ViewDiskError) -> Self {
        let code = match error {
            ViewDiskError::Scratch(error) => return error.into(),
            ViewDiskError::Memory(_) => ErrorCode::Exhausted,
            ViewDiskError::AlignmentTooLong(_) => ErrorCode::Unsupported,
            ViewDiskError::Alignment(_) => ErrorCode::Io,
        };
        Self::new(code, chain(&error))
    }
}

impl From<ScratchError> for ApiError {
    fn from(error: ScratchError) -> Self {
        let code = match &error {
            ScratchError::Space { .. } | ScratchError::Memory { .. } => ErrorCode::Exhausted,
            ScratchError::DiskTooLong { .. } => ErrorCode::Unsupported,
            ScratchError::Missing { .. } | ScratchError::LiveMapLost { .. } => ErrorCode::NotFound,
            ScratchError::Busy { .. } => ErrorCode::Busy,
            ScratchError::Format { .. } | ScratchError::Damaged { .. } | ScratchError::Other { .. } => {
                ErrorCode::Corrupt
            }
            _ => ErrorCode::Io,
        };
        Self::new(code, chain(&error))
    }
}

/// The name of a view's disk as an NBD export.
pub(super) fn export_name(view: ViewId, disk: &ViewDiskRecord) -> String {
    format!("view-{view}-{}-{}", disk.vm, disk.number)
}

/// Opens each VM as it was.
async fn open_each(vms: &[Arc<TargetVm>], at: PointInTime) -> Result<Vec<OpenedView>, ApiError> {
    let places = Arc::new(Semaphore::new(OPENINGS_AT_ONCE));
    let mut opening = JoinSet::new();
    for (number, vm) in vms.iter().cloned().enumerate() {
        let places = Arc::clone(&places);
        opening.spawn(async move {
            let _place = places.acquire_owned().await;
            (number, vm.open_view(at).await)
        });
    }
    let mut opened = BTreeMap::new();
    while let Some(ended) = opening.join_next().await {
        let (number, view) = ended.map_err(|error| {
            ApiError::new(ErrorCode::Other, format!("opening a VM's disks ended: {error}"))
        })?;
        opened.insert(number, view?);
    }
    Ok(opened.into_values().collect())
}
