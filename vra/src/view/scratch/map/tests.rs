use proptest::prelude::*;
use uuid::Uuid;

use super::super::format::PAGE_WORDS;
use super::*;

const SIZE_BYTES: u64 = 8 * CHUNK_BYTES;

fn passing(disk_bytes: u64, limit_bytes: u64) -> ScratchMap {
    let shape = Shape::new(disk_bytes, limit_bytes);
    ScratchMap::passing(shape, Words::own(shape.words()).expect("memory"))
}

fn lasting(shape: Shape) -> ScratchMap {
    let words = Words::own(shape.words()).expect("memory");
    let pages =
        Pages::new(Uuid::nil(), vec![0; shape.words()], &vec![PageVersion::NEVER; shape.pages() as usize]);
    ScratchMap::lasting(shape, words, pages).expect("empty")
}

fn content(map: &ScratchMap) -> Vec<u64> {
    map.words.iter().map(|word| word.load(Ordering::Relaxed)).collect()
}

/// The map that another process would make of the same words.
fn again(map: &ScratchMap) -> ScratchMap {
    of_words(map, &content(map))
}

fn of_words(map: &ScratchMap, content: &[u64]) -> ScratchMap {
    let words = Words::own(map.words.len()).expect("memory");
    for (to, from) in words.iter().zip(content) {
        to.store(*from, Ordering::Relaxed);
    }
    let pages = map.pages.as_ref().expect("lasting");
    let version = PageVersion { sequence: 1, ..PageVersion::NEVER };
    let versions = vec![version; map.shape.pages() as usize];
    let pages = Pages::new(Uuid::nil(), pages.settled().to_vec(), &versions);
    ScratchMap::lasting(map.shape, words, pages).expect("sound")
}

proptest! {
    /// Against a plain array of sectors: which write made each, or zeroes, or nothing. With commits and restarts in between.
    #[test]
    fn every_sector_is_where_the_last_change_put_it(
        changes in prop::collection::vec((0..8_u8, 0..1024_u64, 1..300_u64), 1..60),
        lasts in any::<bool>(),
    ) {
        let mut map = match lasts {
            true => lasting(Shape::new(SIZE_BYTES, SIZE_BYTES)),
            false => passing(SIZE_BYTES, SIZE_BYTES),
        };
        let data = map.data_offset_bytes;
        let mut file = vec![0_u32; (SIZE_BYTES / SECTOR_BYTES) as usize];
        let mut model = vec![None; (SIZE_BYTES / SECTOR_BYTES) as usize];
        for (round, (kind, sector, sectors)) in changes.into_iter().enumerate() {
            let sectors = sectors.min(1024 - sector);
            let (offset, len) = (sector * SECTOR_BYTES, sectors * SECTOR_BYTES);
            let content = if kind < 3 { 0 } else { round as u32 + 1 };
            match kind {
                0..3 => map.zero(offset, len).expect("room for the whole disk"),
                3..6 => {
                    let mut at = offset;
                    for run in map.place(offset, len).expect("room for the whole disk") {
                        prop_assert_eq!(run.offset_bytes, at);
                        let Place::Scratch(from) = run.place else { panic!("{run:?}") };
                        let first = ((from - data) / SECTOR_BYTES) as usize;
                        file[first..first + (run.len_bytes / SECTOR_BYTES) as usize].fill(content);
                        at += run.len_bytes;
                    }
                    prop_assert_eq!(at, offset + len);
                    map.written(offset, len);
                }
                6 => {
                    map.begin_commit();
                    map.end_commit();
                }
                _ if lasts => map = again(&map),
                _ => {}
            }
            if kind < 6 {
                model[sector as usize..(sector + sectors) as usize].fill(Some(content));
            }
            let mut at = 0;
            for run in map.find(0, SIZE_BYTES) {
                prop_assert_eq!(run.offset_bytes, at);
                for sector in 0..run.len_bytes / SECTOR_BYTES {
                    let found = match run.place {
                        Place::Below => None,
                        Place::Zeroes => Some(0),
                        Place::Kept(_) => unreachable!("nothing is beneath"),
                        Place::Scratch(from) => Some(file[((from - data) / SECTOR_BYTES + sector) as usize]),
                    };
                    prop_assert_eq!(found, model[(at / SECTOR_BYTES + sector) as usize]);
                }
                at += run.len_bytes;
            }
            prop_assert_eq!(at, SIZE_BYTES);
        }
    }

    /// A process that dies between any two stores: what it did not change reads as before, what it was changing as before or after.
    #[test]
    fn every_store_leaves_a_map_that_is_right(
        changes in prop::collection::vec((0..5_u8, 0..1024_u64, 1..300_u64), 1..20)
    ) {
        let mut map = lasting(Shape::new(SIZE_BYTES, SIZE_BYTES));
        let places = |map: &ScratchMap| -> Vec<Place> {
            let sector = |number: u64| map.find(number * SECTOR_BYTES, SECTOR_BYTES)[0].place;
            (0..SIZE_BYTES / SECTOR_BYTES).map(sector).collect()
        };
        for (kind, sector, sectors) in changes {
            let sectors = sectors.min(1024 - sector);
            let (offset, len) = (sector * SECTOR_BYTES, sectors * SECTOR_BYTES);
            let (before, mut words) = (places(&map), content(&map));
            map.stores.clear();
            match kind {
                0 | 1 => map.zero(offset, len).expect("room"),
                2 | 3 => {
                    map.place(offset, len).expect("room");
                    map.written(offset, len);
                }
                _ => {
                    map.begin_commit();
                    map.end_commit();
                }
            }
            let after = places(&map);
            let stores = std::mem::take(&mut map.stores);
            for (index, value) in stores {
                words[index] = value;
                let found = places(&of_words(&map, &words));
                for (number, place) in found.iter().enumerate() {
                    prop_assert!([before[number], after[number]].contains(place), "sector {}", number);
                }
            }
        }
    }

    /// A power cut in the middle of a commit: of each page the old or the new copy is there, and of each sector a state that it had since the last commit.
    #[test]
    fn a_commit_that_is_cut_short_loses_nothing_of_the_one_before(
        changes in prop::collection::vec((0..10_u8, 0..120_u64, 0..2_u64, any::<u64>()), 1..400)
    ) {
        const HALF_BYTES: u64 = CHUNK_BYTES / 2;
        let shape = Shape::new(256 * CHUNK_BYTES, 100 * CHUNK_BYTES);
        prop_assert!(shape.pages() > 3, "slots of several pages");
        let mut map = lasting(shape);
        let places = |map: &ScratchMap| -> Vec<Place> {
            (0..2 * 120).map(|half| map.find(half * HALF_BYTES, SECTOR_BYTES)[0].place).collect()
        };
        let mut versions = vec![PageVersion::NEVER; shape.pages() as usize];
        let mut settled = vec![0; shape.words()];
        let mut since: Vec<Vec<Place>> = places(&map).into_iter().map(|place| vec![place]).collect();
        for (round, (kind, chunk, half, choice)) in (1..).zip(changes) {
            let offset = chunk * CHUNK_BYTES + half * HALF_BYTES;
            match kind {
                0..7 => map.zero(offset, HALF_BYTES).expect("room"),
                // Places may be used up.
                7 => {
                    if map.place(offset, HALF_BYTES).is_ok() {
                        map.written(offset, HALF_BYTES);
                    }
                }
                _ => {
                    map.begin_commit();
                    let next = map.pages.as_ref().expect("lasting").settled().to_vec();
                    let (mut mixed, mut mixed_versions) = (settled.clone(), versions.clone());
                    for page in 0..shape.pages() as usize {
                        let words = page * PAGE_WORDS..(page + 1) * PAGE_WORDS;
                        if next[words.clone()] == settled[words.clone()] {
                            continue;
                        }
                        versions[page].sequence = round;
                        if choice >> page & 1 == 1 {
                            mixed[words.clone()].copy_from_slice(&next[words]);
                            mixed_versions[page].sequence = round;
                        }
                    }
                    let mut live = mixed.clone();
                    drop_stale(shape, &mut live, &mixed_versions).expect("decided");
                    let found = places(&of_words(&map, &live));
                    for (half, place) in found.iter().enumerate() {
                        prop_assert!(since[half].contains(place), "half {} of a chunk", half);
                    }
                    map.end_commit();
                    settled = next;
                    since.iter_mut().for_each(Vec::clear);
                }
            }
            for (since, place) in since.iter_mut().zip(places(&map)) {
                since.push(place);
            }
        }
    }

    /// Whatever the words say: a map or a refusal.
    #[test]
    fn words_that_make_no_sense_are_refused_without_a_panic(
        entries in prop::collection::vec((0..5_usize, 0..6_usize, prop_oneof![0..9_u64, any::<u64>()]), 0..20)
    ) {
        let shape = Shape::new(SIZE_BYTES, SIZE_BYTES);
        let mut settled = vec![0; shape.words()];
        for (slot, part, value) in entries {
            settled[slot * ENTRY_WORDS + part] = value;
        }
        let version = PageVersion { sequence: 1, ..PageVersion::NEVER };
    let versions = vec![version; shape.pages() as usize];
        let _ = drop_stale(shape, &mut settled, &versions);
        let words = Words::own(shape.words()).expect("memory");
        words.iter().zip(&settled).for_each(|(to, from)| to.store(*from, Ordering::Relaxed));
        if let Ok(map) = ScratchMap::lasting(shape, words, Pages::new(Uuid::nil(), settled, &versions)) {
            map.find(0, SIZE_BYTES);
        }
    }
}

#[test]
fn a_huge_discard_costs_one_run_and_a_full_file_says_so_before_it_changes_anything() {
    let mut map = lasting(Shape::new(1 << 40, 2 * CHUNK_BYTES));
    map.zero(512, 1 << 39).expect("room");
    assert!(map.slots.len() <= 2 && map.zeroes.len() == 1);
    assert!(map.place(CHUNK_BYTES - 512, CHUNK_BYTES).is_ok());
    assert_eq!(map.place(1 << 30, 512), Err(ScratchFull));
    assert_eq!(map.used_bytes(), 2 * CHUNK_BYTES);
    let mut map = passing(SIZE_BYTES, CHUNK_BYTES);
    assert_eq!(map.place(0, 2 * CHUNK_BYTES), Err(ScratchFull));
    assert_eq!(map.used_bytes(), 0);
}

#[test]
fn small_zeroes_take_no_data_and_their_entries_are_free_again_when_the_chunk_is_whole() {
    let mut map = lasting(Shape::new(1 << 40, CHUNK_BYTES));
    let bare_max = u64::from(map.bare_max());
    let settle = |map: &mut ScratchMap| {
        map.begin_commit();
        map.end_commit();
    };
    for number in 0..4 * bare_max {
        map.zero(number * CHUNK_BYTES, CHUNK_BYTES / 2).expect("room");
        if number % 3 == 0 {
            settle(&mut map);
        }
        map.zero(number * CHUNK_BYTES + CHUNK_BYTES / 2, CHUNK_BYTES / 2).expect("room");
        if number % 100 == 0 {
            settle(&mut map);
        }
    }
    settle(&mut map);
    assert_eq!((map.slots.len(), map.zeroes.len(), map.used_bytes()), (0, 1, 0));
    // When there are too many, they take what is written to.
    for number in 0..bare_max + 1 {
        map.zero((5 * bare_max + 2 * number) * CHUNK_BYTES, 512).expect("room");
    }
    assert_eq!(map.used_bytes(), CHUNK_BYTES);
    assert_eq!(map.zero(0, 512), Ok(()), "it reads zeroes already");
    assert_eq!(map.zero((5 * bare_max + 1) * CHUNK_BYTES, 512), Err(ScratchFull));
}

#[test]
fn a_write_is_durable_in_place_only_once_the_file_says_where_it_is() {
    let mut map = lasting(Shape::new(SIZE_BYTES, SIZE_BYTES));
    map.place(0, 4096).expect("room");
    map.written(0, 4096);
    assert!(!map.is_in_place(0, 4096));
    assert_eq!(map.begin_commit(), 1);
    assert!(!map.is_in_place(0, 4096), "the page is on its way");
    map.end_commit();
    assert!(map.is_in_place(0, 4096) && !map.is_in_place(0, 8192));
    map.zero(512, 512).expect("room");
    assert!(!map.is_in_place(0, 4096) && map.is_in_place(0, 512));
    assert_eq!(map.begin_commit(), 1);
    map.end_commit();
    assert_eq!(map.begin_commit(), 0, "nothing has changed");
    map.end_commit();
}

#[test]
fn of_two_entries_of_a_chunk_the_newer_page_counts() {
    let shape = Shape::new(1 << 40, 1 << 30);
    let far = PAGE_WORDS;
    for (versions, kept) in [([1, 2], 1), ([2, 1], 0)] {
        let mut words = vec![0; shape.words()];
        (words[0], words[far]) = (6, 6);
        let mut all = vec![PageVersion::NEVER; shape.pages() as usize];
        (all[0].sequence, all[1].sequence) = (versions[0], versions[1]);
        drop_stale(shape, &mut words, &all).expect("decided");
        assert_eq!([words[0], words[far]], if kept == 0 { [6, 0] } else { [0, 6] });
    }
}
