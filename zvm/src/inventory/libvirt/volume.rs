//! A storage volume's definition (<https://libvirt.org/formatstorage.html>).

use crate::inventory::DiskKind;
use crate::inventory::xml::{Element, XmlError};

/// The longest definition that is taken; usual ones have about 1 KiB.
pub const MAX_XML_BYTES: usize = 256 << 10;

/// What a disk that is in a storage pool needs of its volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// Its path on the host, or what its pool calls it.
    pub path: String,
    /// Its size in bytes.
    pub capacity_bytes: Option<u64>,
    /// What is there.
    pub kind: DiskKind,
}

impl Volume {
    /// Reads a definition of at most [`MAX_XML_BYTES`]; none if it has no path.
    pub fn parse(xml: &str) -> Result<Option<Self>, XmlError> {
        let root = Element::parse(xml, MAX_XML_BYTES)?;
        let Some(path) = root.text_at(&["target", "path"]) else { return Ok(None) };
        let format = root.at(&["target", "format"]).and_then(|format| format.attribute("type"));
        // Pools of block devices write `unknown`, or the partition's kind: what is there is the guest's alone.
        let is_file = matches!(root.attribute("type"), None | Some("file"));
        let kind = if !path.starts_with('/') {
            DiskKind::Network
        } else if root.child("backingStore").is_some_and(|backing| !backing.children.is_empty())
            || is_file && format.is_some_and(|format| format != "raw")
            || root.at(&["target", "encryption"]).is_some()
        {
            DiskKind::Image
        } else {
            DiskKind::Raw
        };
        let capacity_bytes = root.text_at(&["capacity"]).and_then(|bytes| bytes.parse().ok());
        Ok(Some(Self { path: path.to_owned(), capacity_bytes, kind }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(kind: &str, path: &str, format: &str) -> Option<Volume> {
        let xml = format!(
            "<volume type='{kind}'><name>v</name><key>{path}</key><source/><capacity unit='bytes'>1048576</capacity>\
             <target><path>{path}</path><format type='{format}'/></target></volume>"
        );
        Volume::parse(&xml).unwrap()
    }

    #[test]
    fn a_volume_tells_its_path_size_and_kind() {
        let cases = [
            (("file", "/srv/v.img", "raw"), DiskKind::Raw),
            (("file", "/srv/v.img", "qcow2"), DiskKind::Image),
            (("block", "/dev/vg/v", "unknown"), DiskKind::Raw),
            (("network", "rbd/v", "raw"), DiskKind::Network),
        ];
        for ((kind, path, format), expected) in cases {
            let volume = volume(kind, path, format).unwrap();
            assert_eq!(
                (volume.path.as_str(), volume.capacity_bytes, volume.kind),
                (path, Some(1 << 20), expected)
            );
        }
        assert_eq!(volume("file", "", "raw"), None);
    }
}
