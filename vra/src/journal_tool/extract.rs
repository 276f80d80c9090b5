//! `vra-journal extract`.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use journal::format::{PAGE_BYTES, SUPERBLOCK_OFFSETS, Superblock};
use journal::storage::ring::RingStorage;
use journal::storage::{Blocking, FileId, Purpose};
use journal::view::{ReadPart, VolumeView, still_there};

use super::args::Extract;
use super::moment::{Found, describe};
use super::place::Journal;
use super::text;

/// How much is read at once, in bytes.
const STEP_BYTES: u64 = 1 << 20;
/// Zeroes of at least this length become a hole, in bytes.
const HOLE_BYTES: usize = 64 << 10;

/// Writes a disk as it was into an image.
pub(super) fn run(arguments: &Extract, out: &mut dyn Write) -> anyhow::Result<()> {
    let mut journal = Journal::open(&arguments.journal)?;
    journal.warn_if_cut_short();
    let found = arguments.at.find(&journal.reader)?;
    let mut view = journal.reader.view(found.seq)?;
    let Ok(volume) = view.take_volume(arguments.disk) else { bail!(journal.no_disk(arguments.disk)) };
    let disk = journal.open_disk(arguments.disk)?;
    let holes = disk.file().try_clone()?;
    let disk = journal.storage.add_file(disk);
    let mut image = Image::create(&arguments.out, volume.size_bytes(), arguments.force)?;
    let bar = progress(volume.size_bytes(), arguments.quiet);
    let is_alone = journal.is_rebuilt;
    let mut copy =
        Copy { storage: &mut journal.storage, journal: journal.file, disk, holes, seq: found.seq, is_alone };
    let data_bytes = copy.all(&volume, &mut image, &bar)?;
    image.finish()?;
    bar.finish_and_clear();
    let Found { seq, checkpoint } = &found;
    let moment = checkpoint
        .as_ref()
        .map_or_else(|| format!("record {seq}"), |at| format!("checkpoint {}", describe(at)));
    writeln!(
        out,
        "{}: disk {} of {} at {moment}, {}, of which {} hold data",
        arguments.out.display(),
        arguments.disk,
        journal.vm_name(),
        text::bytes(volume.size_bytes()),
        text::bytes(data_bytes)
    )?;
    Ok(())
}

struct Copy<'a> {
    storage: &'a mut RingStorage,
    journal: FileId,
    disk: FileId,
    /// The recovery disk again, to ask for its holes.
    holes: File,
    seq: u64,
    /// No VRA can have opened a journal without superblocks.
    is_alone: bool,
}

impl Copy<'_> {
    /// Copies the whole disk; how much of it holds data, in bytes.
    fn all(&mut self, volume: &VolumeView, image: &mut Image, bar: &ProgressBar) -> anyhow::Result<u64> {
        let mut buffer = vec![0; STEP_BYTES as usize];
        let (mut at, mut data_bytes) = (0, 0);
        while at < volume.size_bytes() {
            let len_bytes = STEP_BYTES.min(volume.size_bytes() - at);
            let promoted_seq = volume.promoted().through_seq();
            let parts = volume.plan_read(at, len_bytes)?;
            let empty = parts.iter().all(|part| match part {
                ReadPart::Zeroes { .. } => true,
                ReadPart::RecoveryDisk { offset_bytes, len_bytes } => self.is_hole(*offset_bytes, *len_bytes),
                ReadPart::Journal(_) | ReadPart::Bad(_) => false,
            });
            let uses_disk = parts.iter().any(|part| matches!(part, ReadPart::RecoveryDisk { .. }));
            if !empty {
                let bytes = &mut buffer[..len_bytes as usize];
                let disk = self.disk;
                let read =
                    volume.read(self.storage, self.journal, at, bytes, |storage, offset_bytes, into| {
                        read_disk(storage, disk, offset_bytes, into)
                    });
                if let Err(error) = read {
                    self.check_still_there(volume)?;
                    if volume.promoted().through_seq() > promoted_seq {
                        // The slots of what was promoted meanwhile may have been used again: it is on the recovery disk now.
                        continue;
                    }
                    return Err(anyhow::Error::new(error).context(format!(
                        "disk {} cannot be read at {at}; `vra-journal verify` names all damage, an older checkpoint may be whole",
                        volume.number()
                    )));
                }
                data_bytes += image.write(at, bytes)?;
            }
            if uses_disk {
                self.check_still_there(volume)?;
            }
            at += len_bytes;
            bar.set_position(at);
        }
        Ok(data_bytes)
    }

    /// Recovery disks change only after the superblock has said so (C2).
    fn check_still_there(&mut self, volume: &VolumeView) -> anyhow::Result<()> {
        if self.is_alone {
            return Ok(());
        }
        let mut io = Blocking::new(self.storage, self.journal, Purpose::View);
        let copies = SUPERBLOCK_OFFSETS.map(|offset_bytes| {
            let page = io.read(offset_bytes, PAGE_BYTES).ok()?;
            Superblock::decode(&page).ok()
        });
        let newest = copies.into_iter().flatten().max_by_key(|copy| copy.sequence);
        let superblock = newest.context("the journal's superblocks cannot be read any more")?;
        still_there(&superblock, self.seq)
            .context("the checkpoint went away while it was copied; choose a newer one")?;
        volume.promoted().raise(superblock.low_water.seq);
        Ok(())
    }

    fn is_hole(&self, offset_bytes: u64, len_bytes: u64) -> bool {
        // SAFETY: no memory is involved; nobody else uses the descriptor's position.
        let data = unsafe {
            libc::lseek(
                std::os::fd::AsRawFd::as_raw_fd(&self.holes),
                offset_bytes as libc::off_t,
                libc::SEEK_DATA,
            )
        };
        match u64::try_from(data) {
            Ok(data) => data >= offset_bytes + len_bytes,
            Err(_) => nix::errno::Errno::last() == nix::errno::Errno::ENXIO,
        }
    }
}

/// Reads a recovery disk, in whole pages.
fn read_disk(
    storage: &mut RingStorage,
    disk: FileId,
    offset_bytes: u64,
    into: &mut [u8],
) -> Result<(), journal::storage::StorageError> {
    let page = PAGE_BYTES as u64;
    let start = offset_bytes / page * page;
    let end = (offset_bytes + into.len() as u64).next_multiple_of(page);
    let read = Blocking::new(storage, disk, Purpose::RecoveryDisk).read(start, (end - start) as usize)?;
    let skip = (offset_bytes - start) as usize;
    into.copy_from_slice(&read[skip..skip + into.len()]);
    Ok(())
}

/// An image being written: under another name until it is complete.
struct Image {
    file: File,
    unfinished: PathBuf,
    path: PathBuf,
    finished: bool,
}

impl Image {
    fn create(path: &Path, size_bytes: u64, force: bool) -> anyhow::Result<Self> {
        match std::fs::symlink_metadata(path) {
            Ok(metadata) if !metadata.is_file() => bail!(
                "{} is not a regular file; use `vra-journal serve` with nbdcopy or qemu-img for other targets",
                path.display()
            ),
            Ok(_) if !force => {
                bail!("{} exists; choose another name, or --force to replace it", path.display())
            }
            _ => {}
        }
        let mut name = path.file_name().context("--out must name a file")?.to_owned();
        name.push(".unfinished");
        let unfinished = path.with_file_name(name);
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&unfinished)
            .with_context(|| format!("cannot create {}", unfinished.display()))?;
        let image = Self { file, unfinished, path: path.to_owned(), finished: false };
        image.file.set_len(size_bytes).with_context(|| {
            format!("{} cannot become {} long", image.unfinished.display(), text::bytes(size_bytes))
        })?;
        Ok(image)
    }

    /// Writes all but long runs of zeroes; how much that was.
    fn write(&mut self, offset_bytes: u64, bytes: &[u8]) -> anyhow::Result<u64> {
        let mut written = 0;
        for (number, block) in bytes.chunks(HOLE_BYTES).enumerate() {
            if block.iter().all(|byte| *byte == 0) {
                continue;
            }
            let at = offset_bytes + (number * HOLE_BYTES) as u64;
            self.file
                .write_all_at(block, at)
                .with_context(|| format!("cannot write {}", self.unfinished.display()))?;
            written += block.len() as u64;
        }
        Ok(written)
    }

    /// Makes it durable and gives it its name.
    fn finish(&mut self) -> anyhow::Result<()> {
        self.file.sync_all().with_context(|| format!("cannot write {}", self.unfinished.display()))?;
        std::fs::rename(&self.unfinished, &self.path)
            .with_context(|| format!("cannot rename to {}", self.path.display()))?;
        self.finished = true;
        let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new("."));
        File::open(folder)
            .and_then(|folder| folder.sync_all())
            .context("cannot make the image's name durable")
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        if !self.finished {
            let _ = std::fs::remove_file(&self.unfinished);
        }
    }
}

fn progress(size_bytes: u64, quiet: bool) -> ProgressBar {
    let target = if quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
    let template = "{bar:40} {percent:>3}% {binary_bytes_per_sec:>12} {eta:>4} left";
    let style = ProgressStyle::with_template(template).expect("the template is a constant that is right");
    ProgressBar::with_draw_target(Some(size_bytes), target).with_style(style)
}
