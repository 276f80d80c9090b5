//! A scratch file, or the overlay of a locked checkpoint, as a damaged disk gives it. Input: the pages that are looked at, in the order of the
//! file: both copies of the header, then those of the map's pages; once as they are, and once more with checksums that fit.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU32, Ordering};

use journal::crypt::{Encryption, Keyring, SiteKeys};
use uuid::Uuid;
use vra::view::{ScratchFile, ScratchKeys};

const PAGE_BYTES: usize = 4096;
/// Where the pages of the input are in the file; the map's follow on the last one, in bytes.
const PLACES: [u64; 3] = [0, 64 << 10, 128 << 10];
/// Of longer ones the map takes memory, and nothing more is found out.
const LONGEST_DISK_BYTES: u64 = 1 << 30;
const MOST_ENTRIES: u32 = 8400;

pub fn run(data: &[u8]) {
    let mut pages: Vec<Vec<u8>> = data.chunks(PAGE_BYTES).take(64).map(<[u8]>::to_vec).collect();
    pages.iter_mut().for_each(|page| page.resize(PAGE_BYTES, 0));
    look_at(&pages);
    for page in &mut pages {
        page[12..16].fill(0);
        let crc = crc32c::crc32c(page);
        page[12..16].copy_from_slice(&crc.to_le_bytes());
    }
    look_at(&pages);
}

fn look_at(pages: &[Vec<u8>]) {
    let number = |page: &[u8], at: usize| u64::from_le_bytes(page[at..at + 8].try_into().expect("eight"));
    for header in pages.iter().take(2) {
        let (disk_bytes, lengths) = (number(header, 152), number(header, 160));
        if disk_bytes > LONGEST_DISK_BYTES || (lengths >> 32) as u32 > MOST_ENTRIES {
            return;
        }
    }
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let count = NEXT.fetch_add(1, Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("holdfast-fuzz-scratch-{}-{count}", std::process::id()));
    let file = File::create(&path).expect("a temporary file");
    for (index, page) in pages.iter().enumerate() {
        let place = PLACES[index.min(2)] + (index.saturating_sub(2) * PAGE_BYTES) as u64;
        file.write_all_at(page, place).expect("written");
    }
    // As long as any that is let through may be.
    file.set_len(2 << 30).expect("a sparse file");
    let keyring = Keyring::new(Uuid::from_u128(1), site_keys());
    let keys = ScratchKeys { keyring: &keyring, encryption: Encryption::Never };
    let _ = ScratchFile::owner(&path);
    if let Ok((mut scratch, owner)) = ScratchFile::look_at_overlay(&path, &keys) {
        assert!(owner.disk_bytes <= LONGEST_DISK_BYTES);
        if let Ok(used_bytes) = scratch.check_map() {
            assert!(
                used_bytes <= owner.disk_bytes.next_multiple_of(64 << 10),
                "each chunk of the disk has one at most"
            );
        }
    }
    std::fs::remove_file(&path).expect("removed");
}

/// Those of the sample journals' site.
fn site_keys() -> SiteKeys {
    SiteKeys::parse(&format!("holdfast-site-key-1 {}\n", "5e".repeat(32))).expect("a key")
}
