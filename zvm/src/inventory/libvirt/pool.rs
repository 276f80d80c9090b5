//! A storage pool's definition (<https://libvirt.org/formatstorage.html>), and the [`Datastore`] that comes of it.

use std::path::PathBuf;

use uuid::Uuid;

use crate::inventory::xml::{Element, XmlError};
use crate::inventory::{Datastore, Origin};

/// The longest definition that is taken; usual ones have less than 1 KiB.
pub const MAX_XML_BYTES: usize = 256 << 10;

/// Why a text is no pool's definition that can be used.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// It is no XML, or too much of it.
    #[error(transparent)]
    Xml(#[from] XmlError),
    /// Something that each pool has is missing or wrong.
    #[error("its {0} is missing or wrong")]
    Missing(&'static str),
}

/// A folder that libvirt keeps volumes in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    /// Its UUID.
    pub uuid: Uuid,
    /// Its name.
    pub name: String,
    /// Its folder.
    pub path: PathBuf,
    /// Whether it is a network file system (`netfs`), which other hosts may mount, too.
    pub is_on_network: bool,
    /// Its size in bytes, as of its last refresh.
    pub capacity_bytes: Option<u64>,
    /// What of it is free in bytes, as of its last refresh.
    pub free_bytes: Option<u64>,
}

impl Pool {
    /// Reads a definition of at most [`MAX_XML_BYTES`].
    pub fn parse(xml: &str) -> Result<Self, PoolError> {
        let root = Element::parse(xml, MAX_XML_BYTES)?;
        let uuid = root.text_at(&["uuid"]).and_then(|uuid| Uuid::try_parse(uuid).ok());
        let path = root.text_at(&["target", "path"]).map(PathBuf::from).filter(|path| path.is_absolute());
        Ok(Self {
            uuid: uuid.ok_or(PoolError::Missing("<uuid>"))?,
            name: root.text_at(&["name"]).ok_or(PoolError::Missing("<name>"))?.to_owned(),
            path: path.ok_or(PoolError::Missing("<target><path>"))?,
            is_on_network: root.attribute("type") == Some("netfs"),
            capacity_bytes: bytes(&root, "capacity"),
            free_bytes: bytes(&root, "available"),
        })
    }

    /// As a datastore of `host`. A pool that is that host's alone has the host in its name, as other hosts have pools of the same name.
    pub fn into_datastore(self, source: &str, host: &str) -> Datastore {
        Datastore {
            name: if self.is_on_network { self.name } else { format!("{}@{host}", self.name) },
            hosts: vec![host.to_owned()],
            path: self.path,
            capacity_bytes: self.capacity_bytes,
            free_bytes: self.free_bytes,
            origin: Origin { source: source.to_owned(), id: self.uuid.to_string() },
        }
    }
}

/// libvirt writes these in bytes, whatever unit it was given.
fn bytes(pool: &Element, name: &str) -> Option<u64> {
    let value = pool.child(name)?;
    matches!(value.attribute("unit"), None | Some("bytes")).then(|| value.text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From libvirtd 9.0.0.
    const DIR_POOL: &str = "<pool type='dir'>
  <name>images</name>
  <uuid>6be9cf0f-8a3f-4d67-9ba0-6f4f0a6b32cb</uuid>
  <capacity unit='bytes'>266222104576</capacity>
  <allocation unit='bytes'>34876526592</allocation>
  <available unit='bytes'>231345577984</available>
  <source>
  </source>
  <target>
    <path>/srv/images</path>
    <permissions>
      <mode>0755</mode>
      <owner>0</owner>
      <group>0</group>
    </permissions>
  </target>
</pool>
";

    #[test]
    fn a_folder_is_its_hosts_and_a_network_file_system_is_everybodys() {
        let local = Pool::parse(DIR_POOL).unwrap().into_datastore("kvm", "a");
        assert_eq!((local.name.as_str(), local.hosts.as_slice()), ("images@a", &["a".to_owned()][..]));
        assert_eq!(local.path, PathBuf::from("/srv/images"));
        assert_eq!((local.capacity_bytes, local.free_bytes), (Some(266_222_104_576), Some(231_345_577_984)));
        assert_eq!(local.origin.id, "6be9cf0f-8a3f-4d67-9ba0-6f4f0a6b32cb");
        let shared = Pool::parse(&DIR_POOL.replace("'dir'", "'netfs'")).unwrap();
        assert_eq!(shared.into_datastore("kvm", "a").name, "images");
    }

    #[test]
    fn what_every_pool_has_must_be_there() {
        for (from, to) in [("<name>images</name>", ""), ("6be9", "xyz"), ("/srv/images", "images")] {
            let error = Pool::parse(&DIR_POOL.replace(from, to)).unwrap_err();
            assert!(matches!(error, PoolError::Missing(_)), "{error}");
        }
        assert!(matches!(Pool::parse("<pool"), Err(PoolError::Xml(_))));
        let odd = DIR_POOL.replace("unit='bytes'>266222104576", "unit='KiB'>7");
        assert_eq!(Pool::parse(&odd).unwrap().capacity_bytes, None, "a unit that isn't known is no size");
    }
}
