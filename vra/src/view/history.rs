use journal::format::{Superblock, SuperblockError};
use journal::recovery::choose_superblock;
use journal::view::still_there;

/// What a journal's superblock says of the history that a view shows.
pub(super) enum History {
    /// It is there, by this copy.
    Kept(Superblock),
    /// It isn't: the recovery disk has moved on, or both copies are damaged.
    Gone,
    /// A copy couldn't be read, which may be the newer one: nothing can be said now, and a later look may tell.
    Unknown,
}

impl History {
    /// What both copies say, as far as they could be read, to a view that shows what is promoted up to `kept_seq` from elsewhere.
    pub(super) fn of(copies: [Result<Superblock, SuperblockError>; 2], kept_seq: u64) -> Self {
        if copies.iter().any(|copy| matches!(copy, Err(SuperblockError::Unreadable))) {
            return Self::Unknown;
        }
        let [first, second] = copies;
        let newest = choose_superblock(first, second).ok();
        newest.filter(|copy| still_there(copy, kept_seq).is_ok()).map_or(Self::Gone, Self::Kept)
    }
}
