//! What is called, by the numbers of `remote_protocol.x`.

use std::fmt;

/// A procedure of libvirt's program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum Procedure {
    /// Opens the hypervisor's connection in the daemon.
    Open = 1,
    /// Ends it.
    Close = 2,
    /// What the hypervisor and its host can do, as XML.
    GetCapabilities = 7,
    /// A domain's definition, as XML.
    DomainGetXmlDesc = 14,
    /// The host's name.
    GetHostname = 59,
    /// Which kinds of authentication the daemon asks for.
    AuthList = 66,
    /// Lets polkit decide.
    AuthPolkit = 70,
    /// A storage pool's definition, as XML.
    StoragePoolGetXmlDesc = 88,
    /// A volume of a storage pool by its name.
    StorageVolLookupByName = 95,
    /// A volume's definition, as XML.
    StorageVolGetXmlDesc = 99,
    /// The library's version: the cheapest question that there is.
    GetLibVersion = 157,
    /// A disk's size and what of it is allocated.
    DomainGetBlockInfo = 194,
    /// Ends a block job.
    DomainBlockJobAbort = 237,
    /// How far a block job is.
    DomainGetBlockJobInfo = 238,
    /// All domains.
    ListAllDomains = 273,
    /// All storage pools.
    ListAllStoragePools = 281,
    /// All networks.
    ListAllNetworks = 283,
    /// Asks for events of networks.
    NetworkEventRegisterAny = 313,
    /// Asks for events of domains.
    DomainEventCallbackRegisterAny = 316,
    /// State and disks of many domains.
    GetAllDomainStats = 344,
    /// Copies a running domain's disk elsewhere.
    DomainBlockCopy = 345,
    /// Writes a domain's definition.
    DomainDefineXmlFlags = 350,
    /// Asks for events of storage pools.
    StoragePoolEventRegisterAny = 368,
}

impl Procedure {
    /// Its number on the wire.
    pub fn number(self) -> i32 {
        self as i32
    }
}

impl fmt::Display for Procedure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?} ({})", self.number())
    }
}
