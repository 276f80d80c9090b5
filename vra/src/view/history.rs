use journal::format::{Superblock, SuperblockError};
use journal::recovery::choose_superblock;
use journal::view::still_there;

/// What a journal's superblock says of the history that a view shows.
pub(super) enum History {
    /// It is there, by this copy.
    Kept(Box<Superblock>),
    /// It isn't: the recovery disk has moved on, or both copies are damaged.
    Gone,
    /// Neither copy says anything, and one couldn't be read: a later look may tell.
    Unknown,
}

impl History {
    /// What both copies say, as far as they could be read, to a view that shows what is promoted up to `kept_seq` from elsewhere.
    pub(super) fn of(copies: [Result<Superblock, SuperblockError>; 2], kept_seq: u64) -> Self {
        let is_unread = copies.iter().any(|copy| matches!(copy, Err(SuperblockError::Unreadable)));
        let [first, second] = copies;
        // One is enough: nothing is done that a change allows before both have it.
        match choose_superblock(first, second) {
            Ok(newest) if still_there(&newest, kept_seq).is_ok() => Self::Kept(Box::new(newest)),
            Err(_) if is_unread => Self::Unknown,
            Ok(_) | Err(_) => Self::Gone,
        }
    }
}
