use std::collections::BTreeMap;

use bytes::Bytes;

/// What a group of records leaves of one disk: disjoint ranges, of overlapping records the later one's content. Disjoint ranges can
/// go to the disk in any order and all at once.
#[derive(Clone, Debug, Default)]
pub(super) struct Overlay {
    /// By start.
    ranges: BTreeMap<u64, Content>,
}

/// The content of one range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// These bytes.
    Data(Bytes),
    /// Zeroes, of this length in bytes.
    Zeroes(u64),
}

/// One transfer to a disk whose smallest unit is a block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum BlockOp {
    /// Whole blocks from memory.
    Write {
        /// Place in bytes.
        offset_bytes: u64,
        /// Content.
        data: Bytes,
    },
    /// Whole blocks of zeroes.
    Zero {
        /// Place in bytes.
        offset_bytes: u64,
        /// Length in bytes.
        len_bytes: u64,
    },
    /// One block that several ranges, or a range and what is on the disk, make up.
    Patch {
        /// Place of the block in bytes.
        offset_bytes: u64,
        /// Place in the block, in bytes, and content.
        pieces: Vec<(usize, Content)>,
        /// The pieces don't cover the block: it must be read first.
        read_first: bool,
    },
}

impl Content {
    /// Length in bytes.
    pub(super) fn len_bytes(&self) -> u64 {
        match self {
            Self::Data(data) => data.len() as u64,
            Self::Zeroes(len_bytes) => *len_bytes,
        }
    }

    /// The part from `start` to `end`, counted from its own start.
    fn part(&self, start: u64, end: u64) -> Self {
        match self {
            Self::Data(data) => Self::Data(data.slice(start as usize..end as usize)),
            Self::Zeroes(_) => Self::Zeroes(end - start),
        }
    }
}

impl Overlay {
    /// Puts `content` over whatever is there.
    pub(super) fn put(&mut self, offset_bytes: u64, content: Content) {
        let end = offset_bytes + content.len_bytes();
        let first = self.ranges.range(..offset_bytes).next_back().map_or(offset_bytes, |(start, _)| *start);
        let touched: Vec<u64> = self.ranges.range(first..end).map(|(start, _)| *start).collect();
        for start in touched {
            let old_end = start + self.ranges[&start].len_bytes();
            if old_end <= offset_bytes {
                continue;
            }
            let old = self.ranges.remove(&start).expect("just seen");
            if start < offset_bytes {
                self.ranges.insert(start, old.part(0, offset_bytes - start));
            }
            if old_end > end {
                self.ranges.insert(end, old.part(end - start, old_end - start));
            }
        }
        self.ranges.insert(offset_bytes, content);
    }

    /// Puts `content` only where nothing is yet: what [`Self::put`] must not do.
    pub(super) fn put_under(&mut self, offset_bytes: u64, content: Content) {
        let end = offset_bytes + content.len_bytes();
        let before = std::mem::take(self);
        self.put(offset_bytes, content);
        for (start, over) in before.ranges {
            debug_assert!(end > offset_bytes);
            self.put(start, over);
        }
    }

    /// The ranges as transfers in whole blocks of `block_bytes`, disjoint, in ascending order. Zeroes of less than a block and data at odd
    /// places become patches.
    pub(super) fn into_ops(self, block_bytes: u64) -> Vec<BlockOp> {
        let mut ops = Vec::new();
        let mut patches: BTreeMap<u64, Vec<(usize, Content)>> = BTreeMap::new();
        for (start, content) in self.ranges {
            let end = start + content.len_bytes();
            let whole_start = start.next_multiple_of(block_bytes);
            let whole_end = end - end % block_bytes;
            let mut odd = |from: u64, to: u64| {
                let block = from - from % block_bytes;
                let piece = content.part(from - start, to - start);
                patches.entry(block).or_default().push(((from - block) as usize, piece));
            };
            if whole_start > whole_end {
                odd(start, end);
                continue;
            }
            if start < whole_start {
                odd(start, whole_start);
            }
            if whole_end < end {
                odd(whole_end, end);
            }
            if whole_start < whole_end {
                ops.push(match content.part(whole_start - start, whole_end - start) {
                    Content::Data(data) => BlockOp::Write { offset_bytes: whole_start, data },
                    Content::Zeroes(len_bytes) => BlockOp::Zero { offset_bytes: whole_start, len_bytes },
                });
            }
        }
        ops.extend(patches.into_iter().map(|(offset_bytes, pieces)| {
            let covered: u64 = pieces.iter().map(|(_, content)| content.len_bytes()).sum();
            BlockOp::Patch { offset_bytes, pieces, read_first: covered < block_bytes }
        }));
        ops
    }
}

/// Puts the pieces of a [`BlockOp::Patch`] into its block.
pub(super) fn apply_pieces(block: &mut [u8], pieces: &[(usize, Content)]) {
    for (at, content) in pieces {
        match content {
            Content::Data(data) => block[*at..*at + data.len()].copy_from_slice(data),
            Content::Zeroes(len_bytes) => block[*at..*at + *len_bytes as usize].fill(0),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DISK_BYTES: usize = 64 << 10;

    fn apply(disk: &mut [u8], ops: &[BlockOp], block_bytes: usize) {
        for op in ops {
            match op {
                BlockOp::Write { offset_bytes, data } => {
                    assert!(offset_bytes.is_multiple_of(block_bytes as u64));
                    assert!(data.len().is_multiple_of(block_bytes) && !data.is_empty());
                    disk[*offset_bytes as usize..][..data.len()].copy_from_slice(data);
                }
                BlockOp::Zero { offset_bytes, len_bytes } => {
                    assert!(offset_bytes.is_multiple_of(block_bytes as u64));
                    assert!(len_bytes.is_multiple_of(block_bytes as u64) && *len_bytes > 0);
                    disk[*offset_bytes as usize..][..*len_bytes as usize].fill(0);
                }
                BlockOp::Patch { offset_bytes, pieces, read_first } => {
                    let block = &mut disk[*offset_bytes as usize..][..block_bytes];
                    if !read_first {
                        block.fill(0xee);
                    }
                    apply_pieces(block, pieces);
                }
            }
        }
    }

    proptest! {
        #[test]
        fn ops_in_any_order_leave_what_the_writes_in_order_leave(
            writes in prop::collection::vec((0..120_u64, 1..9_u64, any::<bool>()), 1..40),
            block_bytes in prop_oneof![Just(512_usize), Just(4096_usize)],
            reverse in any::<bool>(),
        ) {
            let mut expected = vec![0xaa; DISK_BYTES];
            let mut overlay = Overlay::default();
            for (index, (sector, sectors, zeroes)) in writes.into_iter().enumerate() {
                let (offset, len) = (sector * 512, sectors * 512);
                let fill = if zeroes { 0 } else { index as u8 + 1 };
                expected[offset as usize..][..len as usize].fill(fill);
                let content = if zeroes {
                    Content::Zeroes(len)
                } else {
                    Content::Data(Bytes::from(vec![fill; len as usize]))
                };
                overlay.put(offset, content);
            }
            let mut ops = overlay.into_ops(block_bytes as u64);
            if reverse {
                ops.reverse();
            }
            let mut disk = vec![0xaa; DISK_BYTES];
            apply(&mut disk, &ops, block_bytes);
            prop_assert!(disk == expected);
        }
    }
}
