//! One thread's io_uring, and the view of it that a source gets.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use crate::reactor::{Shared, source_waker};
use crate::serve::Waker;

/// Places in each ring's table of fixed files. The kernel wants no more than the limit on open files.
const FIXED_FILES_MAX: u32 = 16_384;

/// `IORING_ENTER_GETEVENTS` of include/uapi/linux/io_uring.h.
const ENTER_GETEVENTS: u32 = 1;

/// User data of the thread's own read of its eventfd.
pub(super) const BELL_USER_DATA: u64 = u64::MAX;

/// A source's name for one of its submissions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Token {
    /// What kind of submission, as the source likes, but for [`Token::LANE_IO`].
    pub(crate) kind: u8,
    /// Which one of that kind.
    pub(crate) key: u32,
}

impl Token {
    /// Kind of the submissions made by [`LaneHost`](crate::reactor::lane_host::LaneHost).
    pub(crate) const LANE_IO: u8 = u8::MAX;
}

/// A file in the ring's table: submissions name it without a reference count, and the ring keeps it open until it is
/// gone itself, after its last I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FixedFile(u32);

impl FixedFile {
    /// For the `fd` of an [`io_uring::opcode`].
    pub(crate) fn target(self) -> types::Fixed {
        types::Fixed(self.0)
    }
}

/// A source's view of its thread's ring.
pub(crate) struct SourceRing<'a> {
    ring: &'a mut Ring,
    shared: &'a Arc<Shared>,
    index: u32,
    in_flight: &'a mut u32,
    files: &'a mut Vec<u32>,
}

impl<'a> SourceRing<'a> {
    pub(super) fn new(
        ring: &'a mut Ring,
        shared: &'a Arc<Shared>,
        index: u32,
        in_flight: &'a mut u32,
        files: &'a mut Vec<u32>,
    ) -> Self {
        Self { ring, shared, index, in_flight, files }
    }

    /// Queues a submission; the completion comes with `token`. Its user data is overwritten.
    ///
    /// Waits that may last (recv, accept, poll, a ublk fetch) name their file by descriptor, not as a [`FixedFile`], unless
    /// [`SourceRing::fixed_files_may_wait`].
    ///
    /// # Safety
    /// All memory that the entry names must stay valid, and unshared where the kernel writes it, until its completion
    /// has come to the source.
    pub(crate) unsafe fn push(&mut self, token: Token, entry: squeue::Entry) {
        let entry = entry.user_data(join_user_data(self.index, token));
        *self.in_flight += 1;
        // SAFETY: as promised by the caller.
        unsafe { self.ring.push(entry) };
    }

    /// Asks for the end of a submission of this source; both complete, this one with `token`.
    pub(crate) fn cancel(&mut self, token: Token, target: Token) {
        let entry = opcode::AsyncCancel::new(join_user_data(self.index, target)).build();
        // SAFETY: the entry names no memory.
        unsafe { self.push(token, entry) };
    }

    /// Puts an open file into the ring's table for as long as the source stays.
    ///
    /// # Errors
    /// The table is full, or the kernel's answer.
    pub(crate) fn install(&mut self, file: BorrowedFd<'_>) -> io::Result<FixedFile> {
        let place = self.ring.install(file)?;
        self.files.push(place);
        Ok(FixedFile(place))
    }

    /// Whether a submission on a fixed file may wait for long. Before 6.13 such a submission holds up the release of every
    /// file that is taken out of the table after it was queued, so an idle device would keep others from being deleted.
    pub(crate) fn fixed_files_may_wait(&self) -> bool {
        self.ring.fixed_files_may_wait
    }

    /// What wakes this source from other threads.
    pub(crate) fn waker(&self) -> Waker {
        source_waker(self.shared, self.index)
    }
}

/// One thread's ring.
pub(super) struct Ring {
    uring: IoUring,
    /// Submissions that found the queue full; they go first.
    backlog: VecDeque<squeue::Entry>,
    free_files: Vec<u32>,
    fixed_files_may_wait: bool,
}

impl Ring {
    /// To be called on the thread that will use it (SINGLE_ISSUER).
    pub(super) fn new(entries: u32) -> io::Result<Self> {
        let uring = IoUring::builder()
            .setup_single_issuer()
            .setup_coop_taskrun()
            .setup_defer_taskrun()
            .setup_submit_all()
            .setup_cqsize(entries.saturating_mul(8))
            .setup_clamp()
            .build(entries)?;
        let files_max = open_files_limit().min(FIXED_FILES_MAX);
        uring.submitter().register_files_sparse(files_max)?;
        Ok(Self {
            uring,
            backlog: VecDeque::new(),
            free_files: (0..files_max).rev().collect(),
            fixed_files_may_wait: crate::host::kernel_version().is_some_and(|version| version >= (6, 13)),
        })
    }

    /// # Safety
    /// As for [`SourceRing::push`].
    pub(super) unsafe fn push(&mut self, entry: squeue::Entry) {
        if self.backlog.is_empty() {
            // SAFETY: as promised by the caller.
            if unsafe { self.uring.submission().push(&entry) }.is_ok() {
                return;
            }
            // Full: hand over what is there. Should the kernel not take it now, the entry waits for the next turn.
            let _ = self.uring.submit();
            // SAFETY: as promised by the caller.
            if unsafe { self.uring.submission().push(&entry) }.is_ok() {
                return;
            }
        }
        self.backlog.push_back(entry);
    }

    /// Whether a wait would not leave submissions or completions behind.
    pub(super) fn may_wait(&mut self) -> bool {
        while let Some(entry) = self.backlog.front() {
            // SAFETY: whoever queued the entry promised that its memory stays valid until its completion.
            if unsafe { self.uring.submission().push(entry) }.is_err() {
                break;
            }
            self.backlog.pop_front();
        }
        self.backlog.is_empty() && self.uring.completion().is_empty()
    }

    /// Submits everything, and waits for a completion if told so. The one system call of a turn.
    pub(super) fn enter(&mut self, wait: bool) {
        let count = self.uring.submission().len() as u32;
        // SAFETY: no argument structure is passed, and the pushed entries are as their pushers promised. GETEVENTS is
        // set without a wait too: else the kernel's deferred work would not run in a turn that has wake-ups.
        let entered =
            unsafe { self.uring.submitter().enter::<()>(count, u32::from(wait), ENTER_GETEVENTS, None) };
        match entered {
            Ok(_) => {}
            Err(error) => match error.raw_os_error() {
                // Interrupted, or the kernel is short of memory or wants its completions taken first: the next turn tries
                // again.
                Some(libc::EINTR | libc::EAGAIN | libc::EBUSY | libc::ENOMEM | libc::ETIME) => {}
                _ => panic!("io_uring_enter fails only for want of resources: {error}"),
            },
        }
    }

    pub(super) fn take_completions(&mut self, batch: &mut Vec<cqueue::Entry>, batch_max: usize) {
        batch.extend(self.uring.completion().take(batch_max));
    }

    fn install(&mut self, file: BorrowedFd<'_>) -> io::Result<u32> {
        let place = self.free_files.pop().ok_or_else(|| {
            io::Error::other("the ring's file table is full: raise the limit on open files (LimitNOFILE)")
        })?;
        match self.uring.submitter().register_files_update(place, &[file.as_raw_fd()]) {
            Ok(_) => Ok(place),
            Err(error) => {
                self.free_files.push(place);
                Err(error)
            }
        }
    }

    pub(super) fn uninstall(&mut self, place: u32) {
        // A place that the kernel would not clear must not be given to another file.
        if self.uring.submitter().register_files_update(place, &[-1]).is_ok() {
            self.free_files.push(place);
        }
    }
}

/// User data: source in the upper 24 bits, then the token's kind and key.
fn join_user_data(index: u32, token: Token) -> u64 {
    u64::from(index) << 40 | u64::from(token.kind) << 32 | u64::from(token.key)
}

/// Source and token, or none for the thread's own submissions.
pub(super) fn split_user_data(user_data: u64) -> Option<(u32, Token)> {
    let token = Token { kind: (user_data >> 32) as u8, key: user_data as u32 };
    (user_data != BELL_USER_DATA).then_some(((user_data >> 40) as u32, token))
}

/// Places of no ring, for tests of what only stores them.
#[cfg(test)]
pub(crate) fn fixed_files_for_tests(count: u32) -> Vec<FixedFile> {
    (0..count).map(FixedFile).collect()
}

fn open_files_limit() -> u32 {
    nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)
        .map_or(1024, |(soft, _)| u32::try_from(soft).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reactor::wake::SOURCES_MAX;

    #[test]
    fn user_data_names_source_and_token_and_never_the_bell() {
        for (index, kind, key) in [(0, 0, 0), (SOURCES_MAX - 1, u8::MAX, u32::MAX), (77, 3, 9)] {
            let token = Token { kind, key };
            assert_eq!(split_user_data(join_user_data(index, token)), Some((index, token)));
        }
        assert_eq!(split_user_data(BELL_USER_DATA), None);
    }
}
