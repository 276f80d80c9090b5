//! A site for tests: a real `zvm serve` with its own folder, ports and socket, and what is needed to ask it.

#![allow(dead_code, reason = "each test binary uses a part of it")]

pub(crate) mod authority;
pub(crate) mod guest;
pub(crate) mod libvirt_host;
pub(crate) mod pair;
pub(crate) mod recovered;
pub(crate) mod virsh_view;
pub(crate) mod vra;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use ::vra::api::VraId;
use ::vra::api::enroll::Token;
use ::vra::pki::{EnrollClientError, PkiDir};
use serde_json::Value;
use uuid::Uuid;

/// A manager that runs for as long as this lives. Its folder is removed when the test succeeded.
#[derive(Debug)]
pub(crate) struct Site {
    pub(crate) dir: PathBuf,
    pub(crate) port: u16,
    serve: Option<Child>,
}

/// What a command gave.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Site {
    /// Initialises a site and starts its manager.
    pub(crate) fn start() -> Self {
        let mut site = Self::without_manager();
        assert_eq!(site.zvm(&["init", "--name", "london"]).code, 0);
        site.serve();
        site
    }

    /// A folder with a configuration, nothing else.
    pub(crate) fn without_manager() -> Self {
        let dir =
            std::env::temp_dir().join(format!("zvm-test-{}", &Uuid::new_v4().simple().to_string()[..12]));
        std::fs::create_dir(&dir).expect("temporary folder");
        let port = free_udp_port();
        let config = format!(
            "state_dir = \"{dir}/state\"\nsocket = \"{dir}/run/zvm.sock\"\nlisten = \"127.0.0.1:{port}\"\n\
             [inventory]\nfile = \"{dir}/inventory.toml\"\nreread_interval_ms = 100\n\
             [reconcile]\ninterval_ms = 200\nrequest_timeout_ms = 3000\nretry_min_ms = 100\nretry_max_ms = 1000\n",
            dir = dir.display()
        );
        std::fs::write(dir.join("zvm.toml"), config).expect("configuration");
        Self { dir, port, serve: None }
    }

    /// Starts the manager and waits until it answers.
    pub(crate) fn serve(&mut self) {
        let log = File::options().create(true).append(true).open(self.dir.join("zvm.log")).expect("log");
        let child = Command::new(env!("CARGO_BIN_EXE_zvm"))
            .args(["--config".as_ref(), self.dir.join("zvm.toml").as_os_str(), "serve".as_ref()])
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("zvm serve");
        self.serve = Some(child);
        wait_for("the manager to answer", || self.zvm(&["status"]).code == 0);
    }

    /// The manager's process.
    pub(crate) fn pid(&self) -> u32 {
        self.serve.as_ref().expect("it runs").id()
    }

    /// Ends the manager as a power cut would.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.serve.take() {
            child.kill().expect("kill");
            child.wait().expect("wait");
        }
    }

    /// Runs a `zvm` command.
    pub(crate) fn zvm(&self, args: &[&str]) -> Answer {
        let output = Command::new(env!("CARGO_BIN_EXE_zvm"))
            .arg("--config")
            .arg(self.dir.join("zvm.toml"))
            .args(args)
            .stdin(Stdio::null())
            .output()
            .expect("zvm");
        Answer::from(output)
    }

    /// Runs a `zvm --json` command that must succeed.
    pub(crate) fn json(&self, args: &[&str]) -> Value {
        let answer = self.zvm(&[&["--json"], args].concat());
        assert_eq!(answer.code, 0, "{args:?}: {answer:?}");
        serde_json::from_str(&answer.stdout).expect("JSON")
    }

    /// A new token for a VRA.
    pub(crate) fn token(&self, name: &str) -> Token {
        let answer = self.zvm(&["vra", "token", "create", "--name", name]);
        assert_eq!(answer.code, 0, "{answer:?}");
        answer.stdout.trim().parse().expect("a token")
    }

    /// Enrols as a VRA would, with keys in `folder`.
    pub(crate) fn enrol(&self, folder: &str, token: &Token, vra: VraId) -> Result<(), EnrollClientError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        let pki = PkiDir::open(&self.dir.join(folder)).expect("key folder");
        let address = format!("127.0.0.1:{}", self.port);
        let own_address = Some("127.0.0.1:9".to_owned());
        runtime
            .block_on(::vra::pki::enroll(&pki, &address, token, vra, "as-it-calls-itself", own_address))
            .map(|_| ())
    }

    pub(crate) fn write_inventory(&self, text: &str) {
        // A new file each time, as an editor does it.
        let fresh = self.dir.join("inventory.new");
        std::fs::write(&fresh, text).expect("inventory");
        std::fs::rename(fresh, self.dir.join("inventory.toml")).expect("rename");
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("zvm.log")).unwrap_or_default()
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("kept {}; the manager's log:\n{}", self.dir.display(), self.log());
        } else {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}

impl From<Output> for Answer {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// Waits until something is so, up to half a minute.
pub(crate) fn wait_for(what: &str, mut so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !so() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

pub(crate) fn free_udp_port() -> u16 {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("socket");
    socket.local_addr().expect("address").port()
}

/// Whether any file under `dir` has `text` in it.
pub(crate) fn found_in_files(dir: &Path, text: &str) -> Option<PathBuf> {
    for entry in std::fs::read_dir(dir).expect("folder") {
        let path = entry.expect("entry").path();
        if path.is_dir() {
            if let Some(found) = found_in_files(&path, text) {
                return Some(found);
            }
        } else if std::fs::read(&path)
            .is_ok_and(|bytes| bytes.windows(text.len()).any(|window| window == text.as_bytes()))
        {
            return Some(path);
        }
    }
    None
}
