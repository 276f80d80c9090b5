//! The vCenter provider at govmomi's simulator, compared with what pyvmomi reads there.

#[path = "common/vcsim.rs"]
mod vcsim;

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vcsim::{Peer, VCenterSim, by_id, difference};
use zeroize::Zeroizing;
use zvm::inventory::vcenter::{Fingerprint, Trust, VCenter};
use zvm::inventory::{HostState, Inventory, InventoryError, Provider, Reading};

/// A change is told within this time, while the vCenter may hold its answer back for half a minute.
const TOLD_WITHIN: Duration = Duration::from_secs(5);

async fn read(provider: &mut VCenter, reading: Reading) -> Inventory {
    provider.read(reading).await.expect("a good reading").expect("another inventory than last time")
}

fn assert_same(own: &Inventory, peer: &mut Peer) {
    assert_eq!(difference(&by_id(own), &peer.read()), None);
}

/// Reads, which must give nothing but what was there `before`.
async fn assert_unchanged(provider: &mut VCenter, reading: Reading, before: &Inventory, why: &str) {
    if let Some(now) = provider.read(reading).await.expect("a good reading") {
        assert_eq!(difference(&by_id(&now), &by_id(before)), None, "{why}");
    }
}

/// Waits for news until the provider's inventory is what the peer reads.
async fn follow(provider: &mut VCenter, peer: &mut Peer, what: &str) -> Inventory {
    let expected = peer.read();
    let begun = Instant::now();
    let mut last = None;
    loop {
        let left = TOLD_WITHIN.saturating_sub(begun.elapsed());
        let told = tokio::time::timeout(left, provider.changed()).await;
        told.unwrap_or_else(|_| panic!("{what}: {}", last.as_deref().unwrap_or("not told")));
        if let Some(own) = provider.read(Reading::News).await.expect("a good reading") {
            last = difference(&by_id(&own), &expected);
            if last.is_none() {
                eprintln!("{what}: told after {:?}", begun.elapsed());
                return own;
            }
        }
    }
}

fn vm_named<'a>(inventory: &'a Inventory, name: &str) -> &'a zvm::inventory::Vm {
    inventory.find_vm(name).unwrap_or_else(|error| panic!("{error}"))
}

fn id_of(inventory: &Inventory, name: &str) -> String {
    vm_named(inventory, name).origin.id.clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_inventory_is_what_pyvmomi_reads_after_each_change() {
    let sim = VCenterSim::start(&[
        "-datacenters",
        "2",
        "-cluster-hosts",
        "3",
        "-hosts",
        "1",
        "-vms",
        "2",
        "-folders",
        "1",
    ]);
    let (mut provider, mut peer) = (sim.provider(), sim.peer());
    let first = read(&mut provider, Reading::News).await;
    assert_same(&first, &mut peer);
    assert!(first.networks.iter().any(|network| network.name == "DC1/VM Network"), "{:?}", first.networks);
    assert_eq!((first.vms.len(), first.hosts.len(), first.clusters.len()), (8, 8, 2));
    assert_unchanged(&mut provider, Reading::Whole, &first, "nothing has changed").await;

    let vm = id_of(&first, "DC0_C0_RP0_VM0");
    let host = vm_named(&first, "DC0_C0_RP0_VM0").host.clone();
    let cluster = first.host(&host).and_then(|host| host.cluster.clone());
    let elsewhere = first.hosts.iter().find(|other| other.cluster == cluster && other.name != host);
    let elsewhere = elsewhere.expect("another host of the cluster");
    let steps: [(&str, Value); 13] = [
        ("rename", json!({ "id": vm, "to": "a/b%c\\d <&>" })),
        ("power", json!({ "id": vm, "to": "paused" })),
        ("power", json!({ "id": vm, "to": "on" })),
        ("power", json!({ "id": vm, "to": "off" })),
        ("add_disk", json!({ "id": vm, "unit": 3, "size_kb": 4096 })),
        ("resize_disk", json!({ "id": vm, "disk": "scsi0:3", "size_kb": 8192 })),
        ("add_disk", json!({ "id": vm, "unit": 4, "size_kb": 1024, "sharing": "sharingMultiWriter" })),
        ("remove_disk", json!({ "id": vm, "disk": "scsi0:3" })),
        ("plug", json!({ "id": vm, "network": "VM Network" })),
        ("relocate", json!({ "id": vm, "host": elsewhere.origin.id })),
        ("create", json!({ "id": vm, "name": "fresh", "datastore": "[LocalDS_0]" })),
        ("power", json!({ "id": id_of(&first, "DC0_C0_RP0_VM1"), "to": "off" })),
        ("destroy", json!({ "id": id_of(&first, "DC0_C0_RP0_VM1") })),
    ];
    let mut now = first.clone();
    for (what, command) in steps {
        peer.ask(what, command);
        now = follow(&mut provider, &mut peer, what).await;
    }
    assert!(now.vms.iter().any(|vm| vm.name == "fresh"));
    assert!(!now.vms.iter().any(|other| other.name == "DC0_C0_RP0_VM1"));

    let host = first.hosts[0].origin.id.clone();
    let state = |inventory: &Inventory| inventory.hosts[0].state;
    for (name, expected) in [("notResponding", HostState::NotResponding), ("connected", HostState::Connected)]
    {
        peer.hook(&format!("/test/host?id={host}&state={name}"));
        now = follow(&mut provider, &mut peer, name).await;
        assert_eq!(state(&now), expected);
    }
    let uplinks = first.networks.iter().find(|network| network.name.contains("DVUplinks")).expect("uplinks");
    peer.hook(&format!("/test/tag?id={}&key=SYSTEM/DVS.UPLINKPG", uplinks.origin.id));
    now = follow(&mut provider, &mut peer, "uplinks").await;
    assert_eq!(now.networks.len(), first.networks.len() - 1);
    assert_unchanged(&mut provider, Reading::Whole, &now, "the news were complete").await;

    // The simulator tells of neither: only a reading of everything finds them.
    peer.ask("mark_template", json!({ "id": vm }));
    peer.ask("maintenance", json!({ "id": host }));
    assert_unchanged(&mut provider, Reading::News, &now, "there are no news").await;
    let last = read(&mut provider, Reading::Whole).await;
    assert_same(&last, &mut peer);
    assert_eq!((last.vms.len(), state(&last)), (now.vms.len() - 1, HostState::Maintenance));
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_with_a_wait_that_is_given_up() {
    let sim = VCenterSim::start(&[]);
    let (mut provider, mut peer) = (sim.provider(), sim.peer());
    let first = read(&mut provider, Reading::News).await;
    let vm = id_of(&first, "DC0_H0_VM0");
    for round in 0..20_u64 {
        peer.ask("rename", json!({ "id": vm, "to": format!("name {round}") }));
        let _ = tokio::time::timeout(Duration::from_millis(round * 17), provider.changed()).await;
    }
    let now = match provider.read(Reading::News).await.expect("a good reading") {
        Some(now) if now.find_vm("name 19").is_ok() => now,
        _ => follow(&mut provider, &mut peer, "the last name").await,
    };
    assert_eq!(vm_named(&now, "name 19").origin.id, vm);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_session_is_made_again_with_one_login() {
    let sim = VCenterSim::start(&[]);
    let (mut provider, mut peer) = (sim.provider(), sim.peer());
    let first = read(&mut provider, Reading::News).await;
    let vm = id_of(&first, "DC0_H0_VM0");
    let logins = peer.calls("Login");

    peer.hook("/test/status?code=503");
    assert_unchanged(&mut provider, Reading::Whole, &first, "503 once").await;
    assert_eq!(peer.calls("Login"), logins + 1);

    peer.hook("/test/forget");
    peer.ask("login", json!({}));
    let logins = peer.calls("Login");
    assert_unchanged(&mut provider, Reading::Whole, &first, "its session is forgotten").await;
    assert_eq!(peer.calls("Login"), logins + 1);

    // Told of by the wait that runs.
    let told = async {
        let _ = tokio::time::timeout(Duration::from_millis(300), provider.changed()).await;
        peer.hook("/test/cut");
        tokio::time::timeout(TOLD_WITHIN, provider.changed()).await
    };
    told.await.expect("a lost connection is told of");
    peer.ask("login", json!({}));
    peer.ask("rename", json!({ "id": vm, "to": "meanwhile" }));
    let logins = peer.calls("Login");
    let now = read(&mut provider, Reading::News).await;
    assert_same(&now, &mut peer);
    assert_eq!(vm_named(&now, "meanwhile").origin.id, vm);
    assert_eq!(peer.calls("Login"), logins + 1);

    let logouts = peer.calls("Logout");
    drop(provider);
    let deadline = Instant::now() + TOLD_WITHIN;
    while peer.calls("Logout") == logouts {
        assert!(Instant::now() < deadline, "no logout");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vcenter_that_is_not_ready_is_read_later() {
    let sim = VCenterSim::start(&[]);
    let (mut provider, mut peer) = (sim.provider(), sim.peer());
    peer.hook("/test/status?code=503");
    let error = provider.read(Reading::News).await.expect_err("503");
    assert!(
        matches!(&error, InventoryError::Read { source, .. } if source.to_string().contains("503")),
        "{error:?}"
    );
    assert_same(&read(&mut provider, Reading::News).await, &mut peer);

    let mut settings = sim.settings();
    drop((peer, sim));
    settings.timing.call = Duration::from_secs(2);
    let error = VCenter::new(settings).expect("good settings").read(Reading::Whole).await;
    assert!(matches!(error, Err(InventoryError::Read { .. })), "{error:?}");
    let error = provider.read(Reading::News).await;
    assert!(matches!(error, Err(InventoryError::Read { .. })), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_is_not_pinned_is_shown_and_refused() {
    let sim = VCenterSim::start(&[]);
    let mut peer = sim.peer();
    let logins = peer.calls("Login");
    let mut shown = None;
    for trust in [Trust::Nothing, Trust::Pin(Fingerprint([7; 32]))] {
        let mut settings = sim.settings();
        settings.trust = trust;
        let error =
            VCenter::new(settings).expect("good settings").read(Reading::Whole).await.expect_err("refused");
        let InventoryError::Refused { reason, .. } = &error else { panic!("{error:?}") };
        shown = reason.rsplit(' ').next().and_then(|text| text.parse().ok());
        assert_eq!(shown, Some(sim.certificate), "{reason}");
    }
    assert_eq!(peer.calls("Login"), logins, "the password was not told");
    let mut settings = sim.settings();
    settings.trust = Trust::Pin(shown.expect("a fingerprint"));
    read(&mut VCenter::new(settings).expect("good settings"), Reading::Whole).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_password_is_refused_and_not_tried_again_at_once() {
    let sim = VCenterSim::start(&[]);
    let mut peer = sim.peer();
    let mut settings = sim.settings();
    settings.password = Zeroizing::new("wrong".into());
    settings.timing.login_pause = Duration::from_secs(2);
    let mut provider = VCenter::new(settings).expect("good settings");
    let logins = peer.calls("Login");
    let begun = Instant::now();
    for _ in 0..5 {
        let error = provider.read(Reading::Whole).await.expect_err("refused");
        let InventoryError::Refused { reason, .. } = &error else { panic!("{error:?}") };
        assert!(reason.contains("Login failure") && !format!("{error:?}").contains("wrong"), "{error:?}");
    }
    assert!(begun.elapsed() < Duration::from_secs(2), "a slow machine: the pause was over");
    assert_eq!(peer.calls("Login"), logins + 1);
    tokio::time::sleep(Duration::from_secs(2)).await;
    provider.read(Reading::Whole).await.expect_err("refused");
    assert_eq!(peer.calls("Login"), logins + 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_vms_are_read_soon() {
    let is_long = std::env::var_os("HOLDFAST_LONG").is_some();
    let (hosts, vms) = if is_long { ("20", "1000") } else { ("4", "100") };
    let sim = VCenterSim::start(&["-cluster-hosts", hosts, "-hosts", "0", "-vms", vms]);
    let mut provider = sim.provider();
    let begun = Instant::now();
    let first = read(&mut provider, Reading::Whole).await;
    let took = begun.elapsed();
    assert_eq!((first.vms.len().to_string(), first.hosts.len().to_string()), (vms.into(), hosts.into()));
    let begun = Instant::now();
    assert_unchanged(&mut provider, Reading::Whole, &first, "nothing has changed").await;
    eprintln!(
        "{vms} VMs on {hosts} hosts: first inventory after {took:?}, all of it anew in {:?}",
        begun.elapsed()
    );
    if is_long {
        assert!(took < Duration::from_secs(10), "{took:?}");
    }
}
