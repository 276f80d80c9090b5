//! Commands about groups.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use vra::api::vpg::{JournalSize, Priority};

use super::ask::{Ask, Wait};
use super::recovery::parse_disk;
use super::transfer::Import;
use super::{Failure, VpgFile, shape, show};
use crate::api::{Client, DiskName, Request, Response, VmSpec, VpgEdit};
use crate::model::vpg::NewDisks;
use crate::units::{parse_bytes, parse_duration, parse_journal_size};

/// Virtual protection groups.
#[derive(Debug, Subcommand)]
pub(super) enum VpgCommand {
    /// Protect VMs together.
    Create(Box<VpgCreate>),
    /// Change a group's settings. What isn't given stays.
    Edit(Box<VpgEditArgs>),
    /// Add VMs to a group. What isn't given is as the group's first VM has it.
    AddVm(Box<VpgAddVm>),
    /// Protect disks that VMs of a group have in the inventory by now. A full sync of those VMs follows.
    AddDisks {
        /// The group's name or id.
        vpg: String,
        /// Name or UUID of a VM of the group; once for each.
        #[arg(required = true, value_name = "VM")]
        vms: Vec<String>,
        /// Although older checkpoints, locked ones too, may have to be given up for the full sync.
        #[arg(long)]
        give_up_history: bool,
        #[command(flatten)]
        wait: Wait,
    },
    /// Protect disks no more; they are served on. A full sync of their VMs follows.
    RemoveDisks {
        /// The group's name or id.
        vpg: String,
        /// A disk of a VM of the group, by its name in the inventory or its path; once for each.
        #[arg(required = true, value_name = "VM:DISK", value_parser = parse_disk)]
        disks: Vec<DiskName>,
        /// Although older checkpoints, locked ones too, may have to be given up for the full sync.
        #[arg(long)]
        give_up_history: bool,
        #[command(flatten)]
        wait: Wait,
    },
    /// Take VMs out of a group; their disks are served on.
    RemoveVm {
        /// The group's name or id.
        vpg: String,
        /// Name or UUID of a VM of the group; once for each.
        #[arg(required = true, value_name = "VM")]
        vms: Vec<String>,
        /// Leave their journals and recovery disks in the datastore.
        #[arg(long)]
        keep_disks: bool,
        #[command(flatten)]
        wait: Wait,
    },
    /// Pause a group's replication: its disks are served, nothing is sent.
    Pause {
        /// Its name or id.
        vpg: String,
    },
    /// Let a paused group's replication go on.
    Resume {
        /// Its name or id.
        vpg: String,
    },
    /// Take over the newest definition that a group's VRAs have, after an older database of the manager was restored.
    Adopt {
        /// Its name or id.
        vpg: String,
    },
    /// Read the disks of a group's VMs as a whole again, as after a crash of their source.
    ForceSync {
        /// Its name or id.
        vpg: String,
        /// Only those of this VM, by name or UUID.
        #[arg(long)]
        vm: Option<String>,
        /// Although older checkpoints, locked ones too, may have to be given up for the full sync.
        #[arg(long)]
        give_up_history: bool,
    },
    /// Write definitions of groups to standard output, for `import`.
    Export {
        /// Names or ids of groups; without any, all.
        #[arg(value_name = "VPG")]
        vpgs: Vec<String>,
    },
    /// Create the groups of a file that `export` wrote. Those that can't be are refused, each with the reason.
    Import(Import),
    /// One group with its VMs.
    Show {
        /// Its name or id.
        vpg: String,
    },
    /// All groups.
    List,
    /// End a group's protection.
    Delete {
        /// Its name or id.
        vpg: String,
        /// Leave journals and recovery disks in the datastore.
        #[arg(long)]
        keep_disks: bool,
        /// Don't wait for VRAs that cannot be reached.
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        wait: Wait,
    },
}

/// What a group is created from.
#[derive(Debug, Args)]
pub(super) struct VpgCreate {
    /// TOML file to take settings from; options go before it.
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    #[command(flatten)]
    vpg: VpgFile,
    #[command(flatten)]
    wait: Wait,
}

/// What is to be another one of a group.
#[derive(Debug, Args)]
pub(super) struct VpgEditArgs {
    /// Its name or id.
    vpg: String,
    /// What it is for.
    #[arg(long, value_name = "TEXT")]
    description: Option<String>,
    /// Low, Medium or High.
    #[arg(long)]
    priority: Option<Priority>,
    /// Remind of a test so many days after the last one.
    #[arg(long, value_name = "DAYS")]
    test_reminder: Option<u32>,
    /// Don't remind any more.
    #[arg(long, conflicts_with = "test_reminder")]
    no_test_reminder: bool,
    /// Disks that its VMs get: an alert, or protected by themselves.
    #[arg(long, value_name = "alert|protect")]
    new_disks: Option<NewDisks>,
    /// Group file to take from how its VMs are to be recovered, as a whole; all else in it is left.
    #[arg(long, value_name = "FILE")]
    recovery: Option<PathBuf>,
    /// A disk that isn't protected and isn't meant to be; once for each.
    #[arg(long, value_name = "VM:DISK", value_parser = parse_disk)]
    exclude: Vec<DiskName>,
    /// A disk that was excluded, or taken out, and may be protected again; once for each. `zvm vpg add-disks` then does.
    #[arg(long, value_name = "VM:DISK", value_parser = parse_disk)]
    no_exclude: Vec<DiskName>,
    /// A protected disk that is swap: what is written to it after a full sync isn't captured; once for each. A full sync follows.
    #[arg(long, value_name = "VM:DISK", value_parser = parse_disk)]
    swap: Vec<DiskName>,
    /// A disk that isn't swap any more; once for each. A full sync follows.
    #[arg(long, value_name = "VM:DISK", value_parser = parse_disk)]
    no_swap: Vec<DiskName>,
    /// Although older checkpoints, locked ones too, may have to be given up for a full sync that follows.
    #[arg(long)]
    give_up_history: bool,
    /// How long history is wanted.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    history: Option<Duration>,
    /// Time between checkpoints, 1s to 1h.
    #[arg(long, value_name = "DURATION", value_parser = shape::milliseconds)]
    checkpoint_interval: Option<u32>,
    /// Longest time that a checkpoint may hold guests' writes, 10ms to 1s.
    #[arg(long, value_name = "DURATION", value_parser = shape::milliseconds)]
    hold_deadline: Option<u32>,
    /// RPO to be warned beyond.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    rpo_target: Option<Duration>,
    /// From now on, when a full sync does not fit the journal, stop replicating rather than give up old checkpoints.
    #[arg(long)]
    keep_history: bool,
    /// From now on, give up old checkpoints then.
    #[arg(long, conflicts_with = "keep_history")]
    no_keep_history: bool,
    /// Space for each VM's journal, or how many percent of the VM's disks.
    #[arg(long, value_name = "SIZE|PERCENT%", value_parser = parse_journal_size)]
    journal_limit: Option<JournalSize>,
    /// Warn when a VM's journal uses this much, or so many percent of the VM's disks.
    #[arg(long, value_name = "SIZE|PERCENT%", value_parser = parse_journal_size)]
    journal_warning: Option<JournalSize>,
    /// Don't warn any more.
    #[arg(long, conflicts_with = "journal_warning")]
    no_journal_warning: bool,
    /// Space that each VM's journal keeps even if the history doesn't need it.
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    journal_minimum: Option<u64>,
    /// Only the journal of this VM, by name or UUID, and with nothing but sizes of journals; once for each.
    #[arg(long = "vm", value_name = "VM")]
    vms: Vec<String>,
}

/// VMs that are to join a group.
#[derive(Debug, Args)]
pub(super) struct VpgAddVm {
    /// The group's name or id.
    vpg: String,
    /// Name or UUID of a VM in the inventory; once for each.
    #[arg(required = true, value_name = "VM")]
    vms: Vec<String>,
    /// VRA that keeps their journals.
    #[arg(long, value_name = "VRA")]
    target: Option<String>,
    /// Datastore of the inventory, or absolute path of a folder at the target.
    #[arg(long, value_name = "NAME|PATH")]
    datastore: Option<String>,
    /// Space for each of their journals, or how many percent of the VM's disks.
    #[arg(long, value_name = "SIZE|PERCENT%", value_parser = parse_journal_size)]
    journal_limit: Option<JournalSize>,
    /// Warn when one of their journals uses this much, or so many percent of the VM's disks.
    #[arg(long, value_name = "SIZE|PERCENT%", value_parser = parse_journal_size)]
    journal_warning: Option<JournalSize>,
    /// Space that each of their journals keeps even if the history doesn't need it.
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    journal_minimum: Option<u64>,
    /// A disk of theirs that is not to be protected, by its VM as given and its name in the inventory; once for each.
    #[arg(long, value_name = "VM:DISK")]
    exclude: Vec<String>,
    /// A disk of theirs that is swap: what is written to it after a full sync isn't captured; once for each.
    #[arg(long, value_name = "VM:DISK")]
    swap: Vec<String>,
    /// Group file to take from how they are to be recovered; all else in it is left.
    #[arg(long, value_name = "FILE")]
    recovery: Option<PathBuf>,
    #[command(flatten)]
    wait: Wait,
}

impl VpgAddVm {
    fn specs(&self) -> Result<Vec<VmSpec>, String> {
        let own = match &self.recovery {
            Some(path) => {
                let file = VpgFile::read(path)?;
                let is_there = |vm: &&String| file.vm.iter().any(|table| table.name == **vm);
                if let Some(vm) = self.vms.iter().find(|vm| !is_there(vm)) {
                    return Err(format!(
                        "{} has no [[vm]] with name = \"{vm}\": name VM {vm} there as it is given here, with or without settings of its own",
                        path.display()
                    ));
                }
                file.into_recovery()?.vms
            }
            None => Vec::new(),
        };
        let recovery = |vm: &String| own.iter().find(|(name, _)| name == vm).map(|(_, own)| own.clone());
        let spec = |vm: &String| VmSpec {
            vm: vm.clone(),
            target: self.target.clone(),
            datastore: self.datastore.clone(),
            journal_limit_bytes: match self.journal_limit {
                Some(JournalSize::Bytes(bytes)) => Some(bytes),
                _ => None,
            },
            journal_limit_percent: match self.journal_limit {
                Some(JournalSize::Percent(percent)) => Some(percent),
                _ => None,
            },
            journal_warning: self.journal_warning,
            journal_minimum_bytes: self.journal_minimum,
            exclude: Vec::new(),
            swap: Vec::new(),
            recovery: recovery(vm).unwrap_or_default(),
        };
        let mut specs: Vec<VmSpec> = self.vms.iter().map(spec).collect();
        shape::exclude(&mut specs, &self.exclude)?;
        shape::swap(&mut specs, &self.swap)?;
        Ok(specs)
    }
}

impl Ask<'_> {
    pub(super) async fn vpg(&self, command: VpgCommand) -> Result<(), Failure> {
        match command {
            VpgCommand::Create(create) => {
                let file = match &create.file {
                    Some(path) => VpgFile::read(path).map_err(Failure::Usage)?,
                    None => VpgFile::default(),
                };
                let spec = create.vpg.or(file).into_spec().map_err(Failure::Usage)?;
                self.task(Request::VpgCreate(spec), &create.wait).await
            }
            VpgCommand::Edit(edit) => {
                let edit = *edit;
                let file = edit.recovery.as_deref().map(VpgFile::read).transpose().map_err(Failure::Usage)?;
                let changes = VpgEdit {
                    description: edit.description,
                    priority: edit.priority,
                    test_reminder_days: edit.test_reminder,
                    no_test_reminder: edit.no_test_reminder,
                    new_disks: edit.new_disks,
                    recovery: file.map(VpgFile::into_recovery).transpose().map_err(Failure::Usage)?,
                    exclude: edit.exclude,
                    no_exclude: edit.no_exclude,
                    swap: edit.swap,
                    no_swap: edit.no_swap,
                    give_up_history: edit.give_up_history,
                    history_s: edit.history.map(|history| history.as_secs()),
                    checkpoint_interval_ms: edit.checkpoint_interval,
                    hold_deadline_ms: edit.hold_deadline,
                    rpo_target_s: edit.rpo_target.map(|target| target.as_secs()),
                    keep_history: (edit.keep_history || edit.no_keep_history).then_some(edit.keep_history),
                    journal_limit: edit.journal_limit,
                    journal_warning: edit.journal_warning,
                    no_journal_warning: edit.no_journal_warning,
                    journal_minimum_bytes: edit.journal_minimum,
                    vms: edit.vms,
                };
                self.print(Request::VpgEdit { vpg: edit.vpg, edit: changes }).await
            }
            VpgCommand::Pause { vpg } => self.print(Request::VpgPause { vpg, paused: true }).await,
            VpgCommand::Resume { vpg } => self.print(Request::VpgPause { vpg, paused: false }).await,
            VpgCommand::Adopt { vpg } => self.print(Request::VpgAdopt { vpg }).await,
            VpgCommand::ForceSync { vpg, vm, give_up_history } => {
                self.print(Request::VpgForceSync { vpg, vm, give_up_history }).await
            }
            VpgCommand::Export { vpgs } => self.export(vpgs).await,
            VpgCommand::Import(import) => self.import(import).await,
            VpgCommand::Show { vpg } => self.print(Request::VpgShow { vpg }).await,
            VpgCommand::List => {
                let mut client = Client::connect(&self.config.socket).await?;
                let Response::Status(status) = client.call(Request::Status).await? else {
                    return Err(Failure::Unexpected);
                };
                show::vpgs(&status.vpgs, self.json)?;
                Ok(())
            }
            VpgCommand::AddVm(add) => {
                let vms = add.specs().map_err(Failure::Usage)?;
                self.task(Request::VpgAddVms { vpg: add.vpg, vms }, &add.wait).await
            }
            VpgCommand::AddDisks { vpg, vms, give_up_history, wait } => {
                self.task(Request::VpgAddDisks { vpg, vms, give_up_history }, &wait).await
            }
            VpgCommand::RemoveDisks { vpg, disks, give_up_history, wait } => {
                self.task(Request::VpgRemoveDisks { vpg, disks, give_up_history }, &wait).await
            }
            VpgCommand::RemoveVm { vpg, vms, keep_disks, wait } => {
                self.task(Request::VpgRemoveVms { vpg, vms, keep_disks }, &wait).await
            }
            VpgCommand::Delete { vpg, keep_disks, force, wait } => {
                self.task(Request::VpgDelete { vpg, keep_disks, force }, &wait).await
            }
        }
    }
}
