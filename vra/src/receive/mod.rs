//! The target's end of a VM's stream: checks what comes, puts it into the journal or, during a base sync, onto the recovery disks, and
//! acknowledges what is durable.
//!
//! [`Receiver`] decides everything about one VM and does no I/O.

mod admission;
mod base_apply;
mod checkpoint_list;
mod files;
mod folder;
mod forecast;
mod history;
mod intake;
mod manifest;
mod memory;
mod outbox;
mod overlay;
mod receiver;
mod receiver_types;
mod redefinition;
mod scrub;
mod shared_keys;
mod stream;
mod target_error;
mod target_host;
mod target_vm;
mod view_memory;
mod worker;

#[cfg(test)]
mod end_to_end_tests;
#[cfg(test)]
pub(crate) mod test_pair;

pub use base_apply::{BaseApply, DiskAction, DiskError};
pub use checkpoint_list::{CheckpointKey, CheckpointList, ListedCheckpoint};
pub use folder::{AddedDisks, FolderError, GrownDisks, JOURNAL_FILE, NewDisk, Unfinished, VmFolder};
pub use forecast::Forecast;
pub use history::History;
pub use intake::{Intake, IntakeError};
pub use manifest::{LockedCheckpoint, Manifest, ManifestError};
pub use memory::{BatchBuffer, ReceiveMemory, StreamMemory};
pub use receiver::Receiver;
pub use receiver_types::{
    Failure, HistorySpan, Pins, ReceiverEvent, ReceiverOutput, ReceiverPolicy, ReceiverStatus, StreamId,
    VmIdentity,
};
pub use scrub::ScrubSettings;
pub use shared_keys::SharedKeys;
pub use target_error::TargetError;
pub use target_host::{FormerFiles, Prepared, TargetHost, TargetSettings};
pub use target_vm::{OpenedView, Pin, TargetVm};

pub(crate) use crate::report::chain as error_chain;
