//! Makes batches from records. CPU work only: it belongs on the shipper's thread, never on a reactor's.

use bytes::{Bytes, BytesMut};
use zerocopy::IntoBytes;

use crate::planted::{Bug, planted};

use super::layout::{BATCH_MAGIC, BATCH_VERSION, BatchHeader, FLAG_LOCAL, RecordHeader};
use super::{
    BATCH_ALIGN_BYTES, BatchLink, MAX_BATCH_BYTES, MAX_RECORDS, PAYLOAD_ALIGN_BYTES, Record, RecordError,
    RecordKind, check_record, unit_count, unit_crcs,
};

/// Takes records of one VM in sequence order and makes batches of them.
#[derive(Debug, Default)]
pub struct BatchSealer {
    records: Vec<Record>,
    crc_count: usize,
    payload_len_bytes: usize,
}

/// Why a record was not taken.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PushError {
    /// The batch has no room for it, or ends with a sync end, which is the last record of its batch: seal, then push it
    /// again.
    #[error("the batch is full")]
    Full(Box<Record>),
    /// Its number isn't the next one, or a local record and a stream record would share a batch.
    #[error("record {seq} doesn't follow record {last_seq}")]
    Order {
        /// The record.
        seq: u64,
        /// The last one taken.
        last_seq: u64,
    },
    /// The record is malformed.
    #[error("record {seq} is malformed")]
    Record {
        /// The record.
        seq: u64,
        /// Why.
        source: RecordError,
    },
}

/// An immutable batch in pieces, whose concatenation is the batch.
#[derive(Clone, Debug)]
pub struct SealedBatch {
    /// Header, record headers, CRC table, padding to 512.
    pub head: Bytes,
    /// The records' own payloads and the padding between and after them.
    pub payload: Vec<Bytes>,
    /// Number of the first record.
    pub first_seq: u64,
    /// Number of the last record.
    pub last_seq: u64,
    /// The batch's CRC: what the next one carries as [`BatchLink::prev_batch_crc`].
    pub crc: u32,
}

impl SealedBatch {
    /// Length of the whole batch, in bytes.
    pub fn len_bytes(&self) -> usize {
        self.head.len() + self.payload.iter().map(Bytes::len).sum::<usize>()
    }

    /// The batch's bytes in order, piece by piece.
    pub fn pieces(&self) -> impl Iterator<Item = &Bytes> {
        std::iter::once(&self.head).chain(&self.payload)
    }

    /// The batch in one piece: a copy.
    pub fn to_bytes(&self) -> Bytes {
        let mut whole = BytesMut::with_capacity(self.len_bytes());
        self.pieces().for_each(|piece| whole.extend_from_slice(piece));
        whole.freeze()
    }
}

impl BatchSealer {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many records wait to be sealed.
    pub fn record_count(&self) -> usize {
        self.records.len()
    }

    /// Whether no record waits.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// How long the batch would be if sealed now, in bytes; 0 without records.
    pub fn len_bytes(&self) -> usize {
        if self.records.is_empty() {
            return 0;
        }
        total_len_bytes(self.records.len(), self.crc_count, self.payload_len_bytes)
    }

    /// Takes the next record.
    ///
    /// # Errors
    /// The record comes back when the batch is full; a malformed or misplaced one is dropped, and the batch stays
    /// as it was.
    pub fn push(&mut self, record: Record) -> Result<(), PushError> {
        let seq = record.seq;
        let (header, _) = headers(&record, 0, 0);
        check_record(&header, &record.payload).map_err(|source| PushError::Record { seq, source })?;
        if let Some(last) = self.records.last() {
            let next_seq = if record.kind.is_local() { 0 } else { last.seq + 1 };
            if last.kind.is_local() != record.kind.is_local() || seq != next_seq {
                return Err(PushError::Order { seq, last_seq: last.seq });
            }
            if last.kind == RecordKind::SyncEnd && !planted(Bug::SyncEndInsideBatch) {
                return Err(PushError::Full(Box::new(record)));
            }
        } else if record.kind.is_local() != (seq == 0) || seq == u64::MAX {
            return Err(PushError::Order { seq, last_seq: 0 });
        }
        let crc_count = self.crc_count + unit_count(record.payload.len());
        let payload_len_bytes =
            self.payload_len_bytes + record.payload.len().next_multiple_of(PAYLOAD_ALIGN_BYTES);
        let total_len_bytes = total_len_bytes(self.records.len() + 1, crc_count, payload_len_bytes);
        if self.records.len() == MAX_RECORDS || total_len_bytes > MAX_BATCH_BYTES {
            return Err(PushError::Full(Box::new(record)));
        }
        self.crc_count = crc_count;
        self.payload_len_bytes = payload_len_bytes;
        self.records.push(record);
        Ok(())
    }

    /// Makes a batch of all records taken so far, or nothing if there are none. A batch of local records stands
    /// after stream record `after_seq`; for the others that argument means nothing.
    pub fn seal(&mut self, link: &BatchLink, after_seq: u64) -> Option<SealedBatch> {
        let (first, last) = (self.records.first()?, self.records.last()?);
        let local = first.kind.is_local();
        let (first_seq, last_seq) = if local { (after_seq, after_seq) } else { (first.seq, last.seq) };
        let record_count = self.records.len();
        let head_len_bytes = head_len_bytes(record_count, self.crc_count);
        let total_len_bytes = self.len_bytes();

        let mut head = BytesMut::zeroed(head_len_bytes);
        let mut payload = Vec::with_capacity(record_count + 1);
        let crc_table = BatchHeader::LEN + record_count * RecordHeader::LEN;
        let (mut crc_index, mut end_bytes) = (0, head_len_bytes);
        for (index, record) in self.records.drain(..).enumerate() {
            let (header, padding_len_bytes) = headers(&record, end_bytes, crc_index);
            let place = BatchHeader::LEN + index * RecordHeader::LEN;
            head[place..place + RecordHeader::LEN].copy_from_slice(header.as_bytes());
            for crc in unit_crcs(&record.payload) {
                let place = crc_table + crc_index * 4;
                head[place..place + 4].copy_from_slice(&crc.to_le_bytes());
                crc_index += 1;
            }
            if !record.payload.is_empty() {
                end_bytes += record.payload.len() + padding_len_bytes;
                payload.push(record.payload);
                push_zeroes(&mut payload, padding_len_bytes);
            }
        }
        push_zeroes(&mut payload, total_len_bytes - end_bytes);

        let mut header = BatchHeader {
            magic: BATCH_MAGIC,
            version: BATCH_VERSION.into(),
            header_len_bytes: (BatchHeader::LEN as u16).into(),
            flags: if local { FLAG_LOCAL } else { 0 }.into(),
            total_len_bytes: (total_len_bytes as u32).into(),
            record_count: (record_count as u32).into(),
            crc_count: (self.crc_count as u32).into(),
            payload_offset_bytes: (head_len_bytes as u32).into(),
            journal_id: *link.journal_id.as_bytes(),
            generation: *link.generation.as_bytes(),
            open_count: link.open_count.into(),
            first_seq: first_seq.into(),
            last_seq: last_seq.into(),
            prev_batch_crc: link.prev_batch_crc.into(),
            crc: 0.into(),
            reserved: [0; 32],
        };
        head[..BatchHeader::LEN].copy_from_slice(header.as_bytes());
        let crc = crc32c::crc32c(&head[..crc_table + self.crc_count * 4]);
        header.crc = crc.into();
        head[..BatchHeader::LEN].copy_from_slice(header.as_bytes());

        self.crc_count = 0;
        self.payload_len_bytes = 0;
        Some(SealedBatch { head: head.freeze(), payload, first_seq, last_seq, crc })
    }
}

static ZERO_PAGE: [u8; BATCH_ALIGN_BYTES] = [0; BATCH_ALIGN_BYTES];

fn push_zeroes(pieces: &mut Vec<Bytes>, len_bytes: usize) {
    if len_bytes > 0 {
        pieces.push(Bytes::from_static(&ZERO_PAGE[..len_bytes]));
    }
}

fn head_len_bytes(record_count: usize, crc_count: usize) -> usize {
    (BatchHeader::LEN + record_count * RecordHeader::LEN + crc_count * 4)
        .next_multiple_of(PAYLOAD_ALIGN_BYTES)
}

fn total_len_bytes(record_count: usize, crc_count: usize, payload_len_bytes: usize) -> usize {
    (head_len_bytes(record_count, crc_count) + payload_len_bytes).next_multiple_of(BATCH_ALIGN_BYTES)
}

/// The record's header with its payload at this place, and how much padding follows the payload.
fn headers(record: &Record, payload_offset_bytes: usize, first_crc: usize) -> (RecordHeader, usize) {
    let len_bytes = record.payload.len();
    let (payload_offset_bytes, first_crc) =
        if len_bytes == 0 { (0, 0) } else { (payload_offset_bytes, first_crc) };
    let header = RecordHeader {
        seq: record.seq.into(),
        time_us: record.time_us.into(),
        offset_bytes: record.offset_bytes.into(),
        len_bytes: record.len_bytes.into(),
        sync_id: record.sync_id.into(),
        argument: record.argument.into(),
        payload_offset_bytes: (payload_offset_bytes as u32).into(),
        payload_len_bytes: (len_bytes as u32).into(),
        first_crc: (first_crc as u32).into(),
        volume: record.volume.into(),
        kind: record.kind as u8,
        flags: 0,
    };
    (header, len_bytes.next_multiple_of(PAYLOAD_ALIGN_BYTES) - len_bytes)
}
