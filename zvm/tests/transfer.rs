//! Definitions of groups as files: exported, refused where they can't be had, and imported as they were.

mod common;

use common::pair::Pair;
use common::wait_for;
use serde_json::{Value, json};

/// What a user chose, without what is new with each group.
fn chosen(pair: &Pair) -> Value {
    let mut vpg = pair.site.json(&["vpg", "show", "shop"])["vpg"].take();
    for member in vpg["settings"]["vms"].as_array_mut().expect("VMs") {
        member["journal"].take();
    }
    json!([vpg["name"], vpg["settings"]])
}

#[test]
fn a_group_is_exported_and_comes_back_as_it_was() {
    let pair = Pair::enrolled();
    let file = pair.site.dir.join("groups.json");
    let path = file.display().to_string();
    let group = ["vpg", "create", "shop", "--target", "vra-b", "--datastore", "ds1"];
    let options = [
        "--journal-limit",
        "256MiB",
        "--journal-warning",
        "50%",
        "--history",
        "2h",
        "--description",
        "sells",
    ];
    let others =
        ["--checkpoint-interval", "2s", "--hold-deadline", "50ms", "--rpo-target", "20s", "--keep-history"];
    let recovery = pair.write_recovery();
    let new = ["--priority", "High", "--test-reminder", "30", "--exclude", "db:vdb", "--file", &recovery];
    let created = pair.site.zvm(&[&group[..], &options, &others, &new].concat());
    assert_eq!(created.code, 0, "{created:?}");
    let before = chosen(&pair);
    let exported = pair.site.zvm(&["vpg", "export", "shop"]);
    assert_eq!(exported.code, 0, "{exported:?}");
    std::fs::write(&file, &exported.stdout).expect("the file");
    let all: Value = serde_json::from_str(&pair.site.zvm(&["vpg", "export"]).stdout).expect("JSON");
    let one: Value = serde_json::from_str(&exported.stdout).expect("JSON");
    assert_eq!((&all["vpgs"], &one["version"]), (&one["vpgs"], &json!(1)));
    assert_eq!(one["vpgs"][0]["target"], "vra-b");
    assert_eq!(before[1]["vms"][0]["excluded"][0]["name"], "vdb");
    assert_eq!(before[1]["recovery"]["boot_groups"][0]["delay_s"], 120);
    let shown = pair.site.zvm(&["vpg", "show", "shop"]).stdout;
    for line in [
        "Priority             High",
        "Test reminder        after 30 days",
        "Not protected        db vdb: ",
        "Boot group           databases: db, then 2 min 0 s wait",
        "Recovered            db: host kvm-b, network dr, test network lab",
    ] {
        assert!(shown.contains(line), "{line}: {shown}");
    }
    assert_eq!(pair.site.zvm(&["vpg", "export", "nope"]).code, 3);

    // It is there.
    for options in [&["--dry-run"][..], &[]] {
        let refused = pair.site.zvm(&[&["vpg", "import", path.as_str()], options].concat());
        assert!(refused.code == 1 && refused.stderr.contains("1 of 1 groups were refused"), "{refused:?}");
        assert!(refused.stdout.contains("there is a VPG \"shop\" already"), "{refused:?}");
    }
    assert_eq!(pair.site.zvm(&["vpg", "delete", "shop"]).code, 0);

    // What can't be had is named, and doesn't keep the others from being created.
    let with = |change: &dyn Fn(&mut Value)| {
        let mut export = one.clone();
        change(&mut export);
        std::fs::write(&file, export.to_string()).expect("the file");
        pair.site.zvm(&["--json", "vpg", "import", &path, "--dry-run"])
    };
    type Change = fn(&mut Value);
    let wrong: [(&str, Change); 4] = [
        ("no VRA is enrolled as \"vra-z\"", |export| export["vpgs"][0]["target"] = json!("vra-z")),
        ("no datastore \"ds9\"", |export| export["vpgs"][0]["datastore"] = json!("ds9")),
        ("\"gone\"", |export| export["vpgs"][0]["vms"][0]["vm"] = json!("gone")),
        ("is in VPG \"shop\" already", |export| {
            let mut again = export["vpgs"][0].clone();
            again["name"] = json!("shop again");
            export["vpgs"].as_array_mut().expect("groups").push(again);
        }),
    ];
    for (message, change) in wrong {
        let refused = with(&change);
        assert!(
            refused.code == 1 && refused.stdout.contains(&message.replace('"', "\\\"")),
            "{message}: {refused:?}"
        );
    }
    let newer = with(&|export| export["version"] = json!(2));
    assert!(newer.code != 0 && newer.stderr.contains("has version 2"), "{newer:?}");
    let strange = with(&|export| export["vpgs"][0]["colour"] = json!("red"));
    assert!(
        strange.code == 2 && strange.stderr.contains("is not what `zvm vpg export` writes"),
        "{strange:?}"
    );
    let would = with(&|_| {});
    assert!(would.code == 0 && would.stdout.contains("would_be_created"), "{would:?}");
    assert_eq!(pair.site.zvm(&["vpg", "show", "shop"]).code, 3, "nothing was done");

    let imported = pair.site.zvm(&["vpg", "import", &path]);
    assert!(imported.code == 0 && imported.stdout.contains("created, task"), "{imported:?}");
    wait_for("the group everywhere", || pair.revisions() == [json!(1), json!(1)]);
    assert_eq!(chosen(&pair), before);
    pair.site.tag("shop", "protected again");
}
