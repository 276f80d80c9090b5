//! The door's side of a VM's lanes, and what else of the product's surroundings outlives a process or has no part in the test.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use ublk::arena::{Arena, Slot};
use ublk::serve::{Completion, FileIo, Port, Wake};
use vra::capture::{SequenceState, SequenceStore, SequenceStoreError};

/// Longest request, in bytes.
pub(super) const SLOT_BYTES: usize = 16 << 10;
/// Requests that a VM's doors take at once: each has its buffer beforehand.
pub(super) const TAG_COUNT: u32 = 18;
/// Buffers that the doors have besides, in exchange for those that capture keeps.
const SPARE_COUNT: u32 = 18;

/// A door with all lanes of a VM.
pub(super) struct Door {
    arena: Arena,
    /// The buffers of requests that may still come.
    pub(super) free: Vec<Slot>,
    /// I/O that the disks haven't done, with its lane.
    pub(super) queue: Vec<(usize, FileIo)>,
    pub(super) answers: Vec<Completion>,
    /// The lane whose call is under way.
    pub(super) lane: usize,
}

impl Door {
    pub(super) fn new() -> Result<Self, String> {
        let arena = Arena::faulted_in_later(SLOT_BYTES, TAG_COUNT + SPARE_COUNT);
        let arena = arena.map_err(|error| format!("no memory: {error}"))?;
        let free = (0..TAG_COUNT).filter_map(|_| arena.take()).collect();
        Ok(Self { arena, free, queue: Vec::new(), answers: Vec::new(), lane: 0 })
    }
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

#[derive(Default)]
pub(super) struct Bell(AtomicBool);

impl Bell {
    /// Whether it was rung since the last call.
    pub(super) fn take(&self) -> bool {
        self.0.swap(false, Ordering::Relaxed)
    }
}

impl Wake for Bell {
    fn wake(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The state directory: what was saved there outlives every crash, and saving fails at times.
#[derive(Default)]
pub(super) struct Store {
    saved: Mutex<Option<SequenceState>>,
    pub(super) failing: AtomicBool,
}

impl SequenceStore for Store {
    fn load(&self) -> Result<Option<SequenceState>, SequenceStoreError> {
        Ok(self.saved.lock().unwrap_or_else(PoisonError::into_inner).clone())
    }

    fn save(&self, state: &SequenceState) -> Result<(), SequenceStoreError> {
        if self.failing.load(Ordering::Relaxed) {
            let source = std::io::Error::from_raw_os_error(libc::ENOSPC);
            return Err(SequenceStoreError::Io { action: "write", path: "simulated".into(), source });
        }
        *self.saved.lock().unwrap_or_else(PoisonError::into_inner) = Some(state.clone());
        Ok(())
    }
}
