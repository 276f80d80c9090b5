//! A domain's definition (<https://libvirt.org/formatdomain.html>), and the [`Vm`] that comes of it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;

use uuid::Uuid;

use super::served::{self, Original};
use super::volume::Volume;
use crate::inventory::xml::{Element, XmlError};
use crate::inventory::{Disk, DiskKind, Nic, Origin, Power, Vm};

/// The longest definition that is taken; usual ones have 5 to 50 KiB.
pub const MAX_XML_BYTES: usize = 1 << 20;

/// Why a text is no domain's definition that can be used.
#[derive(Debug, thiserror::Error)]
pub enum DomainError {
    /// It is no XML, or too much of it.
    #[error(transparent)]
    Xml(#[from] XmlError),
    /// Something that each domain has is missing or wrong.
    #[error("its {0} is missing or wrong")]
    Missing(&'static str),
}

/// What is kept of a domain's definition.
///
/// It is to be the one that the domain runs with, if it runs: that is where the guest writes now, even when its definition names other disks
/// or networks for its next start. Name and UUID are the same in both. Power and sizes are in neither, and come from [`DomainFacts`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Domain {
    /// Its UUID.
    pub uuid: Uuid,
    /// Its name.
    pub name: String,
    /// Its disks, without drives whose medium is changed.
    pub disks: Vec<DomainDisk>,
    /// Its network cards that have an address.
    pub nics: Vec<DomainNic>,
}

/// A disk of a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainDisk {
    /// Its target name, such as `vda`.
    pub name: String,
    /// Where it is.
    pub source: DiskSource,
    /// What is there, as far as the definition tells.
    pub kind: DiskKind,
    /// Whether the definition tells the format. That of a disk in a storage pool may be left to the pool.
    pub has_format: bool,
    /// Whether a VRA's device stands in for it: source and kind are what they were before.
    pub served: bool,
}

/// Where a disk is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum DiskSource {
    /// At a path of the host, or in words that name a place elsewhere.
    Path(String),
    /// In a storage pool.
    Volume {
        /// The pool's name.
        pool: String,
        /// The volume's name.
        volume: String,
    },
}

/// A network card of a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainNic {
    /// Its MAC address, in lower case.
    pub mac: String,
    /// What it is plugged into.
    pub plugged_into: NicSource,
}

/// What a network card is plugged into.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NicSource {
    /// A network of libvirt's, by its name.
    Network(String),
    /// A bridge of the host, by its name.
    Bridge(String),
    /// Something else: a card of the host, another guest, QEMU itself.
    Other,
}

/// What a VM needs besides its definition.
#[derive(Debug, Clone, Default)]
pub struct DomainFacts {
    /// `virDomainState`, if it was told.
    pub state: Option<i32>,
    /// Sizes in bytes, by the disk's target name.
    pub capacity_bytes: HashMap<String, u64>,
    /// What the guest has written since its start, in bytes, by the disk's target name.
    pub written_bytes: HashMap<String, u64>,
}

/// What the VMs of one host share.
#[derive(Debug, Clone, Copy)]
pub struct HostFacts<'a> {
    /// The source's name.
    pub source: &'a str,
    /// The host's name.
    pub host: &'a str,
    /// Names of libvirt's networks there.
    pub networks: &'a HashSet<String>,
    /// Volumes that disks are in.
    pub volumes: &'a HashMap<(String, String), Volume>,
}

impl Domain {
    /// Reads a definition of at most [`MAX_XML_BYTES`].
    pub fn parse(xml: &str) -> Result<Self, DomainError> {
        let root = Element::parse(xml, MAX_XML_BYTES)?;
        if root.name != "domain" {
            return Err(DomainError::Missing("root element <domain>"));
        }
        let uuid = root.text_at(&["uuid"]).and_then(|uuid| Uuid::try_parse(uuid).ok());
        let devices = root.child("devices");
        let of = |name| devices.into_iter().flat_map(move |devices| devices.children_named(name));
        let originals = served::originals(&root);
        Ok(Self {
            uuid: uuid.ok_or(DomainError::Missing("<uuid>"))?,
            name: root.text_at(&["name"]).ok_or(DomainError::Missing("<name>"))?.to_owned(),
            disks: of("disk")
                .filter_map(|disk| disk_of(disk).transpose())
                .map(|disk| disk.map(|disk| original_of(disk, &originals)))
                .collect::<Result<_, _>>()?,
            nics: of("interface").filter_map(nic_of).collect(),
        })
    }

    /// The VM that this is of.
    pub fn into_vm(self, facts: &DomainFacts, host: HostFacts<'_>) -> Vm {
        let disk = |disk: DomainDisk| {
            let told = facts.capacity_bytes.get(&disk.name).copied();
            let (path, size_bytes, kind) = match disk.source {
                DiskSource::Path(path) => (path, told, disk.kind),
                DiskSource::Volume { pool, volume } => {
                    let key = (pool, volume);
                    match host.volumes.get(&key) {
                        Some(volume) => {
                            let left_to_pool = disk.kind == DiskKind::Raw && !disk.has_format;
                            let kind = if left_to_pool || volume.kind == DiskKind::Network {
                                volume.kind
                            } else {
                                disk.kind
                            };
                            (volume.path.clone(), told.or(volume.capacity_bytes), kind)
                        }
                        // Its pool is off: where it is can't be told.
                        None => (format!("volume:{}/{}", key.0, key.1), told, DiskKind::Network),
                    }
                }
            };
            Disk {
                path: PathBuf::from(path),
                size_bytes,
                kind,
                served: Some(disk.served),
                written_bytes: facts.written_bytes.get(&disk.name).copied(),
                name: disk.name,
            }
        };
        let nic = |nic: DomainNic| {
            let network = match nic.plugged_into {
                NicSource::Network(name) if host.networks.contains(&name) => name,
                NicSource::Bridge(name) => name,
                NicSource::Network(_) | NicSource::Other => String::new(),
            };
            Nic { mac: nic.mac, network }
        };
        Vm {
            uuid: self.uuid,
            name: self.name,
            host: host.host.to_owned(),
            power: power(facts.state),
            disks: self.disks.into_iter().map(disk).collect(),
            nics: self.nics.into_iter().map(nic).collect(),
            origin: Origin { source: host.source.to_owned(), id: self.uuid.to_string() },
        }
    }

    /// Volumes that its disks are in.
    pub fn volumes(&self) -> impl Iterator<Item = (&str, &str)> {
        self.disks.iter().filter_map(|disk| match &disk.source {
            DiskSource::Volume { pool, volume } => Some((pool.as_str(), volume.as_str())),
            DiskSource::Path(_) => None,
        })
    }

    /// Bridges of the host that its cards are plugged into.
    pub fn bridges(&self) -> impl Iterator<Item = &str> {
        self.nics.iter().filter_map(|nic| match &nic.plugged_into {
            NicSource::Bridge(name) => Some(name.as_str()),
            NicSource::Network(_) | NicSource::Other => None,
        })
    }
}

/// `virDomainState`. One that is being shut down still runs; one that has crashed and was kept for a look at it stands still.
fn power(state: Option<i32>) -> Power {
    match state {
        Some(1 | 2 | 4) => Power::On,
        Some(3 | 6 | 7) => Power::Paused,
        Some(5) => Power::Off,
        _ => Power::Unknown,
    }
}

/// None for drives whose medium is changed, and for those that are empty.
fn disk_of(disk: &Element) -> Result<Option<DomainDisk>, DomainError> {
    if matches!(disk.attribute("device"), Some("cdrom" | "floppy")) {
        return Ok(None);
    }
    let target = disk.child("target").and_then(|target| target.attribute("dev"));
    let name = target.ok_or(DomainError::Missing("disk's <target dev='...'>"))?.to_owned();
    let Some((source, is_elsewhere)) = source_of(disk) else { return Ok(None) };
    let kind = if is_elsewhere {
        DiskKind::Network
    } else if disk.child("shareable").is_some() {
        DiskKind::Shared
    } else if disk.child("readonly").is_some() {
        DiskKind::ReadOnly
    } else if disk.child("transient").is_some() {
        DiskKind::Transient
    } else if disk.attribute("device") == Some("lun") {
        DiskKind::Lun
    } else if is_image(disk) {
        DiskKind::Image
    } else {
        DiskKind::Raw
    };
    Ok(Some(DomainDisk { name, source, kind, has_format: format(disk).is_some(), served: false }))
}

/// The disk that a VRA's device stands in for. What the metadata says of a disk that is itself again, is of no meaning.
fn original_of(disk: DomainDisk, originals: &BTreeMap<String, Original>) -> DomainDisk {
    let Some(original) = originals.get(&disk.name) else { return disk };
    // A snapshot, a copy or another disk has taken the device's place.
    if disk.source != DiskSource::Path(original.device.clone()) {
        return disk;
    }
    let former = Element::parse(&original.xml, MAX_XML_BYTES).ok();
    match former.and_then(|former| disk_of(&former).ok().flatten()) {
        Some(former) if former.name == disk.name => DomainDisk { served: true, ..former },
        _ => disk,
    }
}

/// Whether the path has something else than the guest's bytes as they are: a format, a chain, a cipher, or a part of a file.
fn is_image(disk: &Element) -> bool {
    // `<backingStore/>` without anything in it is the end of the chain.
    let has_backing = disk.child("backingStore").is_some_and(|backing| !backing.children.is_empty());
    let has_part = |name| disk.child(name).is_some() || disk.at(&["source", name]).is_some();
    format(disk).is_some_and(|format| format != "raw")
        || has_backing
        || has_part("encryption")
        || has_part("slices")
}

fn format(disk: &Element) -> Option<&str> {
    disk.child("driver").and_then(|driver| driver.attribute("type"))
}

/// Where a disk is, and whether that is off the host (or nothing that a path leads to). None if it is empty.
pub(super) fn source_of(disk: &Element) -> Option<(DiskSource, bool)> {
    let source = disk.child("source")?;
    let attribute = |name| source.attribute(name).filter(|value| !value.is_empty()).map(str::to_owned);
    let path = |path| (DiskSource::Path(path), false);
    match disk.attribute("type").unwrap_or("file") {
        "file" => attribute("file").map(path),
        "block" => attribute("dev").map(path),
        "volume" => {
            let (pool, volume) = attribute("pool").zip(attribute("volume"))?;
            Some((DiskSource::Volume { pool, volume }, false))
        }
        "network" => Some((DiskSource::Path(network_path(source)), true)),
        other => {
            let place = ["path", "dev", "dir"].into_iter().find_map(attribute).unwrap_or_default();
            Some((DiskSource::Path(format!("{other}:{place}")), true))
        }
    }
}

/// A disk on the network in readable words, such as `nbd://10.0.0.7:10809/export`.
fn network_path(source: &Element) -> String {
    let protocol = source.attribute("protocol").unwrap_or("network");
    let name = source.attribute("name").unwrap_or_default();
    let hosts: Vec<&Element> = source.children_named("host").collect();
    if let Some(socket) = hosts.iter().find_map(|host| host.attribute("socket")) {
        return format!("{protocol}+unix:///{name}?socket={socket}");
    }
    let hosts: Vec<String> = hosts
        .iter()
        .map(|host| {
            let name = host.attribute("name").unwrap_or_default();
            host.attribute("port").map_or_else(|| name.to_owned(), |port| format!("{name}:{port}"))
        })
        .collect();
    if hosts.is_empty() {
        format!("{protocol}:{name}")
    } else {
        format!("{protocol}://{}/{name}", hosts.join(","))
    }
}

fn nic_of(interface: &Element) -> Option<DomainNic> {
    let mac = interface.child("mac")?.attribute("address")?.to_ascii_lowercase();
    let source = |name| {
        let value = interface.child("source").and_then(|source| source.attribute(name));
        value.filter(|value| !value.is_empty()).map(str::to_owned)
    };
    let plugged_into = match interface.attribute("type") {
        Some("network") => source("network").map_or(NicSource::Other, NicSource::Network),
        Some("bridge") => source("bridge").map_or(NicSource::Other, NicSource::Bridge),
        _ => NicSource::Other,
    };
    Some(DomainNic { mac, plugged_into })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From libvirtd 9.0.0: one that runs, with a copy of its first disk under way.
    const RUNNING: &str = include_str!("../../../../fuzz/corpus/libvirt_domain/captured-running");
    /// One that is off.
    const OFF: &str = include_str!("../../../../fuzz/corpus/libvirt_domain/captured-off");

    fn vm(xml: &str, facts: &DomainFacts) -> Vm {
        let volume =
            Volume { path: "/srv/pool/v1".into(), capacity_bytes: Some(1 << 20), kind: DiskKind::Image };
        let volumes = HashMap::from([(("images".to_owned(), "v1".to_owned()), volume)]);
        let networks = HashSet::from(["prod".to_owned()]);
        let host = HostFacts { source: "kvm", host: "kvm-a", networks: &networks, volumes: &volumes };
        Domain::parse(xml).unwrap().into_vm(facts, host)
    }

    fn disks(vm: &Vm) -> Vec<(&str, &str, DiskKind)> {
        vm.disks.iter().map(|disk| (disk.name.as_str(), disk.path.to_str().unwrap(), disk.kind)).collect()
    }

    #[test]
    fn a_disk_that_is_served_is_the_one_that_it_was() {
        let facts = DomainFacts::default();
        let before = vm(RUNNING, &facts);
        let path = "/run/holdfast/nbd.sock".into();
        let door = vra::api::DoorAddress::NbdUnix { path, export: "e".into() };
        let xml = served::serve(RUNNING, &BTreeMap::from([("vda".to_owned(), door)]), served::Outage::Stops)
            .unwrap();
        let after = vm(&xml, &facts);
        assert_eq!(disks(&after), disks(&before));
        assert_eq!((before.disks[0].served, after.disks[0].served), (Some(false), Some(true)));
        // Given back by hand, with the metadata forgotten.
        let by_hand = xml.replace("<disk type='network'", "<disk type='file'").replace(
            "<source protocol='nbd' name='e'>",
            "<source file='/srv/vm/d3.img'/><source protocol='nbd' name='e'>",
        );
        assert_eq!(vm(&by_hand, &facts).disks[0].served, Some(false));
    }

    #[test]
    fn a_running_domain_has_the_disks_that_it_writes_to() {
        let capacity_bytes = HashMap::from([("vda".to_owned(), 8 << 20)]);
        let vm = vm(RUNNING, &DomainFacts { state: Some(1), capacity_bytes, ..DomainFacts::default() });
        assert_eq!((vm.name.as_str(), vm.power), ("shop", Power::On));
        assert_eq!(
            disks(&vm),
            [
                ("vda", "/srv/vm/d3.img", DiskKind::Raw),
                ("vdb", "/srv/vm/top.qcow2", DiskKind::Image),
                ("sda", "/srv/pool/v1", DiskKind::Raw),
            ],
            "neither a copy's destination nor a backing file is a disk, and raw is the running domain's word"
        );
        assert_eq!(vm.disks[0].size_bytes, Some(8 << 20));
        assert_eq!(vm.disks[1].size_bytes, None);
        assert_eq!(vm.disks[2].size_bytes, Some(1 << 20), "a volume's size is known to its pool");
        assert_eq!(vm.nics, [Nic { mac: "52:54:00:aa:bb:cc".into(), network: "prod".into() }]);
    }

    #[test]
    fn a_domain_that_is_off_has_all_kinds_of_disks() {
        let vm = vm(OFF, &DomainFacts { state: Some(5), ..DomainFacts::default() });
        assert_eq!((vm.name.as_str(), vm.power), ("web & mail", Power::Off));
        assert_eq!(
            disks(&vm),
            [
                ("vda", "/srv/vm/d1.img", DiskKind::Raw),
                ("vdb", "/srv/vm/top.qcow2", DiskKind::Image),
                ("vdc", "rbd://mon-a:6789,mon-b/pool/image", DiskKind::Network),
                ("vdd", "nbd+unix:///export?socket=/run/nbd.sock", DiskKind::Network),
                ("vde", "/dev/vg/lv", DiskKind::Shared),
                ("vdf", "/srv/pool/v1", DiskKind::Raw),
            ]
        );
        let networks: Vec<&str> = vm.nics.iter().map(|nic| nic.network.as_str()).collect();
        assert_eq!(networks, ["prod", "br0", ""]);
    }

    #[test]
    fn a_disk_is_raw_only_if_its_path_has_the_guests_bytes() {
        let kind = |inner: &str| {
            let xml = format!(
                "<domain><name>n</name><uuid>{}</uuid><devices><disk type='file'><source file='/d'/>\
                 <target dev='vda'/>{inner}</disk></devices></domain>",
                Uuid::nil()
            );
            vm(&xml, &DomainFacts::default()).disks[0].kind
        };
        for raw in [
            "",
            "<driver name='qemu' type='raw'/>",
            "<backingStore/>",
            "<mirror type='file' format='qcow2'/>",
        ] {
            assert_eq!(kind(raw), DiskKind::Raw, "{raw}");
        }
        for image in [
            "<driver type='qcow2'/>",
            "<driver type='raw'/><backingStore type='file'><source file='/b'/></backingStore>",
            "<encryption format='luks'/>",
            "<slices><slice type='storage' offset='512' size='1024'/></slices>",
        ] {
            assert_eq!(kind(image), DiskKind::Image, "{image}");
        }
        assert_eq!(kind("<readonly/>"), DiskKind::ReadOnly);
        assert_eq!(kind("<readonly/><shareable/>"), DiskKind::Shared);
        let no_source = RUNNING.replace("<source file='/srv/vm/d3.img' index='3'/>", "");
        assert_eq!(vm(&no_source, &DomainFacts::default()).disks.len(), 2, "an empty drive is no disk");
    }

    #[test]
    fn what_every_domain_has_must_be_there() {
        for (from, to) in
            [("<name>shop</name>", ""), ("<target dev='vda' bus='virtio'/>", ""), ("<uuid>", "<uuid>x")]
        {
            let error = Domain::parse(&RUNNING.replace(from, to)).unwrap_err();
            assert!(matches!(error, DomainError::Missing(_)), "{error}");
        }
        assert!(matches!(Domain::parse("<pool/>"), Err(DomainError::Missing(_))));
        assert!(matches!(Domain::parse("<domain>"), Err(DomainError::Xml(_))));
    }
}
