//! A batch: the one format for wire, spill and journal file (`docs/journal-format.md`, "Batch").
//!
//! A batch is `BatchHeader`, one [`RecordHeader`] for each record, a table with one CRC32C for each 4 KiB of each
//! payload, then the payloads, each starting at a multiple of 512 bytes; zero padded to a multiple of 4 KiB. It is
//! immutable once sealed: the target appends the bytes that it received.

mod checkpoint;
mod layout;
mod sealer;
mod view;

use bytes::Bytes;
use uuid::Uuid;

pub use checkpoint::{Checkpoint, CheckpointError, CheckpointKind, Epoch, MAX_TAG_BYTES};
pub use layout::{BATCH_MAGIC, BATCH_VERSION, BatchHeader, FLAG_LOCAL, RecordHeader};
pub use sealer::{BatchSealer, PushError, SealedBatch};
pub use view::{BatchError, BatchView, RecordView};

/// Longest batch, in bytes.
pub const MAX_BATCH_BYTES: usize = 4 << 20;
/// Longest payload of one record, in bytes. Longer guest writes are several records.
pub const MAX_RECORD_PAYLOAD: usize = 1 << 20;
/// Most records in one batch.
pub const MAX_RECORDS: usize = 16384;
/// Most volumes of one VM; volumes are numbered from 0.
pub const MAX_VOLUMES: usize = 64;
/// A batch's length is a multiple of it, in bytes.
pub const BATCH_ALIGN_BYTES: usize = 4096;
/// A payload starts at a multiple of it inside its batch, in bytes; guest data has a multiple of it as length.
pub const PAYLOAD_ALIGN_BYTES: usize = 512;
/// Each payload has one CRC32C for each piece of this length, counted from the payload's start; the last may be shorter.
pub const CRC_UNIT_BYTES: usize = 4096;
/// Highest end of a record's range on its volume, in bytes (2^60): keeps all sums of places and lengths in range.
pub const MAX_VOLUME_BYTES: u64 = 1 << 60;

/// What a record says. The number is the byte in [`RecordHeader::kind`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum RecordKind {
    /// The guest wrote the payload. `len_bytes` is the payload's length.
    Write = 1,
    /// The range reads zeroes from now on: write-zeroes or discard (E2). With a `sync_id` it is a hole that a sync found.
    Zeroes = 2,
    /// A number that was taken and never used (A2). Volume, place and length are zero.
    Void = 3,
    /// A [`Checkpoint`] in the payload.
    Checkpoint = 4,
    /// A sync of the volume begins; `sync_id` names it. `len_bytes` is the volume's size.
    SyncBegin = 5,
    /// What a sync read from the source's disk. `len_bytes` is the payload's length.
    SyncData = 6,
    /// The sync named by `sync_id` is complete on this volume. `len_bytes` is the volume's size. It is the last record of
    /// its batch, so that a base moves exactly to it however often batches are sent again, and no view of the numbers
    /// right after it finds later records on a recovery disk (B6).
    SyncEnd = 7,
    /// A digest of the range in the payload, to be compared by the target.
    VerifyDigest = 8,
    /// The volume has `len_bytes` from now on (E3).
    Resize = 9,
    /// Made by the target, without a number: promotion through `argument` begins (C2).
    PromotionIntent = 10,
    /// The source writes no more in this generation. The payload is empty or the next generation's id (16 bytes).
    EndOfGeneration = 11,
}

impl RecordKind {
    /// The kind with this number.
    pub const fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::Write,
            2 => Self::Zeroes,
            3 => Self::Void,
            4 => Self::Checkpoint,
            5 => Self::SyncBegin,
            6 => Self::SyncData,
            7 => Self::SyncEnd,
            8 => Self::VerifyDigest,
            9 => Self::Resize,
            10 => Self::PromotionIntent,
            11 => Self::EndOfGeneration,
            _ => return None,
        })
    }

    /// Whether the record changes what its range reads.
    pub const fn changes_data(self) -> bool {
        matches!(self, Self::Write | Self::Zeroes | Self::SyncData)
    }

    /// Whether the target makes it: such records have number 0 and live in batches with [`FLAG_LOCAL`].
    pub const fn is_local(self) -> bool {
        matches!(self, Self::PromotionIntent)
    }
}

/// One record, owning its payload's handle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Sequence number in the VM's stream; 0 for records that the target makes.
    pub seq: u64,
    /// When the source took it in, µs since the Unix epoch.
    pub time_us: u64,
    /// Volume of the VM, below [`MAX_VOLUMES`]; 0 where the kind has none.
    pub volume: u16,
    /// What it says.
    pub kind: RecordKind,
    /// Place on the volume, in bytes, a multiple of 512; 0 where the kind has none.
    pub offset_bytes: u64,
    /// Length of the range on the volume, in bytes, or the volume's size, as [`RecordKind`] says.
    pub len_bytes: u64,
    /// The sync that it belongs to, or 0.
    pub sync_id: u64,
    /// A number whose meaning the kind gives; 0 where it gives none.
    pub argument: u64,
    /// Data, checkpoint, digest; empty where the kind has none.
    pub payload: Bytes,
}

impl Record {
    /// A guest's write.
    pub fn write(seq: u64, time_us: u64, volume: u16, offset_bytes: u64, payload: Bytes) -> Self {
        let len_bytes = payload.len() as u64;
        Self { volume, offset_bytes, len_bytes, payload, ..Self::plain(seq, time_us, RecordKind::Write) }
    }

    /// A range that reads zeroes from now on.
    pub fn zeroes(seq: u64, time_us: u64, volume: u16, offset_bytes: u64, len_bytes: u64) -> Self {
        Self { volume, offset_bytes, len_bytes, ..Self::plain(seq, time_us, RecordKind::Zeroes) }
    }

    /// A number without a write (A2).
    pub fn void(seq: u64, time_us: u64) -> Self {
        Self::plain(seq, time_us, RecordKind::Void)
    }

    /// A checkpoint.
    pub fn checkpoint(seq: u64, time_us: u64, checkpoint: &Checkpoint) -> Self {
        Self { payload: checkpoint.encode(), ..Self::plain(seq, time_us, RecordKind::Checkpoint) }
    }

    /// A volume's sync begins.
    pub fn sync_begin(seq: u64, time_us: u64, volume: u16, size_bytes: u64, sync_id: u64) -> Self {
        let len_bytes = size_bytes;
        Self { volume, len_bytes, sync_id, ..Self::plain(seq, time_us, RecordKind::SyncBegin) }
    }

    /// Data that a sync read.
    pub fn sync_data(
        seq: u64,
        time_us: u64,
        volume: u16,
        offset_bytes: u64,
        sync_id: u64,
        payload: Bytes,
    ) -> Self {
        let len_bytes = payload.len() as u64;
        let kind = RecordKind::SyncData;
        Self { volume, offset_bytes, len_bytes, sync_id, payload, ..Self::plain(seq, time_us, kind) }
    }

    /// A volume's sync is complete.
    pub fn sync_end(seq: u64, time_us: u64, volume: u16, size_bytes: u64, sync_id: u64) -> Self {
        let len_bytes = size_bytes;
        Self { volume, len_bytes, sync_id, ..Self::plain(seq, time_us, RecordKind::SyncEnd) }
    }

    /// A volume's new size.
    pub fn resize(seq: u64, time_us: u64, volume: u16, size_bytes: u64) -> Self {
        Self { volume, len_bytes: size_bytes, ..Self::plain(seq, time_us, RecordKind::Resize) }
    }

    /// The last record of its generation.
    pub fn end_of_generation(seq: u64, time_us: u64, next: Option<Uuid>) -> Self {
        let payload = next.map_or_else(Bytes::new, |id| Bytes::copy_from_slice(id.as_bytes()));
        Self { payload, ..Self::plain(seq, time_us, RecordKind::EndOfGeneration) }
    }

    /// The target's own note that promotion through `through_seq` begins (C2).
    pub fn promotion_intent(time_us: u64, through_seq: u64) -> Self {
        Self { argument: through_seq, ..Self::plain(0, time_us, RecordKind::PromotionIntent) }
    }

    fn plain(seq: u64, time_us: u64, kind: RecordKind) -> Self {
        Self {
            seq,
            time_us,
            volume: 0,
            kind,
            offset_bytes: 0,
            len_bytes: 0,
            sync_id: 0,
            argument: 0,
            payload: Bytes::new(),
        }
    }
}

/// What binds a batch to its place: which journal, who owns it, which opening of the file, and what came before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BatchLink {
    /// The journal it is for.
    pub journal_id: Uuid,
    /// The source's generation (A5).
    pub generation: Uuid,
    /// The target's count of openings of the journal, as granted with the stream (C1).
    pub open_count: u64,
    /// CRC of the stream's batch before it ([`SealedBatch::crc`]), or the one granted with the stream.
    pub prev_batch_crc: u32,
}

/// CRC32C of each [`CRC_UNIT_BYTES`] of a payload.
pub fn unit_crcs(payload: &[u8]) -> impl ExactSizeIterator<Item = u32> + '_ {
    payload.chunks(CRC_UNIT_BYTES).map(crc32c::crc32c)
}

/// Whether one unit of a payload is what its CRC says: at most [`CRC_UNIT_BYTES`], starting at a multiple of it.
pub fn unit_matches(unit: &[u8], crc: u32) -> bool {
    crc32c::crc32c(unit) == crc
}

/// How many units, and so CRCs, a payload of this length has.
pub const fn unit_count(payload_len_bytes: usize) -> usize {
    payload_len_bytes.div_ceil(CRC_UNIT_BYTES)
}

/// What is wrong with a record by itself, whatever batch it is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum RecordError {
    /// The kind's number is unknown.
    #[error("kind {0} is unknown")]
    Kind(u8),
    /// Volumes are numbered below [`MAX_VOLUMES`].
    #[error("volume {0} is above the limit of {MAX_VOLUMES} volumes")]
    Volume(u16),
    /// Place or length is not a multiple of 512, or the range ends above [`MAX_VOLUME_BYTES`], or it is empty.
    #[error("range at {offset_bytes} of {len_bytes} bytes is empty, unaligned or out of bounds")]
    Range {
        /// Place.
        offset_bytes: u64,
        /// Length.
        len_bytes: u64,
    },
    /// The payload's length doesn't fit the kind.
    #[error("payload of {0} bytes doesn't fit the kind of record")]
    Payload(usize),
    /// A field that the kind doesn't use isn't zero, or a sync record has no sync id.
    #[error("a field has a value that the kind of record doesn't have")]
    Field,
    /// The payload is no checkpoint.
    #[error("the checkpoint is malformed")]
    Checkpoint(#[source] CheckpointError),
}

/// Checks what can be known of a record by itself. The payload is looked into only for checkpoints.
pub(crate) fn check_record(
    header: &RecordHeader,
    payload: &[u8],
) -> Result<(RecordKind, Option<Checkpoint>), RecordError> {
    let kind = RecordKind::from_number(header.kind).ok_or(RecordError::Kind(header.kind))?;
    let volume = header.volume.get();
    if usize::from(volume) >= MAX_VOLUMES {
        return Err(RecordError::Volume(volume));
    }
    let (offset_bytes, len_bytes) = (header.offset_bytes.get(), header.len_bytes.get());
    let range_ok = len_bytes > 0
        && offset_bytes.is_multiple_of(PAYLOAD_ALIGN_BYTES as u64)
        && len_bytes.is_multiple_of(PAYLOAD_ALIGN_BYTES as u64)
        && offset_bytes.checked_add(len_bytes).is_some_and(|end| end <= MAX_VOLUME_BYTES);
    let range = if range_ok { Ok(()) } else { Err(RecordError::Range { offset_bytes, len_bytes }) };
    let has_payload = |wanted: bool| if wanted { Ok(()) } else { Err(RecordError::Payload(payload.len())) };
    let field = |wanted: bool| if wanted { Ok(()) } else { Err(RecordError::Field) };
    let sync_id = header.sync_id.get();
    let no_place = volume == 0 && offset_bytes == 0 && len_bytes == 0;
    field(header.flags == 0)?;
    field(kind == RecordKind::PromotionIntent || header.argument.get() == 0)?;
    has_payload(payload.len() <= MAX_RECORD_PAYLOAD)?;
    let mut checkpoint = None;
    match kind {
        RecordKind::Write | RecordKind::SyncData => {
            range?;
            field((kind == RecordKind::SyncData) == (sync_id != 0))?;
            has_payload(payload.len() as u64 == len_bytes)?;
        }
        RecordKind::Zeroes => {
            range?;
            has_payload(payload.is_empty())?;
        }
        RecordKind::Void | RecordKind::PromotionIntent => {
            field(no_place && sync_id == 0)?;
            has_payload(payload.is_empty())?;
        }
        RecordKind::Checkpoint => {
            field(no_place && sync_id == 0)?;
            checkpoint = Some(Checkpoint::decode(payload).map_err(RecordError::Checkpoint)?);
        }
        RecordKind::SyncBegin | RecordKind::SyncEnd => {
            range?;
            field(offset_bytes == 0 && sync_id != 0)?;
            has_payload(payload.is_empty())?;
        }
        RecordKind::VerifyDigest => {
            range?;
            has_payload(!payload.is_empty())?;
        }
        RecordKind::Resize => {
            range?;
            field(offset_bytes == 0 && sync_id == 0)?;
            has_payload(payload.is_empty())?;
        }
        RecordKind::EndOfGeneration => {
            field(no_place && sync_id == 0)?;
            has_payload(payload.is_empty() || payload.len() == 16)?;
        }
    }
    Ok((kind, checkpoint))
}
