//! Volumes after a start of the daemon, and after what kept them from being served: devices that a former daemon left are found and taken over.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ublk::backing::{Backing, BackingSettings};
use ublk::device::{DeviceError, DeviceInfo};
use ublk::serve::Disk;
use ublk::sweep::{Verdict, sweep};

use super::doors::deleted;
use super::growth::defined_bytes;
use super::shares::Share;
use super::state::{Change, ViewStage, VolumeRecord};
use super::volumes::{LiveVolume, disk_over};
use super::{Daemon, lock};
use crate::api::{ApiError, DoorRequest, ErrorCode, VolumeId};
use crate::report::chain;

/// Time between two tries to serve what can't be served.
const RETRY_EVERY: Duration = Duration::from_secs(2);

impl Daemon {
    /// Serves again what was attached before the daemon's start.
    pub(super) fn restore_volumes(&self) {
        self.sweep_devices();
        for (id, record) in &self.seen().volumes {
            self.restore_volume(*id, record, BackingSettings::RECOVERY);
        }
    }

    /// Tries again what failed, since a guest may wait for it. Ends only when cancelled.
    pub(super) async fn keep_serving(self: Arc<Self>) {
        loop {
            tokio::time::sleep(RETRY_EVERY).await;
            if self.swept.load(Ordering::Acquire) && self.failed_volumes().is_empty() && !self.views_wait() {
                continue;
            }
            tokio::task::block_in_place(|| self.doors.look_for_driver());
            let mut change = self.state.change().await;
            if !self.swept.load(Ordering::Acquire) {
                tokio::task::block_in_place(|| self.sweep_devices());
                self.forget_swept_views(&mut change);
            }
            for id in self.failed_volumes() {
                if let Some(record) = change.get().volumes.get(&id) {
                    tokio::task::block_in_place(|| self.restore_volume(id, record, BackingSettings::RETRY));
                }
            }
            if let Err(error) = self.follow_sources(change.get()) {
                tracing::error!(%error, "can't protect all VMs");
            }
            self.retry_views(&mut change).await;
        }
    }

    /// Forgets the devices that belong to no view, once they were deleted.
    pub(super) fn forget_swept_views(&self, change: &mut Change<'_>) {
        if !self.swept.load(Ordering::Acquire) || change.get().view_cookies.is_empty() {
            return;
        }
        if let Err(error) = change.update(|state| state.view_cookies.clear()) {
            tracing::error!(%error, "can't note that the views of a former daemon have gone");
        }
    }

    fn failed_volumes(&self) -> Vec<VolumeId> {
        let volumes = lock(&self.volumes);
        let failed = volumes.iter().filter(|(_, live)| live.problem().is_some());
        failed.map(|(id, _)| *id).collect()
    }

    /// Serves a volume, or notes why that can't be.
    pub(super) fn restore_volume(&self, id: VolumeId, record: &VolumeRecord, settings: BackingSettings) {
        let live = self.reopen(id, record, settings).unwrap_or_else(LiveVolume::Failed);
        let former = lock(&self.volumes).get(&id).and_then(LiveVolume::problem);
        match &live {
            LiveVolume::Failed(error) if former.as_ref() != Some(error) => {
                tracing::error!(volume = %id, vm = record.vm_name, %error, "a volume can't be served");
            }
            LiveVolume::Served { .. } if former.is_some() => {
                tracing::info!(volume = %id, vm = record.vm_name, "a volume is served again");
            }
            _ => {}
        }
        self.point_link(id, &live);
        lock(&self.volumes).insert(id, live);
    }

    fn reopen(
        &self,
        id: VolumeId,
        record: &VolumeRecord,
        settings: BackingSettings,
    ) -> Result<LiveVolume, ApiError> {
        let settings = if record.shared { BackingSettings::SHARED } else { settings };
        let backing = Arc::new(Backing::open(&record.path, settings)?);
        let geometry = backing.geometry();
        // One that has grown meanwhile is served as large as it was: what is new of it comes when its protection knows (E3).
        if geometry.size_bytes < record.size_bytes
            || geometry.logical_block_bytes != record.logical_block_bytes
        {
            return Err(ApiError::new(
                ErrorCode::Conflict,
                format!(
                    "{} had {} bytes in blocks of {} when it was attached, now it has {} in blocks of {}",
                    record.path.display(),
                    record.size_bytes,
                    record.logical_block_bytes,
                    geometry.size_bytes,
                    geometry.logical_block_bytes
                ),
            )
            .remedy("if this is the right disk, detach the volume and attach it again"));
        }
        let share = record.shared.then(|| Share::resume(&backing, id)).transpose()?.map(Arc::new);
        // A definition that says more was followed, perhaps, by a daemon that died before it could note it: its guest may have seen that.
        let size_bytes = record.size_bytes.max(defined_bytes(&self.seen(), id).min(geometry.size_bytes));
        let disk = disk_over(&backing, size_bytes, share.as_deref())?;
        let served = Arc::clone(&disk) as Arc<dyn Disk>;
        let left = match record.door {
            DoorRequest::Ublk { .. } => self.left_device(record.cookie)?,
            DoorRequest::Nbd { .. } => None,
        };
        let door = match left {
            Some(device) => self.doors.recover(device, served)?,
            None => {
                self.doors.open_door(served, &record.door, &id.to_string(), record.cookie, record.device)?
            }
        };
        Ok(LiveVolume::Served { backing, disk, door, share })
    }

    /// Looks through the devices that former daemons left. Those of volumes and views wait to be recovered, others of ours are deleted.
    fn sweep_devices(&self) {
        let seen = self.seen();
        let Ok(driver) = self.doors.driver() else {
            // Devices of views may be there still: their cookies are remembered for the next look.
            self.swept.store(seen.view_cookies.is_empty(), Ordering::Release);
            return;
        };
        let swept = sweep(driver.control(), |_, cookie| {
            if let Some(view) = seen.view_of(cookie.disk_id) {
                match view.stage {
                    ViewStage::Open => Verdict::Recover,
                    ViewStage::Opening | ViewStage::Closing => Verdict::Delete,
                }
            } else if seen.view_cookies.contains(&cookie.disk_id) {
                Verdict::Delete
            } else if seen.volumes.values().any(|volume| volume.cookie == cookie.disk_id) {
                Verdict::Recover
            } else {
                // Another VRA's on this host, perhaps.
                Verdict::Leave
            }
        });
        match swept {
            Ok(swept) => {
                self.swept.store(true, Ordering::Release);
                for (device, error) in swept.failed {
                    tracing::warn!(
                        device,
                        error = chain(&error),
                        "a device that a former daemon left can't be deleted"
                    );
                }
            }
            Err(error) => tracing::error!(
                error = chain(&error),
                "can't look for ublk devices that a former daemon left"
            ),
        }
    }

    /// Deletes the device that a former daemon left for the volume or view of that cookie, if there is one.
    pub(super) fn delete_left_device(&self, cookie: u32, force: bool) -> Result<(), ApiError> {
        match self.left_device(cookie)? {
            Some(device) => Ok(deleted(self.doors.driver()?.delete(device, force))?),
            None => Ok(()),
        }
    }

    /// The device that a former daemon left for the volume or view of that cookie. Without an answer of the driver none may be made: a guest may have it open.
    pub(super) fn left_device(&self, cookie: u32) -> Result<Option<u32>, ApiError> {
        let devices = self.doors.driver()?.list().map_err(DeviceError::from)?;
        let is_left = |info: &DeviceInfo| info.cookie.is_some_and(|found| found.disk_id == cookie);
        Ok(devices.iter().find(|info| is_left(info)).map(|info| info.id))
    }
}
