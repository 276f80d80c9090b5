//! A batch as a hostile peer or a damaged disk gives it. Input: the bytes, as they are and once more with checksums that fit, so that
//! what lies behind them is reached.

use bytes::Bytes;
use journal::batch::{BatchHeader, BatchSealer, BatchView};
use journal::format::{FooterBuilder, PAGE_BYTES};

/// Enough for several records with payloads.
const LONGEST_BYTES: usize = 64 << 10;
/// What a segment takes at most; a batch whose footer is longer is refused before one is built (a record of 1 EiB has 16 MiB there).
const LONGEST_FOOTER_BYTES: u64 = 1 << 20;

pub fn run(data: &[u8]) {
    look_at(data);
    if let Some(sealed) = with_fitting_checksums(data) {
        look_at(&sealed);
    }
}

fn look_at(bytes: &[u8]) {
    if let Ok(needed) = BatchHeader::needed(bytes) {
        assert!(needed >= BatchHeader::LEN);
    }
    if let Ok((view, _damage)) = BatchView::parse_damaged(bytes) {
        assert!(view.len_bytes() <= bytes.len());
    }
    let whole = Bytes::copy_from_slice(bytes);
    let Ok(batch) = BatchView::parse(&whole) else { return };
    let mut sealer = BatchSealer::new();
    for record in batch.records() {
        sealer.push(record.to_record(&whole)).expect("what a batch holds fits into a batch");
    }
    if !batch.is_local() {
        let again = sealer.seal(&batch.link(), 0).expect("a batch has records").to_bytes();
        let again = BatchView::parse(&again).expect("what was sealed can be read");
        assert_eq!((again.first_seq(), again.last_seq()), (batch.first_seq(), batch.last_seq()));
        assert_eq!(again.crc(), batch.crc(), "a batch has one form");
    }
    let mut builder = FooterBuilder::new(batch.first_seq().saturating_sub(1));
    if builder.len_bytes_with(&batch).is_some_and(|len_bytes| len_bytes <= LONGEST_FOOTER_BYTES) {
        builder.add(&batch, PAGE_BYTES as u64);
        let footer = builder.finish();
        for extent in &footer.extents {
            let _crcs = footer.extent_crcs(extent);
        }
    }
}

/// The input with its length, CRC table and head checksum made right, as far as its header's counts allow it.
fn with_fitting_checksums(data: &[u8]) -> Option<Vec<u8>> {
    let number = |at: usize| {
        data.get(at..at + 4).map(|bytes| u32::from_le_bytes(bytes.try_into().expect("four")) as usize)
    };
    let (total, records, crcs) = (number(16)?, number(20)?, number(24)?);
    if total > LONGEST_BYTES || records > 256 || crcs > 4096 {
        return None;
    }
    let table = BatchHeader::LEN + records * 64;
    let head = table + crcs * 4;
    if head > total {
        return None;
    }
    let mut bytes = data.to_vec();
    bytes.resize(total, 0);
    for record in 0..records {
        let at = BatchHeader::LEN + record * 64;
        let field = |offset: usize| {
            u32::from_le_bytes(bytes[at + offset..at + offset + 4].try_into().expect("four")) as usize
        };
        let (start, len, first_crc) = (field(48), field(52), field(56));
        let Some(payload) = start.checked_add(len).and_then(|end| bytes.get(start..end)) else { continue };
        let units: Vec<u32> = payload.chunks(PAGE_BYTES).map(crc32c::crc32c).collect();
        for (index, crc) in units.into_iter().enumerate() {
            if first_crc + index < crcs {
                let place = table + (first_crc + index) * 4;
                bytes[place..place + 4].copy_from_slice(&crc.to_le_bytes());
            }
        }
    }
    bytes[92..96].fill(0);
    let crc = crc32c::crc32c(&bytes[..head]);
    bytes[92..96].copy_from_slice(&crc.to_le_bytes());
    Some(bytes)
}
