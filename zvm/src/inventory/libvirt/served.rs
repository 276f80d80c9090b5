//! Disks that a VRA serves to a domain: the definition names the served device, and keeps in its metadata what was there before, so that
//! the way back needs nothing of ours.
//!
//! ```xml
//! <metadata>
//!   <holdfast:served xmlns:holdfast="urn:holdfast:served:1" domain="5d1f1f8e-...">
//!     <holdfast:disk target="vda" device="/dev/holdfast/...">&lt;disk type='file' ...&gt;...&lt;/disk&gt;</holdfast:disk>
//!   </holdfast:served>
//! </metadata>
//! ```
//!
//! The text of a `holdfast:disk` is the former `<disk>`, letter by letter. It counts only as long as the domain's disk of that target is still
//! that device: after a snapshot, a block copy or another disk in its place it is history, and to go back to it would lose what was written
//! since. That of a clone, which has another UUID, isn't the clone's. The rest of a definition is left as it is, letter by letter, too.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use quick_xml::Reader;
use quick_xml::escape::escape;
use quick_xml::events::Event;
use vra::api::DoorAddress;

use super::domain::{DiskSource, Domain, DomainError, MAX_XML_BYTES, source_of};
use crate::inventory::xml::{Element, MAX_DEPTH, XmlError};

/// Namespace of what is ours in a definition's metadata.
pub const NAMESPACE: &str = "urn:holdfast:served:1";

/// Seconds that QEMU keeps requests of a guest waiting while the VRA doesn't answer at its NBD socket (E1). ublk has no such limit.
pub const RECONNECT_DELAY_S: u32 = 600;

/// What becomes of a guest whose NBD socket is gone. Its requests never fail: when the wait is over, it stands still until it is resumed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outage {
    /// Its requests wait [`RECONNECT_DELAY_S`].
    Waits,
    /// It stands still at once: older versions of libvirt, such as 9.0, have no word for the wait.
    Stops,
}

/// Name of our element in the metadata; the only one of that name there, whatever prefix it has.
const SERVED: &str = "served";

/// What a disk was before a VRA served it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Original {
    /// The served device that took its place, as [`DoorAddress`] shows it.
    pub device: String,
    /// The former `<disk>`.
    pub xml: String,
}

/// Why a definition can't be changed.
#[derive(Debug, thiserror::Error)]
pub enum ServedError {
    /// It is no XML, or too much of it.
    #[error(transparent)]
    Xml(#[from] XmlError),
    /// Something that each definition has is missing.
    #[error(transparent)]
    Domain(#[from] DomainError),
    /// It has no such disk.
    #[error("the definition has no disk {0}")]
    NoDisk(String),
    /// A disk is served already.
    #[error("disk {0} is served by a VRA already")]
    IsServed(String),
    /// A disk isn't what the caller takes it for.
    #[error("disk {disk} is {now} in the definition, not {expected}: has it changed since it was read?")]
    Changed {
        /// The disk.
        disk: String,
        /// What it is.
        now: String,
        /// What it should be.
        expected: String,
    },
    /// What a disk was before isn't a disk of that name.
    #[error("what the metadata says of the former disk {0} is no disk of that name")]
    NoOriginal(String),
    /// A part that every definition has is missing.
    #[error("the definition has no <{0}>")]
    Missing(&'static str),
}

/// What disks were before a VRA served them, by target name.
pub fn originals(domain: &Element) -> BTreeMap<String, Original> {
    let uuid = domain.text_at(&["uuid"]);
    let is_its = |served: &&Element| is_ours(served) && served.attribute("domain") == uuid;
    let served = domain.child("metadata").and_then(|metadata| metadata.children_named(SERVED).find(is_its));
    let disk = |disk: &Element| {
        let device = disk.attribute("device")?.to_owned();
        Some((disk.attribute("target")?.to_owned(), Original { device, xml: disk.text.clone() }))
    };
    served.into_iter().flat_map(|served| served.children_named("disk")).filter_map(disk).collect()
}

/// Points disks at the devices that serve them, by target name. What the metadata says of disks that are others by now is forgotten.
pub fn serve(
    xml: &str,
    doors: &BTreeMap<String, DoorAddress>,
    outage: Outage,
) -> Result<String, ServedError> {
    let definition = Definition::parse(xml)?;
    let mut originals = originals(&definition.root);
    let mut edits = Vec::new();
    for (target, door) in doors {
        let span = definition.disk(target)?;
        let xml = &xml[span.clone()];
        let now = current(xml)?;
        let original = Original { device: door.to_string(), xml: xml.to_owned() };
        if originals.insert(target.clone(), original).is_some_and(|former| Some(former.device) == now) {
            return Err(ServedError::IsServed(target.clone()));
        }
        edits.push((span, served_disk(xml, door, outage)?));
    }
    edits.extend(definition.metadata_edit(&originals)?);
    Ok(apply(xml, edits))
}

/// Gives disks back what they were before, all of them or those named; says which. One that is another disk by now is left as it is, and
/// what was there before forgotten, if `forget` says so; else that is an error.
pub fn restore(
    xml: &str,
    only: Option<&[String]>,
    forget: bool,
) -> Result<(String, Vec<String>), ServedError> {
    let definition = Definition::parse(xml)?;
    let mut originals = originals(&definition.root);
    let (mut edits, mut restored) = (Vec::new(), Vec::new());
    for (target, original) in originals.clone() {
        if only.is_some_and(|only| !only.contains(&target)) {
            continue;
        }
        originals.remove(&target);
        // A disk that was taken out of the VM meanwhile is not brought back.
        let Ok(span) = definition.disk(&target) else { continue };
        let now = current(&xml[span.clone()])?.unwrap_or_default();
        if now != original.device {
            if forget {
                continue;
            }
            return Err(ServedError::Changed { disk: target, now, expected: original.device });
        }
        let former = Element::parse(&original.xml, MAX_XML_BYTES)?;
        let former_target = former.child("target").and_then(|target| target.attribute("dev"));
        if former.name != "disk" || former_target != Some(target.as_str()) {
            return Err(ServedError::NoOriginal(target));
        }
        edits.push((span, original.xml));
        restored.push(target);
    }
    edits.extend(definition.metadata_edit(&originals)?);
    Ok((apply(xml, edits), restored))
}

/// Checks that disks of a definition lie where the caller thinks, by target name. Where one in a storage pool lies, it doesn't tell.
pub fn check_paths(xml: &str, expected: &BTreeMap<String, PathBuf>) -> Result<(), ServedError> {
    let domain = Domain::parse(xml)?;
    for (target, path) in expected {
        let disk = domain.disks.iter().find(|disk| disk.name == *target);
        match &disk.ok_or_else(|| ServedError::NoDisk(target.clone()))?.source {
            DiskSource::Path(now) if Path::new(now) != path => {
                let (disk, now) = (target.clone(), now.clone());
                return Err(ServedError::Changed { disk, now, expected: path.display().to_string() });
            }
            DiskSource::Path(_) | DiskSource::Volume { .. } => {}
        }
    }
    Ok(())
}

/// Whether a definition names a device for one of its disks.
pub fn names_device(xml: &str, device: &str) -> Result<bool, ServedError> {
    let root = Element::parse(xml, MAX_XML_BYTES)?;
    let devices = root.child("devices");
    let mut disks = devices.into_iter().flat_map(|devices| devices.children_named("disk"));
    Ok(disks.any(|disk| device_of(disk).as_deref() == Some(device)))
}

/// Where a `<disk>` is, as a served device's address has it.
fn current(xml: &str) -> Result<Option<String>, ServedError> {
    Ok(device_of(&Element::parse(xml, MAX_XML_BYTES)?))
}

fn device_of(disk: &Element) -> Option<String> {
    match source_of(disk)?.0 {
        DiskSource::Path(path) => Some(path),
        DiskSource::Volume { .. } => None,
    }
}

fn is_ours(served: &Element) -> bool {
    served.attributes.iter().any(|(_, value)| value == NAMESPACE)
}

/// A definition and where its parts are, in bytes.
struct Definition {
    root: Element,
    /// Each `<disk>` of its devices, by target name.
    disks: Vec<(String, Range<usize>)>,
    /// Ends of the start tags of `<domain>`.
    domain_begin: Option<usize>,
    metadata: Option<Span>,
    served: Option<Span>,
}

/// An element's place.
#[derive(Clone)]
struct Span {
    /// With its tags.
    whole: Range<usize>,
    /// Where its start tag ends; the same as the whole's end for an empty element.
    inner_begin: usize,
}

impl Definition {
    fn parse(xml: &str) -> Result<Self, ServedError> {
        let root = Element::parse(xml, MAX_XML_BYTES)?;
        let mut found = Self { root, disks: Vec::new(), domain_begin: None, metadata: None, served: None };
        let mut reader = Reader::from_str(xml);
        // Names of the open elements, each with its begin and the end of its start tag.
        let mut open: Vec<(String, usize, usize)> = Vec::new();
        loop {
            let begin = offset(&reader);
            let syntax = |error: quick_xml::Error| XmlError::Syntax {
                at_byte: begin as u64,
                reason: error.to_string(),
            };
            let event = reader.read_event().map_err(syntax)?;
            let end = offset(&reader);
            match event {
                Event::Start(start) if open.len() < MAX_DEPTH => {
                    open.push((start.local_name().as_ref().to_owned(), begin, end));
                    if open.len() == 1 {
                        found.domain_begin = Some(end);
                    }
                }
                Event::Start(_) => return Err(XmlError::TooDeep.into()),
                Event::Empty(start) => {
                    open.push((start.local_name().as_ref().to_owned(), begin, end));
                    found.close(xml, &mut open, end)?;
                }
                Event::End(_) => found.close(xml, &mut open, end)?,
                Event::Eof => return Ok(found),
                _ => {}
            }
        }
    }

    fn close(
        &mut self,
        xml: &str,
        open: &mut Vec<(String, usize, usize)>,
        end: usize,
    ) -> Result<(), ServedError> {
        let path: Vec<&str> = open.iter().map(|(name, ..)| name.as_str()).collect();
        let (_, begin, inner_begin) = open.last().cloned().unwrap_or_default();
        let span = Span { whole: begin..end, inner_begin };
        match path.as_slice() {
            ["domain", "devices", "disk"] => {
                let disk = Element::parse(&xml[begin..end], MAX_XML_BYTES)?;
                if let Some(target) = disk.child("target").and_then(|target| target.attribute("dev")) {
                    self.disks.push((target.to_owned(), begin..end));
                }
            }
            ["domain", "metadata"] => self.metadata = Some(span),
            ["domain", "metadata", SERVED] if is_ours(&Element::parse(&xml[begin..end], MAX_XML_BYTES)?) => {
                self.served = Some(span);
            }
            _ => {}
        }
        open.pop();
        Ok(())
    }

    fn disk(&self, target: &str) -> Result<Range<usize>, ServedError> {
        let found = self.disks.iter().find(|(name, _)| name == target);
        found.map(|(_, span)| span.clone()).ok_or_else(|| ServedError::NoDisk(target.into()))
    }

    /// What makes the metadata tell of these originals.
    fn metadata_edit(
        &self,
        originals: &BTreeMap<String, Original>,
    ) -> Result<Option<(Range<usize>, String)>, ServedError> {
        let mut ours = String::new();
        if !originals.is_empty() {
            let uuid = self.root.text_at(&["uuid"]).ok_or(ServedError::Missing("uuid"))?;
            ours = format!("<holdfast:served xmlns:holdfast=\"{NAMESPACE}\" domain=\"{}\">", escape(uuid));
            for (target, original) in originals {
                ours += &format!(
                    "\n      <holdfast:disk target=\"{}\" device=\"{}\">{}</holdfast:disk>",
                    escape(target.as_str()),
                    escape(original.device.as_str()),
                    escape(original.xml.as_str())
                );
            }
            ours += "\n    </holdfast:served>";
        }
        let is_alone = self.root.child("metadata").is_some_and(|metadata| metadata.children.len() == 1);
        Ok(match (&self.served, &self.metadata) {
            (Some(_), Some(metadata)) if ours.is_empty() && is_alone => {
                Some((metadata.whole.clone(), String::new()))
            }
            (Some(served), _) => Some((served.whole.clone(), ours)),
            (None, _) if ours.is_empty() => None,
            // An empty element has no inside.
            (None, Some(metadata)) if metadata.inner_begin == metadata.whole.end => {
                Some((metadata.whole.clone(), format!("<metadata>\n    {ours}\n  </metadata>")))
            }
            (None, Some(metadata)) => {
                Some((metadata.inner_begin..metadata.inner_begin, format!("\n    {ours}")))
            }
            (None, None) => {
                let at = self.domain_begin.ok_or(ServedError::Missing("domain"))?;
                Some((at..at, format!("\n  <metadata>\n    {ours}\n  </metadata>")))
            }
        })
    }
}

/// A `<disk>` that names the device in place of its source. What else it has stays: target, address, boot order, serial number.
fn served_disk(original: &str, door: &DoorAddress, outage: Outage) -> Result<String, ServedError> {
    let disk = Element::parse(original, MAX_XML_BYTES)?;
    let kind = match door {
        DoorAddress::Ublk { .. } => "block",
        DoorAddress::NbdUnix { .. } | DoorAddress::NbdTcp { .. } => "network",
    };
    let mut text = format!("<disk type='{kind}'");
    for (name, value) in disk.attributes.iter().filter(|(name, _)| name != "type") {
        text += &format!(" {name}='{}'", escape(value.as_str()));
    }
    text += &format!(">\n      {}\n      {}", driver(disk.child("driver"), door), source(door, outage));
    for child in inner_elements(original)? {
        if !matches!(child.0.as_str(), "driver" | "source" | "backingStore" | "mirror") {
            text += "\n      ";
            text += &original[child.1];
        }
    }
    text += "\n    </disk>";
    Ok(text)
}

/// Without the host's page cache: a write that the guest saw completed must be at the VRA, not on its way there.
fn driver(original: Option<&Element>, door: &DoorAddress) -> String {
    let mut text = String::from("<driver name='qemu' type='raw' cache='none'");
    let is_ublk = matches!(door, DoorAddress::Ublk { .. });
    text += if is_ublk { " io='native'" } else { " error_policy='stop' rerror_policy='stop'" };
    let replaced = |name: &str| {
        matches!(name, "name" | "type" | "cache" | "io" | "discard" | "metadata_cache")
            || !is_ublk && matches!(name, "error_policy" | "rerror_policy")
    };
    for (name, value) in original.into_iter().flat_map(|driver| &driver.attributes) {
        if !replaced(name) {
            text += &format!(" {name}='{}'", escape(value.as_str()));
        }
    }
    text += " discard='unmap'/>";
    text
}

fn source(door: &DoorAddress, outage: Outage) -> String {
    let reconnect = match outage {
        Outage::Waits => format!("\n        <reconnect delay='{RECONNECT_DELAY_S}'/>"),
        Outage::Stops => String::new(),
    };
    match door {
        DoorAddress::Ublk { path, .. } => {
            format!("<source dev='{}'/>", escape(path.display().to_string()))
        }
        DoorAddress::NbdUnix { path, export } => format!(
            "<source protocol='nbd' name='{}'>\n        <host transport='unix' socket='{}'/>{reconnect}\n      </source>",
            escape(export.as_str()),
            escape(path.display().to_string())
        ),
        DoorAddress::NbdTcp { address, export } => format!(
            "<source protocol='nbd' name='{}'>\n        <host name='{}' port='{}'/>{reconnect}\n      </source>",
            escape(export.as_str()),
            address.ip(),
            address.port()
        ),
    }
}

/// The elements in a document's root element, by name and place.
fn inner_elements(xml: &str) -> Result<Vec<(String, Range<usize>)>, ServedError> {
    let mut reader = Reader::from_str(xml);
    let mut found = Vec::new();
    let (mut depth, mut child) = (0_usize, (String::new(), 0));
    loop {
        let begin = offset(&reader);
        let syntax =
            |error: quick_xml::Error| XmlError::Syntax { at_byte: begin as u64, reason: error.to_string() };
        let event = reader.read_event().map_err(syntax)?;
        let end = offset(&reader);
        match event {
            Event::Start(start) => {
                if depth == 1 {
                    child = (start.local_name().as_ref().to_owned(), begin);
                }
                depth += 1;
            }
            Event::Empty(start) if depth == 1 => {
                found.push((start.local_name().as_ref().to_owned(), begin..end));
            }
            Event::End(_) => {
                depth = depth.saturating_sub(1);
                if depth == 1 {
                    found.push((std::mem::take(&mut child.0), child.1..end));
                }
            }
            Event::Eof => return Ok(found),
            _ => {}
        }
    }
}

/// Bytes that were read so far.
fn offset(reader: &Reader<&[u8]>) -> usize {
    reader.buffer_position() as usize
}

/// The text with its parts replaced; they don't overlap.
fn apply(xml: &str, mut edits: Vec<(Range<usize>, String)>) -> String {
    edits.sort_by_key(|(range, _)| (range.start, range.end));
    let mut text = String::with_capacity(xml.len() + edits.iter().map(|(_, new)| new.len()).sum::<usize>());
    let mut done = 0;
    for (range, new) in edits {
        text += &xml[done..range.start];
        text += &new;
        done = range.end;
    }
    text + &xml[done..]
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOMAIN: &str = "<domain type='qemu' id='3'>
  <name>db &amp; co</name>
  <uuid>5d1f1f8e-6a0e-4f0b-9a6e-0d6a4b1c2d3e</uuid>
  <metadata>
    <app:note xmlns:app='urn:x'>keep</app:note>
  </metadata>
  <devices>
    <disk type='file' device='disk' snapshot='no'>
      <driver name='qemu' type='raw' cache='writeback' iothread='1'/>
      <source file='/images/a &amp; b.raw'/>
      <backingStore/>
      <target dev='vda' bus='virtio'/>
      <boot order='1'/>
      <address type='pci' slot='0x04'/>
    </disk>
    <disk type='block' device='disk'><source dev='/dev/vg/db'/><target dev='vdb'/></disk>
    <disk type='file' device='cdrom'><target dev='sda'/></disk>
  </devices>
</domain>";

    fn nbd(export: &str) -> DoorAddress {
        DoorAddress::NbdUnix { path: "/run/holdfast/nbd.sock".into(), export: export.into() }
    }

    fn doors() -> BTreeMap<String, DoorAddress> {
        let ublk = DoorAddress::Ublk { device: 7, path: "/dev/ublkb7".into() };
        BTreeMap::from([("vda".into(), nbd("e1")), ("vdb".into(), ublk)])
    }

    fn parse(xml: &str) -> Element {
        Element::parse(xml, MAX_XML_BYTES).unwrap()
    }

    fn disk<'a>(domain: &'a Element, target: &str) -> &'a Element {
        let is_it = |disk: &&Element| disk.child("target").unwrap().attribute("dev") == Some(target);
        domain.child("devices").unwrap().children_named("disk").find(is_it).unwrap()
    }

    #[test]
    fn served_disks_keep_all_but_source_and_driver_and_come_back_letter_by_letter() {
        let served = serve(DOMAIN, &doors(), Outage::Waits).unwrap();
        let domain = parse(&served);
        let vda = disk(&domain, "vda");
        assert_eq!((vda.attribute("type"), vda.attribute("snapshot")), (Some("network"), Some("no")));
        let driver = vda.child("driver").unwrap();
        assert_eq!((driver.attribute("cache"), driver.attribute("iothread")), (Some("none"), Some("1")));
        assert_eq!(vda.at(&["source", "host"]).unwrap().attribute("socket"), Some("/run/holdfast/nbd.sock"));
        assert_eq!(vda.at(&["source", "reconnect"]).unwrap().attribute("delay"), Some("600"));
        assert_eq!(driver.attribute("error_policy"), Some("stop"));
        assert_eq!(vda.child("boot").unwrap().attribute("order"), Some("1"));
        assert_eq!(vda.children_named("driver").count() + vda.children_named("source").count(), 2);
        let vdb = disk(&domain, "vdb");
        assert_eq!(vdb.attribute("type"), Some("block"));
        assert_eq!(vdb.child("source").unwrap().attribute("dev"), Some("/dev/ublkb7"));
        assert_eq!(domain.at(&["metadata", "note"]).unwrap().text, "keep");
        let originals = originals(&domain);
        assert_eq!(
            parse(&originals["vda"].xml).child("source").unwrap().attribute("file"),
            Some("/images/a & b.raw")
        );

        assert!(matches!(serve(&served, &doors(), Outage::Waits), Err(ServedError::IsServed(_))));
        let (one, restored) = restore(&served, Some(&["vdb".into()]), false).unwrap();
        assert_eq!(restored, ["vdb"]);
        assert_eq!(super::originals(&parse(&one)).keys().collect::<Vec<_>>(), ["vda"]);
        let (back, restored) = restore(&served, None, false).unwrap();
        assert_eq!(restored, ["vda", "vdb"]);
        let blank = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(blank(&back), blank(DOMAIN), "but for blank lines in the metadata");
    }

    #[test]
    fn metadata_is_made_where_there_is_none() {
        let plain = DOMAIN.replace("    <app:note xmlns:app='urn:x'>keep</app:note>\n", "");
        for xml in [
            plain.clone(),
            plain.replace("<metadata>\n  </metadata>", "<metadata/>"),
            plain.replace("  <metadata>\n  </metadata>\n", ""),
        ] {
            let served = serve(&xml, &BTreeMap::from([("vda".into(), nbd("e<1>"))]), Outage::Stops).unwrap();
            assert_eq!(originals(&parse(&served)).len(), 1, "{served}");
            assert_eq!(disk(&parse(&served), "vda").child("source").unwrap().attribute("name"), Some("e<1>"));
            let (back, _) = restore(&served, None, false).unwrap();
            assert!(
                !back.contains("holdfast") && parse(&back).child("devices") == parse(&xml).child("devices")
            );
        }
    }

    #[test]
    fn what_is_not_there_is_named() {
        let missing = serve(DOMAIN, &BTreeMap::from([("vdz".into(), nbd("e"))]), Outage::Stops);
        assert!(matches!(missing, Err(ServedError::NoDisk(disk)) if disk == "vdz"));
        assert!(matches!(serve("<domain", &doors(), Outage::Stops), Err(ServedError::Xml(_))));
        let served = serve(DOMAIN, &doors(), Outage::Waits).unwrap();
        let begin = served.find("<disk type='block'").unwrap();
        let end = begin + served[begin..].find("</disk>").unwrap() + "</disk>".len();
        let without = format!("{}{}", &served[..begin], &served[end..]);
        assert_eq!(restore(&without, None, false).unwrap().1, ["vda"], "a disk that left the VM stays out");
        assert_eq!(restore(DOMAIN, None, false).unwrap(), (DOMAIN.to_owned(), Vec::new()));
    }

    #[test]
    fn what_was_before_counts_only_for_the_very_device_and_domain() {
        let served = serve(DOMAIN, &doors(), Outage::Waits).unwrap();
        assert!(
            names_device(&served, "/dev/ublkb7").unwrap() && !names_device(DOMAIN, "/dev/ublkb7").unwrap()
        );
        // A snapshot or another disk took its place: going back would lose what was written since.
        let replaced = served.replace("<source dev='/dev/ublkb7'/>", "<source dev='/images/overlay'/>");
        let refused = restore(&replaced, None, false);
        assert!(matches!(&refused, Err(ServedError::Changed { disk, .. }) if disk == "vdb"), "{refused:?}");
        let (kept, restored) = restore(&replaced, None, true).unwrap();
        assert_eq!(restored, ["vda"]);
        assert!(kept.contains("/images/overlay") && !kept.contains("holdfast:disk"));
        let again = serve(&replaced, &BTreeMap::from([("vdb".into(), nbd("e9"))]), Outage::Stops).unwrap();
        assert!(originals(&parse(&again))["vdb"].xml.contains("/images/overlay"));
        // A clone's metadata is not the clone's, another tool's element not ours, and no text goes in that isn't that disk.
        let clone = served.replace("<uuid>5d1f1f8e", "<uuid>6d1f1f8e");
        assert!(originals(&parse(&clone)).is_empty());
        let foreign =
            DOMAIN.replace("<app:note xmlns:app='urn:x'>keep</app:note>", "<x:served xmlns:x='urn:x'/>");
        assert!(serve(&foreign, &doors(), Outage::Stops).unwrap().contains("<x:served xmlns:x='urn:x'/>"));
        let forged = served.replace("&lt;target dev=&apos;vda&apos;", "&lt;target dev=&apos;vdz&apos;");
        assert!(matches!(restore(&forged, None, false), Err(ServedError::NoOriginal(_))), "{forged}");
    }

    #[test]
    fn a_definition_that_changed_since_it_was_read_is_noticed() {
        let expect = |path: &str| check_paths(DOMAIN, &BTreeMap::from([("vdb".into(), path.into())]));
        expect("/dev/vg/db").unwrap();
        let changed = expect("/dev/vg/old");
        assert!(
            matches!(&changed, Err(ServedError::Changed { now, .. }) if now == "/dev/vg/db"),
            "{changed:?}"
        );
    }
}
