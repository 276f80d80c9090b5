//! Configuration (`/etc/holdfast/vra.toml`) and persistent state.

mod secret_file;
mod store;

pub use secret_file::{SecretFileError, SiteKeyFileError, read_secret, read_site_keys};
pub use store::{Store, StoreError, write_atomic};

use std::fs::File;
use std::io::{self, Read};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use serde::de::Error;
use serde::{Deserialize, Deserializer};

/// Where the configuration is looked for.
pub const CONFIG_PATH: &str = "/etc/holdfast/vra.toml";

/// The VRA's settings. Every key has a default; an unknown key is an error, so that a misspelt one can't be ignored.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The name that status and lists show; by default the host's.
    pub name: String,
    /// UDP address of the link.
    #[serde(deserialize_with = "socket_address")]
    pub listen: SocketAddr,
    /// `host:port` under which others reach it; told to the ZVM at enrolment.
    pub advertise: Option<String>,
    /// Keys, certificates and state.
    pub state_dir: PathBuf,
    /// The control socket `vra.sock`, and NBD sockets.
    pub run_dir: PathBuf,
    /// Folders in which this VRA may keep journals and recovery disks.
    pub datastores: Vec<PathBuf>,
    /// What is logged, as `tracing` filters are written.
    pub log: String,
    /// The threads that serve disks.
    pub reactors: ReactorConfig,
    /// Memory.
    pub memory: MemoryConfig,
    /// Doors of protected disks.
    pub doors: DoorConfig,
    /// Replication target.
    pub target: TargetConfig,
    /// The scrub of journals.
    pub scrub: ScrubConfig,
}

/// `[reactors]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ReactorConfig {
    /// How many threads serve all disks, 1 to 64; by default one for each two CPUs, at most 8.
    pub threads: Option<usize>,
    /// Entries of each thread's ring, a power of two from 64 to 32,768.
    pub ring_entries: u32,
}

/// `[memory]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MemoryConfig {
    /// On a host with ublk: lock all memory and mark the process as one that writes disks back, so that memory reclaim never waits for
    /// disks that wait for it. Off only for tests.
    pub lock: bool,
    /// Memory for guest data on its way to disk and target, for all protected disks together, in MiB: 16 to 1,048,576.
    pub arena_mib: u32,
    /// Of a VM's writes that the target doesn't have yet, this much at most is kept, in MiB: 1 to 1,048,576.
    pub retained_per_vm_mib: u32,
}

/// `[doors]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DoorConfig {
    /// Queues of a ublk device, 1 to 32.
    pub queues: u16,
    /// Requests in flight for each queue, 1 to 1024.
    pub depth: u16,
    /// The group whose members may connect to the common NBD socket: that of the host's QEMU. Without one only root may.
    pub nbd_group: Option<String>,
}

/// `[target]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TargetConfig {
    /// Threads that write journals, 1 to 64.
    pub journal_threads: usize,
    /// Memory for writes that have arrived and are not on disk yet, of all VMs, in MiB: 32 to 1,048,576.
    pub memory_mib: u32,
    /// Space that a view's writes may use on the datastore, for each disk, in MiB: 1 to 1,048,576. Reserved when the view is opened.
    pub scratch_mib: u32,
    /// Memory for the indexes of open views, of all VMs, in MiB: 64 to 1,048,576. A view that takes more isn't opened.
    pub views_memory_mib: u32,
    /// A file of site keys, for journals that are encrypted, on a host without a ZVM or to start without it; the ZVM's replace them.
    pub site_key_file: Option<PathBuf>,
}

/// `[scrub]`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ScrubConfig {
    /// How fast it reads, all journals together, in MiB per second, up to 65,536; 0: not at all.
    pub mib_per_s: u32,
    /// How long a segment must have been full, in seconds.
    pub cold_after_s: u32,
    /// From the beginning of one pass over a journal to that of the next, in seconds, at least 1.
    pub pass_every_s: u32,
}

impl Default for ScrubConfig {
    fn default() -> Self {
        Self { mib_per_s: 16, cold_after_s: 600, pass_every_s: 7 * 86_400 }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            name: hostname(),
            listen: SocketAddr::from((Ipv4Addr::UNSPECIFIED, 9710)),
            advertise: None,
            state_dir: "/var/lib/holdfast/vra".into(),
            run_dir: "/run/holdfast".into(),
            datastores: vec!["/var/lib/holdfast/datastore".into()],
            log: "info".to_owned(),
            reactors: ReactorConfig::default(),
            memory: MemoryConfig::default(),
            doors: DoorConfig::default(),
            target: TargetConfig::default(),
            scrub: ScrubConfig::default(),
        }
    }
}

impl Default for ReactorConfig {
    fn default() -> Self {
        Self { threads: None, ring_entries: 1024 }
    }
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self { lock: true, arena_mib: 512, retained_per_vm_mib: 256 }
    }
}

impl Default for DoorConfig {
    fn default() -> Self {
        Self { queues: 1, depth: 64, nbd_group: None }
    }
}

impl Default for TargetConfig {
    fn default() -> Self {
        Self {
            journal_threads: 2,
            memory_mib: 512,
            scratch_mib: 1024,
            views_memory_mib: 2048,
            site_key_file: None,
        }
    }
}

/// Why the configuration can't be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file couldn't be read.
    #[error("cannot read the configuration {}: {source}; give another with --config", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Not TOML, an unknown key, or a value of a wrong kind; the source shows the line.
    #[error("the configuration {} is not valid", path.display())]
    Parse {
        /// Which file.
        path: PathBuf,
        /// Where and how.
        source: Box<toml::de::Error>,
    },
    /// A value out of its limits.
    #[error("the configuration {} is not valid: `{key}` must be {must}", path.display())]
    Value {
        /// Which file.
        path: PathBuf,
        /// Which key.
        key: &'static str,
        /// What it must be.
        must: &'static str,
    },
}

impl Config {
    /// Reads a file. Without `path` the default one, and the defaults when that isn't there.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let default = Path::new(CONFIG_PATH);
        let at = path.unwrap_or(default);
        let text = match read_text(at, MAX_CONFIG_BYTES) {
            Ok(text) => text,
            Err(error) if path.is_none() && error.kind() == io::ErrorKind::NotFound => String::new(),
            Err(source) => return Err(ConfigError::Read { path: at.to_owned(), source }),
        };
        Self::parse(&text, at)
    }

    fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text)
            .map_err(|source| ConfigError::Parse { path: path.to_owned(), source: Box::new(source) })?;
        let wrong = config.wrong();
        wrong.map_or(Ok(config), |(key, must)| Err(ConfigError::Value { path: path.to_owned(), key, must }))
    }

    fn wrong(&self) -> Option<(&'static str, &'static str)> {
        let absolute = |path: &PathBuf| path.is_absolute();
        let rules = [
            (!self.name.is_empty() && self.name.len() <= 128, "name", "1 to 128 bytes long"),
            (absolute(&self.state_dir), "state_dir", "an absolute path"),
            (absolute(&self.run_dir), "run_dir", "an absolute path"),
            (self.datastores.iter().all(absolute), "datastores", "absolute paths"),
            (self.reactors.threads.is_none_or(|n| (1..=64).contains(&n)), "reactors.threads", "1 to 64"),
            (
                self.reactors.ring_entries.is_power_of_two()
                    && (64..=32_768).contains(&self.reactors.ring_entries),
                "reactors.ring_entries",
                "a power of two from 64 to 32768",
            ),
            ((16..=1 << 20).contains(&self.memory.arena_mib), "memory.arena_mib", "16 to 1048576"),
            (
                (1..=1 << 20).contains(&self.memory.retained_per_vm_mib),
                "memory.retained_per_vm_mib",
                "1 to 1048576",
            ),
            ((1..=32).contains(&self.doors.queues), "doors.queues", "1 to 32"),
            ((1..=1024).contains(&self.doors.depth), "doors.depth", "1 to 1024"),
            ((1..=64).contains(&self.target.journal_threads), "target.journal_threads", "1 to 64"),
            ((32..=1 << 20).contains(&self.target.memory_mib), "target.memory_mib", "32 to 1048576"),
            ((1..=1 << 20).contains(&self.target.scratch_mib), "target.scratch_mib", "1 to 1048576"),
            (
                (64..=1 << 20).contains(&self.target.views_memory_mib),
                "target.views_memory_mib",
                "64 to 1048576",
            ),
            (self.scrub.mib_per_s <= 1 << 16, "scrub.mib_per_s", "0 to 65536"),
            (self.scrub.pass_every_s > 0, "scrub.pass_every_s", "at least 1"),
        ];
        rules.into_iter().find(|(holds, _, _)| !holds).map(|(_, key, must)| (key, must))
    }

    /// The control socket.
    pub fn socket_path(&self) -> PathBuf {
        self.run_dir.join("vra.sock")
    }

    /// The folder of keys and certificates.
    pub fn pki_dir(&self) -> PathBuf {
        self.state_dir.join("pki")
    }
}

/// Longest configuration, in bytes.
pub const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// Reads a text file of at most `max_bytes`. What is longer, or never ends, isn't read to its end.
///
/// # Errors
/// The operating system's; [`io::ErrorKind::FileTooLarge`] and [`io::ErrorKind::InvalidData`] for what is no such file.
pub fn read_text(path: &Path, max_bytes: u64) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(max_bytes.saturating_add(1)).read_to_string(&mut text)?;
    if text.len() as u64 > max_bytes {
        let message = format!("it has more than {max_bytes} bytes, as no such file has");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, message));
    }
    Ok(text)
}

/// Reads an IP address with a port, for serde.
///
/// # Errors
/// The text, and how one is written.
pub fn socket_address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SocketAddr, D::Error> {
    let text = String::deserialize(deserializer)?;
    text.parse().map_err(|_| {
        D::Error::custom(format!(
            "{text:?} is no IP address with a port: write one as 192.0.2.1:9710 or [::]:9710"
        ))
    })
}

/// The host's name, as `hostname` shows it.
pub fn hostname() -> String {
    nix::sys::utsname::uname()
        .ok()
        .and_then(|name| name.nodename().to_str().map(str::to_owned))
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| "vra".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("/etc/holdfast/vra.toml"))
    }

    #[test]
    fn every_key_has_a_default_and_can_be_set() {
        assert_eq!(parse("").expect("empty"), Config::default());
        let config = parse("listen = \"127.0.0.1:0\"\n[memory]\nlock = false\n").expect("config");
        assert_eq!(config.listen.port(), 0);
        assert!(!config.memory.lock);
        assert_eq!(config.memory.arena_mib, MemoryConfig::default().arena_mib);
    }

    #[test]
    fn what_is_no_configuration_is_refused_and_never_read_whole() {
        let load = |path: &str| Config::load(Some(Path::new(path))).expect_err(path);
        for (path, words) in [
            ("/nonexistent/vra.toml", "cannot read the configuration /nonexistent/vra.toml"),
            ("/dev/zero", "more than 1048576 bytes"),
            ("/", "--config"),
        ] {
            let error = load(path).to_string();
            assert!(error.contains(words), "{error}");
        }
        let error = parse("listen = \"host:9710\"").expect_err("a name");
        let ConfigError::Parse { source, .. } = &error else { panic!("{error}") };
        assert!(source.to_string().contains("192.0.2.1:9710"), "{source}");
    }

    #[test]
    fn unknown_keys_and_bad_values_are_named() {
        let error = parse("[memory]\nlokc = true\n").expect_err("unknown key");
        let ConfigError::Parse { source, .. } = &error else { panic!("{error}") };
        assert!(source.to_string().contains("lokc") && source.to_string().contains("line 2"), "{source}");
        for (text, key) in [
            ("state_dir = \"here\"", "state_dir"),
            ("[reactors]\nring_entries = 100", "reactors.ring_entries"),
            ("[doors]\ndepth = 0", "doors.depth"),
        ] {
            let error = parse(text).expect_err(text).to_string();
            assert!(error.contains(&format!("`{key}` must be")), "{error}");
        }
    }
}
