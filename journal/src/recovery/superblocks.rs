//! Which copy of the superblock counts.

use super::OpenError;
use super::decide::{self, Choice};
use crate::format::{PAGE_BYTES, SUPERBLOCK_OFFSETS, Superblock, SuperblockError};
use crate::storage::{Blocking, Storage, StorageError};

/// The superblock that counts.
pub(crate) struct Chosen {
    pub(crate) superblock: Superblock,
    /// The other copy is damaged or can't be read. It may have been that of a change that had not come to count.
    pub(crate) is_alone: bool,
}

/// Reads both superblocks and takes the one that counts. A copy that the disk can't give back is a damaged one: should it be the newer one,
/// nothing was done yet that relies on it, since a change counts only when both copies have it. If none can be taken and one could not be
/// read, the error is the disk's, unless `skip_unreadable`: a disk that fails for a while is no damaged journal.
pub(crate) fn read_superblock<S: Storage>(
    io: &mut Blocking<'_, S>,
    skip_unreadable: bool,
) -> Result<Chosen, OpenError> {
    if io.file_len_bytes()? < SUPERBLOCK_OFFSETS[1] + PAGE_BYTES as u64 {
        return Err(OpenError::NotAJournal);
    }
    let mut unreadable = None;
    let mut decoded = |read: Result<_, StorageError>| match read {
        Ok(page) => Ok(Superblock::decode(page)),
        Err(error) if error.is_medium() => {
            unreadable = Some(error);
            Ok(Err(SuperblockError::Unreadable))
        }
        Err(error) => Err(error),
    };
    let [first, second] = SUPERBLOCK_OFFSETS.map(|offset_bytes| io.read(offset_bytes, PAGE_BYTES));
    let first = decoded(first.as_deref().map_err(|error| *error))?;
    let second = decoded(second.as_deref().map_err(|error| *error))?;
    let is_alone = first.is_err() || second.is_err();
    match (choose_superblock(first, second), unreadable) {
        (Ok(superblock), _) => Ok(Chosen { superblock, is_alone }),
        (Err(OpenError::SuperblocksDamaged(_) | OpenError::NotAJournal), Some(error)) if !skip_unreadable => {
            Err(error.into())
        }
        (Err(error), _) => Err(error),
    }
}

/// The copy of the superblock that counts, of what [`Superblock::decode`] gave for both: as [`survey`] chooses it.
///
/// # Errors
/// None counts, or a newer release wrote one.
pub fn choose_superblock(
    first: Result<Superblock, SuperblockError>,
    second: Result<Superblock, SuperblockError>,
) -> Result<Superblock, OpenError> {
    if let (Ok(first), Ok(second)) = (&first, &second)
        && first.journal_id != second.journal_id
    {
        return Err(OpenError::TwoJournals([first.journal_id, second.journal_id]));
    }
    let sequence = |copy: &Result<Superblock, _>| copy.as_ref().map_or(0, |copy| copy.sequence);
    let kinds = (decide::Copy::of(&first), decide::Copy::of(&second));
    let choice = decide::choose_superblock(kinds.0, kinds.1, sequence(&first), sequence(&second));
    match (choice, first, second) {
        (Choice::First, Ok(copy), _) | (Choice::Second, _, Ok(copy)) => Ok(copy),
        (Choice::RefuseNewer, first, second) => {
            let newer = [first.err(), second.err()].into_iter().flatten();
            let is_newer = |error: &_| decide::Copy::of::<()>(&Err(*error)) == decide::Copy::Newer;
            Err(OpenError::Newer(newer.into_iter().find(is_newer).expect("a newer copy was seen")))
        }
        (Choice::BothDamaged, first, second) => {
            let error = first.err().or(second.err()).expect("no copy is valid");
            Err(OpenError::SuperblocksDamaged(error))
        }
        _ => Err(OpenError::NotAJournal),
    }
}
