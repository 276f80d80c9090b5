//! SIGINT and SIGTERM as something to ask for, so that what was begun is taken back.

use std::os::fd::AsFd;

use anyhow::bail;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// The signals that end the command. They are blocked in this thread and in those that it starts.
#[derive(Debug)]
pub(super) struct Signals(SignalFd);

impl Signals {
    /// To be waited for. Before any thread exists, so that all inherit the mask.
    pub(super) fn to_wait_for() -> anyhow::Result<Self> {
        Self::block(SfdFlags::SFD_CLOEXEC)
    }

    /// To be looked for now and then.
    pub(super) fn to_look_for() -> anyhow::Result<Self> {
        Self::block(SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
    }

    fn block(flags: SfdFlags) -> anyhow::Result<Self> {
        let mut signals = SigSet::empty();
        signals.add(Signal::SIGINT);
        signals.add(Signal::SIGTERM);
        signals.thread_block()?;
        Ok(Self(SignalFd::with_flags(&signals, flags)?))
    }

    /// Waits for one.
    pub(super) fn wait(&mut self) -> anyhow::Result<()> {
        loop {
            match self.0.read_signal() {
                Ok(Some(_)) => return Ok(()),
                Ok(None) | Err(nix::Error::EINTR) => {}
                Err(error) => {
                    return Err(
                        anyhow::Error::new(error).context(format!("cannot wait on {:?}", self.0.as_fd()))
                    );
                }
            }
        }
    }

    /// Goes on unless one has come.
    pub(super) fn check(&mut self) -> anyhow::Result<()> {
        match self.0.read_signal() {
            Ok(Some(_)) => bail!("interrupted"),
            _ => Ok(()),
        }
    }
}
