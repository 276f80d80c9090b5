//! Brings what a disk has grown by to its target, before its guest can reach it (E3). Where nothing was ever written, as in a file that was made
//! longer, that is over at once.

use std::fs::File;
use std::io;
use std::time::Duration;

use ublk::arena::Arena;

use super::CHUNK_BYTES;
use super::local_disk::{probe, read};
use crate::capture::numbering::ByteRange;
use crate::capture::{Brought, NewRange, SourceVm};
use crate::clock::Clock;

/// Reads that wait for the target at most: memory of one range is this many chunks.
const BUFFERS: u32 = 16;

/// Wait for room in the stream, or for memory.
const ROOM_WAIT: Duration = Duration::from_millis(10);

/// Wait after a read that failed.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Brings it and lets the guest have it; blocks for as long as that takes. Whether it was so: if not, the generation is over, and the next one
/// does it.
///
/// # Errors
/// No memory.
pub fn bring_new(vm: &SourceVm, new: &NewRange, file: &File, name: &str) -> io::Result<bool> {
    let buffers = Arena::new(CHUNK_BYTES as usize, BUFFERS)?;
    let clock = Clock::start();
    let (mut at, end) = (new.range.start, new.range.end);
    let mut told = false;
    while at < end {
        let rest = ByteRange::new(at, end - at);
        match bring_next(vm, new, rest, file, &buffers, &clock) {
            Ok(Some(next)) => at = next,
            Ok(None) => return Ok(false),
            Err(error) => {
                if !std::mem::replace(&mut told, true) {
                    let volume = new.volume;
                    tracing::warn!(vm = name, volume, offset_bytes = at, %error, "what a disk has grown by can't be read: its guest waits for it");
                }
                // Ended by whoever ends the protection.
                if vm.is_over(new) {
                    return Ok(false);
                }
                std::thread::sleep(RETRY_AFTER);
            }
        }
    }
    Ok(vm.give(new))
}

/// Brings the first part of the rest. Gives where the next one begins; none if the generation is over.
fn bring_next(
    vm: &SourceVm,
    new: &NewRange,
    rest: ByteRange,
    file: &File,
    buffers: &Arena,
    clock: &Clock,
) -> io::Result<Option<u64>> {
    let extent = probe(file, rest)?;
    let until = extent.end.min(rest.end);
    if !extent.is_data {
        return Ok(Some(until));
    }
    let range = ByteRange::new(rest.start, CHUNK_BYTES.min(until - rest.start));
    let slot = loop {
        match buffers.take() {
            Some(slot) => break slot,
            None if vm.is_over(new) => return Ok(None),
            None => std::thread::sleep(ROOM_WAIT),
        }
    };
    if let Some(piece) = read(file, range, slot)? {
        loop {
            match vm.bring(new, range, piece.clone(), clock.now()) {
                Brought::Done => break,
                Brought::Later => std::thread::sleep(ROOM_WAIT),
                Brought::Ended => return Ok(None),
            }
        }
    }
    Ok(Some(range.end))
}
