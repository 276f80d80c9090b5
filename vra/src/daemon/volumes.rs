//! Attached volumes: local disks and the doors to them.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use ublk::backing::{Backing, BackingSettings};
use ublk::serve::{Disk, Geometry};

use super::definition::check_name;
use super::doors::Door;
use super::shares::Share;
use super::state::{State, VolumeRecord};
use super::{Daemon, Finding, lock};
use crate::api::volume::{MAX_VOLUMES_PER_VM, SharedRole, SharedState};
use crate::api::vpg::VolumeDefinition;
use crate::api::{
    ApiError, Attach, Detach, DoorAddress, DoorRequest, ErrorCode, Severity, TimeUs, VmId, VolumeId,
    VolumeInfo, VpgDefinition,
};
use crate::capture::ProtectedDisk;

/// A volume as it is served, or the reason why it isn't.
pub(super) enum LiveVolume {
    /// Its disk is open, its door too.
    Served {
        /// Keeps the local disk open and locked.
        backing: Arc<Backing>,
        /// The disk.
        disk: Arc<ProtectedDisk>,
        /// The door.
        door: Door,
        /// This VRA's part in it, if several serve it.
        share: Option<Arc<Share>>,
    },
    /// It should be served and can't be.
    Failed(ApiError),
}

impl Daemon {
    /// Serves a disk as a volume.
    pub(super) async fn attach(&self, attach: Attach) -> Result<VolumeInfo, ApiError> {
        check_name("VM", &attach.vm_name)?;
        if !attach.path.is_absolute() {
            let message = format!("the path {} is not absolute", attach.path.display());
            return Err(ApiError::new(ErrorCode::BadRequest, message));
        }
        check_shared(&attach)?;
        let mut change = self.state.change().await;
        if let Some((id, record)) = find_same(change.get(), &attach)? {
            let served = match lock(&self.volumes).get(&id) {
                Some(LiveVolume::Served { share, .. }) => Some(share.clone()),
                _ => None,
            };
            if let Some(share) = served {
                if let Some(share) = share.filter(|_| attach.shared == Some(SharedRole::Owner)) {
                    tokio::task::block_in_place(|| share.claim(|| self.has_writers(id)))?;
                    self.follow_sources(change.get())?;
                }
                return self.volume_info(id, &record).ok_or_else(|| gone(id));
            }
            tokio::task::block_in_place(|| self.restore_volume(id, &record, BackingSettings::RECOVERY));
            self.follow_sources(change.get())?;
            return match lock(&self.volumes).get(&id) {
                Some(LiveVolume::Failed(error)) => Err(error.clone()),
                _ => self.volume_info(id, &record).ok_or_else(|| gone(id)),
            };
        }
        let awaited = awaited(change.get(), &attach)?;
        let id = attach.volume.or(awaited.map(|volume| volume.id)).unwrap_or_else(VolumeId::random);
        let wanted = attach.number.or(awaited.map(|volume| volume.number));
        let number = free_number(change.get(), &attach, id, wanted)?;
        let settings = BackingSettings {
            refuse_image_formats: !attach.force_raw,
            lock_later: attach.shared == Some(SharedRole::Standby),
            ..BackingSettings::FIRST_ATTACH
        };
        let backing = tokio::task::block_in_place(|| Backing::open(&attach.path, settings)).map(Arc::new)?;
        if let Some(volume) = awaited {
            check_awaited(volume, &attach, backing.geometry())?;
        }
        let share = tokio::task::block_in_place(|| match attach.shared {
            None => Ok(None),
            Some(SharedRole::Owner) => Share::begin(&backing, id).map(Some),
            Some(SharedRole::Standby) => Share::join(&backing, id).map(Some),
        })?;
        let share = share.map(Arc::new);
        let record = VolumeRecord {
            vm: attach.vm,
            vm_name: attach.vm_name,
            number,
            path: attach.path,
            door: attach.door,
            cookie: change.get().fresh_cookie(),
            device: None,
            // One that has grown while it was away comes as large as it was protected (E3).
            size_bytes: awaited.map_or(backing.geometry().size_bytes, |volume| volume.size_bytes),
            logical_block_bytes: backing.geometry().logical_block_bytes,
            shared: share.is_some(),
        };
        // First the record: a device that a crash leaves must be known by its cookie.
        change.update(|state| state.volumes.insert(id, record.clone()))?;
        let opened = tokio::task::block_in_place(|| {
            let opened = disk_over(&backing, record.size_bytes, share.as_deref()).and_then(|disk| {
                let served = Arc::clone(&disk) as Arc<dyn Disk>;
                let door =
                    self.doors.open_door(served, &record.door, &id.to_string(), record.cookie, None)?;
                Ok((disk, door))
            });
            match opened {
                Ok((disk, door)) => Ok(LiveVolume::Served { backing, disk, door, share }),
                Err(error) => {
                    if let Some(share) = share.filter(|share| share.is_owned()) {
                        share.clear();
                    }
                    Err(error)
                }
            }
        });
        let live = match opened {
            Ok(live) => live,
            Err(error) => {
                change.update(|state| state.volumes.remove(&id))?;
                return Err(error);
            }
        };
        let device = live.device();
        self.point_link(id, &live);
        lock(&self.volumes).insert(id, live);
        change.update(|state| {
            if let Some(record) = state.volumes.get_mut(&id) {
                record.device = device;
            }
        })?;
        tracing::info!(volume = %id, vm = record.vm_name, disk = %record.path.display(), "attached");
        self.follow_sources(change.get())?;
        self.volume_info(id, &record).ok_or_else(|| gone(id))
    }

    /// Stops serving a volume and forgets it.
    pub(super) async fn detach(&self, detach: Detach) -> Result<(), ApiError> {
        let id = detach.volume;
        let mut change = self.state.change().await;
        let Some(record) = change.get().volumes.get(&id).cloned() else {
            return Err(ApiError::new(ErrorCode::NotFound, format!("no volume {id} is attached here"))
                .remedy("see `vra list`"));
        };
        if let Some(vpg) = change.get().vpg_of(record.vm)
            && protects(vpg, id)
            && !detach.force
        {
            return Err(ApiError::new(
                ErrorCode::Conflict,
                format!("volume {id} of VM {} is protected by VPG \"{}\"", record.vm_name, vpg.name),
            )
            .remedy("take it out of the VPG first, or detach with --force: the VM's replication then stops until it is attached again"));
        }
        let live = lock(&self.volumes).remove(&id);
        self.links.remove(id);
        self.follow_sources(change.get())?;
        if let Some(LiveVolume::Served { door, share, .. }) = live {
            if let Some(share) = &share {
                share.end();
            }
            let closed = tokio::task::block_in_place(|| self.doors.close(door));
            if let Err(error) = closed {
                lock(&self.volumes).insert(id, LiveVolume::Failed(error.clone()));
                return Err(error);
            }
            if let Some(share) = &share {
                tokio::task::block_in_place(|| share.clear());
            }
        } else if matches!(record.door, DoorRequest::Ublk { .. }) {
            // Once the record is gone nobody knows the device that a former daemon left, and its guest waits for ever.
            let deleted =
                tokio::task::block_in_place(|| self.delete_left_device(record.cookie, detach.force));
            if let Err(error) = deleted {
                lock(&self.volumes).insert(id, LiveVolume::Failed(error.clone()));
                return Err(error);
            }
        }
        change.update(|state| state.volumes.remove(&id))?;
        tracing::info!(volume = %id, vm = record.vm_name, disk = %record.path.display(), "detached");
        Ok(())
    }

    /// The attached volumes, by VM and number.
    pub(super) fn volume_infos(&self) -> Vec<VolumeInfo> {
        let seen = self.seen();
        let mut infos: Vec<_> =
            seen.volumes.iter().filter_map(|(id, record)| self.volume_info(*id, record)).collect();
        infos.sort_by(|a, b| (&a.vm_name, a.vm, a.number).cmp(&(&b.vm_name, b.vm, b.number)));
        infos
    }

    /// Lets go of all volumes at the daemon's end; ublk devices stay, their guests wait.
    pub(super) fn leave_volumes(&self) {
        self.doors.stop_nbd();
        let volumes = std::mem::take(&mut *lock(&self.volumes));
        for live in volumes.into_values() {
            if let LiveVolume::Served { door, .. } = live {
                door.leave();
            }
        }
    }

    /// What is wrong with volumes.
    pub(super) fn volume_findings(&self, found: &mut Vec<Finding>) {
        let seen = self.seen();
        for (id, live) in lock(&self.volumes).iter() {
            let (LiveVolume::Failed(error), Some(record)) = (live, seen.volumes.get(id)) else { continue };
            found.push(Finding {
                code: "volume-not-served",
                severity: Severity::Critical,
                vm: Some(record.vm),
                vpg: None,
                message: format!(
                    "volume {} of VM {} is not served: {}",
                    record.number, record.vm_name, error.message
                ),
                remedy: Some(
                    error
                        .remedy
                        .clone()
                        .unwrap_or_else(|| "the VRA tries again by itself once that is mended".to_owned()),
                ),
            });
        }
    }

    /// Gives the device of a volume, if it is one, its own name; a volume that isn't served has none.
    pub(super) fn point_link(&self, id: VolumeId, live: &LiveVolume) {
        match live {
            LiveVolume::Served { door: Door::Ublk(device), .. } => self.links.point(id, &device.block_path()),
            LiveVolume::Served { .. } => {}
            LiveVolume::Failed(_) => self.links.remove(id),
        }
    }

    fn volume_info(&self, id: VolumeId, record: &VolumeRecord) -> Option<VolumeInfo> {
        let seen = self.seen();
        let vpg = seen.vpg_of(record.vm).filter(|vpg| protects(vpg, id));
        let volumes = lock(&self.volumes);
        let (door, shared, problem) = match volumes.get(&id)? {
            LiveVolume::Served { door, share, .. } => {
                (Some(door.address()), share.as_ref().map(|share| share.state()), None)
            }
            LiveVolume::Failed(error) => {
                (None, record.shared.then_some(SharedState::Standby), Some(error.message.clone()))
            }
        };
        let link = match &door {
            Some(DoorAddress::Ublk { path, .. }) => self.links.of(id, path),
            _ => None,
        };
        Some(VolumeInfo {
            volume: id,
            vm: record.vm,
            vm_name: record.vm_name.clone(),
            number: record.number,
            path: record.path.clone(),
            size_bytes: record.size_bytes,
            grown_bytes: lock(&self.grown).get(&id).copied(),
            logical_block_bytes: record.logical_block_bytes,
            vpg: vpg.map(|vpg| vpg.id),
            door,
            link,
            problem,
            shared,
        })
    }
}

impl LiveVolume {
    /// Its disk, while it is served.
    pub(super) fn disk(&self) -> Option<Arc<ProtectedDisk>> {
        match self {
            Self::Served { disk, .. } => Some(Arc::clone(disk)),
            Self::Failed(_) => None,
        }
    }

    /// Whether it is served, and what its guest writes goes to the disk: no other VRA owns it.
    pub(super) fn is_writable(&self) -> bool {
        match self {
            Self::Served { share, .. } => share.as_ref().is_none_or(|share| share.is_owned()),
            Self::Failed(_) => false,
        }
    }

    /// Why it can't be served.
    pub(super) fn problem(&self) -> Option<ApiError> {
        match self {
            Self::Served { .. } => None,
            Self::Failed(error) => Some(error.clone()),
        }
    }

    fn device(&self) -> Option<u32> {
        match self {
            Self::Served { door, .. } => door.device(),
            Self::Failed(_) => None,
        }
    }
}

/// The disk that captures, over the first `size_bytes` of the very open file that has the lock (A4), or gets it.
pub(super) fn disk_over(
    backing: &Backing,
    size_bytes: u64,
    share: Option<&Share>,
) -> Result<Arc<ProtectedDisk>, ApiError> {
    let file = backing.file().try_clone().map_err(|error| {
        ApiError::new(ErrorCode::Exhausted, format!("cannot duplicate a file descriptor: {error}"))
            .remedy("raise LimitNOFILE")
    })?;
    let clock = Arc::new(|| TimeUs::now().0);
    let geometry = Geometry { size_bytes, ..backing.geometry().clone() };
    let disk = ProtectedDisk::new(file, geometry, clock);
    Ok(Arc::new(match share {
        Some(share) => disk.behind(Arc::clone(share.gate())),
        None => disk,
    }))
}

/// Whether a disk can be attached as one that several VRAs serve.
fn check_shared(attach: &Attach) -> Result<(), ApiError> {
    let bad = |message: &str| Err(ApiError::new(ErrorCode::BadRequest, message));
    match (attach.shared, &attach.door) {
        (Some(_), DoorRequest::Ublk { .. }) => {
            let refused = bad(
                "a disk that several VRAs serve needs the NBD door: a ublk device doesn't tell when its guest has gone",
            );
            refused.map_err(|error| error.remedy("use the NBD door (--door nbd)"))
        }
        (Some(SharedRole::Standby), _) if attach.volume.is_none() || attach.number.is_none() => {
            let refused = bad("a standby needs the id and the number that the volume has at its owner");
            refused.map_err(|error| error.remedy("`vra --json list` there shows them (--volume, --number)"))
        }
        _ => Ok(()),
    }
}

/// The volume that an attachment would repeat.
fn find_same(state: &State, attach: &Attach) -> Result<Option<(VolumeId, VolumeRecord)>, ApiError> {
    let found = state.volumes.iter().find(|(_, record)| is_same_disk(&record.path, &attach.path));
    let Some((id, record)) = found else { return Ok(None) };
    let same = record.path == attach.path
        && record.vm == attach.vm
        && attach.volume.is_none_or(|volume| volume == *id)
        && attach.number.is_none_or(|number| number == record.number)
        && is_same_door(&record.door, &attach.door)
        && record.shared == attach.shared.is_some();
    if same {
        return Ok(Some((*id, record.clone())));
    }
    let door = match record.door {
        DoorRequest::Ublk { .. } => "ublk",
        DoorRequest::Nbd { .. } => "NBD",
    };
    Err(ApiError::new(
        ErrorCode::Conflict,
        format!(
            "{} is attached already: {} is volume {} ({id}) of VM {} ({}) with a door of kind {door}, {}",
            attach.path.display(),
            record.path.display(),
            record.number,
            record.vm_name,
            record.vm,
            if record.shared { "shared with other VRAs" } else { "not shared with other VRAs" }
        ),
    )
    .remedy(format!("use it as it is, or detach it first: `vra detach {id}`")))
}

/// By their paths, or as the file that both lead to.
fn is_same_disk(one: &Path, other: &Path) -> bool {
    let file = |path: &Path| std::fs::metadata(path).map(|metadata| (metadata.dev(), metadata.ino())).ok();
    one == other || file(one).is_some_and(|one| file(other) == Some(one))
}

fn is_same_door(one: &DoorRequest, other: &DoorRequest) -> bool {
    match (one, other) {
        (DoorRequest::Ublk { .. }, DoorRequest::Ublk { queues: None, depth: None }) => true,
        (one, other) => one == other,
    }
}

/// The volume that a VPG protects and that isn't attached, if the disk to be attached is that one: what was detached by force goes on
/// when it is attached again.
fn awaited<'a>(state: &'a State, attach: &Attach) -> Result<Option<&'a VolumeDefinition>, ApiError> {
    let Some(vpg) = state.vpg_of(attach.vm) else { return Ok(None) };
    let volumes = vpg.vms.iter().filter(|vm| vm.id == attach.vm).flat_map(|vm| &vm.volumes);
    let mut fitting = volumes.filter(|volume| {
        !volume.left
            && !state.volumes.contains_key(&volume.id)
            && attach.volume.is_none_or(|id| id == volume.id)
            && attach.number.is_none_or(|number| number == volume.number)
    });
    let first = fitting.next();
    let others: Vec<_> = fitting.map(|volume| volume.number.to_string()).collect();
    match first {
        Some(first) if !others.is_empty() => Err(ApiError::new(
            ErrorCode::Conflict,
            format!(
                "VPG \"{}\" protects volumes {}, {} of VM {}, which are not attached: which of them is {}?",
                vpg.name,
                first.number,
                others.join(", "),
                attach.vm_name,
                attach.path.display()
            ),
        )
        .remedy("say it by the volume's number (--number)")),
        first => Ok(first),
    }
}

/// Another disk must not go on as a protected volume.
fn check_awaited(volume: &VolumeDefinition, attach: &Attach, geometry: &Geometry) -> Result<(), ApiError> {
    // The same path with a larger disk: it has grown while it was away (E3).
    let may_have_grown = attach.path == volume.source_path && geometry.size_bytes >= volume.size_bytes;
    if (geometry.size_bytes == volume.size_bytes || may_have_grown)
        && geometry.logical_block_bytes == volume.logical_block_bytes
    {
        return Ok(());
    }
    Err(ApiError::new(
        ErrorCode::Conflict,
        format!(
            "{} has {} bytes in blocks of {}, but volume {} of VM {}, which a VPG protects, has {} in blocks of {}",
            attach.path.display(),
            geometry.size_bytes,
            geometry.logical_block_bytes,
            volume.number,
            attach.vm_name,
            volume.size_bytes,
            volume.logical_block_bytes
        ),
    )
    .remedy("attach the disk that was protected, or delete the VPG first; a further disk needs a free number (--number)"))
}

fn free_number(state: &State, attach: &Attach, id: VolumeId, wanted: Option<u16>) -> Result<u16, ApiError> {
    if state.volumes.contains_key(&id) {
        return Err(ApiError::new(ErrorCode::Conflict, format!("volume {id} is another disk here"))
            .remedy("choose another id, or none"));
    }
    let members = state.vpgs.values().flat_map(|vpg| &vpg.vms);
    if members.flat_map(|member| &member.volumes).any(|volume| volume.id == id && volume.left) {
        let message =
            format!("volume {id} has left its VM's protection: its journal knows that id as that disk's");
        return Err(ApiError::new(ErrorCode::Conflict, message)
            .remedy("attach the disk without an id: it gets a new one"));
    }
    let used: Vec<u16> = numbers_of(state, attach.vm);
    if used.len() >= MAX_VOLUMES_PER_VM {
        return Err(ApiError::new(
            ErrorCode::Exhausted,
            format!("VM {} has {MAX_VOLUMES_PER_VM} volumes, the most that are possible", attach.vm_name),
        ));
    }
    let wanted = wanted.or_else(|| (0..u16::MAX).find(|number| !used.contains(number)));
    match wanted {
        Some(number) if usize::from(number) >= MAX_VOLUMES_PER_VM => Err(ApiError::new(
            ErrorCode::BadRequest,
            format!(
                "volume number {number} is too large: a VM's volumes are numbered 0 to {}",
                MAX_VOLUMES_PER_VM - 1
            ),
        )),
        Some(number) if used.contains(&number) => Err(ApiError::new(
            ErrorCode::Conflict,
            format!("VM {} has a volume with number {number} already", attach.vm_name),
        )
        .remedy("`vra list` shows the numbers; without --number it is the lowest free one")),
        Some(number) => Ok(number),
        None => Err(ApiError::new(ErrorCode::Exhausted, "no volume number is free")),
    }
}

/// Those of disks that have left the VM's protection are not free: its journal has them.
fn numbers_of(state: &State, vm: VmId) -> Vec<u16> {
    let attached = state.volumes.values().filter(|volume| volume.vm == vm).map(|volume| volume.number);
    let members = state.vpg_of(vm).into_iter().flat_map(|vpg| &vpg.vms).filter(|member| member.id == vm);
    let left = members.flat_map(|member| &member.volumes).filter(|volume| volume.left);
    let mut numbers: Vec<u16> = attached.chain(left.map(|volume| volume.number)).collect();
    numbers.sort_unstable();
    numbers.dedup();
    numbers
}

/// Whether a VPG protects a volume now.
pub(super) fn protects(vpg: &VpgDefinition, id: VolumeId) -> bool {
    vpg.vms.iter().flat_map(|vm| &vm.volumes).any(|volume| volume.id == id && !volume.left)
}

fn gone(id: VolumeId) -> ApiError {
    ApiError::new(ErrorCode::Other, format!("volume {id} was detached meanwhile"))
}
