//! A manager of many groups: what it is asked it answers at once, and a pass over all of them is short.

mod common;
#[path = "common/simulated_vra.rs"]
mod simulated_vra;

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use ::vra::api::{VmId, VraId};
use ::vra::pki::PkiDir;
use common::{Site, free_udp_port, wait_for};
use simulated_vra::SimulatedVra;
use uuid::Uuid;
use zvm::api::{Client, Request, Response, Status, VmSpec, VpgSpec};

const VMS_PER_GROUP: usize = 10;

/// How often each question is put.
const ROUNDS: usize = 100;

/// 99 of 100 lists come within this time.
const LIST_WITHIN: Duration = Duration::from_millis(200);

/// Longest pass of the reconciler.
const PASS_WITHIN: Duration = Duration::from_secs(1);

struct Size {
    vras: usize,
    groups: usize,
}

#[test]
fn lists_and_passes_of_many_groups_are_short() {
    let is_long = std::env::var_os("HOLDFAST_LONG").is_some();
    let size = if is_long { Size { vras: 20, groups: 500 } } else { Size { vras: 4, groups: 12 } };
    let site = Site::start();
    let vm_name = |number: usize| format!("vm{number}");
    let vm_id = |number: usize| VmId(Uuid::from_u128(0x1000 + number as u128));
    let path = |number: usize| PathBuf::from(format!("/images/vm{number}.raw"));
    let sources = size.vras / 2;
    let mut inventory = String::from("[[site]]\nname = \"here\"\n");
    for number in 0..size.vras {
        writeln!(inventory, "[[host]]\nname = \"h{number}\"\nsite = \"here\"\nvra = \"h{number}\"")
            .expect("text");
    }
    for number in 0..size.groups * VMS_PER_GROUP {
        let (name, uuid, host) = (vm_name(number), vm_id(number), number % sources);
        writeln!(
            inventory,
            "[[vm]]\nname = \"{name}\"\nuuid = \"{uuid}\"\nhost = \"h{host}\"\n[[vm.disk]]\nname = \"0\"\npath = \"{}\"",
            path(number).display()
        )
        .expect("text");
    }
    site.write_inventory(&inventory);

    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("runtime");
    for number in 0..size.vras {
        let name = format!("h{number}");
        let (id, port) = (VraId::random(), free_udp_port());
        site.enrol(&name, &site.token(&name), id).expect("enrolled");
        let set = site.zvm(&["vra", "set-address", &name, &format!("127.0.0.1:{port}")]);
        assert_eq!(set.code, 0, "{set:?}");
        let served = (0..size.groups * VMS_PER_GROUP).filter(|vm| number < sources && vm % sources == number);
        let vms: Vec<_> = served.map(|vm| (vm_id(vm), vm_name(vm), path(vm))).collect();
        let credentials =
            PkiDir::open(&site.dir.join(&name)).and_then(|pki| pki.load()).expect("credentials");
        let _in_runtime = runtime.enter();
        SimulatedVra::new(id, &name, &vms).serve(port, credentials);
    }
    wait_for("the inventory", || site.json(&["inventory"]).to_string().contains("\"vm1\""));

    let spec = |group: usize| VpgSpec {
        name: format!("group{group}"),
        target: format!("h{}", sources + group % (size.vras - sources)),
        datastore: "/srv".into(),
        history_s: 600,
        vms: (0..VMS_PER_GROUP)
            .map(|vm| VmSpec { vm: vm_name(group * VMS_PER_GROUP + vm), ..VmSpec::default() })
            .collect(),
        ..serde_json::from_value(serde_json::json!({ "name": "", "target": "", "datastore": "", "vms": [] }))
            .expect("the defaults")
    };
    runtime.block_on(async {
        let mut client = Client::connect(&site.dir.join("run/zvm.sock")).await.expect("the manager");
        let began = Instant::now();
        for group in 0..size.groups {
            client.call(Request::VpgCreate(spec(group))).await.expect("created");
        }
        println!("{} groups created in {:?}", size.groups, began.elapsed());
        let deadline = Instant::now() + Duration::from_secs(300);
        loop {
            let status = status(&mut client).await;
            let is_applied =
                |vpg: &zvm::model::status::VpgReport| vpg.status == zvm::model::status::VpgStatus::MeetingSla;
            if status.vpgs.iter().filter(|vpg| is_applied(vpg)).count() == size.groups {
                break;
            }
            assert!(Instant::now() < deadline, "not all groups are protected: {:?}", status.vpgs[0]);
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        println!("all of them protected after {:?}", began.elapsed());
        measure(&mut client, &size, is_long).await;
    });
    println!("the manager has {} KiB of memory", resident_kib(&site));
}

async fn measure(client: &mut Client, size: &Size, is_long: bool) {
    let mut slow = Vec::new();
    for what in ["status", "vpg show", "checkpoint list", "task list", "event list", "alert list", "vra list"]
    {
        let mut took = Vec::with_capacity(ROUNDS);
        for round in 0..ROUNDS {
            let vpg = format!("group{}", round * 7 % size.groups);
            let request = match what {
                "status" => Request::Status,
                "vpg show" => Request::VpgShow { vpg },
                "checkpoint list" => {
                    Request::CheckpointList { vpg, tagged: false, from_us: None, to_us: None, limit: 100 }
                }
                "task list" => Request::TaskList { limit: 100 },
                "event list" => Request::EventList { limit: 100 },
                "alert list" => Request::AlertList { all: true, limit: 100 },
                _ => Request::VraList,
            };
            let began = Instant::now();
            client.call(request).await.expect("answered");
            took.push(began.elapsed());
        }
        took.sort_unstable();
        let p99 = took[(took.len() - 1) * 99 / 100];
        println!("{what}: median {:?}, 99th percentile {p99:?}", took[took.len() / 2]);
        if p99 > LIST_WITHIN {
            slow.push((what, p99));
        }
    }
    let passes = status(client).await.passes;
    println!("{passes:?}");
    assert!(passes.count > 0);
    if is_long {
        assert!(slow.is_empty(), "{slow:?}");
        assert!(Duration::from_micros(passes.longest_us) < PASS_WITHIN, "{passes:?}");
    }
}

async fn status(client: &mut Client) -> Status {
    match client.call(Request::Status).await.expect("answered") {
        Response::Status(status) => status,
        other => panic!("{other:?}"),
    }
}

/// What the manager's process has in memory.
fn resident_kib(site: &Site) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", site.pid())).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a line");
    line.trim().trim_end_matches("kB").trim().parse().expect("KiB")
}
