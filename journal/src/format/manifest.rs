//! The manifest: what the VM and its group are, as JSON text, so that a recovery needs nothing but the datastore.
//! This crate keeps the text and doesn't look into it.

use std::mem::{offset_of, size_of};

use uuid::Uuid;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{FORMAT_VERSION, MANIFEST_SLOT_BYTES, PAGE_BYTES};

/// First eight bytes of a manifest slot.
pub const MANIFEST_MAGIC: [u8; 8] = *b"HFMANIFS";
/// Longest text, in bytes.
pub const MAX_MANIFEST_BYTES: usize = MANIFEST_SLOT_BYTES - size_of::<ManifestHeader>();

/// What a manifest slot holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// The journal it describes.
    pub journal_id: Uuid,
    /// Goes up with each change: without superblocks, the higher valid one counts.
    pub sequence: u64,
    /// JSON.
    pub text: String,
}

/// Why bytes are not a manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum ManifestError {
    /// The slot doesn't begin as a manifest does.
    #[error("no manifest is here")]
    Magic,
    /// A newer format.
    #[error("manifest version {0} is not known: a newer release wrote it")]
    Version(u32),
    /// The length is out of bounds.
    #[error("the manifest's length {0} is out of bounds")]
    Length(u32),
    /// The checksum is wrong.
    #[error("the manifest's checksum is wrong")]
    Crc,
    /// The text isn't UTF-8.
    #[error("the manifest is not UTF-8")]
    Text,
}

impl Manifest {
    /// The bytes to write at a manifest slot's start, a multiple of [`PAGE_BYTES`], and their CRC.
    ///
    /// # Errors
    /// The text is longer than [`MAX_MANIFEST_BYTES`].
    pub fn encode(&self) -> Result<(Vec<u8>, u32), ManifestError> {
        if self.text.len() > MAX_MANIFEST_BYTES {
            return Err(ManifestError::Length(u32::try_from(self.text.len()).unwrap_or(u32::MAX)));
        }
        let mut header = ManifestHeader {
            magic: MANIFEST_MAGIC,
            version: FORMAT_VERSION.into(),
            crc: 0.into(),
            journal_id: *self.journal_id.as_bytes(),
            sequence: self.sequence.into(),
            text_len_bytes: (self.text.len() as u32).into(),
            reserved: [0; 20],
        };
        let crc = crc32c::crc32c_append(crc32c::crc32c(header.as_bytes()), self.text.as_bytes());
        header.crc = crc.into();
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend_from_slice(self.text.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(PAGE_BYTES), 0);
        Ok((bytes, crc))
    }

    /// Reads a manifest slot; also gives its CRC.
    ///
    /// # Errors
    /// The bytes don't begin with a valid manifest.
    pub fn decode(bytes: &[u8]) -> Result<(Self, u32), ManifestError> {
        let (header, rest) = ManifestHeader::ref_from_prefix(bytes).map_err(|_| ManifestError::Magic)?;
        if header.magic != MANIFEST_MAGIC {
            return Err(ManifestError::Magic);
        }
        if header.version.get() != FORMAT_VERSION {
            return Err(ManifestError::Version(header.version.get()));
        }
        let len_bytes = header.text_len_bytes.get();
        let text = rest.get(..len_bytes as usize).ok_or(ManifestError::Length(len_bytes))?;
        let without_crc = ManifestHeader { crc: 0.into(), ..*header };
        let crc = crc32c::crc32c_append(crc32c::crc32c(without_crc.as_bytes()), text);
        if crc != header.crc.get() {
            return Err(ManifestError::Crc);
        }
        let manifest = Self {
            journal_id: Uuid::from_bytes(header.journal_id),
            sequence: header.sequence.get(),
            text: std::str::from_utf8(text).map_err(|_| ManifestError::Text)?.to_owned(),
        };
        Ok((manifest, crc))
    }
}

/// The first 64 bytes of a manifest slot; the text follows.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct ManifestHeader {
    /// [`MANIFEST_MAGIC`].
    magic: [u8; 8],
    /// [`FORMAT_VERSION`].
    version: U32,
    /// CRC32C of this header, with this field zero, and the text.
    crc: U32,
    /// [`Manifest::journal_id`].
    journal_id: [u8; 16],
    /// [`Manifest::sequence`].
    sequence: U64,
    /// Length of the text, in bytes.
    text_len_bytes: U32,
    /// Zero.
    reserved: [u8; 20],
}

const _: () = {
    assert!(size_of::<ManifestHeader>() == 64);
    assert!(offset_of!(ManifestHeader, crc) == 12);
};
