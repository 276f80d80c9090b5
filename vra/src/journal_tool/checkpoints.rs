//! `vra-journal checkpoints`.

use std::io::Write;
use std::path::Path;

use journal::batch::CheckpointKind;
use serde::Serialize;

use super::place::Journal;
use super::text;

/// A checkpoint that can be opened.
#[derive(Serialize)]
struct Entry<'a> {
    /// The last record that belongs to it.
    cut: u64,
    /// Number of its record.
    seq: u64,
    /// The attempt that made it: the same in all journals of the group.
    epoch: String,
    time_us: u64,
    kind: &'static str,
    tag: &'a str,
}

/// Lists the checkpoints.
pub(super) fn run(path: &Path, json: bool, out: &mut dyn Write) -> anyhow::Result<()> {
    let journal = Journal::open(path)?;
    journal.warn_if_cut_short();
    let entries = journal.reader.catalogue().checkpoints().iter().map(|entry| Entry {
        cut: entry.checkpoint.cut,
        seq: entry.seq,
        epoch: format!("{}/{}", entry.checkpoint.epoch.nonce, entry.checkpoint.epoch.counter),
        time_us: entry.checkpoint.time_us,
        kind: match entry.checkpoint.kind {
            CheckpointKind::Automatic => "automatic",
            CheckpointKind::Tagged => "tagged",
            CheckpointKind::Application => "application",
        },
        tag: &entry.checkpoint.tag,
    });
    if json {
        let entries: Vec<Entry<'_>> = entries.collect();
        serde_json::to_writer_pretty(&mut *out, &serde_json::json!({ "checkpoints": entries }))?;
        writeln!(out)?;
        return Ok(());
    }
    writeln!(out, "{:>16}  {:<29}  {:<11}  TAG", "SEQUENCE", "TIME", "KIND")?;
    for Entry { cut, time_us, kind, tag, .. } in entries {
        writeln!(out, "{cut:>16}  {:<29}  {kind:<11}  {tag}", text::time(time_us))?;
    }
    Ok(())
}
