//! What is wrong between the groups and the inventory: VMs and disks that are not as they were protected, hosts that are silent, datastores
//! that fill up.

use std::path::Path;

use super::{Look, condition};
use crate::inventory::{Datastore, Disk, HostState, Power, Vm};
use crate::model::alert::{Condition, Level};
use crate::model::event::Entity;
use crate::model::vpg::{Member, NewDisks, Vpg, VpgState};
use crate::model::vra::Vra;
use crate::units::format_bytes;

/// Free parts of a datastore, in percent, below which it is an alert.
const FILLING_PERCENT: u64 = 10;
const FULL_PERCENT: u64 = 3;

impl Look<'_> {
    pub(super) fn inventory_conditions(&self, found: &mut Vec<Condition>) {
        // An inventory that was never read says nothing.
        if self.inventory.hosts.is_empty() && self.inventory.vms.is_empty() {
            return;
        }
        for vpg in self.desired.vpgs.iter().filter(|vpg| vpg.state == VpgState::Active) {
            for member in &vpg.settings.vms {
                match self.inventory.vms.iter().find(|vm| vm.uuid == member.vm.0) {
                    None => found.push(gone(vpg, member)),
                    Some(vm) => self.member(vpg, member, vm, found),
                }
            }
        }
        self.hosts(found);
        self.datastores(found);
    }

    fn member(&self, vpg: &Vpg, member: &Member, vm: &Vm, found: &mut Vec<Condition>) {
        let host = self.inventory.host(&vm.host);
        let source = self.desired.vras.get(&member.source);
        // What one calls itself that hasn't answered since the database was made again nobody knows.
        let is_nameless = source.is_some_and(Vra::is_known_by_id_alone);
        if let Some(host) = host
            && Some(host.vra.as_str()) != source.map(|vra| vra.name.as_str())
            && !is_nameless
        {
            let vra = self.desired.vras.values().find(|vra| vra.name == host.vra);
            let is_prepared = vra
                .and_then(|vra| self.observed.get(&vra.id))
                .is_some_and(|seen| seen.shares_disks_of(member));
            let why = match (vra, is_prepared) {
                (None, _) => "which is not enrolled",
                (Some(_), false) => "which doesn't serve all of its disks as shared ones",
                (Some(_), true) => "to which its protection is on the way",
            };
            let remedy = match is_prepared {
                true => "the manager sees to it by itself as soon as the target's VRA answers; `zvm event list` tells what is in its way".to_owned(),
                false => format!(
                    "move it back, and prepare hosts that it may move to with `zvm protect {1} --also-on HOST`; or, to protect it there: `zvm vpg remove-vm {0} {1}`, `vra detach` of its disks at the former VRA, `zvm protect {1}`, restart it, `zvm vpg add-vm {0} {1}`",
                    vpg.name, member.name
                ),
            };
            found.push(condition(
                "vm-moved",
                Entity::vm(member.vm),
                Level::Error,
                format!(
                    "VM {} of VPG {} now runs on host {}, at VRA {}, {why}: its writes are not replicated",
                    member.name, vpg.name, vm.host, host.vra
                ),
                &remedy,
            ));
            return;
        }
        if vm.power == Power::Paused && vm.disks.iter().any(|disk| disk.served == Some(true)) {
            found.push(condition(
                "vm-paused",
                Entity::vm(member.vm),
                Level::Warning,
                format!("the guest of VM {} of VPG {} stands still", member.name, vpg.name),
                &format!(
                    "if nobody paused it, its VRA was away from its NBD socket: `virsh resume {}` lets it go on where it was",
                    member.name
                ),
            ));
        }
        let protected =
            |path: &Path| member.volumes.iter().find(|volume| volume.source_path == path && !volume.left);
        let mut tell = |code: &str, level: Level, disks: Vec<String>, what: &str, remedy: String| {
            if !disks.is_empty() {
                let description =
                    format!("disk {} of VM {} of VPG {} {what}", disks.join(", "), member.name, vpg.name);
                found.push(condition(code, Entity::vm(member.vm), level, description, &remedy));
            }
        };
        let is_passed = |disk: &&Disk| {
            disk.served == Some(false) && vm.power != Power::Off && protected(&disk.path).is_some()
        };
        tell(
            "disk-not-served",
            Level::Error,
            vm.disks.iter().filter(is_passed).map(told).collect(),
            "is written to past its VRA: these writes are not replicated",
            format!(
                "shut the guest down, `zvm protect {1} --disk DISK`, start it, and `zvm vpg force-sync {0} --vm {1}`",
                vpg.name, member.name
            ),
        );
        let remedy = match vpg.settings.new_disks {
            NewDisks::Alert => {
                format!("`zvm protect {1}` and `zvm vpg add-disks {0} {1}`", vpg.name, member.name)
            }
            NewDisks::Protect => "shut the guest down and start it again: then it joins by itself".to_owned(),
        };
        tell(
            "disk-not-protected",
            Level::Warning,
            vm.disks.iter().filter(|disk| member.is_new(disk)).map(told).collect(),
            "is not protected",
            format!("{remedy}; or leave it out: `zvm vpg edit {} --exclude {}:DISK`", vpg.name, member.name),
        );
        let is_gone = |path: &Path| !vm.disks.iter().any(|disk| disk.path == path);
        let lost = member.volumes.iter().filter(|volume| !volume.left && is_gone(&volume.source_path));
        tell(
            "disk-gone",
            Level::Warning,
            lost.map(|volume| volume.source_path.display().to_string()).collect(),
            "is no longer the VM's",
            format!(
                "`zvm vpg remove-disks {} {}:PATH` takes it out of the group; its history stays",
                vpg.name, member.name
            ),
        );
        // Of a served disk a running guest's size is what it was given, which is not what its VRA serves.
        let has_old = |disk: &Disk| disk.served == Some(true) && vm.power != Power::Off;
        let resized = |is_meant: &dyn Fn(&Disk, u64, u64) -> bool| {
            let told = vm.disks.iter().filter_map(|disk| {
                let (volume, size_bytes) = (protected(&disk.path)?, disk.size_bytes?);
                is_meant(disk, size_bytes, volume.size_bytes).then(|| {
                    let (now, protected) = (format_bytes(size_bytes), format_bytes(volume.size_bytes));
                    format!("{} (now {now}, protected {protected})", disk.name)
                })
            });
            told.collect()
        };
        tell(
            "disk-grown",
            Level::Warning,
            resized(&|_, now, protected| now > protected),
            "is larger than what is protected of it",
            "protection follows by itself once its VRA sees the size: if it doesn't, the events and `zvm vra show` tell why".to_owned(),
        );
        tell(
            "disk-not-grown-in-guest",
            Level::Warning,
            resized(&|disk, now, protected| now < protected && has_old(disk)),
            "has grown, and its guest doesn't know yet",
            format!(
                "`virsh blockresize {} DISK --capacity` tells it of a ublk device; with NBD it sees it when it is shut down and started",
                member.name
            ),
        );
        tell(
            "disk-shrunk",
            Level::Error,
            resized(&|disk, now, protected| now < protected && !has_old(disk)),
            "is smaller than the one that is protected",
            format!(
                "`zvm vpg remove-vm {0} {1}`, `zvm unprotect {1}`, shut it down, `zvm protect {1}`, start it, `zvm vpg add-vm {0} {1}`: then it is protected in its new size",
                vpg.name, member.name
            ),
        );
    }

    /// Hosts that groups depend on.
    fn hosts(&self, found: &mut Vec<Condition>) {
        let silent = self.inventory.hosts.iter().filter(|host| host.state == HostState::NotResponding);
        for host in silent {
            let vra = self.desired.vras.values().find(|vra| vra.name == host.vra).map(|vra| vra.id);
            let uses = |vpg: &&Vpg| vra.is_some_and(|vra| vpg.vras().contains(&vra));
            let users: Vec<&str> =
                self.desired.vpgs.iter().filter(uses).map(|vpg| vpg.name.as_str()).collect();
            if users.is_empty() {
                continue;
            }
            found.push(condition(
                "host-not-responding",
                Entity::host(&host.name),
                Level::Warning,
                format!("host {} does not answer; VPG {} depends on it", host.name, users.join(", ")),
                "look at the host and its hypervisor: what it runs is not known now; replication goes on as long as its VRA runs",
            ));
        }
    }

    /// Datastores that journals of groups are on.
    fn datastores(&self, found: &mut Vec<Condition>) {
        for datastore in &self.inventory.datastores {
            let (Some(capacity_bytes), Some(free_bytes)) = (datastore.capacity_bytes, datastore.free_bytes)
            else {
                continue;
            };
            let percent = free_bytes.saturating_mul(100).checked_div(capacity_bytes).unwrap_or(100);
            if percent >= FILLING_PERCENT {
                continue;
            }
            let holds = |vpg: &&Vpg| vpg.settings.vms.iter().any(|member| self.is_on(member, datastore));
            let users: Vec<&str> =
                self.desired.vpgs.iter().filter(holds).map(|vpg| vpg.name.as_str()).collect();
            if users.is_empty() {
                continue;
            }
            found.push(condition(
                "datastore-filling",
                Entity::datastore(&datastore.name),
                if percent < FULL_PERCENT { Level::Error } else { Level::Warning },
                format!(
                    "datastore {} has {} of {} free; VPG {} has journals there",
                    datastore.name,
                    format_bytes(free_bytes),
                    format_bytes(capacity_bytes),
                    users.join(", ")
                ),
                "make room there, or lower the journal limits: a journal without room gives up history, then pauses replication",
            ));
        }
    }

    fn is_on(&self, member: &Member, datastore: &Datastore) -> bool {
        let target = self.desired.vras.get(&member.target).map(|vra| vra.name.as_str());
        let is_there =
            |host: &String| self.inventory.host(host).is_some_and(|host| Some(host.vra.as_str()) == target);
        member.datastore.starts_with(&datastore.path) && datastore.hosts.iter().any(is_there)
    }
}

fn gone(vpg: &Vpg, member: &Member) -> Condition {
    condition(
        "vm-gone",
        Entity::vm(member.vm),
        Level::Warning,
        format!("VM {} of VPG {} is no longer in the inventory; its journal stays", member.name, vpg.name),
        &format!(
            "recover it from its journal, bring it back, or take it out of the group: `zvm vpg remove-vm {} {}`",
            vpg.name, member.name
        ),
    )
}

fn told(disk: &Disk) -> String {
    disk.name.clone()
}
