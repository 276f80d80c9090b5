//! Who is a member of a VPG, since when, and who was one.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{JournalId, VmId, VraId};

/// Most VMs in [`super::VpgDefinition::former`].
pub const MAX_FORMER_VMS: usize = 256;

/// Since which member set a VM is in its VPG: the [`super::VpgDefinition::member_set_version`] of the definition that brought it, 0 in
/// definitions of older releases.
///
/// This is the rule of which VMs a checkpoint is of. It carries the version of the member set that it was taken over (D1), and is of those VMs
/// of the newest definition that were in that set: it is complete when all of their journals hold it (D3), and is opened, locked and
/// extracted with exactly them. VMs that came later have no part in it, and those that were taken out since are not missed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MemberSince(pub u32);

impl MemberSince {
    /// Whether the VM was in the member set of that version, which records have as a longer number than definitions.
    pub fn is_in(self, member_set_version: impl Into<u64>) -> bool {
        u64::from(self.0) <= member_set_version.into()
    }

    /// For definitions that look as older releases wrote them.
    pub(crate) fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// A VM that was taken out of a VPG, for its target: that closes its journal, and removes its files or leaves them. Its files only, not
/// those of a later journal of the same VM. Stays in the definition until all VRAs have had it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FormerVm {
    /// Its id.
    pub id: VmId,
    /// Its name when it was a member.
    pub name: String,
    /// The journal that it had.
    pub journal: JournalId,
    /// Where that lies.
    pub target: VraId,
    /// Target: absolute path of the datastore folder.
    pub datastore: PathBuf,
    /// Target: leave journal and recovery disks in the datastore.
    pub keep_files: bool,
    /// The definition's revision that took it out: whoever has that one has done what is said here.
    pub revision: u64,
}
