//! What answers like a QEMU guest agent, and remembers whether its guest is frozen.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

pub struct FakeAgent {
    pub socket: PathBuf,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    frozen: AtomicBool,
    refuses: AtomicBool,
    asked: Mutex<Vec<String>>,
}

impl FakeAgent {
    pub fn start(socket: &Path) -> Self {
        let listener = UnixListener::bind(socket).expect("socket");
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
