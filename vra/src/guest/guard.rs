//! The process that thaws a guest when the VRA can't: it sees the VRA's end by a pipe.

use std::io::{self, Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::sys::signal::SigSet;

use super::agent::GuestAgent;

/// Longest that a guest stays frozen.
pub const LONGEST_FREEZE: Duration = Duration::from_secs(8);

/// The VRA has thawed the guest itself.
const THAWED: &[u8] = b"thawed\n";

/// How long the guard tries to thaw, and how long it waits in between: the agent serves one at a time, and the VRA's own connection may not
/// have ended yet.
const TRIES_FOR: Duration = Duration::from_secs(60);
const TRY_EVERY: Duration = Duration::from_millis(100);

/// Longest that the agent may take to answer one of them.
const PATIENCE: Duration = Duration::from_secs(5);

/// A guard over one guest, seen from the VRA. Dropped, it thaws the guest.
#[derive(Debug)]
pub struct Guard {
    /// None once it was told.
    pipe: Option<ChildStdin>,
    /// None once somebody waits for it.
    child: Option<Child>,
}

impl Guard {
    /// Starts the guard of a guest that is going to be frozen, for at most so long from now.
    ///
    /// # Errors
    /// The system starts no process.
    pub fn start(program: &Path, socket: &Path, limit: Duration) -> io::Result<Self> {
        let mut command = Command::new(program);
        command.arg("guest-guard").arg("--agent").arg(socket);
        command.arg("--limit-ms").arg(limit.min(LONGEST_FREEZE).as_millis().to_string());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
        let pipe = child.stdin.take();
        Ok(Self { pipe, child: Some(child) })
    }

    /// The guest is thawed: there is nothing left to do.
    pub fn dismiss(mut self) {
        if let Some(mut pipe) = self.pipe.take() {
            // One that has ended by itself needs no word.
            let _ = pipe.write_all(THAWED);
        }
    }

    /// Whether it has ended: its time was over, and it has thawed the guest.
    pub fn has_ended(&mut self) -> bool {
        self.child.as_mut().is_none_or(|child| child.try_wait().is_ok_and(|status| status.is_some()))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // The end of the pipe is what it waits for.
        drop(self.pipe.take());
        if let Some(mut child) = self.child.take() {
            std::thread::spawn(move || child.wait());
        }
    }
}

/// The guard itself: waits until the VRA says that the guest is thawed, ends, or has taken longer than `limit`; then it thaws.
///
/// # Errors
/// The guest could not be thawed within a minute.
pub fn run(socket: &Path, limit: Duration) -> anyhow::Result<()> {
    // Whoever ends the VRA must not end this, too.
    SigSet::all().thread_block()?;
    // No terminal sends it signals, and whatever waits for the VRA's group doesn't wait for it.
    let _ = nix::unistd::setsid();
    if is_dismissed(limit.min(LONGEST_FREEZE)) {
        return Ok(());
    }
    let until = Instant::now() + TRIES_FOR;
    loop {
        match GuestAgent::connect(socket, PATIENCE).and_then(|mut agent| agent.thaw()) {
            Ok(()) => return Ok(()),
            Err(error) if Instant::now() >= until => return Err(error.into()),
            Err(_) => std::thread::sleep(TRY_EVERY),
        }
    }
}

/// Waits for the VRA's word, its end or the limit.
fn is_dismissed(limit: Duration) -> bool {
    let (sender, said) = mpsc::channel();
    std::thread::spawn(move || {
        let mut word = Vec::new();
        // Whether it ends by its end or by an error: nothing more will be said.
        let _ = io::stdin().take(THAWED.len() as u64).read_to_end(&mut word);
        let _ = sender.send(word == THAWED);
    });
    said.recv_timeout(limit).unwrap_or(false)
}
