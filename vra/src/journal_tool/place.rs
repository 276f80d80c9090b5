//! Finding journals and opening them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use journal::crypt::SiteKeys;
use journal::format::{Gap, PAGE_BYTES, SUPERBLOCK_OFFSETS, Superblock, SuperblockError, VolumeState};
use journal::recovery::{
    OpenError, Rebuilt, Survey, SurveyOptions, choose_superblock, newest_manifest, rebuild,
};
use journal::storage::ring::{Access, DirectFile};
use journal::storage::{Blocking, FileId, Purpose};
use journal::view::{Reader, ViewError};
use serde::Deserialize;

use super::locked::{Locked, missing_key};
use super::storage::ToolStorage;
use super::text;
use crate::api::vpg::{VmDefinition, VpgDefinition};
use crate::api::{VmId, VpgId};
use crate::receive::LockedCheckpoint;

/// Name of a journal's file in its VM's folder.
const JOURNAL_NAME: &str = "journal.hfj";

/// What the manifest says, as far as this command needs it: newer releases may say more.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Manifest {
    /// Whose journal it is.
    pub(super) vm: VmId,
    /// The VM's group.
    pub(super) vpg: VpgDefinition,
    /// Checkpoints that are kept when they grow older than the history.
    #[serde(default)]
    pub(super) locked: Vec<LockedCheckpoint>,
    /// Number of each disk's first record, by volume number, if a disk has joined later.
    #[serde(default)]
    pub(super) bases: Vec<u64>,
    /// The first number at which the VM didn't have a disk any more, by volume number.
    #[serde(default)]
    pub(super) left: BTreeMap<u16, u64>,
}

impl Manifest {
    /// The VM's definition in its group.
    pub(super) fn vm(&self) -> Option<&VmDefinition> {
        self.vpg.vms.iter().find(|vm| vm.id == self.vm)
    }
}

/// A journal opened to read.
pub(super) struct Journal {
    /// The journal's file.
    pub(super) path: PathBuf,
    pub(super) storage: ToolStorage,
    pub(super) file: FileId,
    pub(super) reader: Reader,
    /// Who and what it is for, if its manifest can be read.
    pub(super) manifest: Option<Manifest>,
    /// Set if damage hides records after it, though some of them are there: the history ends before them.
    pub(super) cut_short: Option<String>,
    /// Both superblocks are lost: segments and manifest told what the file holds.
    pub(super) is_rebuilt: bool,
    /// They don't prove that no segment before the oldest one is lost.
    is_unproven: bool,
    /// Locked checkpoints that can't be opened any more, and why.
    pub(super) lost_locks: Vec<String>,
    /// What opened what is encrypted.
    pub(super) keys: SiteKeys,
}

/// How often a journal is read anew because a VRA opened it, or promoted, meanwhile.
const OPEN_TRIES: u32 = 10;

impl Journal {
    /// Opens a journal, over what of its file can't be read: [`Self::warn`] tells of it. `keys` are for what of it is encrypted.
    pub(super) fn open(path: &Path, keys: &SiteKeys) -> anyhow::Result<Self> {
        let path = find_one(path)?;
        let mut tries_left = OPEN_TRIES;
        loop {
            let mut journal = Self::open_once(&path, keys)?;
            tries_left -= 1;
            // A VRA that opened it meanwhile may have moved what was being read.
            if tries_left == 0 || !journal.may_have_moved() {
                return Ok(journal);
            }
        }
    }

    fn open_once(path: &Path, keys: &SiteKeys) -> anyhow::Result<Self> {
        let path = path.to_owned();
        let (mut storage, file) = open_file(&path)?;
        let options = SurveyOptions { skip_unreadable: true, keys: keys.clone(), ..SurveyOptions::default() };
        let opened = Reader::open(&mut storage, file, &options);
        let is_without_superblocks =
            matches!(opened, Err(ViewError::Open(OpenError::SuperblocksDamaged(_) | OpenError::NotAJournal)));
        let rebuilt = match is_without_superblocks {
            false => None,
            true => match rebuilt(&mut storage, file, &path, keys) {
                Ok(rebuilt) => Some(rebuilt),
                Err(error) if missing_key(&error).is_some() => return Err(Locked::or(error, &path, keys)),
                // Nothing of a journal is here: what the superblocks say of it says more.
                Err(error) if matches!(error.downcast_ref(), Some(OpenError::NotAJournal)) => None,
                Err(error) => return Err(error.context("both superblocks are lost")),
            },
        };
        let (is_rebuilt, is_unproven) =
            (rebuilt.is_some(), rebuilt.as_ref().is_some_and(|rebuilt| rebuilt.is_unproven));
        if let Some(gap) = rebuilt.as_ref().and_then(|rebuilt| rebuilt.gap) {
            let error = anyhow::Error::from(OpenError::Damaged(gap));
            return Err(
                error.context(format!("cannot open {}: both superblocks are lost too", path.display()))
            );
        }
        let reader = match rebuilt {
            None => opened.map_err(anyhow::Error::from),
            Some(rebuilt) => rebuilt
                .survey(&mut storage, file, &options)
                .map_err(anyhow::Error::from)
                .and_then(|survey| Ok(Reader::of(&mut storage, file, survey)?)),
        };
        let reader = reader
            .map_err(|error| Locked::or(error, &path, keys))
            .with_context(|| format!("cannot open {}", path.display()))?;
        let manifest = reader.survey.manifest.as_ref();
        let manifest = manifest.and_then(|manifest| serde_json::from_str(&manifest.text).ok());
        let cut_short = cut_short(&reader.survey);
        let keys = keys.clone();
        let lost_locks = Vec::new();
        let mut journal = Self {
            path,
            storage,
            file,
            reader,
            manifest,
            cut_short,
            is_rebuilt,
            is_unproven,
            lost_locks,
            keys,
        };
        journal.find_overlays();
        Ok(journal)
    }

    fn may_have_moved(&mut self) -> bool {
        let read = &self.reader.survey.superblock;
        let (open_count, low_water_segment) = (read.open_count, read.low_water_segment);
        let now = if self.is_rebuilt { None } else { read_superblock(&mut self.storage, self.file) };
        now.is_some_and(|now| (now.open_count, now.low_water_segment) != (open_count, low_water_segment))
    }

    /// Says on standard error what is damaged, in so far as it matters to whoever opens a checkpoint.
    pub(super) fn warn(&self) {
        let vm = self.vm_name();
        let warnings = self.warnings();
        for warning in &warnings {
            told!("warning: {vm}: {warning}");
        }
        if !warnings.is_empty() {
            told!("warning: {vm}: `vra-journal verify` names all damage");
        }
    }

    /// What is damaged.
    pub(super) fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        let survey = &self.reader.survey;
        if self.is_rebuilt {
            warnings.push(
                "both superblocks are lost; what the segments tell can be read, checkpoints that promotion had begun to take away \
                 cannot"
                    .to_owned(),
            );
        }
        if self.is_unproven {
            warnings.push(
                "nothing proves that no segment before the oldest one is lost: if one is, all disks read wrong where only it wrote"
                    .to_owned(),
            );
        }
        if let Some(why) = &self.cut_short {
            warnings.push(format!("{why}; nothing after that can be opened"));
        }
        for Gap { first_seq, last_seq } in self.reader.gaps() {
            warnings.push(format!(
                "records {first_seq} to {last_seq} are lost, and it is not known what they wrote; nothing from record {first_seq} on can \
                 be opened, before the end of a full sync that began behind them"
            ));
        }
        if let Some(first) = survey.unreadable.first() {
            let count = survey.unreadable.len();
            warnings.push(format!(
                "{count} pages of the journal's file cannot be read, the first at byte {first}: copy the file with ddrescue and use the \
                 copy if there are more with each try"
            ));
        }
        if !survey.bad_ranges.is_empty() {
            let bytes = survey.bad_ranges.iter().map(|bad| bad.len_bytes).sum();
            warnings.push(format!(
                "{} in {} places of the recovery disks are lost, since the records were damaged before they were promoted: only \
                 checkpoints after a place was written again have it",
                text::bytes(bytes),
                survey.bad_ranges.len()
            ));
        }
        if let Some(error) = &survey.bad_list_lost {
            warnings.push(format!(
                "IT IS NOT KNOWN WHICH PARTS OF THE RECOVERY DISKS ARE LOST: {error}; what is read from them may be wrong, and \
                 nothing tells"
            ));
        }
        warnings
    }

    /// Refuses if nobody knows what of the recovery disks is lost, unless that was `accepted`: what comes out may be wrong.
    pub(super) fn check_bad_list(&self, accepted: bool) -> anyhow::Result<()> {
        match &self.reader.survey.bad_list_lost {
            Some(error) if !accepted => bail!(
                "{}: it is not known which parts of the recovery disks are lost ({error}): the disks may have wrong bytes where damaged \
                 records were promoted, and nothing would tell; --without-bad-list goes on all the same",
                self.vm_name()
            ),
            _ => Ok(()),
        }
    }

    /// The VM's name, or its id when the manifest cannot be read.
    pub(super) fn vm_name(&self) -> String {
        let named = self.manifest.as_ref().and_then(Manifest::vm).map(|vm| vm.name.clone());
        named.unwrap_or_else(|| self.reader.survey.superblock.vm_id.to_string())
    }

    /// The recovery disk of a volume.
    pub(super) fn disk_path(&self, number: u16) -> PathBuf {
        self.path.with_file_name(format!("disk-{number}.raw"))
    }

    /// Opens the recovery disk of a volume for direct I/O.
    pub(super) fn open_disk(&self, number: u16) -> anyhow::Result<DirectFile> {
        let path = self.disk_path(number);
        if std::fs::metadata(&path).is_ok_and(|metadata| !metadata.is_file()) {
            bail!("{} is not a file: the recovery disk of disk {number} must be there", path.display());
        }
        let disk = DirectFile::open(&path, Access::ReadOnly)
            .with_context(|| format!("the recovery disk of disk {number} must be beside the journal"))?;
        let found_bytes = disk.file().metadata()?.len();
        let volume = self.reader.survey.superblock.volumes.get(usize::from(number));
        if let Some(wanted_bytes) =
            volume.map(|volume| volume.size_bytes).filter(|bytes| found_bytes < *bytes)
        {
            bail!(
                "recovery disk {} has {found_bytes} bytes, its volume has {wanted_bytes}: it was cut; restore it from a copy",
                path.display()
            );
        }
        Ok(disk)
    }

    /// Whose it is.
    pub(super) fn vm_id(&self) -> VmId {
        self.manifest.as_ref().map_or(VmId(self.reader.survey.superblock.vm_id), |manifest| manifest.vm)
    }

    /// Which group the VM belongs to.
    pub(super) fn vpg_id(&self) -> VpgId {
        let manifest = self.manifest.as_ref();
        manifest.map_or(VpgId(self.reader.survey.superblock.vpg_id), |manifest| manifest.vpg.id)
    }

    /// Whether a disk was no more protected at a number.
    pub(super) fn has_left(&self, number: u16, seq: u64) -> bool {
        let left_seq = self.manifest.as_ref().and_then(|manifest| manifest.left.get(&number));
        left_seq.is_some_and(|left_seq| *left_seq <= seq)
    }

    /// What to say of a disk that isn't in a view.
    pub(super) fn no_disk(&self, number: u16) -> String {
        let known = self.reader.survey.superblock.volumes.len();
        format!(
            "there is no disk {number} at that moment: the VM has {known}, numbered from 0, some of which joined later or left; choose \
             another --disk or another moment"
        )
    }

    /// The logical block size of a volume at the source, in bytes.
    pub(super) fn logical_block_bytes(&self, number: u16) -> u32 {
        let vm = self.manifest.as_ref().and_then(Manifest::vm);
        let volume = vm.and_then(|vm| vm.volumes.iter().find(|volume| volume.number == number));
        volume.map_or(512, |volume| volume.logical_block_bytes)
    }
}

/// What segments, manifest and recovery disks say of a journal that has lost both superblocks.
pub(super) fn rebuilt(
    storage: &mut ToolStorage,
    file: FileId,
    path: &Path,
    keys: &SiteKeys,
) -> anyhow::Result<Rebuilt> {
    let manifest = newest_manifest(storage, file)?;
    let definition: Option<Manifest> =
        manifest.as_ref().and_then(|manifest| serde_json::from_str(&manifest.text).ok());
    let volume = |id, size_bytes| VolumeState { id, base_seq: 0, size_bytes, fresh_image: false };
    let bases = definition.as_ref().map(|manifest| manifest.bases.clone()).unwrap_or_default();
    let volumes: Vec<VolumeState> = match definition.as_ref().and_then(Manifest::vm) {
        Some(vm) => vm.volumes.iter().map(|disk| volume(disk.id.0, disk.size_bytes)).collect(),
        None => (0..)
            .map_while(|number| std::fs::metadata(path.with_file_name(format!("disk-{number}.raw"))).ok())
            .map(|metadata| volume(uuid::Uuid::nil(), metadata.len()))
            .collect(),
    };
    let bases = bases.into_iter().chain(std::iter::repeat(0));
    let volumes = volumes.into_iter().zip(bases).map(|(volume, base_seq)| VolumeState { base_seq, ..volume });
    let rebuilt = rebuild(storage, file, manifest, volumes.collect(), keys);
    let mut rebuilt = rebuilt.with_context(|| format!("cannot open {}", path.display()))?;
    if let Some(definition) = definition {
        (rebuilt.superblock.vm_id, rebuilt.superblock.vpg_id) = (definition.vm.0, definition.vpg.id.0);
    }
    Ok(rebuilt)
}

/// Why the history ends before the last record that is there.
fn cut_short(survey: &Survey) -> Option<String> {
    let (after_seq, until) = match (&survey.damage, &survey.hidden) {
        (Some(damage), _) => (damage.after_seq, Some(damage.resumes_after_seq)),
        (None, Some(hidden)) => (hidden.after_seq, hidden.resumes_seq.map(|resumes_seq| resumes_seq - 1)),
        (None, None) if survey.missing_slots > 0 => {
            return Some(format!(
                "the file has lost the last {} of its {} slots: if they held the newest records, those from {} on cannot be read",
                survey.missing_slots,
                survey.superblock.slot_count,
                survey.tail.seq + 1
            ));
        }
        (None, None) => return None,
    };
    let first = after_seq + 1;
    Some(match until {
        Some(until) => format!("records {first} to {until} cannot be read"),
        None => format!(
            "an encrypted segment has lost its first page: if it was the newest, records from {first} on cannot be read"
        ),
    })
}

/// The superblock that counts, as it is in the file now; nothing if none can be read.
pub(super) fn read_superblock(storage: &mut ToolStorage, file: FileId) -> Option<Superblock> {
    let mut io = Blocking::new(storage, file, Purpose::View);
    let [first, second] = SUPERBLOCK_OFFSETS.map(|offset_bytes| match io.read(offset_bytes, PAGE_BYTES) {
        Ok(page) => Superblock::decode(&page),
        Err(_) => Err(SuperblockError::Unreadable),
    });
    choose_superblock(first, second).ok()
}

/// Opens a journal's file.
pub(super) fn open_file(path: &Path) -> anyhow::Result<(ToolStorage, FileId)> {
    let mut storage = ToolStorage::new(64).context("cannot set up io_uring: is it disabled here?")?;
    let file = DirectFile::open(path, Access::ReadOnly)?;
    let file = storage.add_file(file);
    Ok((storage, file))
}

/// The journals below a folder: its own, its VMs', or those of its groups' VMs. Sorted by path.
pub(super) fn find_all(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![(folder.to_owned(), 0)];
    while let Some((folder, depth)) = folders.pop() {
        let journal = folder.join(JOURNAL_NAME);
        if journal.is_file() {
            found.push(journal);
            continue;
        }
        if depth == 2 {
            continue;
        }
        let entries = std::fs::read_dir(&folder)
            .with_context(|| format!("cannot read the folder {}", folder.display()))?;
        for entry in entries {
            let entry = entry.with_context(|| format!("cannot read the folder {}", folder.display()))?;
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) && entry.file_name() != "lost+found" {
                folders.push((entry.path(), depth + 1));
            }
        }
    }
    found.sort();
    Ok(found)
}

/// The one journal that a path means.
pub(super) fn find_one(path: &Path) -> anyhow::Result<PathBuf> {
    let metadata = std::fs::metadata(path).with_context(|| format!("cannot look at {}", path.display()))?;
    if !metadata.is_dir() {
        return Ok(path.to_owned());
    }
    let mut found = find_all(path)?;
    match found.len() {
        0 => bail!(
            "there is no {JOURNAL_NAME} in {} or its VMs' folders; give a journal's file, a VM's folder or a datastore",
            path.display()
        ),
        1 => Ok(found.remove(0)),
        count => {
            let list: Vec<String> = found
                .iter()
                .filter_map(|journal| journal.parent())
                .map(|folder| format!("\n  {}", folder.display()))
                .collect();
            bail!("{} holds {count} journals; give one of their folders:{}", path.display(), list.concat())
        }
    }
}
