//! Answers that wait until the scratch is durable, and the commits that make it so.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use journal::format::PAGE_BYTES;
use ublk::arena::{Slot, SlotRef};
use ublk::serve::{Completion, Errno, FileIo, FileOp, IoBuffer, Port};

use super::{EIO, ViewLane, token};
use crate::view::Scratch;
use crate::view::plan::SCRATCH_FILE;
use crate::view::scratch::commit::{Commit, Next};

/// The job part of a token of a [`Commit`].
pub(super) const COMMIT_JOB: u32 = u32::MAX - 1;

/// An answer, and the number of the commit that it waits for.
pub(super) struct Undurable {
    commit: u64,
    tag: u64,
    slot: Option<Slot>,
}

impl ViewLane {
    /// Answers once all that is complete now is durable.
    pub(super) fn answer_when_durable(
        &mut self,
        scratch: &Scratch,
        tag: u64,
        slot: Option<Slot>,
        port: &mut dyn Port,
    ) {
        let commit = scratch.lock().commits.next();
        self.undurable.push(Undurable { commit, tag, slot });
        self.go_on_committing(scratch, port);
    }

    /// Answers what is durable, and begins a commit if somebody here waits for one and none is under way.
    pub(super) fn go_on_committing(&mut self, scratch: &Scratch, port: &mut dyn Port) {
        if self.undurable.is_empty() {
            return;
        }
        let mut state = scratch.lock();
        let is_poisoned = scratch.poisoned.load(Ordering::Acquire);
        let mut index = 0;
        while let Some(waiting) = self.undurable.get(index) {
            let result = match state.commits.is_done(waiting.commit) {
                true => Ok(()),
                false if is_poisoned => Err(EIO),
                false => {
                    index += 1;
                    continue;
                }
            };
            let Undurable { tag, slot, .. } = self.undurable.swap_remove(index);
            port.complete(Completion { tag, result, slot });
        }
        if self.undurable.is_empty() || self.commit.is_some() || !state.begin_commit(Some(&self.waker)) {
            return;
        }
        self.commit = Some(Commit::new(state.map.begin_commit()));
        drop(state);
        submit_sync(port);
    }

    pub(super) fn commit_done(&mut self, result: Result<(), Errno>, buffer: IoBuffer, port: &mut dyn Port) {
        let disk = Arc::clone(&self.disk);
        let (Some(commit), Some(scratch)) = (&mut self.commit, &disk.scratch) else { return };
        // The pages' memory is free again before the next ones need it.
        drop(buffer);
        let result = match commit.done(result) {
            Next::Wait => return,
            Next::Sync => return submit_sync(port),
            Next::End(result) => result,
            Next::Pages { first, count, dsync } => {
                let state = scratch.lock();
                match (state.map.pages(), scratch.pages.take()) {
                    (Some(pages), Some(mut slot)) => {
                        let places: Vec<u64> = (first..)
                            .zip(slot.chunks_exact_mut(PAGE_BYTES).take(count as usize))
                            .map(|(page, bytes)| pages.encode(page, bytes))
                            .collect();
                        drop(state);
                        return submit_pages(&places, slot.share(), dsync, port);
                    }
                    // One commit at a time has all of it.
                    _ => Err(Errno(libc::ENOMEM)),
                }
            }
        };
        self.commit = None;
        if result.is_err() {
            scratch.poisoned.store(true, Ordering::Release);
        }
        scratch.lock().end_commit(result.is_ok());
        self.go_on_committing(scratch, port);
    }
}

fn submit_sync(port: &mut dyn Port) {
    port.submit(FileIo {
        token: token(COMMIT_JOB, 0),
        file: SCRATCH_FILE,
        op: FileOp::Sync,
        offset_bytes: 0,
        len_bytes: 0,
        buffer_offset_bytes: 0,
        buffer: IoBuffer::None,
    });
}

/// Writes pages that lie one after the other in memory, each to its place in the file.
fn submit_pages(places: &[u64], memory: SlotRef, dsync: bool, port: &mut dyn Port) {
    for (number, offset_bytes) in (0_u32..).zip(places) {
        port.submit(FileIo {
            token: token(COMMIT_JOB, number),
            file: SCRATCH_FILE,
            op: FileOp::Write { dsync },
            offset_bytes: *offset_bytes,
            len_bytes: PAGE_BYTES as u64,
            buffer_offset_bytes: number * PAGE_BYTES as u32,
            buffer: IoBuffer::Shared(memory.clone()),
        });
    }
}
