//! A source's local disk: memory that does what a file would, in whatever order it is asked.

use ublk::serve::{Errno, FileIo, FileOp, IoBuffer};
use vra::capture::numbering::ByteRange;
use vra::sync::Extent;

/// Granularity of holes, in bytes.
const BLOCK_BYTES: usize = 4096;
/// Longest extent that is reported at once, in bytes: so long are a sync's reads.
const EXTENT_BYTES_MAX: u64 = 8 << 10;

#[derive(Debug)]
pub(super) struct LocalDisk {
    bytes: Vec<u8>,
    allocated: Vec<bool>,
}

impl LocalDisk {
    pub(super) fn new(len_bytes: usize) -> Self {
        Self { bytes: vec![0; len_bytes], allocated: vec![false; len_bytes.div_ceil(BLOCK_BYTES)] }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Does an operation whole, or what of it has landed when it fails: `keep_bytes` of a write.
    pub(super) fn perform(&mut self, io: &mut FileIo, keep_bytes: usize) -> Result<(), Errno> {
        let len_bytes = (io.len_bytes as usize).min(keep_bytes);
        let start = io.offset_bytes as usize;
        match (io.op, &mut io.buffer) {
            (FileOp::Read, IoBuffer::Owned(slot)) => {
                slot[..len_bytes].copy_from_slice(&self.bytes[start..start + len_bytes]);
            }
            (FileOp::Write { .. }, IoBuffer::Owned(slot)) => self.write(start, &slot[..len_bytes]),
            (FileOp::Write { .. }, IoBuffer::Shared(slot)) => self.write(start, &slot[..len_bytes]),
            (FileOp::PunchHole | FileOp::ZeroRange, IoBuffer::None) => {
                self.bytes[start..start + len_bytes].fill(0);
                if io.op == FileOp::PunchHole {
                    let (first, end) = (start.div_ceil(BLOCK_BYTES), (start + len_bytes) / BLOCK_BYTES);
                    self.allocated[first.min(end)..end].fill(false);
                } else {
                    self.allocate(start, len_bytes);
                }
            }
            _ => {}
        }
        if len_bytes == io.len_bytes as usize { Ok(()) } else { Err(Errno(libc::EIO)) }
    }

    /// Whether there is data or a hole at the start of the range, and how long.
    pub(super) fn probe(&self, range: ByteRange) -> Extent {
        let first = range.start as usize / BLOCK_BYTES;
        let is_data = self.allocated[first];
        let run = self.allocated[first..].iter().take_while(|allocated| **allocated == is_data).count();
        let end = ((first + run) * BLOCK_BYTES) as u64;
        Extent { is_data, end: end.min(range.start + EXTENT_BYTES_MAX).min(self.bytes.len() as u64) }
    }

    fn write(&mut self, start: usize, data: &[u8]) {
        self.bytes[start..start + data.len()].copy_from_slice(data);
        self.allocate(start, data.len());
    }

    fn allocate(&mut self, start: usize, len_bytes: usize) {
        if len_bytes > 0 {
            self.allocated[start / BLOCK_BYTES..(start + len_bytes).div_ceil(BLOCK_BYTES)].fill(true);
        }
    }
}
