//! What a daemon is asked, as calls with types.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::timeout;
use zeroize::Zeroizing;

use super::address::{Address, HYPERVISOR_URI};
use super::connection::{Connection, Timeouts};
use super::error::LibvirtError;
use super::message::MessageError;
use super::message::event::{DOMAIN_EVENT_IDS, Event, LIFECYCLE_EVENT_ID};
use super::message::procedure::Procedure;
use super::message::reply::{
    self, BlockInfo, BlockJob, DomainRef, DomainStats, NetworkRef, PoolRef, VolumeRef,
};
use super::stream;
use super::tls::TlsFiles;
use super::xdr::{Writer, XdrError};

/// Flags of `libvirt-domain.h`.
mod flag {
    pub(super) const XML_SECURE: u32 = 1 << 0;
    pub(super) const XML_INACTIVE: u32 = 1 << 1;
    pub(super) const DEFINE_VALIDATE: u32 = 1 << 0;
    pub(super) const STATS_STATE: u32 = 1 << 0;
    pub(super) const STATS_BLOCK: u32 = 1 << 5;
    /// Leaves out what a domain that is busy can't tell now, instead of waiting for it.
    pub(super) const STATS_NOWAIT: u32 = 1 << 29;
    pub(super) const BLOCK_COPY_REUSE_EXT: u32 = 1 << 1;
    pub(super) const BLOCK_COPY_TRANSIENT_JOB: u32 = 1 << 2;
    pub(super) const BLOCK_JOB_ABORT_PIVOT: u32 = 1 << 1;
    pub(super) const BLOCK_JOB_INFO_BANDWIDTH_BYTES: u32 = 1 << 0;
    /// `VIR_CONNECT_LIST_DOMAINS_PERSISTENT`.
    pub(super) const LIST_PERSISTENT: u32 = 1 << 2;
    /// `VIR_CONNECT_LIST_DOMAINS_MANAGEDSAVE`.
    pub(super) const LIST_SAVED: u32 = 1 << 8;
    /// `VIR_CONNECT_LIST_STORAGE_POOLS_ACTIVE`, `_DIR`, `_FS` and `_NETFS`.
    pub(super) const LIST_ACTIVE_FOLDER_POOLS: u32 = 1 << 1 | 1 << 6 | 1 << 7 | 1 << 8;
}

/// `remote_auth_type`.
mod auth {
    pub(super) const NONE: i32 = 0;
    pub(super) const POLKIT: i32 = 2;
}

/// How a disk is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BlockCopy {
    /// The destination is there already, as large as it must be.
    pub reuse_destination: bool,
    /// Of a domain with a definition, too: the copy does not outlive the guest's process, and is given up with it.
    pub transient_job: bool,
}

/// A daemon that has let this client in. Clones share the connection.
#[derive(Debug, Clone)]
pub struct Client {
    connection: Arc<Connection>,
}

impl Client {
    /// Connects, authenticates and opens the hypervisor, all within [`Timeouts::connect_ms`].
    ///
    /// The channel gives the events that [`Self::subscribe`] asks for, and ends with the connection.
    pub async fn connect(
        address: &Address,
        tls: &TlsFiles,
        timeouts: Timeouts,
    ) -> Result<(Self, mpsc::Receiver<Event>), LibvirtError> {
        let limit = Duration::from_millis(timeouts.connect_ms);
        let connected = async {
            let stream = stream::dial(address, tls, limit).await?;
            let (connection, events) = Connection::new(stream, timeouts);
            let client = Self { connection: Arc::new(connection) };
            client.authenticate().await?;
            let arguments = Writer::default().u32(1).text(HYPERVISOR_URI).u32(0);
            client.ask(Procedure::Open, arguments, reply::nothing).await?;
            Ok((client, events))
        };
        let late = |_| LibvirtError::Timeout { what: "a connection".into(), timeout_ms: timeouts.connect_ms };
        timeout(limit, connected).await.map_err(late)?
    }

    async fn authenticate(&self) -> Result<(), LibvirtError> {
        let kinds = self.ask(Procedure::AuthList, Writer::default(), reply::auth_kinds).await?;
        if kinds.contains(&auth::NONE) {
            return Ok(());
        }
        if kinds.contains(&auth::POLKIT) {
            let refused = |reason: String| LibvirtError::Authentication {
                reason,
                remedy: "let polkit allow org.libvirt.unix.manage to the manager's user without a question, or put it \
                         into the group that unix_sock_group names with auth_unix_rw = \"none\"",
            };
            return match self.ask(Procedure::AuthPolkit, Writer::default(), reply::number).await {
                Ok(complete) if complete != 0 => Ok(()),
                Ok(_) => Err(refused("polkit wants to know more".into())),
                Err(LibvirtError::Remote { error, .. }) => Err(refused(error.to_string())),
                Err(error) => Err(error),
            };
        }
        Err(LibvirtError::Authentication {
            reason: "the daemon asks for a name and a password (SASL), which isn't spoken here".into(),
            remedy: "use qemu+tls:// with a client certificate and auth_tls = \"none\" in libvirtd.conf",
        })
    }

    /// Asks for events of domains, networks and storage pools.
    pub async fn subscribe(&self) -> Result<(), LibvirtError> {
        for id in DOMAIN_EVENT_IDS {
            let arguments = Writer::default().i32(id).u32(0);
            self.ask(Procedure::DomainEventCallbackRegisterAny, arguments, reply::number).await?;
        }
        for procedure in [Procedure::NetworkEventRegisterAny, Procedure::StoragePoolEventRegisterAny] {
            let arguments = Writer::default().i32(LIFECYCLE_EVENT_ID).u32(0);
            if_driver(self.ask(procedure, arguments, reply::number).await)?;
        }
        Ok(())
    }

    /// Whether the connection has ended, and why.
    pub fn ended(&self) -> Option<LibvirtError> {
        self.connection.has_ended().then(|| self.connection.ended())
    }

    /// Says goodbye; waits for that if no clone of it is left.
    pub async fn close(self) {
        if let Some(connection) = Arc::into_inner(self.connection) {
            connection.close().await;
        }
    }

    /// The host's name as the daemon knows it.
    pub async fn hostname(&self) -> Result<String, LibvirtError> {
        self.ask(Procedure::GetHostname, Writer::default(), reply::text).await
    }

    /// What host and hypervisor can do, as XML.
    pub async fn capabilities(&self) -> Result<String, LibvirtError> {
        self.ask(Procedure::GetCapabilities, Writer::default(), reply::text).await
    }

    /// All domains, running or not.
    pub async fn domains(&self) -> Result<Vec<DomainRef>, LibvirtError> {
        let arguments = Writer::default().i32(1).u32(0);
        self.ask(Procedure::ListAllDomains, arguments, reply::domains).await
    }

    /// Those domains that have a definition, running or not: others are gone with their guest.
    pub async fn persistent_domains(&self) -> Result<Vec<DomainRef>, LibvirtError> {
        let arguments = Writer::default().i32(1).u32(flag::LIST_PERSISTENT);
        self.ask(Procedure::ListAllDomains, arguments, reply::domains).await
    }

    /// Those domains that were put to sleep with their memory saved: they wake with the disks that they had.
    pub async fn saved_domains(&self) -> Result<Vec<DomainRef>, LibvirtError> {
        let arguments = Writer::default().i32(1).u32(flag::LIST_SAVED);
        self.ask(Procedure::ListAllDomains, arguments, reply::domains).await
    }

    /// All networks, active or not; none without a driver for networks.
    pub async fn networks(&self) -> Result<Vec<NetworkRef>, LibvirtError> {
        let arguments = Writer::default().i32(1).u32(0);
        let answer = self.ask(Procedure::ListAllNetworks, arguments, reply::networks).await;
        if_driver(answer).map(Option::unwrap_or_default)
    }

    /// All active storage pools that are folders; none without a driver for storage.
    pub async fn folder_pools(&self) -> Result<Vec<PoolRef>, LibvirtError> {
        self.list_pools(flag::LIST_ACTIVE_FOLDER_POOLS).await
    }

    /// All storage pools of whatever kind, active or not; none without a driver for storage.
    pub async fn pools(&self) -> Result<Vec<PoolRef>, LibvirtError> {
        self.list_pools(0).await
    }

    async fn list_pools(&self, flags: u32) -> Result<Vec<PoolRef>, LibvirtError> {
        let arguments = Writer::default().i32(1).u32(flags);
        let answer = self.ask(Procedure::ListAllStoragePools, arguments, reply::pools).await;
        if_driver(answer).map(Option::unwrap_or_default)
    }

    /// A pool's definition, with its capacity as of its last refresh.
    pub async fn pool_xml(&self, pool: &PoolRef) -> Result<String, LibvirtError> {
        let arguments = pool.write(Writer::default()).u32(0);
        self.ask(Procedure::StoragePoolGetXmlDesc, arguments, reply::text).await
    }

    /// A volume by its name.
    pub async fn volume(&self, pool: &PoolRef, name: &str) -> Result<VolumeRef, LibvirtError> {
        let arguments = pool.write(Writer::default()).text(name);
        self.ask(Procedure::StorageVolLookupByName, arguments, reply::volume).await
    }

    /// A volume's definition.
    pub async fn volume_xml(&self, volume: &VolumeRef) -> Result<String, LibvirtError> {
        let arguments = volume.write(Writer::default()).u32(0);
        self.ask(Procedure::StorageVolGetXmlDesc, arguments, reply::text).await
    }

    /// A domain's definition: of a running one, what it runs with.
    pub async fn domain_xml(&self, domain: &DomainRef) -> Result<String, LibvirtError> {
        let arguments = domain.write(Writer::default()).u32(0);
        self.ask(Procedure::DomainGetXmlDesc, arguments, reply::text).await
    }

    /// A domain's definition as it will be started the next time. Secrets are left out.
    pub async fn inactive_domain_xml(&self, domain: &DomainRef) -> Result<String, LibvirtError> {
        let arguments = domain.write(Writer::default()).u32(flag::XML_INACTIVE);
        self.ask(Procedure::DomainGetXmlDesc, arguments, reply::text).await
    }

    /// The same with its secrets, such as a console's password: without them a definition that is written back would lose them. To be shown
    /// nowhere.
    pub async fn definition_to_edit(&self, domain: &DomainRef) -> Result<Zeroizing<String>, LibvirtError> {
        let arguments = domain.write(Writer::default()).u32(flag::XML_INACTIVE | flag::XML_SECURE);
        self.ask(Procedure::DomainGetXmlDesc, arguments, reply::text).await.map(Zeroizing::new)
    }

    /// Writes a domain's definition, after a check against libvirt's schema. What runs stays as it is until its next start.
    pub async fn define_domain(&self, xml: &str) -> Result<DomainRef, LibvirtError> {
        let arguments = Writer::default().text(xml).u32(flag::DEFINE_VALIDATE);
        self.ask(Procedure::DomainDefineXmlFlags, arguments, reply::domain).await
    }

    /// States and sizes of disks of these domains, without those that are gone. One call that waits for no guest: what a busy one can't tell
    /// is missing.
    pub async fn domain_stats(&self, domains: &[DomainRef]) -> Result<Vec<DomainStats>, LibvirtError> {
        let count = u32::try_from(domains.len()).unwrap_or(u32::MAX);
        let arguments = domains
            .iter()
            .fold(Writer::default().u32(count), |writer, domain| domain.write(writer))
            .u32(flag::STATS_STATE | flag::STATS_BLOCK)
            .u32(flag::STATS_NOWAIT);
        self.ask(Procedure::GetAllDomainStats, arguments, reply::domain_stats).await
    }

    /// Sizes of one disk, by its target name such as `vda`. Waits for a busy guest.
    pub async fn block_info(&self, domain: &DomainRef, disk: &str) -> Result<BlockInfo, LibvirtError> {
        let arguments = domain.write(Writer::default()).text(disk).u32(0);
        self.ask(Procedure::DomainGetBlockInfo, arguments, reply::block_info).await
    }

    /// Begins to copy a running domain's disk to what `destination_xml` (a `<disk>`) says, and to write all that the guest writes to both, until
    /// [`Self::pivot`] or [`Self::abort_block_job`].
    pub async fn block_copy(
        &self,
        domain: &DomainRef,
        disk: &str,
        destination_xml: &str,
        how: BlockCopy,
    ) -> Result<(), LibvirtError> {
        let flags = [
            (how.reuse_destination, flag::BLOCK_COPY_REUSE_EXT),
            (how.transient_job, flag::BLOCK_COPY_TRANSIENT_JOB),
        ];
        let flags = flags.iter().filter(|(wanted, _)| *wanted).fold(0, |all, (_, flag)| all | flag);
        let arguments = domain.write(Writer::default()).text(disk).text(destination_xml).u32(0).u32(flags);
        self.ask(Procedure::DomainBlockCopy, arguments, reply::nothing).await
    }

    /// How far the disk's block job is; none if there is none.
    pub async fn block_job(&self, domain: &DomainRef, disk: &str) -> Result<Option<BlockJob>, LibvirtError> {
        let arguments = domain.write(Writer::default()).text(disk).u32(flag::BLOCK_JOB_INFO_BANDWIDTH_BYTES);
        self.ask(Procedure::DomainGetBlockJobInfo, arguments, reply::block_job).await
    }

    /// Has the guest use the copy from now on. An error as long as the copy hasn't caught up.
    pub async fn pivot(&self, domain: &DomainRef, disk: &str) -> Result<(), LibvirtError> {
        self.end_block_job(domain, disk, flag::BLOCK_JOB_ABORT_PIVOT).await
    }

    /// Ends a block job; the guest stays with the disk that it has.
    pub async fn abort_block_job(&self, domain: &DomainRef, disk: &str) -> Result<(), LibvirtError> {
        self.end_block_job(domain, disk, 0).await
    }

    async fn end_block_job(&self, domain: &DomainRef, disk: &str, flags: u32) -> Result<(), LibvirtError> {
        let arguments = domain.write(Writer::default()).text(disk).u32(flags);
        self.ask(Procedure::DomainBlockJobAbort, arguments, reply::nothing).await
    }

    async fn ask<T>(
        &self,
        procedure: Procedure,
        arguments: Writer,
        read: impl FnOnce(&[u8]) -> Result<T, XdrError>,
    ) -> Result<T, LibvirtError> {
        let body = self.connection.call(procedure, arguments.into_bytes()).await?;
        read(&body).map_err(|reason| LibvirtError::Protocol(MessageError::Body { procedure, reason }))
    }
}

/// None if the daemon has no driver for what was asked.
fn if_driver<T>(answer: Result<T, LibvirtError>) -> Result<Option<T>, LibvirtError> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(LibvirtError::Remote { error, .. }) if error.is_no_driver() => Ok(None),
        Err(error) => Err(error),
    }
}
