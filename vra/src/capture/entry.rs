//! One number of a VM's stream, as the source retains it until the target holds it durably.

use bytes::Bytes;
use journal::batch::{Record, RecordKind};

use super::payload::Piece;

/// A numbered change, or a mark in the order of changes.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Its place in the VM's order; never zero.
    pub seq: u64,
    /// When it was numbered, in µs since the Unix epoch; never decreases within a VM.
    pub time_us: u64,
    /// The volume's number within the VM; zero where the kind has none.
    pub volume: u16,
    /// What it is.
    pub kind: RecordKind,
    /// Start of the range in bytes; zero where the kind has none.
    pub offset_bytes: u64,
    /// Length of the range, or the volume's size, in bytes, as [`RecordKind`] says.
    pub len_bytes: u64,
    /// The sync that it belongs to, or zero.
    pub sync_id: u64,
    /// What it carries.
    pub payload: Payload,
}

impl Entry {
    /// An entry without place and payload; number and time come with its publication.
    pub fn control(kind: RecordKind) -> Self {
        Self {
            seq: 0,
            time_us: 0,
            volume: 0,
            kind,
            offset_bytes: 0,
            len_bytes: 0,
            sync_id: 0,
            payload: Payload::None,
        }
    }

    /// As a record for the stream, sharing the payload. Allocates, so never on the guest's path.
    pub fn to_record(&self) -> Record {
        Record {
            seq: self.seq,
            time_us: self.time_us,
            volume: self.volume,
            kind: self.kind,
            offset_bytes: self.offset_bytes,
            len_bytes: self.len_bytes,
            sync_id: self.sync_id,
            argument: 0,
            payload: self.payload.to_bytes(),
        }
    }
}

/// What an entry carries.
#[derive(Clone, Debug)]
pub enum Payload {
    /// Nothing.
    None,
    /// Data in preallocated memory.
    Piece(Piece),
    /// A control record's body.
    Body(Bytes),
}

impl Payload {
    /// How much it carries, in bytes.
    pub fn len_bytes(&self) -> usize {
        match self {
            Self::None => 0,
            Self::Piece(piece) => piece.as_ref().len(),
            Self::Body(body) => body.len(),
        }
    }

    /// Memory that the payload keeps, in bytes.
    pub fn kept_bytes(&self) -> u64 {
        match self {
            Self::None => 0,
            Self::Piece(piece) => u64::from(piece.kept_bytes()),
            Self::Body(body) => body.len() as u64,
        }
    }

    /// A handle for the stream. Allocates.
    pub fn to_bytes(&self) -> Bytes {
        match self {
            Self::None => Bytes::new(),
            Self::Piece(piece) => piece.to_bytes(),
            Self::Body(body) => body.clone(),
        }
    }
}
