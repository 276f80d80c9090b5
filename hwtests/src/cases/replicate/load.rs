//! A guest's load on a protected disk.

use std::process::ExitStatus;

use anyhow::{Result, ensure};

use super::stand::delete_devices;
use crate::suite::context::{Background, Context};

/// A load of random writes whose content fio checks: 4k to 256k at depth 32 with fdatasync mixed in, and beside it, on another part of the
/// disk, small writes that are durable each by itself (FUA).
#[derive(Clone, Copy, Debug)]
pub(super) struct Load {
    /// How often everything is written and read back.
    pub rounds: u32,
    /// Pause after each 24 writes.
    pub pause_ms: u32,
}

impl Load {
    /// Bytes that a round writes.
    const ROUND_BYTES: u64 = Self::RANDOM_BYTES + Self::DURABLE_BYTES;
    const RANDOM_BYTES: u64 = 10 << 20;
    const DURABLE_BYTES: u64 = 512 << 10;

    pub(super) fn start(self, context: &Context, device: &str) -> Result<RunningLoad> {
        context.note(format_args!("a load of {} bytes", Self::ROUND_BYTES * u64::from(self.rounds)));
        let (filename, loops) = (format!("--filename={device}"), format!("--loops={}", self.rounds));
        let pause = format!("--thinktime={}ms", self.pause_ms);
        let sizes = [Self::RANDOM_BYTES, Self::DURABLE_BYTES].map(|bytes| format!("--size={bytes}"));
        let common = [
            "fio",
            &filename,
            &loops,
            &pause,
            "--thinktime_blocks=24",
            "--ioengine=libaio",
            "--direct=1",
            "--rw=randwrite",
            "--verify=crc32c",
            "--verify_fatal=1",
        ];
        let random = ["--name=random", "--bsrange=4k-256k", "--iodepth=32", "--fdatasync=24", &sizes[0]];
        let durable = ["--name=durable", "--bs=4k", "--iodepth=8", "--sync=dsync", "--offset=32m", &sizes[1]];
        Ok(RunningLoad(context.spawn(&[&common[..], &random, &durable].concat())?))
    }
}

/// A load that runs.
#[derive(Debug)]
pub(super) struct RunningLoad(Background);

impl RunningLoad {
    /// Begins the load once more if it has ended: without it, what is to happen under it would show nothing.
    pub(super) fn keep_running(&mut self, begin: impl FnOnce() -> Result<Self>) -> Result<()> {
        let Some(ended) = self.0.ended()? else { return Ok(()) };
        ensure!(ended.success(), "the load failed ({ended:?}):\n{}", self.0.output());
        *self = begin()?;
        Ok(())
    }

    /// Fails if the load has ended.
    pub(super) fn ensure_running(&mut self) -> Result<()> {
        let ended: Option<ExitStatus> = self.0.ended()?;
        ensure!(ended.is_none(), "the load ended too early ({ended:?}):\n{}", self.0.output());
        Ok(())
    }

    /// Waits for its end, which must have seen neither an error nor wrong data.
    pub(super) fn finish(mut self, limit_s: u64) -> Result<()> {
        self.0.finish(limit_s).map(drop)
    }
}

impl Drop for RunningLoad {
    /// A load whose device nobody serves can't be killed: the device has to go first.
    fn drop(&mut self) {
        if matches!(self.0.ended(), Ok(None)) {
            delete_devices();
        }
    }
}
