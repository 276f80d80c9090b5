use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Ack, Grant, Open, PROTOCOL_VERSION, Refuse};

/// First bytes of every frame, different from those of a batch: a reader can tell the two apart.
pub const FRAME_MAGIC: [u8; 4] = *b"HFst";

/// Length of the header of every frame, in bytes.
pub const FRAME_HEADER_BYTES: usize = 16;

/// Longest frame, in bytes.
pub const MAX_FRAME_BYTES: usize = 8192;

/// What a frame is; the `kind` of its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameKind {
    /// [`Open`], 1.
    Open,
    /// [`Grant`], 2.
    Grant,
    /// [`Refuse`], 3.
    Refuse,
    /// [`Ack`], 4.
    Ack,
}

/// Any frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// The source asks for a VM's stream.
    Open(Open),
    /// The target grants it.
    Grant(Grant),
    /// The target refuses or ends it.
    Refuse(Refuse),
    /// The target says how far it is.
    Ack(Ack),
}

/// Why bytes from the peer are not a frame.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// The first bytes are not [`FRAME_MAGIC`].
    #[error("not a Holdfast data stream: it begins with {found:02x?}")]
    Magic {
        /// What is there instead.
        found: [u8; 4],
    },
    /// The frame's version is not spoken here.
    #[error(
        "the peer speaks data stream version {found}, this VRA speaks {PROTOCOL_VERSION}: upgrade the older one"
    )]
    Version {
        /// The peer's.
        found: u16,
    },
    /// A kind that version 1 doesn't have.
    #[error("unknown frame kind {found}")]
    Kind {
        /// The header's kind.
        found: u16,
    },
    /// A length outside the bounds, or not what the contents need.
    #[error("{frame} frame of {found} bytes, expected {expected}")]
    Length {
        /// Name of the frame.
        frame: &'static str,
        /// The header's or the buffer's length, in bytes.
        found: usize,
        /// What it should be, in bytes (the bound, if it is above that).
        expected: usize,
    },
    /// A field with a value that version 1 doesn't allow.
    #[error("{frame} frame: {field} is {found}")]
    Field {
        /// Name of the frame.
        frame: &'static str,
        /// Name of the field.
        field: &'static str,
        /// Its value.
        found: u64,
    },
    /// A frame that is not expected in this direction or at this time.
    #[error("unexpected {found} frame")]
    Unexpected {
        /// Name of the frame.
        found: &'static str,
    },
}

/// How many bytes the frame that begins with `header` has, header included: what a stream reader must collect before
/// [`Frame::parse`].
///
/// # Errors
/// [`WireError`] when it is no frame of this version or its length is out of bounds. A refusal is accepted from any version: its
/// layout never changes.
pub fn frame_len_bytes(header: &[u8; FRAME_HEADER_BYTES]) -> Result<usize, WireError> {
    Ok(Header::check(header)?.1)
}

impl Frame {
    /// Reads one whole frame.
    ///
    /// # Errors
    /// [`WireError`], naming the frame and the field.
    pub fn parse(bytes: &[u8]) -> Result<Self, WireError> {
        let Some((header, body)) = bytes.split_first_chunk::<FRAME_HEADER_BYTES>() else {
            return Err(WireError::Length {
                frame: "truncated",
                found: bytes.len(),
                expected: FRAME_HEADER_BYTES,
            });
        };
        let (kind, len_bytes) = Header::check(header)?;
        if bytes.len() != len_bytes {
            return Err(WireError::Length { frame: kind.name(), found: bytes.len(), expected: len_bytes });
        }
        Ok(match kind {
            FrameKind::Open => Self::Open(Open::parse_body(body)?),
            FrameKind::Grant => Self::Grant(Grant::parse_body(body)?),
            FrameKind::Refuse => Self::Refuse(Refuse::parse_body(body)?),
            FrameKind::Ack => Self::Ack(Ack::parse_body(body)?),
        })
    }

    /// The frame's bytes.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Open(open) => open.encode(),
            Self::Grant(grant) => grant.encode(),
            Self::Refuse(refuse) => refuse.encode(),
            Self::Ack(ack) => ack.encode().to_vec(),
        }
    }

    /// Its name, for messages.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Open(_) => FrameKind::Open.name(),
            Self::Grant(_) => FrameKind::Grant.name(),
            Self::Refuse(_) => FrameKind::Refuse.name(),
            Self::Ack(_) => FrameKind::Ack.name(),
        }
    }
}

impl FrameKind {
    fn code(self) -> u16 {
        match self {
            Self::Open => 1,
            Self::Grant => 2,
            Self::Refuse => 3,
            Self::Ack => 4,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Grant => "grant",
            Self::Refuse => "refuse",
            Self::Ack => "ack",
        }
    }
}

/// The header of every frame, 16 bytes.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct Header {
    /// [`FRAME_MAGIC`].
    magic: [u8; 4],
    /// [`FrameKind`].
    kind: U16,
    /// Protocol version of the frame's layout.
    version: U16,
    /// Length of the whole frame with this header, in bytes.
    len_bytes: U32,
    /// Zero.
    reserved: U32,
}

const _: () = assert!(size_of::<Header>() == FRAME_HEADER_BYTES);
const _: () = assert!(std::mem::offset_of!(Header, kind) == 4);
const _: () = assert!(std::mem::offset_of!(Header, version) == 6);
const _: () = assert!(std::mem::offset_of!(Header, len_bytes) == 8);

impl Header {
    /// The header of a frame of `len_bytes` in all, which the callers keep below [`MAX_FRAME_BYTES`].
    pub(super) fn new(kind: FrameKind, len_bytes: usize) -> Self {
        debug_assert!(len_bytes <= MAX_FRAME_BYTES);
        Self {
            magic: FRAME_MAGIC,
            kind: kind.code().into(),
            version: PROTOCOL_VERSION.into(),
            len_bytes: (len_bytes as u32).into(),
            reserved: 0.into(),
        }
    }

    fn check(bytes: &[u8; FRAME_HEADER_BYTES]) -> Result<(FrameKind, usize), WireError> {
        let header: Self = zerocopy::transmute!(*bytes);
        if header.magic != FRAME_MAGIC {
            return Err(WireError::Magic { found: header.magic });
        }
        let kind = match header.kind.get() {
            1 => FrameKind::Open,
            2 => FrameKind::Grant,
            3 => FrameKind::Refuse,
            4 => FrameKind::Ack,
            found if header.version.get() == PROTOCOL_VERSION => return Err(WireError::Kind { found }),
            _ => return Err(WireError::Version { found: header.version.get() }),
        };
        if kind != FrameKind::Refuse && header.version.get() != PROTOCOL_VERSION {
            return Err(WireError::Version { found: header.version.get() });
        }
        if header.reserved.get() != 0 {
            let found = u64::from(header.reserved.get());
            return Err(WireError::Field { frame: kind.name(), field: "reserved", found });
        }
        let len_bytes = header.len_bytes.get() as usize;
        if !(FRAME_HEADER_BYTES..=MAX_FRAME_BYTES).contains(&len_bytes) {
            return Err(WireError::Length {
                frame: kind.name(),
                found: len_bytes,
                expected: MAX_FRAME_BYTES,
            });
        }
        Ok((kind, len_bytes))
    }
}

/// Reads a fixed body of exactly `T`'s size.
pub(super) fn fixed_body<T: FromBytes + Unaligned + Immutable + KnownLayout + Copy>(
    frame: &'static str,
    body: &[u8],
) -> Result<T, WireError> {
    T::read_from_bytes(body).map_err(|_| WireError::Length {
        frame,
        found: body.len() + FRAME_HEADER_BYTES,
        expected: size_of::<T>() + FRAME_HEADER_BYTES,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;
    use crate::api::{GenerationId, JournalId, VmId, VolumeId, VpgId};
    use crate::wire::{MAX_ANCESTORS, MAX_VOLUMES, RefuseCode, VolumeShape};

    fn uuid() -> impl Strategy<Value = Uuid> {
        any::<u128>().prop_map(Uuid::from_u128)
    }

    fn volumes() -> impl Strategy<Value = Vec<VolumeShape>> {
        prop::collection::vec((uuid(), any::<bool>(), 1..1_u64 << 40), 1..=MAX_VOLUMES).prop_map(|shapes| {
            let shape = |(index, (id, small, blocks)): (usize, (Uuid, bool, u64))| {
                let logical_block_bytes = if small { 512 } else { 4096 };
                VolumeShape {
                    volume: index as u16,
                    id: VolumeId(id),
                    logical_block_bytes,
                    size_bytes: blocks * u64::from(logical_block_bytes),
                }
            };
            shapes.into_iter().enumerate().map(shape).collect()
        })
    }

    fn open() -> impl Strategy<Value = Frame> {
        let ids = (uuid(), uuid(), uuid(), uuid());
        let ancestors = prop::collection::vec(uuid(), 0..=MAX_ANCESTORS);
        (ids, any::<(u64, u64)>(), 1..u64::MAX, ancestors, volumes()).prop_map(
            |((vm, vpg, journal, generation), (offered, required), first_seq, ancestors, volumes)| {
                Frame::Open(Open {
                    features_offered: offered | required,
                    features_required: required,
                    vm: VmId(vm),
                    vpg: VpgId(vpg),
                    journal: JournalId(journal),
                    generation: GenerationId(generation),
                    ancestors: ancestors.into_iter().map(GenerationId).collect(),
                    first_seq,
                    volumes,
                })
            },
        )
    }

    fn grant() -> impl Strategy<Value = Frame> {
        let numbers = any::<(u64, u64, u64, u32, u32)>();
        (numbers, any::<bool>(), any::<bool>()).prop_map(
            |((features, open_count, durable_through, tail_crc, window_bytes), fresh, new)| {
                Frame::Grant(Grant {
                    features,
                    open_count,
                    durable_through,
                    tail_crc,
                    fresh_image: fresh,
                    new_generation: new,
                    window_bytes,
                })
            },
        )
    }

    fn refuse() -> impl Strategy<Value = Frame> {
        (any::<u16>(), any::<u64>(), ".{0,200}").prop_map(|(code, detail, text)| {
            Frame::Refuse(Refuse { code: RefuseCode::from_code(code), detail, text })
        })
    }

    fn ack() -> impl Strategy<Value = Frame> {
        any::<(u64, u64, u64, u32, u32)>().prop_map(|(open_count, a, b, memory_us, disk_us)| {
            let (received_through, durable_through) = (a.max(b), a.min(b));
            Frame::Ack(Ack { open_count, received_through, durable_through, memory_us, disk_us })
        })
    }

    fn any_frame() -> impl Strategy<Value = Frame> {
        prop_oneof![open(), grant(), refuse(), ack()]
    }

    proptest! {
        #[test]
        fn every_frame_comes_back_equal_and_bounded(frame in any_frame()) {
            let bytes = frame.encode();
            prop_assert!(bytes.len() <= MAX_FRAME_BYTES);
            let header = bytes.first_chunk().expect("a frame has a header");
            prop_assert_eq!(frame_len_bytes(header), Ok(bytes.len()));
            prop_assert_eq!(Frame::parse(&bytes), Ok(frame));
        }

        #[test]
        fn what_parses_has_one_encoding(frame in any_frame(), at in any::<prop::sample::Index>(), bit in 0..8_u32) {
            let mut bytes = frame.encode();
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            // The version in a refusal's header is the only thing that may vary.
            if let Ok(parsed) = Frame::parse(&bytes) && !(matches!(parsed, Frame::Refuse(_)) && (6..8).contains(&at)) {
                prop_assert_eq!(parsed.encode(), bytes);
            }
        }

        #[test]
        fn a_cut_frame_is_refused(frame in any_frame(), cut in any::<prop::sample::Index>()) {
            let bytes = frame.encode();
            prop_assert!(Frame::parse(&bytes[..cut.index(bytes.len())]).is_err());
        }

        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Frame::parse(&bytes);
        }
    }

    #[test]
    fn a_newer_peer_is_named_but_its_refusal_is_read() {
        let mut open = Frame::Ack(Ack {
            open_count: 1,
            received_through: 2,
            durable_through: 2,
            memory_us: 0,
            disk_us: 0,
        })
        .encode();
        open[6] = 9;
        assert_eq!(Frame::parse(&open), Err(WireError::Version { found: 9 }));
        let refuse = Refuse { code: RefuseCode::Version, detail: 9, text: "too old".into() };
        let mut bytes = refuse.encode();
        bytes[6] = 9;
        assert_eq!(Frame::parse(&bytes), Ok(Frame::Refuse(refuse)));
    }

    #[test]
    fn a_long_refusal_is_cut_at_a_character() {
        let refuse = Refuse { code: RefuseCode::Storage, detail: 0, text: "é".repeat(5000) };
        let Ok(Frame::Refuse(parsed)) = Frame::parse(&refuse.encode()) else { panic!("a refusal") };
        assert!(parsed.text.len() <= crate::wire::SENDABLE_REFUSE_TEXT_BYTES);
        assert!(parsed.text.len() > 1000);
        assert!(parsed.text.chars().all(|c| c == 'é'));
    }
}
