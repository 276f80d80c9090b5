//! What happened, kept for the record.

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use vra::api::TimeUs;

use super::named;

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Its id.
    pub id: Uuid,
    /// When it happened.
    pub at_us: TimeUs,
    /// What kind of thing.
    pub kind: EventKind,
    /// Whether it was as intended.
    pub success: bool,
    /// For people.
    pub description: String,
    /// What it is about.
    pub entity: Entity,
    /// The task it belongs to.
    pub task: Option<Uuid>,
}

/// What an event or an alert is about.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Entity {
    /// What kind of thing.
    pub kind: EntityKind,
    /// Its UUID; of hosts, networks, datastores and sources their name; of the manager itself, empty.
    pub id: String,
}

named! {
    /// Kinds of things.
    EntityKind {
        /// A group.
        Vpg = "vpg",
        /// A VRA.
        Vra = "vra",
        /// A virtual machine.
        Vm = "vm",
        /// A hypervisor host.
        Host = "host",
        /// A network.
        Network = "network",
        /// A datastore.
        Datastore = "datastore",
        /// A source of inventory.
        Source = "source",
        /// The manager.
        Zvm = "zvm",
    }
}

named! {
    /// Kinds of events: names of EventType where it has one, then our own.
    EventKind {
        /// A group was created.
        CreateProtectionGroup = "CreateProtectionGroup",
        /// A group's settings were changed.
        EditProtectionGroup = "EditProtectionGroup",
        /// A group's replication was paused.
        PauseProtectionGroup = "PauseProtectionGroup",
        /// A group's replication goes on.
        ResumeProtectionGroup = "ResumeProtectionGroup",
        /// Full syncs were begun.
        InitFullSync = "InitFullSync",
        /// VMs were added to a group.
        ProtectVm = "ProtectVM",
        /// VMs were taken out of a group.
        UnprotectVm = "UnprotectVM",
        /// A group was deleted.
        RemoveProtectionGroup = "RemoveProtectionGroup",
        /// A test was started.
        FailOverTest = "FailOverTest",
        /// A test was ended.
        StopFailOverTest = "StopFailOverTest",
        /// A checkpoint was named.
        InsertTaggedCp = "InsertTaggedCP",
        /// A checkpoint was locked.
        LockCheckpoint = "LockCheckpoint",
        /// A checkpoint was unlocked.
        UnlockCheckpoint = "UnlockCheckpoint",
        /// A VRA enrolled.
        InstallVra = "InstallVra",
        /// A VRA was revoked.
        UninstallVra = "UninstallVra",
        /// An alert came.
        AlertTurnedOn = "AlertTurnedOn",
        /// An alert went.
        AlertTurnedOff = "AlertTurnedOff",
        /// A token was made.
        TokenCreated = "TokenCreated",
        /// An enrolment was refused.
        EnrolmentRefused = "EnrolmentRefused",
        /// All VRAs of a group have its definition.
        DefinitionApplied = "DefinitionApplied",
        /// A group's status or substatus changed.
        StatusChanged = "StatusChanged",
        /// The inventory was read anew.
        InventoryRead = "InventoryRead",
        /// A VRA's address was changed.
        AddressChanged = "AddressChanged",
        /// A VRA that was known by its id alone told its name.
        VraNamed = "VraNamed",
        /// A new key for encrypted journals is in use.
        SiteKeyRotated = "SiteKeyRotated",
        /// Disks of a VM are served by a VRA.
        AttachVm = "AttachVm",
        /// Disks of a VM are its own again.
        DetachVm = "DetachVm",
        /// A source of inventory was added.
        SourceAdded = "SourceAdded",
        /// A source's settings were changed.
        SourceEdited = "SourceEdited",
        /// A source was removed.
        SourceRemoved = "SourceRemoved",
        /// A host came into the inventory.
        HostAdded = "HostAdded",
        /// A host went from the inventory.
        HostRemoved = "HostRemoved",
        /// A host got another name.
        HostRenamed = "HostRenamed",
        /// A host began or ceased to answer, or its maintenance did.
        HostStateChanged = "HostStateChanged",
        /// A network came into the inventory.
        NetworkAdded = "NetworkAdded",
        /// A network went from the inventory.
        NetworkRemoved = "NetworkRemoved",
        /// A network got another name.
        NetworkRenamed = "NetworkRenamed",
        /// Hosts have a network, or don't any more.
        NetworkHostsChanged = "NetworkHostsChanged",
        /// A datastore came into the inventory.
        DatastoreAdded = "DatastoreAdded",
        /// A datastore went from the inventory.
        DatastoreRemoved = "DatastoreRemoved",
        /// Hosts mount a datastore, or don't any more.
        DatastoreHostsChanged = "DatastoreHostsChanged",
        /// A VM came into the inventory.
        VmAdded = "VmAdded",
        /// A VM went from the inventory.
        VmRemoved = "VmRemoved",
        /// A VM got another name.
        VmRenamed = "VmRenamed",
        /// A VM is on another host.
        VmMoved = "VmMoved",
        /// A VM was started, stopped or paused.
        VmPowerChanged = "VmPowerChanged",
        /// A VM got a disk.
        DiskAdded = "DiskAdded",
        /// A VM lost a disk.
        DiskRemoved = "DiskRemoved",
        /// A VM's disk got another size.
        DiskResized = "DiskResized",
        /// A VM's disk lies elsewhere.
        DiskReplaced = "DiskReplaced",
        /// A VM got a network card.
        NicAdded = "NicAdded",
        /// A VM lost a network card.
        NicRemoved = "NicRemoved",
        /// A VM's network card was plugged into another network.
        NicMoved = "NicMoved",
    }
}

impl Entity {
    /// A group.
    pub fn vpg(id: vra::api::VpgId) -> Self {
        Self { kind: EntityKind::Vpg, id: id.to_string() }
    }

    /// A VRA.
    pub fn vra(id: vra::api::VraId) -> Self {
        Self { kind: EntityKind::Vra, id: id.to_string() }
    }

    /// A virtual machine.
    pub fn vm(id: vra::api::VmId) -> Self {
        Self { kind: EntityKind::Vm, id: id.to_string() }
    }

    /// A hypervisor host.
    pub fn host(name: &str) -> Self {
        Self { kind: EntityKind::Host, id: name.into() }
    }

    /// A network.
    pub fn network(name: &str) -> Self {
        Self { kind: EntityKind::Network, id: name.into() }
    }

    /// A datastore.
    pub fn datastore(name: &str) -> Self {
        Self { kind: EntityKind::Datastore, id: name.into() }
    }

    /// A source of inventory.
    pub fn source(name: &str) -> Self {
        Self { kind: EntityKind::Source, id: name.into() }
    }

    /// The manager.
    pub fn zvm() -> Self {
        Self { kind: EntityKind::Zvm, id: String::new() }
    }
}
