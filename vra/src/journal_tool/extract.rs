//! `vra-journal extract`.

use std::collections::HashSet;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::json;

use journal::crypt::SiteKeys;

use super::args::{Extract, Format};
use super::convert::Converter;
use super::copy::{Copied, Copy, Skipped};
use super::disk::DiskAt;
use super::group::{Stock, words};
use super::image::{Image, check_free, check_space};
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
    vms: Vec<VmPast>,
}

/// A VM's disks at that moment. Where their bytes were is known while they are copied and not before: a large group's indexes would not fit
/// into memory together.
struct VmPast {
    journal: PathBuf,
    seq: u64,
    /// One disk, or all.
    only: Option<u16>,
    disks: Vec<DiskFacts>,
    /// Overlays have a part of them.
    has_overlays: bool,
    /// Where their bytes were, if that is still known from when it was looked for.
    found: Option<Vec<DiskAt>>,
}

/// What is to be known of a disk before anything is written.
struct DiskFacts {
    vm: String,
    number: u16,
    size_bytes: u64,
    /// The most that its image takes, or nothing if that wasn't asked.
    needed_bytes: u64,
}

impl VmPast {
    fn of(journal: &Journal, seq: u64, only: Option<u16>, arguments: &Extract) -> anyhow::Result<Self> {
        let found = DiskAt::of(journal, seq, only)?;
        if only.is_none() {
            warn_of_absent(journal, &found);
        }
        let facts = |disk: &DiskAt| {
            let needed_bytes = if arguments.no_space_check { 0 } else { disk.needed_bytes()? };
            let (vm, number, size_bytes) = (disk.vm.clone(), disk.number, disk.size_bytes());
            Ok(DiskFacts { vm, number, size_bytes, needed_bytes })
        };
        let disks = found.iter().map(facts).collect::<anyhow::Result<Vec<_>>>()?;
        let has_overlays = found.iter().any(DiskAt::has_overlay);
        Ok(Self { journal: journal.path.clone(), seq, only, disks, has_overlays, found: Some(found) })
    }

    /// Where the disks' bytes were, found out anew if it isn't known any more.
    fn take(&mut self, keys: &SiteKeys, without_bad_list: bool) -> anyhow::Result<Vec<DiskAt>> {
        if let Some(found) = self.found.take() {
            return Ok(found);
        }
        let journal = Journal::open(&self.journal, keys)?;
        journal.check_bad_list(without_bad_list)?;
        let found = DiskAt::of(&journal, self.seq, self.only)
            .with_context(|| format!("the checkpoint of VM {} went away meanwhile", journal.vm_name()))?;
        let is_same = |(disk, facts): (&DiskAt, &DiskFacts)| {
            (disk.number, disk.size_bytes()) == (facts.number, facts.size_bytes)
        };
        if found.len() != self.disks.len() || !found.iter().zip(&self.disks).all(is_same) {
            bail!("the disks of VM {} changed meanwhile; try again", journal.vm_name());
        }
        Ok(found)
    }
}

/// Writes disks as they were into images: all of them or none. True if something of them was damaged and is zeroes.
pub(super) fn run(arguments: &Extract, keys: &SiteKeys, out: &mut dyn Write) -> anyhow::Result<bool> {
    if arguments.format == Format::Qcow2 {
        if arguments.skip_damaged {
            bail!(
                "--skip-damaged writes raw images only: leave out --format, and convert the image with `qemu-img convert -O qcow2`"
            );
        }
        Converter::check()?;
    }
    allow_many_files();
    let Past { moment, mut vms } = find(arguments, keys)?;
    // From here on something is left if the process just ends; before any thread exists, so that all inherit the mask.
    let mut signals = Signals::to_look_for()?;
    // What overlays have a part of is read as a guest would.
    let has_overlays = vms.iter().any(|vm| vm.has_overlays);
    if has_overlays {
        if arguments.skip_damaged {
            bail!(
                "--skip-damaged can't read a locked checkpoint that is older than the history: leave it out"
            );
        }
        Converter::check()?;
    }
    let converter = match arguments.format {
        Format::Raw if !has_overlays => None,
        format => Some(Converter::start(format)?),
    };
    let folder = match &arguments.out_dir {
        Some(folder) => Some(OutFolder::make(folder)?),
        None => None,
    };
    let disks: Vec<&DiskFacts> = vms.iter().flat_map(|vm| &vm.disks).collect();
    let paths = match (&arguments.out, &folder) {
        (Some(path), _) => vec![path.clone()],
        (None, Some(folder)) => image_paths(&folder.path, &disks, arguments.format),
        (None, None) => bail!("give --out or --out-dir"),
    };
    // Beside each other: a file in the way is told before hours of copying.
    let mut images = Vec::new();
    for path in &paths {
        images.push(Image::create(path, arguments.force)?);
        if arguments.skip_damaged {
            check_free(&damage_path(path), arguments.force)?;
        }
    }
    if !arguments.no_space_check {
        let needed_bytes: u64 = disks.iter().map(|disk| disk.needed_bytes).sum();
        let share = match arguments.format {
            Format::Raw => 0,
            Format::Qcow2 => needed_bytes / QCOW2_SHARE + QCOW2_BYTES * disks.len() as u64,
        };
        let place = images.first().and_then(|image| image.partial().parent()).context("no image")?;
        check_space(place, needed_bytes + share)?;
    }
    let mut progress = Progress::new(disks.iter().map(|disk| disk.size_bytes).sum(), arguments.quiet);
    let (mut lines, mut reports) = (Vec::new(), Vec::new());
    let mut unwritten = images.iter();
    for vm in &mut vms {
        for disk in vm.take(keys, arguments.without_bad_list)? {
            let image = unwritten.next().context("an image for each disk")?;
            let (name, number, size_bytes) = (disk.name(), disk.number, disk.size_bytes());
            let vm = disk.vm.clone();
            progress.begin(&name, size_bytes);
            let held = match &converter {
                None => {
                    let copy = Copy::new(disk)?.skipping_damage(arguments.skip_damaged);
                    let Copied { data_bytes, skipped } = copy.run(image, &mut progress, &mut signals)?;
                    if !skipped.is_empty() {
                        let damage = json!({ "vm": vm, "disk": number, "moment": moment, "ranges": skipped });
                        reports.push(report(image.path(), &damage, arguments.force)?);
                        tell_of_skipped(&name, &skipped);
                    }
                    format!("of which {} hold data", text::bytes(data_bytes))
                }
                Some(converter) => {
                    converter.run(disk, image, &mut progress, &mut signals)?;
                    let metadata = std::fs::metadata(image.partial())?;
                    match arguments.format {
                        Format::Raw => format!("of which {} hold data", text::bytes(metadata.blocks() * 512)),
                        Format::Qcow2 => format!("in {} of qcow2", text::bytes(metadata.len())),
                    }
                }
            };
            image.sync()?;
            let (path, size) = (image.path().display(), text::bytes(size_bytes));
            lines.push(format!("{path}: {name} at {moment}, {size}, {held}"));
        }
    }
    progress.end();
    let is_damaged = !reports.is_empty();
    let told: HashSet<PathBuf> = reports.iter().map(|report| report.path().to_owned()).collect();
    let stale: Vec<PathBuf> = images.iter().map(|image| damage_path(image.path())).collect();
    // A list of damage has its name before the image that it is of.
    reports.append(&mut images);
    publish(&mut reports)?;
    if arguments.force {
        // Of the images that were replaced.
        for path in stale.iter().filter(|path| !told.contains(*path)) {
            let _ = std::fs::remove_file(path);
        }
    }
    if let Some(folder) = folder {
        folder.keep();
    }
    for line in lines {
        writeln!(out, "{line}")?;
    }
    Ok(is_damaged)
}

/// Where what is damaged of an image is listed.
fn damage_path(image: &Path) -> PathBuf {
    let mut name = image.as_os_str().to_owned();
    name.push(".damaged.json");
    name.into()
}

/// The list of what is damaged of an image, beside it.
fn report(image: &Path, damage: &serde_json::Value, force: bool) -> anyhow::Result<Image> {
    let report = Image::create(&damage_path(image), force)?;
    let text = serde_json::to_string_pretty(damage)? + "\n";
    report.write(0, text.as_bytes())?;
    report.sync()?;
    Ok(report)
}

fn tell_of_skipped(disk: &str, skipped: &[Skipped]) {
    for Skipped { offset_bytes, len_bytes, seq, what } in skipped {
        let record = seq.map_or(String::new(), |seq| format!("record {seq}: "));
        told!("damaged: {disk}: {len_bytes} bytes at {offset_bytes} are zeroes in the image: {record}{what}");
    }
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
    journal.warn();
    journal.check_bad_list(arguments.without_bad_list)?;
    let found = arguments.at.find(&journal.reader)?;
    let only = arguments.out.as_ref().map(|_| arguments.disk.unwrap_or(0));
    let count = journal.reader.survey.superblock.volumes.len();
    if only.is_some() && arguments.disk.is_none() && count > 1 && !arguments.quiet {
        told!("note: this is disk 0 of {count}; --disk names another one, --out-dir takes all");
    }
    let vm = VmPast::of(&journal, found.seq, only, arguments)?;
    let Found { seq, checkpoint } = &found;
    let moment = checkpoint.as_ref();
    let moment = moment.map_or_else(|| format!("record {seq}"), |at| format!("checkpoint {}", describe(at)));
    Ok(Past { moment, vms: vec![vm] })
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
        [] if let Some(journal) = stock.locked_of_vm(vm) => Err(journal.locked.clone().into()),
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
        told!("note: {newer}, so it is not taken");
    }
    for later in group.later_than(&found) {
        told!("note: VM {} is left out: it came to the group after that checkpoint", later.name);
    }
    let mut vms = Vec::new();
    for told in group.whole()? {
        let Some((_, cut)) = found.cuts.iter().find(|(vm, _)| *vm == told.vm) else { continue };
        let journal = Journal::open(&told.path, keys)?;
        journal.warn();
        journal.check_bad_list(arguments.without_bad_list)?;
        let vm = VmPast::of(&journal, *cut, None, arguments)
            .with_context(|| format!("checkpoint {} of VM {} cannot be opened", found.id, told.name))?;
        vms.push(VmPast { found: None, ..vm });
    }
    Ok(Past { moment: format!("checkpoint {}", words(&found.entry)), vms })
}

/// Says which disks a VM has now but had not then.
fn warn_of_absent(journal: &Journal, disks: &[DiskAt]) {
    let count = journal.reader.survey.superblock.volumes.len() as u16;
    for number in (0..count).filter(|number| disks.iter().all(|disk| disk.number != *number)) {
        let vm = journal.vm_name();
        let why = match disks.iter().any(|disk| journal.has_left(number, disk.seq)) {
            true => "it was protected no more at that moment",
            false => "it was added, or its first sync ended, after that moment",
        };
        told!("warning: disk {number} of {vm} is left out: {why}");
    }
}

/// Names that say VM and disk.
fn image_paths(folder: &Path, disks: &[&DiskFacts], format: Format) -> Vec<PathBuf> {
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
        let made = !path.is_dir();
        std::fs::create_dir_all(path).with_context(|| format!("cannot create {}", path.display()))?;
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
