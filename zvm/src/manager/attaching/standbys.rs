//! Standbys: VRAs of other hosts that serve a VM's disks, too, so that its guest can be migrated to them live.

use std::collections::BTreeMap;

use vra::api::volume::SharedRole;
use vra::api::{
    ApiError, Attach, Detach, DoorAddress, DoorRequest, ErrorCode, Request, Response, VmId, VolumeInfo, VraId,
};

use super::{Place, wrong_answer};
use crate::inventory::Vm;
use crate::manager::{Manager, internal};
use crate::model::vra::{Vra, VraState};
use crate::store::leaving_volumes::LeavingVolume;

impl Manager {
    /// The VRAs that are to serve a VM's disks besides that of its host: those of the hosts or VRAs that are named, and those that do already.
    pub(super) async fn standbys_of(&self, place: &Place, named: &[String]) -> Result<Vec<Vra>, ApiError> {
        let inventory = self.inventory();
        let mut standbys: BTreeMap<VraId, Vra> = BTreeMap::new();
        for name in named {
            let vra_name = inventory.host(name).map_or(name.as_str(), |host| host.vra.as_str());
            let vra = self.find_vra(vra_name).await?;
            if vra.id == place.vra.id {
                let message = format!("VM {:?} is on host {:?} itself", place.vm.name, place.vm.host);
                return Err(ApiError::new(ErrorCode::BadRequest, message)
                    .remedy("name the other hosts that it may be migrated to"));
            }
            standbys.insert(vra.id, vra);
        }
        let vras = self.desired().await.map_err(internal)?.vras;
        for (id, _) in self.sharing(&place.vm) {
            if let Some(vra) = vras.get(&id).filter(|_| id != place.vra.id) {
                standbys.insert(id, vra.clone());
            }
        }
        if let Some(vra) = standbys.values().find(|vra| vra.state != VraState::Enrolled) {
            return Err(ApiError::new(ErrorCode::NotReady, format!("VRA {} is revoked", vra.name)));
        }
        Ok(standbys.into_values().collect())
    }

    /// The door and the role of a VM's disks at its host: several VRAs can serve a disk over NBD only.
    pub(super) fn shared_door(
        &self,
        place: &Place,
        standbys: &[Vra],
        door: DoorRequest,
        is_chosen: bool,
        before: &[VolumeInfo],
    ) -> Result<(DoorRequest, Option<SharedRole>), ApiError> {
        if standbys.is_empty() && before.iter().all(|volume| volume.shared.is_none()) {
            return Ok((door, None));
        }
        if is_chosen && matches!(door, DoorRequest::Ublk { .. }) {
            let message =
                "a guest on a ublk device can't be migrated: the device doesn't tell when it is gone";
            return Err(
                ApiError::new(ErrorCode::Unsupported, message).remedy("use `--door nbd`, or no --also-on")
            );
        }
        if let Some(alone) = before.iter().find(|volume| volume.shared.is_none()) {
            let message = format!(
                "{} of VM {:?} is served by VRA {} alone",
                alone.path.display(),
                place.vm.name,
                place.vra.name
            );
            return Err(ApiError::new(ErrorCode::Conflict, message).remedy(format!(
                "`zvm unprotect {0}`, shut it down, and `zvm protect {0} --also-on ...`",
                place.vm.name
            )));
        }
        Ok((DoorRequest::Nbd { listen: None }, Some(SharedRole::Owner)))
    }

    /// Has other VRAs serve volumes, too, at the very address that they have at their owner. Gives what is new, also when it fails.
    pub(super) async fn attach_standbys(
        &self,
        place: &Place,
        standbys: &[Vra],
        owned: &[(VolumeInfo, DoorAddress)],
    ) -> (Vec<(Vra, VolumeInfo)>, Result<(), ApiError>) {
        let mut new = Vec::new();
        for vra in standbys {
            let before = match self.volumes_at(vra, VmId(place.vm.uuid)).await {
                Ok(before) => before,
                Err(error) => return (new, Err(error)),
            };
            for (volume, door) in owned {
                let attached = match self.attach_standby(vra, volume).await {
                    Ok(attached) => attached,
                    Err(error) => return (new, Err(at_standby(error, vra, &place.vra))),
                };
                let is_same = attached.device().as_ref() == Some(door);
                let address = attached.device().map_or_else(|| "none".to_owned(), |door| door.to_string());
                if before.iter().all(|known| known.volume != volume.volume) {
                    new.push((vra.clone(), attached));
                }
                if !is_same {
                    let message = format!(
                        "VRA {} serves volume {} at {address}, and VRA {} at {door}",
                        vra.name, volume.volume, place.vra.name
                    );
                    let error = ApiError::new(ErrorCode::Conflict, message).remedy(
                        "a migrated guest looks for its disk at the same address: give both the same `run_dir` in vra.toml",
                    );
                    return (new, Err(error));
                }
            }
        }
        (new, Ok(()))
    }

    async fn attach_standby(&self, vra: &Vra, volume: &VolumeInfo) -> Result<VolumeInfo, ApiError> {
        let attach = Attach {
            vm: volume.vm,
            vm_name: volume.vm_name.clone(),
            volume: Some(volume.volume),
            number: Some(volume.number),
            path: volume.path.clone(),
            door: DoorRequest::Nbd { listen: None },
            force_raw: false,
            shared: Some(SharedRole::Standby),
        };
        match self.ask_vra(vra, Request::Attach(attach)).await? {
            Response::Volume(volume) => Ok(volume),
            _ => Err(wrong_answer(vra)),
        }
    }

    /// Takes back what [`Manager::attach_standbys`] did.
    pub(super) async fn detach_standbys(&self, new: &[(Vra, VolumeInfo)]) {
        for (vra, volume) in new {
            self.detach(vra, Detach { volume: volume.volume, force: false }).await;
        }
    }

    /// The volumes of a VM that other VRAs than its host's serve, too, as ones that are to be served no more.
    pub(super) async fn leaving_standbys(
        &self,
        place: &Place,
        leaves: impl Fn(&VolumeInfo) -> bool,
    ) -> Result<Vec<LeavingVolume>, ApiError> {
        let vras = self.desired().await.map_err(internal)?.vras;
        let inventory = self.inventory();
        let mut leaving = Vec::new();
        for (id, volumes) in self.sharing(&place.vm) {
            let Some(vra) = vras.get(&id).filter(|_| id != place.vra.id) else { continue };
            // A guest there, if that host is known; else nobody has moved there.
            let source = inventory.hosts.iter().find(|host| host.vra == vra.name);
            let source =
                source.map_or_else(|| place.vm.origin.source.clone(), |host| host.origin.source.clone());
            leaving.extend(volumes.iter().filter(|volume| leaves(volume)).map(|volume| LeavingVolume {
                vra: id,
                volume: volume.volume,
                vm: volume.vm,
                source: source.clone(),
                device: volume.device().map_or_else(String::new, |device| device.to_string()),
            }));
        }
        Ok(leaving)
    }

    /// The VRAs that share disks of a VM, as they were last seen.
    fn sharing(&self, vm: &Vm) -> Vec<(VraId, Vec<VolumeInfo>)> {
        let observed = self.observed();
        let shares = observed.iter().filter_map(|(id, seen)| {
            let volumes = &seen.last.as_ref()?.status.volumes;
            let shared = volumes.iter().filter(|volume| volume.vm.0 == vm.uuid && volume.shared.is_some());
            let shared: Vec<VolumeInfo> = shared.cloned().collect();
            (!shared.is_empty()).then_some((*id, shared))
        });
        shares.collect()
    }
}

fn at_standby(mut error: ApiError, vra: &Vra, owner: &Vra) -> ApiError {
    error.message = format!(
        "VRA {} can't serve a disk of VRA {}, which a guest that is migrated needs: {}",
        vra.name, owner.name, error.message
    );
    error
}
