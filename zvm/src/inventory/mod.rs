//! What there is to protect and where it can go: one model, read by providers behind one trait.

pub mod static_file;

use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Everything that a provider knows, as one consistent reading.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inventory {
    /// Sites.
    pub sites: Vec<Site>,
    /// Hosts.
    pub hosts: Vec<Host>,
    /// Networks.
    pub networks: Vec<Network>,
    /// Datastores.
    pub datastores: Vec<Datastore>,
    /// Virtual machines.
    pub vms: Vec<Vm>,
}

/// Hosts, datastores and networks under one roof.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Site {
    /// Its name.
    pub name: String,
}

/// A hypervisor host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// Its name.
    pub name: String,
    /// Its site's name.
    pub site: String,
    /// Name under which the host's VRA is enrolled.
    pub vra: String,
}

/// A network that NICs are plugged into.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Its name.
    pub name: String,
    /// Its site's name.
    pub site: String,
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
}

/// A virtual machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vm {
    /// What it is matched by, for ever.
    pub uuid: Uuid,
    /// Its name, which may change.
    pub name: String,
    /// Name of the host that it runs on.
    pub host: String,
    /// Its disks.
    pub disks: Vec<Disk>,
    /// Its network cards.
    pub nics: Vec<Nic>,
}

/// A disk of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Its name within the VM, such as `vda`.
    pub name: String,
    /// The raw file or block device on the host.
    pub path: PathBuf,
    /// Its size in bytes, if the provider knows it.
    pub size_bytes: Option<u64>,
}

/// A network card of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// Its MAC address.
    pub mac: String,
    /// Name of its network.
    pub network: String,
}

/// Why an inventory could not be read. The last good reading stays in force.
#[derive(Debug, thiserror::Error)]
pub enum InventoryError {
    /// The source could not be reached or read.
    #[error("cannot read inventory {from}")]
    Read {
        /// The file or address.
        from: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// What was read is not valid.
    #[error("inventory {from}, line {line}: {key}: {reason}")]
    Invalid {
        /// The file or address.
        from: String,
        /// Line, counted from 1.
        line: usize,
        /// The key or section that is wrong.
        key: String,
        /// What is wrong with it and what would be right.
        reason: String,
    },
}

/// Answer of a provider's reading.
pub type ReadFuture<'a> =
    Pin<Box<dyn Future<Output = Result<Option<Inventory>, InventoryError>> + Send + 'a>>;

/// A source of inventory.
pub trait Provider: Send {
    /// What it reads from, for messages.
    fn describe(&self) -> String;

    /// The whole inventory, or `None` if nothing changed since the last reading (good or bad).
    ///
    /// Not cancel safe: a dropped call may count as a reading.
    fn read(&mut self) -> ReadFuture<'_>;
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
