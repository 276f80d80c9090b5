//! What a captured write carries: a part of an arena slot, shared between the retained ring and the stream.

use bytes::Bytes;
use ublk::arena::{Arena, SlotRef};

/// Writes up to this length, in bytes, are copied into dense chunks; longer ones keep the slot that they came in.
pub const DENSE_MAX_BYTES: usize = 16 << 10;

/// Length of a dense chunk in bytes: the slot length of a VM's dense arena.
pub const DENSE_CHUNK_BYTES: usize = 64 << 10;

/// A finished part of a slot: never written again for as long as any piece of it lives.
#[derive(Clone)]
pub struct Piece {
    slot: SlotRef,
    start: u32,
    len: u32,
    /// Memory that can't be used otherwise while this piece lives: the whole slot unless others share it.
    kept: u32,
}

impl Piece {
    /// The first `len_bytes` of a slot whose content is complete.
    ///
    /// # Panics
    /// When the slot is shorter: its caller got length and slot from one request.
    pub fn of_slot(slot: SlotRef, len_bytes: usize) -> Self {
        assert!(len_bytes <= slot.len(), "a request is never longer than its slot");
        let len = u32::try_from(len_bytes).expect("slots are shorter than 4 GiB");
        let kept = u32::try_from(slot.len()).expect("slots are shorter than 4 GiB");
        Self { slot, start: 0, len, kept }
    }

    /// A part of this piece.
    ///
    /// # Panics
    /// When the part is not inside.
    pub fn part(&self, start: usize, len: usize) -> Self {
        assert!(start + len <= self.len as usize, "a part lies inside its piece");
        Self { slot: self.slot.clone(), start: self.start + start as u32, len: len as u32, kept: len as u32 }
    }

    /// Memory that the piece keeps from other use, in bytes.
    pub fn kept_bytes(&self) -> u32 {
        self.kept
    }

    /// As a handle for the stream: keeps the slot until the last clone is gone. Allocates, so never on the guest's path.
    pub fn to_bytes(&self) -> Bytes {
        Bytes::from_owner(self.clone())
    }
}

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the range lies inside the slot, which lives as long as `self.slot`. Nobody writes it: a piece is made
        // only of bytes that are complete, and `DenseWriter` writes only bytes of its chunk that no piece covers.
        unsafe { std::slice::from_raw_parts(self.slot.as_ptr().add(self.start as usize), self.len as usize) }
    }
}

impl std::fmt::Debug for Piece {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Piece").field("start", &self.start).field("len", &self.len).finish()
    }
}

/// One lane's place to copy small writes to: chunks of the VM's dense arena, filled from front to back. A chunk goes back
/// to the arena when the last piece of it is freed, so memory comes back in about the order of the stream.
pub struct DenseWriter {
    arena: Arena,
    chunk: Option<SlotRef>,
    used: usize,
}

impl DenseWriter {
    /// A writer over an arena of [`DENSE_CHUNK_BYTES`] slots.
    pub fn new(arena: Arena) -> Self {
        Self { arena, chunk: None, used: 0 }
    }

    /// Copies `data`, or says no when the arena is empty or `data` longer than a chunk.
    pub fn copy(&mut self, data: &[u8]) -> Option<Piece> {
        let chunk_len = self.arena.slot_len_bytes();
        if data.len() > chunk_len {
            return None;
        }
        if self.chunk.is_none() || chunk_len - self.used < data.len() {
            self.chunk = None;
            self.chunk = Some(self.arena.take()?.share());
            self.used = 0;
        }
        let chunk = self.chunk.as_ref()?;
        // SAFETY: `used + data.len()` is inside the chunk; its bytes from `used` on belong to this writer alone, as pieces
        // cover only bytes below `used`, and no reference to the whole chunk is ever made. `data` is a guest's buffer in
        // another slot or elsewhere, since nobody else can reach these bytes.
        unsafe {
            let place = chunk.as_ptr().cast_mut().add(self.used);
            std::ptr::copy_nonoverlapping(data.as_ptr(), place, data.len());
        }
        let len = data.len() as u32;
        let piece = Piece { slot: chunk.clone(), start: self.used as u32, len, kept: len };
        self.used += data.len();
        Some(piece)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_keep_their_bytes_and_give_the_chunk_back_with_the_last_one() {
        let arena = Arena::new(DENSE_CHUNK_BYTES, 2).expect("arena");
        let mut writer = DenseWriter::new(arena.clone());
        let pieces: Vec<Piece> =
            (0..8_u8).map(|n| writer.copy(&vec![n; DENSE_MAX_BYTES]).expect("room for eight")).collect();
        assert!(writer.copy(&[9; 512]).is_none(), "both chunks are full and held");
        for (n, piece) in (0_u8..).zip(&pieces) {
            assert_eq!(piece.as_ref(), vec![n; DENSE_MAX_BYTES]);
        }
        let kept = pieces[1].to_bytes();
        drop(pieces);
        assert_eq!(
            arena.free_count(),
            1,
            "the first chunk is still held by one handle, the second came back"
        );
        assert_eq!(kept, vec![1; DENSE_MAX_BYTES]);
        drop(kept);
        assert_eq!(arena.free_count(), 2);
        assert_eq!(writer.copy(&[7; 512]).expect("room again").as_ref(), [7; 512]);
    }

    #[test]
    fn a_part_is_the_same_memory() {
        let arena = Arena::new(4096, 1).expect("arena");
        let mut slot = arena.take().expect("slot");
        for (n, byte) in slot.iter_mut().enumerate() {
            *byte = n as u8;
        }
        let piece = Piece::of_slot(slot.share(), 2048);
        assert_eq!(piece.part(512, 3).as_ref(), [0, 1, 2]);
        assert_eq!(piece.part(5, 2).as_ref(), [5, 6]);
    }
}
