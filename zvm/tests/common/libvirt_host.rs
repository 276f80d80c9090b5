//! A host for tests: a real libvirtd in namespaces of its own, with guests that QEMU emulates. It takes root.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use uuid::Uuid;

use super::{Answer, wait_for};

/// The first process of a host. Its end is that of everything in its process namespace, guests too; it ends with its standard input, so also
/// with the test's process. It is bash, as that takes leave of orphans that have ended, which libvirtd waits for.
const HOST: &str = r#"
set -eu
name=$1 dir=$2 options=$3 mounts=$4
ip link set lo up
hostname "$name"
for place in etc:/etc/libvirt lib:/var/lib/libvirt run:/run/libvirt cache:/var/cache/libvirt log:/var/log/libvirt; do
    mkdir -p "${place#*:}"
    mount --bind "$dir/${place%%:*}" "${place#*:}"
done
for place in $mounts; do
    mkdir -p "${place#*:}"
    mount --bind "${place%%:*}" "${place#*:}"
done
start() {
    # shellcheck disable=SC2086
    libvirtd -f /etc/libvirt/libvirtd.conf -p /run/libvirt/libvirtd.pid $options </dev/null >>"$dir/out" 2>&1 &
    daemon=$!
}
start
while read -r command guest; do
    case $command in
        start) start ;;
        kill) kill -KILL "$daemon"; wait "$daemon" || true ;;
        stop) kill -STOP "$daemon" ;;
        kill-guest) kill -KILL "$(cat "/run/libvirt/qemu/$guest.pid")" ;;
    esac
    echo "$command"
done
"#;

/// A folder for hosts and their disks, removed when the test succeeded.
#[derive(Debug)]
pub(crate) struct TestFolder {
    pub(crate) path: PathBuf,
}

/// A host that is there for as long as this lives.
#[derive(Debug)]
pub(crate) struct TestHost {
    pub(crate) name: String,
    pub(crate) uuid: Uuid,
    /// Its own folder, within the test's.
    pub(crate) dir: PathBuf,
    holder: Child,
    commands: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

/// How a host is set up.
#[derive(Debug, Default)]
pub(crate) struct HostOptions {
    /// Whether it shares the test's network, which then should be in a namespace of its own: libvirt sets up a firewall.
    pub(crate) in_tests_network: bool,
    /// Folders that the host has at other places, too: what is where.
    pub(crate) mounts: Vec<(PathBuf, PathBuf)>,
    /// More lines of `libvirtd.conf`. Those that listen have it listen.
    pub(crate) config: String,
}

impl TestFolder {
    pub(crate) fn new() -> Self {
        let name = format!("zvm-libvirt-{}", &Uuid::new_v4().simple().to_string()[..8]);
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).expect("temporary folder");
        Self { path }
    }

    /// A raw disk of zeroes in it.
    pub(crate) fn disk(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.path.join(name);
        fs::File::create(&path).and_then(|file| file.set_len(bytes)).expect("disk");
        path
    }

    pub(crate) fn file(&self, name: &str, text: &str) -> String {
        let path = self.path.join(name);
        fs::write(&path, text).expect("file");
        path.display().to_string()
    }
}

impl Drop for TestFolder {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("kept {}", self.path.display());
        } else {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

impl TestHost {
    pub(crate) fn start(folder: &TestFolder, name: &str) -> Self {
        Self::start_with(folder, name, &HostOptions::default())
    }

    pub(crate) fn start_with(folder: &TestFolder, name: &str, options: &HostOptions) -> Self {
        let dir = folder.path.join(name);
        let uuid = Uuid::new_v4();
        for folder in ["etc", "lib", "run", "cache/qemu", "log"] {
            fs::create_dir_all(dir.join(folder)).expect("folder");
        }
        copy_files(&probed_folder(), &dir.join("cache/qemu/capabilities"));
        let qemu_conf = "user = \"+0\"\ngroup = \"+0\"\ndynamic_ownership = 0\nremember_owner = 0\nsecurity_driver = \"none\"\n\
             namespaces = []\ncgroup_controllers = []\nstdio_handler = \"file\"\n";
        fs::write(dir.join("etc/qemu.conf"), qemu_conf).expect("qemu.conf");
        let libvirtd_conf = format!(
            "host_uuid = \"{uuid}\"\nunix_sock_dir = \"/run/libvirt\"\nauth_unix_rw = \"none\"\nauth_unix_ro = \"none\"\n\
             unix_sock_ro_perms = \"0777\"\nlog_outputs = \"3:file:{}/libvirtd.log\"\n{}",
            dir.display(),
            options.config
        );
        fs::write(dir.join("etc/libvirtd.conf"), libvirtd_conf).expect("libvirtd.conf");
        let mut command = Command::new("unshare");
        command.args(["--mount", "--uts", "--pid", "--fork", "--mount-proc"]);
        if !options.in_tests_network {
            command.arg("--net");
        }
        let listen = if options.config.contains("listen_") { "--listen" } else { "" };
        command.args(["bash", "-c", HOST, "host", name]).arg(&dir).arg(listen);
        let mounts = options.mounts.iter().map(|(what, at)| format!("{}:{}", what.display(), at.display()));
        command.arg(mounts.collect::<Vec<_>>().join(" "));
        let mut holder = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("unshare");
        let host = Self {
            name: name.into(),
            uuid,
            commands: holder.stdin.take(),
            answers: BufReader::new(holder.stdout.take().expect("a pipe")),
            holder,
            dir,
        };
        host.wait_for_daemon();
        host
    }

    /// Kills the daemon; its guests go on.
    pub(crate) fn kill_daemon(&mut self) {
        self.tell("kill");
    }

    /// Has the daemon stand still, its sockets open.
    pub(crate) fn stop_daemon(&mut self) {
        self.tell("stop");
    }

    pub(crate) fn start_daemon(&mut self) {
        self.tell("start");
        self.wait_for_daemon();
    }

    /// Kills a guest's process.
    pub(crate) fn kill_guest(&mut self, name: &str) {
        self.tell(&format!("kill-guest {name}"));
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.join("run/libvirt-sock")
    }

    pub(crate) fn uri(&self) -> String {
        format!("qemu+unix:///system?socket={}", self.socket().display())
    }

    pub(crate) fn try_virsh(&self, args: &[&str]) -> Answer {
        let mut virsh = Command::new("virsh");
        virsh.args(["-q", "-c", &self.uri()]).args(args).stdin(Stdio::null());
        virsh.output().expect("virsh").into()
    }

    /// What a `virsh` command prints, which must succeed.
    pub(crate) fn virsh(&self, args: &[&str]) -> String {
        let answer = self.try_virsh(args);
        assert_eq!(answer.code, 0, "virsh {args:?}: {answer:?}");
        answer.stdout
    }

    fn tell(&mut self, command: &str) {
        let commands = self.commands.as_mut().expect("it runs");
        writeln!(commands, "{command}").expect("the host's first process");
        let mut answer = String::new();
        self.answers.read_line(&mut answer).expect("an answer");
        assert_eq!(Some(answer.trim()), command.split(' ').next());
    }

    fn wait_for_daemon(&self) {
        wait_for("libvirtd to listen", || UnixStream::connect(self.socket()).is_ok());
    }

    fn log(&self) -> String {
        ["libvirtd.log", "out"]
            .map(|file| fs::read_to_string(self.dir.join(file)).unwrap_or_default())
            .concat()
    }
}

impl Drop for TestHost {
    fn drop(&mut self) {
        drop(self.commands.take());
        let _ = self.holder.wait();
        if std::thread::panicking() {
            eprintln!("the log of {}:\n{}", self.name, self.log());
        } else if !probed_folder().exists() {
            let fresh = probed_folder().with_extension(Uuid::new_v4().simple().to_string());
            copy_files(&self.dir.join("cache/qemu/capabilities"), &fresh);
            let _ = fs::rename(fresh, probed_folder());
        }
    }
}

/// What libvirtd has found out about QEMU, which takes it seconds; it looks itself whether that is still so.
fn probed_folder() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("libvirt-capabilities")
}

fn copy_files(from: &Path, to: &Path) {
    let Ok(entries) = fs::read_dir(from) else { return };
    fs::create_dir_all(to).expect("folder");
    for entry in entries.flatten() {
        let _ = fs::copy(entry.path(), to.join(entry.file_name()));
    }
}

/// Whether this machine can have such hosts.
pub(crate) fn has_libvirt() -> bool {
    let has = |program: &str| Command::new(program).arg("--version").output().is_ok();
    let is_root =
        || fs::metadata("/proc/self").is_ok_and(|data| std::os::unix::fs::MetadataExt::uid(&data) == 0);
    is_root() && ["libvirtd", "virsh", "qemu-system-x86_64", "dnsmasq"].into_iter().all(has)
}
