//! Making and opening a VM's files. All of it blocks: for threads that may.

use std::collections::BTreeSet;

use journal::crypt::{Encryption, Keys, NewKey};
use journal::format::{DEFAULT_SLOT_BYTES, Footer, FooterEvent, VolumeState};
use journal::recovery::{NewJournal, OpenOptions, Opened};
use journal::storage::ring::{Access, DirectFile, RingStorage};
use journal::storage::{Blocking, Purpose};
use journal::writer::{Change, Event, Limits, Writer, drive};

use super::folder::{AddedDisks, NewDisk, Unfinished, VmFolder};
use super::manifest::Manifest;
use super::receiver_types::VmIdentity;
use super::target_error::TargetError;
use crate::api::{JournalId, VmId, vpg::VmDefinition, vpg::VpgDefinition};
use crate::wire::{MAX_VOLUMES, VolumeShape};

/// A VM's files, open, and what the journal says.
pub(super) struct VmFiles {
    pub(super) manifest: Manifest,
    pub(super) identity: VmIdentity,
    pub(super) opened: Opened,
    /// What of the journal isn't data, in the order of the stream.
    pub(super) events: Vec<FooterEvent>,
    pub(super) journal: DirectFile,
    pub(super) disks: Vec<DirectFile>,
    /// Numbers of locked checkpoints that there are overlays of.
    pub(super) overlays: BTreeSet<u64>,
}

/// Slots that a journal begins with.
const FIRST_SLOTS: u32 = 4;

/// Slots that it grows by.
const GROW_SLOTS: u32 = 1;

/// Shortest slot of a VM's journal, in bytes: the longest batch fits, with its footer.
const LEAST_SLOT_BYTES: u64 = 8 << 20;

/// Most bytes of batches that are written together.
const GROUP_BYTES: usize = 8 << 20;

/// Operations of one opening at once.
const RING_DEPTH: u32 = 64;

/// Length of a slot for a journal of this limit, in bytes: at least 16 slots where that can be.
fn slot_bytes(limit_bytes: u64) -> u64 {
    let sixteenth = (limit_bytes / 16).max(1);
    (1 << sixteenth.ilog2()).clamp(LEAST_SLOT_BYTES, DEFAULT_SLOT_BYTES)
}

/// How far the journal of a definition may go, if its slots have `slot_bytes`.
pub(super) fn limits(definition: &VmDefinition, slot_bytes: u64) -> Limits {
    let slots = |slots: u64| u32::try_from(slots).unwrap_or(u32::MAX);
    let max_slots = slots(definition.journal_limit() / slot_bytes).max(FIRST_SLOTS);
    let min_slots = slots(definition.journal_minimum_bytes.div_ceil(slot_bytes)).min(max_slots);
    Limits { max_slots, min_slots, grow_slots: GROW_SLOTS, group_bytes: GROUP_BYTES }
}

/// Whether a journal can do with this limit, in bytes. The length of its slots, in bytes, stays what it was made with.
pub(super) fn check_limit(limit_bytes: u64, slot_bytes: u64) -> Result<(), TargetError> {
    let least_bytes = u64::from(FIRST_SLOTS) * slot_bytes;
    if limit_bytes < least_bytes {
        return Err(TargetError::JournalLimit { limit_bytes, least_bytes });
    }
    Ok(())
}

/// The VM of a definition, with its volumes checked.
pub(super) fn identity(definition: &VmDefinition) -> Result<VmIdentity, TargetError> {
    if definition.volumes.is_empty() || definition.volumes.len() > MAX_VOLUMES {
        return Err(TargetError::Definition("a VM has 1 to 64 volumes"));
    }
    let shape = |(number, volume): (u16, &crate::api::vpg::VolumeDefinition)| {
        if volume.number != number {
            return Err(TargetError::Definition("volumes are numbered from 0 without gaps"));
        }
        let block_bytes = u64::from(volume.logical_block_bytes);
        if ![512, 4096].contains(&block_bytes)
            || volume.size_bytes == 0
            || !volume.size_bytes.is_multiple_of(block_bytes)
            || volume.size_bytes > journal::batch::MAX_VOLUME_BYTES
        {
            return Err(TargetError::Definition(
                "a volume's size is a multiple of its block size, 512 or 4096 bytes",
            ));
        }
        Ok(VolumeShape {
            volume: number,
            id: volume.id,
            logical_block_bytes: volume.logical_block_bytes,
            size_bytes: volume.size_bytes,
            left: volume.left,
        })
    };
    let volumes = (0_u16..).zip(&definition.volumes).map(shape).collect::<Result<_, _>>()?;
    Ok(VmIdentity { vm: definition.id, journal: definition.journal, volumes })
}

/// The recovery disks of volumes that a journal gets. What one that has left before would show is in none of its checkpoints.
pub(super) fn new_disks(volumes: &[VolumeShape]) -> Vec<NewDisk> {
    let disk = |volume: &VolumeShape| NewDisk { size_bytes: volume.size_bytes, stays_empty: volume.left };
    volumes.iter().map(disk).collect()
}

/// What a VM's files are to be when they are made.
struct NewFiles {
    identity: VmIdentity,
    slot_len_bytes: u64,
    slot_count: u32,
    disks: Vec<NewDisk>,
    /// Space for the journal, in bytes.
    journal_bytes: u64,
}

fn new_files(definition: &VmDefinition) -> Result<NewFiles, TargetError> {
    let identity = identity(definition)?;
    let limit_bytes = definition.journal_limit();
    let slot_len_bytes = slot_bytes(limit_bytes);
    check_limit(limit_bytes, slot_len_bytes)?;
    // The minimum is there from the start.
    let slot_count = FIRST_SLOTS.max(limits(definition, slot_len_bytes).min_slots);
    let journal_bytes = u64::from(slot_count) * slot_len_bytes + (1 << 20);
    let disks = new_disks(&identity.volumes);
    Ok(NewFiles { identity, slot_len_bytes, slot_count, disks, journal_bytes })
}

/// Whether a VM's files could be made.
pub(super) fn check_new(
    folder: &VmFolder,
    vpg: &VpgDefinition,
    definition: &VmDefinition,
    keys: &Keys,
) -> Result<(), TargetError> {
    let new = new_files(definition)?;
    if vpg.encrypt && keys.site().current().is_none() {
        return Err(TargetError::NoSiteKey);
    }
    Ok(folder.check_space(&definition.datastore, &new.disks, new.journal_bytes)?)
}

/// Makes a VM's files: recovery disks, journal, manifest. They are the VM's once [`Unfinished::finish`] gives the journal its name.
pub(super) fn make(
    folder: &VmFolder,
    vpg: &VpgDefinition,
    definition: &VmDefinition,
    keys: &Keys,
) -> Result<Unfinished, TargetError> {
    let NewFiles { identity, slot_len_bytes, slot_count, disks, journal_bytes } = new_files(definition)?;
    let encryption = match (vpg.encrypt, keys.site().current()) {
        (false, _) => Encryption::Never,
        (true, None) => return Err(TargetError::NoSiteKey),
        (true, Some(site_key)) => {
            let key = NewKey::random().map_err(|error| host("making a key", std::io::Error::other(error)))?;
            Encryption::On(key.wrap(definition.journal.0, site_key))
        }
    };
    let made = folder.make(&definition.datastore, &disks, journal_bytes)?;
    let mut manifest = Manifest::new(vpg, definition.id, disks.len(), made.is_reserved());
    // A disk that left before there was a journal is in none of its checkpoints.
    manifest.note_left(definition, 1);
    let new = NewJournal {
        journal_id: definition.journal.0,
        vm_id: definition.id.0,
        vpg_id: vpg.id.0,
        slot_len_bytes,
        slot_count,
        volumes: identity
            .volumes
            .iter()
            .map(|volume| VolumeState {
                id: volume.id.0,
                base_seq: 0,
                size_bytes: volume.size_bytes,
                fresh_image: true,
            })
            .collect(),
        manifest: manifest.to_text(),
        encryption,
    };
    let path = made.journal();
    let mut storage = ring()?;
    let file = storage.add_file(DirectFile::open(&path, Access::Exclusive)?);
    journal::recovery::create(&mut storage, file, &new)
        .map_err(|source| TargetError::Journal { path, source })?;
    drop(storage);
    Ok(made)
}

/// Opens a VM's files for writing. After a failure in this process `trusted_through` is the last number that was known to be durable.
pub(super) fn open(
    folder: &VmFolder,
    vm: VmId,
    trusted_through: Option<u64>,
    keys: Keys,
) -> Result<VmFiles, TargetError> {
    let path = folder.journal();
    let failed = |source| TargetError::Journal { path: path.clone(), source };
    folder.tighten();
    let mut storage = ring()?;
    let file = storage.add_file(DirectFile::open(&path, Access::Exclusive)?);
    let options = OpenOptions { vm_id: Some(vm.0), trusted_through, keys };
    let opened = journal::recovery::open(&mut storage, file, &options).map_err(failed)?;
    if let Some(hidden) = opened.hidden {
        tracing::info!(
            journal = %path.display(),
            segment = hidden.segment,
            after_seq = hidden.after_seq,
            resumes_seq = hidden.resumes_seq,
            "the journal ends before an unreadable batch with later ones behind it: a power cut before they were acknowledged, or damage. \
             If they were acknowledged, their source notices and replicates anew"
        );
    }
    let mut io = Blocking::new(&mut storage, file, Purpose::Survey);
    let mut events = Vec::new();
    let take = |footer: Footer| {
        for gap in footer.gaps.iter().filter(|gap| gap.has_records()) {
            tracing::error!(
                journal = %path.display(),
                first_seq = gap.first_seq,
                last_seq = gap.last_seq,
                "records of the journal can't be read, and neither can their segment's footer: no checkpoint from there on counts, until a \
                 full sync that began behind them has ended. Restart the source's VRA, which begins one"
            );
        }
        events.extend(footer.events);
    };
    let mended = journal::recovery::each_footer_mended(&opened.segments, &mut io, &opened.superblock, take)
        .map_err(|source| TargetError::Segment { path: path.clone(), source })?;
    if mended > 0 {
        tracing::info!(journal = %path.display(), mended, "footers that a power cut took were written again");
    }
    let journal = storage.remove_file(file).expect("added above");
    let Some(text) = opened.manifest.as_ref().map(|manifest| &manifest.text) else {
        return Err(TargetError::NoManifest { path });
    };
    let in_manifest = |source| TargetError::Manifest { path: path.clone(), source };
    let manifest = Manifest::parse(text).map_err(in_manifest)?;
    let mut identity = identity(manifest.vm().map_err(in_manifest)?)?;
    identity.journal = JournalId(opened.superblock.journal_id);
    let volumes = &opened.superblock.volumes;
    let same = |(shape, state): (&VolumeShape, &VolumeState)| {
        // One that has grown since its last promotion is larger than the superblock says.
        shape.id.0 == state.id && shape.size_bytes >= state.size_bytes
    };
    if volumes.len() != identity.volumes.len() || !identity.volumes.iter().zip(volumes).all(same) {
        return Err(TargetError::VolumesDiffer { vm, path });
    }
    let mut disks = Vec::new();
    for volume in &identity.volumes {
        let path = folder.disk(volume.volume);
        let disk = DirectFile::open(&path, Access::Exclusive)?;
        let found_bytes =
            disk.file().metadata().map_err(|source| host("looking at a recovery disk", source))?.len();
        if found_bytes < volume.size_bytes {
            return Err(TargetError::DiskCut { path, found_bytes, expected_bytes: volume.size_bytes });
        }
        disks.push(disk);
    }
    let overlays = folder.overlay_cuts()?;
    Ok(VmFiles { manifest, identity, opened, events, journal, disks, overlays })
}

/// Gives a VM's files the disks that a definition has and they don't, and opens them again; their recovery disks may be there already. Journal
/// and manifest know of them at one moment: a crash before that leaves recovery disks that the next opening removes.
pub(super) fn add_volumes(
    folder: &VmFolder,
    vpg: &VpgDefinition,
    definition: &VmDefinition,
    files: VmFiles,
    made: Option<AddedDisks>,
    keys: Keys,
) -> Result<VmFiles, TargetError> {
    let VmFiles { manifest, identity: known, opened, journal, disks, .. } = files;
    drop(disks);
    let first = known.volumes.len();
    let added = &identity(definition)?.volumes[first..];
    let made = match made {
        Some(made) => made,
        None => folder.add_disks(&definition.datastore, first as u16, &new_disks(added))?,
    };
    let base_seq = opened.tail.seq + 1;
    let mut manifest = manifest.redefined(vpg);
    let bases = opened.superblock.volumes.iter().map(|volume| volume.base_seq);
    manifest.add_disks(bases, added.len(), base_seq);
    manifest.disks_reserved &= made.is_reserved();
    manifest.note_left(definition, base_seq);
    let limits = limits(definition, opened.superblock.slot_len_bytes);
    let mut writer = Writer::new(opened, limits);
    let volumes = added.iter().map(|volume| (volume.id.0, volume.size_bytes)).collect();
    writer
        .change(Change::AddVolumes { volumes, manifest: manifest.to_text() })
        .map_err(|error| host("adding disks to the journal", std::io::Error::other(error)))?;
    let mut storage = ring()?;
    let file = storage.add_file(journal);
    // Whether or not the journal says so: it may have them from here on.
    made.keep();
    let events = drive(&mut writer, &mut storage, file)
        .map_err(|errno| host("adding disks to the journal", errno.into()))?;
    if let Some(Event::Poisoned(error)) = events.into_iter().find(|event| matches!(event, Event::Poisoned(_)))
    {
        return Err(host("adding disks to the journal", std::io::Error::other(error)));
    }
    drop(storage);
    open(folder, definition.id, None, keys)
}

pub(super) fn ring() -> Result<RingStorage, TargetError> {
    RingStorage::new(RING_DEPTH).map_err(|source| host("setting up io_uring", source))
}

pub(super) fn host(operation: &'static str, source: std::io::Error) -> TargetError {
    TargetError::Host { operation, source }
}
