//! A simulated vCenter as a process of its own, and a client on pyvmomi that changes it and reads it for comparison.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use zeroize::Zeroizing;
use zvm::inventory::Inventory;
use zvm::inventory::vcenter::{Fingerprint, Settings, Timing, Trust, VCenter};

pub(crate) const USER: &str = "user";
pub(crate) const PASSWORD: &str = "p<ä&\"ss";
pub(crate) const SITE: &str = "london";
pub(crate) const SOURCE: &str = "vc";

/// A simulated vCenter, for as long as this lives.
pub(crate) struct VCenterSim {
    process: Child,
    pub(crate) address: String,
    pub(crate) certificate: Fingerprint,
    python: PathBuf,
}

/// A session of pyvmomi at it.
pub(crate) struct Peer {
    process: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

fn peers() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../hwtests/peers")
}

impl VCenterSim {
    /// Starts one; `options` say how large it is.
    pub(crate) fn start(options: &[&str]) -> Self {
        let built = Command::new(peers().join("vcsim.sh")).stderr(Stdio::inherit()).output().expect("bash");
        assert!(built.status.success(), "hwtests/peers/vcsim.sh failed");
        let paths = String::from_utf8(built.stdout).expect("paths");
        let mut paths = paths.lines().map(PathBuf::from);
        let (program, python) = (paths.next().expect("simulator"), paths.next().expect("Python"));
        let mut process = Command::new(program)
            .args(["-user", USER, "-password", PASSWORD])
            .args(options)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the simulator");
        let mut line = String::new();
        let mut stdout = BufReader::new(process.stdout.take().expect("piped"));
        stdout.read_line(&mut line).expect("its first line");
        let words: Vec<&str> = line.split_whitespace().collect();
        let ["READY", address, sha256] = words[..] else { panic!("the simulator said {line:?}") };
        Self { process, address: address.into(), certificate: sha256.parse().expect("SHA-256"), python }
    }

    /// Settings that are right for it.
    pub(crate) fn settings(&self) -> Settings {
        Settings {
            name: SOURCE.into(),
            url: format!("https://{}", self.address),
            site: SITE.into(),
            user: USER.into(),
            password: Zeroizing::new(PASSWORD.into()),
            trust: Trust::Pin(self.certificate),
            timing: Timing::default(),
        }
    }

    /// A provider that reads it.
    pub(crate) fn provider(&self) -> VCenter {
        VCenter::new(self.settings()).expect("good settings")
    }

    /// A session of pyvmomi.
    pub(crate) fn peer(&self) -> Peer {
        let mut process = Command::new(&self.python)
            .arg("-B")
            .arg(peers().join("vcenter_peer.py"))
            .args([&self.address, USER, PASSWORD])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("Python");
        let to = process.stdin.take().expect("piped");
        let from = BufReader::new(process.stdout.take().expect("piped"));
        let mut peer = Peer { process, to, from };
        assert_eq!(peer.answer()["ready"], true);
        peer
    }
}

impl Drop for VCenterSim {
    fn drop(&mut self) {
        // It ends by itself with its standard input, and takes its temporary folders with it.
        drop(self.process.stdin.take());
        end(&mut self.process);
    }
}

impl Peer {
    /// Has something done, and gives its result.
    pub(crate) fn ask(&mut self, what: &str, mut command: Value) -> Value {
        command["do"] = json!(what);
        writeln!(self.to, "{command}").expect("a peer that listens");
        let answer = self.answer();
        assert_eq!(answer.get("error"), None, "{command}");
        answer["result"].clone()
    }

    /// Calls one of the simulator's own addresses.
    pub(crate) fn hook(&mut self, path: &str) -> Value {
        self.ask("hook", json!({ "path": path }))
    }

    /// How often the simulator was asked for a method.
    pub(crate) fn calls(&mut self, method: &str) -> u64 {
        self.hook("/test/calls")[method].as_u64().unwrap_or(0)
    }

    /// What it reads, object by object.
    pub(crate) fn read(&mut self) -> Value {
        self.ask("read", json!({ "site": SITE, "source": SOURCE }))
    }

    fn answer(&mut self) -> Value {
        let mut line = String::new();
        self.from.read_line(&mut line).expect("a peer that answers");
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("the peer said {line:?}: {error}"))
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn end(process: &mut Child) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while Instant::now() < deadline {
        if matches!(process.try_wait(), Ok(Some(_))) {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let _ = process.kill();
    let _ = process.wait();
}

/// An inventory as the peer gives it: by kind and id.
pub(crate) fn by_id(inventory: &Inventory) -> Value {
    let all = serde_json::to_value(inventory).expect("JSON");
    let kinds = ["clusters", "hosts", "networks", "datastores", "vms"].into_iter().map(|kind| {
        let list = all[kind].as_array().expect("a list");
        let objects = list.iter().map(|object| {
            let mut told = object.clone();
            if kind == "networks" {
                // A vCenter isn't asked which hosts have them.
                told.as_object_mut().expect("an object").remove("hosts");
            }
            for disk in told.get_mut("disks").and_then(Value::as_array_mut).into_iter().flatten() {
                // It has nothing to tell of these.
                for unknown in ["served", "written_bytes"] {
                    let told = disk.as_object_mut().expect("an object").remove(unknown);
                    assert_eq!(told, Some(Value::Null), "{unknown}");
                }
            }
            (object["origin"]["id"].as_str().expect("id").to_owned(), told)
        });
        let objects: Map<String, Value> = objects.collect();
        assert_eq!(objects.len(), list.len(), "{kind}: an id is there twice");
        (kind.to_owned(), Value::Object(objects))
    });
    Value::Object(kinds.collect())
}

/// The first object that isn't the same in both, if any. The free space of a datastore, which is the machine's, may differ.
pub(crate) fn difference(own: &Value, peer: &Value) -> Option<String> {
    for kind in ["clusters", "hosts", "networks", "datastores", "vms"] {
        let (own, peer) = (own[kind].as_object().expect("objects"), peer[kind].as_object().expect("objects"));
        let without_space = |object: Option<&Value>| {
            let mut object = object?.clone();
            let free_bytes = object.as_object_mut()?.remove("free_bytes");
            assert_eq!(
                free_bytes.is_some_and(|free_bytes| free_bytes.is_u64()),
                kind == "datastores",
                "{object}"
            );
            Some(object)
        };
        for id in own.keys().chain(peer.keys()) {
            if without_space(own.get(id)) != without_space(peer.get(id)) {
                return Some(format!(
                    "{kind} {id}:\n read     {:?}\n pyvmomi  {:?}",
                    own.get(id),
                    peer.get(id)
                ));
            }
        }
    }
    None
}
