use proptest::prelude::*;

use super::*;

fn bad(offset_bytes: u64, len_bytes: u64, seq: u64) -> BadRange {
    BadRange { volume: 1, offset_bytes, len_bytes, seq }
}

#[test]
fn neighbours_of_one_record_are_one_range() {
    let mut ranges = BadRanges::default();
    for range in [bad(4096, 4096, 7), bad(12288, 4096, 7), bad(8192, 4096, 7), bad(16384, 4096, 8)] {
        ranges.add(range);
    }
    assert_eq!(ranges.iter().collect::<Vec<_>>(), [bad(4096, 12288, 7), bad(16384, 4096, 8)]);
    assert_eq!(ranges.first_in(1, 0..4096), None);
    assert_eq!(ranges.first_in(0, 0..u64::MAX), None);
    assert_eq!(ranges.first_in(1, 5000..6000), Some(bad(5000, 1000, 7)));
    assert_eq!(ranges.first_in(1, 16000..17000), Some(bad(16000, 384, 7)));
}

proptest! {
    /// Against an array of bytes.
    #[test]
    fn adding_and_healing_agree_with_a_model(steps in prop::collection::vec((0_u16..2, 0_u64..60, 1_u64..20, 0_u64..4), 0..40)) {
        let mut ranges = BadRanges::default();
        let mut model = [[0_u64; 80]; 2];
        for (volume, offset, len, seq) in steps {
            if seq == 0 {
                ranges.heal(volume, offset..offset + len);
            } else {
                ranges.add(BadRange { volume, offset_bytes: offset, len_bytes: len, seq });
            }
            model[usize::from(volume)][offset as usize..(offset + len) as usize].fill(seq);
        }
        let mut found = [[0_u64; 80]; 2];
        for bad in ranges.iter() {
            for at in bad.offset_bytes..bad.offset_bytes + bad.len_bytes {
                prop_assert_eq!(found[usize::from(bad.volume)][at as usize], 0);
                found[usize::from(bad.volume)][at as usize] = bad.seq;
            }
        }
        prop_assert_eq!(found, model);
        for begin in 0..70 {
            let first = ranges.first_in(0, begin..begin + 7).map(|bad| bad.offset_bytes);
            let expected = (begin..begin + 7).find(|at| model[0][*at as usize] != 0);
            prop_assert_eq!(first, expected);
        }
    }
}

#[test]
fn too_many_are_merged_with_what_is_between_the_nearest() {
    let mut ranges = BadRanges::default();
    // Gaps of 1, 2, 3, … between ranges of one.
    let mut at = 0;
    for number in 0..100 {
        ranges.add(bad(at, 1, number));
        at += number + 2;
    }
    let before: Vec<BadRange> = ranges.iter().collect();
    ranges.coarsen(10);
    assert!((1..=10).contains(&ranges.len()), "{}", ranges.len());
    for bad in before {
        assert_eq!(
            ranges.first_in(1, bad.offset_bytes..bad.offset_bytes + 1).map(|bad| bad.len_bytes),
            Some(1)
        );
    }
    let last: Vec<u64> = ranges.iter().skip(1).map(|bad| bad.len_bytes).collect();
    assert!(last.iter().all(|len| *len == 1), "the far ones stay alone: {last:?}");
}
