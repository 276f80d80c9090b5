//! Volumes whose local disks grow (E3): seen at the disks, protected once the definition says so, then given to their guests.
//!
//! The order, none of which may come before the one above it: the target has the space and the size (its definition); the stream says it, and
//! brings what is new; the guest gets it.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::runtime::Handle;
use ublk::serve::Disk;

use super::sources::LiveSource;
use super::state::State;
use super::volumes::{LiveVolume, protects};
use super::{Daemon, Finding, LOOK_EVERY, lock};
use crate::api::vpg::VmDefinition;
use crate::api::{Severity, VolumeId};
use crate::capture::NewRange;
use crate::report::chain;
use crate::sync::bring_new;

/// A volume whose local disk has grown.
struct Grown {
    id: VolumeId,
    /// What the disk has, in bytes.
    local_bytes: u64,
    /// What its doors show of it, in bytes.
    served_bytes: u64,
}

impl Daemon {
    /// Looks how large the local disks of volumes are now, again and again. Ends only when cancelled.
    pub(super) async fn look_for_growth(self: Arc<Self>) {
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let daemon = Arc::clone(&self);
            // Storage that hangs holds up nothing else.
            match tokio::task::spawn_blocking(move || daemon.grown_disks()).await {
                Ok(found) => self.follow_growth(found).await,
                Err(error) => tracing::error!(%error, "can't look for disks that have grown"),
            }
        }
    }

    /// What no VPG protects grows at once; what the definition has already, with its stream.
    async fn follow_growth(&self, found: Vec<Grown>) {
        let seen = self.seen();
        let (mut waiting, mut may_grow) = (BTreeMap::new(), false);
        for Grown { id, local_bytes, served_bytes } in found {
            let noted_bytes = seen.volumes.get(&id).map_or(u64::MAX, |record| record.size_bytes);
            if !is_protected(&seen, id) {
                self.give(id, local_bytes, false).await;
            } else if served_bytes > noted_bytes {
                // A daemon that died has not noted it, or couldn't.
                self.give(id, served_bytes, true).await;
            } else {
                may_grow |= defined_bytes(&seen, id) > noted_bytes;
                waiting.insert(id, local_bytes);
            }
        }
        *lock(&self.grown) = waiting;
        if may_grow {
            let change = self.state.change().await;
            if let Err(error) = self.follow_sources(change.get()) {
                tracing::error!(%error, "can't protect all VMs");
            }
        }
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

    /// What a volume's local disk was last seen to have, in bytes, if that is more than is served of it; zero if not.
    pub(super) fn grown_bytes(&self, id: VolumeId) -> u64 {
        lock(&self.grown).get(&id).copied().unwrap_or(0)
    }

    /// How large the volumes of a VM may be now, in bytes, as far as their local disks are known to reach.
    pub(super) fn local_sizes(&self, vm: &VmDefinition) -> Vec<u64> {
        let seen = self.seen();
        let local = vm.volumes.iter().map(|volume| match seen.volumes.get(&volume.id) {
            Some(record) => record.size_bytes.max(self.grown_bytes(volume.id)),
            // What stands in for it has what the definition says.
            None => u64::MAX,
        });
        local.collect()
    }

    /// A VM's stream has said that one of its volumes is larger: what is new goes to the target, then its guest gets it. On a thread of its own,
    /// which ends with the generation.
    pub(super) fn bring_growth(self: Arc<Self>, source: &Arc<LiveSource>, new: NewRange) {
        let (source, runtime) = (Arc::clone(source), Handle::current());
        let name = source.definition().name.clone();
        let bring = move || {
            let disk = &source.vm().disks()[usize::from(new.volume)];
            match bring_new(source.vm(), &new, &disk.files()[0], &source.definition().name) {
                Ok(true) => {
                    let noted = self.note_growth(Arc::clone(&source), new.volume, new.range.end);
                    runtime.spawn(noted);
                }
                Ok(false) => {}
                Err(error) => {
                    tracing::error!(vm = source.definition().name, %error, "no memory for what a disk has grown by: a full sync brings it");
                    source.vm().renew();
                }
            }
        };
        // What was said stays said: a new generation begins with it.
        if let Err(error) = std::thread::Builder::new().name("growth".to_owned()).spawn(bring) {
            tracing::error!(vm = name, %error, "no thread for what a disk has grown by: its guest gets it after the next full sync");
        }
    }

    /// A volume's disk is larger, and its stream and its target know it: it is served so.
    pub(super) async fn note_growth(self: Arc<Self>, source: Arc<LiveSource>, volume: u16, size_bytes: u64) {
        let Some(defined) = source.definition().volumes.get(usize::from(volume)) else { return };
        while !self.give(defined.id, size_bytes, true).await {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Serves so much of a volume's local disk, in bytes; of one that is protected only if its stream `has_it`. False if it is to be tried again.
    async fn give(&self, id: VolumeId, size_bytes: u64, has_it: bool) -> bool {
        let mut change = self.state.change().await;
        let Some(record) = change.get().volumes.get(&id).cloned() else { return true };
        if !has_it && is_protected(change.get(), id) {
            return true;
        }
        if record.size_bytes < size_bytes {
            // First the record: what a guest has once seen it sees after a restart.
            let noted = change.update(|state| {
                if let Some(record) = state.volumes.get_mut(&id) {
                    record.size_bytes = size_bytes;
                }
            });
            if let Err(error) = noted {
                tracing::error!(volume = %id, vm = record.vm_name, %error, "can't note that a volume has grown: trying again");
                return false;
            }
            let former_bytes = record.size_bytes;
            tracing::info!(volume = %id, vm = record.vm_name, former_bytes, size_bytes, "a volume has grown");
        }
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
        // Until now: the device's number is this volume's only as long as nobody detaches it.
        drop(change);
        lock(&self.grown).remove(&id);
        true
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
                        "its disk and its protection have {} bytes, its ublk device {}: it can't be made larger while it is there, as it was made on a kernel before 6.16 or by an older release",
                        record.size_bytes,
                        size.bytes()
                    ),
                    "stop the guest, then detach and attach the volume (`vra detach --force`, `vra attach`)",
                );
            }
        }
    }
}

/// What a VPG's definition says of a volume's size, in bytes; zero if none protects it.
pub(super) fn defined_bytes(state: &State, id: VolumeId) -> u64 {
    let vms = state.vpgs.values().flat_map(|vpg| &vpg.vms);
    let mut volumes = vms.flat_map(|vm| &vm.volumes).filter(|volume| volume.id == id && !volume.left);
    volumes.next().map_or(0, |volume| volume.size_bytes)
}

fn is_protected(state: &State, id: VolumeId) -> bool {
    state.vpgs.values().any(|vpg| protects(vpg, id))
}
