//! What a case inside a machine works with: commands, background processes, scratch space, waiting.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;

/// The surroundings of one running case. What it hands out is gone when it is dropped.
#[derive(Debug)]
pub struct Context {
    scratch: PathBuf,
    disks: Vec<String>,
    loop_devices: Vec<String>,
}

/// Ends a case as skipped, with this reason.
#[derive(Debug)]
pub(crate) struct Skip(pub(crate) String);

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Skip {}

/// A process in the background, killed when it is dropped.
#[derive(Debug)]
pub struct Background {
    child: Child,
    name: String,
    /// Where its output goes.
    pub log: PathBuf,
}

impl Context {
    /// Surroundings with a scratch folder named after the case.
    pub fn new(case: &str) -> Result<Self> {
        let scratch = std::env::temp_dir().join(format!("rig-{case}-{}", std::process::id()));
        fs::create_dir_all(&scratch).with_context(|| format!("creating {}", scratch.display()))?;
        Ok(Self { scratch, disks: Vec::new(), loop_devices: Vec::new() })
    }

    /// Gives the case its empty disks: those of its machine, or natively loop devices, never a disk of the host.
    pub(crate) fn attach_disks(&mut self, sizes_mib: &[u64]) -> Result<()> {
        for (index, size_mib) in sizes_mib.iter().enumerate() {
            if self.is_native() {
                let image = self.path(&format!("disk{index}.raw"));
                fs::File::create(&image)?.set_len(size_mib << 20)?;
                let device =
                    self.run(&["losetup", "--find", "--show", &image.to_string_lossy()])?.trim().to_owned();
                self.loop_devices.push(device.clone());
                self.disks.push(device);
            } else {
                let letter = char::from(b'a' + u8::try_from(index)?);
                self.disks.push(format!("/dev/vd{letter}"));
            }
        }
        Ok(())
    }

    /// A disk that the case asked for by its machine's needs.
    pub fn disk(&self, index: usize) -> &str {
        &self.disks[index]
    }

    /// A place for a file that goes when the case ends.
    pub fn path(&self, name: &str) -> PathBuf {
        self.scratch.join(name)
    }

    /// `kvm`, `tcg`, or `native`.
    pub fn mode(&self) -> String {
        std::env::var("RIG_MODE").unwrap_or_else(|_| "native".into())
    }

    /// Whether this is the host itself.
    pub fn is_native(&self) -> bool {
        self.mode() == "native"
    }

    /// Says something into the case's log.
    pub fn note(&self, what: impl fmt::Display) {
        println!("- {what}");
    }

    /// Ends the case as skipped: return this error.
    pub fn skip(&self, reason: impl Into<String>) -> anyhow::Error {
        Skip(reason.into()).into()
    }

    /// Runs a command, given as its words, to its end; fails unless it succeeds. Gives its standard output.
    pub fn run(&self, words: &[&str]) -> Result<String> {
        let (status, stdout, stderr) = self.try_run(words)?;
        ensure!(status.success(), "`{}`: {status}\n{stdout}{stderr}", words.join(" "));
        Ok(stdout)
    }

    /// Runs a command and gives how it ended, its standard output and its standard error.
    pub fn try_run(&self, words: &[&str]) -> Result<(ExitStatus, String, String)> {
        let started = Instant::now();
        let output =
            command(words)?.stdin(Stdio::null()).output().with_context(|| format!("running {}", words[0]))?;
        self.note(format_args!(
            "{} ({}, {:.1} s)",
            words.join(" "),
            output.status,
            started.elapsed().as_secs_f64()
        ));
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok((output.status, text(output.stdout), text(output.stderr)))
    }

    /// Starts a command in the background; its output goes to a file of the scratch folder.
    pub fn spawn(&self, words: &[&str]) -> Result<Background> {
        let number = fs::read_dir(&self.scratch)?.count();
        let log = self.path(&format!("{}-{number}.log", words[0].rsplit('/').next().unwrap_or(words[0])));
        let file = fs::File::create(&log)?;
        let child = command(words)?
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("starting {}", words[0]))?;
        self.note(format_args!("{} & (pid {})", words.join(" "), child.id()));
        Ok(Background { child, name: words[0].to_owned(), log })
    }

    /// Waits until `ready` gives something; fails after `limit_s` seconds.
    pub fn wait_for<T>(
        &self,
        what: &str,
        limit_s: u64,
        mut ready: impl FnMut() -> Result<Option<T>>,
    ) -> Result<T> {
        let started = Instant::now();
        loop {
            if let Some(value) = ready()? {
                return Ok(value);
            }
            if started.elapsed() > Duration::from_secs(limit_s) {
                bail!("waited {limit_s} s for {what}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The trimmed content of a file, as those of sysfs.
    pub fn read(&self, path: impl AsRef<Path>) -> Result<String> {
        let path = path.as_ref();
        Ok(fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?.trim().to_owned())
    }

    /// Runs fio with these options; fails on any error that it counts.
    pub fn fio(&self, options: &[&str]) -> Result<FioReport> {
        let words = [&["fio", "--output-format=json", "--name=job", "--group_reporting"], options].concat();
        FioReport::parse(&self.run(&words)?)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        for device in &self.loop_devices {
            let _ = Command::new("losetup").args(["--detach", device]).status();
        }
        let _ = fs::remove_dir_all(&self.scratch);
    }
}

impl Background {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has said so far.
    pub fn output(&self) -> String {
        fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// `kill -9`, and waits for its end.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Sends SIGTERM.
    pub fn terminate(&self) -> Result<()> {
        self.signal(Signal::SIGTERM)
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = nix::unistd::Pid::from_raw(self.child.id().cast_signed());
        Ok(nix::sys::signal::kill(pid, signal)?)
    }

    /// Waits for its end; fails when it takes longer than `limit_s` seconds or ends badly.
    pub fn finish(&mut self, limit_s: u64) -> Result<String> {
        let started = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            ensure!(
                started.elapsed() < Duration::from_secs(limit_s),
                "{} did not end in {limit_s} s:\n{}",
                self.name,
                self.output()
            );
            std::thread::sleep(Duration::from_millis(20));
        };
        ensure!(status.success(), "{}: {status}\n{}", self.name, self.output());
        Ok(self.output())
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What matters of fio's report.
#[derive(Clone, Copy, Debug, Default)]
pub struct FioReport {
    /// Reads per second.
    pub read_iops: f64,
    /// Writes per second.
    pub write_iops: f64,
    /// Bytes per second read and written.
    pub bytes_per_s: f64,
    /// 99th percentile of the time that a write takes, µs.
    pub write_p99_us: f64,
    /// The same of a read.
    pub read_p99_us: f64,
}

impl FioReport {
    /// Reads fio's JSON.
    pub fn parse(text: &str) -> Result<Self> {
        let start = text.find('{').context("fio gave no report")?;
        let all: serde_json::Value = serde_json::from_str(&text[start..]).context("reading fio's report")?;
        let job = &all["jobs"][0];
        ensure!(job["error"].as_i64() == Some(0), "fio counts errors: {}", job["error"]);
        let number = |direction: &str, key: &str| job[direction][key].as_f64().unwrap_or(0.0);
        let p99_us = |direction: &str| {
            job[direction]["clat_ns"]["percentile"]["99.000000"].as_f64().unwrap_or(0.0) / 1000.0
        };
        Ok(Self {
            read_iops: number("read", "iops"),
            write_iops: number("write", "iops"),
            bytes_per_s: number("read", "bw_bytes") + number("write", "bw_bytes"),
            write_p99_us: p99_us("write"),
            read_p99_us: p99_us("read"),
        })
    }
}

fn command(words: &[&str]) -> Result<Command> {
    let (program, args) = words.split_first().context("an empty command")?;
    let mut command = Command::new(program);
    command.args(args);
    Ok(command)
}
