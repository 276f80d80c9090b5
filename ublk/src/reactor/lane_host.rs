//! What every door needs beside its own protocol: a [`Lane`], the [`Port`] that it is given, and its file I/O on the
//! thread's ring.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use io_uring::{opcode, squeue, types};

use crate::arena::{Arena, Slot};
use crate::reactor::ring::{FixedFile, SourceRing, Token};
use crate::serve::{Completion, Disk, Errno, FileIo, FileOp, IoBuffer, Lane, Port, Request};
use crate::table::Table;

/// A lane with its file I/O, part of a source. The source hands it requests, wake-ups and the completions of kind
/// [`Token::LANE_IO`], and after each of these takes the [`LaneHost::completions`].
pub(crate) struct LaneHost {
    lane: Box<dyn Lane>,
    io: LaneIo,
    /// Held so that the files of `io` stay open and locked.
    _disk: Arc<dyn Disk>,
}

impl LaneHost {
    /// Opens a lane of `disk` on the thread of `ring`; its buffers come from `arena`.
    ///
    /// # Errors
    /// The ring's file table has no place for the disk's files.
    pub(crate) fn open(disk: Arc<dyn Disk>, arena: Arena, ring: &mut SourceRing<'_>) -> io::Result<Self> {
        let files = disk.files().iter().map(|file| ring.install(file.as_fd())).collect::<io::Result<_>>()?;
        let lane = Arc::clone(&disk).lane(ring.waker());
        let io = LaneIo {
            arena,
            files,
            transfers: Table::new(),
            refused: VecDeque::new(),
            completions: Vec::with_capacity(64),
        };
        Ok(Self { lane, io, _disk: disk })
    }

    /// Hands a request to the lane.
    pub(crate) fn request(&mut self, request: Request, ring: &mut SourceRing<'_>) {
        self.lane.request(request, &mut LanePort { io: &mut self.io, ring });
        self.report_refused(ring);
    }

    /// Takes the completion of a submission with the token `(LANE_IO, key)`.
    pub(crate) fn file_completed(&mut self, key: u32, result: i32, ring: &mut SourceRing<'_>) {
        let Some(transfer) = self.io.transfers.get_mut(key) else {
            return;
        };
        match transfer.advance(result) {
            Step::Again => push_transfer(transfer, key, ring),
            Step::Done(result) => {
                if let Some(transfer) = self.io.transfers.remove(key) {
                    let port = &mut LanePort { io: &mut self.io, ring };
                    self.lane.file_done(transfer.token, result, transfer.buffer, port);
                }
            }
        }
        self.report_refused(ring);
    }

    /// Tells the lane that it was woken.
    pub(crate) fn wake(&mut self, ring: &mut SourceRing<'_>) {
        self.lane.wake(&mut LanePort { io: &mut self.io, ring });
        self.report_refused(ring);
    }

    /// The answers that the lane has given since the last time, oldest first.
    pub(crate) fn completions(&mut self) -> std::vec::Drain<'_, Completion> {
        self.io.completions.drain(..)
    }

    /// How many transfers of the lane are in flight.
    pub(crate) fn transfer_count(&self) -> usize {
        self.io.transfers.len()
    }

    /// Gives back the I/O that was malformed, outside the lane's own call.
    fn report_refused(&mut self, ring: &mut SourceRing<'_>) {
        while let Some((token, buffer)) = self.io.refused.pop_front() {
            let port = &mut LanePort { io: &mut self.io, ring };
            self.lane.file_done(token, Err(Errno(libc::EINVAL)), buffer, port);
        }
    }
}

/// All of a lane's I/O state but the lane itself, so that both can be borrowed at once.
struct LaneIo {
    arena: Arena,
    files: Vec<FixedFile>,
    transfers: Table<Transfer>,
    refused: VecDeque<(u64, IoBuffer)>,
    completions: Vec<Completion>,
}

struct LanePort<'a, 'r> {
    io: &'a mut LaneIo,
    ring: &'a mut SourceRing<'r>,
}

impl Port for LanePort<'_, '_> {
    fn submit(&mut self, io: FileIo) {
        match Transfer::new(io, &self.io.files) {
            Ok(transfer) => {
                let (key, transfer) = self.io.transfers.insert(transfer);
                push_transfer(transfer, key, self.ring);
            }
            Err((token, buffer)) => {
                debug_assert!(false, "a lane submits well-formed I/O");
                self.io.refused.push_back((token, buffer));
            }
        }
    }

    fn complete(&mut self, completion: Completion) {
        self.io.completions.push(completion);
    }

    fn take_slot(&mut self) -> Option<Slot> {
        self.io.arena.take()
    }
}

fn push_transfer(transfer: &Transfer, key: u32, ring: &mut SourceRing<'_>) {
    let token = Token { kind: Token::LANE_IO, key };
    // SAFETY: the transfer owns (or shares, for a write) the slot, its range was checked, and it stays in the table until
    // its completion.
    unsafe { ring.push(token, transfer.entry()) };
}

/// How often a transfer that the kernel answers with EAGAIN or EINTR is tried again.
const RETRIES_MAX: u8 = 16;

/// One file I/O under way.
struct Transfer {
    token: u64,
    file: FixedFile,
    op: FileOp,
    offset_bytes: u64,
    len_bytes: u64,
    buffer_offset_bytes: u32,
    buffer: IoBuffer,
    done_bytes: u64,
    retries: u8,
}

/// What follows a completion of a transfer.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// Submit the rest.
    Again,
    /// The whole length, or an errno.
    Done(Result<(), Errno>),
}

impl Transfer {
    /// Checks the I/O; gives token and buffer back if it names no file of the disk or leaves its buffer.
    fn new(io: FileIo, files: &[FixedFile]) -> Result<Self, (u64, IoBuffer)> {
        let slot_len_bytes = match (&io.buffer, io.op) {
            (IoBuffer::Owned(slot), FileOp::Read | FileOp::Write { .. }) => slot.len(),
            (IoBuffer::Shared(slot), FileOp::Write { .. }) => slot.len(),
            (IoBuffer::None, FileOp::Sync | FileOp::PunchHole | FileOp::ZeroRange) => usize::MAX,
            _ => return Err((io.token, io.buffer)),
        };
        let needs_len = io.op != FileOp::Sync;
        let fits = u64::from(io.buffer_offset_bytes)
            .checked_add(io.len_bytes)
            .is_some_and(|end_bytes| end_bytes <= slot_len_bytes as u64);
        let Some(file) = files.get(io.file.0 as usize) else {
            return Err((io.token, io.buffer));
        };
        if !fits || (needs_len && io.len_bytes == 0) {
            return Err((io.token, io.buffer));
        }
        Ok(Self {
            token: io.token,
            file: *file,
            op: io.op,
            offset_bytes: io.offset_bytes,
            len_bytes: io.len_bytes,
            buffer_offset_bytes: io.buffer_offset_bytes,
            buffer: io.buffer,
            done_bytes: 0,
            retries: 0,
        })
    }

    /// Takes the kernel's result of one submission.
    fn advance(&mut self, result: i32) -> Step {
        let Ok(moved_bytes) = u64::try_from(result) else {
            let errno = -result;
            if matches!(errno, libc::EAGAIN | libc::EINTR) && self.retries < RETRIES_MAX {
                self.retries += 1;
                return Step::Again;
            }
            return Step::Done(Err(Errno(errno)));
        };
        match self.op {
            FileOp::Sync | FileOp::PunchHole | FileOp::ZeroRange => Step::Done(Ok(())),
            // The file is shorter than the disk said, or the device takes no more.
            FileOp::Read | FileOp::Write { .. } if moved_bytes == 0 => Step::Done(Err(Errno(libc::EIO))),
            FileOp::Read | FileOp::Write { .. } => {
                self.done_bytes += moved_bytes;
                if self.done_bytes < self.len_bytes { Step::Again } else { Step::Done(Ok(())) }
            }
        }
    }

    /// The submission of what is left.
    fn entry(&self) -> squeue::Entry {
        let file: types::Fixed = self.file.target();
        let offset_bytes = self.offset_bytes + self.done_bytes;
        let left_bytes = self.len_bytes - self.done_bytes;
        let place = self.buffer_offset_bytes as usize + self.done_bytes as usize;
        match self.op {
            FileOp::Read => {
                let IoBuffer::Owned(slot) = &self.buffer else {
                    unreachable!("a read owns its slot: checked when it was made");
                };
                let address = slot.as_ptr().wrapping_add(place);
                opcode::Read::new(file, address, left_bytes as u32).offset(offset_bytes).build()
            }
            FileOp::Write { dsync } => {
                let base = match &self.buffer {
                    IoBuffer::Owned(slot) => slot.as_ptr().cast_const(),
                    IoBuffer::Shared(slot) => slot.as_ptr(),
                    IoBuffer::None => unreachable!("a write has memory: checked when it was made"),
                };
                let flags = if dsync { libc::RWF_DSYNC } else { 0 };
                opcode::Write::new(file, base.wrapping_add(place), left_bytes as u32)
                    .offset(offset_bytes)
                    .rw_flags(flags)
                    .build()
            }
            FileOp::Sync => opcode::Fsync::new(file).flags(types::FsyncFlags::DATASYNC).build(),
            FileOp::PunchHole => fallocate(file, libc::FALLOC_FL_PUNCH_HOLE, offset_bytes, left_bytes),
            FileOp::ZeroRange => fallocate(file, libc::FALLOC_FL_ZERO_RANGE, offset_bytes, left_bytes),
        }
    }
}

fn fallocate(file: types::Fixed, mode: i32, offset_bytes: u64, len_bytes: u64) -> squeue::Entry {
    opcode::Fallocate::new(file, len_bytes)
        .offset(offset_bytes)
        .mode(mode | libc::FALLOC_FL_KEEP_SIZE)
        .build()
}

#[cfg(test)]
mod tests;
