//! A sealed segment's footer: where each write's data is, sorted, and everything else that the records say. A view is
//! built from footers without reading batches.

use std::mem::{offset_of, size_of};

use bytes::Bytes;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{FORMAT_VERSION, Gap, PAGE_BYTES};
use crate::batch::{
    BatchError, BatchView, CRC_UNIT_BYTES, MAX_RECORD_PAYLOAD, MAX_VOLUME_BYTES, MAX_VOLUMES, Record,
    RecordError, RecordHeader, RecordKind, check_record, unit_count,
};

/// First eight bytes of a footer.
pub(crate) const FOOTER_MAGIC: [u8; 8] = *b"HFSEGIDX";
/// Unit of [`ExtentEntry::len_sectors`] and [`ExtentEntry::payload_sector`], in bytes.
const SECTOR_BYTES: u64 = 512;

/// One range that a record of the segment changed: 32 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ExtentEntry {
    /// Place on the volume, in bytes.
    pub offset_bytes: U64,
    /// Record's number minus [`Footer::base_seq`].
    pub seq_delta: U32,
    /// Length, in sectors of 512 bytes. A longer record has several extents.
    pub len_sectors: U32,
    /// Where the payload starts, in sectors of 512 bytes from the slot's start; 0 for zeroes.
    pub payload_sector: U32,
    /// The payload's CRC if it has at most 4096 bytes, else the index of its first CRC in the footer's table; 0 for
    /// zeroes.
    pub crc: U32,
    /// Volume of the VM.
    pub volume: U16,
    /// [`RecordKind`] as a number: write, zeroes or sync data.
    pub kind: u8,
    /// Zero.
    pub reserved: [u8; 5],
}

impl ExtentEntry {
    /// Length in bytes.
    pub fn len_bytes(&self) -> u64 {
        u64::from(self.len_sectors.get()) * SECTOR_BYTES
    }

    /// Where the payload starts, in bytes from the slot's start; 0 for zeroes.
    pub fn payload_offset_bytes(&self) -> u64 {
        u64::from(self.payload_sector.get()) * SECTOR_BYTES
    }

    /// Whether the range reads zeroes.
    pub fn is_zeroes(&self) -> bool {
        self.kind == RecordKind::Zeroes as u8
    }

    fn sort_key(&self) -> (u16, u64, u32) {
        (self.volume.get(), self.offset_bytes.get(), self.seq_delta.get())
    }
}

/// A record that says something other than data: checkpoint, sync border, resize, digest, promotion intent, end of
/// generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FooterEvent {
    /// The record as it stood in its batch. A local record keeps number 0.
    pub record: Record,
    /// Its number, or for a local record that of the stream's record before it.
    pub position_seq: u64,
}

/// A footer, decoded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Footer {
    /// What [`ExtentEntry::seq_delta`] counts from: the number before the segment's first record.
    pub base_seq: u64,
    /// Sorted by volume, place, number.
    pub extents: Vec<ExtentEntry>,
    /// CRC of each 4 KiB unit of the payloads longer than that.
    pub crcs: Vec<u32>,
    /// In the order of the stream.
    pub events: Vec<FooterEvent>,
    /// What of the segment nobody knows; only of one that was made from batches, since the footer in the file is lost. For each the events
    /// have a sync's begin.
    pub gaps: Vec<Gap>,
}

/// Why bytes are not a footer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum FooterError {
    /// The bytes don't begin as a footer does.
    #[error("no footer is here")]
    Magic,
    /// A newer format.
    #[error("footer version {0} is not known: a newer release wrote it")]
    Version(u32),
    /// The bytes are shorter than its parts, or longer.
    #[error("the footer's length is wrong")]
    Length,
    /// The checksum is not the one that the trailer names.
    #[error("the footer's checksum is wrong")]
    Crc,
    /// The disk can't give it back.
    #[error("the disk cannot give the footer back")]
    Unreadable,
    /// An extent is out of bounds or out of order.
    #[error("extent {0} of the footer is malformed")]
    Extent(usize),
    /// An event is malformed.
    #[error("the footer's event of record {seq} is malformed")]
    Event {
        /// The record.
        seq: u64,
        /// Why.
        source: RecordError,
    },
}

impl Footer {
    /// The extents of one volume.
    pub fn extents_of(&self, volume: u16) -> &[ExtentEntry] {
        let first = self.extents.partition_point(|extent| extent.volume.get() < volume);
        let count = self.extents[first..].partition_point(|extent| extent.volume.get() == volume);
        &self.extents[first..first + count]
    }

    /// Reads a footer whose CRC the trailer names. `data_end_bytes` is where the slot's batches end.
    ///
    /// # Errors
    /// What is wrong; nothing in the result can point outside the slot's batches.
    pub fn decode(bytes: &[u8], crc: u32, data_end_bytes: u64) -> Result<Self, FooterError> {
        let (header, rest) = FooterHeader::ref_from_prefix(bytes).map_err(|_| FooterError::Length)?;
        if header.magic != FOOTER_MAGIC {
            return Err(FooterError::Magic);
        }
        if header.version.get() != FORMAT_VERSION {
            return Err(FooterError::Version(header.version.get()));
        }
        if crc32c::crc32c(bytes) != crc {
            return Err(FooterError::Crc);
        }
        let (extents, rest) =
            <[ExtentEntry]>::ref_from_prefix_with_elems(rest, header.extent_count.get() as usize)
                .map_err(|_| FooterError::Length)?;
        let (crcs, mut rest) = <[U32]>::ref_from_prefix_with_elems(rest, header.crc_count.get() as usize)
            .map_err(|_| FooterError::Length)?;
        check_extents(extents, crcs.len(), data_end_bytes, header.base_seq.get())?;
        let mut events = Vec::new();
        for _ in 0..header.event_count.get() {
            let (event, after) = take_event(rest)?;
            events.push(event);
            rest = after;
        }
        if rest.len() >= PAGE_BYTES {
            return Err(FooterError::Length);
        }
        Ok(Self {
            base_seq: header.base_seq.get(),
            extents: extents.to_vec(),
            crcs: crcs.iter().map(|crc| crc.get()).collect(),
            events,
            gaps: Vec::new(),
        })
    }

    /// The CRCs of an extent's payload, unit by unit.
    pub fn extent_crcs<'a>(&'a self, extent: &'a ExtentEntry) -> Vec<u32> {
        if extent.is_zeroes() {
            return Vec::new();
        }
        let count = unit_count(extent.len_bytes() as usize);
        if count == 1 {
            return vec![extent.crc.get()];
        }
        let first = extent.crc.get() as usize;
        self.crcs[first..first + count].to_vec()
    }
}

/// Gathers a footer while its segment is written or scanned.
#[derive(Clone, Debug, Default)]
pub struct FooterBuilder {
    footer: Footer,
    events_len_bytes: usize,
}

impl FooterBuilder {
    /// An empty one for a segment whose first record comes after `base_seq`.
    pub fn new(base_seq: u64) -> Self {
        Self { footer: Footer { base_seq, ..Footer::default() }, events_len_bytes: 0 }
    }

    /// How long the footer would be with this batch too, in bytes; nothing if its numbers are too far from the
    /// segment's start.
    pub fn len_bytes_with(&self, batch: &BatchView<'_>) -> Option<u64> {
        u32::try_from(batch.last_seq().checked_sub(self.footer.base_seq)?).ok()?;
        let (mut extents, mut crcs, mut events) = (0, 0, 0);
        for record in batch.records() {
            if record.kind().changes_data() {
                extents += extent_count(record.len_bytes());
                crcs += table_crc_count(record.payload().len());
            } else if record.kind() != RecordKind::Void {
                events += event_len_bytes(record.payload().len());
            }
        }
        Some(self.len_bytes_and(extents, crcs, events))
    }

    /// How long the footer is, in bytes.
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes_and(0, 0, 0)
    }

    fn len_bytes_and(&self, extents: usize, crcs: usize, events_len_bytes: usize) -> u64 {
        let len_bytes = size_of::<FooterHeader>()
            + (self.footer.extents.len() + extents) * size_of::<ExtentEntry>()
            + (self.footer.crcs.len() + crcs) * 4
            + self.events_len_bytes
            + events_len_bytes;
        len_bytes.next_multiple_of(PAGE_BYTES) as u64
    }

    /// Takes a batch that stands at this place in the slot, in bytes from the slot's start.
    pub fn add(&mut self, batch: &BatchView<'_>, batch_offset_bytes: u64) {
        self.add_damaged(batch, batch_offset_bytes, &[]);
    }

    /// The same for a batch of which payloads are damaged: events that have such a payload are left out.
    pub fn add_damaged(&mut self, batch: &BatchView<'_>, batch_offset_bytes: u64, damage: &[BatchError]) {
        let is_damaged = |seq: u64| {
            let mut damaged = damage.iter();
            damaged
                .any(|error| matches!(error, BatchError::PayloadCrc { seq: damaged, .. } if *damaged == seq))
        };
        for record in batch.records() {
            let kind = record.kind();
            if kind.changes_data() {
                let crcs = record.crcs();
                let crc = match crcs.len() {
                    0 => 0,
                    1 => record.crcs().next().unwrap_or_default(),
                    _ => {
                        let first = self.footer.crcs.len() as u32;
                        self.footer.crcs.extend(crcs);
                        first
                    }
                };
                let payload_sector = if record.payload().is_empty() {
                    0
                } else {
                    ((batch_offset_bytes + record.payload_offset_bytes() as u64) / SECTOR_BYTES) as u32
                };
                let mut done_bytes = 0;
                while done_bytes < record.len_bytes() {
                    let len_bytes = (record.len_bytes() - done_bytes).min(MAX_EXTENT_BYTES);
                    self.footer.extents.push(ExtentEntry {
                        offset_bytes: (record.offset_bytes() + done_bytes).into(),
                        seq_delta: ((record.seq() - self.footer.base_seq) as u32).into(),
                        len_sectors: ((len_bytes / SECTOR_BYTES) as u32).into(),
                        payload_sector: payload_sector.into(),
                        crc: crc.into(),
                        volume: record.volume().into(),
                        kind: kind as u8,
                        reserved: [0; 5],
                    });
                    done_bytes += len_bytes;
                }
            } else if kind != RecordKind::Void && !is_damaged(record.seq()) {
                self.events_len_bytes += event_len_bytes(record.payload().len());
                let position_seq = if batch.is_local() { batch.last_seq() } else { record.seq() };
                let record = Record {
                    seq: record.seq(),
                    time_us: record.time_us(),
                    volume: record.volume(),
                    kind,
                    offset_bytes: record.offset_bytes(),
                    len_bytes: record.len_bytes(),
                    sync_id: record.sync_id(),
                    argument: record.argument(),
                    payload: Bytes::copy_from_slice(record.payload()),
                };
                self.footer.events.push(FooterEvent { record, position_seq });
            }
        }
    }

    /// Takes note that batches can't be read that come next.
    pub(crate) fn add_gap(&mut self, gap: Gap, volume_count: u16) {
        self.footer.gaps.push(gap);
        self.footer.events.extend(gap.events(volume_count));
    }

    /// The footer with its extents sorted.
    pub fn finish(mut self) -> Footer {
        self.footer.extents.sort_unstable_by_key(ExtentEntry::sort_key);
        self.footer
    }
}

impl Footer {
    /// The bytes to write, a multiple of [`PAGE_BYTES`].
    pub fn encode(&self) -> Vec<u8> {
        let header = FooterHeader {
            magic: FOOTER_MAGIC,
            version: FORMAT_VERSION.into(),
            extent_count: (self.extents.len() as u32).into(),
            crc_count: (self.crcs.len() as u32).into(),
            event_count: (self.events.len() as u32).into(),
            base_seq: self.base_seq.into(),
            reserved: [0; 32],
        };
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend_from_slice(self.extents.as_bytes());
        self.crcs.iter().for_each(|crc| bytes.extend_from_slice(&crc.to_le_bytes()));
        for event in &self.events {
            let record = &event.record;
            let header = EventHeader {
                position_seq: event.position_seq.into(),
                record: RecordHeader {
                    seq: record.seq.into(),
                    time_us: record.time_us.into(),
                    offset_bytes: record.offset_bytes.into(),
                    len_bytes: record.len_bytes.into(),
                    sync_id: record.sync_id.into(),
                    argument: record.argument.into(),
                    payload_offset_bytes: 0.into(),
                    payload_len_bytes: (record.payload.len() as u32).into(),
                    first_crc: 0.into(),
                    volume: record.volume.into(),
                    kind: record.kind as u8,
                    flags: 0,
                },
            };
            // After an odd number of CRCs events begin at no multiple of eight: each is padded by itself.
            let end_bytes = bytes.len() + event_len_bytes(record.payload.len());
            bytes.extend_from_slice(header.as_bytes());
            bytes.extend_from_slice(&record.payload);
            bytes.resize(end_bytes, 0);
        }
        bytes.resize(bytes.len().next_multiple_of(PAGE_BYTES), 0);
        bytes
    }
}

/// Longest extent, in bytes: the most whole 4 KiB units that the sector count can say.
const MAX_EXTENT_BYTES: u64 = (u32::MAX as u64 - 7) * SECTOR_BYTES;
/// An event's payload is padded to a multiple of it, in bytes.
const EVENT_ALIGN_BYTES: usize = 8;

fn extent_count(len_bytes: u64) -> usize {
    len_bytes.div_ceil(MAX_EXTENT_BYTES) as usize
}

fn table_crc_count(payload_len_bytes: usize) -> usize {
    if payload_len_bytes <= CRC_UNIT_BYTES { 0 } else { unit_count(payload_len_bytes) }
}

fn event_len_bytes(payload_len_bytes: usize) -> usize {
    size_of::<EventHeader>() + payload_len_bytes.next_multiple_of(EVENT_ALIGN_BYTES)
}

fn check_extents(
    extents: &[ExtentEntry],
    crc_count: usize,
    data_end_bytes: u64,
    base_seq: u64,
) -> Result<(), FooterError> {
    let mut last_key = None;
    for (index, extent) in extents.iter().enumerate() {
        let len_bytes = extent.len_bytes();
        let end = extent.offset_bytes.get().checked_add(len_bytes);
        let payload_ok = match RecordKind::from_number(extent.kind) {
            Some(RecordKind::Zeroes) => extent.payload_sector.get() == 0,
            Some(RecordKind::Write | RecordKind::SyncData) => {
                let place = extent.payload_offset_bytes();
                let crcs_ok = len_bytes <= CRC_UNIT_BYTES as u64
                    || extent.crc.get() as usize + unit_count(len_bytes as usize) <= crc_count;
                len_bytes <= MAX_RECORD_PAYLOAD as u64
                    && crcs_ok
                    && place >= PAGE_BYTES as u64
                    && place + len_bytes <= data_end_bytes
            }
            _ => false,
        };
        let key = extent.sort_key();
        let good = payload_ok
            && len_bytes > 0
            && end.is_some_and(|end| end <= MAX_VOLUME_BYTES)
            && extent.offset_bytes.get().is_multiple_of(SECTOR_BYTES)
            && usize::from(extent.volume.get()) < MAX_VOLUMES
            && extent.reserved == [0; 5]
            && base_seq.checked_add(extent.seq_delta.get().into()).is_some_and(|seq| seq < u64::MAX)
            && last_key.is_none_or(|last| last < key);
        if !good {
            return Err(FooterError::Extent(index));
        }
        last_key = Some(key);
    }
    Ok(())
}

fn take_event(bytes: &[u8]) -> Result<(FooterEvent, &[u8]), FooterError> {
    let (header, rest) = EventHeader::ref_from_prefix(bytes).map_err(|_| FooterError::Length)?;
    let payload_len_bytes = header.record.payload_len_bytes.get() as usize;
    let payload = rest.get(..payload_len_bytes).ok_or(FooterError::Length)?;
    let rest =
        rest.get(payload_len_bytes.next_multiple_of(EVENT_ALIGN_BYTES)..).ok_or(FooterError::Length)?;
    let seq = header.record.seq.get();
    let malformed = |source| FooterError::Event { seq, source };
    let (kind, _) = check_record(&header.record, payload).map_err(malformed)?;
    if kind.changes_data() || kind == RecordKind::Void {
        return Err(malformed(RecordError::Kind(header.record.kind)));
    }
    let record = Record {
        seq,
        time_us: header.record.time_us.get(),
        volume: header.record.volume.get(),
        kind,
        offset_bytes: header.record.offset_bytes.get(),
        len_bytes: header.record.len_bytes.get(),
        sync_id: header.record.sync_id.get(),
        argument: header.record.argument.get(),
        payload: Bytes::copy_from_slice(payload),
    };
    Ok((FooterEvent { record, position_seq: header.position_seq.get() }, rest))
}

/// The first 64 bytes of a footer; extents, CRC table and events follow without gaps, zero padded to 4096.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct FooterHeader {
    /// [`FOOTER_MAGIC`].
    magic: [u8; 8],
    /// [`FORMAT_VERSION`].
    version: U32,
    /// How many extents.
    extent_count: U32,
    /// How many CRCs.
    crc_count: U32,
    /// How many events.
    event_count: U32,
    /// [`Footer::base_seq`].
    base_seq: U64,
    /// Zero.
    reserved: [u8; 32],
}

/// What stands before an event's payload: 72 bytes.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct EventHeader {
    /// [`FooterEvent::position_seq`].
    position_seq: U64,
    /// The record's header as in its batch, but with the payload's place and first CRC zero.
    record: RecordHeader,
}

const _: () = {
    assert!(size_of::<ExtentEntry>() == 32);
    assert!(offset_of!(ExtentEntry, payload_sector) == 16);
    assert!(offset_of!(ExtentEntry, volume) == 24);
    assert!(size_of::<FooterHeader>() == 64);
    assert!(offset_of!(FooterHeader, base_seq) == 24);
    assert!(size_of::<EventHeader>() == 72);
};
