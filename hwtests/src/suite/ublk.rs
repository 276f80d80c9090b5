//! Devices of `vra-ublk` for cases and benchmarks.

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;

use super::context::{Background, Context};

/// A device with the process that serves it. Dropped, it kills the one and deletes the other.
#[derive(Debug)]
pub struct UblkServer {
    /// The serving process.
    pub process: Background,
    /// The device's number.
    pub id: u32,
    deleted: bool,
}

impl UblkServer {
    /// Runs `vra-ublk add` with these words and waits for the device.
    pub fn add(context: &Context, words: &[&str]) -> Result<Self> {
        Self::start(context, &[&["vra-ublk", "add"], words].concat())
    }

    /// Runs `vra-ublk recover` for a device, with these words for the target.
    pub fn recover(context: &Context, id: u32, words: &[&str]) -> Result<Self> {
        Self::start(context, &[&["vra-ublk", "recover", &id.to_string()], words].concat())
    }

    /// The block device.
    pub fn device(&self) -> String {
        format!("/dev/ublkb{}", self.id)
    }

    /// A file of the block device's folder in sysfs.
    pub fn sysfs(&self, context: &Context, file: &str) -> Result<String> {
        context.read(format!("/sys/block/ublkb{}/{file}", self.id))
    }

    /// Deletes the device by command and sees its process end well.
    pub fn delete(mut self, context: &Context) -> Result<()> {
        context.run(&["vra-ublk", "del", &self.id.to_string()])?;
        self.deleted = true;
        self.process.finish(10).map(drop)
    }

    /// Kills the serving process as a crash would, and waits until the driver has noticed. Gives the device's number.
    pub fn crash(mut self, context: &Context) -> Result<u32> {
        self.process.kill()?;
        self.await_left(context)
    }

    /// Lets the serving process leave the device, and waits until the driver has noticed. Gives the device's number.
    pub fn leave(mut self, context: &Context, limit_s: u64) -> Result<u32> {
        self.process.signal(Signal::SIGHUP)?;
        self.process.finish(limit_s)?;
        self.await_left(context)
    }

    /// The driver of 6.12 sometimes keeps its control commands waiting for half a minute after such a death, so a list that
    /// can't be had counts as "not yet".
    fn await_left(mut self, context: &Context) -> Result<u32> {
        self.deleted = true;
        let id = self.id;
        let died = std::time::Instant::now();
        context.wait_for("the driver to notice that the server is gone", 60, || match state(id) {
            Ok(state) => Ok((state.as_deref() == Some("quiesced")).then_some(())),
            Err(error) => {
                context
                    .note(format_args!("{:.1} s after the death: {error:#}", died.elapsed().as_secs_f64()));
                Ok(None)
            }
        })?;
        Ok(id)
    }

    fn start(context: &Context, words: &[&str]) -> Result<Self> {
        let mut process = context.spawn(words)?;
        let id = context.wait_for("the device", 30, || {
            let output = process.output();
            if let Some(id) = output.lines().find_map(|line| line.strip_prefix("/dev/ublkb")) {
                return Ok(Some(id.trim().parse().context("reading the device's number")?));
            }
            ensure!(process.ended()?.is_none(), "{} ended:\n{output}", words.join(" "));
            Ok(None)
        })?;
        Ok(Self { process, id, deleted: false })
    }
}

impl Drop for UblkServer {
    fn drop(&mut self) {
        if !self.deleted {
            let _ = self.process.kill();
            let id = self.id.to_string();
            let _ = std::process::Command::new("vra-ublk").args(["del", "--force", &id]).output();
        }
    }
}

/// What `vra-ublk list` says of a device's state; none when there is no such device.
pub fn state(id: u32) -> Result<Option<String>> {
    Ok(list()?
        .iter()
        .find(|device| device["id"].as_u64() == Some(u64::from(id)))
        .and_then(|device| device["state"].as_str().map(str::to_owned)))
}

/// All devices, as `vra-ublk list --json` has them.
pub fn list() -> Result<Vec<serde_json::Value>> {
    let output = std::process::Command::new("vra-ublk").args(["list", "--json"]).output()?;
    ensure!(output.status.success(), "vra-ublk list: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout)?;
    text.lines().map(|line| serde_json::from_str(line).with_context(|| format!("reading {line}"))).collect()
}
