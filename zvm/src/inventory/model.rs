//! The nouns of an inventory, the same for every source.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::model::named;

/// Everything that a source knows, as one consistent reading.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inventory {
    /// Sites.
    pub sites: Vec<Site>,
    /// Clusters.
    #[serde(default)]
    pub clusters: Vec<Cluster>,
    /// Hosts.
    pub hosts: Vec<Host>,
    /// Networks.
    pub networks: Vec<Network>,
    /// Datastores.
    pub datastores: Vec<Datastore>,
    /// Virtual machines.
    pub vms: Vec<Vm>,
}

/// Where an object comes from. Names change; this doesn't.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(default)]
pub struct Origin {
    /// Name of the source, as the manager's user gave it; empty for the inventory file.
    pub source: String,
    /// What the source itself knows the object by: libvirt's UUID, or a vCenter's managed object id such as `vm-42`. Empty where it
    /// has nothing but the name.
    pub id: String,
}

/// Hosts, datastores and networks under one roof.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Site {
    /// Its name.
    pub name: String,
}

/// Hosts among which VMs move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cluster {
    /// Its name.
    pub name: String,
    /// Its site's name.
    pub site: String,
    /// Where it comes from.
    #[serde(default)]
    pub origin: Origin,
}

/// A hypervisor host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// Its name.
    pub name: String,
    /// Its site's name.
    pub site: String,
    /// Its cluster's name.
    #[serde(default)]
    pub cluster: Option<String>,
    /// Name under which the host's VRA is enrolled.
    pub vra: String,
    /// Whether it answers.
    #[serde(default)]
    pub state: HostState,
    /// Where it comes from.
    #[serde(default)]
    pub origin: Origin,
}

named! {
    /// Whether a host answers.
    #[derive(Default)]
    HostState {
        /// It answers and may run VMs.
        #[default]
        Connected = "connected",
        /// It answers and is to run no VMs.
        Maintenance = "maintenance",
        /// Its source can't reach it, or was told not to.
        NotResponding = "not-responding",
    }
}

/// A network that NICs are plugged into.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Its name.
    pub name: String,
    /// Its site's name.
    pub site: String,
    /// Names of the hosts that have it; none where the source doesn't say.
    #[serde(default)]
    pub hosts: Vec<String>,
    /// Where it comes from.
    #[serde(default)]
    pub origin: Origin,
}

/// A folder that journals and recovery disks can lie in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Datastore {
    /// Its name.
    pub name: String,
    /// Names of the hosts that mount it.
    pub hosts: Vec<String>,
    /// Its folder, the same on all of them.
    pub path: PathBuf,
    /// Its size in bytes, if the source knows it.
    #[serde(default)]
    pub capacity_bytes: Option<u64>,
    /// How much of it is free, in bytes, if the source knows it.
    #[serde(default)]
    pub free_bytes: Option<u64>,
    /// Where it comes from.
    #[serde(default)]
    pub origin: Origin,
}

/// A virtual machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vm {
    /// What it is matched by, for ever.
    pub uuid: Uuid,
    /// Its name, which may change.
    pub name: String,
    /// Name of the host that it runs on, or would.
    pub host: String,
    /// Whether it runs.
    #[serde(default)]
    pub power: Power,
    /// Its disks.
    pub disks: Vec<Disk>,
    /// Its network cards.
    pub nics: Vec<Nic>,
    /// Where it comes from.
    #[serde(default)]
    pub origin: Origin,
}

named! {
    /// Whether a VM runs.
    #[derive(Default)]
    Power {
        /// The source doesn't say.
        #[default]
        Unknown = "unknown",
        /// It runs.
        On = "on",
        /// It is there and stands still.
        Paused = "paused",
        /// It is off.
        Off = "off",
    }
}

/// A disk of a VM. Drives whose medium is changed, such as a CD, are none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Its name within the VM, such as `vda`.
    pub name: String,
    /// The file or block device on the host; of a disk elsewhere what its source calls it.
    pub path: PathBuf,
    /// Its size in bytes, if the source knows it.
    pub size_bytes: Option<u64>,
    /// What is at its path.
    #[serde(default)]
    pub kind: DiskKind,
    /// Whether the guest is given a device that a VRA serves, in place of what is at the path; none if the source doesn't tell.
    #[serde(default)]
    pub served: Option<bool>,
    /// What the guest has written to it since it was started, in bytes, if the source counts it.
    #[serde(default)]
    pub written_bytes: Option<u64>,
}

named! {
    /// What is at a disk's path.
    #[derive(Default)]
    DiskKind {
        /// A file or a block device with the guest's bytes as they are.
        #[default]
        Raw = "raw",
        /// A file in a format of its own, such as qcow2, or a chain of them.
        Image = "image",
        /// Not on the host: NBD, iSCSI, RBD.
        Network = "network",
        /// Several VMs write to it.
        Shared = "shared",
        /// The guest can't write to it.
        ReadOnly = "read-only",
        /// What is written to it is thrown away when the guest stops.
        Transient = "transient",
        /// A SCSI device that the guest commands itself.
        Lun = "lun",
        /// A virtual disk of a vSphere host.
        Vmdk = "vmdk",
    }
}

/// A network card of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// Its MAC address, in lower case.
    pub mac: String,
    /// Name of its network; empty if it is plugged into none that the source knows.
    pub network: String,
}

/// How a user names a VM, and what came of it.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum FindVmError {
    /// No VM has that name or UUID.
    #[error("no VM {0:?} in the inventory")]
    Unknown(String),
    /// Several VMs share the name.
    #[error("{count} VMs are named {name:?}: give the UUID of the one you mean")]
    Ambiguous {
        /// The name.
        name: String,
        /// How many have it.
        count: usize,
    },
}

impl Inventory {
    /// The VM of that UUID or name.
    pub fn find_vm(&self, name_or_uuid: &str) -> Result<&Vm, FindVmError> {
        if let Ok(uuid) = name_or_uuid.parse::<Uuid>()
            && let Some(vm) = self.vms.iter().find(|vm| vm.uuid == uuid)
        {
            return Ok(vm);
        }
        let mut named = self.vms.iter().filter(|vm| vm.name == name_or_uuid);
        match (named.next(), named.count()) {
            (Some(vm), 0) => Ok(vm),
            (Some(_), more) => Err(FindVmError::Ambiguous { name: name_or_uuid.into(), count: more + 1 }),
            (None, _) => Err(FindVmError::Unknown(name_or_uuid.into())),
        }
    }

    /// The host of that name.
    pub fn host(&self, name: &str) -> Option<&Host> {
        self.hosts.iter().find(|host| host.name == name)
    }

    /// The datastore of that name.
    pub fn datastore(&self, name: &str) -> Option<&Datastore> {
        self.datastores.iter().find(|datastore| datastore.name == name)
    }

    /// Names of the hosts whose VRA is enrolled as `vra`.
    pub fn hosts_of_vra<'a>(&'a self, vra: &'a str) -> impl Iterator<Item = &'a str> {
        self.hosts.iter().filter(move |host| host.vra == vra).map(|host| host.name.as_str())
    }
}

impl DiskKind {
    /// Why a disk of this kind can't be protected, and the way out; none if it can.
    pub fn obstacle(self) -> Option<(&'static str, &'static str)> {
        match self {
            Self::Raw => None,
            Self::Image => Some((
                "is in a format of its own, such as qcow2, or a chain of them",
                "convert it with `qemu-img convert -O raw` (which also flattens a chain) and give the VM the result",
            )),
            Self::Network => Some((
                "isn't on the VM's host",
                "copy it to a file or block device there, or have the host attach it as a block device (iSCSI, RBD)",
            )),
            Self::Shared => Some((
                "is written to by several VMs, whose order no single host sees",
                "replicate such a disk within the guests, and exclude it here",
            )),
            Self::ReadOnly => Some(("is read-only for the guest", "exclude it: nothing is written to it")),
            Self::Transient => Some((
                "is transient: what is written to it is thrown away when the guest stops",
                "exclude it",
            )),
            Self::Lun => Some((
                "is a SCSI device that the guest commands itself (device='lun')",
                "give it to the guest as a disk (device='disk')",
            )),
            Self::Vmdk => {
                Some(("is a virtual disk of a vSphere host", "only disks of KVM hosts can be protected"))
            }
        }
    }
}

impl Vm {
    /// The disk of that name.
    pub fn disk(&self, name: &str) -> Option<&Disk> {
        self.disks.iter().find(|disk| disk.name == name)
    }
}
