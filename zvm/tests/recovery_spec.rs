//! How a group's VMs are to be recovered and which of their disks are protected: checked, kept and brought back.

#[path = "common/plan.rs"]
mod plan;

use std::collections::BTreeMap;
use std::net::IpAddr;

use plan::{Site, mac, spec};
use vra::api::vpg::{Priority, VpgDefinition};
use vra::api::*;
use zvm::api::{DiskName, RecoveryEdit, VmSpec, VpgEdit, VpgSpec};
use zvm::manager::spec::{described, edited, join};
use zvm::model::kept::KeptSettings;
use zvm::model::recovery::*;
use zvm::model::vpg::{Vpg, VpgSettings};

fn some(text: &str) -> Option<String> {
    Some(text.to_owned())
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn fixed(address: &str, prefix: u8, gateway: Option<&str>) -> Option<IpChoice> {
    let ip = StaticIp { address: ip(address), prefix, gateway: gateway.map(ip), dns: vec![ip("10.0.0.2")] };
    Some(IpChoice::Static(ip))
}

/// A group that says all that can be said.
fn whole() -> VpgSpec {
    let mut spec = spec(&["db", "web"]);
    spec.priority = Priority::High;
    spec.test_reminder_days = Some(90);
    spec.recovery = GroupRecovery {
        place: RecoveryPlace {
            host: some("kvm-b"),
            network: some("dr"),
            test_network: some("lab"),
            folder: some("dr/shop"),
        },
        boot_groups: vec![
            BootGroup { name: "databases".into(), delay_s: 120 },
            BootGroup { name: "front".into(), delay_s: 0 },
        ],
        pre_script: Some(Script {
            command: "/usr/local/bin/fence".into(),
            arguments: vec!["--site".into(), "s".into()],
            timeout_s: 60,
        }),
        post_script: None,
    };
    spec.vms[0].exclude = vec!["vdb".into()];
    spec.vms[0].recovery = VmRecovery {
        place: RecoveryPlace { network: some("prod"), ..RecoveryPlace::default() },
        boot_group: some("databases"),
        nics: vec![NicRecovery {
            mac: mac("db", 1),
            failover: NicPlace {
                ip: fixed("10.0.0.5", 24, Some("10.0.0.1")),
                mac: MacChoice::Given("52:54:00:aa:bb:cc".into()),
                network: None,
            },
            test: NicPlace { network: some("dr"), mac: MacChoice::New, ip: Some(IpChoice::Dhcp) },
        }],
    };
    spec.vms[1].recovery.boot_group = some("front");
    spec
}

fn served(site: &Site) -> Vec<VolumeInfo> {
    vec![site.volume("db", 0, "/images/db"), site.volume("web", 0, "/images/web")]
}

fn definition(site: &Site, vpg: &Vpg) -> VpgDefinition {
    vpg.definition(|vra| site.vras.get(&vra)).unwrap()
}

#[test]
fn all_of_it_is_kept_described_again_and_goes_into_the_definition() {
    let site = Site::new();
    let spec = whole();
    let vpg = site.create(&spec, &served(&site)).unwrap();
    let db = &vpg.settings.vms[0];
    assert_eq!(db.volumes.len(), 1, "the excluded disk isn't protected");
    assert_eq!(db.excluded[0].path.to_str(), Some("/images/db-log"));
    let again = described(&vpg, |vra| site.vras[&vra].name.clone());
    assert_eq!(
        (again.test_reminder_days, again.priority, &again.recovery),
        (Some(90), Priority::High, &spec.recovery)
    );
    for (vm, told) in spec.vms.iter().zip(&again.vms) {
        assert_eq!((&told.recovery, &told.exclude), (&vm.recovery, &vm.exclude));
    }
    let text = serde_json::to_string(&again).unwrap();
    assert_eq!(serde_json::from_str::<VpgSpec>(&text).unwrap(), again);
    let strange = text.replacen("\"boot_group\":", "\"boot_grope\":", 1);
    assert!(serde_json::from_str::<VpgSpec>(&strange).unwrap_err().to_string().contains("boot_grope"));

    // As VRAs and manifests keep it.
    let definition = definition(&site, &vpg);
    assert_eq!(definition.priority(), Priority::High);
    let text = serde_json::to_string(&definition).unwrap();
    let kept: VpgDefinition = serde_json::from_str(&text).unwrap();
    let kept = KeptSettings::from_json(&kept.notes.unwrap().settings).unwrap();
    assert_eq!(kept, KeptSettings::of(&vpg.settings));
    assert_eq!(kept.vms[&site.vm("db")].excluded, db.excluded);
}

#[test]
fn what_older_managers_wrote_has_none_of_it() {
    let site = Site::new();
    let vpg = site.create(&spec(&["web"]), &served(&site)).unwrap();
    let plain = definition(&site, &vpg);
    let mut older = serde_json::to_value(&plain).unwrap();
    assert!(older["notes"].get("settings").is_none(), "where nothing is said it looks as it did");
    older.as_object_mut().unwrap().remove("notes");
    let older: VpgDefinition = serde_json::from_value(older).unwrap();
    assert_eq!(older.priority(), Priority::Medium);

    let mut older = serde_json::to_value(&vpg.settings).unwrap();
    older.as_object_mut().unwrap().retain(|key, _| key != "recovery" && key != "test_reminder_days");
    older["vms"][0].as_object_mut().unwrap().retain(|key, _| key != "recovery" && key != "excluded");
    assert_eq!(serde_json::from_value::<VpgSettings>(older).unwrap(), vpg.settings);
}

#[test]
fn what_is_wrong_is_named_with_a_way_out() {
    type Change = fn(&mut VpgSpec);
    fn nic(spec: &mut VpgSpec) -> &mut NicRecovery {
        &mut spec.vms[0].recovery.nics[0]
    }
    let cases: [(Change, ErrorCode, &str, &str); 28] = [
        (|spec| spec.test_reminder_days = Some(0), ErrorCode::BadRequest, "1 to 3650 days, not 0", ""),
        (
            |spec| spec.recovery.place.host = some("kvm-z"),
            ErrorCode::NotFound,
            "VM \"db\" is to be recovered on host \"kvm-z\", which isn't in the inventory",
            "zvm inventory",
        ),
        (
            |spec| spec.vms[1].recovery.place.host = some("kvm-c"),
            ErrorCode::BadRequest,
            "host \"kvm-c\", which doesn't mount its datastore, \"ds1\"",
            "kvm-b",
        ),
        (
            |spec| spec.recovery.place.test_network = some("lost"),
            ErrorCode::NotFound,
            "the test network of VM \"db\", \"lost\", isn't in the inventory",
            "zvm inventory",
        ),
        (
            |spec| nic(spec).test.network = some("overseas"),
            ErrorCode::BadRequest,
            "\"overseas\", is at site \"other\", but the VM is recovered at site \"s\"",
            "networks of each site",
        ),
        (
            |spec| (spec.recovery.place.host, nic(spec).test.network) = (None, some("overseas")),
            ErrorCode::BadRequest,
            "recovered at site \"s\"",
            "",
        ),
        (
            |spec| spec.recovery.place.folder = some("../x"),
            ErrorCode::BadRequest,
            "\"../x\", is not",
            "dr/shop",
        ),
        (
            |spec| spec.vms[1].recovery.boot_group = some("last"),
            ErrorCode::BadRequest,
            "VM \"web\" is to be started with boot group \"last\"",
            "databases, front",
        ),
        (
            |spec| spec.recovery.boot_groups[1].name = "databases".into(),
            ErrorCode::BadRequest,
            "boot group \"databases\" is there twice",
            "a name of its own",
        ),
        (|spec| spec.recovery.boot_groups[0].name = "a/b".into(), ErrorCode::BadRequest, "a boot group", ""),
        (
            |spec| spec.recovery.boot_groups[0].delay_s = 86_401,
            ErrorCode::BadRequest,
            "\"databases\" must be 0",
            "",
        ),
        (
            |spec| spec.recovery.boot_groups = vec![spec.recovery.boot_groups[0].clone(); 33],
            ErrorCode::BadRequest,
            "33 boot groups; 32",
            "",
        ),
        (
            |spec| {
                spec.recovery.post_script =
                    Some(Script { command: "dns".into(), arguments: vec![], timeout_s: 1 });
            },
            ErrorCode::BadRequest,
            "the post-recovery script, \"dns\", is not an absolute path",
            "at the manager",
        ),
        (
            |spec| spec.recovery.pre_script.as_mut().unwrap().timeout_s = 0,
            ErrorCode::BadRequest,
            "timeout of the pre-recovery script must be 1",
            "",
        ),
        (
            |spec| spec.recovery.pre_script.as_mut().unwrap().arguments.push("a\nb".into()),
            ErrorCode::BadRequest,
            "control characters",
            "",
        ),
        (
            |spec| spec.recovery.pre_script.as_mut().unwrap().arguments = vec![String::new(); 65],
            ErrorCode::BadRequest,
            "65 arguments",
            "",
        ),
        (
            |spec| nic(spec).mac = "52:54:00:00:00:99".into(),
            ErrorCode::NotFound,
            "VM \"db\" has no network card \"52:54:00:00:00:99\"",
            "52:54:00:00:64:01, 52:54:00:00:64:02",
        ),
        (
            |spec| spec.vms[0].recovery.nics = vec![nic(spec).clone(), nic(spec).clone()],
            ErrorCode::BadRequest,
            "of VM \"db\" is there twice",
            "",
        ),
        (
            |spec| nic(spec).test.ip = fixed("0.0.0.0", 8, None),
            ErrorCode::BadRequest,
            "in a test, 0.0.0.0",
            "",
        ),
        (
            |spec| nic(spec).test.ip = fixed("10.0.0.9", 33, None),
            ErrorCode::BadRequest,
            "1 to 32 bits, not 33",
            "",
        ),
        (
            |spec| nic(spec).failover.ip = fixed("10.0.0.5", 24, Some("10.0.1.1")),
            ErrorCode::BadRequest,
            "in a failover, 10.0.1.1, is not beside 10.0.0.5/24",
            "another one than the address",
        ),
        (
            |spec| nic(spec).failover.ip = fixed("10.0.0.5", 24, Some("fe80::1")),
            ErrorCode::BadRequest,
            "fe80::1, is not beside",
            "",
        ),
        (
            |spec| {
                let Some(IpChoice::Static(ip)) = &mut nic(spec).failover.ip else { panic!() };
                ip.dns = vec![ip.address; 4];
            },
            ErrorCode::BadRequest,
            "4 name servers",
            "",
        ),
        (
            |spec| {
                let same = nic(spec).failover.clone();
                spec.vms[1].recovery.nics =
                    vec![NicRecovery { mac: mac("web", 1), failover: same, test: NicPlace::default() }];
            },
            ErrorCode::BadRequest,
            "52:54:00:aa:bb:cc is given to two network cards in a failover, one of them of VM \"web\"",
            "an address of its own",
        ),
        (
            |spec| {
                let same =
                    NicPlace { network: some("prod"), mac: MacChoice::Keep, ..nic(spec).failover.clone() };
                spec.vms[1].recovery.nics =
                    vec![NicRecovery { mac: mac("web", 1), failover: same, test: NicPlace::default() }];
            },
            ErrorCode::BadRequest,
            "10.0.0.5 is given to two",
            "",
        ),
        (
            |spec| spec.recovery.pre_script.as_mut().unwrap().arguments = vec!["x".repeat(1_000); 60],
            ErrorCode::BadRequest,
            "of VPG \"shop\" take",
            "several groups",
        ),
        (|spec| spec.vms[0].exclude[0] = "vdz".into(), ErrorCode::NotFound, "no disk \"vdz\"", "vda, vdb"),
        (
            |spec| spec.vms[0].exclude.push("vda".into()),
            ErrorCode::BadRequest,
            "all disks of VM \"db\" are excluded",
            "at least one",
        ),
    ];
    let site = Site::new();
    for (change, code, words, remedy) in cases {
        let mut spec = whole();
        change(&mut spec);
        let error = site.create(&spec, &served(&site)).expect_err(words);
        assert_eq!(error.code, code, "{error}");
        assert!(error.message.contains(words), "{words}: {error}");
        assert!(error.remedy.unwrap_or_default().contains(remedy), "{remedy}");
    }
}

#[test]
fn an_excluded_disk_may_be_served_after_the_others_and_not_before_them() {
    let site = Site::new();
    let mut group = spec(&["db"]);
    group.vms[0].exclude = vec!["vdb".into()];
    site.create(&group, &site.db_volumes()).expect("it has the last number");
    group.vms[0].exclude = vec!["vda".into()];
    let error = site.create(&group, &site.db_volumes()).unwrap_err();
    assert!(
        error.message.contains("disk vda of VM \"db\" is excluded, and VRA vra-a serves it before"),
        "{error}"
    );
    assert!(error.remedy.unwrap().contains("vra detach /images/db`"));
}

#[test]
fn it_is_edited_as_a_whole_and_vms_join_with_theirs() {
    let site = Site::new();
    let vpg = site.create(&whole(), &served(&site)).unwrap();
    let web = VmRecovery { boot_group: some("all"), ..VmRecovery::default() };
    let group = GroupRecovery {
        boot_groups: vec![BootGroup { name: "all".into(), delay_s: 0 }],
        ..GroupRecovery::default()
    };
    let edit = VpgEdit {
        priority: Some(Priority::Low),
        no_test_reminder: true,
        recovery: Some(RecoveryEdit { group: group.clone(), vms: vec![("web".into(), web.clone())] }),
        ..VpgEdit::default()
    };
    let settings = edited(&vpg, &edit, &site.context()).unwrap();
    assert_eq!((settings.priority, settings.test_reminder_days), (Priority::Low, None));
    assert_eq!((&settings.recovery, &settings.vms[1].recovery), (&group, &web));
    assert_eq!(settings.vms[0].recovery, VmRecovery::default(), "nothing was said of it");
    assert_eq!(
        edited(&vpg, &VpgEdit::default(), &site.context()).unwrap(),
        vpg.settings,
        "what isn't said stays"
    );
    let wrong = |change: fn(&mut VpgEdit)| {
        let mut edit = edit.clone();
        change(&mut edit);
        edited(&vpg, &edit, &site.context()).unwrap_err()
    };
    let error = wrong(|edit| edit.recovery.as_mut().unwrap().group.boot_groups.clear());
    assert!(error.message.contains("boot group \"all\"") && error.remedy.unwrap().contains("no boot groups"));
    let error = wrong(|edit| edit.recovery.as_mut().unwrap().vms[0].0 = "nope".into());
    assert_eq!(error.code, ErrorCode::NotFound);
    assert_eq!(wrong(|edit| edit.test_reminder_days = Some(4_000)).code, ErrorCode::BadRequest);

    let exclude = |disk: &str| VpgEdit {
        exclude: vec![DiskName { vm: "db".into(), disk: disk.into() }],
        ..VpgEdit::default()
    };
    let error = edited(&vpg, &exclude("vda"), &site.context()).unwrap_err();
    assert_eq!(error.code, ErrorCode::Unsupported);
    assert!(error.remedy.unwrap().contains("remove-disks"));
    assert_eq!(edited(&vpg, &exclude("vdb"), &site.context()).unwrap(), vpg.settings, "it is already");
    let mut grown = Site::new();
    grown.inventory = site.inventory.clone();
    let vm = grown.inventory.vms.iter_mut().find(|vm| vm.name == "db").unwrap();
    vm.disks.push(zvm::inventory::Disk {
        name: "vdc".into(),
        path: "/images/swap".into(),
        size_bytes: None,
        kind: zvm::inventory::DiskKind::Raw,
        served: None,
        written_bytes: None,
    });
    let settings = edited(&vpg, &exclude("vdc"), &grown.context()).unwrap();
    let excluded: Vec<_> = settings.vms[0].excluded.iter().map(|disk| disk.name.as_str()).collect();
    assert_eq!(excluded, ["vdb", "vdc"]);

    let alone = site.create(&VpgSpec { vms: whole().vms[..1].to_vec(), ..whole() }, &served(&site)).unwrap();
    let served: BTreeMap<_, _> = [(site.vra("vra-a"), served(&site))].into();
    let web = VmSpec { vm: "web".into(), recovery: whole().vms[1].recovery.clone(), ..VmSpec::default() };
    let joined =
        join(&alone, std::slice::from_ref(&web), &site.context()).unwrap().into_settings(&served).unwrap();
    assert_eq!(joined.vms[1].recovery, web.recovery);
    let mut lost = web;
    lost.recovery.boot_group = some("lost");
    assert!(join(&alone, &[lost], &site.context()).unwrap_err().message.contains("\"lost\""));
}
