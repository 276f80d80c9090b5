//! One daemon: attachment, restart, and bad input with its messages.

mod common;

use std::os::unix::process::CommandExt;

use ::vra::api::volume::MAX_NAME_BYTES;
use ::vra::api::{Attach, Detach, DoorRequest, ErrorCode, Request, Response, VmId, VolumeId};
use common::vra::{Vra, qemu_io};

fn text(commands: &[&str]) -> Vec<String> {
    commands.iter().map(ToString::to_string).collect()
}

#[tokio::test]
async fn an_attached_disk_is_served_again_after_a_kill_and_after_a_stop() {
    let mut vra = Vra::start("attach", None);
    let vm = VmId::random();
    let disk = vra.disk("disk.raw", 8 << 20);
    let volume = vra.attach(vm, "db", &disk).await;
    assert_eq!((volume.number, volume.size_bytes), (0, 8 << 20));
    assert_eq!(vra.attach(vm, "db", &disk).await, volume, "attaching again changes nothing");
    let door = volume.door.clone().expect("served");
    let Some(()) = qemu_io(&door, &text(&["write -P 7 64k 128k", "discard 1M 1M", "flush"])) else { return };
    vra.kill();
    vra.serve();
    let Response::Volumes(volumes) = vra.ask(Request::List).await else { panic!("no list") };
    assert_eq!(volumes, std::slice::from_ref(&volume));
    qemu_io(&door, &text(&["read -P 7 64k 128k", "read -P 0 0 64k", "write -P 9 0 4k"]));
    vra.stop();
    vra.serve();
    qemu_io(&door, &text(&["read -P 9 0 4k"]));
    assert_eq!(std::fs::read(&disk).expect("disk")[..4096], [9; 4096], "the disk is plain raw");
    vra.ask(Request::Detach(Detach { volume: volume.volume, force: false })).await;
    let Response::Volumes(volumes) = vra.ask(Request::List).await else { panic!("no list") };
    assert!(volumes.is_empty());
    let _free = std::fs::File::options().write(true).open(&disk).expect("free");
}

#[tokio::test]
async fn a_disk_that_was_not_there_at_the_start_is_served_as_soon_as_it_is() {
    let mut vra = Vra::start("later", None);
    let disk = vra.disk("disk.raw", 8 << 20);
    let volume = vra.attach(VmId::random(), "db", &disk).await;
    vra.stop();
    let elsewhere = disk.with_extension("elsewhere");
    std::fs::rename(&disk, &elsewhere).expect("renamed");
    vra.serve();
    let status = vra.wait_for("an alert", |status| !status.alerts.is_empty()).await;
    assert_eq!(status.alerts[0].code, "volume-not-served");
    assert!(status.volumes[0].problem.as_ref().is_some_and(|problem| problem.contains("does not exist")));
    std::fs::rename(&elsewhere, &disk).expect("renamed back");
    let status = vra.wait_for("served", |status| status.volumes[0].problem.is_none()).await;
    assert_eq!(status.volumes[0].door, volume.door);
    vra.wait_for("no alert", |status| status.alerts.is_empty()).await;
    let said = vra.log().matches("a volume can't be served").count();
    assert_eq!(said, 1, "the same trouble is logged once");
}

#[tokio::test]
async fn disks_that_cannot_be_attached_are_named_with_a_remedy() {
    let vra = Vra::start("bad-disks", None);
    let attach = |name: &str, more: &[&str]| {
        let path = vra.path(name).display().to_string();
        let mut args = vec!["attach", &path, "--vm-name", "db", "--door", "nbd"];
        args.extend(more);
        vra.fail(&args)
    };
    let missing = attach("nothing.raw", &[]);
    assert!(missing.contains("nothing.raw does not exist: check the path"), "{missing}");
    vra.disk("odd.raw", 1000);
    let odd = attach("odd.raw", &[]);
    assert!(odd.contains("1000 bytes") && odd.contains("multiple of its block size"), "{odd}");

    let busy = vra.disk("busy.raw", 1 << 20);
    let holder = std::fs::File::options().read(true).write(true).open(&busy).expect("disk");
    let held = nix::fcntl::Flock::lock(holder, nix::fcntl::FlockArg::LockExclusiveNonblock).expect("lock");
    let error = attach("busy.raw", &[]);
    assert!(error.contains("busy.raw is busy"), "{error}");
    drop(held);

    let image = vra.disk("image.qcow2", 1 << 20);
    // Most images have sizes that no disk has; this one could be a disk by its size.
    std::fs::write(&image, [b"QFI\xfb\0\0\0\x03".as_slice(), &[0; 4088]].concat()).expect("image");
    std::fs::write(vra.path("odd.qcow2"), b"QFI\xfb\0\0\0\x03 and so on").expect("image");
    let error = attach("odd.qcow2", &[]);
    assert!(error.contains("odd.qcow2 is a qcow2 image"), "{error}");
    let error = attach("image.qcow2", &[]);
    assert!(error.contains("image.qcow2 is a qcow2 image, not a raw disk"), "{error}");
    assert!(error.contains("remedy: ") && error.contains("--force-raw"), "{error}");
    let forced =
        vra.run(&["attach", &image.display().to_string(), "--vm-name", "db", "--door", "nbd", "--force-raw"]);
    assert!(forced.status.success(), "{}", String::from_utf8_lossy(&forced.stderr));

    if ublk::host::require_ublk().is_err() {
        vra.disk("ublk.raw", 1 << 20);
        let path = vra.path("ublk.raw").display().to_string();
        let error = vra.fail(&["attach", &path, "--vm-name", "db"]);
        assert!(error.contains("ublk") && error.contains("--door nbd"), "{error}");
    }
    let Response::Volumes(volumes) = vra.ask(Request::List).await else { panic!("no list") };
    assert_eq!(volumes.len(), 1, "what was refused leaves nothing: {volumes:?}");
}

#[tokio::test]
async fn requests_that_contradict_are_refused() {
    let vra = Vra::start("contradict", None);
    let vm = VmId::random();
    let first = vra.attach(vm, "db", &vra.disk("a.raw", 1 << 20)).await;
    let attach = Attach {
        vm,
        vm_name: "db".to_owned(),
        volume: None,
        number: None,
        path: vra.disk("b.raw", 1 << 20),
        door: DoorRequest::Nbd { listen: None },
        force_raw: false,
        shared: None,
    };
    let cases = [
        (Attach { number: Some(0), ..attach.clone() }, ErrorCode::Conflict, "number 0 already"),
        (Attach { number: Some(64), ..attach.clone() }, ErrorCode::BadRequest, "number 64"),
        (Attach { volume: Some(first.volume), ..attach.clone() }, ErrorCode::Conflict, "is another disk"),
        (
            Attach { vm: VmId::random(), path: first.path.clone(), ..attach.clone() },
            ErrorCode::Conflict,
            "attached already",
        ),
        (Attach { path: "b.raw".into(), ..attach.clone() }, ErrorCode::BadRequest, "not absolute"),
        (
            Attach { vm_name: "x".repeat(MAX_NAME_BYTES + 1), ..attach.clone() },
            ErrorCode::BadRequest,
            "VM name",
        ),
        (
            Attach {
                door: serde_json::from_str(
                    r#"{"kind":"nbd","listen":{"kind":"tcp","address":"192.0.2.1:10809"}}"#,
                )
                .expect("door"),
                ..attach.clone()
            },
            ErrorCode::Forbidden,
            "not a loopback address",
        ),
    ];
    for (attach, code, words) in cases {
        let error = vra.refusal(Request::Attach(attach)).await;
        assert_eq!(error.code, code, "{error}");
        assert!(error.message.contains(words), "{error}");
    }
    let error = vra.refusal(Request::Detach(Detach { volume: VolumeId::random(), force: false })).await;
    assert_eq!(error.code, ErrorCode::NotFound);
    let Response::Volume(second) = vra.ask(Request::Attach(attach)).await else { panic!("no volume") };
    assert_eq!(second.number, 1);
}

#[test]
fn one_daemon_for_each_state_folder_and_no_answer_without_one() {
    let mut vra = Vra::start("single", None);
    let second = vra.fail(&["serve"]);
    assert!(second.contains("another `vra serve` uses") && second.contains("state"), "{second}");
    let status = vra.run(&["status"]);
    let shown = String::from_utf8_lossy(&status.stdout);
    assert!(shown.contains("site: not enrolled (`vra enroll`)"), "{shown}");
    if nix::unistd::geteuid().is_root() {
        // A user without rights can't even see the socket's folder.
        let binary = vra.path("vra-copy");
        std::fs::copy(env!("CARGO_BIN_EXE_vra"), &binary).expect("copy");
        let other = std::process::Command::new(&binary)
            .arg("--socket")
            .arg(vra.path("run/vra.sock"))
            .arg("status")
            .uid(65_534)
            .output()
            .expect("vra");
        let words = String::from_utf8_lossy(&other.stderr);
        assert_eq!(other.status.code(), Some(3), "{words}");
        assert!(words.contains("does this user have the right to it?"), "{words}");
    }
    vra.stop();
    let output = vra.run(&["status"]);
    assert_eq!(output.status.code(), Some(3));
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(words.contains("is `vra serve` running"), "{words}");
}

#[test]
fn a_token_never_comes_as_an_argument_and_a_bad_one_is_not_shown() {
    let vra = Vra::start("token", None);
    std::fs::write(vra.path("token"), "hfe1-secretsecret\n").expect("token");
    let path = vra.path("token").display().to_string();
    let error = vra.fail(&["enroll", "--zvm", "127.0.0.1:1", "--token-file", &path]);
    assert!(error.contains("no enrolment token") && !error.contains("secretsecret"), "{error}");
    let error = vra.fail(&["enroll", "--zvm", "127.0.0.1:1", "--token-file", "/nonexistent/token"]);
    assert!(error.contains("cannot read the token file /nonexistent/token"), "{error}");
}
