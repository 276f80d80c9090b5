//! `vra-journal ls`.

use std::io::Write;
use std::path::Path;

use anyhow::bail;
use serde::Serialize;

use super::moment::describe;
use super::place::{Journal, Manifest, find_all};
use super::text;

/// A VM with a journal.
#[derive(Serialize)]
struct Entry {
    /// The VM's folder.
    folder: String,
    vm: Option<String>,
    vpg: Option<String>,
    disks: usize,
    /// Space of the journal's file, in bytes.
    journal_bytes: u64,
    checkpoints: usize,
    oldest_time_us: Option<u64>,
    newest_time_us: Option<u64>,
    /// Why it cannot be opened.
    error: Option<String>,
}

/// Lists the VMs of a datastore. What cannot be opened is listed with its reason.
pub(super) fn run(datastore: &Path, json: bool, out: &mut dyn Write) -> anyhow::Result<()> {
    let journals = find_all(datastore)?;
    if journals.is_empty() && !json {
        bail!("there is no journal in {}; is it mounted?", datastore.display());
    }
    let entries: Vec<(Entry, Option<String>)> = journals.iter().map(|path| entry(path)).collect();
    if json {
        let entries: Vec<&Entry> = entries.iter().map(|(entry, _)| entry).collect();
        serde_json::to_writer_pretty(&mut *out, &serde_json::json!({ "journals": entries }))?;
        writeln!(out)?;
        return Ok(());
    }
    for (entry, newest) in entries {
        writeln!(out, "{}", entry.folder)?;
        if let Some(error) = entry.error {
            writeln!(out, "  cannot be opened: {error}")?;
            continue;
        }
        let (vm, vpg) = (entry.vm.as_deref().unwrap_or("?"), entry.vpg.as_deref().unwrap_or("?"));
        writeln!(out, "  VM {vm} of group {vpg}, {} disks", entry.disks)?;
        let newest = newest.unwrap_or_else(|| "none".to_owned());
        let size = text::bytes(entry.journal_bytes);
        writeln!(out, "  {} checkpoints, the newest: {newest}; journal of {size}", entry.checkpoints)?;
    }
    Ok(())
}

fn entry(path: &Path) -> (Entry, Option<String>) {
    let folder = path.parent().unwrap_or(path).display().to_string();
    let journal = match Journal::open(path) {
        Ok(journal) => journal,
        Err(error) => {
            let error = Some(format!("{error:#}"));
            let (vm, vpg, disks, journal_bytes, checkpoints) = (None, None, 0, 0, 0);
            let (oldest_time_us, newest_time_us) = (None, None);
            let entry = Entry {
                folder,
                vm,
                vpg,
                disks,
                journal_bytes,
                checkpoints,
                oldest_time_us,
                newest_time_us,
                error,
            };
            return (entry, None);
        }
    };
    let checkpoints = journal.reader.catalogue().checkpoints();
    let time_us =
        |entry: Option<&journal::catalogue::CheckpointEntry>| entry.map(|entry| entry.checkpoint.time_us);
    let manifest = journal.manifest.as_ref();
    let entry = Entry {
        folder,
        vm: manifest.and_then(Manifest::vm).map(|vm| vm.name.clone()),
        vpg: manifest.map(|manifest| manifest.vpg.name.clone()),
        disks: journal.reader.survey.superblock.volumes.len(),
        journal_bytes: std::fs::metadata(path).map_or(0, |metadata| metadata.len()),
        checkpoints: checkpoints.len(),
        oldest_time_us: time_us(checkpoints.first()),
        newest_time_us: time_us(checkpoints.last()),
        error: None,
    };
    (entry, checkpoints.last().map(describe))
}
