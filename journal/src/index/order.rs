//! Brings pieces into the order of their places. A view of millions of records is opened while somebody waits, so this is a sample sort: it
//! takes the same time whatever the places are, and all processors.

use super::IndexPiece;

/// Fewer are sorted at once, in the thread that asks.
const PARALLEL_MIN: usize = 1 << 17;
/// Pieces are spread over this many buckets, each sorted by itself.
const BUCKETS: usize = 256;
/// Pieces looked at for each border between buckets.
const SAMPLES_PER_BUCKET: usize = 32;
const THREADS_MAX: usize = 8;

/// Sorts by place; pieces at one place come in any order. `spare` is memory, empty before and after.
pub(super) fn sort_by_place(pieces: &mut Vec<IndexPiece>, spare: &mut Vec<IndexPiece>) {
    if pieces.len() < PARALLEL_MIN {
        pieces.sort_unstable_by_key(|piece| piece.offset_bytes);
        return;
    }
    let borders = borders(pieces);
    // How many borders are at or below a place: a binary search without branches.
    let bucket_of = |offset_bytes: u64| {
        let (mut bucket, mut step) = (0, BUCKETS / 2);
        while step > 0 {
            bucket += if borders[bucket + step - 1] <= offset_bytes { step } else { 0 };
            step /= 2;
        }
        bucket
    };
    let mut counts = [0_usize; BUCKETS];
    pieces.iter().for_each(|piece| counts[bucket_of(piece.offset_bytes)] += 1);
    let mut next = [0_usize; BUCKETS];
    for bucket in 1..BUCKETS {
        next[bucket] = next[bucket - 1] + counts[bucket - 1];
    }
    spare.resize(pieces.len(), IndexPiece::default());
    for piece in pieces.iter() {
        let place = &mut next[bucket_of(piece.offset_bytes)];
        spare[*place] = *piece;
        *place += 1;
    }
    std::mem::swap(pieces, spare);
    spare.clear();

    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX);
    let mut shares: Vec<Vec<&mut [IndexPiece]>> = (0..threads).map(|_| Vec::new()).collect();
    let mut rest = pieces.as_mut_slice();
    for (bucket, count) in counts.into_iter().enumerate() {
        let (part, after) = rest.split_at_mut(count);
        shares[bucket % threads].push(part);
        rest = after;
    }
    let sort = |share: Vec<&mut [IndexPiece]>| {
        share.into_iter().for_each(|part| part.sort_unstable_by_key(|piece| piece.offset_bytes));
    };
    std::thread::scope(|scope| {
        let own = shares.pop();
        shares.into_iter().for_each(|share| drop(scope.spawn(move || sort(share))));
        own.into_iter().for_each(sort);
    });
}

/// Places that divide the pieces into buckets of about the same size, in order; one more than are needed.
fn borders(pieces: &[IndexPiece]) -> [u64; BUCKETS] {
    let count = BUCKETS * SAMPLES_PER_BUCKET;
    let step = pieces.len() / count;
    // At no fixed distance, or what repeats in the pieces would repeat in the samples.
    let place = |number: usize| number * step + number.wrapping_mul(0x9e37_79b9) % step;
    let mut samples: Vec<u64> = (0..count).map(|number| pieces[place(number)].offset_bytes).collect();
    samples.sort_unstable();
    std::array::from_fn(|bucket| samples.get((bucket + 1) * SAMPLES_PER_BUCKET).copied().unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{RngExt as _, SeedableRng};

    use super::*;

    #[test]
    fn any_places_are_sorted_and_none_is_lost() {
        let mut rng = StdRng::seed_from_u64(5);
        let count = PARALLEL_MIN * 2 + 3;
        let cases: [&mut dyn FnMut(u64) -> u64; 5] = [
            &mut |_| rng.random::<u64>() >> 8,
            &mut |number| number * 4096,
            &mut |number| (count as u64 - number) * 512,
            &mut |_| 4096,
            &mut |number| number % 3 * (1 << 45) + number % 1000,
        ];
        for (case, place) in cases.into_iter().enumerate() {
            let piece =
                |number| IndexPiece { offset_bytes: place(number), seq: number, ..IndexPiece::default() };
            let mut pieces: Vec<IndexPiece> = (0..count as u64).map(piece).collect();
            let mut expected = pieces.clone();
            sort_by_place(&mut pieces, &mut Vec::new());
            assert!(pieces.is_sorted_by_key(|piece| piece.offset_bytes), "case {case}");
            let key = |piece: &IndexPiece| (piece.offset_bytes, piece.seq);
            expected.sort_unstable_by_key(key);
            pieces.sort_unstable_by_key(key);
            assert!(pieces == expected, "case {case}");
        }
    }
}
