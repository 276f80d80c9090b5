//! What there is to protect and where it can go: one model, read by providers behind one trait.

pub mod changes;
pub mod libvirt;
pub mod model;
pub mod source;
pub mod static_file;
pub mod vcenter;
pub mod world;
pub mod write_rates;
pub mod xml;

use std::future::Future;
use std::pin::Pin;

pub use model::{
    Cluster, Datastore, Disk, DiskKind, FindVmError, Host, HostState, Inventory, Network, Nic, Origin, Power,
    Site, Vm,
};

/// Why an inventory could not be read. The last good reading stays in force.
#[derive(Debug, thiserror::Error)]
pub enum InventoryError {
    /// The source could not be reached or read.
    #[error("cannot read inventory {from}")]
    Read {
        /// The file or address.
        from: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// What was read is not valid.
    #[error("inventory {from}, line {line}: {key}: {reason}")]
    Invalid {
        /// The file or address.
        from: String,
        /// Line, counted from 1.
        line: usize,
        /// The key or section that is wrong.
        key: String,
        /// What is wrong with it and what would be right.
        reason: String,
    },
    /// The source answered and let nobody in.
    #[error("{from} refused: {reason}")]
    Refused {
        /// The source's address.
        from: String,
        /// Its words.
        reason: String,
        /// What to do about it.
        remedy: &'static str,
    },
    /// The source answered with something that its protocol doesn't have, or with more than is taken.
    #[error("{from} gave an answer that cannot be used: {reason}")]
    Protocol {
        /// The source's address.
        from: String,
        /// What was wrong with it.
        reason: String,
    },
}

/// How thoroughly a provider reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reading {
    /// What the source has told since the last reading is enough.
    News,
    /// Everything anew: no source tells of every change.
    Whole,
}

/// Answer of a provider's reading.
pub type ReadFuture<'a> =
    Pin<Box<dyn Future<Output = Result<Option<Inventory>, InventoryError>> + Send + 'a>>;

/// Ends when there is something to read.
pub type ChangedFuture<'a> = Pin<Box<dyn Future<Output = ()> + Send + 'a>>;

/// A source of inventory.
pub trait Provider: Send {
    /// What it reads from, for messages.
    fn describe(&self) -> String;

    /// The whole inventory, or `None` if nothing changed since the last reading (good or bad). Connects if it has to; after an error
    /// the next call begins anew.
    ///
    /// Not cancel safe: a dropped call may count as a reading.
    fn read(&mut self, reading: Reading) -> ReadFuture<'_>;

    /// Ends when the source told of a change, or when the connection to it is lost. Never, for a source that can't tell.
    ///
    /// Cancel safe: what a dropped call would have told, the next one tells.
    fn changed(&mut self) -> ChangedFuture<'_> {
        Box::pin(std::future::pending())
    }
}

impl InventoryError {
    /// What to do about it.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Read { .. } => "check that it is there and can be reached; it is tried again by itself",
            Self::Invalid { .. } => "correct the file; it is read again as soon as it changes",
            Self::Refused { remedy, .. } => remedy,
            Self::Protocol { .. } => "check that the address is that of the hypervisor, and its version",
        }
    }
}
