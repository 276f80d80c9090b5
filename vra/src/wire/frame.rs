use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Ack, Grant, GroupMessage, Open, PROTOCOL_VERSION, Refuse};

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
    /// [`GroupMessage::Alive`], 5.
    Alive,
    /// [`GroupMessage::Hold`], 6.
    Hold,
    /// [`GroupMessage::Held`], 7.
    Held,
    /// [`GroupMessage::Decline`], 8.
    Decline,
    /// [`GroupMessage::Release`], 9.
    Release,
    /// [`GroupMessage::Abort`], 10.
    Abort,
    /// [`GroupMessage::Recorded`], 11.
    Recorded,
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
    /// Source VRAs make a checkpoint of a group.
    Group(GroupMessage),
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
            FrameKind::Alive
            | FrameKind::Hold
            | FrameKind::Held
            | FrameKind::Decline
            | FrameKind::Release
            | FrameKind::Abort
            | FrameKind::Recorded => Self::Group(GroupMessage::parse_body(kind, body)?),
        })
    }

    /// The frame's bytes.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Open(open) => open.encode(),
            Self::Grant(grant) => grant.encode(),
            Self::Refuse(refuse) => refuse.encode(),
            Self::Ack(ack) => ack.encode().to_vec(),
            Self::Group(message) => message.encode(),
        }
    }

    /// Its name, for messages.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Open(_) => FrameKind::Open.name(),
            Self::Grant(_) => FrameKind::Grant.name(),
            Self::Refuse(_) => FrameKind::Refuse.name(),
            Self::Ack(_) => FrameKind::Ack.name(),
            Self::Group(message) => message.kind().name(),
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
            Self::Alive => 5,
            Self::Hold => 6,
            Self::Held => 7,
            Self::Decline => 8,
            Self::Release => 9,
            Self::Abort => 10,
            Self::Recorded => 11,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Grant => "grant",
            Self::Refuse => "refuse",
            Self::Ack => "ack",
            Self::Alive => "alive",
            Self::Hold => "hold",
            Self::Held => "held",
            Self::Decline => "decline",
            Self::Release => "release",
            Self::Abort => "abort",
            Self::Recorded => "recorded",
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
            5 => FrameKind::Alive,
            6 => FrameKind::Hold,
            7 => FrameKind::Held,
            8 => FrameKind::Decline,
            9 => FrameKind::Release,
            10 => FrameKind::Abort,
            11 => FrameKind::Recorded,
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
mod tests;
