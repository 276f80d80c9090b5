use serde_json::json;
use uuid::Uuid;
use vra::api::vpg::VolumeDefinition;
use vra::api::{DoorAddress, GenerationId, JournalId, MemberSince, TimeUs, VolumeId, VpgId};

use super::*;
use crate::inventory::{Host, Origin, Vm};
use crate::model::vpg::{JournalBounds, Member, VpgSettings};
use crate::model::vra::{Vra, VraState};
use crate::reconcile::{LastStatus, Seen};

/// VRAs by their order: the VM was at A, is at B now, and its journal is at T.
const NAMES: [&str; 3] = ["a", "b", "t"];
const A: usize = 0;
const B: usize = 1;
const T: usize = 2;

fn vra(at: usize) -> VraId {
    VraId(Uuid::from_u128(at as u128 + 1))
}

struct World {
    desired: Desired,
    inventory: Inventory,
    observed: Observed,
}

impl World {
    /// As it is when the guest has come to B and nobody has followed; B serves the disk as it is told.
    fn new(served_at_b: serde_json::Value) -> Self {
        let vm = VmId(Uuid::from_u128(9));
        let volume = VolumeDefinition {
            id: VolumeId(Uuid::from_u128(7)),
            number: 0,
            size_bytes: 1 << 20,
            logical_block_bytes: 512,
            source_path: "/images/db".into(),
            left: false,
            swap: false,
        };
        let member = Member {
            vm,
            name: "db".into(),
            journal: JournalId::random(),
            member_since: MemberSince::default(),
            source: vra(A),
            takeover: None,
            target: vra(T),
            datastore: "/srv".into(),
            journal_size: JournalBounds {
                limit_bytes: 1 << 30,
                limit_percent: None,
                warning: None,
                minimum_bytes: 0,
            },
            volumes: vec![volume],
            excluded: Vec::new(),
            recovery: Default::default(),
        };
        let settings = VpgSettings {
            description: String::new(),
            priority: Default::default(),
            member_set_version: 1,
            checkpoint_interval_ms: 1000,
            hold_deadline_ms: 100,
            history_s: 3600,
            rpo_target_s: 10,
            give_up_history: false,
            encrypt: false,
            paused: false,
            test_reminder_days: None,
            new_disks: Default::default(),
            recovery: Default::default(),
            vms: vec![member],
            former: Vec::new(),
        };
        let vpg = Vpg {
            id: VpgId(Uuid::from_u128(5)),
            name: "shop".into(),
            state: VpgState::Active,
            revision: 2,
            applied_revision: 1,
            created_us: TimeUs(1),
            last_test_us: None,
            stamp: None,
            settings,
            removal: None,
        };
        let enrolled = |at: usize| Vra {
            id: vra(at),
            name: NAMES[at].into(),
            address: "127.0.0.1:1".into(),
            version: "1".into(),
            state: VraState::Enrolled,
            enrolled_us: TimeUs(1),
            revoked_us: None,
            certificate_serial: "1".into(),
            certificate_ends_us: TimeUs(2),
        };
        let desired = Desired {
            vras: (0..NAMES.len()).map(|at| (vra(at), enrolled(at))).collect(),
            vpgs: vec![vpg],
            ..Desired::default()
        };
        let host = |name: &str| Host {
            name: format!("host-{name}"),
            site: "s".into(),
            cluster: None,
            vra: name.into(),
            state: Default::default(),
            origin: Origin::default(),
        };
        let guest = Vm {
            uuid: vm.0,
            name: "db".into(),
            host: "host-b".into(),
            power: Power::On,
            disks: Vec::new(),
            nics: Vec::new(),
            origin: Origin::default(),
        };
        let inventory =
            Inventory { hosts: NAMES.map(host).to_vec(), vms: vec![guest], ..Inventory::default() };
        let mut world = Self { desired, inventory, observed: Observed::new() };
        world.tells(B, json!({ "volumes": [served_at_b] }));
        world
    }

    /// What a VRA's status has, besides what is nothing to us.
    fn tells(&mut self, at: usize, what: serde_json::Value) {
        let mut status = json!({
            "vra": vra(at), "name": NAMES[at], "version": "1", "now_us": 1, "started_us": 1, "site": null,
            "host": { "hostname": NAMES[at], "kernel": "6", "ublk_features": null },
            "volumes": [], "vpgs": [], "source_vms": [], "target_vms": [], "views": [], "alerts": [],
        });
        for (key, value) in what.as_object().expect("an object") {
            status[key] = value.clone();
        }
        let status = serde_json::from_value(status).expect("a status");
        let last = Some(LastStatus { asked_us: 1, status });
        self.observed.insert(vra(at), Seen { reachable: true, error: None, since_us: 0, last });
    }

    /// The target has a revision of the group, and this generation at the journal's tail.
    fn target_has(&mut self, revision: u64, generation: GenerationId, durable_through: u64) {
        let vm = json!({
            "vm": Uuid::from_u128(9), "name": "db", "vpg": Uuid::from_u128(5), "source": vra(B), "state": "journaling",
            "connected": false, "journal": Uuid::from_u128(4), "generation": generation, "durable_through": durable_through,
            "history_from_us": null, "history_to_us": null, "checkpoint_count": 0, "journal_used_bytes": 0,
            "journal_limit_bytes": 1, "received_bytes": 0, "folder": "/srv/db",
        });
        let vpg = json!({
            "vpg": Uuid::from_u128(5), "name": "shop", "revision": revision, "last_checkpoint": null,
            "checkpoint_count": 0, "aborted_epochs": 0,
        });
        self.tells(T, json!({ "target_vms": [vm], "vpgs": [vpg] }));
    }

    /// B is in this generation.
    fn source_is_in(&mut self, generation: GenerationId) {
        let vm = json!({
            "vm": Uuid::from_u128(9), "name": "db", "vpg": Uuid::from_u128(5), "target": vra(T), "mode": "refused",
            "connected": false, "generation": generation, "last_sequence": 1, "durable_through": 0,
            "rpo": { "total_us": 0, "queue_us": 0, "wire_us": 0, "target_memory_us": 0, "journal_disk_us": 0 },
            "sync": null, "retained_bytes": 0, "retained_limit_bytes": 1, "sent_bytes": 0, "local_errors": 0,
            "hold": { "count": 0, "last_us": 0, "max_us": 0 },
        });
        self.tells(B, json!({ "source_vms": [vm] }));
    }

    fn moves(&self) -> Vec<Wish> {
        moves(&self.desired, &self.inventory, &self.observed)
    }
}

fn volume(shared: serde_json::Value) -> serde_json::Value {
    let door = DoorAddress::NbdUnix { path: "/run/holdfast/nbd.sock".into(), export: "x".into() };
    json!({
        "volume": Uuid::from_u128(7), "vm": Uuid::from_u128(9), "vm_name": "db", "number": 0, "path": "/images/db",
        "size_bytes": 1 << 20, "logical_block_bytes": 512, "vpg": null, "problem": null, "shared": shared,
        "door": door,
    })
}

#[test]
fn a_disk_that_has_grown_is_to_be_protected_as_large_as_its_source_sees_it() {
    let mut world = World::new(volume(json!(null)));
    let grown = |bytes: u64| {
        let mut grown = volume(json!(null));
        grown["grown_bytes"] = json!(bytes);
        json!({ "volumes": [grown] })
    };
    assert!(growths(&world.desired, &world.observed).is_empty(), "as large as it is protected");
    // One that may only read it gives it to its guest at once.
    let mut standby = volume(json!("standby"));
    standby["size_bytes"] = json!(2 << 20);
    world.tells(B, json!({ "volumes": [standby] }));
    world.tells(A, grown(3 << 20));
    let step = Step::Grow(vec![(VolumeId(Uuid::from_u128(7)), 3 << 20)]);
    let wish = Wish { vpg: "shop".into(), vm: VmId(Uuid::from_u128(9)), step };
    assert_eq!(growths(&world.desired, &world.observed), [wish]);
    world.desired.vpgs[0].settings.vms[0].volumes[0].size_bytes = 3 << 20;
    assert!(growths(&world.desired, &world.observed).is_empty(), "its definition says so already");
}

#[test]
fn a_vm_is_followed_to_a_vra_that_shares_its_disks_and_nowhere_else() {
    let mut world = World::new(volume(json!("waiting")));
    let wish = Wish { vpg: "shop".into(), vm: VmId(Uuid::from_u128(9)), step: Step::Move(vra(B)) };
    assert_eq!(world.moves(), [wish]);
    world.desired.vpgs[0].settings.vms[0].source = vra(B);
    assert!(world.moves().is_empty(), "it was followed");
    // A disk of that id that isn't shared would be written to at both.
    assert!(World::new(volume(json!(null))).moves().is_empty());
    let mut alone = World::new(volume(json!("standby")));
    alone.desired.vras.remove(&vra(B));
    assert!(alone.moves().is_empty(), "revoked");
    let mut arriving = World::new(volume(json!("standby")));
    arriving.inventory.vms[0].power = Power::Paused;
    assert!(arriving.moves().is_empty(), "it may still run where it comes from");
    let mut deleted = World::new(volume(json!("standby")));
    deleted.desired.vpgs[0].state = VpgState::Deleting;
    assert!(deleted.moves().is_empty());
}

#[test]
fn what_a_new_source_continues_is_said_again_if_the_old_one_had_begun_something_else() {
    let (told, later, own) = (GenerationId::random(), GenerationId::random(), GenerationId::random());
    let mut world = World::new(volume(json!("owner")));
    let member = &mut world.desired.vpgs[0].settings.vms[0];
    (member.source, member.takeover) = (vra(B), Some(Takeover::after(told, 100)));
    let vm = member.vm;
    world.source_is_in(own);
    let moved_to_be_granted = Moved::from([(vm, 2)]);
    let mut moved = moved_to_be_granted.clone();
    let mut missed_in = |world: &World| {
        let found = missed(&mut moved, &world.desired, &world.observed);
        (found.len(), moved.contains_key(&vm))
    };
    world.target_has(2, told, 200);
    assert_eq!(missed_in(&world), (0, true), "its grant is on the way");
    world.target_has(2, told, 1 << 40);
    assert_eq!(missed_in(&world), (1, true), "its numbers are used");
    world.target_has(1, later, 200);
    assert_eq!(missed_in(&world), (0, true), "the former source may still begin another one");
    world.target_has(2, later, 200);
    assert_eq!(missed_in(&world), (1, true));
    assert_eq!(moved_in(&world.desired.vpgs), moved_to_be_granted, "also after a restart of the manager");
    world.target_has(2, own, 200);
    assert_eq!(missed_in(&world), (0, false), "granted");
    world.target_has(2, later, 200);
    assert_eq!(missed_in(&world), (0, false), "what comes later somebody must decide (A5)");
}
