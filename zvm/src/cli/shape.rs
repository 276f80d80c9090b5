//! A group as a user writes it, by options or in a TOML file.

use std::path::Path;

use serde::Deserialize;
use vra::api::vpg::{JournalSize, Priority};
use vra::config::{MAX_CONFIG_BYTES, read_text};

use super::recovery::{RecoveryTable, VmRecoveryTable, parse_disk};
use crate::api::{RecoveryEdit, VmSpec, VpgSpec, defaults};
use crate::model::vpg::NewDisks;
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
    /// Remind of a test so many days after the last one [default: never].
    #[arg(long = "test-reminder", value_name = "DAYS")]
    pub test_reminder_days: Option<u32>,
    /// Disks that its VMs get: an alert, or protected by themselves [default: alert].
    #[arg(long, value_name = "alert|protect")]
    pub new_disks: Option<NewDisks>,
    /// A disk that is not to be protected, by its VM as given and its name in the inventory; once for each.
    #[arg(long, value_name = "VM:DISK")]
    #[serde(default)]
    pub exclude: Vec<String>,
    /// A disk that is swap: what is written to it after a full sync isn't captured; once for each.
    #[arg(long, value_name = "VM:DISK")]
    #[serde(default)]
    pub swap: Vec<String>,
    /// Name or UUID of a VM in the inventory; once for each.
    #[arg(long = "vm", value_name = "VM")]
    #[serde(default)]
    pub vms: Vec<String>,
    /// VMs with settings of their own.
    #[arg(skip)]
    #[serde(default)]
    pub vm: Vec<VmTable>,
    /// How the VMs are to be recovered.
    #[arg(skip)]
    #[serde(default)]
    pub recovery: RecoveryTable,
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
    /// Names of its disks that are not to be protected.
    #[serde(default)]
    pub exclude: Vec<String>,
    /// Names of its disks that are swap.
    #[serde(default)]
    pub swap: Vec<String>,
    /// How it is to be recovered.
    #[serde(default)]
    pub recovery: VmRecoveryTable,
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
            test_reminder_days: self.test_reminder_days.or(other.test_reminder_days),
            new_disks: self.new_disks.or(other.new_disks),
            exclude: if self.exclude.is_empty() { other.exclude } else { self.exclude },
            swap: if self.swap.is_empty() { other.swap } else { self.swap },
            recovery: if self.recovery == RecoveryTable::default() { other.recovery } else { self.recovery },
        }
    }

    /// How its VMs are to be recovered; all else of it is left.
    pub fn into_recovery(self) -> Result<RecoveryEdit, String> {
        let vms = self.vm.into_iter().map(|vm| (vm.name, vm.recovery.into_recovery()));
        let vms = vms.filter(|(_, recovery)| !recovery.is_empty()).collect();
        Ok(RecoveryEdit { group: self.recovery.into_recovery()?, vms })
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
                exclude: vm.exclude,
                swap: vm.swap,
                recovery: vm.recovery.into_recovery(),
            })
        });
        let mut vms = plain.chain(special).collect::<Result<Vec<_>, String>>()?;
        if vms.is_empty() {
            return Err(missing("a VM", "--vm for each VM of the group, or `vms` in the file"));
        }
        exclude(&mut vms, &self.exclude)?;
        swap(&mut vms, &self.swap)?;
        let (journal_limit_bytes, journal_limit_percent) = limit(self.journal_limit.as_deref())?;
        Ok(VpgSpec {
            name: self
                .name
                .ok_or_else(|| missing("the name", "it as the first argument, or `name` in the file"))?,
            description: self.description.unwrap_or_default(),
            priority: match self.priority {
                Some(priority) => priority.parse::<Priority>().map_err(|error| error.to_string())?,
                None => Priority::default(),
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
            test_reminder_days: self.test_reminder_days,
            new_disks: self.new_disks.unwrap_or_default(),
            recovery: self.recovery.into_recovery()?,
            vms,
        })
    }
}

/// Takes disks, written as `VM:DISK`, out of what is protected of these VMs.
pub(super) fn exclude(vms: &mut [VmSpec], disks: &[String]) -> Result<(), String> {
    assign(vms, disks, "excluded", |vm| &mut vm.exclude)
}

/// Says of disks, written as `VM:DISK`, that they are swap.
pub(super) fn swap(vms: &mut [VmSpec], disks: &[String]) -> Result<(), String> {
    assign(vms, disks, "swap", |vm| &mut vm.swap)
}

fn assign(
    vms: &mut [VmSpec],
    disks: &[String],
    what: &str,
    list: fn(&mut VmSpec) -> &mut Vec<String>,
) -> Result<(), String> {
    for disk in disks {
        let disk = parse_disk(disk)?;
        let vm = vms.iter_mut().find(|vm| vm.vm == disk.vm).ok_or_else(|| {
            let (vm, disk) = (&disk.vm, &disk.disk);
            format!(
                "disk {disk} of VM {vm} can't be {what}, since no VM {vm} is given: write it as it is given"
            )
        })?;
        list(vm).push(disk.disk);
    }
    Ok(())
}

/// A journal limit: in bytes, or in percent of the disks.
fn limit(text: Option<&str>) -> Result<(Option<u64>, Option<u32>), String> {
    Ok(match text.map(parse_journal_size).transpose()? {
        None => (None, None),
        Some(JournalSize::Bytes(bytes)) => (Some(bytes), None),
        Some(JournalSize::Percent(percent)) => (None, Some(percent)),
    })
}

/// A duration in milliseconds.
pub(super) fn milliseconds(text: &str) -> Result<u32, String> {
    u32::try_from(parse_duration(text)?.as_millis()).map_err(|_| format!("{text} is too long"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::recovery::{IpChoice, MacChoice};

    const FILE: &str = r#"
name = "shop"
target = "vra-b"
datastore = "ds1"
history = "24h"
checkpoint_interval = "1s"
journal_limit = "25%"
journal_warning = "8 GiB"
vms = ["web"]

test_reminder_days = 180
exclude = ["web:vdb"]

[recovery]
network = "dr"
test_network = "apart"

[[recovery.boot_group]]
name = "databases"
delay = "2m"

[[recovery.boot_group]]
name = "front"

[recovery.post_script]
command = "/usr/local/bin/dns"
arguments = ["--to", "paris"]
timeout = "90s"

[[vm]]
name = "db"
journal_limit = "50 GiB"
exclude = ["vdc"]

[vm.recovery]
boot_group = "databases"

[[vm.recovery.nic]]
mac = "52:54:00:12:34:56"
failover.ip.static = { address = "10.0.0.5", prefix = 24, gateway = "10.0.0.1", dns = ["10.0.0.2"] }
test = { network = "lab", mac = "new", ip = "dhcp" }
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
    fn a_file_says_how_vms_are_recovered() {
        let file: VpgFile = toml::from_str(FILE).unwrap();
        let edit = file.clone().into_recovery().unwrap();
        let spec = file.clone().into_spec().unwrap();
        assert_eq!((spec.test_reminder_days, &spec.recovery), (Some(180), &edit.group));
        assert_eq!(spec.vms.iter().map(|vm| &vm.exclude[..]).collect::<Vec<_>>(), [["vdb"], ["vdc"]]);
        let [databases, front] = &spec.recovery.boot_groups[..] else { panic!("{:?}", spec.recovery) };
        assert_eq!((databases.delay_s, front.delay_s), (120, 0));
        assert_eq!(spec.recovery.place.network.as_deref(), Some("dr"));
        assert_eq!(spec.recovery.post_script.as_ref().map(|script| script.timeout_s), Some(90));
        assert_eq!(edit.vms, [("db".to_owned(), spec.vms[1].recovery.clone())]);
        let nic = &spec.vms[1].recovery.nics[0];
        let ip = nic.failover.ip.as_ref().map(ToString::to_string);
        assert_eq!(ip.as_deref(), Some("10.0.0.5/24, gateway 10.0.0.1, DNS 10.0.0.2"));
        assert_eq!((&nic.failover.mac, &nic.test.mac), (&MacChoice::Keep, &MacChoice::New));
        assert_eq!(nic.test.ip, Some(IpChoice::Dhcp));

        for (from, to, words) in [
            ("\"2m\"", "\"soon\"", "not a duration"),
            ("\"90s\"", "\"1ms\"", "whole number of seconds"),
            ("web:vdb", "vdb", "as in db:vdb"),
            ("web:vdb", "app:vdb", "no VM app is given"),
        ] {
            let file: VpgFile = toml::from_str(&FILE.replacen(from, to, 1)).unwrap();
            assert!(file.into_spec().unwrap_err().contains(words), "{to}");
        }
        for (from, to) in [("10.0.0.5", "10.0.0"), ("mac = \"new\"", "mac = \"any\""), ("test =", "tests =")]
        {
            assert!(toml::from_str::<VpgFile>(&FILE.replacen(from, to, 1)).is_err(), "{to}");
        }
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        let file: VpgFile = toml::from_str(FILE).unwrap();
        let without = VpgFile { target: None, ..file.clone() };
        assert!(without.into_spec().unwrap_err().contains("--target"));
        let without = VpgFile { vms: vec![], vm: vec![], exclude: vec![], ..file.clone() };
        assert!(without.into_spec().unwrap_err().contains("--vm"));
        let wrong = VpgFile { priority: Some("urgent".into()), ..file };
        assert!(wrong.into_spec().unwrap_err().contains("Low, Medium, High"));
        assert!(toml::from_str::<VpgFile>("nmae = 'x'").is_err());
    }
}
