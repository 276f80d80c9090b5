//! Ctrl-C and SIGTERM for a process that makes devices and mounts: noted at once, looked at between steps, so that what was made so far is
//! undone in order.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// From now on this process isn't ended by SIGINT and SIGTERM: [`check`] fails instead.
///
/// # Errors
/// The system's.
pub fn catch() -> Result<()> {
    let action = SigAction::new(SigHandler::Handler(note), SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        // SAFETY: the handler only stores to an atomic, which may be done at any moment.
        unsafe { sigaction(signal, &action) }.with_context(|| format!("catch {signal}"))?;
    }
    Ok(())
}

/// Whether a signal came.
pub fn came() -> bool {
    INTERRUPTED.load(Ordering::Acquire)
}

/// # Errors
/// When a signal came.
pub(crate) fn check() -> Result<()> {
    ensure!(!came(), "interrupted");
    Ok(())
}

extern "C" fn note(_signal: i32) {
    INTERRUPTED.store(true, Ordering::Release);
}
