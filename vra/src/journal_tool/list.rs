//! `vra-journal ls`.

use std::io::Write;
use std::path::PathBuf;

use anyhow::bail;
use journal::catalogue::CheckpointEntry;
use journal::crypt::SiteKeys;
use serde::Serialize;

use super::group::{Group, Stock, Told, words};
use super::moment::describe;
use super::text;
use crate::api::{VmId, VpgId};
use crate::receive::VmFolder;

/// All that lies in some datastores.
#[derive(Serialize)]
struct Listing {
    vpgs: Vec<Vpg>,
    encrypted: Vec<Encrypted>,
    unreadable: Vec<Unreadable>,
}

#[derive(Serialize)]
struct Vpg {
    id: VpgId,
    name: Option<String>,
    /// How many checkpoints all its VMs hold, and the first and last of them, µs since the Unix epoch.
    checkpoints: usize,
    oldest_time_us: Option<u64>,
    newest_time_us: Option<u64>,
    vms: Vec<Vm>,
    #[serde(skip)]
    span: Option<String>,
}

#[derive(Serialize)]
struct Vm {
    id: VmId,
    name: String,
    /// Whether the VPG's newest definition has it.
    member: bool,
    /// Where the definition wants its journal.
    datastore: Option<PathBuf>,
    /// Its journal's folder; none if it isn't here.
    folder: Option<PathBuf>,
    /// Bytes that the journal's file has.
    journal_bytes: u64,
    disks: Vec<Disk>,
    checkpoints: usize,
    oldest_time_us: Option<u64>,
    newest_time_us: Option<u64>,
    newest_seq: u64,
    /// What is unusual about its journal.
    warning: Option<String>,
    #[serde(skip)]
    span: Option<String>,
}

#[derive(Serialize)]
struct Disk {
    number: usize,
    size_bytes: u64,
    /// Its recovery disk isn't beside the journal: what wasn't written since is lost.
    missing: bool,
}

/// A journal whose checkpoints can't be told without a key that wasn't given.
#[derive(Serialize)]
struct Encrypted {
    folder: PathBuf,
    vm: VmId,
    vm_name: String,
    vpg: VpgId,
    vpg_name: String,
    /// The key that it needs.
    site_key_id: String,
}

/// A journal that cannot be opened.
#[derive(Serialize)]
struct Unreadable {
    folder: PathBuf,
    error: String,
}

/// Lists the VPGs and VMs of datastores. What cannot be opened is listed with its reason.
pub(super) fn run(
    datastores: &[PathBuf],
    keys: &SiteKeys,
    json: bool,
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    let Stock { groups, locked, unreadable } = Stock::of(datastores, keys)?;
    if groups.is_empty() && locked.is_empty() && unreadable.is_empty() && !json {
        let names: Vec<String> = datastores.iter().map(|path| path.display().to_string()).collect();
        bail!("there is no journal in {}; is it mounted?", names.join(", "));
    }
    let unreadable = unreadable.into_iter().map(|(path, error)| {
        let folder = path.parent().unwrap_or(&path).to_owned();
        Unreadable { folder, error }
    });
    let encrypted = locked.iter().map(|journal| Encrypted {
        folder: journal.folder().to_owned(),
        vm: journal.vm,
        vm_name: journal.vm_name.clone(),
        vpg: journal.vpg,
        vpg_name: journal.vpg_name.clone(),
        site_key_id: journal.locked.site_key.to_string(),
    });
    let listing = Listing {
        vpgs: groups.iter().map(vpg).collect(),
        encrypted: encrypted.collect(),
        unreadable: unreadable.collect(),
    };
    let opens_none = listing.vpgs.is_empty() && listing.encrypted.is_empty();
    if json {
        serde_json::to_writer_pretty(&mut *out, &listing)?;
        writeln!(out)?;
    } else {
        listing.write(out)?;
    }
    match listing.unreadable.len() {
        0 => Ok(()),
        count if opens_none => {
            bail!("none of {count} journals can be opened; `vra-journal verify` says more")
        }
        _ => Ok(()),
    }
}

impl Listing {
    fn write(&self, out: &mut dyn Write) -> anyhow::Result<()> {
        for Vpg { id, name, checkpoints, vms, span, .. } in &self.vpgs {
            let name = name.as_deref().unwrap_or("whose manifests cannot be read");
            writeln!(out, "VPG {name} ({id}), {} VMs", vms.len())?;
            let span = span.as_ref().map(|span| format!(": {span}"));
            writeln!(out, "  {checkpoints} checkpoints that all its VMs hold{}", span.unwrap_or_default())?;
            for vm in vms {
                let is_encrypted = self.encrypted.iter().any(|journal| journal.vm == vm.id);
                vm.write(is_encrypted, out)?;
            }
        }
        for Encrypted { folder, vm, vm_name, vpg_name, site_key_id, .. } in &self.encrypted {
            writeln!(out, "VM {vm_name} ({vm}) of VPG {vpg_name}\n    {}", folder.display())?;
            writeln!(
                out,
                "    encrypted: its checkpoints can be listed and opened with site key {site_key_id}; give its file with --key-file"
            )?;
        }
        for Unreadable { folder, error } in &self.unreadable {
            writeln!(out, "{}\n  cannot be opened: {error}", folder.display())?;
        }
        Ok(())
    }
}

impl Vm {
    fn write(&self, is_encrypted: bool, out: &mut dyn Write) -> anyhow::Result<()> {
        let former = if self.member { "" } else { ", no member any more" };
        writeln!(out, "  VM {} ({}){former}", self.name, self.id)?;
        let Some(folder) = &self.folder else {
            if is_encrypted {
                writeln!(out, "    its journal is encrypted: see below")?;
                return Ok(());
            }
            let place = self.datastore.as_ref().map(|path| format!(": its VRA has it in {}", path.display()));
            writeln!(out, "    its journal is not here{}", place.unwrap_or_default())?;
            return Ok(());
        };
        writeln!(out, "    {}", folder.display())?;
        let disks = self.disks.iter().map(|disk| {
            let missing = if disk.missing { " (its recovery disk is missing)" } else { "" };
            format!("disk {} of {}{missing}", disk.number, text::bytes(disk.size_bytes))
        });
        let disks: Vec<String> = disks.collect();
        writeln!(out, "    {}; journal of {}", disks.join(", "), text::bytes(self.journal_bytes))?;
        let span = self.span.as_ref().map(|span| format!(": {span}"));
        writeln!(out, "    {} checkpoints{}", self.checkpoints, span.unwrap_or_default())?;
        if let Some(warning) = &self.warning {
            writeln!(out, "    warning: {warning}; `vra-journal verify` says more")?;
        }
        Ok(())
    }
}

fn vpg(group: &Group) -> Vpg {
    let complete: Vec<CheckpointEntry> = group.checkpoints().into_iter().map(|whole| whole.entry).collect();
    let mut vms = Vec::new();
    for member in &group.members {
        let place = member.datastore.clone();
        if member.journals.is_empty() {
            vms.push(Vm::absent(member.vm, member.name.clone(), place.clone()));
        }
        vms.extend(member.journals.iter().map(|told| Vm { datastore: place.clone(), ..Vm::of(told, true) }));
    }
    vms.extend(group.former.iter().map(|told| Vm::of(told, false)));
    let (oldest_time_us, newest_time_us, span) = ends(&complete, words);
    Vpg {
        id: group.id,
        name: group.name.clone(),
        checkpoints: complete.len(),
        oldest_time_us,
        newest_time_us,
        vms,
        span,
    }
}

impl Vm {
    fn absent(id: VmId, name: String, datastore: Option<PathBuf>) -> Self {
        Self {
            id,
            name,
            member: true,
            datastore,
            folder: None,
            journal_bytes: 0,
            disks: Vec::new(),
            checkpoints: 0,
            oldest_time_us: None,
            newest_time_us: None,
            newest_seq: 0,
            warning: None,
            span: None,
        }
    }

    fn of(told: &Told, member: bool) -> Self {
        let (oldest_time_us, newest_time_us, span) = ends(&told.checkpoints, describe);
        let folder = VmFolder::at(told.folder());
        let is_missing =
            |number: usize| u16::try_from(number).is_ok_and(|number| !folder.disk(number).exists());
        let disks = told.disk_bytes.iter().enumerate();
        Self {
            member,
            folder: Some(told.folder().to_owned()),
            journal_bytes: std::fs::metadata(&told.path).map_or(0, |metadata| metadata.len()),
            disks: disks
                .map(|(number, size_bytes)| Disk {
                    number,
                    size_bytes: *size_bytes,
                    missing: is_missing(number),
                })
                .collect(),
            checkpoints: told.checkpoints.len(),
            oldest_time_us,
            newest_time_us,
            newest_seq: told.newest_seq,
            warning: told.warning.clone(),
            span,
            ..Self::absent(told.vm, told.name.clone(), None)
        }
    }
}

/// Times of the first and the last checkpoint, and both in words.
fn ends(
    entries: &[CheckpointEntry],
    describe: impl Fn(&CheckpointEntry) -> String,
) -> (Option<u64>, Option<u64>, Option<String>) {
    let (Some(first), Some(last)) = (entries.first(), entries.last()) else { return (None, None, None) };
    let words = format!("{} to {}", describe(first), describe(last));
    (Some(first.checkpoint.time_us), Some(last.checkpoint.time_us), Some(words))
}
