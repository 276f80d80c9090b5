//! A superblock and a manifest as a damaged disk gives them. Input: one byte that chooses, then the bytes, which are looked at as they
//! are and once more with a checksum that fits.

use journal::format::manifest::Manifest;
use journal::format::{PAGE_BYTES, Superblock};

pub fn run(data: &[u8]) {
    let Some((&choice, rest)) = data.split_first() else { return };
    if choice % 2 == 0 {
        let mut page = rest.to_vec();
        superblock(&page);
        page.resize(PAGE_BYTES, 0);
        page[12..16].fill(0);
        let crc = crc32c::crc32c(&page);
        page[12..16].copy_from_slice(&crc.to_le_bytes());
        superblock(&page);
    } else {
        let mut slot = rest.to_vec();
        manifest(&slot);
        if slot.len() >= 64 {
            let len = u32::from_le_bytes(slot[40..44].try_into().expect("four")) as usize;
            if let Some(end) = len.checked_add(64).filter(|end| *end <= slot.len()) {
                slot[12..16].fill(0);
                let crc = crc32c::crc32c(&slot[..end]);
                slot[12..16].copy_from_slice(&crc.to_le_bytes());
                manifest(&slot);
            }
        }
    }
}

fn superblock(page: &[u8]) {
    if let Ok(superblock) = Superblock::decode(page) {
        assert_eq!(Superblock::decode(&superblock.encode()), Ok(superblock.clone()));
        assert!(superblock.oldest_seq() >= superblock.low_water.seq);
    }
}

fn manifest(slot: &[u8]) {
    // What was reserved is written as zeroes: the checksum may be another one.
    if let Ok((manifest, _)) = Manifest::decode(slot) {
        let (again, crc) = manifest.encode().expect("what was read can be written");
        assert_eq!(Manifest::decode(&again), Ok((manifest, crc)), "what was written can be read");
    }
}
