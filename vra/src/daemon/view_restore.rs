//! Views after a start of the daemon: opened again as they were, or told why they can't be.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ublk::serve::Disk;

use super::doors::Door;
use super::state::{Change, ViewDiskRecord, ViewRecord, ViewStage};
use super::views::{LiveDisk, LiveView, ReadyDisk, export_name};
use super::{Daemon, Finding, lock};
use crate::api::door::NbdListen;
use crate::api::{ApiError, DoorAddress, DoorRequest, ErrorCode, PointInTime, Severity, ViewId, VmId, VpgId};
use crate::receive::TargetVm;
use crate::view::{ScratchFile, remove_scratch};

/// How long a start waits at most for the locks of all scratch files together: what a daemon that died has under way holds them. Views whose
/// scratch stays locked are tried again while everything else is served.
const START_LOCK_WAIT: Duration = Duration::from_secs(1);

/// How long the removal of an orphan is told.
const TELL_REMOVED: Duration = Duration::from_secs(3600);

/// Scratch files that no view has.
#[derive(Debug, Default)]
pub(super) struct Orphans {
    looked_at: BTreeSet<VmId>,
    found: Vec<Orphan>,
}

#[derive(Debug)]
struct Orphan {
    vm: VmId,
    path: PathBuf,
    removed: Option<Instant>,
}

impl Daemon {
    /// Sees to it that no journal is opened without what views need of it being kept (C3): to be called before any is.
    pub(super) fn await_views(&self) {
        for record in self.seen().views.values().filter(|record| record.stage == ViewStage::Open) {
            let needed: BTreeSet<_> = record.info.disks.iter().map(|disk| (disk.vm, disk.sequence)).collect();
            for (vm, seq) in &needed {
                self.targets.await_view(*vm, *seq);
            }
            let error = ApiError::new(ErrorCode::NotReady, "it is being opened again");
            let disks = record.disks.iter().map(|_| LiveDisk::Failed(error.clone())).collect();
            let live = LiveView { info: record.info.clone(), disks, awaited: needed.into_iter().collect() };
            lock(&self.views).insert(record.info.view, live);
        }
    }

    /// Opens the views that were open before the daemon's start, and ends those that nobody was told of or that were being closed.
    pub(super) async fn restore_views(&self, change: &mut Change<'_>) {
        let records = change.get().views.clone();
        let lock_until = Instant::now() + START_LOCK_WAIT;
        for (view, record) in records {
            if record.stage == ViewStage::Open {
                self.restore_view(change, view, &record, lock_until).await;
            } else if let Err(error) = self.end_view(change, view) {
                tracing::error!(%view, %error, "a view of a former daemon can't be ended");
            }
        }
        self.look_for_orphans(change).await;
    }

    /// Whether a view waits for something that may come by itself.
    pub(super) fn views_wait(&self) -> bool {
        let may_come = |disk: &LiveDisk| matches!(disk, LiveDisk::Failed(error) if may_pass(error));
        let waits = lock(&self.views).values().any(|live| live.disks.iter().any(may_come));
        waits || {
            let looked_at = &lock(&self.orphans).looked_at;
            self.targets.vms().iter().any(|vm| !looked_at.contains(&vm.id()))
        }
    }

    /// Opens what is missing of a view, or notes why that can't be.
    async fn restore_view(
        &self,
        change: &mut Change<'_>,
        view: ViewId,
        record: &ViewRecord,
        lock_until: Instant,
    ) {
        let missing: Vec<usize> = match lock(&self.views).get(&view) {
            Some(live) if live.disks.len() == record.disks.len() => {
                let failed = live.disks.iter().enumerate();
                failed
                    .filter(|(_, disk)| matches!(disk, LiveDisk::Failed(_)))
                    .map(|(index, _)| index)
                    .collect()
            }
            _ => return,
        };
        let mut by_vm: BTreeMap<VmId, Vec<usize>> = BTreeMap::new();
        for index in missing {
            by_vm.entry(record.disks[index].vm).or_default().push(index);
        }
        for (vm, indexes) in by_vm {
            let opened = self.restore_vm(record, vm, &indexes, lock_until).await;
            let mut views = lock(&self.views);
            let Some(live) = views.get_mut(&view) else { return };
            for (index, opened) in indexes.into_iter().zip(opened) {
                match &opened {
                    LiveDisk::Served { door, .. } => live.info.disks[index].door = door.address(),
                    LiveDisk::Failed(error) => {
                        let is_news =
                            !matches!(&live.disks[index], LiveDisk::Failed(former) if former == error);
                        if is_news {
                            tracing::error!(%view, %vm, %error, "a disk of a view can't be served");
                        }
                    }
                }
                live.disks[index] = opened;
            }
            let served = |disk: &ViewDiskRecord, live: &LiveDisk| {
                disk.vm != vm || matches!(live, LiveDisk::Served { .. })
            };
            if record.disks.iter().zip(&live.disks).all(|(disk, live)| served(disk, live)) {
                // Each disk has a pin of its own now.
                let (ended, awaited) = live.awaited.iter().partition(|(awaited, _)| *awaited == vm);
                live.awaited = awaited;
                drop(views);
                let ended: Vec<(VmId, u64)> = ended;
                ended.into_iter().for_each(|(vm, seq)| self.targets.stop_awaiting(vm, seq));
                tracing::info!(%view, %vm, "the disks of a view are served again");
            }
        }
        let info = lock(&self.views).get(&view).map(|live| live.info.clone());
        if let Some(info) = info.filter(|info| *info != record.info) {
            let noted = change.update(|state| {
                if let Some(record) = state.views.get_mut(&view) {
                    record.info = info;
                }
            });
            if let Err(error) = noted {
                tracing::error!(%view, %error, "can't note where a view's disks are now");
            }
        }
    }

    async fn restore_vm(
        &self,
        record: &ViewRecord,
        vm: VmId,
        indexes: &[usize],
        lock_until: Instant,
    ) -> Vec<LiveDisk> {
        let wanted: Vec<&ViewDiskRecord> = indexes.iter().map(|index| &record.disks[*index]).collect();
        match self.ready_again(record, vm, &wanted, indexes, lock_until).await {
            Ok(disks) => disks,
            Err(error) => indexes.iter().map(|_| LiveDisk::Failed(error.clone())).collect(),
        }
    }

    async fn ready_again(
        &self,
        record: &ViewRecord,
        vm: VmId,
        wanted: &[&ViewDiskRecord],
        indexes: &[usize],
        lock_until: Instant,
    ) -> Result<Vec<LiveDisk>, ApiError> {
        let target: Arc<TargetVm> = self.targets.vm(vm).ok_or_else(|| {
            ApiError::new(ErrorCode::NotReady, format!("the journal of VM {vm} is not open"))
        })?;
        let first = indexes.first().and_then(|index| record.info.disks.get(*index));
        let sequence = first.map(|disk| disk.sequence).ok_or_else(|| {
            ApiError::new(ErrorCode::Corrupt, format!("nothing says what the view shows of VM {vm}"))
        })?;
        let at = PointInTime::Sequence { sequence };
        let ready = self.former_disks(&target, at, record, wanted, lock_until).await?;
        let mut disks = Vec::new();
        for ((wanted, index), ready) in wanted.iter().zip(indexes).zip(ready) {
            let served = ready.and_then(|ready| {
                let ReadyDisk { disk, .. } = ready;
                let former = record.info.disks.get(*index).map(|disk| &disk.door);
                let served = Arc::clone(&disk) as Arc<dyn Disk>;
                let door = tokio::task::block_in_place(|| self.door_again(record, wanted, former, served))?;
                Ok(LiveDisk::Served { door, disk })
            });
            disks.push(served.unwrap_or_else(LiveDisk::Failed));
        }
        Ok(disks)
    }

    /// The door that a disk had: the same device, whose requests have waited, or the same address.
    fn door_again(
        &self,
        record: &ViewRecord,
        wanted: &ViewDiskRecord,
        former: Option<&DoorAddress>,
        disk: Arc<dyn Disk>,
    ) -> Result<Door, ApiError> {
        let export = export_name(record.info.view, wanted);
        let request = match (&record.door, former) {
            (DoorRequest::Ublk { .. }, former) => {
                if let Some(device) = self.left_device(wanted.cookie)? {
                    return self.doors.recover(device, disk);
                }
                let number = match former {
                    Some(DoorAddress::Ublk { device, .. }) => Some(*device),
                    _ => None,
                };
                return self.doors.open_door(disk, &record.door, &export, wanted.cookie, number);
            }
            // Port 0 was any port; now it is that one.
            (
                DoorRequest::Nbd { listen: Some(NbdListen::Tcp { .. }) },
                Some(DoorAddress::NbdTcp { address, .. }),
            ) => DoorRequest::Nbd { listen: Some(NbdListen::Tcp { address: *address }) },
            (request, _) => request.clone(),
        };
        self.doors.open_door(disk, &request, &export, 0, None)
    }

    /// Tries again what may have become possible.
    pub(super) async fn retry_views(&self, change: &mut Change<'_>) {
        let records = change.get().views.clone();
        for (view, record) in records {
            let waits = lock(&self.views).get(&view).is_some_and(|live| {
                live.disks.iter().any(|disk| matches!(disk, LiveDisk::Failed(error) if may_pass(error)))
            });
            match record.stage {
                ViewStage::Open if waits => self.restore_view(change, view, &record, Instant::now()).await,
                ViewStage::Opening | ViewStage::Closing if waits => {
                    // What is still in the way was noted.
                    let _ = self.end_view(change, view);
                }
                _ => {}
            }
        }
        self.look_for_orphans(change).await;
    }

    /// Lets go of all views at the daemon's end, for the next start.
    pub(super) fn leave_views(&self) {
        let views = std::mem::take(&mut *lock(&self.views));
        for (view, live) in views {
            for disk in live.disks {
                let LiveDisk::Served { door, disk } = disk else { continue };
                door.leave();
                match disk.close_scratch() {
                    Ok(true) => {}
                    // What a device that is still served has answered is in memory that outlives this process.
                    Ok(false) => tracing::info!(%view, "a disk of the view is in use until the end"),
                    Err(error) => tracing::warn!(
                        %view,
                        error = crate::report::chain(&error),
                        "the scratch of a view could not be closed in order: what was flushed is there"
                    ),
                }
            }
        }
    }

    /// Looks once for each VM for scratch files that no view has. One that is ours for certain is removed.
    async fn look_for_orphans(&self, change: &Change<'_>) {
        for vm in self.targets.vms() {
            if !lock(&self.orphans).looked_at.insert(vm.id()) {
                continue;
            }
            let views = &change.get().views;
            let recorded: BTreeSet<&Path> = views
                .values()
                .flat_map(|record| &record.disks)
                .filter_map(|disk| disk.scratch.as_deref())
                .collect();
            let Ok(entries) = std::fs::read_dir(vm.folder().path()) else { continue };
            for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                let is_scratch = name.starts_with("scratch-") && name.ends_with(".raw");
                if !is_scratch || recorded.contains(path.as_path()) {
                    continue;
                }
                let owner = tokio::task::block_in_place(|| ScratchFile::owner(&path)).ok().flatten();
                let ours = owner.filter(|owner| {
                    (owner.vra, owner.vm, owner.journal) == (self.vra.0, vm.id().0, vm.journal().0)
                        && !views.contains_key(&ViewId(owner.view))
                });
                let removed = ours.is_some_and(|owner| {
                    let live = self.live_map_path(ViewId(owner.view), vm.id(), owner.number);
                    remove_scratch(&path, &live).is_ok()
                });
                tracing::warn!(path = %path.display(), removed, "a scratch file belongs to no view");
                let removed = removed.then(Instant::now);
                lock(&self.orphans).found.push(Orphan { vm: vm.id(), path, removed });
            }
        }
    }

    /// What is wrong with views.
    pub(super) fn view_findings(&self, found: &mut Vec<Finding>) {
        // One alert for each code and group: all of its views are in it.
        let mut problems: BTreeMap<(&'static str, VpgId), (Vec<String>, String)> = BTreeMap::new();
        for (view, live) in lock(&self.views).iter() {
            for (info, disk) in live.info.disks.iter().map(Some).chain([None]).zip(&live.disks) {
                let (code, why, remedy) = match disk {
                    LiveDisk::Failed(error) => (
                        "view-not-served",
                        error.message.clone(),
                        error.remedy.clone().unwrap_or_else(|| remedy_of(error).to_owned()),
                    ),
                    LiveDisk::Served { disk, .. } if disk.is_gone() => (
                        "view-history-gone",
                        "the history that it shows is gone".to_owned(),
                        CLOSE.to_owned(),
                    ),
                    LiveDisk::Served { disk, .. } if disk.is_scratch_failed() => (
                        "scratch-failed",
                        "a write or sync of its scratch has failed, it takes no more".to_owned(),
                        "look at the datastore; what was flushed before can be read until the view is closed"
                            .to_owned(),
                    ),
                    LiveDisk::Served { .. } => continue,
                };
                let which = info
                    .map_or_else(String::new, |info| format!(" disk {} of VM {}", info.number, info.vm_name));
                let message = format!("view {view}{which}: {why}");
                let entry = problems.entry((code, live.info.vpg)).or_insert_with(|| (Vec::new(), remedy));
                entry.0.push(message);
            }
        }
        for ((code, vpg), (messages, remedy)) in problems {
            found.push(Finding {
                code,
                severity: Severity::Warning,
                vm: None,
                vpg: Some(vpg),
                message: messages.join("; "),
                remedy: Some(remedy),
            });
        }
        self.orphan_findings(found);
    }

    fn orphan_findings(&self, found: &mut Vec<Finding>) {
        let mut orphans = lock(&self.orphans);
        orphans.found.retain(|orphan| match orphan.removed {
            Some(removed) => removed.elapsed() < TELL_REMOVED,
            None => orphan.path.exists(),
        });
        let mut by_vm: BTreeMap<(VmId, bool), Vec<String>> = BTreeMap::new();
        for Orphan { vm, path, removed } in &orphans.found {
            by_vm.entry((*vm, removed.is_some())).or_default().push(path.display().to_string());
        }
        for ((vm, removed), paths) in by_vm {
            let paths = paths.join(", ");
            let (code, severity, message, remedy) = if removed {
                let remedy =
                    "nothing needs to be done; the VRA's state may be an older one than its datastore";
                let message = format!("{paths}: scratch of no view, removed");
                ("scratch-orphan-removed", Severity::Info, message, remedy)
            } else {
                let message = format!("{paths}: scratch of no view, and perhaps not this VRA's");
                let remedy = "remove the file if nobody needs it";
                ("scratch-orphan", Severity::Warning, message, remedy)
            };
            found.push(Finding {
                code,
                severity,
                vm: Some(vm),
                vpg: None,
                message,
                remedy: Some(remedy.to_owned()),
            });
        }
    }
}

const CLOSE: &str = "close the view with `vra view close`, which removes its scratch, or `zvm test stop`";

/// Whether a failure may pass by itself.
fn may_pass(error: &ApiError) -> bool {
    !matches!(error.code, ErrorCode::NotFound | ErrorCode::Corrupt | ErrorCode::Conflict)
}

fn remedy_of(error: &ApiError) -> &'static str {
    if may_pass(error) {
        "the VRA tries again by itself once that is mended; closing the view gives it up, with its scratch"
    } else {
        CLOSE
    }
}
