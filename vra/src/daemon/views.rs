//! Disks as they were, behind doors.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ublk::serve::Disk;

use super::definition::check_name;
use super::doors::Door;
use super::{Daemon, lock};
use crate::api::view::{ViewDiskInfo, ViewSubject};
use crate::api::{
    ApiError, CheckpointInfo, CloseView, DoorAddress, DoorRequest, ErrorCode, OpenView, PointInTime, TimeUs,
    ViewId, ViewInfo, ViewMode, VmId, VolumeId, VpgId,
};
use crate::receive::TargetVm;
use crate::report::chain;
use crate::view::{Freshness, ScratchFile, ViewDisk, ViewDiskError, ViewSettings, ViewSource};

/// Most views that are open at once.
const MAX_VIEWS: usize = 256;

/// An open view.
pub(super) struct LiveView {
    info: ViewInfo,
    doors: Vec<Door>,
    cookies: Vec<u32>,
}

/// A disk that is ready to be offered.
struct ReadyDisk {
    vm: VmId,
    vm_name: String,
    volume: VolumeId,
    number: u16,
    size_bytes: u64,
    sequence: u64,
    disk: Arc<ViewDisk>,
}

impl ReadyDisk {
    fn behind(self, door: DoorAddress) -> ViewDiskInfo {
        let Self { vm, vm_name, volume, number, size_bytes, sequence, disk: _ } = self;
        ViewDiskInfo { vm, vm_name, volume, number, size_bytes, sequence, door }
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
        {
            let views = lock(&self.views);
            if let Some(live) = views.get(&view) {
                return Ok(live.info.clone());
            }
            if views.len() >= MAX_VIEWS {
                let message = format!("{MAX_VIEWS} views are open, the most that are possible");
                return Err(ApiError::new(ErrorCode::Exhausted, message).remedy("close one"));
            }
        }
        let (vpg, vms) = self.vms_of(open.subject)?;
        // The pins come first: what is looked up must not be given up before it is opened (C3).
        let _pins: Vec<_> = vms.iter().map(TargetVm::pin).collect();
        let (checkpoint, at) = self.moment(&vms, open.at).await?;
        let mut ready = Vec::new();
        for vm in &vms {
            ready.extend(self.disks_as_they_were(vm, at, view, open.mode).await?);
        }
        let has_own_address = matches!(open.door, DoorRequest::Nbd { listen: Some(_) });
        if has_own_address && ready.len() > 1 {
            return Err(ApiError::new(
                ErrorCode::BadRequest,
                format!("an NBD address of your own is for a single disk, this view has {}", ready.len()),
            )
            .remedy("use the common NBD socket"));
        }
        // First the cookies: what a crash leaves must be known as a view's.
        let cookies: Vec<u32> = match open.door {
            DoorRequest::Ublk { .. } => ready.iter().map(|_| change.get().fresh_cookie()).collect(),
            DoorRequest::Nbd { .. } => vec![0; ready.len()],
        };
        if matches!(open.door, DoorRequest::Ublk { .. }) {
            change.update(|state| state.view_cookies.extend(&cookies))?;
        }
        let mut live = LiveView {
            info: ViewInfo {
                view,
                vpg,
                label: open.label,
                checkpoint,
                mode: open.mode,
                opened_us: TimeUs::now(),
                open_duration_us: 0,
                disks: Vec::new(),
            },
            doors: Vec::new(),
            cookies,
        };
        for (disk, cookie) in ready.into_iter().zip(live.cookies.clone()) {
            let export = format!("view-{view}-{}-{}", disk.vm, disk.number);
            let served = Arc::clone(&disk.disk) as Arc<dyn Disk>;
            let opened = tokio::task::block_in_place(|| {
                self.doors.open_door(served, &open.door, &export, cookie, None)
            });
            match opened {
                Ok(door) => {
                    live.info.disks.push(disk.behind(door.address()));
                    live.doors.push(door);
                }
                Err(error) => {
                    let _ = tokio::task::block_in_place(|| self.close_live(live.doors));
                    change
                        .update(|state| state.view_cookies.retain(|cookie| !live.cookies.contains(cookie)))?;
                    return Err(error);
                }
            }
        }
        live.info.open_duration_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        let info = live.info.clone();
        lock(&self.views).insert(view, live);
        tracing::info!(%view, %vpg, disks = info.disks.len(), "opened a view");
        Ok(info)
    }

    /// The cookies of open views' devices.
    pub(super) fn open_view_cookies(&self) -> Vec<u32> {
        lock(&self.views).values().flat_map(|live| live.cookies.clone()).collect()
    }

    /// Closes a view. One that isn't open is closed already.
    pub(super) async fn close_view(&self, close: CloseView) -> Result<(), ApiError> {
        let mut change = self.state.change().await;
        let Some(live) = lock(&self.views).remove(&close.view) else { return Ok(()) };
        let cookies = live.cookies;
        tokio::task::block_in_place(|| self.close_live(live.doors))?;
        change.update(|state| state.view_cookies.retain(|cookie| !cookies.contains(cookie)))?;
        tracing::info!(view = %close.view, "closed a view");
        Ok(())
    }

    /// The open views, oldest first.
    pub(super) fn view_infos(&self) -> Vec<ViewInfo> {
        let mut infos: Vec<_> = lock(&self.views).values().map(|live| live.info.clone()).collect();
        infos.sort_by_key(|info| (info.opened_us, info.view));
        infos
    }

    /// Whether a view shows a VM of this VPG.
    pub(super) fn has_views_of(&self, vpg: VpgId) -> bool {
        lock(&self.views).values().any(|live| live.info.vpg == vpg)
    }

    /// Closes all views at the daemon's end.
    pub(super) fn close_all_views(&self) {
        for (view, live) in std::mem::take(&mut *lock(&self.views)) {
            if let Err(error) = self.close_live(live.doors) {
                tracing::warn!(%view, %error, "a view didn't close");
            }
        }
    }

    fn close_live(&self, doors: Vec<Door>) -> Result<(), ApiError> {
        let mut result = Ok(());
        for door in doors {
            if let Err(error) = self.doors.close(door) {
                result = Err(error);
            }
        }
        result
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

    async fn disks_as_they_were(
        &self,
        vm: &Arc<TargetVm>,
        at: PointInTime,
        view: ViewId,
        mode: ViewMode,
    ) -> Result<Vec<ReadyDisk>, ApiError> {
        let definition = vm.definition();
        let mut opened = vm.open_view(at).await?;
        let seq = opened.view.seq();
        let pin: Arc<dyn std::any::Any + Send + Sync> = Arc::new(opened.pin);
        let mut ready = Vec::new();
        for (volume, recovery_disk) in definition.volumes.iter().zip(&opened.disks) {
            let duplicate = |file: &std::fs::File| {
                file.try_clone().map_err(|error| {
                    ApiError::new(
                        ErrorCode::Exhausted,
                        format!("cannot duplicate a file descriptor: {error}"),
                    )
                    .remedy("raise LimitNOFILE")
                })
            };
            let not_there = |error| ApiError::new(ErrorCode::NotFound, chain(&error));
            let source = ViewSource {
                volume: opened.view.take_volume(volume.number).map_err(not_there)?,
                journal: duplicate(opened.journal.file())?,
                recovery_disk: duplicate(recovery_disk.file())?,
                seq,
                freshness: Freshness::Superblock,
                keep: Box::new(Arc::clone(&pin)),
            };
            let settings =
                ViewSettings { logical_block_bytes: volume.logical_block_bytes, look_for_holes: false };
            let scratch = match mode {
                ViewMode::ReadOnly => None,
                ViewMode::Scratch => {
                    let limit_bytes = u64::from(self.config.target.scratch_mib) << 20;
                    let path = scratch_path(vm.folder().path(), view, volume.number);
                    let made = tokio::task::block_in_place(|| {
                        ScratchFile::create(&path, limit_bytes.min(volume.size_bytes))
                    });
                    Some(made?)
                }
            };
            let disk = tokio::task::block_in_place(|| ViewDisk::new(source, settings, scratch))?;
            ready.push(ReadyDisk {
                vm: definition.id,
                vm_name: definition.name.clone(),
                volume: volume.id,
                number: volume.number,
                size_bytes: volume.size_bytes,
                sequence: seq,
                disk,
            });
        }
        Ok(ready)
    }
}

impl From<ViewDiskError> for ApiError {
    fn from(error: ViewDiskError) -> Self {
        let code = match &error {
            ViewDiskError::ScratchSpace { .. } => ErrorCode::Exhausted,
            ViewDiskError::AlignmentTooLong(_) => ErrorCode::Unsupported,
            ViewDiskError::Alignment(_) | ViewDiskError::Scratch { .. } => ErrorCode::Io,
        };
        Self::new(code, chain(&error))
    }
}

fn scratch_path(folder: &Path, view: ViewId, volume: u16) -> PathBuf {
    folder.join(format!("scratch-{view}-{volume}.raw"))
}

/// Removes the scratch of views that a killed daemon left.
pub(super) fn remove_left_scratch(folder: &Path) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with("scratch-")
            && name.ends_with(".raw")
            && let Err(error) = std::fs::remove_file(&path)
        {
            tracing::warn!(path = %path.display(), %error, "cannot remove the scratch of a view that a killed daemon left");
        }
    }
}
