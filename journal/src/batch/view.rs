//! Reads batches from untrusted bytes.

use bytes::Bytes;
use uuid::Uuid;
use zerocopy::FromBytes;
use zerocopy::IntoBytes;
use zerocopy::little_endian::U32;

use crate::planted::{Bug, planted};

use super::layout::{BatchHeader, FLAG_LOCAL, RecordHeader};
use super::{
    BATCH_ALIGN_BYTES, BATCH_VERSION, BatchLink, Checkpoint, PAYLOAD_ALIGN_BYTES, Record, RecordError,
    RecordKind, check_record, unit_count, unit_crcs,
};

/// A valid batch: everything was checked once, by [`BatchView::parse`].
#[derive(Clone, Copy, Debug)]
pub struct BatchView<'a> {
    bytes: &'a [u8],
    header: &'a BatchHeader,
    records: &'a [RecordHeader],
    crcs: &'a [U32],
}

/// Why bytes are not a valid batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum BatchError {
    /// The bytes don't begin as a batch does.
    #[error("no batch begins here")]
    Magic,
    /// A newer format.
    #[error("batch format version {0} is not known, only {BATCH_VERSION}: a newer release wrote it")]
    Version(u16),
    /// A field of the header is out of bounds.
    #[error("the batch header is malformed")]
    Header,
    /// The batch's length is out of bounds or unaligned.
    #[error("a batch cannot have {0} bytes")]
    Length(usize),
    /// The bytes end before the batch does.
    #[error("the batch has {needed_bytes} bytes, of which {given_bytes} are there")]
    Short {
        /// The batch's length.
        needed_bytes: usize,
        /// How many there are.
        given_bytes: usize,
    },
    /// The head's checksum is wrong: no field of it can be believed.
    #[error(
        "checksum of the head of the batch that claims to begin with record {claimed_first_seq} is wrong"
    )]
    HeadCrc {
        /// What the damaged header says.
        claimed_first_seq: u64,
    },
    /// Records aren't numbered from first to last.
    #[error("record {found_seq} stands where record {expected_seq} belongs")]
    Order {
        /// The number that belongs there.
        expected_seq: u64,
        /// The number found.
        found_seq: u64,
    },
    /// A sync end isn't the last record of its batch.
    #[error("record {seq} ends a sync, but its batch goes on")]
    SyncEndNotLast {
        /// The record.
        seq: u64,
    },
    /// Payloads aren't packed in the order of the records.
    #[error("the payload of record {seq} is not at its place")]
    Place {
        /// The record.
        seq: u64,
    },
    /// A record is malformed.
    #[error("record {seq} is malformed")]
    Record {
        /// The record.
        seq: u64,
        /// Why.
        source: RecordError,
    },
    /// A payload's checksum is wrong.
    #[error("checksum of record {seq} is wrong in its 4 KiB unit {unit}")]
    PayloadCrc {
        /// The record.
        seq: u64,
        /// Which unit, counted from the payload's start.
        unit: usize,
    },
}

impl<'a> BatchView<'a> {
    /// Checks the batch that `bytes` begin with: header, records, their order and places, and all checksums.
    ///
    /// # Errors
    /// What is wrong, with the record's number where one is to blame.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, BatchError> {
        let view = Self::parse_head(bytes)?;
        let needed_bytes = view.len_bytes();
        if bytes.len() < needed_bytes {
            return Err(BatchError::Short { needed_bytes, given_bytes: bytes.len() });
        }
        for record in view.records() {
            record.check()?;
            // A checkpoint's payload could not be looked into before its bytes were known to be there.
            check_record(record.header, record.payload)
                .map_err(|source| BatchError::Record { seq: record.seq(), source })?;
        }
        Ok(view)
    }

    /// Like [`Self::parse`], but goes on behind damaged payloads and gives all that is damaged: for tools that say what can
    /// still be read. A damaged checkpoint must not be looked into.
    ///
    /// # Errors
    /// What is wrong with the head, which leaves nothing to go by.
    pub fn parse_damaged(bytes: &'a [u8]) -> Result<(Self, Vec<BatchError>), BatchError> {
        let view = Self::parse_head(bytes)?;
        let needed_bytes = view.len_bytes();
        if bytes.len() < needed_bytes {
            return Err(BatchError::Short { needed_bytes, given_bytes: bytes.len() });
        }
        let mut damage = Vec::new();
        for record in view.records() {
            let units = unit_crcs(record.payload).zip(record.crcs()).enumerate();
            let wrong = units.filter(|(_, (found, expected))| found != expected);
            let before = damage.len();
            damage.extend(wrong.map(|(unit, _)| BatchError::PayloadCrc { seq: record.seq(), unit }));
            match check_record(record.header, record.payload) {
                Err(RecordError::Checkpoint(_)) if damage.len() > before => {}
                Err(source) => return Err(BatchError::Record { seq: record.seq(), source }),
                Ok(_) => {}
            }
        }
        Ok((view, damage))
    }

    /// Like [`Self::parse`], but without looking at the payloads, which need not even be there: for batches that were
    /// parsed before.
    pub(crate) fn parse_head(bytes: &'a [u8]) -> Result<Self, BatchError> {
        let short = |needed_bytes| BatchError::Short { needed_bytes, given_bytes: bytes.len() };
        let (header, rest) = BatchHeader::ref_from_prefix(bytes)
            .map_err(|_| short(BatchHeader::needed(bytes).unwrap_or(0)))?;
        header.check_bounds()?;
        let total_len_bytes = header.total_len_bytes.get() as usize;
        let head_len_bytes = header.head_len_bytes();
        if bytes.len() < head_len_bytes {
            return Err(short(total_len_bytes));
        }
        let (records, rest) =
            <[RecordHeader]>::ref_from_prefix_with_elems(rest, header.record_count.get() as usize)
                .map_err(|_| BatchError::Header)?;
        let (crcs, _) = <[U32]>::ref_from_prefix_with_elems(rest, header.crc_count.get() as usize)
            .map_err(|_| BatchError::Header)?;
        if head_crc(header, &bytes[BatchHeader::LEN..head_len_bytes]) != header.crc.get() {
            return Err(BatchError::HeadCrc { claimed_first_seq: header.first_seq.get() });
        }
        let view = Self { bytes, header, records, crcs };
        view.check_numbers()?;
        view.check_places()?;
        Ok(view)
    }

    fn check_numbers(&self) -> Result<(), BatchError> {
        let (first_seq, last_seq) = (self.first_seq(), self.last_seq());
        let span = if self.is_local() { 0 } else { self.records.len() as u64 - 1 };
        if first_seq.checked_add(span) != Some(last_seq) {
            return Err(BatchError::Order {
                expected_seq: first_seq.saturating_add(span),
                found_seq: last_seq,
            });
        }
        if !self.is_local() && (first_seq == 0 || last_seq == u64::MAX) {
            return Err(BatchError::Header);
        }
        for (index, record) in self.records.iter().enumerate() {
            let expected_seq = if self.is_local() { 0 } else { first_seq + index as u64 };
            if record.seq.get() != expected_seq {
                return Err(BatchError::Order { expected_seq, found_seq: record.seq.get() });
            }
            let ends_sync = record.kind == RecordKind::SyncEnd as u8;
            if ends_sync && index + 1 != self.records.len() && !planted(Bug::SyncEndInsideBatch) {
                return Err(BatchError::SyncEndNotLast { seq: expected_seq });
            }
            let local = RecordKind::from_number(record.kind).is_some_and(RecordKind::is_local);
            if local != self.is_local() {
                let source = RecordError::Kind(record.kind);
                return Err(BatchError::Record { seq: expected_seq, source });
            }
        }
        Ok(())
    }

    fn check_places(&self) -> Result<(), BatchError> {
        let mut end_bytes = self.header.payload_offset_bytes.get() as usize;
        let mut crc_index = 0;
        for record in self.records {
            let place = (record.payload_offset_bytes.get() as usize, record.first_crc.get() as usize);
            let len_bytes = record.payload_len_bytes.get() as usize;
            let expected = if len_bytes == 0 { (0, 0) } else { (end_bytes, crc_index) };
            end_bytes += len_bytes.next_multiple_of(PAYLOAD_ALIGN_BYTES);
            crc_index += unit_count(len_bytes);
            if place != expected || end_bytes > self.len_bytes() || crc_index > self.crcs.len() {
                return Err(BatchError::Place { seq: record.seq.get() });
            }
        }
        if crc_index != self.crcs.len() {
            return Err(BatchError::Header);
        }
        if end_bytes.next_multiple_of(BATCH_ALIGN_BYTES) != self.len_bytes() {
            return Err(BatchError::Length(self.len_bytes()));
        }
        Ok(())
    }

    /// Length of the batch, in bytes; the bytes given to [`Self::parse`] may have been more.
    pub fn len_bytes(&self) -> usize {
        self.header.total_len_bytes.get() as usize
    }

    /// The batch's own bytes.
    pub fn bytes(&self) -> &'a [u8] {
        &self.bytes[..self.len_bytes()]
    }

    /// What binds it to its place.
    pub fn link(&self) -> BatchLink {
        BatchLink {
            journal_id: Uuid::from_bytes(self.header.journal_id),
            generation: Uuid::from_bytes(self.header.generation),
            open_count: self.header.open_count.get(),
            prev_batch_crc: self.header.prev_batch_crc.get(),
        }
    }

    /// Number of the first record; in a local batch, of the stream's record before it.
    pub fn first_seq(&self) -> u64 {
        self.header.first_seq.get()
    }

    /// Number of the last record; in a local batch, of the stream's record before it.
    pub fn last_seq(&self) -> u64 {
        self.header.last_seq.get()
    }

    /// The CRC that the next batch carries as its predecessor's.
    pub fn crc(&self) -> u32 {
        self.header.crc.get()
    }

    /// Whether the target made it ([`FLAG_LOCAL`]).
    pub fn is_local(&self) -> bool {
        self.header.flags.get() & FLAG_LOCAL != 0
    }

    /// How many records it has, at least one.
    pub fn record_count(&self) -> usize {
        self.records.len()
    }

    /// The records in order.
    pub fn records(&self) -> impl ExactSizeIterator<Item = RecordView<'a>> + use<'a> {
        let Self { bytes, crcs, .. } = *self;
        self.records.iter().map(move |header| {
            let start = header.payload_offset_bytes.get() as usize;
            let len_bytes = header.payload_len_bytes.get() as usize;
            let first_crc = header.first_crc.get() as usize;
            RecordView {
                header,
                payload: &bytes[start..start + len_bytes],
                crcs: &crcs[first_crc..first_crc + unit_count(len_bytes)],
            }
        })
    }
}

/// One record of a valid batch.
#[derive(Clone, Copy, Debug)]
pub struct RecordView<'a> {
    header: &'a RecordHeader,
    payload: &'a [u8],
    crcs: &'a [U32],
}

impl<'a> RecordView<'a> {
    /// Sequence number; 0 in a local batch.
    pub fn seq(&self) -> u64 {
        self.header.seq.get()
    }

    /// When the source took it in, µs since the Unix epoch.
    pub fn time_us(&self) -> u64 {
        self.header.time_us.get()
    }

    /// Volume of the VM.
    pub fn volume(&self) -> u16 {
        self.header.volume.get()
    }

    /// What it says.
    pub fn kind(&self) -> RecordKind {
        RecordKind::from_number(self.header.kind).expect("checked by parse")
    }

    /// Place on the volume, in bytes.
    pub fn offset_bytes(&self) -> u64 {
        self.header.offset_bytes.get()
    }

    /// Length on the volume, or the volume's size, in bytes.
    pub fn len_bytes(&self) -> u64 {
        self.header.len_bytes.get()
    }

    /// The sync that it belongs to, or 0.
    pub fn sync_id(&self) -> u64 {
        self.header.sync_id.get()
    }

    /// The kind's own number.
    pub fn argument(&self) -> u64 {
        self.header.argument.get()
    }

    /// The payload.
    pub fn payload(&self) -> &'a [u8] {
        self.payload
    }

    /// Where the payload starts in the batch, in bytes; 0 without payload.
    pub fn payload_offset_bytes(&self) -> usize {
        self.header.payload_offset_bytes.get() as usize
    }

    /// CRC32C of each 4 KiB unit of the payload.
    pub fn crcs(&self) -> impl ExactSizeIterator<Item = u32> + use<'a> {
        self.crcs.iter().map(|crc| crc.get())
    }

    /// The checkpoint, if it is one.
    pub fn checkpoint(&self) -> Option<Checkpoint> {
        if self.kind() != RecordKind::Checkpoint {
            return None;
        }
        Some(Checkpoint::decode(self.payload).expect("checked by parse"))
    }

    /// The record with its payload as a handle on `batch`, which must hold the very bytes that were parsed: no copy.
    pub fn to_record(&self, batch: &Bytes) -> Record {
        Record {
            seq: self.seq(),
            time_us: self.time_us(),
            volume: self.volume(),
            kind: self.kind(),
            offset_bytes: self.offset_bytes(),
            len_bytes: self.len_bytes(),
            sync_id: self.sync_id(),
            argument: self.argument(),
            payload: batch.slice_ref(self.payload),
        }
    }

    fn check(&self) -> Result<(), BatchError> {
        match unit_crcs(self.payload).zip(self.crcs()).position(|(found, expected)| found != expected) {
            Some(unit) => Err(BatchError::PayloadCrc { seq: self.seq(), unit }),
            None => Ok(()),
        }
    }
}

fn head_crc(header: &BatchHeader, rest_of_head: &[u8]) -> u32 {
    let without_crc = BatchHeader { crc: 0.into(), ..*header };
    crc32c::crc32c_append(crc32c::crc32c(without_crc.as_bytes()), rest_of_head)
}
