//! `vra-journal serve`.

use std::io::Write;

use journal::crypt::{Encryption, SiteKeys};

use super::args::Serve;
use super::disk::DiskAt;
use super::export::Exports;
use super::moment::describe;
use super::place::Journal;
use super::signals::Signals;
use super::text;
use crate::view::ScratchFile;

/// Serves disks as they were, until SIGINT or SIGTERM.
pub(super) fn run(arguments: &Serve, keys: &SiteKeys, out: &mut dyn Write) -> anyhow::Result<()> {
    let mut signals = Signals::to_wait_for()?;
    let journal = Journal::open(&arguments.journal, keys)?;
    journal.warn_if_cut_short();
    let found = arguments.at.find(&journal.reader)?;
    let disks = DiskAt::of(&journal, found.seq, arguments.disk)?;
    let exports = Exports::new()?;
    let is_encrypted = matches!(journal.reader.survey.superblock.encryption, Encryption::On(_));
    let moment = found.checkpoint.as_ref().map_or_else(
        || format!("record {}", found.seq),
        |checkpoint| format!("checkpoint {}", describe(checkpoint)),
    );
    let mut lines = Vec::new();
    for disk in disks {
        let number = disk.number;
        let size = text::bytes(disk.size_bytes());
        let scratch = arguments.scratch.as_ref().map(|folder| {
            let name = format!("vra-journal-scratch-{}-{number}", std::process::id());
            ScratchFile::create(&folder.join(name), arguments.scratch_gib << 30, is_encrypted)
        });
        let name = format!("disk-{number}");
        exports.add(&name, format!("{} at {moment}", disk.name()), disk.served(scratch.transpose()?)?)?;
        let socket = arguments.socket.display();
        lines.push(format!("  nbd+unix:///{name}?socket={socket}  ({size})"));
    }
    exports.listen(&arguments.socket)?;
    let mode = if arguments.scratch.is_some() { "with scratch" } else { "read-only" };
    writeln!(out, "{} at {moment}, {mode}:\n{}", journal.vm_name(), lines.join("\n"))?;
    writeln!(out, "Serving until interrupted.")?;
    out.flush()?;

    signals.wait()?;
    exports.stop();
    Ok(())
}
