//! The product's own processes: started like an operator would, killed when dropped.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::interrupt;

/// Where the product's binaries are.
#[derive(Clone, Debug)]
pub struct Binaries {
    folder: PathBuf,
}

impl Binaries {
    /// Takes the folder of the running executable, where cargo and the rig put all of them.
    ///
    /// # Errors
    /// When a binary is missing, with the command that builds it.
    pub fn beside_this_one() -> Result<Self> {
        let here = std::env::current_exe().context("path of this executable")?;
        Self::in_folder(here.parent().context("folder of this executable")?)
    }

    /// Takes another folder, for a test whose executable lies elsewhere.
    ///
    /// # Errors
    /// When a binary is missing, with the command that builds it.
    pub fn in_folder(folder: &Path) -> Result<Self> {
        for name in ["vra", "zvm"] {
            ensure!(
                folder.join(name).exists(),
                "{} is missing: run `cargo build --workspace --bins`",
                folder.join(name).display()
            );
        }
        Ok(Self { folder: folder.to_path_buf() })
    }

    /// Path of one of them.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Runs a command to its end and returns what it printed.
    ///
    /// # Errors
    /// What the command said when it failed.
    pub fn run(&self, name: &str, arguments: &[&str]) -> Result<String> {
        let output = Command::new(self.path(name))
            .args(arguments)
            .stdin(Stdio::null())
            // Out of reach of the terminal's Ctrl-C: what it did must be known.
            .process_group(0)
            .output()
            .with_context(|| format!("start {name}"))?;
        ensure!(
            output.status.success(),
            "`{name} {}` failed ({}): {}",
            arguments.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Starts a command whose end is somebody else's to wait for.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(&self, name: &str, arguments: &[&str]) -> Result<Child> {
        let mut command = Command::new(self.path(name));
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null());
        command.spawn().with_context(|| format!("start {name}"))
    }

    /// Runs a command that prints JSON.
    ///
    /// # Errors
    /// What the command said when it failed, or that it printed no JSON.
    pub fn json(&self, name: &str, arguments: &[&str]) -> Result<Value> {
        let printed = self.run(name, arguments)?;
        serde_json::from_str(&printed)
            .with_context(|| format!("`{name} {}` printed no JSON: {printed}", arguments.join(" ")))
    }
}

/// A daemon of the product, killed when dropped.
pub struct Daemon {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Daemon {
    /// Starts `binary` with its output in `log`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(name: &str, binary: &Path, arguments: &[&str], log: &Path) -> Result<Self> {
        let file = File::options()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("open {}", log.display()))?;
        let errors = file.try_clone().context("duplicate the log's descriptor")?;
        let child = Command::new(binary)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(file)
            .stderr(errors)
            // Out of reach of the terminal's Ctrl-C: whoever started it ends it, in order.
            .process_group(0)
            .spawn()
            .with_context(|| format!("start {}", binary.display()))?;
        Ok(Self { name: name.to_owned(), child, log: log.to_path_buf() })
    }

    /// Waits until `ready` says yes.
    ///
    /// # Errors
    /// When the daemon ends or `seconds` pass first, with the end of its log.
    pub fn wait_until(&mut self, seconds: u64, mut ready: impl FnMut() -> bool) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(seconds);
        while !ready() {
            interrupt::check()?;
            if let Some(status) = self.child.try_wait().with_context(|| format!("wait for {}", self.name))? {
                bail!("{} ended ({status}):\n{}", self.name, self.log_end());
            }
            ensure!(
                Instant::now() < deadline,
                "{} is not ready after {seconds} s:\n{}",
                self.name,
                self.log_end()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Lets it do nothing any more (SIGSTOP).
    ///
    /// # Errors
    /// When it is gone.
    pub fn pause(&self) -> Result<()> {
        self.signal(Signal::SIGSTOP)
    }

    /// `kill -9`, and waits for the process to be gone.
    ///
    /// # Errors
    /// When it cannot be killed.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill().with_context(|| format!("kill {}", self.name))?;
        self.child.wait().with_context(|| format!("wait for {}", self.name))?;
        Ok(())
    }

    /// Asks it to end (SIGTERM) and waits.
    ///
    /// # Errors
    /// When it does not end within 20 s; it is killed then.
    pub fn stop(mut self) -> Result<()> {
        self.signal(Signal::SIGTERM)?;
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.child.try_wait().with_context(|| format!("wait for {}", self.name))?.is_none() {
            ensure!(
                Instant::now() < deadline,
                "{} did not end within 20 s of SIGTERM:\n{}",
                self.name,
                self.log_end()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(self.child.id().cast_signed());
        kill(pid, signal).with_context(|| format!("send {signal} to {}", self.name))
    }

    fn log_end(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
