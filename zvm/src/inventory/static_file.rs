//! The `static` provider: an inventory written by hand, as TOML. `docs/zvm.md` shows the format.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::Deserialize;
use toml::Spanned;
use uuid::Uuid;

use super::{
    Datastore, Disk, DiskKind, Host, HostState, Inventory, InventoryError, Network, Nic, Origin, Power,
    Provider, ReadFuture, Reading, Site, Vm,
};
use crate::units::parse_bytes;

/// A larger file is not an inventory written by hand.
const MAX_FILE_BYTES: u64 = 64 << 20;

/// Reads one file, again whenever it has changed.
#[derive(Debug)]
pub struct StaticFile {
    path: PathBuf,
    last_stamp: Option<Stamp>,
}

impl StaticFile {
    /// A provider that has not read `path` yet.
    pub fn new(path: PathBuf) -> Self {
        Self { path, last_stamp: None }
    }

    fn read_if_changed(&mut self) -> Result<Option<Inventory>, InventoryError> {
        let stamp = Stamp::of(&self.path);
        if self.last_stamp.as_ref() == Some(&stamp) {
            return Ok(None);
        }
        let from = self.path.display().to_string();
        let read = vra::config::read_text(&self.path, MAX_FILE_BYTES);
        self.last_stamp = Some(stamp);
        let text = read.map_err(|source| InventoryError::Read { from: from.clone(), source })?;
        parse(&text, &from).map(Some)
    }
}

impl Provider for StaticFile {
    fn describe(&self) -> String {
        self.path.display().to_string()
    }

    fn read(&mut self, _reading: Reading) -> ReadFuture<'_> {
        Box::pin(std::future::ready(self.read_if_changed()))
    }
}

/// Reads an inventory from TOML; `from` names its origin in errors.
pub fn parse(text: &str, from: &str) -> Result<Inventory, InventoryError> {
    let file: File = toml::from_str(text).map_err(|error| {
        let at = error.span().map_or(0, |span| span.start);
        let key = key_of_line(text, at).unwrap_or_else(|| "syntax".into());
        invalid(text, from, at, key, error.message().to_owned())
    })?;
    Checker { text, from }.check(file)
}

/// What tells whether a file has changed; all zero for one that cannot be looked at.
#[derive(Debug, Default, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    len_bytes: u64,
    modified: Option<SystemTime>,
}

impl Stamp {
    fn of(path: &Path) -> Self {
        use std::os::unix::fs::MetadataExt;
        std::fs::metadata(path)
            .map(|data| Self { inode: data.ino(), len_bytes: data.len(), modified: data.modified().ok() })
            .unwrap_or_default()
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    site: Vec<SiteEntry>,
    #[serde(default)]
    network: Vec<NetworkEntry>,
    #[serde(default)]
    host: Vec<HostEntry>,
    #[serde(default)]
    datastore: Vec<DatastoreEntry>,
    #[serde(default)]
    vm: Vec<VmEntry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SiteEntry {
    name: Spanned<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NetworkEntry {
    name: Spanned<String>,
    site: Spanned<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HostEntry {
    name: Spanned<String>,
    site: Spanned<String>,
    vra: Option<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DatastoreEntry {
    name: Spanned<String>,
    hosts: Vec<Spanned<String>>,
    path: Spanned<PathBuf>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct VmEntry {
    name: Spanned<String>,
    uuid: Spanned<String>,
    host: Spanned<String>,
    #[serde(default)]
    disk: Vec<DiskEntry>,
    #[serde(default)]
    nic: Vec<NicEntry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DiskEntry {
    name: Spanned<String>,
    path: Spanned<PathBuf>,
    size: Option<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NicEntry {
    mac: Spanned<String>,
    network: Spanned<String>,
}

struct Checker<'a> {
    text: &'a str,
    from: &'a str,
}

impl Checker<'_> {
    fn check(&self, file: File) -> Result<Inventory, InventoryError> {
        let mut sites = Names::new("site.name");
        for site in &file.site {
            self.add(&mut sites, &site.name)?;
        }
        let mut networks = Names::new("network.name");
        for network in &file.network {
            self.add(&mut networks, &network.name)?;
            self.refer("network.site", &network.site, &sites)?;
        }
        let mut hosts = Names::new("host.name");
        let mut vras = Names::new("host.vra");
        for host in &file.host {
            self.add(&mut hosts, &host.name)?;
            self.add(&mut vras, host.vra.as_ref().unwrap_or(&host.name))?;
            self.refer("host.site", &host.site, &sites)?;
        }
        let mut datastores = Names::new("datastore.name");
        for datastore in &file.datastore {
            self.add(&mut datastores, &datastore.name)?;
            self.absolute("datastore.path", &datastore.path)?;
            for host in &datastore.hosts {
                self.refer("datastore.hosts", host, &hosts)?;
            }
        }
        let mut uuids = HashSet::new();
        let mut vms = Vec::with_capacity(file.vm.len());
        for vm in &file.vm {
            let entry = self.vm(vm, &hosts, &networks)?;
            if !uuids.insert(entry.uuid) {
                return Err(self.wrong("vm.uuid", &vm.uuid, "another VM has this UUID".into()));
            }
            vms.push(entry);
        }
        self.disks_are_used_once(&file.vm)?;
        Ok(Inventory {
            sites: file.site.into_iter().map(|site| Site { name: site.name.into_inner() }).collect(),
            clusters: Vec::new(),
            hosts: file
                .host
                .into_iter()
                .map(|host| Host {
                    vra: host.vra.map_or_else(|| host.name.get_ref().clone(), Spanned::into_inner),
                    name: host.name.into_inner(),
                    site: host.site.into_inner(),
                    cluster: None,
                    state: HostState::Connected,
                    origin: Origin::default(),
                })
                .collect(),
            networks: file
                .network
                .into_iter()
                .map(|network| Network {
                    name: network.name.into_inner(),
                    site: network.site.into_inner(),
                    hosts: Vec::new(),
                    origin: Origin::default(),
                })
                .collect(),
            datastores: file
                .datastore
                .into_iter()
                .map(|datastore| Datastore {
                    name: datastore.name.into_inner(),
                    hosts: datastore.hosts.into_iter().map(Spanned::into_inner).collect(),
                    path: datastore.path.into_inner(),
                    capacity_bytes: None,
                    free_bytes: None,
                    origin: Origin::default(),
                })
                .collect(),
            vms,
        })
    }

    fn vm(&self, vm: &VmEntry, hosts: &Names, networks: &Names) -> Result<Vm, InventoryError> {
        self.not_empty("vm.name", &vm.name)?;
        let uuid =
            vm.uuid.get_ref().parse::<Uuid>().map_err(|_| {
                self.wrong("vm.uuid", &vm.uuid, format!("{:?} is not a UUID", vm.uuid.get_ref()))
            })?;
        self.refer("vm.host", &vm.host, hosts)?;
        let mut names = Names::new("vm.disk.name");
        let mut disks = Vec::with_capacity(vm.disk.len());
        for disk in &vm.disk {
            self.add(&mut names, &disk.name)?;
            self.absolute("vm.disk.path", &disk.path)?;
            let size_bytes = match &disk.size {
                Some(size) => Some(
                    parse_bytes(size.get_ref()).map_err(|reason| self.wrong("vm.disk.size", size, reason))?,
                ),
                None => None,
            };
            disks.push(Disk {
                name: disk.name.get_ref().clone(),
                path: disk.path.get_ref().clone(),
                size_bytes,
                kind: DiskKind::Raw,
                served: None,
                written_bytes: None,
            });
        }
        let mut nics = Vec::with_capacity(vm.nic.len());
        for nic in &vm.nic {
            self.refer("vm.nic.network", &nic.network, networks)?;
            if !is_mac(nic.mac.get_ref()) {
                let reason =
                    format!("{:?} is not a MAC address such as 52:54:00:12:34:56", nic.mac.get_ref());
                return Err(self.wrong("vm.nic.mac", &nic.mac, reason));
            }
            nics.push(Nic { mac: nic.mac.get_ref().clone(), network: nic.network.get_ref().clone() });
        }
        Ok(Vm {
            uuid,
            name: vm.name.get_ref().clone(),
            host: vm.host.get_ref().clone(),
            power: Power::Unknown,
            disks,
            nics,
            origin: Origin::default(),
        })
    }

    fn disks_are_used_once(&self, vms: &[VmEntry]) -> Result<(), InventoryError> {
        let mut users: HashMap<(&str, &Path), &str> = HashMap::new();
        for vm in vms {
            for disk in &vm.disk {
                let place = (vm.host.get_ref().as_str(), disk.path.get_ref().as_path());
                if let Some(other) = users.insert(place, vm.name.get_ref()) {
                    let reason = format!(
                        "{} is a disk of VM {other:?} on the same host already; shared disks cannot be protected",
                        disk.path.get_ref().display()
                    );
                    return Err(self.wrong("vm.disk.path", &disk.path, reason));
                }
            }
        }
        Ok(())
    }

    fn add<'n>(&self, names: &mut Names<'n>, name: &'n Spanned<String>) -> Result<(), InventoryError> {
        self.not_empty(names.key, name)?;
        if !names.seen.insert(name.get_ref()) {
            return Err(self.wrong(names.key, name, format!("{:?} is there twice", name.get_ref())));
        }
        Ok(())
    }

    fn not_empty(&self, key: &str, name: &Spanned<String>) -> Result<(), InventoryError> {
        if name.get_ref().is_empty() || name.get_ref().len() > vra::api::volume::MAX_NAME_BYTES {
            return Err(self.wrong(key, name, "a name has 1 to 128 bytes".into()));
        }
        Ok(())
    }

    fn refer(&self, key: &str, name: &Spanned<String>, known: &Names) -> Result<(), InventoryError> {
        if known.seen.contains(name.get_ref().as_str()) {
            return Ok(());
        }
        let section = known.key.split('.').next().unwrap_or(known.key);
        let reason = format!("there is no [[{section}]] named {:?}", name.get_ref());
        Err(self.wrong(key, name, reason))
    }

    fn absolute(&self, key: &str, path: &Spanned<PathBuf>) -> Result<(), InventoryError> {
        if path.get_ref().is_absolute() {
            return Ok(());
        }
        let reason = format!("{:?} is not an absolute path", path.get_ref().display().to_string());
        Err(self.wrong(key, path, reason))
    }

    fn wrong<T>(&self, key: &str, value: &Spanned<T>, reason: String) -> InventoryError {
        invalid(self.text, self.from, value.span().start, key.into(), reason)
    }
}

struct Names<'n> {
    key: &'static str,
    seen: HashSet<&'n str>,
}

impl Names<'_> {
    fn new(key: &'static str) -> Self {
        Self { key, seen: HashSet::new() }
    }
}

fn invalid(text: &str, from: &str, at: usize, key: String, reason: String) -> InventoryError {
    let line = text.as_bytes().iter().take(at).filter(|byte| **byte == b'\n').count() + 1;
    InventoryError::Invalid { from: from.into(), line, key, reason }
}

/// The key before `=` or the header in brackets on the line that holds byte `at`.
fn key_of_line(text: &str, at: usize) -> Option<String> {
    let at = (0..=at.min(text.len())).rev().find(|at| text.is_char_boundary(*at))?;
    let start = text[..at].rfind('\n').map_or(0, |newline| newline + 1);
    let line = text[start..].lines().next()?.trim();
    let key = line.split('=').next()?.trim().trim_matches(['[', ']']).trim();
    (!key.is_empty()).then(|| key.chars().take(60).collect())
}

fn is_mac(text: &str) -> bool {
    let parts: Vec<&str> = text.split(':').collect();
    parts.len() == 6
        && parts.iter().all(|part| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
[[site]]
name = "london"

[[network]]
name = "prod"
site = "london"

[[host]]
name = "kvm-a"
site = "london"
vra = "vra-a"

[[host]]
name = "kvm-b"
site = "london"

[[datastore]]
name = "ds1"
hosts = ["kvm-b"]
path = "/srv/ds1"

[[vm]]
name = "db"
uuid = "5d1f1f8e-6a0e-4f0b-9a6e-0d6a4b1c2d3e"
host = "kvm-a"
[[vm.disk]]
name = "vda"
path = "/images/db.img"
size = "20 GiB"
[[vm.nic]]
mac = "52:54:00:12:34:56"
network = "prod"
"#;

    #[test]
    fn a_good_file_is_read_whole() {
        let inventory = parse(GOOD, "inv.toml").unwrap();
        assert_eq!(inventory.hosts[0].vra, "vra-a");
        assert_eq!(inventory.hosts[1].vra, "kvm-b", "a VRA is named as its host by default");
        let vm = inventory.find_vm("db").unwrap();
        assert_eq!(vm.disks[0].size_bytes, Some(20 << 30));
        assert_eq!(inventory.find_vm(&vm.uuid.to_string()).unwrap().name, "db");
        assert_eq!(inventory.find_vm("nope"), Err(super::super::FindVmError::Unknown("nope".into())));
    }

    /// Each bad edit of the good file, the line of the fault, and words of the message.
    #[test]
    fn errors_name_file_line_and_key() {
        let cases: [(&str, &str, usize, &str); 11] = [
            ("host = \"kvm-a\"", "host = \"kvm-z\"", 26, "vm.host: there is no [[host]] named \"kvm-z\""),
            ("hosts = [\"kvm-b\"]", "hosts = [\"kvm-q\"]", 20, "datastore.hosts"),
            ("path = \"/srv/ds1\"", "path = \"srv\"", 21, "datastore.path: \"srv\" is not an absolute path"),
            ("5d1f1f8e-6a0e", "xyz", 25, "vm.uuid"),
            ("20 GiB", "20 gallons", 30, "vm.disk.size"),
            ("52:54:00:12:34:56", "52:54", 32, "vm.nic.mac"),
            ("network = \"prod\"", "network = \"lost\"", 33, "vm.nic.network"),
            ("name = \"kvm-b\"", "name = \"kvm-a\"", 15, "host.name: \"kvm-a\" is there twice"),
            ("vra = \"vra-a\"", "vira = \"vra-a\"", 12, "vira: unknown field"),
            ("name = \"vda\"", "name = 7", 28, "name: invalid type"),
            ("[[vm.nic]]", "[[vm.nic]", 31, "vm.nic"),
        ];
        for (from, to, line, words) in cases {
            assert!(GOOD.contains(from), "{from}");
            let text = GOOD.replacen(from, to, 1);
            let message = parse(&text, "/etc/inv.toml").expect_err(to).to_string();
            assert!(
                message.starts_with(&format!("inventory /etc/inv.toml, line {line}: ")),
                "{to}: {message}"
            );
            assert!(message.contains(words), "{to}: {message}");
        }
    }

    #[test]
    fn a_shared_disk_is_refused() {
        let text = format!(
            "{GOOD}\n[[vm]]\nname = \"db2\"\nuuid = \"{}\"\nhost = \"kvm-a\"\n[[vm.disk]]\nname = \"vda\"\npath = \"/images/db.img\"\n",
            Uuid::new_v4()
        );
        let message = parse(&text, "f").unwrap_err().to_string();
        assert!(message.contains("shared disks"), "{message}");
    }

    #[test]
    fn only_a_changed_file_is_read_again() {
        let path = std::env::temp_dir().join(format!("zvm-inventory-{}.toml", Uuid::new_v4()));
        let mut provider = StaticFile::new(path.clone());
        assert!(matches!(provider.read_if_changed(), Err(InventoryError::Read { .. })));
        assert!(matches!(provider.read_if_changed(), Ok(None)), "a missing file is reported once");
        std::fs::write(&path, GOOD).unwrap();
        assert!(provider.read_if_changed().unwrap().is_some());
        assert!(provider.read_if_changed().unwrap().is_none());
        std::fs::write(&path, "[[site]]\nname = \"x\"\n").unwrap();
        assert_eq!(provider.read_if_changed().unwrap().unwrap().sites.len(), 1);
        std::fs::remove_file(path).unwrap();
    }
}
