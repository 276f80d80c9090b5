//! How a group's VMs are to be recovered, as a user writes it in the group's file.

use std::path::PathBuf;

use serde::Deserialize;

use crate::api::DiskName;
use crate::model::recovery::{
    BootGroup, GroupRecovery, NicRecovery, RecoveryPlace, Script, VmRecovery, default_timeout_s,
};
use crate::units::parse_duration;

/// `[recovery]`: what goes for the whole group.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecoveryTable {
    /// The host that runs its VMs.
    pub host: Option<String>,
    /// The network of their cards in a failover.
    pub network: Option<String>,
    /// The network of their cards in a test.
    pub test_network: Option<String>,
    /// The folder that they are listed in.
    pub folder: Option<String>,
    /// The order in which they are started.
    #[serde(default)]
    pub boot_group: Vec<BootGroupTable>,
    /// Run before the first VM is made.
    pub pre_script: Option<ScriptTable>,
    /// Run after the last VM was started.
    pub post_script: Option<ScriptTable>,
}

/// `[[recovery.boot_group]]`: VMs that are started together.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootGroupTable {
    /// Its name.
    pub name: String,
    /// How long the next group waits after this one was started.
    pub delay: Option<String>,
}

/// `[recovery.pre_script]`, `[recovery.post_script]`: a program.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScriptTable {
    /// Its absolute path.
    pub command: PathBuf,
    /// Its arguments.
    #[serde(default)]
    pub arguments: Vec<String>,
    /// How long it may take.
    pub timeout: Option<String>,
}

/// `[vm.recovery]`: what goes for one VM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmRecoveryTable {
    /// Another host than the group's.
    pub host: Option<String>,
    /// Another network than the group's.
    pub network: Option<String>,
    /// Another test network than the group's.
    pub test_network: Option<String>,
    /// Another folder than the group's.
    pub folder: Option<String>,
    /// The boot group that it is started with.
    pub boot_group: Option<String>,
    /// Its network cards.
    #[serde(default)]
    pub nic: Vec<NicRecovery>,
}

impl RecoveryTable {
    /// What the manager is asked for.
    pub fn into_recovery(self) -> Result<GroupRecovery, String> {
        let boot_group = |table: BootGroupTable| {
            let delay_s = table.delay.map_or(Ok(0), |delay| seconds(&delay))?;
            Ok(BootGroup { name: table.name, delay_s })
        };
        let script = |table: ScriptTable| {
            let timeout_s = table.timeout.map_or_else(|| Ok(default_timeout_s()), |text| seconds(&text))?;
            Ok::<_, String>(Script { command: table.command, arguments: table.arguments, timeout_s })
        };
        let (host, network, test_network, folder) = (self.host, self.network, self.test_network, self.folder);
        Ok(GroupRecovery {
            place: RecoveryPlace { host, network, test_network, folder },
            boot_groups: self.boot_group.into_iter().map(boot_group).collect::<Result<_, String>>()?,
            pre_script: self.pre_script.map(script).transpose()?,
            post_script: self.post_script.map(script).transpose()?,
        })
    }
}

impl VmRecoveryTable {
    /// What the manager is asked for.
    pub fn into_recovery(self) -> VmRecovery {
        let (host, network, test_network, folder) = (self.host, self.network, self.test_network, self.folder);
        VmRecovery {
            place: RecoveryPlace { host, network, test_network, folder },
            boot_group: self.boot_group,
            nics: self.nic,
        }
    }
}

/// Reads `VM:DISK`.
pub(super) fn parse_disk(text: &str) -> Result<DiskName, String> {
    match text.rsplit_once(':') {
        Some((vm, disk)) if !vm.is_empty() && !disk.is_empty() => {
            Ok(DiskName { vm: vm.to_owned(), disk: disk.to_owned() })
        }
        _ => Err(format!("{text:?} is not a disk of a VM; write both as in db:vdb")),
    }
}

fn seconds(text: &str) -> Result<u32, String> {
    let duration = parse_duration(text)?;
    match u32::try_from(duration.as_secs()) {
        Ok(seconds) if duration.subsec_nanos() == 0 => Ok(seconds),
        _ => Err(format!("{text:?} is not a whole number of seconds, or too long")),
    }
}
