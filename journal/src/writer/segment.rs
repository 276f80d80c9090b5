//! The segment that takes batches.

use bytes::Bytes;

use crate::batch::BatchView;
use crate::crypt::{Cipher, Encryption, SegmentKey};
use crate::format::{
    ChainPoint, FooterBuilder, PAGE_BYTES, SegmentHeader, SegmentTrailer, slot_offset_bytes,
};
use crate::scan::Scan;
use crate::storage::{AlignedBuf, Op, Purpose};

use super::ClosedSegment;

/// Room that batches leave for those of the journal's own: two that announce promotions, and what they add to the footer.
const LOCAL_ROOM_BYTES: u64 = 3 * PAGE_BYTES as u64;

#[derive(Debug)]
pub(super) struct OpenSegment {
    header: SegmentHeader,
    cipher: Cipher,
    end_bytes: u64,
    last: ChainPoint,
    footer: FooterBuilder,
    end_time_us: u64,
}

impl OpenSegment {
    pub(super) fn begin(header: SegmentHeader, cipher: Cipher) -> Self {
        let (last, end_time_us) = (header.after, header.begin_time_us);
        let footer = FooterBuilder::new(header.after.seq);
        Self { header, cipher, end_bytes: PAGE_BYTES as u64, last, footer, end_time_us }
    }

    /// The segment as recovery found it. When its last batch was received is not known until the next one comes: `end_time_us` at the latest,
    /// if that is known.
    pub(super) fn resume(
        header: SegmentHeader,
        cipher: Cipher,
        scan: Scan,
        end_time_us: Option<u64>,
    ) -> Self {
        let end_time_us = header.begin_time_us.max(end_time_us.unwrap_or_default());
        Self { header, cipher, end_bytes: scan.end_bytes, last: scan.last, footer: scan.footer, end_time_us }
    }

    pub(super) fn header(&self) -> &SegmentHeader {
        &self.header
    }

    /// Whether it is encrypted as segments that begin now are.
    pub(super) fn is_encrypted_by(&self, encryption: &Encryption) -> bool {
        let key_id = |key: &SegmentKey| key.key.key_id;
        match encryption {
            Encryption::On(key) => self.header.encryption.as_ref().map(key_id) == Some(key.key_id),
            Encryption::Never | Encryption::Off => self.header.encryption.is_none(),
        }
    }

    /// Whether it has no record of the stream.
    pub(super) fn is_empty(&self) -> bool {
        self.last == self.header.after
    }

    pub(super) fn end_bytes(&self) -> u64 {
        self.end_bytes
    }

    /// Whether a batch, its part of the footer and the trailer have room, and the journal's own records after it.
    pub(super) fn fits(&self, batch: &Bytes, slot_len_bytes: u64) -> bool {
        self.fits_local(batch, slot_len_bytes.saturating_sub(LOCAL_ROOM_BYTES))
    }

    /// Whether footer and trailer have room: always, but in a file that was not written by this software.
    pub(super) fn can_be_sealed(&self, slot_len_bytes: u64) -> bool {
        self.end_bytes + self.footer.len_bytes() + PAGE_BYTES as u64 <= slot_len_bytes
    }

    /// The same for a batch of the journal's own.
    pub(super) fn fits_local(&self, batch: &Bytes, slot_len_bytes: u64) -> bool {
        let footer_len_bytes = self.footer.len_bytes_with(&reparse(batch));
        footer_len_bytes.is_some_and(|footer_len_bytes| {
            self.end_bytes + batch.len() as u64 + footer_len_bytes + PAGE_BYTES as u64 <= slot_len_bytes
        })
    }

    /// The longest batch that an empty slot could take, with this batch's footer.
    pub(super) fn longest_batch_bytes(view: &BatchView<'_>, slot_len_bytes: u64) -> Option<u64> {
        let footer_len_bytes = FooterBuilder::new(view.first_seq() - 1).len_bytes_with(view)?;
        slot_len_bytes.checked_sub(2 * PAGE_BYTES as u64 + LOCAL_ROOM_BYTES + footer_len_bytes)
    }

    pub(super) fn add(&mut self, batch: &Bytes, last: ChainPoint, receive_time_us: u64) {
        self.footer.add(&reparse(batch), self.end_bytes);
        self.end_bytes += batch.len() as u64;
        self.last = last;
        self.end_time_us = self.end_time_us.max(receive_time_us);
    }

    /// The write of batches that were added last, behind the segment's first page if that is new. Encrypted batches are copied, plain ones
    /// are not.
    pub(super) fn write(&self, first_page: Option<Bytes>, batches: Vec<Bytes>, slot_len_bytes: u64) -> Op {
        let len = |pieces: &[Bytes]| pieces.iter().map(|piece| piece.len() as u64).sum::<u64>();
        let place_bytes = self.end_bytes - len(&batches);
        let batches = if self.cipher.is_plain() {
            batches
        } else {
            let mut gathered = AlignedBuf::gather(&batches);
            self.cipher.encrypt(place_bytes, &mut gathered);
            vec![gathered.into_bytes()]
        };
        let begin_bytes = place_bytes - first_page.as_ref().map_or(0, |page| page.len() as u64);
        let offset_bytes = slot_offset_bytes(self.header.slot, slot_len_bytes) + begin_bytes;
        Op::Write { offset_bytes, pieces: first_page.into_iter().chain(batches).collect() }
    }

    /// Closes it: footer and trailer to write.
    pub(super) fn seal(self, slot_len_bytes: u64) -> (ClosedSegment, Vec<(Purpose, Op)>) {
        let mut footer = self.footer.finish().encode();
        let trailer = SegmentTrailer {
            header: self.header.clone(),
            data_end_bytes: self.end_bytes,
            footer_len_bytes: footer.len() as u64,
            footer_crc: crc32c::crc32c(&footer),
            last: self.last,
            end_time_us: self.end_time_us,
        };
        self.cipher.encrypt(self.end_bytes, &mut footer);
        let slot_offset = slot_offset_bytes(self.header.slot, slot_len_bytes);
        let write = |offset_bytes, piece| (Purpose::Seal, Op::Write { offset_bytes, pieces: vec![piece] });
        let writes = vec![
            write(slot_offset + self.end_bytes, Bytes::from(footer)),
            write(slot_offset + slot_len_bytes - PAGE_BYTES as u64, page(&trailer.encode())),
        ];
        let Self { header, last, cipher, .. } = self;
        (ClosedSegment { header, last, trailer: Some(trailer), cipher }, writes)
    }
}

/// A page in aligned memory.
pub(super) fn page(bytes: &[u8; PAGE_BYTES]) -> Bytes {
    let mut buffer = AlignedBuf::zeroed(PAGE_BYTES);
    buffer.copy_from_slice(bytes);
    buffer.into_bytes()
}

fn reparse(batch: &Bytes) -> BatchView<'_> {
    BatchView::parse_head(batch).expect("the batch was parsed when it was offered")
}
