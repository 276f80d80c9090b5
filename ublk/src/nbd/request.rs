//! What a request of the transmission phase asks, whether it may, and into which pieces it is cut.

use super::handshake::{Agreed, Offer};
use super::wire::{self, RequestHead, command, command_flag, error};
use crate::serve::{Geometry, Op};

/// What a connection's requests are judged by.
#[derive(Clone, Debug)]
pub struct Terms {
    /// The disk.
    pub geometry: Geometry,
    /// What the handshake agreed on.
    pub agreed: Agreed,
    /// Longest piece with a payload, in bytes.
    pub slot_len_bytes: usize,
    flags: u16,
}

impl Terms {
    /// The terms under which a client enters.
    pub fn new(offer: &Offer, agreed: Agreed) -> Self {
        Self {
            geometry: offer.geometry.clone(),
            agreed,
            slot_len_bytes: offer.slot_len_bytes,
            flags: offer.flags(agreed.structured),
        }
    }
}

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is carried out.
    Run(Work),
    /// It is answered with an error; a write's payload is skipped.
    Refuse {
        /// [`error`].
        error: u32,
        /// For a human.
        text: &'static str,
        /// Length of the payload that follows, in bytes.
        payload_bytes: u32,
    },
    /// The client is done.
    Disconnect,
    /// The client broke the protocol: nothing that follows can be understood.
    Broken,
}

/// A request to be carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// What.
    pub kind: Kind,
    /// First byte.
    pub offset_bytes: u64,
    /// Length in bytes; may be zero.
    pub len_bytes: u32,
    /// Durable before the answer.
    pub fua: bool,
}

/// Kind of [`Work`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Read.
    Read,
    /// Write, payload follows.
    Write,
    /// Flush.
    Flush,
    /// Discard.
    Trim,
    /// Write zeroes.
    WriteZeroes {
        /// The range may be deallocated.
        unmap: bool,
    },
    /// Extents of `base:allocation`.
    BlockStatus {
        /// Only the first.
        one: bool,
    },
}

/// Judges a request.
pub fn judge(head: &RequestHead, terms: &Terms) -> Verdict {
    use super::wire::transmission_flag as offered;
    let (offset_bytes, len_bytes) = (head.offset_bytes.get(), head.len_bytes.get());
    let command = head.command.get();
    if head.magic.get() != wire::REQUEST_MAGIC {
        return Verdict::Broken;
    }
    let payload_bytes = if command == command::WRITE { len_bytes } else { 0 };
    if payload_bytes > wire::MAX_PAYLOAD_BYTES {
        return Verdict::Broken;
    }
    let has = |flag| terms.flags & flag != 0;
    let refuse = |error, text| Verdict::Refuse { error, text, payload_bytes };

    let mut allowed = if has(offered::SEND_FUA) { command_flag::FUA } else { 0 };
    let kind = match command {
        command::DISC => return Verdict::Disconnect,
        command::READ => {
            allowed |= if has(offered::SEND_DF) { command_flag::DF } else { 0 };
            Kind::Read
        }
        command::WRITE => Kind::Write,
        command::FLUSH => Kind::Flush,
        command::TRIM => Kind::Trim,
        command::WRITE_ZEROES => {
            allowed |= command_flag::NO_HOLE;
            Kind::WriteZeroes { unmap: head.flags.get() & command_flag::NO_HOLE == 0 }
        }
        command::BLOCK_STATUS => {
            allowed |= command_flag::REQ_ONE;
            Kind::BlockStatus { one: head.flags.get() & command_flag::REQ_ONE != 0 }
        }
        _ => return refuse(error::EINVAL, "unknown command"),
    };
    if head.flags.get() & !allowed != 0 {
        return refuse(error::EINVAL, "a flag that this command does not take here");
    }
    let fua = head.flags.get() & command_flag::FUA != 0;
    if kind == Kind::Flush {
        return Verdict::Run(Work { kind, offset_bytes: 0, len_bytes: 0, fua: false });
    }

    let writes = matches!(kind, Kind::Write | Kind::Trim | Kind::WriteZeroes { .. });
    if writes && terms.geometry.read_only {
        return refuse(error::EPERM, "the export is read-only");
    }
    match kind {
        Kind::Trim if !has(offered::SEND_TRIM) => return refuse(error::EINVAL, "trim is not offered"),
        Kind::WriteZeroes { .. } if !has(offered::SEND_WRITE_ZEROES) => {
            return refuse(error::EINVAL, "write zeroes is not offered");
        }
        Kind::BlockStatus { .. } if !terms.agreed.base_allocation => {
            return refuse(error::EINVAL, "no metadata context was selected");
        }
        Kind::BlockStatus { .. } if len_bytes == 0 => {
            return refuse(error::EINVAL, "block status of nothing");
        }
        Kind::Read if len_bytes > wire::MAX_PAYLOAD_BYTES => {
            return refuse(error::EINVAL, "longer than the largest request");
        }
        Kind::Read
            if head.flags.get() & command_flag::DF != 0 && len_bytes as usize > terms.slot_len_bytes =>
        {
            return refuse(error::EOVERFLOW, "too long to send unfragmented");
        }
        _ => {}
    }
    let inside =
        offset_bytes.checked_add(u64::from(len_bytes)).is_some_and(|end| end <= terms.geometry.size_bytes);
    if !inside {
        let error = if matches!(kind, Kind::Write | Kind::WriteZeroes { .. }) {
            error::ENOSPC
        } else {
            error::EINVAL
        };
        return refuse(error, "beyond the end of the export");
    }
    let block = u64::from(terms.geometry.logical_block_bytes.max(1));
    if !offset_bytes.is_multiple_of(block) || !u64::from(len_bytes).is_multiple_of(block) {
        return refuse(error::EINVAL, "not a multiple of the block size");
    }
    Verdict::Run(Work { kind, offset_bytes, len_bytes, fua })
}

/// The part of a request that goes to the disk at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// What the disk is asked.
    pub op: Op,
    /// First byte.
    pub offset_bytes: u64,
    /// Length in bytes.
    pub len_bytes: u64,
    /// The memory that it needs.
    pub memory: PieceMemory,
}

/// Memory of a [`Piece`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PieceMemory {
    /// None.
    None,
    /// A slot: filled by the client for a write, by the disk for a read.
    Payload,
    /// A slot full of zeroes.
    Zeroes,
}

/// What of a request has not been cut yet.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    kind: Kind,
    next_bytes: u64,
    end_bytes: u64,
    /// A flush is one piece without a range.
    flush_left: bool,
}

impl Plan {
    /// The plan of a whole request.
    pub fn new(work: &Work, geometry: &Geometry) -> Self {
        let mut next_bytes = work.offset_bytes;
        let mut end_bytes = work.offset_bytes + u64::from(work.len_bytes);
        if work.kind == Kind::Trim {
            let granularity = granularity_bytes(geometry, work.kind);
            next_bytes = next_bytes.next_multiple_of(granularity);
            end_bytes = (end_bytes - end_bytes % granularity).max(next_bytes);
        }
        let flush_left = work.kind == Kind::Flush && geometry.volatile_cache;
        Self { kind: work.kind, next_bytes, end_bytes, flush_left }
    }

    /// Whether all is cut.
    pub fn is_done(&self) -> bool {
        !self.flush_left && self.next_bytes == self.end_bytes
    }

    /// The next piece, without taking it.
    pub fn peek(&self, terms: &Terms) -> Option<Piece> {
        if self.is_done() {
            return None;
        }
        let rest_bytes = self.end_bytes - self.next_bytes;
        let in_slot = rest_bytes.min(terms.slot_len_bytes as u64);
        let (op, len_bytes, memory) = match self.kind {
            Kind::Flush => (Op::Flush, 0, PieceMemory::None),
            Kind::BlockStatus { .. } => return None,
            Kind::Read => (Op::Read, in_slot, PieceMemory::Payload),
            Kind::Write => (Op::Write, in_slot, PieceMemory::Payload),
            Kind::Trim => {
                let len_bytes = rest_bytes.min(longest_bytes(&terms.geometry, self.kind));
                (Op::Discard, len_bytes, PieceMemory::None)
            }
            Kind::WriteZeroes { unmap } => {
                let granularity = granularity_bytes(&terms.geometry, self.kind);
                let to_boundary = self.next_bytes.next_multiple_of(granularity) - self.next_bytes;
                if to_boundary > 0 {
                    (Op::Write, in_slot.min(to_boundary), PieceMemory::Zeroes)
                } else if rest_bytes < granularity {
                    (Op::Write, in_slot, PieceMemory::Zeroes)
                } else {
                    let whole = rest_bytes - rest_bytes % granularity;
                    let len_bytes = whole.min(longest_bytes(&terms.geometry, self.kind));
                    (Op::WriteZeroes { unmap }, len_bytes, PieceMemory::None)
                }
            }
        };
        Some(Piece { op, offset_bytes: self.next_bytes, len_bytes, memory })
    }

    /// Takes the piece that [`Plan::peek`] showed.
    pub fn advance(&mut self, piece: &Piece) {
        self.next_bytes += piece.len_bytes;
        self.flush_left = false;
    }
}

fn limits_of(geometry: &Geometry, kind: Kind) -> Option<crate::serve::ZeroLimits> {
    if kind == Kind::Trim { geometry.discard } else { geometry.write_zeroes }
}

fn granularity_bytes(geometry: &Geometry, kind: Kind) -> u64 {
    let block = geometry.logical_block_bytes.max(1);
    u64::from(limits_of(geometry, kind).map_or(block, |limits| limits.granularity_bytes.max(block)))
}

fn longest_bytes(geometry: &Geometry, kind: Kind) -> u64 {
    let granularity = granularity_bytes(geometry, kind);
    let max_bytes = limits_of(geometry, kind).map_or(granularity, |limits| u64::from(limits.max_bytes));
    (max_bytes - max_bytes % granularity).max(granularity)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use zerocopy::byteorder::big_endian::{U16, U32, U64};

    use super::*;
    use crate::serve::ZeroLimits;

    const SIZE_BYTES: u64 = 64 << 20;

    fn terms(read_only: bool) -> Terms {
        let limits = Some(ZeroLimits { granularity_bytes: 4096, max_bytes: 1 << 20 });
        let offer = Offer {
            name: String::new(),
            description: String::new(),
            geometry: Geometry {
                size_bytes: SIZE_BYTES,
                logical_block_bytes: 512,
                physical_block_bytes: 4096,
                volatile_cache: true,
                fua: true,
                read_only,
                discard: limits,
                write_zeroes: limits,
            },
            multi_conn: false,
            slot_len_bytes: 64 << 10,
        };
        Terms::new(&offer, Agreed { structured: true, base_allocation: false })
    }

    fn head(command: u16, flags: u16, offset_bytes: u64, len_bytes: u32) -> RequestHead {
        RequestHead {
            magic: U32::new(wire::REQUEST_MAGIC),
            flags: U16::new(flags),
            command: U16::new(command),
            cookie: U64::new(7),
            offset_bytes: U64::new(offset_bytes),
            len_bytes: U32::new(len_bytes),
        }
    }

    #[test]
    fn refusals_name_the_error_of_the_protocol() {
        let fast_zero = 1 << 4;
        for (command, flags, offset, len, read_only, expected) in [
            (command::READ, 0, SIZE_BYTES, 512, false, error::EINVAL),
            (command::READ, 0, u64::MAX - 511, 512, false, error::EINVAL),
            (command::READ, 0, 1, 512, false, error::EINVAL),
            (command::READ, 0, 0, 513, false, error::EINVAL),
            (command::READ, 0, 0, (32 << 20) + 512, false, error::EINVAL),
            (command::READ, command_flag::DF, 0, 128 << 10, false, error::EOVERFLOW),
            (command::READ, command_flag::NO_HOLE, 0, 512, false, error::EINVAL),
            (command::WRITE, 0, SIZE_BYTES - 512, 1024, false, error::ENOSPC),
            (command::WRITE, 0, 0, 512, true, error::EPERM),
            (command::TRIM, 0, 0, 512, true, error::EPERM),
            (command::WRITE_ZEROES, 0, SIZE_BYTES, 512, false, error::ENOSPC),
            (command::WRITE_ZEROES, fast_zero, 0, 4096, false, error::EINVAL),
            (command::BLOCK_STATUS, 0, 0, 4096, false, error::EINVAL),
            (5, 0, 0, 512, false, error::EINVAL),
            (99, 0, 0, 512, false, error::EINVAL),
        ] {
            let verdict = judge(&head(command, flags, offset, len), &terms(read_only));
            let Verdict::Refuse { error, payload_bytes, .. } = verdict else {
                panic!("command {command} was not refused: {verdict:?}")
            };
            assert_eq!(error, expected, "command {command}, flags {flags}, {offset}+{len}");
            assert_eq!(payload_bytes, if command == command::WRITE { len } else { 0 });
        }
    }

    #[test]
    fn what_cannot_be_followed_breaks_the_connection() {
        let mut wrong = head(command::READ, 0, 0, 512);
        wrong.magic = U32::new(wire::SIMPLE_REPLY_MAGIC);
        assert_eq!(judge(&wrong, &terms(false)), Verdict::Broken);
        let long = head(command::WRITE, 0, 0, wire::MAX_PAYLOAD_BYTES + 512);
        assert_eq!(judge(&long, &terms(false)), Verdict::Broken);
    }

    #[test]
    fn trim_shrinks_to_whole_granules() {
        let work = Work { kind: Kind::Trim, offset_bytes: 512, len_bytes: 4096, fua: false };
        assert!(Plan::new(&work, &terms(false).geometry).is_done());
        let work = Work { kind: Kind::Trim, offset_bytes: 512, len_bytes: 3 * 4096, fua: false };
        let plan = Plan::new(&work, &terms(false).geometry);
        let piece = plan.peek(&terms(false)).expect("two granules");
        assert_eq!((piece.offset_bytes, piece.len_bytes), (4096, 8192));
    }

    proptest! {
        #[test]
        fn pieces_cover_the_request_in_order_within_the_limits(
            kind in prop_oneof![
                Just(Kind::Read),
                Just(Kind::Write),
                Just(Kind::WriteZeroes { unmap: true }),
            ],
            first_block in 0_u64..8192,
            blocks in 0_u32..65536,
        ) {
            let terms = terms(false);
            let work = Work { kind, offset_bytes: first_block * 512, len_bytes: blocks * 512, fua: false };
            let mut plan = Plan::new(&work, &terms.geometry);
            let mut at = work.offset_bytes;
            while let Some(piece) = plan.peek(&terms) {
                prop_assert_eq!(piece.offset_bytes, at);
                prop_assert!(piece.len_bytes > 0 && piece.len_bytes % 512 == 0);
                match piece.memory {
                    PieceMemory::None => {
                        prop_assert!(piece.offset_bytes.is_multiple_of(4096));
                        prop_assert!(piece.len_bytes.is_multiple_of(4096) && piece.len_bytes <= 1 << 20);
                    }
                    _ => prop_assert!(piece.len_bytes <= 64 << 10),
                }
                at += piece.len_bytes;
                plan.advance(&piece);
            }
            prop_assert_eq!(at, work.offset_bytes + u64::from(work.len_bytes));
        }
    }
}
