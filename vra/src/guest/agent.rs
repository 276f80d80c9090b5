use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;
use serde_json::{Value, json};

/// A connection to the QEMU guest agent of a VM, through the unix socket of its channel. Its protocol is JSON, a line each way
/// (qemu's `qga/qapi-schema.json`); while the guest is frozen it answers only what has to do with that.
#[derive(Debug)]
pub struct GuestAgent {
    stream: UnixStream,
    path: PathBuf,
    deadline: Instant,
    /// Read and not used yet.
    unread: Vec<u8>,
}

/// Why a guest's agent didn't do something.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The socket can't be reached: the guest doesn't run, or somebody else has the socket.
    #[error("cannot reach the guest agent at {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// It didn't answer in time, or the connection broke.
    #[error("the guest agent at {} doesn't answer", path.display())]
    Silent {
        /// The socket.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// It says no.
    #[error("the guest agent at {} refuses {command}: {reason}", path.display())]
    Refused {
        /// The socket.
        path: PathBuf,
        /// What was asked.
        command: &'static str,
        /// Its words.
        reason: String,
    },
    /// What it says makes no sense.
    #[error("the guest agent at {} gives an answer to {command} that makes no sense", path.display())]
    Nonsense {
        /// The socket.
        path: PathBuf,
        /// What was asked.
        command: &'static str,
    },
}

/// Longest answer, in bytes; those that are expected have some dozens.
const MAX_ANSWER_BYTES: usize = 64 << 10;

/// Before it the agent forgets what it was sent, and what comes before it in an answer is of no interest.
const SENTINEL: u8 = 0xff;

impl GuestAgent {
    /// Reaches the agent. All that is asked must be answered within `patience`.
    ///
    /// # Errors
    /// [`AgentError`]: nobody is there, or somebody who isn't a guest agent.
    pub fn connect(path: &Path, patience: Duration) -> Result<Self, AgentError> {
        let deadline = Instant::now() + patience;
        let stream = connect_within(path, patience)
            .map_err(|source| AgentError::Connect { path: path.to_owned(), source })?;
        let mut agent = Self { stream, path: path.to_owned(), deadline, unread: Vec::new() };
        agent.synchronise()?;
        Ok(agent)
    }

    /// Freezes the guest's filesystems, after writing out what is dirty; gives how many. A guest that has none, or that is frozen already,
    /// is an error.
    ///
    /// # Errors
    /// [`AgentError`]. If it doesn't answer, the guest may become frozen later.
    pub fn freeze(&mut self) -> Result<u64, AgentError> {
        let command = "guest-fsfreeze-freeze";
        let count = self.ask(command)?.as_u64().ok_or_else(|| self.nonsense(command))?;
        if count == 0 {
            let reason = "the guest has no filesystem that can be frozen".to_owned();
            return Err(AgentError::Refused { path: self.path.clone(), command, reason });
        }
        Ok(count)
    }

    /// Thaws the guest's filesystems; harmless if they aren't frozen.
    ///
    /// # Errors
    /// [`AgentError`].
    pub fn thaw(&mut self) -> Result<(), AgentError> {
        self.ask("guest-fsfreeze-thaw")?;
        match self.is_frozen()? {
            false => Ok(()),
            true => Err(self.nonsense("guest-fsfreeze-thaw")),
        }
    }

    /// Whether filesystems are frozen.
    ///
    /// # Errors
    /// [`AgentError`].
    pub fn is_frozen(&mut self) -> Result<bool, AgentError> {
        let command = "guest-fsfreeze-status";
        match self.ask(command)?.as_str() {
            Some("frozen") => Ok(true),
            Some("thawed") => Ok(false),
            _ => Err(self.nonsense(command)),
        }
    }

    /// Goes on with this connection after an answer that was given up: that answer, if it comes yet, is passed over. All that is asked from now
    /// on must be answered within `patience`.
    ///
    /// # Errors
    /// [`AgentError`].
    pub fn renew(&mut self, patience: Duration) -> Result<(), AgentError> {
        self.deadline = Instant::now() + patience;
        self.unread.clear();
        self.synchronise()
    }

    /// Whether the other end of the connection is still there.
    pub fn is_connected(&self) -> bool {
        let looked = recv(self.stream.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT);
        match looked {
            Ok(len_bytes) => len_bytes > 0,
            Err(errno) => matches!(errno, nix::errno::Errno::EAGAIN | nix::errno::Errno::EINTR),
        }
    }

    /// Answers to what a former user of the socket asked, or to what was given up, may still be under way.
    fn synchronise(&mut self) -> Result<(), AgentError> {
        let command = "guest-sync-delimited";
        let id = rand::random::<u32>() >> 1;
        let line = json!({ "execute": command, "arguments": { "id": id } }).to_string();
        self.send(&[&[SENTINEL], line.as_bytes(), b"\n"].concat())?;
        loop {
            // Until the sentinel, then until the line's end.
            self.take_until(SENTINEL)?;
            if self.answer(command)?.as_u64() == Some(id.into()) {
                return Ok(());
            }
        }
    }

    fn ask(&mut self, command: &'static str) -> Result<Value, AgentError> {
        self.send(format!("{}\n", json!({ "execute": command })).as_bytes())?;
        self.answer(command)
    }

    fn answer(&mut self, command: &'static str) -> Result<Value, AgentError> {
        let line = self.take_until(b'\n')?;
        let mut answer: Value = serde_json::from_slice(&line).map_err(|_| self.nonsense(command))?;
        if let Some(error) = answer.get("error") {
            let reason = error.get("desc").and_then(Value::as_str).unwrap_or("it gives no reason");
            let reason = reason.chars().filter(|c| !c.is_control()).take(300).collect();
            return Err(AgentError::Refused { path: self.path.clone(), command, reason });
        }
        answer.get_mut("return").map(Value::take).ok_or_else(|| self.nonsense(command))
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), AgentError> {
        let left = self.time_left()?;
        let sent = self.stream.set_write_timeout(Some(left)).and_then(|()| self.stream.write_all(bytes));
        sent.map_err(|source| self.silent(source))
    }

    /// What comes before this byte, which is taken too.
    fn take_until(&mut self, end: u8) -> Result<Vec<u8>, AgentError> {
        let mut looked_at = 0;
        loop {
            if let Some(place) = self.unread[looked_at..].iter().position(|byte| *byte == end) {
                let mut taken: Vec<u8> = self.unread.drain(..=looked_at + place).collect();
                taken.pop();
                return Ok(taken);
            }
            looked_at = self.unread.len();
            if looked_at > MAX_ANSWER_BYTES {
                return Err(self.silent(io::Error::other("it sends more than any answer has")));
            }
            let left = self.time_left()?;
            let mut buffer = [0; 4096];
            let read = self.stream.set_read_timeout(Some(left)).and_then(|()| self.stream.read(&mut buffer));
            match read {
                Ok(0) => return Err(self.silent(io::ErrorKind::UnexpectedEof.into())),
                Ok(len_bytes) => self.unread.extend_from_slice(&buffer[..len_bytes]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(self.silent(source)),
            }
        }
    }

    fn time_left(&self) -> Result<Duration, AgentError> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(self.silent(io::ErrorKind::TimedOut.into())) } else { Ok(left) }
    }

    fn silent(&self, source: io::Error) -> AgentError {
        AgentError::Silent { path: self.path.clone(), source }
    }

    fn nonsense(&self, command: &'static str) -> AgentError {
        AgentError::Nonsense { path: self.path.clone(), command }
    }
}

impl AgentError {
    /// Whether the connection can be of use no more.
    pub fn is_broken(&self) -> bool {
        match self {
            Self::Connect { .. } => true,
            Self::Silent { source, .. } => {
                !matches!(source.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock)
            }
            Self::Refused { .. } | Self::Nonsense { .. } => false,
        }
    }

    /// Whether there is no socket: QEMU removes it when the VM ends.
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Connect { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

/// A connection, or an error in time: while others wait at the socket to be served, `connect` waits, too.
fn connect_within(path: &Path, patience: Duration) -> io::Result<UnixStream> {
    let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    // Nought would be for ever.
    let patience_ms = i64::try_from(patience.as_millis()).unwrap_or(i64::MAX).max(1);
    let wait = TimeVal::new(patience_ms / 1000, patience_ms % 1000 * 1000);
    setsockopt(&fd, sockopt::SendTimeout, &wait)?;
    match connect(fd.as_raw_fd(), &UnixAddr::new(path)?) {
        Ok(()) => Ok(fd.into()),
        Err(nix::errno::Errno::EAGAIN) => {
            Err(io::Error::new(io::ErrorKind::TimedOut, "others use it, and it serves one at a time"))
        }
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    /// Something at a socket that answers each line by `answer`.
    fn served(name: &str, answer: impl Fn(&Value) -> Vec<u8> + Send + 'static) -> PathBuf {
        let path = std::env::temp_dir().join(format!("agent-{name}-{:08x}.sock", rand::random::<u32>()));
        let listener = UnixListener::bind(&path).expect("socket");
        let at = path.clone();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a client");
            let _ = std::fs::remove_file(at);
            let (mut line, mut byte) = (Vec::new(), [0]);
            while stream.read_exact(&mut byte).is_ok() {
                match byte[0] {
                    SENTINEL => line.clear(),
                    b'\n' => {
                        let asked: Value = serde_json::from_slice(&line).expect("JSON");
                        line.clear();
                        if stream.write_all(&answer(&asked)).is_err() {
                            return;
                        }
                    }
                    other => line.push(other),
                }
            }
        });
        path
    }

    fn sync(asked: &Value) -> Vec<u8> {
        let mut answer = b"{\"return\": {}}\nold\xff".to_vec();
        answer.extend(format!("{{\"return\": {}}}\n", asked["arguments"]["id"]).into_bytes());
        answer
    }

    const PATIENCE: Duration = Duration::from_secs(5);

    #[test]
    fn it_freezes_and_thaws() {
        let frozen = std::sync::Mutex::new(false);
        let path = served("good", move |asked| match asked["execute"].as_str() {
            Some("guest-sync-delimited") => sync(asked),
            Some("guest-fsfreeze-freeze") => {
                *frozen.lock().expect("alone") = true;
                b"{\"return\": 2}\n".to_vec()
            }
            Some("guest-fsfreeze-thaw") => {
                *frozen.lock().expect("alone") = false;
                b"{\"return\": 2}\n".to_vec()
            }
            _ if *frozen.lock().expect("alone") => b"{\"return\": \"frozen\"}\n".to_vec(),
            _ => b"{\"return\": \"thawed\"}\n".to_vec(),
        });
        let mut agent = GuestAgent::connect(&path, PATIENCE).expect("an agent");
        assert!(!agent.is_frozen().expect("told"));
        assert_eq!(agent.freeze().expect("frozen"), 2);
        assert!(agent.is_frozen().expect("told"));
        agent.thaw().expect("thawed");
        assert!(agent.is_connected());
    }

    #[test]
    fn an_answer_that_was_given_up_is_passed_over() {
        let path = served("late", |asked| match asked["execute"].as_str() {
            Some("guest-sync-delimited") => sync(asked),
            Some("guest-fsfreeze-freeze") => {
                std::thread::sleep(Duration::from_millis(400));
                b"{\"return\": 2}\n".to_vec()
            }
            _ => b"{\"return\": \"thawed\"}\n".to_vec(),
        });
        let mut agent = GuestAgent::connect(&path, Duration::from_millis(200)).expect("an agent");
        let error = agent.freeze().expect_err("too late");
        assert!(matches!(error, AgentError::Silent { .. }) && !error.is_broken(), "{error}");
        let error = agent.renew(Duration::from_millis(20)).expect_err("it isn't done yet");
        assert!(!error.is_broken(), "{error}");
        agent.renew(PATIENCE).expect("the same connection");
        assert!(!agent.is_frozen().expect("told"));
    }

    #[test]
    fn a_socket_that_others_wait_at_is_given_up_in_time() {
        let path = std::env::temp_dir().join(format!("agent-full-{:08x}.sock", rand::random::<u32>()));
        let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).expect("socket");
        nix::sys::socket::bind(fd.as_raw_fd(), &UnixAddr::new(&path).expect("short")).expect("bound");
        nix::sys::socket::listen(&fd, nix::sys::socket::Backlog::new(1).expect("small")).expect("listens");
        let patience = Duration::from_millis(200);
        let began = Instant::now();
        let errors: Vec<_> =
            (0..4).map(|_| GuestAgent::connect(&path, patience).expect_err("nobody serves")).collect();
        let _ = std::fs::remove_file(&path);
        assert!(matches!(errors[0], AgentError::Silent { .. }) && began.elapsed() < PATIENCE, "{errors:?}");
        assert!(matches!(errors[3], AgentError::Connect { .. }) && !errors[3].is_gone(), "{errors:?}");
    }

    #[test]
    fn what_is_wrong_is_told_and_never_waited_for_longer() {
        let error = GuestAgent::connect(Path::new("/nowhere/agent.sock"), PATIENCE).expect_err("nobody");
        assert!(error.is_gone() && error.is_broken(), "{error}");
        let refuses = served("refuses", |asked| match asked["execute"].as_str() {
            Some("guest-sync-delimited") => sync(asked),
            _ => b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"not\\u0007 now\"}}\n".to_vec(),
        });
        let error = GuestAgent::connect(&refuses, PATIENCE).expect("an agent").freeze().expect_err("refused");
        assert!(error.to_string().ends_with("refuses guest-fsfreeze-freeze: not now"), "{error}");
        let empty = served("empty", |asked| match asked["execute"].as_str() {
            Some("guest-sync-delimited") => sync(asked),
            _ => b"{\"return\": 0}\n".to_vec(),
        });
        let error = GuestAgent::connect(&empty, PATIENCE).expect("an agent").freeze().expect_err("nothing");
        assert!(error.to_string().contains("no filesystem"), "{error}");
        for (name, answer) in
            [("text", &b"hello\n"[..]), ("number", b"\xff7\n"), ("other", b"\xff{\"return\": 1}\n")]
        {
            let path = served(name, move |_| answer.to_vec());
            let error = GuestAgent::connect(&path, Duration::from_millis(300)).expect_err("no agent");
            assert!(
                matches!(error, AgentError::Nonsense { .. } | AgentError::Silent { .. }),
                "{name}: {error}"
            );
        }
        let endless = served("endless", |_| vec![b'x'; MAX_ANSWER_BYTES + 5000]);
        let error = GuestAgent::connect(&endless, PATIENCE).expect_err("no agent");
        assert!(matches!(error, AgentError::Silent { .. }), "{error}");
        let began = Instant::now();
        let silent = served("silent", |_| Vec::new());
        let error = GuestAgent::connect(&silent, Duration::from_millis(200)).expect_err("no answer");
        assert!(matches!(error, AgentError::Silent { .. }) && began.elapsed() < PATIENCE, "{error}");
    }
}
