//! The process that freezes a guest and thaws it, whatever becomes of the VRA: it alone speaks with the agent, and sees the VRA's end by a pipe.

use std::cell::Cell;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::sys::signal::SigSet;
use serde::{Deserialize, Serialize};

use super::agent::{AgentError, GuestAgent};
use crate::report::chain;

/// Longest that a guest stays frozen.
pub const LONGEST_FREEZE: Duration = Duration::from_secs(8);

/// Longest that a guest may take to write out what is dirty and be frozen.
const FREEZE_WITHIN: Duration = Duration::from_secs(5);

/// How much later than that its guard may say how it went.
const TELL_WITHIN: Duration = Duration::from_secs(1);

/// How long the guard tries to thaw, and how long it waits in between.
const TRIES_FOR: Duration = Duration::from_secs(60);
const TRY_EVERY: Duration = Duration::from_millis(100);

/// Longest that the agent may take to answer one of them.
const PATIENCE: Duration = Duration::from_secs(5);

/// How often it is looked whether the connection still stands while the guest is frozen.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// What a guard tells, a line of JSON each: how freezing went, then how thawing did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Told {
    /// The guest is frozen.
    Frozen {
        /// How many of its filesystems.
        filesystems: u64,
    },
    /// It isn't, and won't be: the guard has ended.
    Refused {
        /// Why.
        reason: String,
    },
    /// It may be frozen, or become so, or not be so any more: the guard goes on to thaw it.
    Silent {
        /// Why.
        reason: String,
    },
    /// It is thawed: the guard has ended.
    Thawed,
    /// The VM was stopped: the guard has ended.
    Gone,
}

impl Told {
    /// Whether there is nothing left to thaw.
    pub const fn is_over(&self) -> bool {
        matches!(self, Self::Refused { .. } | Self::Thawed | Self::Gone)
    }
}

/// A guard over one guest, seen from the VRA. Dropped, it thaws the guest.
#[derive(Debug)]
pub struct Guard {
    /// Its end is the word to thaw.
    pipe: Option<ChildStdin>,
    told: mpsc::Receiver<Told>,
    /// It has told something since it froze the guest.
    is_unsure: Cell<bool>,
    has_thawed: Cell<bool>,
}

impl Guard {
    /// Starts a process that freezes a guest, for at most so long from now. `on_end` is called as soon as it isn't sure any more that the guest
    /// is frozen.
    ///
    /// # Errors
    /// The system starts no process.
    pub fn freeze(
        program: &Path,
        socket: &Path,
        limit: Duration,
        on_end: impl FnOnce() + Send + 'static,
    ) -> io::Result<Self> {
        Self::start(program, socket, Some(limit.min(LONGEST_FREEZE)), on_end)
    }

    /// Starts a process that thaws a guest.
    ///
    /// # Errors
    /// The system starts no process.
    pub fn only_thaw(program: &Path, socket: &Path) -> io::Result<Self> {
        Self::start(program, socket, None, || ())
    }

    fn start(
        program: &Path,
        socket: &Path,
        limit: Option<Duration>,
        on_end: impl FnOnce() + Send + 'static,
    ) -> io::Result<Self> {
        let mut command = Command::new(program);
        command.arg("guest-guard").arg("--agent").arg(socket);
        if let Some(limit) = limit {
            command.arg("--limit-ms").arg(limit.as_millis().to_string());
        }
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (pipe, stdout) = (child.stdin.take(), child.stdout.take().expect("it is a pipe"));
        let (sender, told) = mpsc::channel();
        std::thread::Builder::new()
            .name("guest-guard".into())
            .spawn(move || follow(child, stdout, sender, on_end))?;
        Ok(Self { pipe, told, is_unsure: Cell::new(false), has_thawed: Cell::new(false) })
    }

    /// How freezing went; none if it says nothing in time or died.
    pub fn how_it_went(&self, limit: Duration) -> Option<Told> {
        self.told.recv_timeout(FREEZE_WITHIN.min(limit) + TELL_WITHIN).ok()
    }

    /// Whether the guest that it has frozen is still so, as far as anybody knows.
    pub fn is_sure(&self) -> bool {
        self.wait(Duration::ZERO) == GuardEnd::NotYet && !self.is_unsure.get()
    }

    /// Says that the guest is to be thawed.
    pub fn thaw(&mut self) {
        self.pipe = None;
    }

    /// Waits until it has ended, at most so long.
    pub fn wait(&self, within: Duration) -> GuardEnd {
        let until = Instant::now() + within;
        loop {
            if self.has_thawed.get() {
                return GuardEnd::Thawed;
            }
            match self.told.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(told) => {
                    self.is_unsure.set(true);
                    self.has_thawed.set(told.is_over());
                }
                Err(mpsc::RecvTimeoutError::Timeout) => return GuardEnd::NotYet,
                Err(mpsc::RecvTimeoutError::Disconnected) => return GuardEnd::Died,
            }
        }
    }
}

/// How a guard has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuardEnd {
    /// The guest isn't frozen any more.
    Thawed,
    /// The guest may be frozen, and it sees to that.
    NotYet,
    /// The guest may be frozen, and nobody sees to that.
    Died,
}

/// Passes on what a guard tells, until it ends.
fn follow(mut child: Child, stdout: ChildStdout, sender: mpsc::Sender<Told>, on_end: impl FnOnce()) {
    let mut on_end = Some(on_end);
    for line in BufReader::new(stdout).lines().map_while(Result::ok) {
        let Ok(told) = serde_json::from_str::<Told>(&line) else { break };
        let is_frozen = matches!(told, Told::Frozen { .. });
        // One that nobody listens to is followed to its end nevertheless.
        let _ = sender.send(told);
        if !is_frozen && let Some(on_end) = on_end.take() {
            on_end();
        }
    }
    drop(sender);
    if let Some(on_end) = on_end {
        on_end();
    }
    let _ = child.wait();
}

/// The guard itself: freezes the guest, waits until the VRA says that it is to be thawed, ends, or has taken longer than `limit`; then thaws it.
/// Without a limit it only thaws.
///
/// # Errors
/// The guest could not be thawed within a minute.
pub fn run(socket: &Path, limit: Option<Duration>) -> anyhow::Result<()> {
    // Whoever ends the VRA must not end this, too.
    SigSet::all().thread_block()?;
    // No terminal sends it signals, and whatever waits for the VRA's group doesn't wait for it.
    let _ = nix::unistd::setsid();
    let agent = match limit {
        None => None,
        Some(limit) => {
            let until = Instant::now() + limit.min(LONGEST_FREEZE);
            let word = word_to_thaw();
            match freeze(socket, FREEZE_WITHIN.min(limit), &word) {
                Ok((agent, told)) => {
                    let is_frozen = matches!(told, Told::Frozen { .. });
                    tell(&told);
                    if is_frozen {
                        wait(&agent, &word, until);
                    }
                    Some(agent)
                }
                Err(reason) => {
                    tell(&Told::Refused { reason });
                    return Ok(());
                }
            }
        }
    };
    let told = thaw(socket, agent)?;
    tell(&told);
    Ok(())
}

/// Freezes the guest; an error if it isn't frozen and won't be.
fn freeze(socket: &Path, within: Duration, word: &mpsc::Receiver<()>) -> Result<(GuestAgent, Told), String> {
    let reason = |error: AgentError| chain(&error);
    let mut agent = GuestAgent::connect(socket, within).map_err(reason)?;
    if agent.is_frozen().map_err(reason)? {
        return Err("somebody else has frozen it already (a backup?)".to_owned());
    }
    if !matches!(word.try_recv(), Err(mpsc::TryRecvError::Empty)) {
        return Err("whoever asked for it wants it no more".to_owned());
    }
    let told = match agent.freeze() {
        Ok(filesystems) => Told::Frozen { filesystems },
        Err(error @ AgentError::Refused { .. }) if matches!(agent.is_frozen(), Ok(false)) => {
            return Err(reason(error));
        }
        Err(error) => Told::Silent { reason: reason(error) },
    };
    Ok((agent, told))
}

/// Waits for the VRA's word, its end or the limit.
fn wait(agent: &GuestAgent, word: &mpsc::Receiver<()>, until: Instant) {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero()
            || !matches!(word.recv_timeout(left.min(LOOK_EVERY)), Err(mpsc::RecvTimeoutError::Timeout))
        {
            return;
        }
        if !agent.is_connected() {
            // Whoever has the channel now may thaw the guest at any time.
            tell(&Told::Silent { reason: "the connection to its agent broke".to_owned() });
            return;
        }
    }
}

/// Thaws the guest, over this connection as long as it stands.
fn thaw(socket: &Path, mut agent: Option<GuestAgent>) -> Result<Told, AgentError> {
    let until = Instant::now() + TRIES_FOR;
    loop {
        let connected = match agent.take() {
            Some(mut connected) => match connected.renew(PATIENCE) {
                Ok(()) => Ok(connected),
                Err(error) => {
                    agent = Some(connected);
                    Err(error)
                }
            },
            None => GuestAgent::connect(socket, PATIENCE),
        };
        let tried = connected.and_then(|mut connected| {
            let thawed = connected.thaw();
            agent = Some(connected);
            thawed
        });
        let Err(error) = tried else { return Ok(Told::Thawed) };
        if error.is_gone() {
            return Ok(Told::Gone);
        }
        if error.is_broken() {
            agent = None;
        }
        if Instant::now() >= until {
            return Err(error);
        }
        std::thread::sleep(TRY_EVERY);
    }
}

/// Something arrives, or the channel ends, when the VRA wants the guest to be thawed or ends itself.
fn word_to_thaw() -> mpsc::Receiver<()> {
    let (sender, word) = mpsc::channel();
    std::thread::spawn(move || {
        // Whether it is a word, its end or an error: nothing more will be said.
        let _ = io::stdin().read(&mut [0]);
        let _ = sender.send(());
    });
    word
}

fn tell(told: &Told) {
    // The VRA may have ended.
    if let Ok(line) = serde_json::to_string(told) {
        let mut out = io::stdout().lock();
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::OpenOptionsExt;
    use std::path::PathBuf;

    use super::*;

    /// A program that is a guard as far as its words go.
    fn program(script: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("guard-{:08x}.sh", rand::random::<u32>()));
        let mut options = std::fs::OpenOptions::new();
        let mut file = options.write(true).create_new(true).mode(0o700).open(&path).expect("a file");
        writeln!(file, "#!/bin/sh\n{script}").expect("written");
        path
    }

    const FROZEN: &str = r#"echo '{"state":"frozen","filesystems":1}'"#;
    const THAWED: &str = r#"echo '{"state":"thawed"}'"#;
    const LIMIT: Duration = Duration::from_secs(5);

    fn started(script: &str) -> (Guard, mpsc::Receiver<()>) {
        let program = program(script);
        let (sender, ended) = mpsc::channel();
        let on_end = move || _ = sender.send(());
        let guard = Guard::freeze(&program, Path::new("/nowhere"), LIMIT, on_end).expect("started");
        assert_eq!(guard.how_it_went(LIMIT), Some(Told::Frozen { filesystems: 1 }));
        let _ = std::fs::remove_file(program);
        (guard, ended)
    }

    #[test]
    fn one_that_lives_thaws_at_the_word() {
        let (mut guard, ended) = started(&format!("{FROZEN}; read word; {THAWED}"));
        assert!(guard.is_sure() && ended.try_recv().is_err());
        assert_eq!(guard.wait(Duration::from_millis(50)), GuardEnd::NotYet);
        guard.thaw();
        assert_eq!(guard.wait(LIMIT), GuardEnd::Thawed);
        assert!(!guard.is_sure());
        ended.recv_timeout(LIMIT).expect("told once");
    }

    #[test]
    fn nobody_takes_the_guest_for_frozen_when_its_guard_has_died_or_lost_it() {
        let (guard, ended) = started(FROZEN);
        ended.recv_timeout(LIMIT).expect("told at its end");
        assert_eq!((guard.is_sure(), guard.wait(LIMIT)), (false, GuardEnd::Died));
        let lost = r#"echo '{"state":"silent","reason":"lost"}'"#;
        let (guard, ended) = started(&format!("{FROZEN}; {lost}; read word"));
        ended.recv_timeout(LIMIT).expect("told at once");
        assert_eq!((guard.is_sure(), guard.wait(Duration::ZERO)), (false, GuardEnd::NotYet));
    }
}
