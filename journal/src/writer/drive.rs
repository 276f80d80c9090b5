//! Runs a writer and its storage together, for tools and tests that have one journal and time.

use nix::errno::Errno;

use super::{Event, Writer};
use crate::storage::{FileId, Storage};

/// Runs the writer until nothing is left to do; gives its events.
///
/// # Errors
/// The storage itself is broken.
pub fn drive<S: Storage>(writer: &mut Writer, storage: &mut S, file: FileId) -> Result<Vec<Event>, Errno> {
    let (mut under_way, mut done) = (0_usize, Vec::new());
    loop {
        while let Some(action) = writer.next_action() {
            storage.submit(file, action.token, action.purpose, action.op);
            under_way += 1;
        }
        if under_way == 0 {
            return Ok(std::iter::from_fn(|| writer.poll_event()).collect());
        }
        storage.collect(true, &mut done)?;
        for completion in done.drain(..) {
            under_way -= 1;
            writer.done(completion.token, completion.result.map(drop));
        }
    }
}
