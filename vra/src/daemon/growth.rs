//! Volumes whose local disks grow (E3): seen at the disks, protected once the definition says so, then given to their guests.
//!
//! The order, none of which may come before the one above it: the target has the space and the size (its definition); the stream says it; the
//! guest gets it.

use std::collections::BTreeMap;
use std::sync::Arc;

use ublk::backing::BackingKind;
use ublk::serve::Disk;

use super::sources::LiveSource;
use super::state::State;
use super::volumes::LiveVolume;
use super::{Daemon, Finding, lock};
use crate::api::vpg::VmDefinition;
use crate::api::{Severity, VolumeId};
use crate::report::chain;

/// A volume whose local disk has grown.
struct Grown {
    id: VolumeId,
    /// What the disk has, in bytes.
    local_bytes: u64,
    /// What its doors show of it, in bytes.
    served_bytes: u64,
}

impl Daemon {
    /// Looks how large the local disks of volumes are now. What no VPG protects grows at once.
    pub(super) async fn look_for_growth(&self) {
        let found = tokio::task::block_in_place(|| self.grown_disks());
        let seen = self.seen();
        let mut waiting = BTreeMap::new();
        for Grown { id, local_bytes, served_bytes } in found {
            let noted_bytes = seen.volumes.get(&id).map_or(u64::MAX, |record| record.size_bytes);
            if !is_protected(&seen, id) {
                self.give(id, local_bytes).await;
            } else if served_bytes > noted_bytes {
                // A daemon that died has not noted it, or couldn't.
                self.give(id, served_bytes).await;
            } else {
                waiting.insert(id, local_bytes);
            }
        }
        *lock(&self.grown) = waiting;
    }

    /// The volumes whose local disks have more than was noted of them.
    fn grown_disks(&self) -> Vec<Grown> {
        let seen = self.seen();
        let served: Vec<_> = {
            let volumes = lock(&self.volumes);
            let served = volumes.iter().filter_map(|(id, live)| match live {
                LiveVolume::Served { backing, disk, .. } => {
                    Some((*id, Arc::clone(backing), disk.geometry().size_bytes))
                }
                LiveVolume::Failed(_) => None,
            });
            served.collect()
        };
        let grown = served.into_iter().filter_map(|(id, backing, served_bytes)| {
            // One that doesn't say fails its guest's requests, too, which shows.
            let local_bytes = backing.size_now().ok()?;
            (local_bytes > seen.volumes.get(&id)?.size_bytes).then_some(Grown {
                id,
                local_bytes,
                served_bytes,
            })
        });
        grown.collect()
    }

    /// What a volume's local disk has now, in bytes; zero if it isn't served.
    pub(super) fn local_bytes(&self, id: VolumeId) -> u64 {
        let backing = match lock(&self.volumes).get(&id) {
            Some(LiveVolume::Served { backing, .. }) => Arc::clone(backing),
            _ => return 0,
        };
        tokio::task::block_in_place(|| backing.size_now()).unwrap_or(0)
    }

    /// What the local disks of a VM's volumes have, in bytes; they are looked at only where the definition says more than is served.
    pub(super) fn local_sizes(&self, vm: &VmDefinition) -> Vec<u64> {
        let seen = self.seen();
        let local = vm.volumes.iter().map(|volume| {
            let served_bytes = seen.volumes.get(&volume.id).map_or(u64::MAX, |record| record.size_bytes);
            if volume.size_bytes > served_bytes { self.local_bytes(volume.id) } else { u64::MAX }
        });
        local.collect()
    }

    /// A VM's stream says that one of its volumes is larger: its guest gets it.
    pub(super) async fn give_growth(self: Arc<Self>, source: Arc<LiveSource>, volume: u16, size_bytes: u64) {
        let Some(defined) = source.definition().volumes.get(usize::from(volume)) else { return };
        self.give(defined.id, size_bytes).await;
        let is_device = match lock(&self.volumes).get(&defined.id) {
            Some(LiveVolume::Served { backing, .. }) => backing.kind() == BackingKind::BlockDevice,
            _ => false,
        };
        if is_device {
            // What is new of a file reads zeroes, as it does at the target. A device may have anything there.
            tracing::info!(
                vm = source.definition().name,
                volume,
                "a full sync brings what is new of a block device"
            );
            source.vm().renew();
        }
    }

    /// Serves so much of a volume's local disk, in bytes.
    async fn give(&self, id: VolumeId, size_bytes: u64) {
        let mut change = self.state.change().await;
        let Some(record) = change.get().volumes.get(&id).cloned() else { return };
        if record.size_bytes < size_bytes {
            // First the record: what a guest has once seen it sees after a restart.
            let noted = change.update(|state| {
                if let Some(record) = state.volumes.get_mut(&id) {
                    record.size_bytes = size_bytes;
                }
            });
            if let Err(error) = noted {
                tracing::error!(volume = %id, vm = record.vm_name, %error, "can't note that a volume has grown: trying again");
                return;
            }
            let former_bytes = record.size_bytes;
            tracing::info!(volume = %id, vm = record.vm_name, former_bytes, size_bytes, "a volume has grown");
        }
        drop(change);
        let device = match lock(&self.volumes).get(&id) {
            Some(LiveVolume::Served { disk, door, .. }) => {
                disk.grow(size_bytes);
                door.device_size()
            }
            _ => None,
        };
        if let Some(device) = device
            && let Err(error) = tokio::task::block_in_place(|| device.grow(size_bytes))
        {
            tracing::warn!(volume = %id, vm = record.vm_name, error = chain(&error), "the guest doesn't see that its disk has grown");
        }
        lock(&self.grown).remove(&id);
    }

    /// What of volumes their guests, or their protection, don't have.
    pub(super) fn growth_findings(&self, found: &mut Vec<Finding>) {
        let seen = self.seen();
        let mut add = |id: VolumeId, code, message: String, remedy: &str| {
            let record = &seen.volumes[&id];
            found.push(Finding {
                code,
                severity: Severity::Warning,
                vm: Some(record.vm),
                vpg: seen.vpg_of(record.vm).map(|vpg| vpg.id),
                message: format!("volume {} of VM {}: {message}", record.number, record.vm_name),
                remedy: Some(remedy.to_owned()),
            });
        };
        let grown = lock(&self.grown).clone();
        for (id, local_bytes) in grown.into_iter().filter(|(id, _)| seen.volumes.contains_key(id)) {
            let served_bytes = seen.volumes[&id].size_bytes;
            add(
                id,
                "volume-grown",
                format!(
                    "its disk has {local_bytes} bytes now, of which {served_bytes} are served and protected"
                ),
                "the ZVM changes the VPG's definition by itself: look at `zvm alerts` for what keeps it from that. The guest gets the rest \
                 once its target has the space and no full sync runs",
            );
        }
        for (id, live) in lock(&self.volumes).iter() {
            let (LiveVolume::Served { door, .. }, Some(record)) = (live, seen.volumes.get(id)) else {
                continue;
            };
            let Some(size) = door.device_size() else { continue };
            if size.bytes() < record.size_bytes {
                add(
                    *id,
                    "device-not-grown",
                    format!(
                        "its disk and its protection have {} bytes, its ublk device {}: this kernel can't make a device larger while it is there",
                        record.size_bytes,
                        size.bytes()
                    ),
                    "stop the guest, then detach and attach the volume (`vra detach --force`, `vra attach`); or use kernel 6.16 or newer",
                );
            }
        }
    }
}

fn is_protected(state: &State, id: VolumeId) -> bool {
    let vms = state.vpgs.values().flat_map(|vpg| &vpg.vms);
    vms.flat_map(|vm| &vm.volumes).any(|volume| volume.id == id && !volume.left)
}
