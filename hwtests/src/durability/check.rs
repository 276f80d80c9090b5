//! Whether a datastore holds what its target had acknowledged.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use journal::batch::BatchView;
use journal::catalogue::CheckpointEntry;
use journal::format::{PAGE_BYTES, slot_offset_bytes};
use journal::recovery::SurveyOptions;
use journal::storage::ring::{Access, DirectFile, OpenFileError, RingStorage};
use journal::storage::{Blocking, FileId, Purpose, StorageError};
use journal::view::{Reader, ViewError};
use vra::api::vpg::VpgDefinition;
use vra::receive::{TargetError, TargetHost, TargetSettings};

use super::load::{Disks, Load, SECTOR_BYTES};

/// What is wrong with a datastore.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// Acknowledged records are missing.
    #[error("record {acknowledged} was acknowledged as durable, but only {found_through} are there")]
    Lost {
        /// The last acknowledged one.
        acknowledged: u64,
        /// The last one that is there.
        found_through: u64,
    },
    /// More is there than was ever sent.
    #[error("record {found_through} is there, but only {published} were sent")]
    Invented {
        /// The last one that is there.
        found_through: u64,
        /// The last one that was sent.
        published: u64,
    },
    /// A record isn't what was sent.
    #[error("record {seq} in the journal: {what}")]
    Record {
        /// Its number.
        seq: u64,
        /// What is wrong.
        what: String,
    },
    /// A disk isn't as it was.
    #[error("disk {volume} as of record {seq} has {count} wrong sectors, the first one is {sector}")]
    Disk {
        /// As of which record.
        seq: u64,
        /// Which disk.
        volume: u16,
        /// How many sectors are wrong.
        count: usize,
        /// The first of them, counted in sectors of 512 bytes.
        sector: u64,
    },
    /// The journal lists other checkpoints than it must.
    #[error("the journal lists the checkpoints {found:?}, not {expected:?}")]
    Checkpoints {
        /// Numbers of those that it lists.
        found: Vec<u64>,
        /// Numbers of those that it must list.
        expected: Vec<u64>,
    },
    /// A checkpoint is listed as something else.
    #[error("checkpoint {seq} is listed as something else than was sent")]
    Checkpoint {
        /// Its number.
        seq: u64,
    },
    /// The target can't open it.
    #[error("the target can't open what is left")]
    Open(#[from] TargetError),
    /// The journal can't be read.
    #[error("the journal can't be read")]
    View(#[from] ViewError),
    /// A file can't be read.
    #[error("a file can't be read")]
    Storage(#[from] StorageError),
    /// A file can't be opened.
    #[error("a file can't be opened")]
    File(#[from] OpenFileError),
    /// io_uring doesn't work.
    #[error("no ring for reading")]
    Ring(#[source] std::io::Error),
}

/// Opens a datastore as a target does that starts after a power cut, and closes it. Gives the number through which it says to have everything.
///
/// # Errors
/// It can't be opened.
pub async fn recover(definition: &VpgDefinition) -> Result<u64, CheckError> {
    let host = TargetHost::start(TargetSettings { worker_count: 1, ..TargetSettings::STANDARD })?;
    let target = host.ensure(definition, definition.vms[0].id).await?;
    let durable_through = target.status().durable_through;
    host.shut_down().await;
    Ok(durable_through)
}

/// Lets the product's own tool look at every byte of a journal.
///
/// # Errors
/// What it says.
pub fn verify(vra_journal: &Path, journal: &Path) -> Result<()> {
    let (succeeded, said) = verified(vra_journal, journal)?;
    ensure!(succeeded, "vra-journal verify says:\n{said}");
    Ok(())
}

/// The same after a power cut. That may have kept a segment's trailer and taken its footer, since both are synced together: the batches say the
/// same, and the tool names the footer all the same.
///
/// # Errors
/// What it says of anything else.
pub fn verify_after_power_cut(vra_journal: &Path, journal: &Path) -> Result<()> {
    let (succeeded, said) = verified(vra_journal, journal)?;
    let lacks_footer = |line: &str| LOST_FOOTER.iter().any(|known| line.starts_with(known));
    let mut damage = said.lines().filter(|line| line.starts_with("damaged: ")).peekable();
    let only_footers = damage.peek().is_some() && damage.all(lacks_footer);
    ensure!(succeeded || only_footers, "vra-journal verify says:\n{said}");
    Ok(())
}

/// How the tool names a footer that was not written, or not to its end.
const LOST_FOOTER: [&str; 2] =
    ["damaged: footer: no footer is here", "damaged: footer: the footer's checksum is wrong"];

fn verified(vra_journal: &Path, journal: &Path) -> Result<(bool, String)> {
    let output = Command::new(vra_journal).arg("verify").arg(journal).output();
    let output = output.with_context(|| format!("run {}", vra_journal.display()))?;
    let said = [output.stdout, output.stderr].concat();
    Ok((output.status.success(), String::from_utf8_lossy(&said).into_owned()))
}

/// What a check found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Everything up to here is there.
    pub through: u64,
    /// The first sync isn't complete.
    pub is_base_sync: bool,
    /// What is on the recovery disks, and not in the history.
    pub promoted_through: u64,
    /// How many checkpoints are listed.
    pub checkpoints: usize,
}

/// Checks the files of a VM against its load, without changing them: everything up to `acknowledged` is there; what is there beyond it is the
/// beginning of what was sent, whose last one is `published`; every record after `seen_through` in the journal is byte for byte what was
/// sent; the checkpoints that are listed are those that must be; and the disks are right as of each of them after `seen_through`, of the oldest
/// number that can be opened, of the last acknowledged record and of the last one.
///
/// # Errors
/// What is wrong.
pub fn check(
    definition: &VpgDefinition,
    load: Load,
    (acknowledged, published): (u64, u64),
    seen_through: u64,
) -> Result<Found, CheckError> {
    let folder = Load::folder(definition);
    let mut storage = RingStorage::new(RING_DEPTH).map_err(CheckError::Ring)?;
    let journal = storage.add_file(open(&folder.journal())?);
    let reader = Reader::open(&mut storage, journal, &SurveyOptions::default())?;
    let through = reader.newest_seq();
    if through < acknowledged {
        return Err(CheckError::Lost { acknowledged, found_through: through });
    }
    if through > published {
        return Err(CheckError::Invented { found_through: through, published });
    }
    walk(&mut storage, journal, &reader, load, seen_through)?;
    let disks = (0..Load::disk_count()).map(|volume| Ok(storage.add_file(open(&folder.disk(volume))?)));
    let disks = disks.collect::<Result<Vec<_>, CheckError>>()?;
    let superblock = &reader.survey.superblock;
    let is_base_sync = superblock.state.is_base_sync();
    let mut model = Disks::new(load);
    let oldest = superblock.oldest_seq();
    let checkpoints = if is_base_sync { Vec::new() } else { Load::checkpoints(oldest, through) };
    check_list(reader.catalogue().checkpoints(), &checkpoints)?;
    if is_base_sync {
        model.advance(through);
        check_base(&mut storage, &disks, &model, through)?;
    } else {
        let cuts = checkpoints.iter().map(|entry| entry.checkpoint.cut).filter(|cut| *cut > seen_through);
        let all: BTreeSet<u64> = cuts.chain([oldest, acknowledged.max(oldest), through]).collect();
        for seq in all {
            model.advance(seq);
            check_view(&mut storage, journal, &disks, &reader, &model, seq)?;
        }
    }
    let promoted_through = superblock.low_water.seq;
    Ok(Found { through, is_base_sync, promoted_through, checkpoints: checkpoints.len() })
}

const RING_DEPTH: u32 = 16;

/// What is compared at once, in bytes.
const PIECE_BYTES: u64 = 1 << 20;

fn open(path: &Path) -> Result<DirectFile, CheckError> {
    Ok(DirectFile::open(path, Access::ReadOnly)?)
}

/// Compares the checkpoints that are listed with those that must be.
fn check_list(found: &[CheckpointEntry], expected: &[CheckpointEntry]) -> Result<(), CheckError> {
    let numbers = |entries: &[CheckpointEntry]| entries.iter().map(|entry| entry.seq).collect::<Vec<_>>();
    if numbers(found) != numbers(expected) {
        return Err(CheckError::Checkpoints { found: numbers(found), expected: numbers(expected) });
    }
    match found.iter().zip(expected).find(|(found, expected)| found != expected) {
        Some((found, _)) => Err(CheckError::Checkpoint { seq: found.seq }),
        None => Ok(()),
    }
}

/// Compares every record in the journal with what was sent.
fn walk(
    storage: &mut RingStorage,
    journal: FileId,
    reader: &Reader,
    load: Load,
    seen_through: u64,
) -> Result<(), CheckError> {
    let superblock = &reader.survey.superblock;
    let mut io = Blocking::new(storage, journal, Purpose::View);
    for segment in &reader.survey.segments {
        if segment.last().seq <= seen_through {
            continue;
        }
        let mut expected = segment.header.after.seq;
        let slot_bytes = slot_offset_bytes(segment.header.slot, superblock.slot_len_bytes);
        let bytes = io.read(slot_bytes, segment.data_end_bytes() as usize)?;
        let mut rest = &bytes[PAGE_BYTES..];
        while !rest.is_empty() {
            let wrong = |seq, what: String| CheckError::Record { seq, what };
            let batch = BatchView::parse(rest).map_err(|error| wrong(expected + 1, error.to_string()))?;
            rest = &rest[batch.len_bytes()..];
            if batch.is_local() {
                continue;
            }
            for found in batch.records() {
                expected += 1;
                if found.seq() != expected {
                    return Err(wrong(expected, format!("record {} stands in its place", found.seq())));
                }
                let sent = load.record(expected);
                let place = (found.kind(), found.volume(), found.offset_bytes(), found.len_bytes());
                if place != (sent.kind, sent.volume, sent.offset_bytes, sent.len_bytes) {
                    return Err(wrong(expected, format!("it is {place:?}")));
                }
                if found.payload() != sent.payload {
                    return Err(wrong(expected, "its payload is not what was sent".to_owned()));
                }
            }
        }
        if expected != segment.last().seq {
            let what = format!("segment {} ends before it", segment.header.number);
            return Err(CheckError::Record { seq: segment.last().seq, what });
        }
    }
    Ok(())
}

/// Compares a view at a number with the disks of that time.
fn check_view(
    storage: &mut RingStorage,
    journal: FileId,
    disks: &[FileId],
    reader: &Reader,
    model: &Disks,
    seq: u64,
) -> Result<(), CheckError> {
    let view = reader.view(seq)?;
    for (volume, &disk) in (0_u16..).zip(disks) {
        let found = view.volume(volume)?;
        check_disk(model, volume, seq, |offset_bytes, into| {
            Ok(found.read(storage, journal, offset_bytes, into, |storage, offset_bytes, into| {
                read_unaligned(storage, disk, offset_bytes, into)
            })?)
        })?;
    }
    Ok(())
}

/// Compares the recovery disks during the first sync. What was sent after `seq` may be on them already, whole sector by whole sector: it will be
/// sent again.
fn check_base(
    storage: &mut RingStorage,
    disks: &[FileId],
    model: &Disks,
    seq: u64,
) -> Result<(), CheckError> {
    for (volume, &disk) in (0_u16..).zip(disks) {
        let mut wrong = Vec::new();
        for (offset_bytes, len_bytes) in pieces(volume) {
            let mut found = vec![0; len_bytes as usize];
            read_unaligned(storage, disk, offset_bytes, &mut found)?;
            let is_wrong = |sector: &u64| {
                let at = (sector * SECTOR_BYTES as u64 - offset_bytes) as usize;
                !model.may_become(volume, *sector, &found[at..at + SECTOR_BYTES], Load::sync_end())
            };
            wrong.extend(model.differing(volume, offset_bytes, &found).into_iter().filter(is_wrong));
        }
        judge(seq, volume, &wrong)?;
    }
    Ok(())
}

fn check_disk(
    model: &Disks,
    volume: u16,
    seq: u64,
    mut read: impl FnMut(u64, &mut [u8]) -> Result<(), CheckError>,
) -> Result<(), CheckError> {
    let mut wrong = Vec::new();
    for (offset_bytes, len_bytes) in pieces(volume) {
        let mut found = vec![0xee; len_bytes as usize];
        read(offset_bytes, &mut found)?;
        wrong.extend(model.differing(volume, offset_bytes, &found));
    }
    judge(seq, volume, &wrong)
}

fn judge(seq: u64, volume: u16, wrong: &[u64]) -> Result<(), CheckError> {
    match wrong {
        [] => Ok(()),
        [sector, ..] => Err(CheckError::Disk { seq, volume, count: wrong.len(), sector: *sector }),
    }
}

fn pieces(volume: u16) -> impl Iterator<Item = (u64, u64)> {
    let size_bytes = Load::disk_bytes(volume);
    let starts = (0..size_bytes).step_by(PIECE_BYTES as usize);
    starts.map(move |offset_bytes| (offset_bytes, PIECE_BYTES.min(size_bytes - offset_bytes)))
}

/// Reads any bytes of a file that is open for direct I/O.
fn read_unaligned(
    storage: &mut RingStorage,
    file: FileId,
    offset_bytes: u64,
    into: &mut [u8],
) -> Result<(), StorageError> {
    let page = PAGE_BYTES as u64;
    let begin_bytes = offset_bytes / page * page;
    let len_bytes = (offset_bytes + into.len() as u64).next_multiple_of(page) - begin_bytes;
    let read = Blocking::new(storage, file, Purpose::View).read(begin_bytes, len_bytes as usize)?;
    into.copy_from_slice(&read[(offset_bytes - begin_bytes) as usize..][..into.len()]);
    Ok(())
}
