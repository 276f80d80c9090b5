//! A footer as a damaged disk gives it, with a checksum that fits. Input: where the slot's batches end (8 bytes), then the footer.

use journal::format::Footer;
use journal::index::IndexBuilder;

/// Longest slot there is, in bytes.
const SLOT_BYTES: u64 = 1 << 30;

pub fn run(data: &[u8]) {
    let Some((data_end, bytes)) = data.split_first_chunk::<8>() else { return };
    let data_end_bytes = u64::from_le_bytes(*data_end) % SLOT_BYTES;
    let Ok(footer) = Footer::decode(bytes, crc32c::crc32c(bytes), data_end_bytes) else { return };
    let encoded = footer.encode();
    let again = Footer::decode(&encoded, crc32c::crc32c(&encoded), data_end_bytes);
    assert_eq!(again.as_ref(), Ok(&footer), "what was read can be written and read");
    for volume in 0..4 {
        let mut builder = IndexBuilder::default();
        builder.add(&footer, 3, SLOT_BYTES, volume, 0, u64::MAX);
        let index = builder.build();
        let mut end_bytes = 0;
        for piece in index.pieces() {
            assert!(end_bytes <= piece.offset_bytes && piece.len_bytes() > 0, "in order, disjoint");
            end_bytes = piece.end_bytes();
        }
    }
}
