//! What a user can get wrong, and a host can lack: each is refused with a message that names the thing and the remedy.

mod common;

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ::vra::api::{Request, Response, VmId};
use ::vra::config::Config;
use ::vra::receive::{FolderError, NewDisk, VmFolder};
use common::vra::{PATIENCE, Vra};
use common::{Folder, TestCa};

/// A filesystem of its own in memory, gone when dropped.
struct SmallFilesystem(PathBuf);

impl SmallFilesystem {
    /// None where this process may not mount.
    fn mount(at: &Path, size_kib: u32) -> Option<Self> {
        std::fs::create_dir_all(at).expect("folder");
        let size = format!("size={size_kib}k");
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(at).output();
        if mount.is_ok_and(|output| output.status.success()) {
            return Some(Self(at.to_owned()));
        }
        eprintln!("skipped: this process may not mount filesystems");
        None
    }

    fn remount_read_only(&self) {
        let status = Command::new("mount").args(["-o", "remount,ro"]).arg(&self.0).status();
        assert!(status.expect("mount").success());
    }
}

impl Drop for SmallFilesystem {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

#[test]
fn a_datastore_that_is_full_read_only_or_missing_is_named_and_left_clean() {
    let folder = Folder::new("datastore");
    let vpg = ("shop", ::vra::api::VpgId::random());
    let make = |datastore: &Path, disk_bytes: u64| {
        let vm = VmFolder::of(datastore, vpg, ("db", VmId::random()));
        match vm.make(datastore, &[NewDisk { size_bytes: disk_bytes, stays_empty: false }], 1 << 20) {
            Ok(_) => panic!("files were made in {}", datastore.display()),
            Err(error) => error,
        }
    };
    let missing = folder.0.join("nowhere");
    let error = make(&missing, 1 << 20);
    assert!(matches!(error, FolderError::NoDatastore { .. }), "{error}");
    assert!(error.to_string().contains("nowhere is not there: create the folder, or mount"), "{error}");

    let Some(small) = SmallFilesystem::mount(&folder.0.join("small"), 4096) else { return };
    let error = make(&small.0, 16 << 20).to_string();
    assert!(
        error.contains("has 4 MiB free, 17 MiB are needed: free space, lower the journal limit"),
        "{error}"
    );
    assert_eq!(std::fs::read_dir(&small.0).expect("list").count(), 0, "nothing is left of what was refused");
    small.remount_read_only();
    let error = make(&small.0, 1 << 20).to_string();
    assert!(
        error.contains("small is read-only: remount it read-write, or name another datastore"),
        "{error}"
    );
}

#[test]
fn a_full_state_folder_refuses_changes_until_there_is_space() {
    let mut vra = Vra::start("full-state", None);
    vra.stop();
    let (state, saved) = (vra.path("state"), vra.path("saved"));
    std::fs::rename(&state, &saved).expect("moved");
    let Some(small) = SmallFilesystem::mount(&state, 256) else { return };
    let copied = Command::new("cp").arg("-a").arg(saved.join(".")).arg(&state).status().expect("cp");
    assert!(copied.success());
    vra.serve();
    let disk = vra.disk("a.raw", 1 << 20).display().to_string();
    let attach = ["attach", &disk, "--vm-name", "db", "--door", "nbd"];
    // Fails at the end of the space, which is the aim.
    let _ = std::fs::write(small.0.join("junk"), vec![1; 1 << 20]);
    let error = vra.fail(&attach);
    assert!(error.contains("cannot write the state file") && error.contains("No space left"), "{error}");
    assert!(error.contains("make space or repair the file system"), "{error}");
    std::fs::remove_file(small.0.join("junk")).expect("removed");
    let attached = vra.run(&attach);
    assert!(attached.status.success(), "{}", String::from_utf8_lossy(&attached.stderr));
    vra.kill();
}

#[test]
fn a_disk_is_known_again_by_whatever_path_and_options_of_another_door_are_refused() {
    let vra = Vra::start("same-disk", None);
    let disk = vra.disk("a.raw", 1 << 20);
    let path = disk.display().to_string();
    let door = ["--vm-name", "db", "--door", "nbd"];
    let first = vra.run(&[&["attach", &path][..], &door].concat());
    assert!(first.status.success(), "{}", String::from_utf8_lossy(&first.stderr));
    let link = vra.path("link.raw");
    std::os::unix::fs::symlink(&disk, &link).expect("link");
    let link = link.display().to_string();
    let error = vra.fail(&[&["attach", &link][..], &door].concat());
    assert!(error.contains("link.raw is attached already") && error.contains("a.raw is volume 0"), "{error}");
    assert!(error.contains("remedy: ") && error.contains("vra detach"), "{error}");

    let other = vra.disk("b.raw", 1 << 20).display().to_string();
    let socket = vra.path("no/such/folder.sock").display().to_string();
    let error = vra.fail(&["attach", &other, "--vm-name", "db", "--door", "nbd", "--nbd-socket", &socket]);
    assert!(error.contains("folder.sock") && error.contains("remedy: make the socket's folder"), "{error}");
    let error = vra.fail(&["attach", &other, "--vm-name", "db", "--nbd-socket", &socket]);
    assert!(error.contains("add --door nbd"), "{error}");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("port");
    let port = taken.local_addr().expect("address").to_string();
    let error = vra.fail(&["attach", &other, "--vm-name", "db", "--door", "nbd", "--nbd-tcp", &port]);
    assert!(error.contains(&port) && error.contains("is in use by a running server"), "{error}");
    let empty = vra.disk("empty.raw", 0).display().to_string();
    let error = vra.fail(&[&["attach", &empty][..], &door].concat());
    assert!(error.contains("empty.raw is empty: check the path"), "{error}");
    let error = vra.fail(&["view", "close", "00000000-0000-0000-0000-000000000001"]);
    assert!(error.contains("no view 00000000-0000-0000-0000-000000000001 is open here"), "{error}");
}

#[tokio::test]
async fn a_taken_port_is_an_alert_and_the_vra_still_knows_its_site() {
    let ca = TestCa::new();
    let mut vra = Vra::start("taken-port", Some(&ca));
    vra.stop();
    let taken = std::net::UdpSocket::bind(&vra.endpoint.address).expect("the port is free now");
    vra.serve();
    let status =
        vra.wait_for("the alert", |status| status.alerts.iter().any(|alert| alert.code == "link-down")).await;
    let alert = status.alerts.iter().find(|alert| alert.code == "link-down").expect("alert");
    assert!(alert.message.contains(&format!("cannot listen on udp {}", vra.endpoint.address)), "{alert:?}");
    assert!(alert.message.contains("Set `listen` in the configuration"), "{alert:?}");
    assert_eq!(status.site.expect("it is enrolled").zvm, ca.zvm);
    drop(taken);
    vra.wait_for("the link", |status| status.alerts.is_empty()).await;
}

/// A daemon of the user nobody.
struct Nobody {
    folder: Folder,
    program: PathBuf,
    child: Option<Child>,
}

impl Nobody {
    const UID: u32 = 65_534;

    /// None where this process can't become nobody.
    fn new(name: &str) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: only root can become another user");
            return None;
        }
        let folder = Folder::new(name);
        std::os::unix::fs::chown(&folder.0, Some(Self::UID), Some(Self::UID)).expect("chown");
        // Where the build lies, nobody may have no right to look.
        let program = folder.0.join("vra");
        std::fs::copy(env!("CARGO_BIN_EXE_vra"), &program).expect("copy");
        Some(Self { folder, program, child: None })
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--config").arg(self.folder.0.join("vra.toml")).args(args);
        command.uid(Self::UID).gid(Self::UID).stdin(Stdio::null());
        command
    }

    fn fail(&self, args: &[&str]) -> String {
        let output = self.command(args).output().expect("vra");
        assert!(!output.status.success(), "{args:?} succeeded");
        String::from_utf8(output.stderr).expect("text")
    }
}

impl Drop for Nobody {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[test]
fn want_of_permission_is_named_with_who_needs_it() {
    let Some(mut nobody) = Nobody::new("nobody") else { return };
    let at = nobody.folder.0.clone();
    let configure = |state: &str| {
        let text = format!(
            "state_dir = \"{state}\"\nrun_dir = \"{0}/run\"\ndatastores = [\"{0}\"]\n[memory]\nlock = false\narena_mib = 16\n",
            at.display()
        );
        std::fs::write(at.join("vra.toml"), text).expect("configuration");
    };
    configure("/proc/holdfast");
    let error = nobody.fail(&["serve"]);
    assert!(error.contains("cannot make the folder /proc/holdfast") && error.contains("as root"), "{error}");

    configure(&at.join("state").display().to_string());
    nobody.child = Some(nobody.command(&["serve"]).stderr(Stdio::null()).spawn().expect("vra serve"));
    let deadline = Instant::now() + PATIENCE;
    while !nobody.command(&["list"]).output().expect("vra").status.success() {
        assert!(Instant::now() < deadline, "no answer");
        std::thread::sleep(Duration::from_millis(20));
    }
    let disk = at.join("root.raw");
    std::fs::File::create(&disk).and_then(|file| file.set_len(1 << 20)).expect("disk");
    let error = nobody.fail(&["attach", &disk.display().to_string(), "--vm-name", "db", "--door", "nbd"]);
    assert!(error.contains("no permission to open") && error.contains("root.raw"), "{error}");
    assert!(error.contains("run as root, or give the user that runs this the right"), "{error}");
}

#[test]
fn key_files_that_others_can_read_or_that_hold_no_key_are_refused() {
    let ca = TestCa::new();
    let vra = Vra::start("keys", Some(&ca));
    let config = Config::load(Some(&vra.path("vra.toml"))).expect("configuration");
    let key = config.pki_dir().join("key.pem");
    std::fs::write(vra.path("token"), ca.token().reveal()).expect("token");
    let token = vra.path("token").display().to_string();
    let enrol = ["enroll", "--zvm", "127.0.0.1:1", "--token-file", &token];
    let mode = |mode| std::os::unix::fs::PermissionsExt::from_mode(mode);
    std::fs::set_permissions(&key, mode(0o644)).expect("chmod");
    let error = vra.fail(&enrol);
    assert!(error.contains("key.pem can be read by others (mode 0644): make it `chmod 600`"), "{error}");
    std::fs::set_permissions(&key, mode(0o600)).expect("chmod");
    std::fs::write(&key, "nonsense").expect("key");
    let error = vra.fail(&enrol);
    assert!(error.contains("key.pem is not a private key in PEM: move it away and enrol"), "{error}");
}

#[tokio::test]
async fn a_disk_that_was_cut_is_not_served_and_says_why() {
    let mut vra = Vra::start("resized", None);
    let disk = vra.disk("a.raw", 1 << 20);
    vra.attach(VmId::random(), "db", &disk).await;
    vra.stop();
    std::fs::File::options().write(true).open(&disk).and_then(|file| file.set_len(1 << 19)).expect("cut");
    vra.serve();
    let status = vra
        .wait_for("the alert", |status| status.alerts.iter().any(|alert| alert.code == "volume-not-served"))
        .await;
    let alert = &status.alerts[0];
    assert!(
        alert.message.contains("had 1048576 bytes") && alert.message.contains("now it has 524288"),
        "{alert:?}"
    );
    assert!(alert.remedy.as_ref().is_some_and(|remedy| remedy.contains("detach the volume")), "{alert:?}");
    let Response::Volumes(volumes) = vra.ask(Request::List).await else { panic!("no list") };
    assert!(volumes[0].door.is_none() && volumes[0].problem.is_some(), "{volumes:?}");
}
