//! The retained ring: a VM's published entries, in preallocated memory, until the target holds them durably.
//!
//! One producer, under the VM's lock, and one consumer, the VM's stream; neither waits for the other. The entry of number
//! `n` lies in cell `n % capacity`; the cell's number word is stored last (A2), so a consumer that sees `n` there sees
//! the whole entry, and a number that was taken but whose word is missing is told from a published one.

use std::cell::UnsafeCell;
use std::sync::Arc;

use journal::batch::RecordKind;

use crate::capture::entry::Entry;
use crate::planted::{Planted, is_planted};

use super::primitives::{AtomicU64, Ordering};

/// Makes a retained ring for `capacity` entries (a power of two) whose first number is `first_seq`.
///
/// # Panics
/// When `capacity` is no power of two or `first_seq` is zero.
pub fn ring(capacity: usize, first_seq: u64) -> (Producer, Consumer) {
    assert!(capacity.is_power_of_two(), "cells are found by masking");
    assert!(first_seq > 0, "zero marks an empty cell");
    let cells =
        (0..capacity).map(|_| Cell { number: AtomicU64::new(0), entry: UnsafeCell::new(None) }).collect();
    let ring = Arc::new(Ring {
        cells,
        freed_through: AtomicU64::new(first_seq - 1),
        retained_bytes: AtomicU64::new(0),
    });
    (Producer { ring: ring.clone() }, Consumer { ring })
}

/// The side that publishes; lives under the VM's lock.
pub struct Producer {
    ring: Arc<Ring>,
}

/// The side that ships and frees.
pub struct Consumer {
    ring: Arc<Ring>,
}

impl Producer {
    /// How many entries the ring holds at most.
    pub fn capacity(&self) -> usize {
        self.ring.cells.len()
    }

    /// The highest number that the consumer has freed.
    pub fn freed_through(&self) -> u64 {
        self.ring.freed_through.load(Ordering::Acquire)
    }

    /// Memory that published entries keep, in bytes.
    pub fn retained_bytes(&self) -> u64 {
        self.ring.retained_bytes.load(Ordering::Relaxed)
    }

    /// Whether number `seq` has a free cell.
    pub fn has_room_for(&self, seq: u64) -> bool {
        seq - self.freed_through() <= self.capacity() as u64
    }

    /// Whether number `seq` is published and not overwritten by a later lap.
    pub fn is_published(&self, seq: u64) -> bool {
        self.ring.cell(seq).number.load(Ordering::Acquire) == seq
    }

    /// Stores `entry`, then its number word. `between` runs between the two: the point where a kill leaves the number
    /// taken and unpublished.
    ///
    /// # Panics
    /// When the cell isn't free: the caller asks [`has_room_for`](Self::has_room_for) under the same lock.
    pub fn publish(&mut self, entry: Entry, between: impl Fn()) {
        let seq = entry.seq;
        assert!(
            self.has_room_for(seq) && seq > self.freed_through(),
            "a cell is reused only once it is free"
        );
        let cell = self.ring.cell(seq);
        let kept_bytes = entry.payload.kept_bytes();
        if is_planted(Planted::WordBeforeEntry) {
            cell.number.store(seq, Ordering::Release);
            between();
        }
        // SAFETY: the cell is free, so the consumer has moved past its last entry and looks at it again only once the
        // number word says `seq`; there is one producer (`&mut self`, not cloneable).
        unsafe { *cell.entry.get() = Some(entry) };
        between();
        self.ring.retained_bytes.fetch_add(kept_bytes, Ordering::Relaxed);
        cell.number.store(seq, Ordering::Release);
    }
}

impl Consumer {
    /// The highest number that was freed.
    pub fn freed_through(&self) -> u64 {
        self.ring.freed_through.load(Ordering::Relaxed)
    }

    /// Calls `take` with the published entries from `from_seq` on, in order and without gaps, until one is missing or
    /// `take` says false. Entries stay retained. Returns the number after the last that was taken.
    pub fn walk(&mut self, from_seq: u64, mut take: impl FnMut(&Entry) -> bool) -> u64 {
        let mut seq = from_seq.max(self.freed_through() + 1);
        while let Some(entry) = self.peek(seq) {
            if !take(entry) {
                break;
            }
            seq += 1;
        }
        seq
    }

    /// The entry of number `seq`, if it is published and not freed.
    pub fn peek(&mut self, seq: u64) -> Option<&Entry> {
        if seq <= self.freed_through() {
            return None;
        }
        let cell = self.ring.cell(seq);
        if cell.number.load(Ordering::Acquire) != seq {
            return None;
        }
        // SAFETY: the number word says that the entry is complete, and the producer writes the cell again only once this
        // consumer has freed `seq`, which needs `&mut self`; there is one consumer (not cloneable).
        unsafe { (*cell.entry.get()).as_ref() }
    }

    /// Frees everything through `seq`, or through the last published entry if that is less. Returns the highest number
    /// freed so far.
    pub fn free_through(&mut self, seq: u64) -> u64 {
        let mut freed = self.freed_through();
        while freed < seq && self.peek(freed + 1).is_some() {
            freed += 1;
            // SAFETY: as for `peek`; the entry is published and `freed_through` still protects the cell.
            let entry = unsafe { (*self.ring.cell(freed).entry.get()).take() };
            let kept_bytes = entry.map_or(0, |entry| entry.payload.kept_bytes());
            self.ring.retained_bytes.fetch_sub(kept_bytes, Ordering::Relaxed);
            self.ring.freed_through.store(freed, Ordering::Release);
        }
        freed
    }
}

/// What a number that was taken but never published is filled with (A2).
pub(super) fn void_entry(seq: u64, time_us: u64) -> Entry {
    Entry { seq, time_us, ..Entry::control(RecordKind::Void) }
}

struct Ring {
    cells: Box<[Cell]>,
    freed_through: AtomicU64,
    retained_bytes: AtomicU64,
}

struct Cell {
    /// The number of the entry that lies here complete; zero before the first lap.
    number: AtomicU64,
    entry: UnsafeCell<Option<Entry>>,
}

// SAFETY: `entry` is touched only as `publish` and `peek` say: by the producer while its cell is free, by the consumer
// while the number word says that it is published. All else is atomic.
unsafe impl Sync for Ring {}
// SAFETY: everything inside may move between threads.
unsafe impl Send for Ring {}

impl Ring {
    fn cell(&self, seq: u64) -> &Cell {
        &self.cells[(seq & (self.cells.len() as u64 - 1)) as usize]
    }
}
