//! Bodies of replies, and the objects in them (`remote_protocol.x`).

use std::collections::HashMap;

use uuid::Uuid;

use super::MAX_TEXT_BYTES;
use crate::inventory::libvirt::xdr::{Reader, Writer, XdrError};

/// Objects of one kind in a list, at most (`REMOTE_DOMAIN_LIST_MAX` and the like).
const MAX_LIST: u32 = 16384;
/// `REMOTE_CONNECT_GET_ALL_DOMAIN_STATS_MAX`.
const MAX_STATS: u32 = 262_144;
/// `REMOTE_AUTH_TYPE_LIST_MAX`.
const MAX_AUTH_TYPES: u32 = 20;

/// `remote_nonnull_domain`: a domain as calls name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainRef {
    /// Its name at that time.
    pub name: String,
    /// Its UUID, which is what the daemon finds it by.
    pub uuid: Uuid,
    /// Its number while it runs, else -1.
    pub id: i32,
}

/// `remote_nonnull_network`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkRef {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: Uuid,
}

/// `remote_nonnull_storage_pool`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolRef {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: Uuid,
}

/// `remote_nonnull_storage_vol`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeRef {
    /// Its pool's name.
    pub pool: String,
    /// Its name.
    pub name: String,
    /// What its pool's driver knows it by.
    pub key: String,
}

/// A disk of a domain, or a volume, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockInfo {
    /// The size that the guest sees.
    pub capacity_bytes: u64,
    /// What of its storage is used.
    pub allocation_bytes: u64,
    /// How large its file or device is.
    pub physical_bytes: u64,
}

/// A block job that runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockJob {
    /// `virDomainBlockJobType`: 2 is a copy.
    pub kind: i32,
    /// Its limit, in bytes a second; zero for none.
    pub bandwidth_bytes_per_s: u64,
    /// How far it is, in the job's own units (bytes, for a copy).
    pub done: u64,
    /// Where it ends. It grows while the guest writes; a copy that has caught up has `done == end`, both above zero.
    pub end: u64,
}

/// State and disks of a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainStats {
    /// The domain's UUID.
    pub domain: Uuid,
    /// `virDomainState`, if it was told.
    pub state: Option<i32>,
    /// Sizes in bytes that its guest sees, by the disk's target name. One whose size can't be had right now is missing.
    pub capacity_bytes: HashMap<String, u64>,
    /// What its guest has written since its start, in bytes, by the disk's target name.
    pub written_bytes: HashMap<String, u64>,
}

macro_rules! named_object {
    ($name:ident) => {
        impl $name {
            /// Reads one.
            pub fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
                Ok(Self { name: name(reader)?, uuid: uuid(reader)? })
            }

            /// Writes one.
            pub fn write(&self, writer: Writer) -> Writer {
                writer.text(&self.name).array(self.uuid.as_bytes())
            }
        }
    };
}
named_object!(NetworkRef);
named_object!(PoolRef);

impl DomainRef {
    /// Reads one.
    pub fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        Ok(Self { name: name(reader)?, uuid: uuid(reader)?, id: reader.i32()? })
    }

    /// Writes one.
    pub fn write(&self, writer: Writer) -> Writer {
        writer.text(&self.name).array(self.uuid.as_bytes()).i32(self.id)
    }
}

impl VolumeRef {
    /// Reads one.
    pub fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        Ok(Self { pool: name(reader)?, name: name(reader)?, key: name(reader)? })
    }

    /// Writes one.
    pub fn write(&self, writer: Writer) -> Writer {
        writer.text(&self.pool).text(&self.name).text(&self.key)
    }
}

/// Reads a reply's body to its end.
fn whole<'a, T>(
    body: &'a [u8],
    read: impl FnOnce(&mut Reader<'a>) -> Result<T, XdrError>,
) -> Result<T, XdrError> {
    let mut reader = Reader::new(body);
    let value = read(&mut reader)?;
    reader.finish()?;
    Ok(value)
}

/// `remote_auth_list_ret`: kinds of authentication that the daemon asks for (0 none, 1 SASL, 2 polkit).
pub fn auth_kinds(body: &[u8]) -> Result<Vec<i32>, XdrError> {
    whole(body, |reader| reader.list(MAX_AUTH_TYPES, Reader::i32))
}

/// `remote_auth_polkit_ret`, and other replies that are one `int`, such as the number of a registration for events.
pub fn number(body: &[u8]) -> Result<i32, XdrError> {
    whole(body, Reader::i32)
}

/// A reply that has nothing in it.
pub fn nothing(body: &[u8]) -> Result<(), XdrError> {
    whole(body, |_| Ok(()))
}

/// A reply that is one `string`: a host's name, an XML document.
pub fn text(body: &[u8]) -> Result<String, XdrError> {
    whole(body, name)
}

/// `remote_connect_get_lib_version_ret`: `1_000_000 * major + 1_000 * minor + release`.
pub fn lib_version(body: &[u8]) -> Result<u64, XdrError> {
    whole(body, Reader::u64)
}

/// `remote_connect_list_all_domains_ret`.
pub fn domains(body: &[u8]) -> Result<Vec<DomainRef>, XdrError> {
    objects(body, DomainRef::read)
}

/// `remote_connect_list_all_networks_ret`.
pub fn networks(body: &[u8]) -> Result<Vec<NetworkRef>, XdrError> {
    objects(body, NetworkRef::read)
}

/// `remote_connect_list_all_storage_pools_ret`.
pub fn pools(body: &[u8]) -> Result<Vec<PoolRef>, XdrError> {
    objects(body, PoolRef::read)
}

/// `remote_storage_vol_lookup_by_name_ret`.
pub fn volume(body: &[u8]) -> Result<VolumeRef, XdrError> {
    whole(body, VolumeRef::read)
}

/// `remote_domain_define_xml_flags_ret`.
pub fn domain(body: &[u8]) -> Result<DomainRef, XdrError> {
    whole(body, DomainRef::read)
}

/// `remote_domain_get_block_info_ret`.
pub fn block_info(body: &[u8]) -> Result<BlockInfo, XdrError> {
    whole(body, |reader| {
        Ok(BlockInfo {
            allocation_bytes: reader.u64()?,
            capacity_bytes: reader.u64()?,
            physical_bytes: reader.u64()?,
        })
    })
}

/// `remote_domain_get_block_job_info_ret`; none if no job runs.
pub fn block_job(body: &[u8]) -> Result<Option<BlockJob>, XdrError> {
    whole(body, |reader| {
        let found = reader.i32()? != 0;
        let job = BlockJob {
            kind: reader.i32()?,
            bandwidth_bytes_per_s: reader.u64()?,
            done: reader.u64()?,
            end: reader.u64()?,
        };
        Ok(found.then_some(job))
    })
}

/// `remote_connect_get_all_domain_stats_ret`, of which states and disks' capacities are kept.
pub fn domain_stats(body: &[u8]) -> Result<Vec<DomainStats>, XdrError> {
    whole(body, |reader| reader.list(MAX_LIST, read_stats))
}

fn read_stats(reader: &mut Reader<'_>) -> Result<DomainStats, XdrError> {
    let domain = DomainRef::read(reader)?.uuid;
    let mut state = None;
    // A disk's name and its size are two statistics, joined by the number in their names: `block.0.name`, `block.0.capacity`.
    let mut names: HashMap<&str, &str> = HashMap::new();
    let mut capacities: HashMap<&str, u64> = HashMap::new();
    let mut written: HashMap<&str, u64> = HashMap::new();
    for (field, value) in reader.list(MAX_STATS, read_stat)? {
        let block = field.strip_prefix("block.").and_then(|field| field.split_once('.'));
        match (field, block, value) {
            ("state.state", _, StatValue::Int(value)) => state = Some(value),
            (_, Some((disk, "name")), StatValue::Text(name)) => _ = names.insert(disk, name),
            (_, Some((disk, "capacity")), StatValue::Unsigned(bytes)) => _ = capacities.insert(disk, bytes),
            (_, Some((disk, "wr.bytes")), StatValue::Unsigned(bytes)) => _ = written.insert(disk, bytes),
            _ => {}
        }
    }
    let named = |by_number: HashMap<&str, u64>| {
        by_number
            .into_iter()
            .filter_map(|(disk, bytes)| Some(((*names.get(disk)?).to_owned(), bytes)))
            .collect()
    };
    Ok(DomainStats { domain, state, capacity_bytes: named(capacities), written_bytes: named(written) })
}

/// `remote_typed_param_value`.
#[derive(Clone, Copy)]
enum StatValue<'a> {
    Int(i32),
    Unsigned(u64),
    Text(&'a str),
    Other,
}

fn read_stat<'a>(reader: &mut Reader<'a>) -> Result<(&'a str, StatValue<'a>), XdrError> {
    let field = reader.text(MAX_TEXT_BYTES)?;
    // `virTypedParameterType`: int, unsigned int, long long, unsigned long long, double, boolean, string.
    let value = match reader.i32()? {
        1 => StatValue::Int(reader.i32()?),
        2 => StatValue::Unsigned(reader.u32()?.into()),
        3 | 5 => reader.u64().map(|_| StatValue::Other)?,
        4 => StatValue::Unsigned(reader.u64()?),
        6 => reader.i32().map(|_| StatValue::Other)?,
        7 => StatValue::Text(reader.text(MAX_TEXT_BYTES)?),
        value => return Err(XdrError::Unknown { what: "a kind of parameter", value: value.into() }),
    };
    Ok((field, value))
}

fn objects<'a, T>(
    body: &'a [u8],
    read: impl FnMut(&mut Reader<'a>) -> Result<T, XdrError>,
) -> Result<Vec<T>, XdrError> {
    whole(body, |reader| {
        let list = reader.list(MAX_LIST, read)?;
        let _count = reader.u32()?;
        Ok(list)
    })
}

fn name(reader: &mut Reader<'_>) -> Result<String, XdrError> {
    reader.text(MAX_TEXT_BYTES).map(str::to_owned)
}

fn uuid(reader: &mut Reader<'_>) -> Result<Uuid, XdrError> {
    reader.array().map(Uuid::from_bytes)
}
