//! A disk that two VRAs serve: whose guest may write, what becomes of it when daemons are killed, and the VM's replication after its guest has
//! come from one host to the other.

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ::vra::api::door::NbdListen;
use ::vra::api::status::{SourceMode, TargetState};
use ::vra::api::volume::{SharedRole, SharedState};
use ::vra::api::vpg::Takeover;
use ::vra::api::{
    Attach, Detach, DoorAddress, DoorRequest, ErrorCode, PointInTime, RemoveVpg, Request, Response, ViewMode,
    VmId, VolumeInfo, VpgDefinition, VraStatus,
};
use common::TestCa;
use common::nbd::NbdClient;
use common::pair::{DISK_BYTES, apply, definition, door, open, open_view, tag, wait_for_checkpoint};
use common::vra::{PATIENCE, Vra, nbdcopy};

const BLOCK_BYTES: usize = 4096;

fn request(vra: &Vra, vm: VmId, path: &Path, role: SharedRole, volume: Option<&VolumeInfo>) -> Attach {
    Attach {
        vm,
        vm_name: "db".to_owned(),
        volume: volume.map(|volume| volume.volume),
        number: volume.map(|volume| volume.number),
        path: path.to_owned(),
        door: DoorRequest::Nbd { listen: Some(NbdListen::Unix { path: vra.path("disk.sock") }) },
        force_raw: false,
        shared: Some(role),
    }
}

async fn attach(vra: &Vra, request: Attach) -> VolumeInfo {
    match vra.ask(Request::Attach(request)).await {
        Response::Volume(volume) => volume,
        other => panic!("{other:?}"),
    }
}

/// Two VRAs that serve one disk, each by its own door; the first one owns it.
struct Shared {
    a: Vra,
    b: Vra,
    vm: VmId,
    path: PathBuf,
    at_a: VolumeInfo,
    at_b: VolumeInfo,
}

impl Shared {
    async fn new(name: &str, ca: Option<&TestCa>) -> Self {
        let (a, b) = (Vra::start(&format!("{name}-a"), ca), Vra::start(&format!("{name}-b"), ca));
        let (vm, path) = (VmId::random(), a.disk("db.img", DISK_BYTES));
        let at_a = attach(&a, request(&a, vm, &path, SharedRole::Owner, None)).await;
        let at_b = attach(&b, request(&b, vm, &path, SharedRole::Standby, Some(&at_a))).await;
        assert_eq!((at_a.shared, at_b.shared), (Some(SharedState::Owner), Some(SharedState::Standby)));
        Self { a, b, vm, path, at_a, at_b }
    }

    /// What the file has in a block.
    fn block(&self, number: u64) -> u8 {
        let mut bytes = [0; BLOCK_BYTES];
        let file = File::open(&self.path).expect("disk");
        file.read_exact_at(&mut bytes, number * BLOCK_BYTES as u64).expect("read");
        assert!(bytes.iter().all(|byte| *byte == bytes[0]), "a torn block");
        bytes[0]
    }
}

fn is(state: SharedState) -> impl Fn(&VraStatus) -> bool {
    move |status| status.volumes[0].shared == Some(state)
}

fn write(client: &mut NbdClient, block: u64, byte: u8) {
    client.write(block * BLOCK_BYTES as u64, &[byte; BLOCK_BYTES]).expect("written");
}

/// Writes in a thread of its own; gives the client back once the write was answered.
fn write_later(door: &DoorAddress, block: u64, byte: u8) -> JoinHandle<std::io::Result<NbdClient>> {
    let door = door.clone();
    std::thread::spawn(move || {
        let mut client = NbdClient::connect(&door)?;
        client.write(block * BLOCK_BYTES as u64, &[byte; BLOCK_BYTES])?;
        Ok(client)
    })
}

#[tokio::test]
async fn a_guest_that_arrives_reads_at_once_and_writes_when_the_one_that_left_is_gone() {
    let shared = Shared::new("handed", None).await;
    let mut leaves = NbdClient::connect(&door(&shared.at_a)).expect("a client");
    write(&mut leaves, 0, 1);
    let mut arrives = NbdClient::connect(&door(&shared.at_b)).expect("a client");
    assert_eq!(arrives.read(0, BLOCK_BYTES).expect("read"), [1; BLOCK_BYTES]);
    let arrives = std::thread::spawn(move || {
        write(&mut arrives, 0, 2);
        arrives
    });
    shared.b.wait_for("waiting", is(SharedState::Waiting)).await;
    // Who is still there keeps the disk, for as long as it likes.
    for round in 0..20 {
        write(&mut leaves, 0, 10 + round);
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert_eq!(shared.block(0), 10 + round, "the other one's write waits");
    }
    assert!(!arrives.is_finished() && is(SharedState::Owner)(&shared.a.status().await));
    drop(leaves);
    let arrives = arrives.join().expect("written");
    assert_eq!(shared.block(0), 2);
    shared.a.wait_for("standby", is(SharedState::Standby)).await;
    shared.b.wait_for("owner", is(SharedState::Owner)).await;

    // And back, as often as it comes to that. Who only reads is in nobody's way.
    let mut readers = Vec::new();
    let mut present = arrives;
    for round in 20..26_u8 {
        let (from, to) =
            if round % 2 == 0 { (&shared.at_b, &shared.at_a) } else { (&shared.at_a, &shared.at_b) };
        let next = write_later(&door(to), 0, round);
        write(&mut present, 1, round);
        drop(present);
        present = next.join().expect("no panic").expect("written");
        assert_eq!((shared.block(0), shared.block(1)), (round, round));
        let mut reader = NbdClient::connect(&door(from)).expect("a client");
        assert_eq!(reader.read(0, BLOCK_BYTES).expect("read"), [round; BLOCK_BYTES]);
        readers = vec![reader];
    }
    drop(readers);
}

#[tokio::test]
async fn what_a_client_that_is_gone_waited_to_write_never_lands() {
    let shared = Shared::new("gone", None).await;
    let mut runs = NbdClient::connect(&door(&shared.at_a)).expect("a client");
    write(&mut runs, 0, 1);
    // A guest at B that was started there by mistake, and killed.
    let (waits, has_sent) = (door(&shared.at_b), std::sync::mpsc::channel());
    let killed = std::thread::spawn(move || {
        let mut client = NbdClient::connect(&waits).expect("a client");
        client.send_write(0, &[2; BLOCK_BYTES]).expect("sent");
        has_sent.1.recv().expect("told");
    });
    shared.b.wait_for("waiting", is(SharedState::Waiting)).await;
    has_sent.0.send(()).expect("it waits");
    killed.join().expect("ended");
    shared.b.wait_for("turned away", is(SharedState::Standby)).await;
    write(&mut runs, 0, 3);
    drop(runs);
    // B gets the disk, for another write.
    let next = write_later(&door(&shared.at_b), 1, 4).join().expect("no panic");
    next.expect("written");
    assert_eq!((shared.block(0), shared.block(1)), (3, 4), "the old write is not over the new one");
}

#[tokio::test]
async fn killed_daemons_leave_the_disk_to_the_other_one_and_come_back_as_standbys() {
    let mut shared = Shared::new("killed", None).await;
    let mut runs = NbdClient::connect(&door(&shared.at_a)).expect("a client");
    write(&mut runs, 0, 1);
    shared.a.kill();
    drop(runs);
    let mut runs = write_later(&door(&shared.at_b), 0, 2).join().expect("no panic").expect("written");
    shared.a.serve();
    shared.a.wait_for("standby", is(SharedState::Standby)).await;
    let mut returns = write_later(&door(&shared.at_a), 0, 3);
    shared.a.wait_for("waiting", is(SharedState::Waiting)).await;
    write(&mut runs, 0, 4);
    // One that asks and is killed asks no more.
    shared.a.kill();
    assert!(returns.join().expect("no panic").is_err());
    write(&mut runs, 1, 5);
    shared.a.serve();
    returns = write_later(&door(&shared.at_a), 0, 6);
    shared.a.wait_for("waiting", is(SharedState::Waiting)).await;
    assert_eq!((shared.block(0), shared.block(1)), (4, 5));
    // So does an owner that is killed while another one asks.
    shared.b.kill();
    let mut runs = returns.join().expect("no panic").expect("written");
    shared.b.serve();
    write(&mut runs, 1, 7);
    assert_eq!((shared.block(0), shared.block(1)), (6, 7));
    shared.b.wait_for("standby", is(SharedState::Standby)).await;

    // After restarts nobody has it until somebody writes, or it is attached where its guest is.
    drop(runs);
    shared.a.kill();
    shared.a.serve();
    shared.a.wait_for("standby", is(SharedState::Standby)).await;
    let owner = request(&shared.b, shared.vm, &shared.path, SharedRole::Owner, Some(&shared.at_a));
    // The kernel may still be closing what the killed one had open, and locked.
    let deadline = Instant::now() + PATIENCE;
    while attach(&shared.b, owner.clone()).await.shared != Some(SharedState::Owner) {
        assert!(Instant::now() < deadline, "nobody has the disk, and it can't be had");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let owner = request(&shared.a, shared.vm, &shared.path, SharedRole::Owner, Some(&shared.at_a));
    assert_eq!(attach(&shared.a, owner).await.shared, Some(SharedState::Standby), "one at a time");
}

#[tokio::test]
async fn a_standby_is_refused_where_it_is_not_surely_the_same_disk_and_lock() {
    let shared = Shared::new("refused", None).await;
    let other = Vra::start("refused-c", None);
    let standby = |path: &Path| request(&other, shared.vm, path, SharedRole::Standby, Some(&shared.at_a));
    // A file of that name on storage of its own: never marked, or copied with its mark.
    let alone = other.disk("db.img", DISK_BYTES);
    let error = other.refusal(Request::Attach(standby(&alone))).await;
    assert!(
        error.code == ErrorCode::NotFound && error.message.contains(".db.img.holdfast-shared"),
        "{error}"
    );
    let mark = |path: &Path| path.with_file_name(".db.img.holdfast-shared");
    std::fs::copy(mark(&shared.path), mark(&alone)).expect("copied");
    let error = other.refusal(Request::Attach(standby(&alone))).await;
    assert!(error.message.contains("no owner whose lock is seen"), "{error}");
    std::fs::write(mark(&alone), "another one\n").expect("written");
    let error = other.refusal(Request::Attach(standby(&alone))).await;
    assert!(error.message.contains("another one") && error.code == ErrorCode::Conflict, "{error}");
    // A second owner, a door that can't tell, a standby that names no volume.
    let owner = request(&other, shared.vm, &shared.path, SharedRole::Owner, Some(&shared.at_a));
    assert_eq!(other.refusal(Request::Attach(owner)).await.code, ErrorCode::Busy);
    let ublk = Attach { door: DoorRequest::Ublk { queues: None, depth: None }, ..standby(&shared.path) };
    let error = other.refusal(Request::Attach(ublk)).await;
    assert!(error.code == ErrorCode::BadRequest && error.remedy.is_some_and(|remedy| remedy.contains("nbd")));
    let unnamed = Attach { volume: None, ..standby(&shared.path) };
    assert_eq!(other.refusal(Request::Attach(unnamed)).await.code, ErrorCode::BadRequest);
    let unshared = Attach {
        shared: None,
        ..request(&shared.b, shared.vm, &shared.path, SharedRole::Standby, Some(&shared.at_a))
    };
    let error = shared.b.refusal(Request::Attach(unshared)).await;
    assert!(error.code == ErrorCode::Conflict && error.message.contains("shared with other VRAs"), "{error}");

    // The same again is the same; what is detached leaves nothing to those that have it still.
    let again = attach(
        &shared.b,
        request(&shared.b, shared.vm, &shared.path, SharedRole::Standby, Some(&shared.at_a)),
    )
    .await;
    assert_eq!(again, shared.at_b);
    let detach = |volume: &VolumeInfo| Request::Detach(Detach { volume: volume.volume, force: false });
    shared.b.ask(detach(&shared.at_b)).await;
    assert!(mark(&shared.path).exists(), "its owner has it");
    shared.a.ask(detach(&shared.at_a)).await;
    assert!(!mark(&shared.path).exists());
}

/// The definition after the VM's guest has come to B, as a manager makes it from what the target tells.
async fn moved(shared: &Shared, target: &Vra, before: &VpgDefinition, revision: u64) -> VpgDefinition {
    let status = target.status().await.target_vms.remove(0);
    let takeover = Takeover::after(status.generation.expect("a generation"), status.durable_through);
    let mut moved = before.clone();
    moved.revision = revision;
    moved.vms[0].source = shared.b.endpoint.clone();
    moved.vms[0].takeover = Some(takeover);
    moved
}

#[tokio::test]
async fn replication_goes_on_from_the_host_that_the_guest_came_to() {
    let ca = TestCa::new();
    let mut shared = Shared::new("moved", Some(&ca)).await;
    let target = Vra::start("moved-t", Some(&ca));
    let first = definition(&shared.a, &target, std::slice::from_ref(&shared.at_a));
    let vpg = first.id;
    apply(&target, &first).await;
    apply(&shared.a, &first).await;
    let streams = |status: &VraStatus| status.source_vms.iter().any(|vm| vm.mode == SourceMode::Streaming);
    shared.a.wait_for("streaming", streams).await;
    target.wait_for("journaling", |status| status.target_vms[0].state == TargetState::Journaling).await;
    let mut guest = NbdClient::connect(&door(&shared.at_a)).expect("a client");
    write(&mut guest, 0, 1);
    let before = tag(&shared.a, vpg, "before").await;
    wait_for_checkpoint(&target, vpg, before.id).await;
    let disk_before = std::fs::read(&shared.path).expect("disk");

    // The guest comes to B: A captures nothing that B's guest writes, and says so.
    let arrives = write_later(&door(&shared.at_b), 1, 2);
    drop(guest);
    let mut guest = arrives.join().expect("no panic").expect("written");
    shared.a.wait_for("no longer a source", |status| !streams(status)).await;
    let second = moved(&shared, &target, &first, 2).await;
    // Without what it continues, B may not write to A's journal.
    let mut unnamed = second.clone();
    unnamed.vms[0].takeover = None;
    apply(&target, &unnamed).await;
    apply(&shared.b, &unnamed).await;
    shared.b.wait_for("refused", |status| status.source_vms[0].mode == SourceMode::Refused).await;
    let third = VpgDefinition { revision: 3, ..second };
    apply(&target, &third).await;
    apply(&shared.b, &third).await;
    shared.a.ask(Request::RemoveVpg(RemoveVpg { vpg, keep_files: true })).await;
    shared.b.wait_for("streaming", streams).await;
    target.wait_for("journaling", |status| status.target_vms[0].state == TargetState::Journaling).await;
    write(&mut guest, 0, 3);
    let after = tag(&shared.b, vpg, "after").await;
    wait_for_checkpoint(&target, vpg, after.id).await;
    let disk_after = std::fs::read(&shared.path).expect("disk");
    // A restart of B keeps it; the ancestor does no harm.
    shared.b.kill();
    shared.b.serve();
    shared.b.wait_for("streaming again", streams).await;
    for (checkpoint, expected) in [(before, disk_before), (after, disk_after)] {
        let at = PointInTime::Checkpoint { checkpoint: checkpoint.id };
        let view = open_view(&target, &open(vpg, at, ViewMode::ReadOnly)).await;
        let Some(found) = nbdcopy(&view.disks[0].door, &target.path("copy.raw")) else { return };
        assert!(found == expected, "{checkpoint:?}");
    }
}

#[tokio::test]
async fn a_stream_of_a_former_source_ends_when_its_target_hears_of_another() {
    let ca = TestCa::new();
    let shared = Shared::new("former", Some(&ca)).await;
    let target = Vra::start("former-t", Some(&ca));
    let first = definition(&shared.a, &target, std::slice::from_ref(&shared.at_a));
    apply(&target, &first).await;
    apply(&shared.a, &first).await;
    shared.a.wait_for("streaming", |status| status.source_vms[0].mode == SourceMode::Streaming).await;
    let second = moved(&shared, &target, &first, 2).await;
    apply(&target, &second).await;
    shared.a.wait_for("refused", |status| status.source_vms[0].mode == SourceMode::Refused).await;
}
