//! A VM's protected disks, found among those that its source serves.

use std::collections::BTreeMap;
use std::path::Path;

use vra::api::volume::{MAX_VOLUMES_PER_VM, VolumeInfo};
use vra::api::vpg::VolumeDefinition;
use vra::api::{ApiError, ErrorCode, VmId, VraId};

use super::bad;
use crate::inventory::{Disk, Power, Vm};
use crate::model::vpg::ExcludedDisk;
use crate::model::vra::Vra;

/// Says of a protected disk whether it is swap.
pub(super) fn set_swap(
    volumes: &mut [VolumeDefinition],
    vm: &str,
    path: &Path,
    swap: bool,
) -> Result<(), ApiError> {
    let found = volumes.iter_mut().find(|volume| volume.source_path == path && !volume.left);
    let found = found.ok_or_else(|| {
        bad(format!("disk {} of VM {vm:?} isn't protected, so it can't be a swap disk", path.display()))
    })?;
    found.swap = swap;
    if volumes.iter().all(|volume| volume.swap || volume.left) {
        return Err(bad(format!("all protected disks of VM {vm:?} would be swap"))
            .remedy("leave at least one whose writes are captured"));
    }
    Ok(())
}

/// The disks of a VM that are to be protected, by number, as its source serves them, with those that have `left`.
pub(super) fn volumes_of(
    vm: &Vm,
    source: &Vra,
    excluded: &[ExcludedDisk],
    left: &[VolumeDefinition],
    served: &BTreeMap<VraId, Vec<VolumeInfo>>,
) -> Result<Vec<VolumeDefinition>, ApiError> {
    let served = served.get(&source.id).into_iter().flatten();
    let at_source: Vec<&VolumeInfo> = served.filter(|volume| volume.vm == VmId(vm.uuid)).collect();
    let mut volumes = Vec::with_capacity(vm.disks.len());
    let is_excluded = |disk: &&Disk| excluded.iter().any(|excluded| excluded.is(disk));
    for disk in vm.disks.iter().filter(|disk| !is_excluded(disk)) {
        if disk.served == Some(false)
            && vm.power != Power::Off
            && at_source.iter().any(|volume| volume.path == disk.path)
        {
            let message = format!(
                "the guest of VM {:?} still writes to disk {} ({}) itself, past VRA {}",
                vm.name,
                disk.name,
                disk.path.display(),
                source.name
            );
            return Err(ApiError::new(ErrorCode::NotReady, message).remedy(
                "shut it down and start it again (a reboot from within is not enough): it then gets the served device",
            ));
        }
        let volume = at_source.iter().find(|volume| volume.path == disk.path).ok_or_else(|| {
            let message = format!(
                "disk {} ({}) of VM {:?} is not served by VRA {}",
                disk.name,
                disk.path.display(),
                vm.name,
                source.name
            );
            let error = ApiError::new(ErrorCode::NotReady, message);
            if disk.served.is_some() {
                return error.remedy(format!("run `zvm protect {}`, or leave the disk out", vm.name));
            }
            error.remedy(format!(
                "on that host run `vra attach {} --vm-name {:?} --vm {}` and give the guest the device that it prints",
                disk.path.display(),
                vm.name,
                vm.uuid
            ))
        })?;
        // A running guest's size of a served disk is what it was given, before the disk grew perhaps.
        let is_asked = disk.served != Some(true) || vm.power == Power::Off;
        let other = disk.size_bytes.filter(|size_bytes| is_asked && *size_bytes != volume.size_bytes);
        if let Some(size_bytes) = other {
            return Err(bad(format!(
                "disk {} of VM {:?} has {} bytes, the inventory says {size_bytes}",
                disk.name, vm.name, volume.size_bytes
            )));
        }
        volumes.push(VolumeDefinition {
            id: volume.volume,
            number: volume.number,
            size_bytes: volume.size_bytes,
            logical_block_bytes: volume.logical_block_bytes,
            source_path: volume.path.clone(),
            left: false,
            swap: false,
        });
    }
    volumes.extend_from_slice(left);
    volumes.sort_by_key(|volume| volume.number);
    if volumes.len() > MAX_VOLUMES_PER_VM {
        return Err(bad(format!("VM {:?} has more than {MAX_VOLUMES_PER_VM} disks", vm.name)));
    }
    if volumes.iter().enumerate().any(|(at, volume)| usize::from(volume.number) != at) {
        let is_served = |disk: &&ExcludedDisk| at_source.iter().any(|volume| volume.path == disk.path);
        if let Some(disk) = excluded.iter().find(is_served) {
            let message = format!(
                "disk {} of VM {:?} is excluded, and VRA {} serves it before disks that are protected",
                disk.name, vm.name, source.name
            );
            return Err(ApiError::new(ErrorCode::Conflict, message).remedy(format!(
                "give the guest {0} itself, `vra detach {0}` on that host, and attach the others without a gap in their numbers",
                disk.path.display()
            )));
        }
        if at_source.iter().all(|served| volumes.iter().any(|volume| volume.id == served.volume)) {
            return Err(gap(vm, source, &volumes));
        }
        let message =
            format!("VRA {} serves other disks for VM {:?} than the inventory has", source.name, vm.name);
        return Err(ApiError::new(ErrorCode::Conflict, message)
            .remedy("detach those that are not the VM's with `vra detach`, or correct the inventory"));
    }
    Ok(volumes)
}

/// Disks that left leave gaps in the numbers of those that stay, which a journal that is made anew can't have.
fn gap(vm: &Vm, source: &Vra, volumes: &[VolumeDefinition]) -> ApiError {
    let numbers: Vec<String> = volumes.iter().map(|volume| volume.number.to_string()).collect();
    let message = format!(
        "VRA {} serves the disks of VM {:?} under the numbers {}; a new journal takes them from 0 without a gap",
        source.name,
        vm.name,
        numbers.join(", ")
    );
    let moved: Vec<String> = (0_u16..)
        .zip(volumes)
        .filter(|(number, volume)| *number != volume.number)
        .map(|(number, volume)| format!("{} with `--number {number}`", volume.source_path.display()))
        .collect();
    ApiError::new(ErrorCode::Conflict, message).remedy(format!(
        "shut the VM down, `vra detach` on that host, and `vra attach` again {}",
        moved.join(", ")
    ))
}
