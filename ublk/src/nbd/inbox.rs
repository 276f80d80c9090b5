//! What came from the client and is not understood yet, and the memory that the next bytes go to.

use crate::arena::Slot;

/// Length of the buffer for heads and small payloads, in bytes.
///
/// Payload that arrives in it is copied to its slot, what is missing is received straight into the slot: so a small
/// write costs one receive and a small copy, a large one no copy worth the name.
pub(super) const INBOX_BYTES: usize = 16 << 10;

/// A receive to be made. It owns its memory, at an address that stays until it is given back.
#[derive(Debug)]
pub struct Recv {
    memory: RecvMemory,
    start: usize,
    end: usize,
}

impl Recv {
    /// Bytes into the rest of a slot.
    pub(super) fn into_slot(slot: Slot, start: usize, end: usize) -> Self {
        Self { memory: RecvMemory::Slot(slot), start, end }
    }

    /// Where the bytes go; never empty.
    pub fn buffer(&mut self) -> &mut [u8] {
        match &mut self.memory {
            RecvMemory::Inbox(bytes) => &mut bytes[self.start..self.end],
            RecvMemory::Slot(slot) => &mut slot[self.start..self.end],
        }
    }

    /// Whether the receive should last until the buffer is full (`MSG_WAITALL`).
    pub fn wants_all(&self) -> bool {
        matches!(self.memory, RecvMemory::Slot(_))
    }

    pub(super) fn into_memory(self) -> RecvMemory {
        self.memory
    }
}

/// The memory of a [`Recv`].
#[derive(Debug)]
pub(super) enum RecvMemory {
    /// The inbox's own.
    Inbox(Box<[u8]>),
    /// The slot of a write.
    Slot(Slot),
}

/// The buffer for heads and small payloads.
#[derive(Debug)]
pub(super) struct Inbox {
    /// Empty while it is lent to a [`Recv`].
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Inbox {
    pub(super) fn new() -> Self {
        Self { bytes: vec![0; INBOX_BYTES].into_boxed_slice(), start: 0, end: 0 }
    }

    /// The bytes not used yet; none while the memory is lent.
    pub(super) fn unread(&self) -> &[u8] {
        self.bytes.get(self.start..self.end).unwrap_or_default()
    }

    pub(super) fn consume(&mut self, len_bytes: usize) {
        self.start += len_bytes;
        debug_assert!(self.start <= self.end);
    }

    pub(super) fn clear(&mut self) {
        (self.start, self.end) = (0, 0);
    }

    /// Lends the memory for up to `want_bytes` more, or none when it is full.
    pub(super) fn lend(&mut self, want_bytes: usize) -> Option<Recv> {
        let unread = self.start..self.end;
        self.end = unread.len();
        self.start = 0;
        self.bytes.copy_within(unread, 0);
        let end = self.bytes.len().min(self.end.saturating_add(want_bytes));
        if end <= self.end {
            return None;
        }
        Some(Recv { memory: RecvMemory::Inbox(std::mem::take(&mut self.bytes)), start: self.end, end })
    }

    /// Takes the memory back with `received_bytes` more in it.
    pub(super) fn take_back(&mut self, bytes: Box<[u8]>, received_bytes: usize) {
        self.bytes = bytes;
        self.end = (self.end + received_bytes).min(self.bytes.len());
    }
}
