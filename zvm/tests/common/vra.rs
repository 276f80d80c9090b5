//! A real `vra serve` for a test, enrolled at the test's site.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::SystemTime;

use serde_json::Value;

use super::{Answer, Site, free_udp_port, wait_for};

/// A VRA that runs for as long as this lives. Its folder is inside the site's.
#[derive(Debug)]
pub(crate) struct Vra {
    pub(crate) dir: PathBuf,
    pub(crate) name: String,
    pub(crate) port: u16,
    /// Where it believes its `run` folder to be, as on a host of its own.
    run_at: Option<PathBuf>,
    serve: Option<Child>,
}

impl Vra {
    /// Starts a VRA and enrols it under `name`.
    pub(crate) fn start(site: &Site, name: &str) -> Self {
        Self::start_with(site, name, None)
    }

    /// One that sees its `run` folder at another place: several can have the same one, as on hosts of their own. It takes root.
    pub(crate) fn start_at(site: &Site, name: &str, run_at: &Path) -> Self {
        Self::start_with(site, name, Some(run_at.to_owned()))
    }

    fn start_with(site: &Site, name: &str, run_at: Option<PathBuf>) -> Self {
        let dir = site.dir.join(name);
        std::fs::create_dir_all(dir.join("datastore")).expect("folder");
        std::fs::create_dir_all(dir.join("run")).expect("folder");
        let run_dir = run_at.clone().unwrap_or_else(|| dir.join("run"));
        let port = free_udp_port();
        let config = format!(
            "name = \"host-of-{name}\"\nlisten = \"127.0.0.1:{port}\"\nadvertise = \"127.0.0.1:{port}\"\n\
             state_dir = \"{dir}/state\"\nrun_dir = \"{run_dir}\"\ndatastores = [\"{dir}/datastore\"]\n\
             [memory]\nlock = false\narena_mib = 64\nretained_per_vm_mib = 32\n",
            dir = dir.display(),
            run_dir = run_dir.display(),
        );
        std::fs::write(dir.join("vra.toml"), config).expect("configuration");
        let mut vra = Self { dir, name: name.into(), port, run_at, serve: None };
        vra.enrol(site);
        vra.serve();
        vra
    }

    /// Enrols it under its name, also once more.
    pub(crate) fn enrol(&self, site: &Site) {
        let token = self.dir.join("token");
        std::fs::write(&token, site.token(&self.name).reveal()).expect("token");
        let enrolled = self.run(&[
            "enroll",
            "--zvm",
            &format!("127.0.0.1:{}", site.port),
            "--token-file",
            &token.display().to_string(),
        ]);
        assert_eq!(enrolled.code, 0, "{enrolled:?}");
    }

    /// Changes what its next enrolment says of where it is reached.
    pub(crate) fn advertise(&self, address: &str) {
        let path = self.dir.join("vra.toml");
        let config = std::fs::read_to_string(&path).expect("configuration");
        let change = |line: &str| match line.starts_with("advertise") {
            true => format!("advertise = \"{address}\"\n"),
            false => format!("{line}\n"),
        };
        std::fs::write(path, config.lines().map(change).collect::<String>()).expect("configuration");
    }

    /// Starts the process and waits until it answers.
    pub(crate) fn serve(&mut self) {
        let log = File::options().create(true).append(true).open(self.dir.join("log")).expect("log");
        let mut command = match &self.run_at {
            None => self.command(&["serve"]),
            Some(run_at) => {
                let mount = "mkdir -p \"$2\"; mount --bind \"$1\" \"$2\"; shift 2; exec \"$@\"";
                let mut command = Command::new("unshare");
                command.args(["--mount", "bash", "-ec", mount, "vra"]).args([&self.dir.join("run"), run_at]);
                command.arg(vra_program()).arg("--config").arg(self.dir.join("vra.toml")).arg("serve");
                command
            }
        };
        let child =
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().expect("vra serve");
        self.serve = Some(child);
        wait_for("the VRA to answer", || self.run(&["list"]).code == 0);
    }

    /// `kill -9`.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.serve.take() {
            child.kill().expect("kill");
            child.wait().expect("wait");
        }
    }

    /// Runs a `vra` command against it.
    pub(crate) fn run(&self, args: &[&str]) -> Answer {
        self.command(args).stdin(Stdio::null()).output().expect("vra").into()
    }

    /// Runs a `vra --json` command that must succeed.
    pub(crate) fn json(&self, args: &[&str]) -> Value {
        let answer = self.run(&[&["--json"], args].concat());
        assert_eq!(answer.code, 0, "{args:?}: {answer:?}\n{}", self.log());
        serde_json::from_str(&answer.stdout).expect("JSON")
    }

    /// Makes a disk of `bytes` of `byte` and serves it by NBD; gives its URI.
    pub(crate) fn attach(&self, vm_name: &str, vm: &str, disk: &str, byte: u8, bytes: usize) -> String {
        std::fs::write(self.dir.join(disk), vec![byte; bytes]).expect("disk");
        self.attach_file(vm_name, vm, disk)
    }

    /// Serves a disk by NBD; gives its URI.
    pub(crate) fn attach_file(&self, vm_name: &str, vm: &str, disk: &str) -> String {
        let path = self.dir.join(disk);
        let socket = self.dir.join(format!("{disk}.sock")).display().to_string();
        let path = path.display().to_string();
        let args =
            ["attach", &path, "--vm-name", vm_name, "--vm", vm, "--door", "nbd", "--nbd-socket", &socket];
        let volume = self.json(&args);
        let export = volume["door"]["export"].as_str().expect("export").to_owned();
        format!("nbd+unix:///{export}?socket={socket}")
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(vra_program());
        command.arg("--config").arg(self.dir.join("vra.toml"));
        command.arg("--socket").arg(self.dir.join("run/vra.sock")).args(args);
        command
    }
}

impl Drop for Vra {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("the log of {}:\n{}", self.name, self.log());
        }
    }
}

/// Runs commands of qemu-io on an NBD URI.
pub(crate) fn qemu_io(uri: &str, commands: &[&str]) {
    let mut qemu_io = Command::new("qemu-io");
    qemu_io.args(["-f", "raw", "-t", "none", uri]);
    for command in commands {
        qemu_io.args(["-c", command]);
    }
    let answer = Answer::from(qemu_io.output().expect("qemu-io"));
    assert_eq!(answer.code, 0, "{answer:?}");
    assert!(!answer.stdout.contains("Pattern verification failed"), "{answer:?}");
}

/// Whether this machine has the NBD client that the tests read and write with.
pub(crate) fn has_qemu_io() -> bool {
    Command::new("qemu-io").arg("--version").output().is_ok()
}

/// The `vra` program beside `zvm`: cargo gives a test only its own package's programs, so one that is missing or older than
/// its sources is built first.
fn vra_program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let program = Path::new(env!("CARGO_BIN_EXE_zvm")).with_file_name("vra");
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let newest =
            ["vra/src", "journal/src", "ublk/src"].map(|folder| newest_change(&workspace.join(folder)));
        let built_at = std::fs::metadata(&program).and_then(|data| data.modified()).ok();
        if built_at < newest.into_iter().max().flatten() {
            let mut build = Command::new(env!("CARGO"));
            build.args(["build", "--quiet", "-p", "vra", "-p", "zvm", "--bins"]).current_dir(workspace);
            assert!(build.status().expect("cargo").success(), "cargo build");
        }
        program
    })
}

fn newest_change(folder: &Path) -> Option<SystemTime> {
    let entries = std::fs::read_dir(folder).ok()?.flatten();
    entries
        .filter_map(|entry| match entry.metadata() {
            Ok(data) if data.is_dir() => newest_change(&entry.path()),
            Ok(data) => data.modified().ok(),
            Err(_) => None,
        })
        .max()
}
