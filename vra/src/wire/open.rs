use uuid::Uuid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::frame::{FRAME_HEADER_BYTES, FrameKind, Header};
use crate::api::{GenerationId, JournalId, VmId, VolumeId, VpgId};

use super::{MAX_ANCESTORS, MAX_FRAME_BYTES, MAX_VOLUMES, WireError};

/// The source asks for a VM's stream: which journal, whose numbers, from where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Open {
    /// Features that the source can use, a bit each. The grant names those of them that the stream uses.
    pub features_offered: u64,
    /// Those of the offered that the source can't do without: a target that lacks one refuses.
    pub features_required: u64,
    /// The VM.
    pub vm: VmId,
    /// Its group.
    pub vpg: VpgId,
    /// The journal that the VM's definition names.
    pub journal: JournalId,
    /// The generation of the numbers that follow.
    pub generation: GenerationId,
    /// Generations that this one continues, newest first, back to the last one that the target is known to have granted (A5).
    pub ancestors: Vec<GenerationId>,
    /// First sequence number of the generation, above zero.
    pub first_seq: u64,
    /// The VM's volumes: 1 to [`MAX_VOLUMES`], numbered from 0 without gaps.
    pub volumes: Vec<VolumeShape>,
}

/// What the target must know of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VolumeShape {
    /// Its number within the VM.
    pub volume: u16,
    /// Its id.
    pub id: VolumeId,
    /// Size of its logical blocks, 512 or 4096 bytes.
    pub logical_block_bytes: u32,
    /// Its size in bytes, a multiple of the logical block size.
    pub size_bytes: u64,
    /// It is protected no more: what the stream says of it is that it reads zeroes.
    pub left: bool,
}

impl VolumeShape {
    /// Whether the same disk may become this: it may leave, or grow as long as it is protected (E3).
    pub fn may_become(&self, wanted: &Self) -> bool {
        let (left, size_bytes) = (wanted.left, wanted.size_bytes);
        Self { left, size_bytes, ..*self } == *wanted
            && self.left <= left
            && (self.size_bytes == size_bytes || self.size_bytes < size_bytes && !left)
    }
}

impl Open {
    /// The frame's bytes. The lists must be within their bounds.
    pub fn encode(&self) -> Vec<u8> {
        debug_assert!(self.ancestors.len() <= MAX_ANCESTORS && self.volumes.len() <= MAX_VOLUMES);
        let len_bytes =
            FIXED_BYTES + self.ancestors.len() * 16 + self.volumes.len() * size_of::<VolumeLayout>();
        let fixed = OpenLayout {
            features_offered: self.features_offered.into(),
            features_required: self.features_required.into(),
            vm: *self.vm.0.as_bytes(),
            vpg: *self.vpg.0.as_bytes(),
            journal: *self.journal.0.as_bytes(),
            generation: *self.generation.0.as_bytes(),
            first_seq: self.first_seq.into(),
            ancestor_count: (self.ancestors.len() as u16).into(),
            volume_count: (self.volumes.len() as u16).into(),
            reserved: 0.into(),
        };
        let mut bytes = Vec::with_capacity(len_bytes);
        bytes.extend_from_slice(Header::new(FrameKind::Open, len_bytes).as_bytes());
        bytes.extend_from_slice(fixed.as_bytes());
        for ancestor in &self.ancestors {
            bytes.extend_from_slice(ancestor.0.as_bytes());
        }
        for volume in &self.volumes {
            let layout = VolumeLayout {
                id: *volume.id.0.as_bytes(),
                size_bytes: volume.size_bytes.into(),
                logical_block_bytes: volume.logical_block_bytes.into(),
                volume: volume.volume.into(),
                flags: (if volume.left { VOLUME_LEFT } else { 0 }).into(),
            };
            bytes.extend_from_slice(layout.as_bytes());
        }
        bytes
    }

    pub(super) fn parse_body(body: &[u8]) -> Result<Self, WireError> {
        let field = |field, found| WireError::Field { frame: "open", field, found };
        let length =
            |expected| WireError::Length { frame: "open", found: body.len() + FRAME_HEADER_BYTES, expected };
        let (fixed, lists) = OpenLayout::ref_from_prefix(body).map_err(|_| length(FIXED_BYTES))?;
        let ancestor_count = usize::from(fixed.ancestor_count.get());
        let volume_count = usize::from(fixed.volume_count.get());
        if ancestor_count > MAX_ANCESTORS {
            return Err(field("ancestor count", ancestor_count as u64));
        }
        if volume_count == 0 || volume_count > MAX_VOLUMES {
            return Err(field("volume count", volume_count as u64));
        }
        if fixed.reserved.get() != 0 {
            return Err(field("reserved", fixed.reserved.get().into()));
        }
        if fixed.first_seq.get() == 0 {
            return Err(field("first sequence number", 0));
        }
        let missing = fixed.features_required.get() & !fixed.features_offered.get();
        if missing != 0 {
            return Err(field("features required but not offered", missing));
        }
        let expected = FIXED_BYTES + ancestor_count * 16 + volume_count * size_of::<VolumeLayout>();
        let (ancestors, volumes) =
            <[[u8; 16]]>::ref_from_prefix_with_elems(lists, ancestor_count).map_err(|_| length(expected))?;
        let volumes = <[VolumeLayout]>::ref_from_bytes_with_elems(volumes, volume_count)
            .map_err(|_| length(expected))?;
        let volumes = volumes.iter().enumerate().map(|(index, volume)| volume.parse(index));
        Ok(Self {
            features_offered: fixed.features_offered.get(),
            features_required: fixed.features_required.get(),
            vm: VmId(Uuid::from_bytes(fixed.vm)),
            vpg: VpgId(Uuid::from_bytes(fixed.vpg)),
            journal: JournalId(Uuid::from_bytes(fixed.journal)),
            generation: GenerationId(Uuid::from_bytes(fixed.generation)),
            ancestors: ancestors.iter().map(|id| GenerationId(Uuid::from_bytes(*id))).collect(),
            first_seq: fixed.first_seq.get(),
            volumes: volumes.collect::<Result<_, _>>()?,
        })
    }
}

/// The fixed part of an open frame after the header, 96 bytes; then the ancestors, 16 bytes each, and the volumes.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct OpenLayout {
    /// [`Open::features_offered`].
    features_offered: U64,
    /// [`Open::features_required`].
    features_required: U64,
    /// [`Open::vm`].
    vm: [u8; 16],
    /// [`Open::vpg`].
    vpg: [u8; 16],
    /// [`Open::journal`].
    journal: [u8; 16],
    /// [`Open::generation`].
    generation: [u8; 16],
    /// [`Open::first_seq`].
    first_seq: U64,
    /// How many ancestors follow, at most [`MAX_ANCESTORS`].
    ancestor_count: U16,
    /// How many volumes follow them, 1 to [`MAX_VOLUMES`].
    volume_count: U16,
    /// Zero.
    reserved: U32,
}

/// A volume in an open frame, 32 bytes.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct VolumeLayout {
    /// [`VolumeShape::id`].
    id: [u8; 16],
    /// [`VolumeShape::size_bytes`].
    size_bytes: U64,
    /// [`VolumeShape::logical_block_bytes`].
    logical_block_bytes: U32,
    /// [`VolumeShape::volume`]: its place in the list.
    volume: U16,
    /// [`VOLUME_LEFT`]; other bits are zero.
    flags: U16,
}

/// [`VolumeShape::left`].
const VOLUME_LEFT: u16 = 1;

const FIXED_BYTES: usize = FRAME_HEADER_BYTES + size_of::<OpenLayout>();

const _: () = assert!(size_of::<OpenLayout>() == 96);
const _: () = assert!(std::mem::offset_of!(OpenLayout, first_seq) == 80);
const _: () = assert!(std::mem::offset_of!(OpenLayout, ancestor_count) == 88);
const _: () = assert!(size_of::<VolumeLayout>() == 32);
const _: () = assert!(std::mem::offset_of!(VolumeLayout, volume) == 28);
const _: () = assert!(FIXED_BYTES + MAX_ANCESTORS * 16 + MAX_VOLUMES * 32 <= MAX_FRAME_BYTES);

impl VolumeLayout {
    fn parse(&self, index: usize) -> Result<VolumeShape, WireError> {
        let field = |field, found| WireError::Field { frame: "open", field, found };
        let logical_block_bytes = self.logical_block_bytes.get();
        if logical_block_bytes != 512 && logical_block_bytes != 4096 {
            return Err(field("logical block size", logical_block_bytes.into()));
        }
        let size_bytes = self.size_bytes.get();
        if size_bytes == 0 || !size_bytes.is_multiple_of(logical_block_bytes.into()) {
            return Err(field("volume size", size_bytes));
        }
        if usize::from(self.volume.get()) != index {
            return Err(field("volume number", self.volume.get().into()));
        }
        if self.flags.get() & !VOLUME_LEFT != 0 {
            return Err(field("volume flags", self.flags.get().into()));
        }
        Ok(VolumeShape {
            volume: self.volume.get(),
            id: VolumeId(Uuid::from_bytes(self.id)),
            logical_block_bytes,
            size_bytes,
            left: self.flags.get() & VOLUME_LEFT != 0,
        })
    }
}
