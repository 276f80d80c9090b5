//! `vra-journal checkpoints`.

use std::io::Write;
use std::path::Path;

use serde::Serialize;

use journal::crypt::SiteKeys;

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
    /// The same in all journals of the group.
    id: CheckpointId,
    time_us: u64,
    kind: &'static str,
    tag: &'a str,
}

/// Lists the checkpoints.
pub(super) fn run(path: &Path, keys: &SiteKeys, json: bool, out: &mut dyn Write) -> anyhow::Result<()> {
    let journal = Journal::open(path, keys)?;
    journal.warn();
    let entries = journal.reader.catalogue().checkpoints().iter().map(|entry| Entry {
        cut: entry.checkpoint.cut,
        seq: entry.seq,
        id: id_of(entry),
        time_us: entry.checkpoint.time_us,
        kind: text::checkpoint_kind(entry.checkpoint.kind),
        tag: &entry.checkpoint.tag,
    });
    if json {
        let entries: Vec<Entry<'_>> = entries.collect();
        serde_json::to_writer_pretty(&mut *out, &serde_json::json!({ "checkpoints": entries }))?;
        writeln!(out)?;
        return Ok(());
    }
    writeln!(out, "{:>16}  {:<29}  {:<11}  {:<38}  TAG", "SEQUENCE", "TIME", "KIND", "ID")?;
    for Entry { cut, time_us, kind, id, tag, .. } in entries {
        let id = id.to_string();
        writeln!(out, "{cut:>16}  {:<29}  {kind:<11}  {id:<38}  {tag}", text::time(time_us))?;
    }
    Ok(())
}
