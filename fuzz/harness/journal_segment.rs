//! A segment slot as a damaged disk gives it: header, batches, footer, trailer, by all that opens, promotes, scrubs and verifies it. Input: a slot's first bytes; the checksums of the first
//! page and of batches' heads are made to fit, so that what lies behind them is reached.

use std::convert::Infallible;

use journal::batch::BatchHeader;
use journal::format::{ChainPoint, Footer, PAGE_BYTES, SegmentHeader, SegmentTrailer};
use journal::scan::{Ownership, Scan, Sealed, resume, scan, scan_heads};
use journal::walk::walk;
use uuid::Uuid;

const SLOT_BYTES: usize = 64 << 10;

pub fn run(data: &[u8]) {
    let mut slot = data[..data.len().min(SLOT_BYTES)].to_vec();
    slot.resize(SLOT_BYTES, 0);
    look_at(&slot);
    fit_page(&mut slot[..PAGE_BYTES]);
    fit_page(&mut slot[SLOT_BYTES - PAGE_BYTES..]);
    fit_batches(&mut slot);
    look_at(&slot);
}

fn look_at(slot: &[u8]) {
    let len = slot.len() as u64;
    let trailer = SegmentTrailer::decode(&slot[slot.len() - PAGE_BYTES..], len).ok();
    if let Ok(header) = SegmentHeader::decode(&slot[..PAGE_BYTES], len) {
        assert_eq!(SegmentHeader::decode(&header.encode(), len), Ok(header.clone()));
        let ownership = Ownership { tail_generation: Uuid::nil(), first_seq: 0, fork_seq: u64::MAX };
        for trusted_through in [None, Some(header.after.seq.saturating_add(2))] {
            look_at_scan(slot, &header, &scan(slot, &header, ownership, trusted_through));
        }
        let whole = scan(slot, &header, ownership, None);
        let last_page = len - PAGE_BYTES as u64;
        let anything = Sealed {
            last: ChainPoint { seq: u64::MAX, batch_crc: 0 },
            data_end_bytes: last_page,
            volume_count: 3,
        };
        let heads = scan_heads(slot, &header, ownership, &anything);
        look_at_scan(slot, &header, &heads);
        assert!(heads.end_bytes >= whole.end_bytes, "neither damaged payloads nor heads end anything");
        if let Some(trailer) = &trailer {
            let sealed =
                Sealed { last: trailer.last, data_end_bytes: trailer.data_end_bytes, volume_count: 3 };
            look_at_scan(slot, &header, &scan_heads(slot, &header, ownership, &sealed));
        }
        for from in [PAGE_BYTES as u64, whole.end_bytes] {
            if let Some((at, seq)) = resume(slot, from, last_page, &header, whole.last.seq) {
                assert!(at > from && at < last_page && at.is_multiple_of(PAGE_BYTES as u64));
                assert!(seq > whole.last.seq);
            }
        }
        look_at_walk(slot, &header, None);
        if let Some(trailer) = &trailer {
            look_at_walk(slot, &header, Some(trailer));
            look_at_walk(slot, &trailer.header, Some(trailer));
        }
    }
    if let Some(trailer) = trailer {
        assert_eq!(SegmentTrailer::decode(&trailer.encode(), len), Ok(trailer.clone()));
        let begin = trailer.data_end_bytes as usize;
        let bytes = &slot[begin..begin + trailer.footer_len_bytes as usize];
        if let Ok(footer) = Footer::decode(bytes, crc32c::crc32c(bytes), trailer.data_end_bytes) {
            for extent in &footer.extents {
                assert!(extent.payload_offset_bytes() <= trailer.data_end_bytes || extent.is_zeroes());
                let _crcs = footer.extent_crcs(extent);
            }
        }
    }
}

fn look_at_scan(slot: &[u8], header: &SegmentHeader, found: &Scan) {
    assert!(found.end_bytes >= PAGE_BYTES as u64 && found.end_bytes <= slot.len() as u64);
    assert!(found.last.seq >= header.after.seq);
    let footer = found.footer();
    if !footer.gaps.is_empty() {
        // Nobody writes one that stands for what can't be read.
        return;
    }
    let bytes = footer.encode();
    assert!(bytes.len() <= 2 * slot.len(), "no batch makes more of itself than there is");
    let again = Footer::decode(&bytes, crc32c::crc32c(&bytes), found.end_bytes)
        .expect("a scan's own footer can be read");
    assert_eq!(again.extents.len(), footer.extents.len());
}

fn look_at_walk(slot: &[u8], header: &SegmentHeader, trailer: Option<&SegmentTrailer>) {
    let (mut next, mut records) = (PAGE_BYTES as u64, 0);
    let walked = walk(slot, header, trailer, &mut |batch, damage, at| {
        assert!(at >= next, "batches don't overlap");
        assert!(damage.len() <= batch.records().map(|record| record.crcs().len()).sum());
        next = at + batch.len_bytes() as u64;
        records += batch.record_count() as u64;
        Ok::<_, Infallible>(())
    });
    let Ok(walked) = walked;
    assert!(next <= (slot.len() - PAGE_BYTES) as u64, "the last page is never a batch's");
    assert_eq!(walked.records, records);
    assert!(walked.last.seq >= header.after.seq);
    assert!(walked.findings.iter().all(|finding| finding.slot_offset_bytes <= slot.len() as u64));
    assert!(walked.torn_tail.is_none() || trailer.is_none(), "a sealed segment has no torn tail");
}

fn fit_page(page: &mut [u8]) {
    page[12..16].fill(0);
    let crc = crc32c::crc32c(page);
    page[12..16].copy_from_slice(&crc.to_le_bytes());
}

/// Makes the head checksum of each batch fit, from the first page on as long as lengths make sense.
fn fit_batches(slot: &mut [u8]) {
    let mut at = PAGE_BYTES;
    while let Some(batch) = slot.get_mut(at..) {
        let Ok(total) = BatchHeader::needed(batch) else { return };
        let number =
            |from: usize| u32::from_le_bytes(batch[from..from + 4].try_into().expect("four")) as usize;
        let head = BatchHeader::LEN + number(20) * 64 + number(24) * 4;
        if batch.len() < head {
            return;
        }
        batch[92..96].fill(0);
        let crc = crc32c::crc32c(&batch[..head]);
        batch[92..96].copy_from_slice(&crc.to_le_bytes());
        at += total;
    }
}
