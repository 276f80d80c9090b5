//! `zvm protect` and `zvm unprotect`: put the VRA of a VM's host in the way of its disks, and take it out again.
//!
//! The order keeps the guest's data reachable after a crash at any step: a disk is served before the definition names the served device, and
//! is served until nothing names it any more.

mod choice;
mod leaving;
mod standbys;

use std::collections::BTreeMap;
use std::path::PathBuf;

use vra::api::volume::SharedRole;
use vra::api::{
    ApiError, Attach, Detach, DoorAddress, DoorRequest, ErrorCode, Request, Response, VmId, VolumeId,
    VolumeInfo,
};
use vra::report::chain;

use super::{Manager, internal};
use crate::api::{DoorChoice, ServedDisk, VmProtected, VmUnprotected};
use crate::inventory::libvirt::message::reply::DomainRef;
use crate::inventory::libvirt::served::{self, Outage, ServedError};
use crate::inventory::libvirt::{Client, LibvirtError};
use crate::inventory::source::{LibvirtAccessError, libvirt_client};
use crate::inventory::world::FILE;
use crate::inventory::{Disk, Vm};
use crate::model::event::{Entity, EventKind};
use crate::model::source::Access;
use crate::model::vra::{Vra, VraState};
use crate::store::leaving_volumes::LeavingVolume;
use crate::store::{self, StoreError};

/// A VM that can be protected, where it is, and who serves disks there.
struct Place {
    vm: Vm,
    vra: Vra,
    access: Access,
}

impl Manager {
    /// Has a VM's disks served, and its definition name the served devices.
    pub async fn protect_vm(
        &self,
        name: &str,
        disks: &[String],
        excluded: &[String],
        door: DoorChoice,
        also_on: &[String],
    ) -> Result<VmProtected, ApiError> {
        let _alone = self.attaching.lock().await;
        let place = self.place_of(name).await?;
        let disks = choice::of(&place.vm, disks, excluded)?;
        let vra = &place.vra;
        let (client, domain) = place.domain().await?;
        let before = self.volumes_of(&place).await?;
        let standbys = self.standbys_of(&place, also_on).await?;
        let (request, shared) = self.shared_door(
            &place,
            &standbys,
            self.door_request(vra, door)?,
            door == DoorChoice::Ublk,
            &before,
        )?;
        let members = self.member_volumes(&place.vm).await?;
        // First of all: what is served again must not be ended.
        self.keep_volumes(&place.vm).await?;
        let mut doors = BTreeMap::new();
        let mut served = Vec::with_capacity(disks.len());
        let mut owned = Vec::with_capacity(disks.len());
        let mut failed = None;
        for disk in &disks {
            match self.attach(&place, disk, (request.clone(), shared), &before, &members).await {
                Ok((volume, door)) => {
                    owned.push((volume.clone(), door.clone()));
                    doors.insert(disk.name.clone(), door.clone());
                    served.push(ServedDisk {
                        disk: disk.name.clone(),
                        path: disk.path.clone(),
                        device: door.to_string(),
                        volume: volume.volume,
                    });
                }
                Err(error) => failed = Some(error),
            }
        }
        let mut new_standbys = Vec::new();
        if failed.is_none() {
            let (new, attached) = self.attach_standbys(&place, &standbys, &owned).await;
            (new_standbys, failed) = (new, attached.err());
        }
        let names: Vec<String> = doors.keys().cloned().collect();
        let paths = disks.iter().map(|disk| (disk.name.clone(), disk.path.clone())).collect();
        // One that is served already is pointed at its device anew: the VRA may have been set up afresh since.
        let edit = |outage| {
            let (names, doors, paths) = (&names, &doors, &paths);
            move |xml: &str| {
                let (own, _) = served::restore(xml, Some(names), true)?;
                served::check_paths(&own, paths)?;
                served::serve(&own, doors, outage)
            }
        };
        let defined = match failed {
            None => match redefine(&client, &domain, edit(Outage::Waits)).await {
                Err(Failed::Libvirt(error)) if error.is_schema() => {
                    redefine(&client, &domain, edit(Outage::Stops)).await
                }
                defined => defined,
            },
            Some(error) => Err(Failed::Vra(error)),
        };
        if let Err(error) = defined {
            // Without a definite answer the definition may name the devices: then they must stay.
            let new = served.iter().filter(|disk| !before.iter().any(|known| known.volume == disk.volume));
            if error.is_definite() {
                self.detach_standbys(&new_standbys).await;
                for disk in new {
                    self.detach(vra, Detach { volume: disk.volume, force: false }).await;
                }
            }
            return Err(error.told(&place));
        }
        client.close().await;
        let is_running = domain.id >= 0;
        let description = format!(
            "disks {} of VM {} are served by VRA {}{}{}",
            names.join(", "),
            place.vm.name,
            vra.name,
            standbys.iter().map(|vra| format!(", also by VRA {}", vra.name)).collect::<String>(),
            if is_running { "; its guest uses them from its next start on" } else { "" }
        );
        self.note_vm(EventKind::AttachVm, &place.vm, description).await?;
        self.wake_source(&place.vm.origin.source);
        let also_on = standbys.into_iter().map(|vra| vra.name).collect();
        Ok(VmProtected { vm: place.vm.name, disks: served, at_next_start: is_running, also_on })
    }

    /// Gives a VM's definition back what it had, and has its disks no longer served once the guest uses them no more.
    pub async fn unprotect_vm(&self, name: &str, disks: &[String]) -> Result<VmUnprotected, ApiError> {
        let _alone = self.attaching.lock().await;
        let place = self.place_of(name).await?;
        self.check_not_in_vpg(&place.vm).await?;
        for disk in disks {
            choice::of(&place.vm, std::slice::from_ref(disk), &[])?;
        }
        let (client, domain) = place.domain().await?;
        let mut restored = Vec::new();
        let only = (!disks.is_empty()).then_some(disks);
        let edit = |xml: &str| {
            let (xml, names) = served::restore(xml, only, false)?;
            restored = names;
            Ok(xml)
        };
        redefine(&client, &domain, edit).await.map_err(|error| error.told(&place))?;
        client.close().await;
        let stays = |path: &std::path::Path| {
            let disk = place.vm.disks.iter().find(|disk| disk.path == path);
            disk.is_some_and(|disk| !disks.is_empty() && !disks.contains(&disk.name))
        };
        let volumes = self.volumes_of(&place).await?;
        let leaving = volumes.iter().filter(|volume| !stays(&volume.path)).map(|volume| LeavingVolume {
            vra: place.vra.id,
            volume: volume.volume,
            vm: volume.vm,
            source: place.vm.origin.source.clone(),
            device: volume.device().map_or_else(String::new, |device| device.to_string()),
        });
        let mut leaving: Vec<LeavingVolume> = leaving.collect();
        leaving.extend(self.leaving_standbys(&place, |volume| !stays(&volume.path)).await?);
        let is_running = domain.id >= 0;
        let description = format!(
            "disks {} of VM {} are its own again{}",
            restored.join(", "),
            place.vm.name,
            if is_running { " from its next start on" } else { "" }
        );
        let save = async {
            let mut tx = self.store.begin().await?;
            for volume in &leaving {
                store::leaving_volumes::insert(&mut tx, volume).await?;
            }
            let entity = Entity::vm(VmId(place.vm.uuid));
            self.note(&mut tx, EventKind::DetachVm, true, entity, description, None).await?;
            Ok::<_, StoreError>(tx.commit().await?)
        };
        save.await.map_err(internal)?;
        self.wake_source(&place.vm.origin.source);
        self.volumes_leave.notify_one();
        Ok(VmUnprotected { vm: place.vm.name, disks: restored, at_next_start: is_running })
    }

    /// Where a VM is, and who is asked about it.
    async fn place_of(&self, name: &str) -> Result<Place, ApiError> {
        let inventory = self.inventory();
        let vm = super::spec::find_vm(&inventory, name)?.clone();
        let by_hand = |message: String| {
            ApiError::new(ErrorCode::Unsupported, message).remedy(
                "run `vra attach` on its host and give the guest the device that it prints; the operator's guide tells how",
            )
        };
        if vm.origin.source == FILE {
            return Err(by_hand(format!("VM {:?} is known from the inventory file alone", vm.name)));
        }
        let sources = self.stored_sources().await.map_err(internal)?;
        let source = sources.into_iter().find(|stored| stored.source.name == vm.origin.source);
        let access = source.map(|stored| stored.source.settings.access);
        let Some(access @ Access::Libvirt { .. }) = access else {
            return Err(by_hand(format!("the host of VM {:?} is not a libvirt host", vm.name)));
        };
        let host = inventory.host(&vm.host);
        let vra_name = host.map_or_else(|| vm.host.clone(), |host| host.vra.clone());
        let vra = self.find_vra(&vra_name).await?;
        if vra.state != VraState::Enrolled {
            return Err(ApiError::new(ErrorCode::NotReady, format!("VRA {vra_name} is revoked"))
                .remedy("enrol it again: `zvm vra token create`, `vra enroll`"));
        }
        Ok(Place { vm, vra, access })
    }

    async fn check_not_in_vpg(&self, vm: &Vm) -> Result<(), ApiError> {
        let mut db = self.store.read().await.map_err(internal)?;
        let vpgs = store::vpgs::list(&mut db).await.map_err(internal)?;
        let Some(vpg) = vpgs.iter().find(|vpg| vpg.settings.vms.iter().any(|member| member.vm.0 == vm.uuid))
        else {
            return Ok(());
        };
        Err(ApiError::new(ErrorCode::Busy, format!("VM {:?} is in VPG {:?}", vm.name, vpg.name)).remedy(
            format!("take it out first: `zvm vpg remove-vm {} {}`, or delete the group", vpg.name, vm.name),
        ))
    }

    /// ublk where the host has it.
    fn door_request(&self, vra: &Vra, choice: DoorChoice) -> Result<DoorRequest, ApiError> {
        let observed = self.observed();
        let status = observed.get(&vra.id).and_then(|seen| seen.last.as_ref()).map(|last| &last.status);
        let has_ublk = status.map(|status| status.host.ublk_features.is_some());
        match (choice, has_ublk) {
            (DoorChoice::Nbd, _) | (DoorChoice::Auto, Some(false)) => Ok(DoorRequest::Nbd { listen: None }),
            (DoorChoice::Ublk, _) | (DoorChoice::Auto, Some(true)) => {
                Ok(DoorRequest::Ublk { queues: None, depth: None })
            }
            (DoorChoice::Auto, None) => {
                let message = format!("whether the host of VRA {} has ublk isn't known yet", vra.name);
                Err(ApiError::new(ErrorCode::NotReady, message)
                    .remedy("try again when the VRA answers, `zvm vra list`, or say --door"))
            }
        }
    }

    /// The volumes of a VM that its group protects, by path.
    async fn member_volumes(&self, vm: &Vm) -> Result<BTreeMap<PathBuf, (VolumeId, u16)>, ApiError> {
        let mut db = self.store.read().await.map_err(internal)?;
        let vpgs = store::vpgs::list(&mut db).await.map_err(internal)?;
        let members =
            vpgs.into_iter().flat_map(|vpg| vpg.settings.vms).filter(|member| member.vm.0 == vm.uuid);
        let volumes = members.flat_map(|member| member.volumes).filter(|volume| !volume.left);
        Ok(volumes.map(|volume| (volume.source_path, (volume.id, volume.number))).collect())
    }

    /// Volumes of a VM are not to leave any more.
    async fn keep_volumes(&self, vm: &Vm) -> Result<(), ApiError> {
        let save = async {
            let mut tx = self.store.begin().await?;
            store::leaving_volumes::delete_of_vm(&mut tx, VmId(vm.uuid)).await?;
            Ok::<_, StoreError>(tx.commit().await?)
        };
        save.await.map_err(internal)
    }

    async fn attach(
        &self,
        place: &Place,
        disk: &Disk,
        (door, shared): (DoorRequest, Option<SharedRole>),
        before: &[VolumeInfo],
        members: &BTreeMap<PathBuf, (VolumeId, u16)>,
    ) -> Result<(VolumeInfo, DoorAddress), ApiError> {
        // The volume that it is; a new disk must not be taken for another one of the group's that isn't attached.
        let known = before.iter().find(|volume| volume.path == disk.path);
        let known =
            known.map(|volume| (volume.volume, volume.number)).or_else(|| members.get(&disk.path).copied());
        let (volume, number) = match known {
            Some((volume, number)) => (volume, Some(number)),
            None => (VolumeId::random(), None),
        };
        let attach = Attach {
            vm: VmId(place.vm.uuid),
            vm_name: place.vm.name.clone(),
            volume: Some(volume),
            number,
            path: disk.path.clone(),
            door,
            force_raw: false,
            shared,
        };
        match self.ask_vra(&place.vra, Request::Attach(attach)).await? {
            Response::Volume(volume) => match volume.device() {
                Some(door) => Ok((volume, door)),
                None => Err(ApiError::new(
                    ErrorCode::NotReady,
                    format!(
                        "VRA {} can't serve {} at an address of its own: {}",
                        place.vra.name,
                        disk.path.display(),
                        volume.problem.as_deref().unwrap_or("its log says why; --door nbd may do")
                    ),
                )),
            },
            _ => Err(wrong_answer(&place.vra)),
        }
    }

    /// The volumes of a VM that its VRA serves, or should.
    async fn volumes_of(&self, place: &Place) -> Result<Vec<VolumeInfo>, ApiError> {
        self.volumes_at(&place.vra, VmId(place.vm.uuid)).await
    }

    async fn volumes_at(&self, vra: &Vra, vm: VmId) -> Result<Vec<VolumeInfo>, ApiError> {
        match self.ask_vra(vra, Request::List).await? {
            Response::Volumes(volumes) => Ok(volumes.into_iter().filter(|volume| volume.vm == vm).collect()),
            _ => Err(wrong_answer(vra)),
        }
    }

    async fn detach(&self, vra: &Vra, detach: Detach) {
        if let Err(error) = self.ask_vra(vra, Request::Detach(detach)).await {
            tracing::warn!(vra = vra.name, volume = %detach.volume, %error, "the volume stays attached");
        }
    }

    async fn ask_vra(&self, vra: &Vra, request: Request) -> Result<Response, ApiError> {
        let answer = self.remote.call(&vra.endpoint(), request, super::engine::SLOW_ACTION_LIMIT).await;
        answer.map_err(|error| error.into_api_error(&vra.name))
    }

    async fn note_vm(&self, kind: EventKind, vm: &Vm, description: String) -> Result<(), ApiError> {
        let save = async {
            let mut tx = self.store.begin().await?;
            self.note(&mut tx, kind, true, Entity::vm(VmId(vm.uuid)), description, None).await?;
            Ok::<_, StoreError>(tx.commit().await?)
        };
        save.await.map_err(internal)
    }
}

impl Place {
    /// A connection to its host, and the VM there. One without a definition of its own is refused: it would be gone at its next stop.
    async fn domain(&self) -> Result<(Client, DomainRef), ApiError> {
        let client = libvirt_client(&self.access).await.map_err(|error| Failed::Access(error).told(self))?;
        let listed = client.persistent_domains().await;
        let domains = listed.map_err(|error| Failed::Libvirt(error).told(self))?;
        let domain = domains.into_iter().find(|domain| domain.uuid == self.vm.uuid).ok_or_else(|| {
            let message = format!("host {} has no definition of VM {:?}", self.vm.host, self.vm.name);
            ApiError::new(ErrorCode::Unsupported, message).remedy(
                "a transient VM ends with its guest: define it with `virsh define`, and start it from there",
            )
        })?;
        let saved = client.saved_domains().await.map_err(|error| Failed::Libvirt(error).told(self))?;
        if saved.iter().any(|saved| saved.uuid == domain.uuid) {
            let message = format!(
                "VM {:?} sleeps with its memory saved, and wakes with the disks that it had",
                self.vm.name
            );
            return Err(ApiError::new(ErrorCode::Conflict, message).remedy(format!(
                "start it and shut it down, or `virsh managedsave-remove {}`",
                self.vm.name
            )));
        }
        Ok((client, domain))
    }
}

/// Why a definition was not changed.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error(transparent)]
    Access(#[from] LibvirtAccessError),
    #[error(transparent)]
    Libvirt(#[from] LibvirtError),
    #[error(transparent)]
    Served(#[from] ServedError),
    #[error(transparent)]
    Vra(#[from] ApiError),
}

impl Failed {
    fn reason(&self) -> String {
        chain(self)
    }

    /// Whether the definition is surely as it was.
    fn is_definite(&self) -> bool {
        match self {
            Self::Access(_) | Self::Served(_) | Self::Vra(_) => true,
            Self::Libvirt(error) => error.remote().is_some(),
        }
    }

    fn told(self, place: &Place) -> ApiError {
        let remedy = match self {
            Self::Vra(error) => return error,
            Self::Access(_) => "check that the host's libvirt answers, `zvm source list`",
            Self::Libvirt(_) => "see libvirt's log on that host, and what this client may do there",
            Self::Served(_) => {
                "look at it with `virsh dumpxml --inactive`, have it read again with `zvm source read`, and try again; the operator's guide tells how to change it by hand"
            }
        };
        let done = if self.is_definite() {
            "was not changed"
        } else {
            "may have been changed or not, and its disks stay served"
        };
        let reason = self.reason();
        let message = format!(
            "the definition of VM {:?} at {} {done}: {reason}",
            place.vm.name,
            place.access.address()
        );
        ApiError::new(ErrorCode::Io, message).remedy(remedy)
    }
}

/// Changes what a VM is started with the next time.
async fn redefine(
    client: &Client,
    domain: &DomainRef,
    edit: impl FnOnce(&str) -> Result<String, ServedError>,
) -> Result<(), Failed> {
    let before = client.definition_to_edit(domain).await.map_err(Failed::Libvirt)?;
    let after = edit(&before).map_err(Failed::Served)?;
    if after != *before {
        client.define_domain(&after).await.map_err(Failed::Libvirt)?;
    }
    Ok(())
}

fn wrong_answer(vra: &Vra) -> ApiError {
    ApiError::new(ErrorCode::Other, format!("VRA {} gave a wrong answer", vra.name))
}
