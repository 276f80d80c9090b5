//! Hosts in network namespaces of their own: they reach nothing but the addresses of the test's own namespace, so what they say to each
//! other goes by its relays or not at all.

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use super::vra::PATIENCE;

/// Set in the process that is in the namespace between the hosts.
const INSIDE: &str = "HOLDFAST_TEST_NETWORK";

/// The test's own address, for its relays and whatever else isn't on a host.
pub const BETWEEN: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 1));

/// Whether this process is between the hosts. If it isn't yet, the test of that name is run there, and must pass.
///
/// Takes root, or a kernel that lets everybody have user namespaces.
pub fn is_between_hosts(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        ip(None, &["link", "set", "lo", "up"]);
        ip(None, &["address", "add", &format!("{BETWEEN}/32"), "dev", "lo"]);
        return true;
    }
    let mut command = Command::new("unshare");
    if !nix::unistd::geteuid().is_root() {
        command.arg("--map-root-user");
    }
    command.args(["--net", "--"]).arg(std::env::current_exe().expect("this test"));
    command.args(["--exact", test, "--nocapture"]).env(INSIDE, "1");
    let status = command.status().expect("unshare, of util-linux");
    assert!(status.success(), "{test} in a network namespace ended with {status}");
    false
}

/// A host: a network namespace with one interface.
pub struct Host {
    /// Ends with its standard input, so also with this process.
    holder: Child,
    pub ip: IpAddr,
}

impl Host {
    /// The host of a number from 1 on.
    pub fn new(number: u8) -> Self {
        let mut holder = Command::new("unshare");
        holder.args(["--net", "--", "cat"]).stdin(Stdio::piped()).stdout(Stdio::null());
        let host = Self {
            holder: holder.spawn().expect("unshare"),
            ip: IpAddr::V4(Ipv4Addr::new(10, 77, number, 2)),
        };
        let namespace = |path: &Path| std::fs::read_link(path).ok();
        let deadline = Instant::now() + PATIENCE;
        while namespace(&host.namespace()) == namespace(Path::new("/proc/self/ns/net")) {
            assert!(Instant::now() < deadline, "no network namespace comes");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let (name, pid) = (format!("host{number}"), host.holder.id().to_string());
        let gateway = format!("10.77.{number}.1");
        ip(None, &["link", "add", &name, "type", "veth", "peer", "name", "eth0", "netns", &pid]);
        ip(None, &["address", "add", &format!("{gateway}/24"), "dev", &name]);
        ip(None, &["link", "set", &name, "up"]);
        ip(Some(&host), &["link", "set", "lo", "up"]);
        ip(Some(&host), &["address", "add", &format!("{}/24", host.ip), "dev", "eth0"]);
        ip(Some(&host), &["link", "set", "eth0", "up"]);
        ip(Some(&host), &["route", "add", "default", "via", &gateway]);
        host
    }

    /// The file that names its namespace.
    pub fn namespace(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/ns/net", self.holder.id()))
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// A command that runs in a namespace.
pub fn command_in(namespace: Option<&Path>, program: &str) -> Command {
    let Some(namespace) = namespace else { return Command::new(program) };
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", namespace.display())).arg("--").arg(program);
    command
}

fn ip(host: Option<&Host>, args: &[&str]) {
    let namespace = host.map(Host::namespace);
    let output = command_in(namespace.as_deref(), "ip").args(args).output().expect("ip, of iproute2");
    assert!(output.status.success(), "ip {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}
