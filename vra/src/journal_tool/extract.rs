//! `vra-journal extract`.

use std::collections::HashSet;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use journal::crypt::SiteKeys;

use super::args::{Extract, Format};
use super::convert::Converter;
use super::copy::Copy;
use super::disk::DiskAt;
use super::group::{Stock, words};
use super::image::{Image, check_space};
use super::moment::{Found, describe};
use super::place::{Journal, find_one};
use super::progress::Progress;
use super::signals::Signals;
use super::text;

/// What qcow2 needs beside the data: a 64th is more than its tables take, and its header and first tables are short.
const QCOW2_SHARE: u64 = 64;
const QCOW2_BYTES: u64 = 1 << 20;

/// Disks at one moment.
struct Past {
    /// In words.
    moment: String,
    disks: Vec<DiskAt>,
}

/// Writes disks as they were into images: all of them or none.
pub(super) fn run(arguments: &Extract, keys: &SiteKeys, out: &mut dyn Write) -> anyhow::Result<()> {
    if arguments.format == Format::Qcow2 {
        Converter::check()?;
    }
    allow_many_files();
    let Past { moment, disks } = find(arguments, keys)?;
    // From here on something is left if the process just ends; before any thread exists, so that all inherit the mask.
    let mut signals = Signals::to_look_for()?;
    let converter = match arguments.format {
        Format::Raw => None,
        Format::Qcow2 => Some(Converter::start()?),
    };
    let folder = match &arguments.out_dir {
        Some(folder) => Some(OutFolder::make(folder)?),
        None => None,
    };
    let paths = match (&arguments.out, &folder) {
        (Some(path), _) => vec![path.clone()],
        (None, Some(folder)) => image_paths(&folder.path, &disks, arguments.format),
        (None, None) => bail!("give --out or --out-dir"),
    };
    // Beside each other: a file in the way is told before hours of copying.
    let mut images = Vec::new();
    for path in &paths {
        images.push(Image::create(path, arguments.force)?);
    }
    if !arguments.no_space_check {
        let mut needed_bytes = 0;
        for disk in &disks {
            signals.check()?;
            needed_bytes += disk.needed_bytes()?;
        }
        let share = match arguments.format {
            Format::Raw => 0,
            Format::Qcow2 => needed_bytes / QCOW2_SHARE + QCOW2_BYTES * disks.len() as u64,
        };
        let place = images.first().and_then(|image| image.partial().parent()).context("no image")?;
        check_space(place, needed_bytes + share)?;
    }
    let mut progress = Progress::new(disks.iter().map(DiskAt::size_bytes).sum(), arguments.quiet);
    let mut lines = Vec::new();
    for (disk, image) in disks.into_iter().zip(&images) {
        let (name, size_bytes) = (disk.name(), disk.size_bytes());
        progress.begin(&name, size_bytes);
        let held = match &converter {
            None => {
                let data_bytes = Copy::new(disk)?.run(image, &mut progress, &mut signals)?;
                format!("of which {} hold data", text::bytes(data_bytes))
            }
            Some(converter) => {
                converter.run(disk, image, &mut progress, &mut signals)?;
                format!("in {} of qcow2", text::bytes(std::fs::metadata(image.partial())?.len()))
            }
        };
        image.sync()?;
        let (path, size) = (image.path().display(), text::bytes(size_bytes));
        lines.push(format!("{path}: {name} at {moment}, {size}, {held}"));
    }
    progress.end();
    publish(&mut images)?;
    if let Some(folder) = folder {
        folder.keep();
    }
    for line in lines {
        writeln!(out, "{line}")?;
    }
    Ok(())
}

/// Each image of a large group stays open.
fn allow_many_files() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
    {
        // With less it may do, too.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// Gives all images their names, or none.
fn publish(images: &mut [Image]) -> anyhow::Result<()> {
    for at in 0..images.len() {
        if let Err(error) = images[at].publish() {
            images.iter_mut().for_each(Image::withdraw);
            return Err(error);
        }
    }
    Ok(())
}

/// What is to be extracted.
fn find(arguments: &Extract, keys: &SiteKeys) -> anyhow::Result<Past> {
    if let Some(wanted) = &arguments.vpg {
        return find_group(arguments, keys, wanted);
    }
    let journal = Journal::open(&journal_path(arguments, keys)?, keys)?;
    journal.warn_if_cut_short();
    let found = arguments.at.find(&journal.reader)?;
    let only = arguments.out.as_ref().map(|_| arguments.disk.unwrap_or(0));
    let disks = DiskAt::of(&journal, found.seq, only)?;
    if only.is_none() {
        warn_of_absent(&journal, &disks);
    }
    let Found { seq, checkpoint } = &found;
    let moment = checkpoint.as_ref();
    let moment = moment.map_or_else(|| format!("record {seq}"), |at| format!("checkpoint {}", describe(at)));
    Ok(Past { moment, disks })
}

/// The one journal that the arguments mean.
fn journal_path(arguments: &Extract, keys: &SiteKeys) -> anyhow::Result<PathBuf> {
    let Some(vm) = &arguments.vm else {
        let [path] = &arguments.journals[..] else {
            bail!("give one path, or say with --vpg or --vm what to extract from several datastores");
        };
        return find_one(path);
    };
    let stock = Stock::of(&arguments.journals, keys)?;
    match stock.journals_of_vm(vm)[..] {
        [told] => Ok(told.path.clone()),
        [] => bail!("there is no VM {vm:?} here; there are: {}", stock.vm_names().join(", ")),
        ref several => {
            let folders: Vec<String> =
                several.iter().map(|told| told.folder().display().to_string()).collect();
            bail!("several journals are of a VM {vm:?}; give the folder of one: {}", folders.join(", "))
        }
    }
}

fn find_group(arguments: &Extract, keys: &SiteKeys, wanted: &str) -> anyhow::Result<Past> {
    let group = Stock::of(&arguments.journals, keys)?.take(wanted)?;
    let (found, newer) = group.find(&arguments.at)?;
    if let Some(newer) = newer {
        eprintln!("note: {newer}, so it is not taken");
    }
    let mut disks = Vec::new();
    for (told, cut) in group.whole()?.into_iter().zip(&found.cuts) {
        let journal = Journal::open(&told.path, keys)?;
        journal.warn_if_cut_short();
        let of_vm = DiskAt::of(&journal, *cut, None)
            .with_context(|| format!("checkpoint {} of VM {} cannot be opened", found.id, told.name))?;
        warn_of_absent(&journal, &of_vm);
        disks.extend(of_vm);
    }
    Ok(Past { moment: format!("checkpoint {}", words(&found.entry)), disks })
}

/// Says which disks a VM has now but had not then.
fn warn_of_absent(journal: &Journal, disks: &[DiskAt]) {
    let count = journal.reader.survey.superblock.volumes.len() as u16;
    for number in (0..count).filter(|number| disks.iter().all(|disk| disk.number != *number)) {
        let vm = journal.vm_name();
        eprintln!(
            "warning: disk {number} of {vm} is left out: it was added, or its first sync ended, after that moment"
        );
    }
}

/// Names that say VM and disk.
fn image_paths(folder: &Path, disks: &[DiskAt], format: Format) -> Vec<PathBuf> {
    let mut taken = HashSet::new();
    let mut paths = Vec::new();
    for disk in disks {
        let ending = match format {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        };
        let vm = plain(&disk.vm);
        // Names of VMs may differ in what a file's name cannot hold, or not at all.
        let names = (1..).map(|count| match count {
            1 => format!("{vm}-disk-{}.{ending}", disk.number),
            count => format!("{vm}-{count}-disk-{}.{ending}", disk.number),
        });
        let name = names.into_iter().find(|name| taken.insert(name.clone()));
        paths.extend(name.map(|name| folder.join(name)));
    }
    paths
}

/// A VM's name as a part of a file's name.
fn plain(name: &str) -> String {
    let keep = |c: char| if c.is_alphanumeric() || "._-".contains(c) { c } else { '_' };
    let mut plain: String = name.chars().map(keep).collect();
    plain.truncate(plain.floor_char_boundary(80));
    if plain.starts_with(['.', '-']) || plain.is_empty() {
        plain.insert(0, '_');
    }
    plain
}

/// The folder for images. If it was made for them it goes unless they are kept.
struct OutFolder {
    path: PathBuf,
    made: bool,
}

impl OutFolder {
    fn make(path: &Path) -> anyhow::Result<Self> {
        let made = match std::fs::create_dir(path) {
            Ok(()) => true,
            Err(_) if path.is_dir() => false,
            Err(error) => return Err(error).with_context(|| format!("cannot create {}", path.display())),
        };
        Ok(Self { path: path.to_owned(), made })
    }

    fn keep(mut self) {
        self.made = false;
    }
}

impl Drop for OutFolder {
    fn drop(&mut self) {
        if self.made {
            // It stays if something is in it.
            let _ = std::fs::remove_dir(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_vms_become_names_of_files() {
        assert_eq!(plain("db 1/../x"), "db_1_.._x");
        assert_eq!(plain("../etc"), "_.._etc");
        assert_eq!(plain("-rf"), "_-rf");
        assert_eq!(plain(""), "_");
        assert_eq!(plain(&"é".repeat(100)).len(), 80);
    }
}
