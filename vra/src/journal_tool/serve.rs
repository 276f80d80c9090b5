//! `vra-journal serve`.

use std::io::Write;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use journal::view::VolumeView;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use ublk::arena::Arena;
use ublk::nbd::{Address, ExportSettings, NbdServer};
use ublk::reactor::{ReactorSettings, Reactors};

use super::args::Serve;
use super::moment::describe;
use super::place::Journal;
use super::text;
use crate::view::{Freshness, ScratchFile, ViewDisk, ViewSettings, ViewSource};

/// Memory for requests: slots and their length in bytes. Enough for four busy clients.
const SLOTS: u32 = 128;
const SLOT_BYTES: usize = 128 << 10;
/// Time for requests in flight to end, when interrupted.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// Serves disks as they were, until SIGINT or SIGTERM.
pub(super) fn run(arguments: &Serve, out: &mut dyn Write) -> anyhow::Result<()> {
    // Before any thread exists, so that all inherit the mask.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.thread_block()?;
    let mut interrupted = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC)?;

    let journal = Journal::open(&arguments.journal)?;
    journal.warn_if_cut_short();
    let found = arguments.at.find(&journal.reader)?;
    let mut view = journal.reader.view(found.seq)?;
    let numbers: Vec<u16> = match arguments.disk {
        Some(number) => vec![number],
        None => view.volumes().map(VolumeView::number).collect(),
    };
    if numbers.is_empty() {
        bail!("the VM had no disk at record {}", found.seq);
    }
    let settings = ReactorSettings { thread_count: 1, ..ReactorSettings::for_this_host() };
    let server = NbdServer::new(Arc::new(Reactors::start(settings)?));
    let arena = Arena::new(SLOT_BYTES, SLOTS).context("no memory for requests")?;
    let moment = found.checkpoint.as_ref().map_or_else(
        || format!("record {}", found.seq),
        |checkpoint| format!("checkpoint {}", describe(checkpoint)),
    );
    let mut lines = Vec::new();
    for number in numbers {
        let Ok(volume) = view.take_volume(number) else { bail!(journal.no_disk(number)) };
        let size = text::bytes(volume.size_bytes());
        let source = ViewSource {
            volume,
            journal: journal.open_again()?,
            recovery_disk: journal.open_disk(number)?.file().try_clone()?,
            seq: found.seq,
            freshness: match journal.is_rebuilt {
                // No VRA can have opened a journal without superblocks.
                true => Freshness::Flag(Arc::default()),
                false => Freshness::Superblock,
            },
            keep: Box::new(()),
        };
        let view_settings =
            ViewSettings { logical_block_bytes: journal.logical_block_bytes(number), look_for_holes: true };
        let scratch = arguments.scratch.as_ref().map(|folder| {
            let name = format!("vra-journal-scratch-{}-{number}", std::process::id());
            ScratchFile::create(&folder.join(name), arguments.scratch_gib << 30)
        });
        let disk = ViewDisk::new(source, view_settings, scratch.transpose()?)?;
        let name = format!("disk-{number}");
        let settings = ExportSettings {
            name: name.clone(),
            description: format!("disk {number} of {} at {moment}", journal.vm_name()),
            slots_per_connection: ExportSettings::SLOTS_PER_CONNECTION,
        };
        server.add_export(settings, disk, arena.clone())?;
        let socket = arguments.socket.display();
        lines.push(format!("  nbd+unix:///{name}?socket={socket}  ({size})"));
    }
    let address = Address::Unix { path: arguments.socket.clone(), mode: 0o600 };
    server.listen(&address)?;
    let mode = if arguments.scratch.is_some() { "with scratch" } else { "read-only" };
    writeln!(out, "{} at {moment}, {mode}:\n{}", journal.vm_name(), lines.join("\n"))?;
    writeln!(out, "Serving until interrupted.")?;
    out.flush()?;

    wait(&mut interrupted)?;
    if !server.stop(STOP_TIMEOUT) {
        tracing::warn!("requests in flight did not end in time");
    }
    Ok(())
}

/// Waits for a signal.
fn wait(interrupted: &mut SignalFd) -> anyhow::Result<()> {
    loop {
        match interrupted.read_signal() {
            Ok(Some(_)) => return Ok(()),
            Ok(None) | Err(nix::Error::EINTR) => {}
            Err(error) => {
                return Err(
                    anyhow::Error::new(error).context(format!("cannot wait on {:?}", interrupted.as_fd()))
                );
            }
        }
    }
}
