//! The parts of the simulation that aren't under test: chance, the door's side of the lanes, files.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use ublk::arena::{Arena, Slot};
use ublk::serve::{Completion, FileIo, Port, Wake};
use uuid::Uuid;

use super::DISK_BYTES;
use crate::capture::{SequenceState, SequenceStore, SequenceStoreError};
use crate::sync::Extent;

pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub(super) fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }
}

#[derive(Default)]
pub(super) struct Store(Mutex<Option<SequenceState>>);

impl SequenceStore for Store {
    fn load(&self) -> Result<Option<SequenceState>, SequenceStoreError> {
        Ok(self.0.lock().expect("one thread").clone())
    }

    fn save(&self, state: &SequenceState) -> Result<(), SequenceStoreError> {
        *self.0.lock().expect("one thread") = Some(state.clone());
        Ok(())
    }
}

#[derive(Default)]
pub(super) struct Bell(pub(super) AtomicBool);

impl Wake for Bell {
    fn wake(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The door's side of all lanes.
pub(super) struct Door {
    pub(super) arena: Arena,
    /// I/O that the disks haven't done, with its lane.
    pub(super) queue: Vec<(usize, FileIo)>,
    pub(super) answers: Vec<Completion>,
    /// The lane whose call is under way.
    pub(super) lane: usize,
}

impl Port for Door {
    fn submit(&mut self, io: FileIo) {
        self.queue.push((self.lane, io));
    }

    fn complete(&mut self, completion: Completion) {
        self.answers.push(completion);
    }

    fn take_slot(&mut self) -> Option<Slot> {
        self.arena.take()
    }
}

pub(super) fn probe(file: &File, start: u64) -> Extent {
    let seek = |whence| {
        // SAFETY: lseek touches no memory.
        u64::try_from(unsafe { libc::lseek(file.as_raw_fd(), start as i64, whence) }).ok()
    };
    match seek(libc::SEEK_DATA) {
        Some(data) if data == start => {
            Extent { is_data: true, end: seek(libc::SEEK_HOLE).unwrap_or(DISK_BYTES) }
        }
        Some(data) => Extent { is_data: false, end: data },
        None => Extent { is_data: false, end: DISK_BYTES },
    }
}

pub(super) fn unnamed_file() -> File {
    let path = std::env::temp_dir().join(format!(
        "capture-sim-{}-{:x}",
        std::process::id(),
        Uuid::new_v4().as_u128()
    ));
    let file = File::options().read(true).write(true).create_new(true).open(&path).expect("a file");
    std::fs::remove_file(&path).expect("removed");
    file.set_len(DISK_BYTES).expect("sized");
    file
}
