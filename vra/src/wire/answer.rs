use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::WireError;
use super::frame::{FRAME_HEADER_BYTES, FrameKind, Header, fixed_body};

/// Length of a grant frame, in bytes.
pub const GRANT_FRAME_BYTES: usize = FRAME_HEADER_BYTES + size_of::<GrantLayout>();

/// Longest text of a refusal, in bytes; a longer one is cut.
pub const SENDABLE_REFUSE_TEXT_BYTES: usize = 1024;

/// The target grants the stream: from now on, it takes batches from nobody else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Of the features offered, those that the stream uses.
    pub features: u64,
    /// The journal's open count, which every batch of the stream carries.
    pub open_count: u64,
    /// Everything up to here is durable at the target, of this generation or an ancestor. Zero: nothing yet.
    pub durable_through: u64,
    /// CRC of the last batch of the journal, which the next batch names as its predecessor.
    pub tail_crc: u32,
    /// The recovery disks are images that nothing was ever written to: a sync may skip holes (B6).
    pub fresh_image: bool,
    /// The generation has nothing at the target yet: it continues an ancestor, or the journal is empty.
    pub new_generation: bool,
    /// How much the target keeps in memory for this stream before it stops reading, in bytes.
    pub window_bytes: u32,
}

/// The target doesn't grant the stream, or ends it. Its layout is the same in all versions of the protocol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refuse {
    /// Why, for the machine.
    pub code: RefuseCode,
    /// A number that belongs to the code, else zero.
    pub detail: u64,
    /// Why and what to do, for people.
    pub text: String,
}

/// Reasons of a [`Refuse`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefuseCode {
    /// 1: the protocol version is not spoken; the detail is the target's newest.
    Version,
    /// 2: a required feature is missing; the detail has their bits.
    Feature,
    /// 3: the target has no such VM.
    UnknownVm,
    /// 4: the VM's journal has another id.
    JournalDiffers,
    /// 5: the journal's tail is neither the generation nor one of its ancestors (A5).
    NotDescendant,
    /// 6: the volumes are not those of the journal.
    VolumesDiffer,
    /// 7: a newer stream of the VM took over.
    Fenced,
    /// 8: the journal can't take a stream yet (it is being opened, or another action has it): try again.
    Busy,
    /// 9: the journal or a recovery disk failed.
    Storage,
    /// 10: what came on the stream was wrong (a broken chain, a gap, a bad checksum).
    BadBatch,
    /// 11: the peer is not the VM's source.
    NotAllowed,
    /// 12: the VM is no longer protected here (deleted, or recovered).
    Closed,
    /// 13: the journal is full and has to be given space, or shorten its history (C5).
    JournalFull,
    /// Any other, of a newer version.
    Other(u16),
}

impl Grant {
    /// The frame's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut flags = 0;
        if self.fresh_image {
            flags |= FLAG_FRESH_IMAGE;
        }
        if self.new_generation {
            flags |= FLAG_NEW_GENERATION;
        }
        let layout = GrantLayout {
            features: self.features.into(),
            open_count: self.open_count.into(),
            durable_through: self.durable_through.into(),
            tail_crc: self.tail_crc.into(),
            flags: flags.into(),
            window_bytes: self.window_bytes.into(),
            reserved: 0.into(),
        };
        let mut bytes = Vec::with_capacity(GRANT_FRAME_BYTES);
        bytes.extend_from_slice(Header::new(FrameKind::Grant, GRANT_FRAME_BYTES).as_bytes());
        bytes.extend_from_slice(layout.as_bytes());
        bytes
    }

    pub(super) fn parse_body(body: &[u8]) -> Result<Self, WireError> {
        let layout: GrantLayout = fixed_body("grant", body)?;
        let flags = layout.flags.get();
        if flags & !(FLAG_FRESH_IMAGE | FLAG_NEW_GENERATION) != 0 {
            return Err(WireError::Field { frame: "grant", field: "flags", found: flags.into() });
        }
        if layout.reserved.get() != 0 {
            let found = layout.reserved.get().into();
            return Err(WireError::Field { frame: "grant", field: "reserved", found });
        }
        Ok(Self {
            features: layout.features.get(),
            open_count: layout.open_count.get(),
            durable_through: layout.durable_through.get(),
            tail_crc: layout.tail_crc.get(),
            fresh_image: flags & FLAG_FRESH_IMAGE != 0,
            new_generation: flags & FLAG_NEW_GENERATION != 0,
            window_bytes: layout.window_bytes.get(),
        })
    }
}

impl Refuse {
    /// The frame's bytes; a text over [`SENDABLE_REFUSE_TEXT_BYTES`] is cut.
    pub fn encode(&self) -> Vec<u8> {
        let text = &self.text[..self.text.floor_char_boundary(SENDABLE_REFUSE_TEXT_BYTES)];
        let len_bytes = FRAME_HEADER_BYTES + size_of::<RefuseLayout>() + text.len();
        let layout = RefuseLayout {
            detail: self.detail.into(),
            code: self.code.code().into(),
            text_len_bytes: (text.len() as u16).into(),
            reserved: 0.into(),
        };
        let mut bytes = Vec::with_capacity(len_bytes);
        bytes.extend_from_slice(Header::new(FrameKind::Refuse, len_bytes).as_bytes());
        bytes.extend_from_slice(layout.as_bytes());
        bytes.extend_from_slice(text.as_bytes());
        bytes
    }

    pub(super) fn parse_body(body: &[u8]) -> Result<Self, WireError> {
        let found = body.len() + FRAME_HEADER_BYTES;
        let length = |expected| WireError::Length { frame: "refuse", found, expected };
        let (layout, text) = RefuseLayout::ref_from_prefix(body)
            .map_err(|_| length(FRAME_HEADER_BYTES + size_of::<RefuseLayout>()))?;
        let text_len_bytes = usize::from(layout.text_len_bytes.get());
        if layout.reserved.get() != 0 {
            let found = layout.reserved.get().into();
            return Err(WireError::Field { frame: "refuse", field: "reserved", found });
        }
        if text_len_bytes > SENDABLE_REFUSE_TEXT_BYTES || text.len() != text_len_bytes {
            return Err(length(FRAME_HEADER_BYTES + size_of::<RefuseLayout>() + text_len_bytes));
        }
        let text = std::str::from_utf8(text).map_err(|error| WireError::Field {
            frame: "refuse",
            field: "first byte of the text that is not UTF-8",
            found: error.valid_up_to() as u64,
        })?;
        Ok(Self {
            code: RefuseCode::from_code(layout.code.get()),
            detail: layout.detail.get(),
            text: text.to_owned(),
        })
    }
}

impl RefuseCode {
    /// The number on the wire.
    pub fn code(self) -> u16 {
        match self {
            Self::Version => 1,
            Self::Feature => 2,
            Self::UnknownVm => 3,
            Self::JournalDiffers => 4,
            Self::NotDescendant => 5,
            Self::VolumesDiffer => 6,
            Self::Fenced => 7,
            Self::Busy => 8,
            Self::Storage => 9,
            Self::BadBatch => 10,
            Self::NotAllowed => 11,
            Self::Closed => 12,
            Self::JournalFull => 13,
            Self::Other(code) => code,
        }
    }

    /// The reason behind a number on the wire.
    pub fn from_code(code: u16) -> Self {
        match code {
            1 => Self::Version,
            2 => Self::Feature,
            3 => Self::UnknownVm,
            4 => Self::JournalDiffers,
            5 => Self::NotDescendant,
            6 => Self::VolumesDiffer,
            7 => Self::Fenced,
            8 => Self::Busy,
            9 => Self::Storage,
            10 => Self::BadBatch,
            11 => Self::NotAllowed,
            12 => Self::Closed,
            13 => Self::JournalFull,
            other => Self::Other(other),
        }
    }
}

/// A grant frame after the header, 40 bytes.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct GrantLayout {
    /// [`Grant::features`].
    features: U64,
    /// [`Grant::open_count`].
    open_count: U64,
    /// [`Grant::durable_through`].
    durable_through: U64,
    /// [`Grant::tail_crc`].
    tail_crc: U32,
    /// [`FLAG_FRESH_IMAGE`], [`FLAG_NEW_GENERATION`].
    flags: U32,
    /// [`Grant::window_bytes`].
    window_bytes: U32,
    /// Zero.
    reserved: U32,
}

/// The fixed part of a refuse frame after the header, 16 bytes; then the text.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RefuseLayout {
    /// [`Refuse::detail`].
    detail: U64,
    /// [`RefuseCode`].
    code: U16,
    /// Length of the text that follows (UTF-8), in bytes, at most [`SENDABLE_REFUSE_TEXT_BYTES`].
    text_len_bytes: U16,
    /// Zero.
    reserved: U32,
}

/// [`Grant::fresh_image`].
const FLAG_FRESH_IMAGE: u32 = 1;
/// [`Grant::new_generation`].
const FLAG_NEW_GENERATION: u32 = 2;

const _: () = assert!(size_of::<GrantLayout>() == 40);
const _: () = assert!(std::mem::offset_of!(GrantLayout, tail_crc) == 24);
const _: () = assert!(std::mem::offset_of!(GrantLayout, window_bytes) == 32);
const _: () = assert!(size_of::<RefuseLayout>() == 16);
const _: () = assert!(std::mem::offset_of!(RefuseLayout, code) == 8);
