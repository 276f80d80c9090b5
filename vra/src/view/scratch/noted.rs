//! What making, opening and closing a scratch file do to it, so that tests can crash in the middle of that. In the product nothing is noted.

/// Something that is done to the file.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(test), allow(dead_code, reason = "only tests look"))]
pub(super) enum Deed<'a> {
    /// It gets its length.
    Reserve { len_bytes: u64 },
    /// A page is written.
    Write { offset_bytes: u64, page: &'a [u8] },
    /// What was written is made durable.
    Sync,
}

/// Does it.
#[cfg(not(test))]
#[inline(always)]
pub(super) fn during<T>(_deed: Deed<'_>, act: impl FnOnce() -> T) -> T {
    act()
}

#[cfg(test)]
pub(super) use noting::during;
#[cfg(test)]
pub(in crate::view) use noting::{Change, Note, noting};

#[cfg(test)]
mod noting {
    use std::cell::RefCell;
    use std::path::{Path, PathBuf};

    use super::Deed;

    /// What was done to the file.
    #[derive(Clone, Debug)]
    pub(in crate::view) enum Change {
        Reserve { len_bytes: u64 },
        Write { offset_bytes: u64, bytes: Vec<u8>, dsync: bool },
        Sync,
    }

    /// One thing that was done, and the map in memory before and after it, where there was one.
    #[derive(Clone, Debug)]
    pub(in crate::view) struct Note {
        pub(in crate::view) change: Change,
        pub(in crate::view) live: [Option<Vec<u8>>; 2],
    }

    thread_local! {
        static NOTES: RefCell<Option<(PathBuf, Vec<Note>)>> = const { RefCell::new(None) };
    }

    /// Gives also what this thread did to scratch files meanwhile; the map in memory is at `live`.
    pub(in crate::view) fn noting<T>(live: &Path, act: impl FnOnce() -> T) -> (T, Vec<Note>) {
        NOTES.set(Some((live.into(), Vec::new())));
        let done = act();
        (done, NOTES.take().map(|(_, notes)| notes).unwrap_or_default())
    }

    /// Does it, and notes it.
    pub(in crate::view::scratch) fn during<T>(deed: Deed<'_>, act: impl FnOnce() -> T) -> T {
        let live = NOTES.with_borrow(|notes| notes.as_ref().map(|(live, _)| live.clone()));
        let Some(live) = live else { return act() };
        let before = std::fs::read(&live).ok();
        let done = act();
        let change = match deed {
            Deed::Reserve { len_bytes } => Change::Reserve { len_bytes },
            Deed::Write { offset_bytes, page } => {
                Change::Write { offset_bytes, bytes: page.to_vec(), dsync: false }
            }
            Deed::Sync => Change::Sync,
        };
        let note = Note { change, live: [before, std::fs::read(&live).ok()] };
        NOTES.with_borrow_mut(|notes| notes.as_mut().map(|(_, notes)| notes.push(note)));
        done
    }
}
