//! The host, from the daemon's capabilities (<https://libvirt.org/formatcaps.html>).

use uuid::Uuid;

use crate::inventory::xml::{Element, XmlError};

/// The longest capabilities that are taken: those of hosts with hundreds of processors have some hundred KiB.
pub const MAX_XML_BYTES: usize = 4 << 20;

/// The host's UUID: what libvirt knows the machine by, whatever its name becomes. None if there is none in it.
pub fn host_uuid(capabilities_xml: &str) -> Result<Option<Uuid>, XmlError> {
    let root = Element::parse(capabilities_xml, MAX_XML_BYTES)?;
    Ok(root.text_at(&["host", "uuid"]).and_then(|uuid| Uuid::try_parse(uuid).ok()))
}
