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
    let journal = Journal::open(&arguments.journal, keys)?;
    journal.warn();
    journal.check_bad_list(arguments.without_bad_list)?;
    let found = arguments.at.find(&journal.reader)?;
    let disks = DiskAt::of(&journal, found.seq, arguments.disk)?;
    // Not before: opening a large journal takes a while, and nothing is left of it if the process just ends. Before any thread exists.
    let mut signals = Signals::to_wait_for()?;
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

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use nix::sys::signal::{SigSet, Signal};

    use super::*;
    use crate::journal_tool::moment::Moment;

    /// Ctrl-C ends the process while a large journal is opened: signals are blocked only when there is something to take back.
    #[test]
    fn a_signal_ends_it_while_nothing_is_served_yet() {
        let arguments = Serve {
            journal: PathBuf::from("/nowhere/journal.hfj"),
            at: Moment::Latest,
            disk: None,
            socket: PathBuf::from("/nowhere/socket"),
            without_bad_list: false,
            scratch: None,
            scratch_gib: 4,
        };
        run(&arguments, &SiteKeys::default(), &mut Vec::new()).expect_err("there is no journal");
        let blocked = SigSet::thread_get_mask().expect("a mask");
        assert!(!blocked.contains(Signal::SIGINT) && !blocked.contains(Signal::SIGTERM));
    }
}
