//! Why something could not be done to a VM at its target.

use std::path::PathBuf;

use journal::crypt::SiteKeyId;
use journal::recovery::OpenError;
use journal::storage::ring::OpenFileError;
use journal::view::ViewError;
use journal::writer::ChangeError;

use super::folder::FolderError;
use super::manifest::ManifestError;
use super::view_memory::NoViewMemory;
use crate::api::{CheckpointId, JournalId, VmId};
use crate::view::ViewDiskError;

/// Why something could not be done to a target VM.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TargetError {
    /// The datastore's side of it.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// A file can't be opened.
    #[error(transparent)]
    OpenFile(#[from] OpenFileError),
    /// The journal can't be opened or made.
    #[error("journal {}", path.display())]
    Journal {
        /// Its file.
        path: PathBuf,
        /// Why.
        #[source]
        source: OpenError,
    },
    /// The group wants encryption.
    #[error(
        "the VPG's journals are to be encrypted, and this VRA has no site key: it comes from the ZVM, or from `target.site_key_file`"
    )]
    NoSiteKey,
    /// Keys were to be replaced by others without one that is needed.
    #[error(
        "the site's keys were not taken: site key {key}, which the journal of VM {vm} needs, is not among them. Put it back into the ZVM's file of site keys, from a backup, and restart the ZVM"
    )]
    SiteKeyMissing {
        /// Whose journal.
        vm: VmId,
        /// The key's name.
        key: SiteKeyId,
    },
    /// A segment of the journal can't be read.
    #[error("journal {} can't be read", path.display())]
    Segment {
        /// Its file.
        path: PathBuf,
        /// Why.
        #[source]
        source: journal::recovery::SegmentError,
    },
    /// The journal's manifest can't be used.
    #[error("journal {}", path.display())]
    Manifest {
        /// Its file.
        path: PathBuf,
        /// Why.
        #[source]
        source: ManifestError,
    },
    /// The journal has no readable manifest.
    #[error("journal {} has no readable manifest: verify it with vra-journal", path.display())]
    NoManifest {
        /// Its file.
        path: PathBuf,
    },
    /// The folder has another journal than the definition names.
    #[error(
        "{} is journal {found}, but the VM's definition names {expected}: move the folder away for a new journal, or define the VM with this one",
        path.display()
    )]
    JournalDiffers {
        /// Its file.
        path: PathBuf,
        /// Its id.
        found: JournalId,
        /// The id wanted.
        expected: JournalId,
    },
    /// A volume is smaller in the definition.
    #[error(
        "volume {volume} of VM {vm} has {known_bytes} bytes in its journal and {wanted_bytes} in the definition: a protected disk only grows. \
         For a smaller one protect the VM anew"
    )]
    VolumeShrunk {
        /// The VM.
        vm: VmId,
        /// The volume's number.
        volume: u16,
        /// Its size, in bytes.
        known_bytes: u64,
        /// That of the definition, in bytes.
        wanted_bytes: u64,
    },
    /// The definition's volumes are not those of the journal.
    #[error("the volumes of VM {vm} are not those of its journal {}: protect it with a new journal", path.display())]
    VolumesDiffer {
        /// The VM.
        vm: VmId,
        /// Its journal's file.
        path: PathBuf,
    },
    /// The journal has a volume that the definition doesn't.
    #[error(
        "the definition of VM {vm} is without disk {volume}, which its journal {} has: protect the disk again, then take it out",
        path.display()
    )]
    VolumeLacking {
        /// The VM.
        vm: VmId,
        /// The first one's number.
        volume: u16,
        /// Its journal's file.
        path: PathBuf,
    },
    /// A recovery disk is shorter than its volume.
    #[error("recovery disk {} has {found_bytes} bytes, its volume has {expected_bytes}: it was cut; protect the VM with a new journal", path.display())]
    DiskCut {
        /// Its file.
        path: PathBuf,
        /// Its length.
        found_bytes: u64,
        /// The volume's size.
        expected_bytes: u64,
    },
    /// The journal may use too little space to work.
    #[error("a journal limit of {limit_bytes} bytes is too low: give it at least {least_bytes}")]
    JournalLimit {
        /// The definition's limit.
        limit_bytes: u64,
        /// The least that works.
        least_bytes: u64,
    },
    /// The definition can't be used.
    #[error("the definition can't be used: {0}")]
    Definition(&'static str),
    /// The host's side of it.
    #[error("{operation} failed")]
    Host {
        /// What was being done.
        operation: &'static str,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// The VM's files are closed, or being opened again after a failure.
    #[error("the journal of VM {vm} is not open{}", reason.as_deref().map(|reason| format!(": {reason}")).unwrap_or_default())]
    NotOpen {
        /// The VM.
        vm: VmId,
        /// What went wrong with it, if anything did.
        reason: Option<String>,
    },
    /// A file isn't the one that was open before.
    #[error(
        "{} was moved, removed or replaced while it was in use: put back the file that was there, or, if what is there now is a whole copy of \
         journal and recovery disks made together, restart the VRA",
        path.display()
    )]
    Moved {
        /// Where it was.
        path: PathBuf,
    },
    /// No VM of this id.
    #[error("no journal of VM {0} is open here")]
    UnknownVm(VmId),
    /// Views of the VM are open.
    #[error("{count} views of VM {vm} are open: close them first")]
    InUse {
        /// The VM.
        vm: VmId,
        /// How many.
        count: usize,
    },
    /// The journal has no such checkpoint.
    #[error("VM {vm} has no checkpoint {checkpoint}: list what there is; an older one may be gone")]
    NoSuchCheckpoint {
        /// The VM.
        vm: VmId,
        /// The checkpoint.
        checkpoint: CheckpointId,
    },
    /// More locks than the journal's manifest is meant for.
    #[error("{most} checkpoints of VM {vm} are locked, the most that are possible: unlock some")]
    TooManyLocks {
        /// The VM.
        vm: VmId,
        /// How many there may be.
        most: usize,
    },
    /// What the journal says of its VM stays as it was.
    #[error("the manifest of journal {} was not written: if it is too long, unlock checkpoints", path.display())]
    ManifestNotWritten {
        /// The journal's file.
        path: PathBuf,
        /// Why.
        #[source]
        source: ChangeError,
    },
    /// The journal has no checkpoint yet, or none that old.
    #[error("VM {vm} has no checkpoint {which}")]
    NoCheckpoint {
        /// The VM.
        vm: VmId,
        /// Of those asked for.
        which: &'static str,
    },
    /// The view can't be opened.
    #[error("the view can't be opened")]
    View(#[source] ViewError),
    /// Views have as much memory as they may.
    #[error("no memory for another view of VM {vm}")]
    ViewMemory {
        /// Which VM.
        vm: VmId,
        /// How much.
        #[source]
        source: NoViewMemory,
    },
    /// What is copied for a locked checkpoint can't be kept, or not be read.
    #[error("overlay {}", path.display())]
    Overlay {
        /// Its file.
        path: PathBuf,
        /// Why.
        #[source]
        source: ViewDiskError,
    },
}
