//! Superblock, manifest, bad list, and a segment's first and last page: what is written comes back, and no flipped bit gets through. Batches and
//! footers have files of their own.

use journal::bad_ranges::{BadRange, BadRanges};
use journal::crypt::{Encryption, SegmentKey, WRAPPED_KEY_BYTES, WrappedKey};
use journal::format::bad_list::BadList;
use journal::format::manifest::{MAX_MANIFEST_BYTES, Manifest, ManifestError};
use journal::format::superblock::PairPlace;
use journal::format::{
    ChainPoint, JournalState, LowWater, MAX_SLOT_BYTES, MAX_SLOTS, MIN_SLOT_BYTES, PAGE_BYTES, PageError,
    SegmentHeader, SegmentTrailer, Superblock, SuperblockError, VolumeState, page_crc,
};
use proptest::prelude::*;
use uuid::Uuid;

const PAGE: u64 = PAGE_BYTES as u64;

fn any_uuid() -> impl Strategy<Value = Uuid> {
    any::<u128>().prop_map(Uuid::from_u128)
}

fn any_slot_len_bytes() -> impl Strategy<Value = u64> {
    (MIN_SLOT_BYTES / PAGE..=MAX_SLOT_BYTES / PAGE).prop_map(|pages| pages * PAGE)
}

fn any_point() -> impl Strategy<Value = ChainPoint> {
    (0..u64::MAX, any::<u32>()).prop_map(|(seq, batch_crc)| ChainPoint { seq, batch_crc })
}

fn any_place() -> impl Strategy<Value = PairPlace> {
    (0..2_u32, any::<u32>()).prop_map(|(slot, crc)| PairPlace { slot, crc })
}

fn any_state() -> impl Strategy<Value = JournalState> {
    prop_oneof![
        any::<u64>().prop_map(|sync_id| JournalState::FirstSync { sync_id }),
        Just(JournalState::Consistent),
        any::<u64>().prop_map(|sync_id| JournalState::HistoryGivenUp { sync_id }),
    ]
}

fn any_volume() -> impl Strategy<Value = VolumeState> {
    (any_uuid(), any::<u64>(), 0..=1_u64 << 60, any::<bool>()).prop_map(
        |(id, base_seq, size_bytes, fresh_image)| VolumeState { id, base_seq, size_bytes, fresh_image },
    )
}

fn any_key() -> impl Strategy<Value = WrappedKey> {
    (any_uuid(), any::<[u8; 32]>()).prop_map(|(key_id, random)| {
        let mut bytes = [0; WRAPPED_KEY_BYTES];
        bytes[..32].copy_from_slice(&random);
        WrappedKey { key_id, bytes }
    })
}

fn any_encryption() -> impl Strategy<Value = Encryption> {
    prop_oneof![Just(Encryption::Never), Just(Encryption::Off), any_key().prop_map(Encryption::On)]
}

prop_compose! {
    fn any_bad_list()(
        journal_id in any_uuid(),
        sequence in any::<u64>(),
        ranges in prop::collection::vec((0..64_u16, 0..1_u64 << 59, 1..1_u64 << 40, any::<u64>()), 0..200),
    ) -> BadList {
        let mut all = BadRanges::default();
        for (volume, offset_bytes, len_bytes, seq) in ranges {
            all.add(BadRange { volume, offset_bytes, len_bytes, seq });
        }
        BadList { journal_id, sequence, ranges: all }
    }
}

prop_compose! {
    fn any_superblock()(
        (journal_id, vm_id, vpg_id) in (any_uuid(), any_uuid(), any_uuid()),
        (tail_generation, parent_generation) in (any_uuid(), any_uuid()),
        (slot_len_bytes, slot_count) in (any_slot_len_bytes(), 0..=MAX_SLOTS),
        (sequence, open_count, promotion_intent_seq, receive_time_us) in any::<(u64, u64, u64, u64)>(),
        (generation_first_seq, generation_fork_seq) in any::<(u64, u64)>(),
        (manifest, bad_list) in (prop::option::of(any_place()), prop::option::of(any_place())),
        (low_water_segment, low_water, state) in (0..u64::MAX, any_point(), any_state()),
        encryption in any_encryption(),
        volumes in prop::collection::vec(any_volume(), 0..=64),
    ) -> Superblock {
        Superblock {
            sequence, journal_id, vm_id, vpg_id, slot_len_bytes, slot_count, open_count, manifest, bad_list, low_water_segment,
            low_water, state, promotion_intent_seq, tail_generation, parent_generation, generation_first_seq,
            generation_fork_seq, receive_time_us, encryption, volumes,
        }
    }
}

prop_compose! {
    fn any_header()(
        slot_len_bytes in any_slot_len_bytes(),
    )(
        slot_len_bytes in Just(slot_len_bytes),
        carried_pages in 1..slot_len_bytes / PAGE,
        journal_id in any_uuid(),
        (number, slot, after) in (1..u64::MAX, any::<u32>(), any_point()),
        (open_count, begin_time_us) in any::<(u64, u64)>(),
        encryption in prop::option::of((any_key(), any::<[u8; 16]>()).prop_map(|(key, salt)| SegmentKey { key, salt })),
        low_water in prop::option::of((1..=u64::MAX, any::<u64>())),
    ) -> SegmentHeader {
        let carried_end_bytes = carried_pages * PAGE;
        let low_water = low_water
            .map(|(segment, seq)| LowWater { segment: segment.min(number), seq: seq.min(after.seq) });
        SegmentHeader {
            journal_id, number, slot, open_count, after, carried_end_bytes, begin_time_us, slot_len_bytes, encryption, low_water,
        }
    }
}

prop_compose! {
    fn any_trailer()(
        // A slot whose first pages all were carried has no room for a footer.
        header in any_header().prop_filter("room", |header| header.carried_end_bytes + 2 * PAGE <= header.slot_len_bytes),
    )(
        data_end_pages in header.carried_end_bytes / PAGE..=header.slot_len_bytes / PAGE - 2,
        last_seq in header.after.seq..=u64::MAX,
        header in Just(header),
        (last_batch_crc, footer_crc, end_time_us) in any::<(u32, u32, u64)>(),
        footer_share in 0..=100_u64,
    ) -> SegmentTrailer {
        let room_pages = header.slot_len_bytes / PAGE - 1 - data_end_pages;
        let footer_len_bytes = (1 + (room_pages - 1) * footer_share / 100) * PAGE;
        let last = ChainPoint { seq: last_seq, batch_crc: last_batch_crc };
        SegmentTrailer { header, data_end_bytes: data_end_pages * PAGE, footer_len_bytes, footer_crc, last, end_time_us }
    }
}

fn flipped(page: &[u8], bit: usize) -> Vec<u8> {
    let mut bytes = page.to_vec();
    bytes[bit / 8] ^= 1 << (bit % 8);
    bytes
}

proptest! {
    #[test]
    fn a_bad_list_comes_back_and_no_flipped_bit_goes_unnoticed(list in any_bad_list(), at in any::<prop::sample::Index>(), bit in 0..8) {
        let (mut bytes, crc) = list.encode().expect("there is room");
        prop_assert_eq!(bytes.len() % PAGE_BYTES, 0);
        prop_assert_eq!(BadList::decode(&bytes), Ok((list.clone(), crc)));
        // What follows the entries means nothing.
        let at = at.index(64 + list.ranges.len() * 32);
        bytes[at] ^= 1_u8 << bit;
        prop_assert!(BadList::decode(&bytes).is_err());
    }

    #[test]
    fn a_superblock_comes_back(superblock in any_superblock(), bit in 0..PAGE_BYTES * 8) {
        let page = superblock.encode();
        prop_assert_eq!(Superblock::decode(&page), Ok(superblock));
        let error = Superblock::decode(&flipped(&page, bit)).expect_err("must be noticed");
        match bit / 8 {
            0..8 => prop_assert_eq!(error, SuperblockError::Magic),
            // A flipped version is damage: it must not keep everybody away from the other copy.
            _ => prop_assert_eq!(error, SuperblockError::Crc),
        }
    }

    #[test]
    fn a_superblock_of_a_newer_release_is_told_from_a_damaged_one(superblock in any_superblock(), version in 2_u32..) {
        let mut page = superblock.encode();
        page[8..12].copy_from_slice(&version.to_le_bytes());
        prop_assert_eq!(Superblock::decode(&page), Err(SuperblockError::Crc));
        let crc = page_crc(&page, 12);
        page[12..16].copy_from_slice(&crc.to_le_bytes());
        prop_assert_eq!(Superblock::decode(&page), Err(SuperblockError::Version(version)));
    }

    #[test]
    fn a_segment_header_comes_back(header in any_header(), bit in 0..PAGE_BYTES * 8) {
        let page = header.encode();
        let slot_len_bytes = header.slot_len_bytes;
        prop_assert_eq!(SegmentHeader::decode_of_any(&page), Ok(header.clone()));
        prop_assert!(SegmentTrailer::decode(&page, slot_len_bytes).is_err_and(|error| error == PageError::Magic));
        prop_assert!(SegmentHeader::decode(&flipped(&page, bit), slot_len_bytes).is_err());
        prop_assert_eq!(SegmentHeader::decode(&page, slot_len_bytes), Ok(header));
    }

    #[test]
    fn a_segment_trailer_comes_back(trailer in any_trailer(), bit in 0..PAGE_BYTES * 8) {
        let page = trailer.encode();
        let slot_len_bytes = trailer.header.slot_len_bytes;
        prop_assert!(SegmentHeader::decode(&page, slot_len_bytes).is_err_and(|error| error == PageError::Magic));
        prop_assert!(SegmentTrailer::decode(&flipped(&page, bit), slot_len_bytes).is_err());
        prop_assert_eq!(SegmentTrailer::decode(&page, slot_len_bytes), Ok(trailer));
    }

    #[test]
    fn a_manifest_comes_back(
        journal_id in any_uuid(),
        sequence in any::<u64>(),
        text in "\\PC{0,2000}",
        at in any::<prop::sample::Index>(),
    ) {
        let manifest = Manifest { journal_id, sequence, text };
        let (bytes, crc) = manifest.encode().expect("short enough");
        prop_assert_eq!(bytes.len() % PAGE_BYTES, 0);
        let covered_bytes = 64 + manifest.text.len();
        prop_assert!(Manifest::decode(&flipped(&bytes, at.index(covered_bytes * 8))).is_err());
        prop_assert_eq!(Manifest::decode(&bytes), Ok((manifest, crc)));
    }
}

#[test]
fn a_manifest_may_be_as_long_as_its_slot_and_no_longer() {
    let of = |len_bytes| Manifest { journal_id: Uuid::nil(), sequence: 1, text: "x".repeat(len_bytes) };
    let (bytes, crc) = of(MAX_MANIFEST_BYTES).encode().expect("fits");
    assert_eq!(bytes.len(), journal::format::MANIFEST_SLOT_BYTES);
    assert_eq!(Manifest::decode(&bytes), Ok((of(MAX_MANIFEST_BYTES), crc)));
    let too_long = MAX_MANIFEST_BYTES + 1;
    assert_eq!(of(too_long).encode(), Err(ManifestError::Length(too_long as u32)));
}
