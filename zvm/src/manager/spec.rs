//! From what a user writes of a group to what its VRAs need: names are looked up, limits checked, disks found. No I/O.

mod described;
mod disks;
mod editing;
pub mod full_sync;
mod joining;
mod recovery;
mod volumes;

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;

use uuid::Uuid;
use vra::api::volume::VolumeInfo;
use vra::api::vpg::{
    JOURNAL_LIMIT_BYTES, JOURNAL_PERCENT, JournalSize, MAX_SOURCES_PER_VPG, MAX_VMS_PER_VPG, VolumeDefinition,
};
use vra::api::{ApiError, ErrorCode, JournalId, MemberSince, TimeUs, VmId, VpgId, VraId};

use super::check_name;
use crate::api::{VmSpec, VpgSpec};
use crate::inventory::{Disk, FindVmError, Inventory, Vm};
use crate::model::recovery::VmRecovery;
use crate::model::vpg::{ExcludedDisk, JournalBounds, Member, Vpg, VpgSettings, VpgState};
use crate::model::vra::Vra;
use crate::units::format_bytes;
use volumes::{set_swap, volumes_of};

pub use described::described;
pub use disks::{Growing, grow, members_of, without_disks};
pub use editing::edited;
pub use joining::{Joining, join, without};

const CHECKPOINT_INTERVAL_MS: std::ops::RangeInclusive<u32> = 1_000..=3_600_000;
const HOLD_DEADLINE_MS: std::ops::RangeInclusive<u32> = 10..=1_000;
/// The member set that a group begins with.
const FIRST_MEMBER_SET: u32 = 1;
const HISTORY_S: std::ops::RangeInclusive<u64> = 60..=90 * 86_400;
const RPO_TARGET_S: std::ops::RangeInclusive<u64> = 1..=86_400;
const MAX_DESCRIPTION_CHARS: usize = 1_024;
const TEST_REMINDER_DAYS: std::ops::RangeInclusive<u32> = 1..=3_650;

/// What a specification is resolved against.
#[derive(Debug)]
pub struct Context<'a> {
    /// The inventory in force.
    pub inventory: &'a Inventory,
    /// Enrolled VRAs.
    pub vras: &'a BTreeMap<VraId, Vra>,
    /// The groups that there are.
    pub vpgs: &'a [Vpg],
}

/// A specification whose names have been looked up, still without its disks.
#[derive(Debug)]
pub struct Resolved<'a> {
    spec: &'a VpgSpec,
    members: Vec<Place<'a>>,
}

#[derive(Debug)]
struct Place<'a> {
    vm: &'a Vm,
    source: &'a Vra,
    target: &'a Vra,
    datastore: PathBuf,
    journal_size: JournalBounds,
    excluded: Vec<ExcludedDisk>,
    /// Paths of disks that are swap.
    swap: Vec<PathBuf>,
    recovery: VmRecovery,
}

/// Looks up every name and checks every limit.
pub fn resolve<'a>(spec: &'a VpgSpec, context: &Context<'a>) -> Result<Resolved<'a>, ApiError> {
    check_name("VPG", &spec.name)?;
    check_range("the checkpoint interval", spec.checkpoint_interval_ms, &CHECKPOINT_INTERVAL_MS, "ms")?;
    check_range("the hold deadline", spec.hold_deadline_ms, &HOLD_DEADLINE_MS, "ms")?;
    check_range("history", spec.history_s, &HISTORY_S, "s")?;
    check_range("the RPO target", spec.rpo_target_s, &RPO_TARGET_S, "s")?;
    check_description(&spec.description)?;
    check_test_reminder(spec.test_reminder_days)?;
    recovery::check_group(&spec.recovery)?;
    if context.vpgs.iter().any(|vpg| vpg.name == spec.name) {
        return Err(ApiError::new(ErrorCode::Conflict, format!("there is a VPG {:?} already", spec.name))
            .remedy("choose another name, or delete that one first"));
    }
    if spec.vms.is_empty() || spec.vms.len() > MAX_VMS_PER_VPG {
        return Err(bad(format!("a VPG has 1 to {MAX_VMS_PER_VPG} VMs, this one has {}", spec.vms.len())));
    }
    let members = spec.vms.iter().map(|vm_spec| place(spec, vm_spec, context));
    let members = members.collect::<Result<Vec<_>, _>>()?;
    twice(&members)?;
    let sources = members.iter().map(|place| place.source.id).collect();
    check_sources(&spec.name, (spec.checkpoint_interval_ms, spec.hold_deadline_ms), &sources)?;
    Ok(Resolved { spec, members })
}

fn check_description(description: &str) -> Result<(), ApiError> {
    let length = description.chars().count();
    if length > MAX_DESCRIPTION_CHARS || description.chars().any(char::is_control) {
        return Err(bad(format!(
            "a description has at most {MAX_DESCRIPTION_CHARS} characters in one line, without control characters; this one has {length}"
        )));
    }
    Ok(())
}

/// Refuses a VM that is named twice.
fn twice(places: &[Place<'_>]) -> Result<(), ApiError> {
    let mut seen = HashSet::new();
    match places.iter().find(|place| !seen.insert(place.vm.uuid)) {
        Some(place) => Err(bad(format!("VM {:?} is named twice", place.vm.name))),
        None => Ok(()),
    }
}

/// Checks the VRAs that are to have checkpoints together.
fn check_sources(
    vpg: &str,
    (checkpoint_interval_ms, hold_deadline_ms): (u32, u32),
    sources: &HashSet<VraId>,
) -> Result<(), ApiError> {
    if sources.len() > MAX_SOURCES_PER_VPG {
        let message = format!(
            "the VMs of {vpg:?} run at {} different VRAs; a group may have {MAX_SOURCES_PER_VPG}",
            sources.len()
        );
        return Err(ApiError::new(ErrorCode::Unsupported, message).remedy("make several groups of them"));
    }
    // As the VRAs check it: across hosts a hold that fails lasts for the whole deadline.
    if sources.len() > 1 && hold_deadline_ms > checkpoint_interval_ms / 2 {
        let message = format!(
            "the hold deadline of {vpg:?}, whose VMs run at several VRAs, is {hold_deadline_ms} ms; it must be at most half of the checkpoint interval, {checkpoint_interval_ms} ms"
        );
        return Err(bad(message).remedy("give it a shorter hold deadline or a longer checkpoint interval"));
    }
    Ok(())
}

/// Whether a member may have another VRA as its source.
pub fn check_moved(settings: &VpgSettings, vpg: &str, vm: VmId, to: VraId) -> Result<(), ApiError> {
    let source = |member: &Member| if member.vm == vm { to } else { member.source };
    if let Some(member) = settings.vms.iter().find(|member| member.vm == vm && member.target == to) {
        let message = format!("VM {:?} runs where its journal is, which must be elsewhere", member.name);
        return Err(ApiError::new(ErrorCode::Unsupported, message).remedy(
            "migrate it to another host, or take it out of the group and protect it to another VRA",
        ));
    }
    let timing = (settings.checkpoint_interval_ms, settings.hold_deadline_ms);
    check_sources(vpg, timing, &settings.vms.iter().map(source).collect())
}

fn sources_of<'a>(places: &[Place<'a>]) -> BTreeMap<VraId, &'a Vra> {
    places.iter().map(|place| (place.source.id, place.source)).collect()
}

impl Resolved<'_> {
    /// The VRAs that serve the group's disks.
    pub fn sources(&self) -> BTreeMap<VraId, &Vra> {
        sources_of(&self.members)
    }

    /// The group, with its disks found among those that each source serves now.
    pub fn into_vpg(
        self,
        served: &BTreeMap<VraId, Vec<VolumeInfo>>,
        now_us: TimeUs,
    ) -> Result<Vpg, ApiError> {
        let spec = self.spec;
        let vms = self.members.iter().map(|place| member(place, served, MemberSince(FIRST_MEMBER_SET)));
        let settings = VpgSettings {
            description: spec.description.clone(),
            priority: spec.priority,
            member_set_version: FIRST_MEMBER_SET,
            checkpoint_interval_ms: spec.checkpoint_interval_ms,
            hold_deadline_ms: spec.hold_deadline_ms,
            history_s: spec.history_s,
            rpo_target_s: spec.rpo_target_s,
            give_up_history: spec.give_up_history,
            encrypt: spec.encrypt,
            paused: false,
            test_reminder_days: spec.test_reminder_days,
            new_disks: spec.new_disks,
            recovery: spec.recovery.clone(),
            vms: vms.collect::<Result<_, _>>()?,
            former: Vec::new(),
        };
        recovery::check_together(&spec.name, &settings)?;
        Ok(Vpg {
            id: VpgId::random(),
            name: spec.name.clone(),
            state: VpgState::Active,
            revision: 1,
            applied_revision: 0,
            created_us: now_us,
            last_test_us: None,
            stamp: Some(Uuid::new_v4()),
            settings,
            removal: None,
        })
    }
}

/// The VM of the inventory with this name or UUID.
pub(super) fn find_vm<'a>(inventory: &'a Inventory, name: &str) -> Result<&'a Vm, ApiError> {
    inventory.find_vm(name).map_err(|error| {
        let code = match error {
            FindVmError::Unknown(_) => ErrorCode::NotFound,
            FindVmError::Ambiguous { .. } => ErrorCode::BadRequest,
        };
        ApiError::new(code, error.to_string()).remedy("`zvm inventory` shows the VMs that there are")
    })
}

fn place<'a>(spec: &VpgSpec, vm_spec: &VmSpec, context: &Context<'a>) -> Result<Place<'a>, ApiError> {
    let vm = find_vm(context.inventory, &vm_spec.vm)?;
    if let Some(vpg) = context.vpgs.iter().find(|vpg| vpg.settings.vms.iter().any(|m| m.vm.0 == vm.uuid)) {
        return Err(ApiError::new(
            ErrorCode::Conflict,
            format!("VM {:?} is in VPG {:?} already", vm.name, vpg.name),
        )
        .remedy(format!(
            "take it out there first, `zvm vpg remove-vm {0} {1}`, or delete that group",
            vpg.name, vm.name
        )));
    }
    if vm.disks.is_empty() {
        return Err(bad(format!("VM {:?} has no disks in the inventory", vm.name)));
    }
    let source_name = &context
        .inventory
        .host(&vm.host)
        .ok_or_else(|| bad(format!("host {:?} of VM {:?} is not in the inventory", vm.host, vm.name)))?
        .vra;
    let source = find_vra(context.vras, source_name)?;
    let target = find_vra(context.vras, vm_spec.target.as_ref().unwrap_or(&spec.target))?;
    if source.id == target.id {
        return Err(bad(format!(
            "VRA {} is where VM {:?} runs; its journal must be elsewhere",
            target.name, vm.name
        )));
    }
    let journal_size = journal_size(spec, vm_spec);
    check_journal(&vm.name, &journal_size, None)?;
    let datastore = vm_spec.datastore.as_ref().unwrap_or(&spec.datastore);
    let datastore = find_datastore(context.inventory, datastore, target)?;
    let excluded = excluded(vm, &vm_spec.exclude)?;
    let swap =
        vm_spec.swap.iter().map(|name| Ok(find_disk(vm, name)?.path)).collect::<Result<_, ApiError>>()?;
    let goal =
        recovery::Goal { vm, target: &target.name, datastore: &datastore, inventory: context.inventory };
    recovery::check_vm(&goal, &vm_spec.recovery, &spec.recovery)?;
    let recovery = vm_spec.recovery.clone();
    Ok(Place { vm, source, target, datastore, journal_size, excluded, swap, recovery })
}

/// The disks of a VM that are not to be protected.
fn excluded(vm: &Vm, names: &[String]) -> Result<Vec<ExcludedDisk>, ApiError> {
    let mut excluded = Vec::with_capacity(names.len());
    for name in names {
        let disk = find_disk(vm, name)?;
        if !excluded.contains(&disk) {
            excluded.push(disk);
        }
    }
    if excluded.len() == vm.disks.len() {
        return Err(bad(format!("all disks of VM {:?} are excluded", vm.name))
            .remedy("leave at least one protected, or leave the VM out of the group"));
    }
    Ok(excluded)
}

fn find_disk(vm: &Vm, name: &str) -> Result<ExcludedDisk, ApiError> {
    let is_meant = |disk: &&Disk| disk.name == name || disk.path.as_os_str() == name;
    let disk = vm.disks.iter().find(is_meant).ok_or_else(|| {
        let known: Vec<&str> = vm.disks.iter().map(|disk| disk.name.as_str()).collect();
        let message = format!("VM {:?} has no disk {name:?} in the inventory", vm.name);
        ApiError::new(ErrorCode::NotFound, message).remedy(format!("it has {}", known.join(", ")))
    })?;
    Ok(ExcludedDisk { name: disk.name.clone(), path: disk.path.clone() })
}

fn member(
    place: &Place<'_>,
    served: &BTreeMap<VraId, Vec<VolumeInfo>>,
    member_since: MemberSince,
) -> Result<Member, ApiError> {
    let mut volumes = volumes_of(place.vm, place.source, &place.excluded, &[], served)?;
    for path in &place.swap {
        set_swap(&mut volumes, &place.vm.name, path, true)?;
    }
    check_journal(&place.vm.name, &place.journal_size, Some(&volumes))?;
    Ok(Member {
        vm: VmId(place.vm.uuid),
        name: place.vm.name.clone(),
        journal: JournalId::random(),
        member_since,
        source: place.source.id,
        takeover: None,
        target: place.target.id,
        datastore: place.datastore.clone(),
        journal_size: place.journal_size,
        volumes,
        excluded: place.excluded.clone(),
        recovery: place.recovery.clone(),
    })
}

fn journal_size(spec: &VpgSpec, vm_spec: &VmSpec) -> JournalBounds {
    let (limit_bytes, limit_percent) = match (vm_spec.journal_limit_bytes, vm_spec.journal_limit_percent) {
        (None, None) => (spec.journal_limit_bytes, spec.journal_limit_percent),
        (bytes, percent) => (bytes.unwrap_or(spec.journal_limit_bytes), percent),
    };
    JournalBounds {
        limit_bytes,
        limit_percent,
        warning: vm_spec.journal_warning.or(spec.journal_warning),
        minimum_bytes: vm_spec.journal_minimum_bytes.unwrap_or(spec.journal_minimum_bytes),
    }
}

/// Checks how large a VM's journal may and must be, as far as that can be said without knowing its disks, or all of it.
pub(super) fn check_journal(
    vm: &str,
    size: &JournalBounds,
    volumes: Option<&[VolumeDefinition]>,
) -> Result<(), ApiError> {
    if size.limit_percent.is_none() && !JOURNAL_LIMIT_BYTES.contains(&size.limit_bytes) {
        return Err(bad(format!(
            "the journal limit of VM {vm:?} must be {} to {}, not {}",
            format_bytes(*JOURNAL_LIMIT_BYTES.start()),
            format_bytes(*JOURNAL_LIMIT_BYTES.end()),
            format_bytes(size.limit_bytes)
        )));
    }
    let warning_percent = match size.warning {
        Some(JournalSize::Percent(percent)) => Some(percent),
        _ => None,
    };
    for (what, percent) in [("limit", size.limit_percent), ("warning threshold", warning_percent)] {
        if let Some(percent) = percent {
            check_range(&format!("the journal {what} of VM {vm:?}"), percent, &JOURNAL_PERCENT, "percent")?;
        }
    }
    let Some(volumes) = volumes else { return Ok(()) };
    let disks_bytes = volumes.iter().fold(0_u64, |sum, volume| sum.saturating_add(volume.size_bytes));
    let limit_bytes = size.limit_for(disks_bytes);
    let warning_bytes = size.warning.map(|warning| warning.of(disks_bytes));
    for (what, bytes) in [("warning threshold", warning_bytes), ("minimum", Some(size.minimum_bytes))] {
        if let Some(bytes) = bytes.filter(|bytes| *bytes > limit_bytes) {
            return Err(bad(format!(
                "the journal {what} of VM {vm:?}, {}, is above its journal limit, {}",
                format_bytes(bytes),
                format_bytes(limit_bytes)
            )));
        }
    }
    Ok(())
}

/// The VM of a group with this name or id.
pub(super) fn find_member<'a>(vpg: &'a Vpg, name: &str) -> Result<&'a Member, ApiError> {
    let mut found = vpg.settings.vms.iter().filter(|member| is_named(member, name));
    let Some(member) = found.next() else {
        let message = format!("VPG {:?} has no VM {name:?}", vpg.name);
        return Err(ApiError::new(ErrorCode::NotFound, message).remedy("`zvm vpg show` lists its VMs"));
    };
    match found.next() {
        None => Ok(member),
        Some(_) => Err(bad(format!("VPG {:?} has several VMs {name:?}", vpg.name))
            .remedy("name it by its id, `zvm vpg show --json` tells them")),
    }
}

fn is_named(member: &Member, name: &str) -> bool {
    member.name == name || member.vm.to_string() == name
}

fn find_vra<'a>(vras: &'a BTreeMap<VraId, Vra>, name_or_id: &str) -> Result<&'a Vra, ApiError> {
    vras.values().find(|vra| vra.name == name_or_id || vra.id.to_string() == name_or_id).ok_or_else(|| {
        ApiError::new(ErrorCode::NotFound, format!("no VRA is enrolled as {name_or_id:?}")).remedy(format!(
            "enrol it: `zvm vra token create --name {name_or_id}`, then `vra enroll` on its host"
        ))
    })
}

fn find_datastore(inventory: &Inventory, name_or_path: &str, target: &Vra) -> Result<PathBuf, ApiError> {
    if name_or_path.starts_with('/') {
        return Ok(name_or_path.into());
    }
    let datastore = inventory.datastore(name_or_path).ok_or_else(|| {
        ApiError::new(ErrorCode::NotFound, format!("no datastore {name_or_path:?} in the inventory")).remedy(
            "`zvm inventory` shows those that there are; the absolute path of a folder will do as well",
        )
    })?;
    if !inventory.hosts_of_vra(&target.name).any(|host| datastore.hosts.iter().any(|name| name == host)) {
        let message = format!("no host of VRA {} mounts datastore {name_or_path:?}", target.name);
        return Err(bad(message));
    }
    Ok(datastore.path.clone())
}

fn check_test_reminder(days: Option<u32>) -> Result<(), ApiError> {
    days.map_or(Ok(()), |days| check_range("the test reminder", days, &TEST_REMINDER_DAYS, "days"))
}

fn check_range<T: PartialOrd + std::fmt::Display>(
    what: &str,
    value: T,
    range: &std::ops::RangeInclusive<T>,
    unit: &str,
) -> Result<(), ApiError> {
    if range.contains(&value) {
        return Ok(());
    }
    Err(bad(format!("{what} must be {} to {} {unit}, not {value}", range.start(), range.end())))
}

fn bad(message: String) -> ApiError {
    ApiError::new(ErrorCode::BadRequest, message)
}
