//! What goes to the client: heads in small buffers, payloads in the slots that the disk filled, sent without a copy.

use std::collections::VecDeque;

use zerocopy::IntoBytes;
use zerocopy::byteorder::big_endian::{U16, U32, U64};

use super::wire::{self, BASE_ALLOCATION_ID, ChunkHead, SimpleReply, chunk_type, extent_state};
use crate::arena::Slot;
use crate::serve::{Allocation, Extent};

/// Pieces of memory in one send: what the kernel takes at once is 1024, and the rest waits for the next.
const BATCH_PIECES_MAX: usize = 64;

/// Replies in the order in which they go out.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    items: VecDeque<Item>,
    /// An emptied batch's memory, for the next one.
    spare: Vec<Item>,
}

impl Outbox {
    /// Bytes of the handshake.
    pub(super) fn raw(&mut self, bytes: Vec<u8>) {
        if !bytes.is_empty() {
            self.items.push_back(Item { head: Head::Long(bytes), data: None });
        }
    }

    /// A simple reply; with `error` zero a read's data follows as [`Outbox::data`].
    pub(super) fn simple(&mut self, cookie: u64, error: u32) {
        let head = SimpleReply {
            magic: U32::new(wire::SIMPLE_REPLY_MAGIC),
            error: U32::new(error),
            cookie: U64::new(cookie),
        };
        self.items.push_back(Item { head: Head::short(&[head.as_bytes()]), data: None });
    }

    /// Data without a head, after a simple reply.
    pub(super) fn data(&mut self, slot: Slot, len_bytes: usize) {
        self.items.push_back(Item { head: Head::short(&[]), data: Some((slot, len_bytes)) });
    }

    /// A chunk of data.
    pub(super) fn data_chunk(
        &mut self,
        cookie: u64,
        done: bool,
        offset_bytes: u64,
        slot: Slot,
        len_bytes: usize,
    ) {
        let payload_bytes = (size_of::<u64>() + len_bytes) as u32;
        let head = chunk_head(cookie, done, chunk_type::OFFSET_DATA, payload_bytes);
        let head = Head::short(&[head.as_bytes(), &offset_bytes.to_be_bytes()]);
        self.items.push_back(Item { head, data: Some((slot, len_bytes)) });
    }

    /// The chunk of a success without data.
    pub(super) fn none_chunk(&mut self, cookie: u64) {
        let head = chunk_head(cookie, true, chunk_type::NONE, 0);
        self.items.push_back(Item { head: Head::short(&[head.as_bytes()]), data: None });
    }

    /// The last chunk of a failure.
    pub(super) fn error_chunk(&mut self, cookie: u64, error: u32, text: &str) {
        let head = chunk_head(cookie, true, chunk_type::ERROR, (6 + text.len()) as u32);
        let mut bytes = head.as_bytes().to_vec();
        bytes.extend_from_slice(&error.to_be_bytes());
        bytes.extend_from_slice(&(text.len() as u16).to_be_bytes());
        bytes.extend_from_slice(text.as_bytes());
        self.items.push_back(Item { head: Head::Long(bytes), data: None });
    }

    /// The extents of a block status, of which there is at least one.
    pub(super) fn status_chunk(&mut self, cookie: u64, extents: &[Extent]) {
        let payload_bytes = 4 + 8 * extents.len() as u32;
        let head = chunk_head(cookie, true, chunk_type::BLOCK_STATUS, payload_bytes);
        let mut bytes = head.as_bytes().to_vec();
        bytes.extend_from_slice(&BASE_ALLOCATION_ID.to_be_bytes());
        for extent in extents {
            let state = match extent.allocation {
                Allocation::Data => 0,
                Allocation::Zero => extent_state::ZERO,
                Allocation::Hole => extent_state::ZERO | extent_state::HOLE,
            };
            bytes.extend_from_slice(&(extent.len_bytes as u32).to_be_bytes());
            bytes.extend_from_slice(&state.to_be_bytes());
        }
        self.items.push_back(Item { head: Head::Long(bytes), data: None });
    }

    /// How many pieces wait to be sent.
    pub(super) fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether nothing waits to be sent.
    pub(super) fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// The next replies, to be sent in one go.
    pub(super) fn next_batch(&mut self) -> Option<SendBatch> {
        if self.items.is_empty() {
            return None;
        }
        let mut items = std::mem::take(&mut self.spare);
        let count = self.items.len().min(BATCH_PIECES_MAX / 2);
        items.extend(self.items.drain(..count));
        Some(SendBatch { items, skip_bytes: 0, done: 0 })
    }

    /// Takes back a batch, sent or not; its slots go to `slots`.
    pub(super) fn take_back(&mut self, mut batch: SendBatch, slots: &mut Vec<Slot>) {
        slots.extend(batch.items.drain(..).filter_map(|item| item.data.map(|(slot, _)| slot)));
        self.spare = batch.items;
    }

    /// Throws away what waits; its slots go to `slots`.
    pub(super) fn clear(&mut self, slots: &mut Vec<Slot>) {
        slots.extend(self.items.drain(..).filter_map(|item| item.data.map(|(slot, _)| slot)));
    }
}

/// Replies being sent. It owns their memory, at addresses that stay until it is given back.
#[derive(Debug)]
pub struct SendBatch {
    items: Vec<Item>,
    /// Items that have gone out whole.
    done: usize,
    /// Bytes of the first item after those that have gone out.
    skip_bytes: usize,
}

impl SendBatch {
    /// What is still to be sent, in order; at most 64 pieces.
    pub fn slices(&self) -> impl Iterator<Item = &[u8]> {
        let mut skip_bytes = self.skip_bytes;
        self.items[self.done..].iter().flat_map(Item::parts).filter_map(move |part| {
            let skipped = skip_bytes.min(part.len());
            skip_bytes -= skipped;
            (skipped < part.len()).then(|| &part[skipped..])
        })
    }

    /// Notes that `sent_bytes` more have gone out. True when all have.
    pub fn advance(&mut self, sent_bytes: usize) -> bool {
        self.skip_bytes += sent_bytes;
        while let Some(item) = self.items.get(self.done) {
            let len_bytes: usize = item.parts().map(<[u8]>::len).sum();
            if self.skip_bytes < len_bytes {
                return false;
            }
            self.skip_bytes -= len_bytes;
            self.done += 1;
        }
        true
    }
}

#[derive(Debug)]
struct Item {
    head: Head,
    data: Option<(Slot, usize)>,
}

impl Item {
    fn parts(&self) -> impl Iterator<Item = &[u8]> {
        let data = self.data.as_ref().map(|(slot, len_bytes)| &slot[..*len_bytes]);
        std::iter::once(self.head.bytes()).chain(data)
    }
}

#[derive(Debug)]
enum Head {
    Short { bytes: [u8; Head::SHORT_BYTES], len: u8 },
    Long(Vec<u8>),
}

impl Head {
    /// A chunk's head and an offset.
    const SHORT_BYTES: usize = size_of::<ChunkHead>() + size_of::<u64>();

    /// A head of at most [`Head::SHORT_BYTES`].
    fn short(parts: &[&[u8]]) -> Self {
        let mut bytes = [0; Self::SHORT_BYTES];
        let mut len = 0;
        for part in parts {
            bytes[len..len + part.len()].copy_from_slice(part);
            len += part.len();
        }
        Self::Short { bytes, len: len as u8 }
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Self::Short { bytes, len } => &bytes[..usize::from(*len)],
            Self::Long(bytes) => bytes,
        }
    }
}

fn chunk_head(cookie: u64, done: bool, kind: u16, len_bytes: u32) -> ChunkHead {
    ChunkHead {
        magic: U32::new(wire::CHUNK_MAGIC),
        flags: U16::new(if done { wire::CHUNK_DONE } else { 0 }),
        kind: U16::new(kind),
        cookie: U64::new(cookie),
        len_bytes: U32::new(len_bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::Arena;

    fn bytes_of(batch: &SendBatch) -> Vec<u8> {
        batch.slices().flatten().copied().collect()
    }

    #[test]
    fn a_batch_sent_in_any_steps_loses_nothing() {
        let arena = Arena::new(4096, 2).expect("arena");
        for step in [1, 3, 17, 1000, 100_000] {
            let mut outbox = Outbox::default();
            let mut slots = Vec::new();
            outbox.simple(5, 0);
            let mut slot = arena.take().expect("slot");
            slot[..600].fill(0xAB);
            outbox.data(slot, 600);
            let mut slot = arena.take().expect("slot");
            slot[..512].fill(0xCD);
            outbox.data_chunk(6, true, 4096, slot, 512);
            outbox.error_chunk(7, wire::error::EIO, "bad");
            let mut batch = outbox.next_batch().expect("replies");
            let whole = bytes_of(&batch);
            assert_eq!(whole.len(), 16 + 600 + 28 + 512 + 20 + 6 + 3);
            let mut at = 0;
            loop {
                assert_eq!(bytes_of(&batch), whole[at..]);
                let sent = step.min(whole.len() - at);
                at += sent;
                if batch.advance(sent) {
                    break;
                }
            }
            assert_eq!(at, whole.len());
            outbox.take_back(batch, &mut slots);
            assert_eq!(slots.len(), 2);
            assert!(outbox.is_empty());
        }
    }
}
