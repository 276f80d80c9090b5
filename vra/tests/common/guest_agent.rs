//! What answers like a QEMU guest agent, and remembers whether its guest is frozen.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, socket};
use serde_json::{Value, json};

pub struct FakeAgent {
    pub socket: PathBuf,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    frozen: AtomicBool,
    refuses: AtomicBool,
    freeze_after: Mutex<Duration>,
    asked: Mutex<Vec<String>>,
}

impl FakeAgent {
    pub fn start(socket: &Path) -> Self {
        let listener = listen(socket);
        let state = Arc::<State>::default();
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            // One client at a time, as the channel's socket has it.
            for stream in listener.incoming() {
                serve(stream.expect("a client"), &shared);
            }
        });
        Self { socket: socket.to_owned(), state }
    }

    pub fn is_frozen(&self) -> bool {
        self.state.frozen.load(Ordering::SeqCst)
    }

    /// Says no to freezing from now on.
    pub fn refuse(&self, refuses: bool) {
        self.state.refuses.store(refuses, Ordering::SeqCst);
    }

    /// As if somebody else had frozen or thawed the guest.
    pub fn set_frozen(&self, is_frozen: bool) {
        self.state.frozen.store(is_frozen, Ordering::SeqCst);
    }

    /// Takes so long to freeze from now on.
    pub fn freeze_after(&self, delay: Duration) {
        *self.state.freeze_after.lock().expect("no panic") = delay;
    }

    /// What it was asked to freeze and thaw, since the last call.
    pub fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.state.asked.lock().expect("no panic"))
    }

    /// Waits until it is thawed; how long that took.
    pub async fn wait_until_thawed(&self, within: Duration) -> Duration {
        let began = Instant::now();
        while self.is_frozen() {
            assert!(began.elapsed() < within, "still frozen after {within:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        began.elapsed()
    }
}

/// A socket as QEMU makes it: others wait in a queue of one.
fn listen(path: &Path) -> UnixListener {
    let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).expect("socket");
    bind(fd.as_raw_fd(), &UnixAddr::new(path).expect("a short path")).expect("bound");
    nix::sys::socket::listen(&fd, Backlog::new(1).expect("small")).expect("listens");
    fd.into()
}

fn serve(mut stream: UnixStream, state: &State) {
    let (mut line, mut byte) = (Vec::new(), [0]);
    while stream.read_exact(&mut byte).is_ok() {
        match byte[0] {
            0xff => line.clear(),
            b'\n' => {
                let asked: Value = serde_json::from_slice(&line).expect("JSON");
                line.clear();
                if stream.write_all(&answer(&asked, state)).is_err() {
                    return;
                }
            }
            other => line.push(other),
        }
    }
}

fn answer(asked: &Value, state: &State) -> Vec<u8> {
    let name = asked["execute"].as_str().expect("a command").to_owned();
    let value = match name.as_str() {
        "guest-sync-delimited" => {
            let answer = json!({ "return": asked["arguments"]["id"] }).to_string();
            return [&b"\xff"[..], answer.as_bytes(), b"\n"].concat();
        }
        "guest-fsfreeze-status" => {
            json!({ "return": if state.frozen.load(Ordering::SeqCst) { "frozen" } else { "thawed" } })
        }
        "guest-fsfreeze-freeze" if state.refuses.load(Ordering::SeqCst) => {
            json!({ "error": { "class": "GenericError", "desc": "a hook said no" } })
        }
        "guest-fsfreeze-freeze" => {
            let delay = *state.freeze_after.lock().expect("no panic");
            std::thread::sleep(delay);
            state.frozen.store(true, Ordering::SeqCst);
            json!({ "return": 1 })
        }
        "guest-fsfreeze-thaw" => json!({ "return": u8::from(state.frozen.swap(false, Ordering::SeqCst)) }),
        other => json!({ "error": { "class": "CommandNotFound", "desc": other } }),
    };
    if name.ends_with("freeze") || name.ends_with("thaw") {
        state.asked.lock().expect("no panic").push(name);
    }
    format!("{value}\n").into_bytes()
}
