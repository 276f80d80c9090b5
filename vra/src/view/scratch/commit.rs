//! How a scratch becomes durable: first the data, then the map that points to it. One commit at a time, for all flushes that came before it
//! began.

use ublk::serve::{Errno, Waker};

/// Pages that are written at once at most.
pub(in crate::view) const PAGES_AT_ONCE: u32 = 64;

/// Who waits for which commit.
#[derive(Default)]
pub(in crate::view) struct Commits {
    /// The last that began.
    begun: u64,
    /// The last that has ended well.
    done: u64,
    is_running: bool,
    waiting: Vec<Waker>,
}

impl Commits {
    /// The commit that makes durable what is complete now.
    pub(in crate::view) fn next(&self) -> u64 {
        self.begun + 1
    }

    /// Whether a commit has ended well.
    pub(in crate::view) fn is_done(&self, commit: u64) -> bool {
        self.done >= commit
    }

    /// Begins the next one, which the caller then carries out. False while another runs: `waker` is called at its end.
    pub(in crate::view) fn begin(&mut self, waker: Option<&Waker>) -> bool {
        if self.is_running {
            self.waiting.extend(waker.cloned());
            return false;
        }
        self.begun += 1;
        self.is_running = true;
        true
    }

    /// The running one has ended.
    pub(in crate::view) fn end(&mut self, is_durable: bool) {
        self.is_running = false;
        if is_durable {
            self.done = self.begun;
        }
        self.waiting.drain(..).for_each(|waker| waker.wake());
    }
}

/// One commit on its way. It begins with a sync of the data.
#[derive(Debug)]
pub(in crate::view) struct Commit {
    stage: Stage,
    /// Pages to be written in all, once that has begun.
    pages: u32,
    out: u32,
    error: Option<Errno>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Data,
    Pages { written: u32 },
    Map,
}

/// What is to be done after an operation of a commit has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::view) enum Next {
    /// Others are still under way.
    Wait,
    /// Write these pages, durably if there are no others.
    Pages {
        /// Number of the first.
        first: u32,
        /// How many, at most [`PAGES_AT_ONCE`].
        count: u32,
        /// Each write is durable before it is done.
        dsync: bool,
    },
    /// Sync the file.
    Sync,
    /// Nothing: it has ended.
    End(Result<(), Errno>),
}

impl Commit {
    /// A commit whose sync of the data was just submitted, and that has `pages` to write.
    pub(in crate::view) fn new(pages: u32) -> Self {
        Self { stage: Stage::Data, pages, out: 1, error: None }
    }

    /// An operation has ended.
    pub(in crate::view) fn done(&mut self, result: Result<(), Errno>) -> Next {
        self.out -= 1;
        self.error = self.error.or(result.err());
        if self.out > 0 {
            return Next::Wait;
        }
        if let Some(error) = self.error {
            return Next::End(Err(error));
        }
        let written = match self.stage {
            Stage::Data => 0,
            Stage::Pages { written } => written,
            Stage::Map => return Next::End(Ok(())),
        };
        let dsync = self.pages == 1;
        match (self.pages - written).min(PAGES_AT_ONCE) {
            0 if self.pages == 0 || dsync => Next::End(Ok(())),
            0 => {
                (self.stage, self.out) = (Stage::Map, 1);
                Next::Sync
            }
            count => {
                (self.stage, self.out) = (Stage::Pages { written: written + count }, count);
                Next::Pages { first: written, count, dsync }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_is_written_after_the_data_and_synced_once() {
        let ended = Next::End(Ok(()));
        assert_eq!(Commit::new(0).done(Ok(())), ended);
        let mut one = Commit::new(1);
        assert_eq!(one.done(Ok(())), Next::Pages { first: 0, count: 1, dsync: true });
        assert_eq!(one.done(Ok(())), ended);
        let mut many = Commit::new(PAGES_AT_ONCE + 1);
        assert_eq!(many.done(Ok(())), Next::Pages { first: 0, count: PAGES_AT_ONCE, dsync: false });
        for _ in 1..PAGES_AT_ONCE {
            assert_eq!(many.done(Ok(())), Next::Wait);
        }
        assert_eq!(many.done(Ok(())), Next::Pages { first: PAGES_AT_ONCE, count: 1, dsync: false });
        assert_eq!(many.done(Ok(())), Next::Sync);
        assert_eq!(many.done(Ok(())), ended);
    }

    #[test]
    fn nothing_points_to_data_whose_sync_failed_and_an_error_ends_it_when_all_are_back() {
        let failed = Err(Errno(libc::EIO));
        assert_eq!(Commit::new(3).done(failed), Next::End(failed));
        let mut commit = Commit::new(2);
        assert_eq!(commit.done(Ok(())), Next::Pages { first: 0, count: 2, dsync: false });
        assert_eq!(commit.done(failed), Next::Wait);
        assert_eq!(commit.done(Ok(())), Next::End(failed));
    }
}
