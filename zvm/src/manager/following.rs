//! What the manager does by itself when VMs of groups change: new disks join, where their group wants that.

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use vra::api::{ApiError, VmId};
use vra::report::chain;

use super::{Manager, internal};
use crate::api::DoorChoice;
use crate::inventory::{Disk, Inventory};
use crate::model::event::{Entity, EventKind};
use crate::model::vpg::{NewDisks, Vpg, VpgState};
use crate::reconcile::Observed;
use crate::store::StoreError;

/// Time between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// What failed is tried again after this.
const RETRY_AFTER: Duration = Duration::from_secs(60);

/// Something to do for a VM of a group.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Wish {
    vpg: String,
    vm: VmId,
    step: Step,
}

/// A new disk is served first, and joins once the guest uses the served device.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    /// Have these disks served, by name.
    Serve(Vec<String>),
    /// Have all disks that aren't in the group yet join it.
    Join,
}

/// Disks that VRAs serve, whoever uses them.
type Served = HashSet<(VmId, PathBuf)>;

impl Manager {
    /// Follows changes until cancelled.
    pub async fn follow_changes(self: Arc<Self>) {
        let mut failed: BTreeMap<Wish, (Instant, String)> = BTreeMap::new();
        loop {
            match self.wishes().await {
                Ok(wishes) => {
                    failed.retain(|wish, _| wishes.contains(wish));
                    for wish in wishes {
                        let waits = |(since, _): &(Instant, String)| since.elapsed() < RETRY_AFTER;
                        if failed.get(&wish).is_some_and(waits) {
                            continue;
                        }
                        match self.fulfil(&wish).await {
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

    async fn wishes(&self) -> Result<Vec<Wish>, StoreError> {
        let desired = self.desired().await?;
        Ok(wishes(&desired.vpgs, &self.inventory(), &served(&self.observed())))
    }

    async fn fulfil(&self, wish: &Wish) -> Result<(), ApiError> {
        let vm = wish.vm.to_string();
        match &wish.step {
            Step::Serve(disks) => {
                let served = self.protect_vm(&vm, disks, &[], DoorChoice::Auto).await?;
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
            Step::Serve(disks) => format!("new disks {} can't be served", disks.join(", ")),
            Step::Join => "new disks can't join".to_owned(),
        };
        let description = format!("VPG {}: {what}: {reason}", wish.vpg);
        tracing::warn!(vpg = wish.vpg, vm = %wish.vm, reason, "{what}; it is tried again every minute");
        let save = async {
            let mut tx = self.store.begin().await?;
            let kind = EventKind::EditProtectionGroup;
            self.note(&mut tx, kind, false, Entity::vm(wish.vm), description, None).await?;
            Ok::<_, StoreError>(tx.commit().await?)
        };
        let _told: Result<(), ApiError> = save.await.map_err(internal);
    }
}

fn served(observed: &Observed) -> Served {
    let seen = observed.values().filter_map(|seen| seen.last.as_ref());
    let volumes = seen.flat_map(|last| &last.status.volumes);
    volumes.map(|volume| (volume.vm, volume.path.clone())).collect()
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
