use journal::crypt::{NewKey, SiteKey, SiteKeys};
use proptest::prelude::*;

use super::*;

const DISK_BYTES: u64 = 8 * CHUNK_BYTES;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// What a map says when its file is closed, a process says that looks at the file: header, pages, and which copy of a page counts.
    #[test]
    fn a_file_says_what_was_put_into_it(
        changes in prop::collection::vec((any::<bool>(), 0..1024_u64, 1..300_u64, any::<bool>()), 0..24),
        limit_chunks in 1..8_u64,
        is_encrypted in any::<bool>(),
    ) {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let count = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("holdfast-scratch-trip-{}-{count}", std::process::id()));
        let (journal, site_key) = (Uuid::from_u128(1), SiteKey::new([0x5e; 32].into()));
        let keyring = Keyring::new(journal, SiteKeys::new(vec![site_key.clone()]));
        let encryption = match is_encrypted {
            true => Encryption::On(NewKey::seeded(4).wrap(journal, &site_key)),
            false => Encryption::Never,
        };
        let keys = ScratchKeys { keyring: &keyring, encryption };
        let owner = ScratchOwner {
            vra: Uuid::from_u128(2),
            view: Uuid::nil(),
            vm: Uuid::from_u128(3),
            journal,
            volume: Uuid::from_u128(4),
            number: 1,
            seq: 9,
            disk_bytes: DISK_BYTES,
            logical_block_bytes: 512,
        };
        let mut made = ScratchFile::make_overlay(&path, &owner, &keys, limit_chunks * CHUNK_BYTES).expect("made");
        let mut map = made.take_map(DISK_BYTES).expect("its map");
        for (is_data, sector, sectors, commits) in changes {
            let (offset, len) = (sector * SECTOR_BYTES, sectors.min(1024 - sector) * SECTOR_BYTES);
            if is_data && map.place(offset, len).is_ok() {
                map.written(offset, len);
            } else if !is_data {
                map.zero(offset, len).expect("an entry for each chunk");
            }
            if commits {
                for index in 0..map.begin_commit() {
                    let mut bytes = [0; PAGE_BYTES];
                    let offset_bytes = map.pages().expect("lasting").encode(index, &mut bytes);
                    write_page(&made.file, offset_bytes, &bytes).expect("written");
                }
                map.end_commit();
            }
        }
        made.close(&mut map).expect("closed");
        let (mut looked_at, found) = ScratchFile::look_at_overlay(&path, &keys).expect("readable");
        prop_assert_eq!(found, owner);
        let again = looked_at.take_map(DISK_BYTES).expect("sound");
        prop_assert_eq!(again.find(0, DISK_BYTES), map.find(0, DISK_BYTES));
        prop_assert_eq!(again.used_bytes(), map.used_bytes());
        remove_overlay(&path).expect("removed");
    }
}
