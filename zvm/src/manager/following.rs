//! What the manager does by itself when VMs of groups change: protection follows a VM to a host whose VRA serves its disks, and disks that
//! grow; new disks join, where their group wants that.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use vra::api::status::TargetVmStatus;
use vra::api::vpg::Takeover;
use vra::api::{ApiError, VmId, VolumeId, VraId};
use vra::report::chain;

use super::{Manager, internal};
use crate::api::DoorChoice;
use crate::inventory::{Disk, Inventory, Power};
use crate::model::event::{Entity, EventKind};
use crate::model::vpg::{NewDisks, Vpg, VpgState};
use crate::reconcile::{Desired, Observed};
use crate::store::StoreError;

/// Time between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// What failed is tried again after this.
const RETRY_AFTER: Duration = Duration::from_secs(60);

/// The same of a VM that nobody protects meanwhile.
const RETRY_MOVE_AFTER: Duration = Duration::from_secs(4);

/// Something to do for a VM of a group.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Wish {
    vpg: String,
    vm: VmId,
    step: Step,
}

/// A VM that moved is followed at once. A new disk is served first, and joins once the guest uses the served device.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    /// Have this VRA be its source.
    Move(VraId),
    /// Have these volumes protected in the sizes, in bytes, that their local disks have now.
    Grow(Vec<(VolumeId, u64)>),
    /// Have these disks served, by name.
    Serve(Vec<String>),
    /// Have all disks that aren't in the group yet join it.
    Join,
}

impl Step {
    fn retry_after(&self) -> Duration {
        match self {
            Self::Move(_) => RETRY_MOVE_AFTER,
            Self::Grow(_) | Self::Serve(_) | Self::Join => RETRY_AFTER,
        }
    }
}

/// Disks that VRAs serve, whoever uses them.
type Served = HashSet<(VmId, PathBuf)>;

impl Manager {
    /// Follows changes until cancelled.
    pub async fn follow_changes(self: Arc<Self>) {
        let mut failed: BTreeMap<Wish, (Instant, String)> = BTreeMap::new();
        let mut moved = self.moved_before().await;
        let mut former: Vec<Wish> = Vec::new();
        loop {
            match self.wishes(&mut moved).await {
                Ok(wishes) => {
                    failed.retain(|wish, _| wishes.contains(wish));
                    let before = std::mem::replace(&mut former, wishes.clone());
                    for wish in wishes {
                        // A size that somebody is about to correct is not for ever.
                        if matches!(wish.step, Step::Grow(_)) && !before.contains(&wish) {
                            continue;
                        }
                        let waits =
                            |(since, _): &(Instant, String)| since.elapsed() < wish.step.retry_after();
                        if failed.get(&wish).is_some_and(waits) {
                            continue;
                        }
                        match self.fulfil(&wish, &mut moved).await {
                            Ok(()) => _ = failed.remove(&wish),
                            Err(error) => {
                                let reason = error.to_string();
                                let known = failed.insert(wish.clone(), (Instant::now(), reason.clone()));
                                if known.is_none_or(|(_, known)| known != reason) {
                                    self.note_failed(&wish, &reason).await;
                                }
                            }
                        }
                    }
                }
                Err(error) => {
                    tracing::error!(error = chain(&error), "the database failed; the manager tries again");
                }
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Those that may have been followed just before the manager ended.
    async fn moved_before(&self) -> Moved {
        loop {
            match self.desired().await {
                Ok(desired) => return moved_in(&desired.vpgs),
                Err(error) => {
                    tracing::error!(error = chain(&error), "the database failed; the manager tries again");
                    tokio::time::sleep(LOOK_EVERY).await;
                }
            }
        }
    }

    async fn wishes(&self, moved: &mut Moved) -> Result<Vec<Wish>, StoreError> {
        let desired = self.desired().await?;
        let (inventory, observed) = (self.inventory(), self.observed());
        let mut wishes = wishes(&desired.vpgs, &inventory, &served(&observed));
        wishes.extend(growths(&desired, &observed));
        wishes.extend(moves(&desired, &inventory, &observed));
        wishes.extend(missed(moved, &desired, &observed));
        Ok(wishes)
    }

    async fn fulfil(&self, wish: &Wish, moved: &mut Moved) -> Result<(), ApiError> {
        let vm = wish.vm.to_string();
        match &wish.step {
            Step::Move(vra) => {
                let revision = self.move_source(&wish.vpg, wish.vm, *vra).await?;
                moved.insert(wish.vm, revision);
            }
            Step::Grow(volumes) => self.grow_volumes(&wish.vpg, wish.vm, volumes).await?,
            Step::Serve(disks) => {
                let served = self.protect_vm(&vm, disks, &[], DoorChoice::Auto, &[]).await?;
                tracing::info!(vpg = wish.vpg, vm = served.vm, ?disks, "new disks are served");
            }
            Step::Join => {
                self.add_disks(&wish.vpg, std::slice::from_ref(&vm), false).await?;
            }
        }
        Ok(())
    }

    async fn note_failed(&self, wish: &Wish, reason: &str) {
        let what = match &wish.step {
            Step::Move(_) => "protection can't follow it to where it runs".to_owned(),
            Step::Grow(_) => "what its disks have grown by can't be protected".to_owned(),
            Step::Serve(disks) => format!("new disks {} can't be served", disks.join(", ")),
            Step::Join => "new disks can't join".to_owned(),
        };
        let description = format!("VPG {}: {what}: {reason}", wish.vpg);
        tracing::warn!(vpg = wish.vpg, vm = %wish.vm, reason, "{what}; it is tried again");
        let save = async {
            let mut tx = self.store.begin().await?;
            let kind = EventKind::EditProtectionGroup;
            self.note(&mut tx, kind, false, Entity::vm(wish.vm), description, None).await?;
            Ok::<_, StoreError>(tx.commit().await?)
        };
        let _told: Result<(), ApiError> = save.await.map_err(internal);
    }
}

/// VMs that were followed and whose new source wasn't granted yet, and the revision that moved them.
type Moved = BTreeMap<VmId, u64>;

/// All members that continue what another source wrote; most were granted long ago.
fn moved_in(vpgs: &[Vpg]) -> Moved {
    let members = vpgs.iter().flat_map(|vpg| vpg.settings.vms.iter().map(|member| (vpg.revision, member)));
    members.filter_map(|(revision, member)| Some((member.takeover.map(|_| member.vm)?, revision))).collect()
}

fn served(observed: &Observed) -> Served {
    let seen = observed.values().filter_map(|seen| seen.last.as_ref());
    let volumes = seen.flat_map(|last| &last.status.volumes);
    volumes.map(|volume| (volume.vm, volume.path.clone())).collect()
}

/// VMs with disks that are larger than what is protected of them, as VRAs that serve them see it.
fn growths(desired: &Desired, observed: &Observed) -> Vec<Wish> {
    let mut sizes: HashMap<VolumeId, u64> = HashMap::new();
    for last in observed.values().filter_map(|seen| seen.last.as_ref()) {
        for volume in &last.status.volumes {
            let size_bytes = sizes.entry(volume.volume).or_default();
            *size_bytes = volume.grown_bytes.unwrap_or(volume.size_bytes).max(*size_bytes);
        }
    }
    let mut found = Vec::new();
    for vpg in desired.vpgs.iter().filter(|vpg| vpg.state == VpgState::Active) {
        for member in &vpg.settings.vms {
            let grown = member.volumes.iter().filter(|volume| !volume.left).filter_map(|volume| {
                let size_bytes = *sizes.get(&volume.id)?;
                (size_bytes > volume.size_bytes).then_some((volume.id, size_bytes))
            });
            let grown: Vec<(VolumeId, u64)> = grown.collect();
            if !grown.is_empty() {
                found.push(Wish { vpg: vpg.name.clone(), vm: member.vm, step: Step::Grow(grown) });
            }
        }
    }
    found
}

/// VMs that run where another VRA serves all of their disks than the one that protects them.
fn moves(desired: &Desired, inventory: &Inventory, observed: &Observed) -> Vec<Wish> {
    let mut found = Vec::new();
    for vpg in desired.vpgs.iter().filter(|vpg| vpg.state == VpgState::Active) {
        for member in &vpg.settings.vms {
            let vm = inventory.vms.iter().find(|vm| vm.uuid == member.vm.0);
            // One that is paused may be on its way: it runs at the host that it leaves.
            let vm = vm.filter(|vm| vm.power == Power::On);
            let Some(host) = vm.and_then(|vm| inventory.host(&vm.host)) else { continue };
            let vra = desired.vras.values().find(|vra| vra.name == host.vra);
            let Some(vra) = vra.filter(|vra| vra.id != member.source) else { continue };
            if observed.get(&vra.id).is_some_and(|seen| seen.shares_disks_of(member)) {
                found.push(Wish { vpg: vpg.name.clone(), vm: member.vm, step: Step::Move(vra.id) });
            }
        }
    }
    found
}

/// VMs whose former source began another generation, or sent more than anybody could think, before the target had the definition that moved them:
/// what the new one continues is to be said again. Once the target has that definition, it takes no more from the former one. Forgets those whose new source was granted.
fn missed(moved: &mut Moved, desired: &Desired, observed: &Observed) -> Vec<Wish> {
    let mut found = Vec::new();
    moved.retain(|vm, revision| {
        let member = |vpg: &Vpg| vpg.settings.vms.iter().find(|member| member.vm == *vm).cloned();
        let Some((vpg, member)) = desired.vpgs.iter().find_map(|vpg| Some((vpg, member(vpg)?))) else {
            return false;
        };
        let status = |vra| observed.get(&vra).and_then(|seen| seen.last.as_ref()).map(|last| &last.status);
        let (Some(target), Some(source)) = (status(member.target), status(member.source)) else {
            return true;
        };
        if !target.vpgs.iter().any(|seen| seen.vpg == vpg.id && seen.revision >= *revision) {
            return true;
        }
        let at_target = target.target_vms.iter().find(|seen| seen.vm == *vm);
        let tail = at_target.and_then(|seen| seen.generation);
        let own = source.source_vms.iter().find(|seen| seen.vm == *vm).map(|seen| seen.generation);
        if tail.is_some() && tail == own {
            return false;
        }
        let continues = |takeover: Takeover| {
            let is_below = |seen: &TargetVmStatus| seen.durable_through < takeover.first_seq;
            tail == Some(takeover.generation) && at_target.is_some_and(is_below)
        };
        if tail.is_some() && !member.takeover.is_some_and(continues) {
            let step = Step::Move(member.source);
            found.push(Wish { vpg: vpg.name.clone(), vm: *vm, step });
        }
        true
    });
    found
}

/// What is to be done now.
fn wishes(vpgs: &[Vpg], inventory: &Inventory, served: &Served) -> Vec<Wish> {
    let mut found = Vec::new();
    let follows = |vpg: &&Vpg| vpg.state == VpgState::Active && vpg.settings.new_disks == NewDisks::Protect;
    for vpg in vpgs.iter().filter(follows) {
        for member in &vpg.settings.vms {
            let Some(vm) = inventory.vms.iter().find(|vm| vm.uuid == member.vm.0) else { continue };
            let new: Vec<&Disk> = vm.disks.iter().filter(|disk| member.is_new(disk)).collect();
            // One that can't be protected holds up the others: somebody has to leave it out.
            if new.is_empty()
                || new.iter().any(|disk| disk.kind.obstacle().is_some() || disk.served.is_none())
            {
                continue;
            }
            let is_served = |disk: &Disk| served.contains(&(member.vm, disk.path.clone()));
            let unserved: Vec<String> =
                new.iter().filter(|disk| !is_served(disk)).map(|disk| disk.name.clone()).collect();
            let step = if !unserved.is_empty() {
                Step::Serve(unserved)
            } else if new.iter().all(|disk| disk.served == Some(true)) {
                Step::Join
            } else {
                continue;
            };
            found.push(Wish { vpg: vpg.name.clone(), vm: member.vm, step });
        }
    }
    found
}

#[cfg(test)]
mod tests;
