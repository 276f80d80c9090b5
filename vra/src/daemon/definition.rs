//! Whether a VPG's definition can be taken.

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};

use crate::api::volume::{MAX_NAME_BYTES, MAX_VOLUMES_PER_VM, is_text};
use crate::api::vpg::{
    JOURNAL_LIMIT_BYTES, JOURNAL_PERCENT, JournalSize, MAX_SOURCES_PER_VPG, MAX_TAKEOVER_SEQ,
    MAX_VMS_PER_VPG, VmDefinition,
};
use crate::api::{ApiError, ErrorCode, FormerVm, MAX_FORMER_VMS, VpgDefinition, VraId};

/// Checks all that can be checked without looking at disks.
///
/// # Errors
/// [`ErrorCode::BadRequest`], naming VM, value and limit; [`ErrorCode::Forbidden`] for a datastore that isn't in the configuration.
pub fn check(definition: &VpgDefinition, own: VraId, datastores: &[PathBuf]) -> Result<(), ApiError> {
    check_name("VPG", &definition.name)?;
    limits("checkpoint_interval_ms", definition.checkpoint_interval_ms.into(), 1_000, 3_600_000)?;
    limits("hold_deadline_ms", definition.hold_deadline_ms.into(), 10, 1_000)?;
    limits("the number of VMs", definition.vms.len() as u64, 1, MAX_VMS_PER_VPG as u64)?;
    check_sources(definition)?;
    check_hold(definition)?;
    let mut vms = BTreeSet::new();
    let mut journals = BTreeSet::new();
    let mut volumes = BTreeSet::new();
    for vm in &definition.vms {
        if !vms.insert(vm.id) || !journals.insert(vm.journal) {
            return Err(bad(format!("VM {} or its journal is in VPG \"{}\" twice", vm.id, definition.name)));
        }
        check_vm(vm)?;
        if let Some(volume) = vm.volumes.iter().find(|volume| !volumes.insert(volume.id)) {
            return Err(bad(format!("volume {} is in VPG \"{}\" twice", volume.id, definition.name)));
        }
        if vm.member_since.0 > definition.member_set_version {
            return Err(bad(format!(
                "VM {} is a member since the member set {}, but that of VPG \"{}\" is {}",
                vm.name, vm.member_since.0, definition.name, definition.member_set_version
            )));
        }
        if let Some(takeover) = vm.takeover {
            limits("takeover.first_seq", takeover.first_seq, 1, MAX_TAKEOVER_SEQ)?;
        }
        if vm.target.id == own {
            check_datastore(vm, datastores)?;
        }
    }
    limits("the number of former VMs", definition.former.len() as u64, 0, MAX_FORMER_VMS as u64)?;
    for former in &definition.former {
        check_name("former VM", &former.name)?;
        if journals.contains(&former.journal) {
            return Err(bad(format!(
                "journal {} of VM {} in VPG \"{}\" is both in use and to be let go of",
                former.journal, former.name, definition.name
            )));
        }
    }
    Ok(())
}

/// Checks the VRAs that have checkpoints together.
fn check_sources(definition: &VpgDefinition) -> Result<(), ApiError> {
    let sources = definition.sources();
    limits("the number of source VRAs", sources.len() as u64, 1, MAX_SOURCES_PER_VPG as u64)?;
    for source in &sources {
        if let Some(vm) = source.vms.iter().find(|vm| vm.source.address != source.endpoint.address) {
            return Err(bad(format!(
                "source VRA {} has the address \"{}\" for VM {} and \"{}\" for another VM: give it one",
                source.endpoint.id, vm.source.address, vm.name, source.endpoint.address
            )));
        }
    }
    let mut seen = BTreeSet::new();
    for vra in &definition.coordinators {
        let is_source = sources.iter().any(|source| source.endpoint.id == *vra);
        if !is_source || !seen.insert(*vra) {
            return Err(bad(format!(
                "coordinator {vra} of VPG \"{}\" is named twice or is not a source VRA of it",
                definition.name
            )));
        }
    }
    Ok(())
}

/// Across hosts a hold that fails lasts for the whole deadline on those that were reached: guests must get on in between.
fn check_hold(definition: &VpgDefinition) -> Result<(), ApiError> {
    let (interval_ms, deadline_ms) = (definition.checkpoint_interval_ms, definition.hold_deadline_ms);
    if definition.sources().len() > 1 && deadline_ms > interval_ms / 2 {
        return Err(bad(format!(
            "hold_deadline_ms of VPG \"{}\", whose VMs are at several source VRAs, is {deadline_ms}; it must be at most half of checkpoint_interval_ms, {interval_ms}",
            definition.name
        ))
        .remedy("give it a shorter hold deadline or a longer checkpoint interval"));
    }
    Ok(())
}

/// Checks a name of a VM, VPG or tag.
pub(super) fn check_name(what: &str, name: &str) -> Result<(), ApiError> {
    if name.is_empty() || !is_text(name) {
        let shown: String = name.chars().take(40).collect();
        return Err(bad(format!("{what} name {shown:?} is not 1 to {MAX_NAME_BYTES} bytes of text")));
    }
    Ok(())
}

fn check_vm(vm: &VmDefinition) -> Result<(), ApiError> {
    check_name("VM", &vm.name)?;
    let what = format!("the number of volumes of VM {}", vm.name);
    limits(&what, vm.volumes.len() as u64, 1, MAX_VOLUMES_PER_VM as u64)?;
    if vm.volumes.iter().all(|volume| volume.left) {
        return Err(bad(format!("all volumes of VM {} have left: take the VM out of the group", vm.name)));
    }
    for (index, volume) in vm.volumes.iter().enumerate() {
        if usize::from(volume.number) != index {
            return Err(bad(format!(
                "the volumes of VM {} must be in the order of their numbers, from 0 without gaps; number {} stands at place {index}",
                vm.name, volume.number
            )));
        }
        if !matches!(volume.logical_block_bytes, 512 | 4096) {
            return Err(bad(format!(
                "volume {} has blocks of {} bytes; 512 and 4096 are possible",
                volume.id, volume.logical_block_bytes
            )));
        }
        if volume.size_bytes == 0 || !volume.size_bytes.is_multiple_of(volume.logical_block_bytes.into()) {
            return Err(bad(format!(
                "volume {} has {} bytes, which is not a multiple of its block size {}",
                volume.id, volume.size_bytes, volume.logical_block_bytes
            )));
        }
    }
    for endpoint in [&vm.source, &vm.target] {
        let port = endpoint.address.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
        if port.is_none_or(|port| port == 0) {
            return Err(bad(format!(
                "the address \"{}\" of VRA {} has not the form host:port",
                endpoint.address, endpoint.id
            )));
        }
    }
    check_journal(vm)
}

fn check_journal(vm: &VmDefinition) -> Result<(), ApiError> {
    let limit_bytes = vm.journal_limit();
    if !JOURNAL_LIMIT_BYTES.contains(&limit_bytes) {
        return Err(bad(format!(
            "the journal limit of VM {} is {limit_bytes} bytes; it must be {} to {}",
            vm.name,
            JOURNAL_LIMIT_BYTES.start(),
            JOURNAL_LIMIT_BYTES.end()
        )));
    }
    let percent = |size: JournalSize| match size {
        JournalSize::Percent(percent) => Some(percent),
        JournalSize::Bytes(_) => None,
    };
    let percents = [
        ("journal limit", vm.journal_limit_percent),
        ("journal warning threshold", vm.journal_warning.and_then(percent)),
    ];
    for (what, percent) in percents {
        if let Some(percent) = percent.filter(|percent| !JOURNAL_PERCENT.contains(percent)) {
            return Err(bad(format!(
                "the {what} of VM {} is {percent} percent of its disks; it must be {} to {}",
                vm.name,
                JOURNAL_PERCENT.start(),
                JOURNAL_PERCENT.end()
            )));
        }
    }
    let below_limit = [
        ("journal warning threshold", vm.journal_warning_bytes()),
        ("journal minimum", Some(vm.journal_minimum_bytes)),
    ];
    for (what, bytes) in below_limit {
        if let Some(bytes) = bytes.filter(|bytes| *bytes > limit_bytes) {
            return Err(bad(format!(
                "the {what} of VM {} is {bytes} bytes, above its journal limit, {limit_bytes}",
                vm.name
            )));
        }
    }
    Ok(())
}

fn check_datastore(vm: &VmDefinition, datastores: &[PathBuf]) -> Result<(), ApiError> {
    if is_within(&vm.datastore, datastores) {
        return Ok(());
    }
    let allowed: Vec<_> = datastores.iter().map(|path| path.display().to_string()).collect();
    Err(ApiError::new(
        ErrorCode::Forbidden,
        format!("{} is not in a datastore of this VRA ({})", vm.datastore.display(), allowed.join(", ")),
    )
    .remedy("add the folder to `datastores` in the VRA's configuration and restart it"))
}

/// Whether a former VM's files were in one of this VRA's datastores.
pub(super) fn is_in_datastore(former: &FormerVm, datastores: &[PathBuf]) -> bool {
    is_within(&former.datastore, datastores)
}

fn is_within(path: &Path, datastores: &[PathBuf]) -> bool {
    let plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    plain && datastores.iter().any(|allowed| path.starts_with(allowed))
}

fn limits(what: &str, value: u64, min: u64, max: u64) -> Result<(), ApiError> {
    if (min..=max).contains(&value) {
        return Ok(());
    }
    Err(bad(format!("{what} is {value}; it must be {min} to {max}")))
}

fn bad(message: String) -> ApiError {
    ApiError::new(ErrorCode::BadRequest, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::vpg::{VolumeDefinition, VraEndpoint};
    use crate::api::{FormerVm, JournalId, MemberSince, VmId, VolumeId, VpgId};

    fn definition(target: VraId) -> VpgDefinition {
        let volume = VolumeDefinition {
            id: VolumeId::random(),
            number: 0,
            size_bytes: 1 << 20,
            logical_block_bytes: 512,
            source_path: "/disk".into(),
            left: false,
            swap: false,
        };
        let vm = VmDefinition {
            id: VmId::random(),
            name: "db/1 ä".to_owned(),
            journal: JournalId::random(),
            member_since: MemberSince::default(),
            volumes: vec![volume],
            source: VraEndpoint { id: VraId::random(), address: "a:9710".to_owned() },
            takeover: None,
            target: VraEndpoint { id: target, address: "[::1]:9710".to_owned() },
            datastore: "/data/x".into(),
            journal_limit_bytes: *JOURNAL_LIMIT_BYTES.start(),
            journal_limit_percent: None,
            journal_warning: None,
            journal_minimum_bytes: 0,
            history_s: 3600,
            give_up_history: true,
        };
        VpgDefinition {
            id: VpgId::random(),
            name: "shop".to_owned(),
            revision: 1,
            member_set_version: 1,
            checkpoint_interval_ms: 5000,
            hold_deadline_ms: 100,
            encrypt: false,
            paused: false,
            notes: None,
            coordinators: Vec::new(),
            vms: vec![vm],
            former: Vec::new(),
        }
    }

    fn former(definition: &VpgDefinition, journal: JournalId) -> FormerVm {
        let vm = &definition.vms[0];
        let (target, datastore) = (vm.target.id, vm.datastore.clone());
        FormerVm {
            id: vm.id,
            name: vm.name.clone(),
            journal,
            target,
            datastore,
            keep_files: false,
            revision: 1,
        }
    }

    #[test]
    fn a_good_definition_passes() {
        let own = VraId::random();
        check(&definition(own), own, &["/data".into()]).expect("good");
        let again = definition(own);
        let again = VpgDefinition { former: vec![former(&again, JournalId::random())], ..again };
        check(&again, own, &["/data".into()]).expect("a VM that came back with another journal");
    }

    #[test]
    fn sources_come_in_the_order_of_coordination_and_older_definitions_have_none() {
        let own = VraId::random();
        let mut spanning = definition(own);
        for number in 2..=3_u128 {
            let mut vm = spanning.vms[0].clone();
            (vm.id, vm.journal) = (VmId::random(), JournalId::random());
            vm.volumes[0].id = VolumeId::random();
            vm.source.id = VraId(uuid::Uuid::from_u128(number));
            spanning.vms.push(vm);
        }
        spanning.vms[0].source.id = VraId(uuid::Uuid::from_u128(9));
        let order = |definition: &VpgDefinition| -> Vec<u128> {
            definition.sources().iter().map(|source| source.endpoint.id.0.as_u128()).collect()
        };
        check(&spanning, own, &["/data".into()]).expect("three sources");
        assert_eq!(order(&spanning), [2, 3, 9]);
        let older = serde_json::to_string(&spanning).expect("JSON");
        assert!(!older.contains("coordinators"), "{older}");
        assert_eq!(serde_json::from_str::<VpgDefinition>(&older).expect("older"), spanning);
        spanning.coordinators = vec![VraId(uuid::Uuid::from_u128(9)), VraId(uuid::Uuid::from_u128(3))];
        check(&spanning, own, &["/data".into()]).expect("an order");
        assert_eq!(order(&spanning), [9, 3, 2]);

        (spanning.checkpoint_interval_ms, spanning.hold_deadline_ms) = (1_000, 500);
        check(&spanning, own, &["/data".into()]).expect("half of the interval");
        spanning.hold_deadline_ms = 501;
        let error = check(&spanning, own, &["/data".into()]).expect_err("too long a hold");
        assert!(
            error.message.contains("is 501; it must be at most half of checkpoint_interval_ms, 1000"),
            "{error}"
        );
        spanning.vms.truncate(1);
        spanning.coordinators.clear();
        check(&spanning, own, &["/data".into()]).expect("on one host holds need no messages");
    }

    #[test]
    fn each_bad_value_is_named() {
        type Change = fn(&mut VpgDefinition);
        let own = VraId::random();
        let cases: [(Change, &str); 21] = [
            (|d| d.name = String::new(), "VPG name"),
            (|d| d.checkpoint_interval_ms = 10, "checkpoint_interval_ms is 10; it must be 1000 to 3600000"),
            (|d| d.vms.clear(), "the number of VMs is 0"),
            (|d| d.vms.push(d.vms[0].clone()), "twice"),
            (|d| d.vms[0].volumes[0].number = 1, "from 0 without gaps"),
            (|d| d.vms[0].volumes.iter_mut().for_each(|volume| volume.left = true), "take the VM out"),
            (|d| d.vms[0].volumes[0].size_bytes = 1000, "has 1000 bytes, which is not a multiple"),
            (|d| d.vms[0].volumes[0].logical_block_bytes = 520, "blocks of 520 bytes"),
            (|d| d.vms[0].source.address = "host".to_owned(), "\"host\""),
            (|d| d.coordinators = vec![VraId::random()], "is not a source VRA of it"),
            (|d| d.coordinators = vec![d.vms[0].source.id; 2], "is named twice"),
            (
                |d| {
                    let mut other = d.vms[0].clone();
                    (other.id, other.journal) = (VmId::random(), JournalId::random());
                    other.source.address = "b:9710".to_owned();
                    d.vms.push(other);
                },
                "has the address \"b:9710\" for VM db/1 ä and \"a:9710\" for another VM",
            ),
            (|d| d.vms[0].journal_limit_bytes = 5, "is 5 bytes; it must be 67108864 to"),
            (|d| d.vms[0].journal_limit_bytes = u64::MAX, "to 1125899906842624"),
            (
                |d| d.vms[0].journal_limit_percent = Some(0),
                "limit of VM db/1 ä is 0 percent of its disks; it must be 1 to",
            ),
            (
                |d| d.vms[0].journal_warning = Some(JournalSize::Percent(0)),
                "threshold of VM db/1 ä is 0 percent",
            ),
            (
                |d| d.vms[0].journal_warning = Some(JournalSize::Bytes(1 << 30)),
                "threshold of VM db/1 ä is 1073741824 bytes, above its journal limit, 67108864",
            ),
            (
                |d| d.vms[0].member_since = MemberSince(2),
                "since the member set 2, but that of VPG \"shop\" is 1",
            ),
            (|d| d.former = vec![former(d, d.vms[0].journal)], "is both in use and to be let go of"),
            (|d| d.former = vec![former(d, JournalId::random()); 257], "the number of former VMs is 257"),
            (|d| d.vms[0].journal_minimum_bytes = 1 << 30, "minimum of VM db/1 ä is 1073741824 bytes, above"),
        ];
        for (change, text) in cases {
            let mut bad = definition(own);
            change(&mut bad);
            let error = check(&bad, own, &["/data".into()]).expect_err(text);
            assert!(error.message.contains(text), "{error}");
        }
        for datastore in ["/other", "/data/../etc", "/database"] {
            let mut bad = definition(own);
            bad.vms[0].datastore = datastore.into();
            let error = check(&bad, own, &["/data".into()]).expect_err(datastore);
            assert_eq!(error.code, ErrorCode::Forbidden, "{datastore}");
        }
    }
}
