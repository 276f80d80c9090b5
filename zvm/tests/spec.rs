//! From what a user writes of a group to its definition: names, limits, disks.

#[path = "common/plan.rs"]
mod plan;

use std::collections::BTreeSet;

use plan::{Site, spec};
use vra::api::vpg::{JournalSize, Priority, VmDefinition};
use vra::api::*;
use zvm::api::{DiskName, VmSpec, VpgEdit, VpgSpec, defaults};
use zvm::manager::spec::{Context, described, edited, join, without, without_disks};
use zvm::model::vpg::{Vpg, VpgSettings};

#[test]
fn a_good_specification_becomes_a_group_with_its_disks_in_order() {
    let site = Site::new();
    // The VRA lists volumes in any order, and of other VMs too.
    let served = [
        site.volume("db", 1, "/images/db-log"),
        site.volume("web", 0, "/images/web"),
        site.volume("db", 0, "/images/db"),
    ];
    let vpg = site.create(&spec(&["db", "web"]), &served).unwrap();
    assert_eq!((vpg.revision, vpg.applied_revision, vpg.settings.member_set_version), (1, 0, 1));
    let db = &vpg.settings.vms[0];
    let paths: Vec<_> = db.volumes.iter().map(|volume| volume.source_path.display().to_string()).collect();
    assert_eq!(paths, ["/images/db", "/images/db-log"]);
    assert_eq!((db.source, db.target), (site.vra("vra-a"), site.vra("vra-b")));
    assert_eq!(db.datastore.to_str(), Some("/srv/ds1"));

    let definition = vpg.definition(|vra| site.vras.get(&vra)).unwrap();
    assert_eq!(definition.vms[0].target.address, "vra-b:9710");
    assert_eq!(definition.vms[0].journal_limit_bytes, defaults::journal_limit_bytes());
    assert!(vpg.definition(|vra| site.vras.get(&vra).filter(|vra| vra.name != "vra-b")).is_none());
}

#[test]
fn settings_of_a_vm_go_before_those_of_the_group() {
    let site = Site::new();
    let mut spec = spec(&["db"]);
    spec.vms[0].datastore = Some("/elsewhere".into());
    spec.vms[0].journal_limit_bytes = Some(1 << 30);
    let vpg = site.create(&spec, &site.db_volumes()).unwrap();
    assert_eq!(vpg.settings.vms[0].datastore.to_str(), Some("/elsewhere"));
    assert_eq!(vpg.settings.vms[0].journal_size.limit_bytes, 1 << 30);
}

#[test]
fn journals_are_as_large_as_their_disks_want_it_and_can_be_edited() {
    let site = Site::new();
    let mut spec = spec(&["db", "web"]);
    spec.journal_limit_percent = Some(50);
    spec.journal_warning = Some(JournalSize::Percent(40));
    spec.vms[1].journal_limit_bytes = Some(2 << 30);
    spec.vms[1].journal_warning = Some(JournalSize::Bytes(1 << 30));
    spec.vms[1].journal_minimum_bytes = Some(256 << 20);
    let mut served = site.db_volumes();
    served.push(site.volume("web", 0, "/images/web"));
    let vpg = site.create(&spec, &served).unwrap();
    let sizes = |vpg: &Vpg| {
        let definition = vpg.definition(|vra| site.vras.get(&vra)).unwrap();
        let size =
            |vm: &VmDefinition| (vm.journal_limit(), vm.journal_warning_bytes(), vm.journal_minimum_bytes);
        definition.vms.iter().map(size).collect::<Vec<_>>()
    };
    let disks_bytes: u64 = vpg.settings.vms[0].volumes.iter().map(|volume| volume.size_bytes).sum();
    let db = (disks_bytes / 2, Some(disks_bytes * 40 / 100), 0);
    assert_eq!(
        sizes(&vpg),
        [db, (2 << 30, Some(1 << 30), 256 << 20)],
        "a VM's own limit goes before the group's"
    );

    let edit = VpgEdit {
        journal_limit: Some(JournalSize::Bytes(4 << 30)),
        no_journal_warning: true,
        vms: vec!["web".into()],
        ..VpgEdit::default()
    };
    let settings = edited(&vpg, &edit, &site.context()).unwrap();
    let vpg = Vpg { settings, ..vpg };
    assert_eq!(sizes(&vpg), [db, (4 << 30, None, 256 << 20)]);
    let too_much = VpgEdit { journal_minimum_bytes: Some(5 << 30), ..edit.clone() };
    assert!(
        edited(&vpg, &too_much, &site.context()).unwrap_err().message.contains("above its journal limit")
    );
    let unknown = VpgEdit { vms: vec!["nope".into()], ..edit };
    assert_eq!(edited(&vpg, &unknown, &site.context()).unwrap_err().code, ErrorCode::NotFound);

    // As an older manager wrote it.
    let mut older = serde_json::to_value(&vpg.settings).unwrap();
    for member in older["vms"].as_array_mut().unwrap() {
        let member = member.as_object_mut().unwrap();
        assert!(member.contains_key("journal_limit_bytes"));
        member.retain(|key, _| !key.starts_with("journal_") || key == "journal_limit_bytes");
    }
    let older: VpgSettings = serde_json::from_value(older).unwrap();
    assert_eq!(
        (older.vms[1].journal_size.limit_bytes, older.vms[1].journal_size.minimum_bytes),
        (4 << 30, 0)
    );
}

#[test]
fn an_edit_that_names_vms_changes_their_journals_and_nothing_of_the_whole_group() {
    let site = Site::new();
    let vpg = site.create(&spec(&["db"]), &site.db_volumes()).unwrap();
    let of_db = VpgEdit { vms: vec!["db".into()], ..VpgEdit::default() };
    let limit = Some(JournalSize::Bytes(2 << 30));
    edited(&vpg, &VpgEdit { journal_limit: limit, ..of_db.clone() }, &site.context()).unwrap();
    for wrong in [
        VpgEdit { history_s: Some(3_600), ..of_db.clone() },
        VpgEdit { journal_limit: limit, history_s: Some(3_600), ..of_db.clone() },
        VpgEdit { journal_limit: limit, priority: Some(Priority::High), ..of_db.clone() },
        of_db,
    ] {
        let error = edited(&vpg, &wrong, &site.context()).unwrap_err();
        assert!(error.message.contains("are the whole group's"), "{error}");
        assert!(error.remedy.unwrap().contains("without --vm"));
    }
}

#[test]
fn all_that_a_group_is_created_with_for_its_checkpoints_can_be_edited_within_the_same_limits() {
    let site = Site::new();
    let vpg = site.create(&spec(&["db"]), &site.db_volumes()).unwrap();
    let edit = VpgEdit {
        description: Some("the shop's".into()),
        checkpoint_interval_ms: Some(1_000),
        hold_deadline_ms: Some(900),
        rpo_target_s: Some(90),
        keep_history: Some(true),
        ..VpgEdit::default()
    };
    let settings = edited(&vpg, &edit, &site.context()).unwrap();
    let timing = (settings.checkpoint_interval_ms, settings.hold_deadline_ms, settings.rpo_target_s);
    assert_eq!((timing, settings.give_up_history), ((1_000, 900, 90), false));
    assert_eq!(settings.description, "the shop's");
    let kept = Vpg { settings, ..vpg.clone() };
    let back = VpgEdit { keep_history: Some(false), ..VpgEdit::default() };
    assert!(edited(&kept, &back, &site.context()).unwrap().give_up_history);

    type Change = fn(&mut VpgEdit);
    let cases: [(Change, &str); 5] = [
        (|edit| edit.checkpoint_interval_ms = Some(999), "1000 to 3600000 ms"),
        (|edit| edit.hold_deadline_ms = Some(5), "the hold deadline"),
        (|edit| edit.rpo_target_s = Some(0), "the RPO target"),
        (|edit| edit.description = Some("x".repeat(1_025)), "at most 1024 characters"),
        (|edit| edit.description = Some("two\nlines".into()), "control characters"),
    ];
    for (change, expected) in cases {
        let mut wrong = edit.clone();
        change(&mut wrong);
        let error = edited(&vpg, &wrong, &site.context()).unwrap_err();
        assert!(error.message.contains(expected), "{error}");
    }
    // Across hosts, guests must get on between two holds.
    let mut spanning = vpg;
    let mut other = spanning.settings.vms[0].clone();
    (other.vm, other.source) = (VmId::random(), VraId::random());
    spanning.settings.vms.push(other);
    let error = edited(&spanning, &edit, &site.context()).unwrap_err();
    assert!(error.message.contains("at most half of the checkpoint interval"), "{error}");
}

#[test]
fn what_is_wrong_is_named() {
    type Change = fn(&mut VpgSpec);
    let cases: [(Change, ErrorCode, &str); 19] = [
        (|spec| spec.name = "a/b".into(), ErrorCode::BadRequest, "cannot be the name"),
        (|spec| spec.name = "taken".into(), ErrorCode::Conflict, "there is a VPG \"taken\" already"),
        (|spec| spec.checkpoint_interval_ms = 500, ErrorCode::BadRequest, "1000 to 3600000 ms"),
        (|spec| spec.hold_deadline_ms = 5_000, ErrorCode::BadRequest, "the hold deadline"),
        (|spec| spec.journal_limit_bytes = 5, ErrorCode::BadRequest, "must be 64 MiB to 1024 TiB, not 5 B"),
        (|spec| spec.vms[0].journal_limit_bytes = Some(u64::MAX), ErrorCode::BadRequest, "the journal limit"),
        (|spec| spec.journal_limit_percent = Some(0), ErrorCode::BadRequest, "1 to 10000 percent, not 0"),
        (
            |spec| spec.journal_warning = Some(JournalSize::Bytes(11 << 30)),
            ErrorCode::BadRequest,
            "warning threshold of VM \"db\", 11 GiB, is above its journal limit, 10 GiB",
        ),
        (
            |spec| spec.journal_minimum_bytes = 1 << 40,
            ErrorCode::BadRequest,
            "minimum of VM \"db\", 1 TiB, is above",
        ),
        (|spec| spec.history_s = 1, ErrorCode::BadRequest, "history"),
        (|spec| spec.vms.clear(), ErrorCode::BadRequest, "1 to 256 VMs"),
        (|spec| spec.vms[0].vm = "nope".into(), ErrorCode::NotFound, "no VM \"nope\""),
        (|spec| spec.vms.push(spec.vms[0].clone()), ErrorCode::BadRequest, "named twice"),
        (|spec| spec.vms[0].vm = "guarded".into(), ErrorCode::Conflict, "in VPG \"taken\" already"),
        (|spec| spec.vms[0].vm = "bare".into(), ErrorCode::BadRequest, "has no disks"),
        (|spec| spec.target = "vra-x".into(), ErrorCode::NotFound, "no VRA is enrolled as \"vra-x\""),
        (|spec| spec.target = "vra-a".into(), ErrorCode::BadRequest, "must be elsewhere"),
        (|spec| spec.datastore = "ds9".into(), ErrorCode::NotFound, "no datastore \"ds9\""),
        (|spec| spec.datastore = "ds-a".into(), ErrorCode::BadRequest, "no host of VRA vra-b mounts"),
    ];
    let site = Site::new();
    for (change, code, words) in cases {
        let mut spec = spec(&["db"]);
        change(&mut spec);
        let error = site.create(&spec, &site.db_volumes()).expect_err(words);
        assert_eq!(error.code, code, "{error}");
        assert!(error.message.contains(words), "{error}");
    }
}

#[test]
fn vms_of_two_hosts_are_one_group_whose_sources_coordinate_in_the_order_of_their_ids() {
    let site = Site::new();
    let mut spec = spec(&["db", "far"]);
    spec.target = "vra-c".into();
    spec.datastore = "/srv".into();
    let mut served = site.db_volumes();
    let error = site.create(&spec, &served).unwrap_err();
    assert!(error.message.contains("of VM \"far\" is not served by VRA vra-b"), "{error}");
    served.push(site.volume("far", 0, "/images/far"));
    let vpg = site.create(&spec, &served).unwrap();
    let definition = vpg.definition(|vra| site.vras.get(&vra)).unwrap();
    let mut expected = [site.vra("vra-a"), site.vra("vra-b")];
    expected.sort_unstable();
    assert_eq!(definition.coordinators, expected);
    (spec.checkpoint_interval_ms, spec.hold_deadline_ms) = (1_500, 751);
    let error = site.create(&spec, &served).unwrap_err();
    assert!(error.message.contains("is 751 ms; it must be at most half"), "{error}");
    assert!(error.remedy.unwrap().contains("a shorter hold deadline"));
    let alone = site.create(&plan::spec(&["db"]), &site.db_volumes()).unwrap();
    assert!(alone.definition(|vra| site.vras.get(&vra)).unwrap().coordinators.is_empty());
}

#[test]
fn disks_must_be_served_as_the_inventory_has_them() {
    let site = Site::new();
    let mut served = site.db_volumes();
    served.remove(1);
    let error = site.create(&spec(&["db"]), &served).unwrap_err();
    assert_eq!(error.code, ErrorCode::NotReady);
    assert!(
        error.message.contains("disk vdb (/images/db-log) of VM \"db\" is not served by VRA vra-a"),
        "{error}"
    );
    let remedy = error.remedy.unwrap();
    assert!(
        remedy.contains("vra attach /images/db-log --vm-name") && remedy.contains(&site.vm("db").to_string()),
        "{remedy}"
    );

    let mut served = site.db_volumes();
    served[0].size_bytes = 1 << 20;
    let error = site.create(&spec(&["db"]), &served).unwrap_err();
    assert!(error.message.contains("the inventory says 1073741824"), "{error}");

    // A third disk is attached that the inventory doesn't have, before the second.
    let mut served = site.db_volumes();
    served[1].number = 2;
    let error = site.create(&spec(&["db"]), &served).unwrap_err();
    assert_eq!(error.code, ErrorCode::Conflict, "{error}");
}

#[test]
fn disks_leave_and_those_that_no_journal_has_are_gone() {
    let site = Site::new();
    let vpg = site.create(&spec(&["db"]), &site.db_volumes()).unwrap();
    let disk = |disk: &str| vec![DiskName { vm: "db".into(), disk: disk.into() }];
    let volumes = |settings: &VpgSettings| -> Vec<(u16, bool)> {
        settings.vms[0].volumes.iter().map(|volume| (volume.number, volume.left)).collect()
    };
    let [first, second] = [0, 1].map(|at| vpg.settings.vms[0].volumes[at].id);
    let none = BTreeSet::new();
    let left = without_disks(&vpg, &disk("vdb"), &site.inventory, &none).unwrap();
    assert_eq!(volumes(&left), [(0, false), (1, true)]);
    let in_no_journal = BTreeSet::from([first, second]);
    let gone = without_disks(&vpg, &disk("vdb"), &site.inventory, &in_no_journal).unwrap();
    assert_eq!(volumes(&gone), [(0, false)]);
    assert_eq!(gone.vms[0].excluded.len(), 1);
    // One whose number others follow keeps it.
    let kept = without_disks(&vpg, &disk("vda"), &site.inventory, &in_no_journal).unwrap();
    assert_eq!(volumes(&kept), [(0, true), (1, false)]);
    // The one after it takes it along.
    let vpg = Vpg { settings: kept, ..vpg };
    let last = without_disks(&vpg, &disk("vdb"), &site.inventory, &in_no_journal);
    assert!(last.unwrap_err().message.contains("is the only protected disk"));
}

#[test]
fn numbers_with_a_gap_are_refused_with_the_way_to_close_it() {
    let site = Site::new();
    let group = site.create(&spec(&["db"]), &site.db_volumes()).unwrap();
    let exported = described(&group, |_| "vra-b".into());
    assert_eq!(site.create(&exported, &site.db_volumes()).unwrap().settings.vms.len(), 1);
    let served = [site.volume("db", 0, "/images/db"), site.volume("db", 2, "/images/db-log")];
    let error = site.create(&exported, &served).unwrap_err();
    assert_eq!(error.code, ErrorCode::Conflict);
    assert!(error.message.contains("\"db\" under the numbers 0, 2; a new journal"), "{error}");
    let remedy = error.remedy.unwrap();
    assert!(remedy.contains("`vra attach` again /images/db-log with `--number 1`"), "{remedy}");
    // Served by others than the inventory has is another matter.
    let mut more = site.db_volumes();
    more[1].number = 2;
    more.push(site.volume("db", 1, "/images/old"));
    let error = site.create(&exported, &more).unwrap_err();
    assert!(error.message.contains("serves other disks"), "{error}");
}

#[test]
fn vms_join_a_group_as_its_first_vm_is_and_leave_it() {
    let site = Site::new();
    let mut group = spec(&["db"]);
    (group.journal_limit_percent, group.journal_minimum_bytes) = (Some(50), 1 << 20);
    let vpg = site.create(&group, &site.db_volumes()).unwrap();
    assert_eq!(vpg.settings.vms[0].member_since, MemberSince(1));
    let context = Context { inventory: &site.inventory, vras: &site.vras, vpgs: std::slice::from_ref(&vpg) };
    let served = [(site.vra("vra-a"), vec![site.volume("web", 0, "/images/web")])].into();
    let web = VmSpec { vm: "web".into(), ..VmSpec::default() };
    let joined = |web: &VmSpec| join(&vpg, std::slice::from_ref(web), &context)?.into_settings(&served);
    let settings = joined(&web).unwrap();
    assert_eq!((settings.member_set_version, settings.vms.len()), (2, 2));
    let (first, second) = (&settings.vms[0], &settings.vms[1]);
    assert_eq!((first.member_since, second.member_since), (MemberSince(1), MemberSince(2)));
    assert_eq!((second.target, &second.datastore), (first.target, &first.datastore));
    assert_eq!(second.journal_size, first.journal_size);
    let own = VmSpec {
        target: Some("vra-c".into()),
        datastore: Some("/else".into()),
        journal_limit_bytes: Some(1 << 30),
        journal_minimum_bytes: Some(0),
        ..web.clone()
    };
    let settings = joined(&own).unwrap();
    let second = &settings.vms[1];
    assert_eq!((second.target, second.datastore.to_str()), (site.vra("vra-c"), Some("/else")));
    assert_eq!((second.journal_size.limit_bytes, second.journal_size.limit_percent), (1 << 30, None));
    let both = Vpg { settings, revision: 2, ..vpg.clone() };

    let names = |vra| site.vras[&vra].name.clone();
    let again = described(&both, names);
    assert_eq!((again.target.as_str(), again.journal_limit_percent), ("vra-b", Some(50)));
    let told = VmSpec { vm: site.vm("web").to_string(), ..own };
    assert_eq!(again.vms[1], told);
    assert_eq!(again.vms[0], VmSpec { vm: site.vm("db").to_string(), ..VmSpec::default() });

    let left = without(&both, &["web".into()], true).unwrap();
    assert_eq!((left.member_set_version, left.vms.len()), (3, 1));
    let former = &left.former[0];
    assert_eq!((former.journal, former.target), (both.settings.vms[1].journal, site.vra("vra-c")));
    assert_eq!((former.revision, former.keep_files), (3, true));

    let error = |vms: &[&str]| without(&both, &vms.iter().map(|vm| (*vm).into()).collect::<Vec<_>>(), false);
    assert_eq!(error(&["nope"]).unwrap_err().code, ErrorCode::NotFound);
    let last = error(&["db", "web"]).unwrap_err();
    assert!(last.message.contains("at least one VM") && last.remedy.unwrap().contains("zvm vpg delete"));
    assert!(error(&[]).is_err());
    let again = join(&both, &[web], &Context { vpgs: std::slice::from_ref(&both), ..context }).unwrap_err();
    assert!(again.message.contains("is in VPG") && again.remedy.unwrap().contains("remove-vm"));
    assert!(join(&vpg, &[], &context).is_err());
    let twice = ["web", "web"].map(|vm| VmSpec { vm: vm.into(), ..VmSpec::default() });
    assert!(join(&vpg, &twice, &context).unwrap_err().message.contains("named twice"));
}
