//! A `vra serve` of its own, with folders and a socket of its own.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use ::vra::api::door::NbdListen;
use ::vra::api::vpg::VraEndpoint;
use ::vra::api::{
    ApiError, Attach, DoorAddress, DoorRequest, Request, Response, VmId, VolumeInfo, VraId, VraStatus,
};
use ::vra::config::Config;
use ::vra::control::{Client, ClientError};
use ::vra::daemon::LocalIdentity;
use ::vra::pki::{Identity, PkiDir};

use super::network::command_in;
use super::{Folder, TestCa};

/// How long anything may take before a test gives up.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub struct Vra {
    pub folder: Folder,
    pub id: VraId,
    pub endpoint: VraEndpoint,
    /// The network namespace that it runs in, if it isn't the test's own.
    namespace: Option<PathBuf>,
    child: Option<Child>,
}

fn any_port(ip: IpAddr) -> SocketAddr {
    UdpSocket::bind((ip, 0)).and_then(|socket| socket.local_addr()).expect("port")
}

impl Vra {
    /// A daemon, enrolled at the CA if there is one.
    pub fn start(name: &str, ca: Option<&TestCa>) -> Self {
        Self::start_with(Folder::new(name), name, ca, None, any_port(Ipv4Addr::LOCALHOST.into()))
    }

    /// One whose files are in memory, see [`Folder::in_memory`], and that listens on an address of this network namespace.
    pub fn start_in_memory(name: &str, ca: &TestCa, ip: IpAddr) -> Self {
        Self::start_with(Folder::in_memory(name), name, Some(ca), None, any_port(ip))
    }

    /// The same in another network namespace.
    pub fn start_in(name: &str, ca: &TestCa, namespace: PathBuf, listen: SocketAddr) -> Self {
        Self::start_with(Folder::in_memory(name), name, Some(ca), Some(namespace), listen)
    }

    fn start_with(
        folder: Folder,
        name: &str,
        ca: Option<&TestCa>,
        namespace: Option<PathBuf>,
        listen: SocketAddr,
    ) -> Self {
        let at = folder.0.display();
        std::fs::create_dir(folder.0.join("datastore")).expect("datastore");
        let config = format!(
            "name = \"{name}\"\nlisten = \"{listen}\"\nstate_dir = \"{at}/state\"\nrun_dir = \"{at}/run\"\n\
             datastores = [\"{at}/datastore\"]\n[memory]\nlock = false\narena_mib = 32\nretained_per_vm_mib = 16\n"
        );
        std::fs::write(folder.0.join("vra.toml"), config).expect("configuration");
        let config = Config::load(Some(&folder.0.join("vra.toml"))).expect("configuration");
        let mut identity = LocalIdentity::open(&config).expect("identity");
        let id = identity.vra();
        if let Some(ca) = ca {
            let pki = PkiDir::open(&config.pki_dir()).expect("folder");
            let request = pki.signing_request(Identity::vra(id)).expect("request");
            let reply = ca.sign(&request, id);
            pki.store(Identity::vra(id), &ca.token(), &reply.certificate_pem, &reply.ca_pem).expect("stored");
            identity.set_zvm(ca.zvm, None).expect("stored");
        }
        let endpoint = VraEndpoint { id, address: listen.to_string() };
        let mut vra = Self { folder, id, endpoint, namespace, child: None };
        vra.serve();
        vra
    }

    /// Starts the process and waits until it answers.
    pub fn serve(&mut self) {
        let log = std::fs::File::options().create(true).append(true).open(self.path("log")).expect("log");
        let mut child = self.command(&["serve"]);
        let child = child.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().expect("vra serve");
        self.child = Some(child);
        let deadline = Instant::now() + PATIENCE;
        while !self.run(&["list"]).status.success() {
            assert!(Instant::now() < deadline, "vra serve doesn't answer:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Adds to the configuration, for the next start.
    pub fn add_config(&self, text: &str) {
        let path = self.path("vra.toml");
        let config = std::fs::read_to_string(&path).expect("configuration");
        std::fs::write(path, config + text).expect("configuration");
    }

    /// Listens on another port after the next start.
    pub fn move_elsewhere(&mut self) {
        let path = self.path("vra.toml");
        let config = std::fs::read_to_string(&path).expect("configuration");
        let address = any_port(Ipv4Addr::LOCALHOST.into()).to_string();
        std::fs::write(path, config.replace(&self.endpoint.address, &address)).expect("configuration");
        self.endpoint.address = address;
    }

    /// The process.
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.as_ref().expect("runs").id()).expect("a process's number")
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// SIGTERM, and waits for the end.
    pub fn stop(&mut self) {
        let mut child = self.child.take().expect("runs");
        let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).expect("pid"));
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("signal");
        let status = child.wait().expect("end");
        assert!(status.success(), "vra serve ended with {status}:\n{}", self.log());
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = command_in(self.namespace.as_deref(), env!("CARGO_BIN_EXE_vra"));
        command.arg("--config").arg(self.path("vra.toml")).args(args);
        command
    }

    /// Runs `vra` against this daemon.
    pub fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("vra")
    }

    /// Runs `vra` and expects it to fail; its standard error.
    pub fn fail(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(!output.status.success(), "{args:?} succeeded");
        String::from_utf8(output.stderr).expect("text")
    }

    pub async fn client(&self) -> Client {
        Client::unix(&self.path("run/vra.sock"), "test").await.expect("client")
    }

    pub async fn ask(&self, request: Request) -> Response {
        let response = self.client().await.call(request).await;
        response.unwrap_or_else(|error| panic!("{error}\n{}", self.log()))
    }

    pub async fn refusal(&self, request: Request) -> ApiError {
        match self.client().await.call(request).await {
            Err(ClientError::Api(error)) => error,
            other => panic!("{other:?} where a refusal was expected"),
        }
    }

    pub async fn status(&self) -> VraStatus {
        match self.ask(Request::Status).await {
            Response::Status(status) => *status,
            other => panic!("{other:?}"),
        }
    }

    /// Waits until something is true of the status.
    pub async fn wait_for(&self, what: &str, is_so: impl Fn(&VraStatus) -> bool) -> VraStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.status().await;
            if is_so(&status) {
                return status;
            }
            assert!(Instant::now() < deadline, "never {what}: {status:#?}\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// A new sparse disk.
    pub fn disk(&self, name: &str, size_bytes: u64) -> PathBuf {
        let path = self.path(name);
        std::fs::File::create(&path).and_then(|file| file.set_len(size_bytes)).expect("disk");
        path
    }

    /// Attaches a disk by NBD on a socket of its own.
    pub async fn attach(&self, vm: VmId, vm_name: &str, path: &Path) -> VolumeInfo {
        let socket = path.with_extension("sock");
        let attach = Attach {
            vm,
            vm_name: vm_name.to_owned(),
            volume: None,
            number: None,
            path: path.to_owned(),
            door: DoorRequest::Nbd { listen: Some(NbdListen::Unix { path: socket }) },
            force_raw: false,
            shared: None,
        };
        match self.ask(Request::Attach(attach)).await {
            Response::Volume(volume) => volume,
            other => panic!("{other:?}"),
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.0.join(name)
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }
}

impl Drop for Vra {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Runs commands of qemu-io on a door; none where the machine has no qemu-io.
pub fn qemu_io(door: &DoorAddress, commands: &[String]) -> Option<()> {
    let mut qemu_io = Command::new("qemu-io");
    if commands.iter().all(|command| command.starts_with("read")) {
        qemu_io.arg("-r");
    }
    qemu_io.args(["-f", "raw", "-t", "none"]).arg(door.to_string());
    for command in commands {
        qemu_io.args(["-c", command]);
    }
    let Ok(output) = qemu_io.output() else {
        eprintln!("skipped: no qemu-io on this machine");
        return None;
    };
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(!text.contains("Pattern verification failed"), "{text}");
    Some(())
}

/// As [`qemu_io`], but nothing is ever flushed.
pub fn qemu_io_unflushed(door: &DoorAddress, commands: &[String]) {
    let mut qemu_io = Command::new("qemu-io");
    qemu_io.args(["-f", "raw", "-t", "unsafe"]).arg(door.to_string());
    for command in commands {
        qemu_io.args(["-c", command]);
    }
    let output = qemu_io.output().expect("qemu-io");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Copies a door's disk to a file with nbdcopy; none where the machine has no nbdcopy.
pub fn nbdcopy(door: &DoorAddress, to: &Path) -> Option<Vec<u8>> {
    let Ok(output) = Command::new("nbdcopy").arg(door.to_string()).arg(to).output() else {
        eprintln!("skipped: no nbdcopy on this machine");
        return None;
    };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(std::fs::read(to).expect("copy"))
}
