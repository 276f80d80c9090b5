//! What a daemon tells unasked, by the numbers of `remote_protocol.x`.

use uuid::Uuid;

use super::reply::{DomainRef, NetworkRef, PoolRef};
use super::{MAX_TEXT_BYTES, MessageError};
use crate::inventory::libvirt::xdr::{Reader, XdrError};

/// Numbers of the kinds of events that are asked for.
mod number {
    pub(super) const NETWORK_LIFECYCLE: i32 = 315;
    pub(super) const DOMAIN_CALLBACK_LIFECYCLE: i32 = 318;
    pub(super) const DOMAIN_CALLBACK_DEVICE_REMOVED: i32 = 333;
    pub(super) const DOMAIN_BLOCK_JOB_2: i32 = 339;
    pub(super) const DOMAIN_CALLBACK_DEVICE_ADDED: i32 = 354;
    pub(super) const STORAGE_POOL_LIFECYCLE: i32 = 370;
}

/// `virDomainEventID`s that are asked for: lifecycle, device removed, block job (by the disk's target name), device added.
pub const DOMAIN_EVENT_IDS: [i32; 4] = [0, 15, 16, 19];
/// `VIR_NETWORK_EVENT_ID_LIFECYCLE` and `VIR_STORAGE_POOL_EVENT_ID_LIFECYCLE`.
pub const LIFECYCLE_EVENT_ID: i32 = 0;

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A domain was defined, started, paused, renamed, migrated, stopped or undefined.
    DomainLifecycle {
        /// The domain's UUID.
        domain: Uuid,
        /// `virDomainEventType`.
        kind: i32,
        /// Why, which depends on the kind.
        detail: i32,
    },
    /// A running domain got a device, or lost one.
    Device {
        /// The domain's UUID.
        domain: Uuid,
        /// The device's alias, such as `virtio-disk1`.
        alias: String,
    },
    /// A block job ended, or a copy is ready to pivot.
    BlockJob {
        /// The domain's UUID.
        domain: Uuid,
        /// The disk's target name, such as `vda`.
        disk: String,
        /// `virDomainBlockJobType`.
        kind: i32,
        /// `virConnectDomainEventBlockJobStatus`: 0 completed, 1 failed, 2 cancelled, 3 ready.
        status: i32,
    },
    /// A network was defined, started, stopped or undefined.
    Network {
        /// Its UUID.
        network: Uuid,
    },
    /// A storage pool was defined, started, stopped or undefined.
    Pool {
        /// Its UUID.
        pool: Uuid,
    },
    /// More happened than could be kept.
    Missed,
}

impl Event {
    /// Reads an event's body; none for a kind that isn't asked for.
    pub fn parse(procedure: i32, body: &[u8]) -> Result<Option<Self>, MessageError> {
        Self::read(procedure, body).map_err(|reason| MessageError::Unreadable { what: "an event", reason })
    }

    fn read(procedure: i32, body: &[u8]) -> Result<Option<Self>, XdrError> {
        let mut reader = Reader::new(body);
        // Which registration it is for: each kind is registered once.
        let _callback = reader.i32()?;
        let event = match procedure {
            number::DOMAIN_CALLBACK_LIFECYCLE => Self::DomainLifecycle {
                domain: DomainRef::read(&mut reader)?.uuid,
                kind: reader.i32()?,
                detail: reader.i32()?,
            },
            number::DOMAIN_CALLBACK_DEVICE_REMOVED | number::DOMAIN_CALLBACK_DEVICE_ADDED => Self::Device {
                domain: DomainRef::read(&mut reader)?.uuid,
                alias: reader.text(MAX_TEXT_BYTES)?.to_owned(),
            },
            number::DOMAIN_BLOCK_JOB_2 => Self::BlockJob {
                domain: DomainRef::read(&mut reader)?.uuid,
                disk: reader.text(MAX_TEXT_BYTES)?.to_owned(),
                kind: reader.i32()?,
                status: reader.i32()?,
            },
            number::NETWORK_LIFECYCLE => {
                let network = NetworkRef::read(&mut reader)?.uuid;
                let (_kind, _detail) = (reader.i32()?, reader.i32()?);
                Self::Network { network }
            }
            number::STORAGE_POOL_LIFECYCLE => {
                let pool = PoolRef::read(&mut reader)?.uuid;
                let (_kind, _detail) = (reader.i32()?, reader.i32()?);
                Self::Pool { pool }
            }
            _ => return Ok(None),
        };
        reader.finish()?;
        Ok(Some(event))
    }
}
