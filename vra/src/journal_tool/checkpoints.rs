//! `vra-journal checkpoints`.

use std::io::Write;
use std::path::PathBuf;

use anyhow::bail;
use journal::catalogue::CheckpointEntry;
use journal::crypt::SiteKeys;
use serde::Serialize;

use super::group::Stock;
use super::moment::id_of;
use super::place::Journal;
use super::text;
use crate::api::CheckpointId;

/// A checkpoint that can be opened.
#[derive(Serialize)]
struct Entry<'a> {
    /// The last record that belongs to it.
    cut: u64,
    /// Number of its record.
    seq: u64,
    #[serde(flatten)]
    whole: Whole<'a>,
}

/// A checkpoint that all journals of a group hold.
#[derive(Serialize)]
struct Whole<'a> {
    /// The same in all journals of the group.
    id: CheckpointId,
    time_us: u64,
    kind: &'static str,
    tag: &'a str,
}

impl<'a> Whole<'a> {
    fn of(entry: &'a CheckpointEntry) -> Self {
        Self {
            id: id_of(entry),
            time_us: entry.checkpoint.time_us,
            kind: text::checkpoint_kind(entry.checkpoint.kind),
            tag: &entry.checkpoint.tag,
        }
    }

    fn line(&self) -> String {
        let (time, id) = (text::time(self.time_us), self.id.to_string());
        format!("{time:<29}  {:<11}  {id:<38}  {}", self.kind, self.tag)
    }
}

/// Lists the checkpoints of a journal, or of a VPG.
pub(super) fn run(
    paths: &[PathBuf],
    vpg: Option<&str>,
    keys: &SiteKeys,
    json: bool,
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    let head = format!("{:<29}  {:<11}  {:<38}  TAG", "TIME", "KIND", "ID");
    if let Some(vpg) = vpg {
        let group = Stock::of(paths, keys)?.take(vpg)?;
        group.whole()?;
        group
            .journals()
            .filter_map(|told| told.warning.as_ref())
            .for_each(|warning| told!("warning: {warning}"));
        let checkpoints = group.checkpoints();
        let entries: Vec<Whole<'_>> = checkpoints.iter().map(|whole| Whole::of(&whole.entry)).collect();
        if entries.is_empty() {
            told!(
                "note: the journals of the VPG have no checkpoint in common: the first sync of one of its VMs hasn't ended, or one of them has lost its history; `vra-journal ls` shows what each has"
            );
        }
        if json {
            return print_json(&entries, out);
        }
        writeln!(out, "{head}")?;
        for entry in entries {
            writeln!(out, "{}", entry.line())?;
        }
        return Ok(());
    }
    let [path] = paths else { bail!("give one journal, or --vpg with the name of a VPG") };
    let journal = Journal::open(path, keys)?;
    journal.warn();
    if journal.reader.catalogue().checkpoints().is_empty() {
        told!(
            "note: the journal has no checkpoint: its first sync hasn't ended, or its history was given up for a later one"
        );
    }
    let entries = journal.reader.catalogue().checkpoints().iter().map(|entry| Entry {
        cut: entry.checkpoint.cut,
        seq: entry.seq,
        whole: Whole::of(entry),
    });
    if json {
        return print_json(&entries.collect::<Vec<_>>(), out);
    }
    writeln!(out, "{:>16}  {head}", "SEQUENCE")?;
    for Entry { cut, whole, .. } in entries {
        writeln!(out, "{cut:>16}  {}", whole.line())?;
    }
    Ok(())
}

fn print_json<T: Serialize>(entries: &[T], out: &mut dyn Write) -> anyhow::Result<()> {
    serde_json::to_writer_pretty(&mut *out, &serde_json::json!({ "checkpoints": entries }))?;
    Ok(writeln!(out)?)
}
