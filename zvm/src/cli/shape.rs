//! A group as a user writes it, by options or in a TOML file.

use std::path::Path;

use serde::Deserialize;
use vra::api::vpg::JournalSize;
use vra::config::{MAX_CONFIG_BYTES, read_text};

use crate::api::{VmSpec, VpgSpec, defaults};
use crate::model::vpg::Priority;
use crate::units::{parse_bytes, parse_duration, parse_journal_size};

/// A group in a TOML file: sizes and durations as text. `docs/zvm.md` shows it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, clap::Args)]
#[serde(deny_unknown_fields)]
pub struct VpgFile {
    /// Name of the group.
    pub name: Option<String>,
    /// What it is for.
    #[arg(long)]
    pub description: Option<String>,
    /// Low, Medium or High.
    #[arg(long)]
    pub priority: Option<String>,
    /// VRA that keeps the journals.
    #[arg(long, value_name = "VRA")]
    pub target: Option<String>,
    /// Datastore of the inventory, or absolute path of a folder at the target.
    #[arg(long, value_name = "NAME|PATH")]
    pub datastore: Option<String>,
    /// Space for each VM's journal, or how many percent of the VM's disks [default: 10 GiB].
    #[arg(long, value_name = "SIZE|PERCENT%")]
    pub journal_limit: Option<String>,
    /// Warn when a VM's journal uses this much, or so many percent of the VM's disks.
    #[arg(long, value_name = "SIZE|PERCENT%")]
    pub journal_warning: Option<String>,
    /// Space that each VM's journal keeps even if the history doesn't need it.
    #[arg(long, value_name = "SIZE")]
    pub journal_minimum: Option<String>,
    /// How long history is wanted [default: 4h].
    #[arg(long, value_name = "DURATION")]
    pub history: Option<String>,
    /// Time between checkpoints, 1s to 1h [default: 5s].
    #[arg(long, value_name = "DURATION")]
    pub checkpoint_interval: Option<String>,
    /// Longest time that a checkpoint may hold guests' writes, 10ms to 1s [default: 100ms].
    #[arg(long, value_name = "DURATION")]
    pub hold_deadline: Option<String>,
    /// RPO to be warned beyond [default: 30s].
    #[arg(long, value_name = "DURATION")]
    pub rpo_target: Option<String>,
    /// When a full sync does not fit the journal, stop replicating rather than give up old checkpoints.
    #[arg(long)]
    #[serde(default)]
    pub keep_history: bool,
    /// Encrypt journals and scratch on the datastore.
    #[arg(long)]
    #[serde(default)]
    pub encrypt: bool,
    /// Name or UUID of a VM in the inventory; once for each.
    #[arg(long = "vm", value_name = "VM")]
    #[serde(default)]
    pub vms: Vec<String>,
    /// VMs with settings of their own.
    #[arg(skip)]
    #[serde(default)]
    pub vm: Vec<VmTable>,
}

/// A VM with settings of its own.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmTable {
    /// Its name or UUID in the inventory.
    pub name: String,
    /// Another target than the group's.
    pub target: Option<String>,
    /// Another datastore than the group's.
    pub datastore: Option<String>,
    /// Another journal limit than the group's.
    pub journal_limit: Option<String>,
    /// Another warning threshold than the group's.
    pub journal_warning: Option<String>,
    /// Another minimum than the group's.
    pub journal_minimum: Option<String>,
}

impl VpgFile {
    /// Reads a file.
    pub fn read(path: &Path) -> Result<Self, String> {
        let text = read_text(path, MAX_CONFIG_BYTES)
            .map_err(|error| format!("cannot read {}: {error}", path.display()))?;
        toml::from_str(&text)
            .map_err(|error| format!("{} is not valid: {}", path.display(), error.to_string().trim_end()))
    }

    /// Takes from `other` what is not said here.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self {
            name: self.name.or(other.name),
            description: self.description.or(other.description),
            priority: self.priority.or(other.priority),
            target: self.target.or(other.target),
            datastore: self.datastore.or(other.datastore),
            journal_limit: self.journal_limit.or(other.journal_limit),
            journal_warning: self.journal_warning.or(other.journal_warning),
            journal_minimum: self.journal_minimum.or(other.journal_minimum),
            history: self.history.or(other.history),
            checkpoint_interval: self.checkpoint_interval.or(other.checkpoint_interval),
            hold_deadline: self.hold_deadline.or(other.hold_deadline),
            rpo_target: self.rpo_target.or(other.rpo_target),
            keep_history: self.keep_history || other.keep_history,
            encrypt: self.encrypt || other.encrypt,
            vms: if self.vms.is_empty() { other.vms } else { self.vms },
            vm: if self.vm.is_empty() { other.vm } else { self.vm },
        }
    }

    /// What the manager is asked for.
    pub fn into_spec(self) -> Result<VpgSpec, String> {
        let missing = |what: &str, how: &str| format!("{what} is missing: give {how}");
        let plain = self.vms.into_iter().map(|vm| Ok(VmSpec { vm, ..VmSpec::default() }));
        let special = self.vm.into_iter().map(|vm| {
            let (journal_limit_bytes, journal_limit_percent) = limit(vm.journal_limit.as_deref())?;
            Ok(VmSpec {
                vm: vm.name,
                target: vm.target,
                datastore: vm.datastore,
                journal_limit_bytes,
                journal_limit_percent,
                journal_warning: vm.journal_warning.as_deref().map(parse_journal_size).transpose()?,
                journal_minimum_bytes: vm.journal_minimum.as_deref().map(parse_bytes).transpose()?,
            })
        });
        let vms = plain.chain(special).collect::<Result<Vec<_>, String>>()?;
        if vms.is_empty() {
            return Err(missing("a VM", "--vm for each VM of the group, or `vms` in the file"));
        }
        let (journal_limit_bytes, journal_limit_percent) = limit(self.journal_limit.as_deref())?;
        Ok(VpgSpec {
            name: self
                .name
                .ok_or_else(|| missing("the name", "it as the first argument, or `name` in the file"))?,
            description: self.description.unwrap_or_default(),
            priority: match self.priority {
                Some(priority) => priority.parse::<Priority>().map_err(|error| error.to_string())?,
                None => defaults::priority(),
            },
            target: self.target.ok_or_else(|| missing("the target", "--target, or `target` in the file"))?,
            datastore: self
                .datastore
                .ok_or_else(|| missing("the datastore", "--datastore, or `datastore` in the file"))?,
            journal_limit_bytes: journal_limit_bytes.unwrap_or_else(defaults::journal_limit_bytes),
            journal_limit_percent,
            journal_warning: self.journal_warning.as_deref().map(parse_journal_size).transpose()?,
            journal_minimum_bytes: self.journal_minimum.as_deref().map_or(Ok(0), parse_bytes)?,
            history_s: match self.history {
                Some(history) => parse_duration(&history)?.as_secs(),
                None => defaults::history_s(),
            },
            checkpoint_interval_ms: match self.checkpoint_interval {
                Some(interval) => milliseconds(&interval)?,
                None => defaults::checkpoint_interval_ms(),
            },
            hold_deadline_ms: match self.hold_deadline {
                Some(deadline) => milliseconds(&deadline)?,
                None => defaults::hold_deadline_ms(),
            },
            rpo_target_s: match self.rpo_target {
                Some(target) => parse_duration(&target)?.as_secs(),
                None => defaults::rpo_target_s(),
            },
            give_up_history: !self.keep_history,
            encrypt: self.encrypt,
            vms,
        })
    }
}

/// A journal limit: in bytes, or in percent of the disks.
fn limit(text: Option<&str>) -> Result<(Option<u64>, Option<u32>), String> {
    Ok(match text.map(parse_journal_size).transpose()? {
        None => (None, None),
        Some(JournalSize::Bytes(bytes)) => (Some(bytes), None),
        Some(JournalSize::Percent(percent)) => (None, Some(percent)),
    })
}

fn milliseconds(text: &str) -> Result<u32, String> {
    u32::try_from(parse_duration(text)?.as_millis()).map_err(|_| format!("{text} is too long"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = r#"
name = "shop"
target = "vra-b"
datastore = "ds1"
history = "24h"
checkpoint_interval = "1s"
journal_limit = "25%"
journal_warning = "8 GiB"
vms = ["web"]

[[vm]]
name = "db"
journal_limit = "50 GiB"
"#;

    #[test]
    fn a_file_with_options_over_it_becomes_a_specification() {
        let file: VpgFile = toml::from_str(FILE).unwrap();
        let options = VpgFile { history: Some("8h".into()), ..VpgFile::default() };
        let spec = options.or(file).into_spec().unwrap();
        assert_eq!(
            (spec.name.as_str(), spec.history_s, spec.checkpoint_interval_ms),
            ("shop", 8 * 3_600, 1_000)
        );
        assert_eq!(spec.vms[0].journal_limit_bytes, None);
        assert_eq!(spec.vms[1].journal_limit_bytes, Some(50 << 30));
        assert_eq!((spec.journal_limit_percent, spec.journal_minimum_bytes), (Some(25), 0));
        assert_eq!(spec.journal_warning, Some(JournalSize::Bytes(8 << 30)));
        assert!(spec.give_up_history);
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        let file: VpgFile = toml::from_str(FILE).unwrap();
        let without = VpgFile { target: None, ..file.clone() };
        assert!(without.into_spec().unwrap_err().contains("--target"));
        let without = VpgFile { vms: vec![], vm: vec![], ..file.clone() };
        assert!(without.into_spec().unwrap_err().contains("--vm"));
        let wrong = VpgFile { priority: Some("urgent".into()), ..file };
        assert!(wrong.into_spec().unwrap_err().contains("Low, Medium, High"));
        assert!(toml::from_str::<VpgFile>("nmae = 'x'").is_err());
    }
}
