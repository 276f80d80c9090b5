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
    /// Its UUID; of the manager itself, empty.
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
        /// A new key for encrypted journals is in use.
        SiteKeyRotated = "SiteKeyRotated",
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

    /// The manager.
    pub fn zvm() -> Self {
        Self { kind: EntityKind::Zvm, id: String::new() }
    }
}
