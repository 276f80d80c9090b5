//! The payload of a checkpoint record.

use std::mem::size_of;

use bytes::Bytes;
use uuid::Uuid;
use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Longest tag of a checkpoint, in bytes of UTF-8.
pub const MAX_TAG_BYTES: usize = 255;

/// Names one attempt at a group checkpoint (D1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Epoch {
    /// The coordinator's incarnation, random.
    pub nonce: Uuid,
    /// The coordinator's count.
    pub counter: u64,
}

/// Why a checkpoint was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum CheckpointKind {
    /// By the clock: as a power cut would leave the disks.
    Automatic = 1,
    /// Asked for by a user, as a power cut would leave the disks.
    Tagged = 2,
    /// Taken while the guest's filesystems were frozen.
    Application = 3,
}

/// A point that a VM, together with its group, can be recovered to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// The attempt that made it, the same in all journals of the group.
    pub epoch: Epoch,
    /// The last sequence number that belongs to it.
    pub cut: u64,
    /// Version of the set of members that were held together.
    pub member_set_version: u64,
    /// When it was taken, by the coordinator's clock, µs since the Unix epoch (D4).
    pub time_us: u64,
    /// Why.
    pub kind: CheckpointKind,
    /// The user's name for it, at most [`MAX_TAG_BYTES`]; cut at a character's border if longer.
    pub tag: String,
}

/// What is wrong with a checkpoint's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum CheckpointError {
    /// The payload's length is not that of the body and the tag.
    #[error("its length is wrong")]
    Length,
    /// The kind's number is unknown.
    #[error("its kind {0} is unknown")]
    Kind(u8),
    /// The tag isn't UTF-8.
    #[error("its tag is not UTF-8")]
    Tag,
    /// A reserved byte isn't zero.
    #[error("a reserved byte is not zero")]
    Reserved,
}

impl Checkpoint {
    /// The payload of its record.
    pub fn encode(&self) -> Bytes {
        let tag = &self.tag[..self.tag.floor_char_boundary(MAX_TAG_BYTES)];
        let body = CheckpointBody {
            epoch_nonce: *self.epoch.nonce.as_bytes(),
            epoch_counter: self.epoch.counter.into(),
            cut: self.cut.into(),
            member_set_version: self.member_set_version.into(),
            time_us: self.time_us.into(),
            tag_len_bytes: (tag.len() as u16).into(),
            kind: self.kind as u8,
            reserved: [0; 13],
        };
        let mut bytes = Vec::with_capacity(size_of::<CheckpointBody>() + tag.len());
        bytes.extend_from_slice(body.as_bytes());
        bytes.extend_from_slice(tag.as_bytes());
        bytes.into()
    }

    /// Reads the payload of its record.
    ///
    /// # Errors
    /// The bytes are not exactly a checkpoint.
    pub fn decode(bytes: &[u8]) -> Result<Self, CheckpointError> {
        let (body, tag) = CheckpointBody::ref_from_prefix(bytes).map_err(|_| CheckpointError::Length)?;
        if usize::from(body.tag_len_bytes.get()) != tag.len() || tag.len() > MAX_TAG_BYTES {
            return Err(CheckpointError::Length);
        }
        if body.reserved != [0; 13] {
            return Err(CheckpointError::Reserved);
        }
        let kind = match body.kind {
            1 => CheckpointKind::Automatic,
            2 => CheckpointKind::Tagged,
            3 => CheckpointKind::Application,
            other => return Err(CheckpointError::Kind(other)),
        };
        Ok(Self {
            epoch: Epoch { nonce: Uuid::from_bytes(body.epoch_nonce), counter: body.epoch_counter.get() },
            cut: body.cut.get(),
            member_set_version: body.member_set_version.get(),
            time_us: body.time_us.get(),
            kind,
            tag: std::str::from_utf8(tag).map_err(|_| CheckpointError::Tag)?.to_owned(),
        })
    }
}

/// The fixed part of a checkpoint's payload: 64 bytes. The tag follows.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct CheckpointBody {
    /// [`Epoch::nonce`].
    epoch_nonce: [u8; 16],
    /// [`Epoch::counter`].
    epoch_counter: U64,
    /// [`Checkpoint::cut`].
    cut: U64,
    /// [`Checkpoint::member_set_version`].
    member_set_version: U64,
    /// [`Checkpoint::time_us`].
    time_us: U64,
    /// Length of the tag after this body, in bytes.
    tag_len_bytes: U16,
    /// [`CheckpointKind`] as a number.
    kind: u8,
    /// Zero.
    reserved: [u8; 13],
}

const _: () = assert!(size_of::<CheckpointBody>() == 64);
