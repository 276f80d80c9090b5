//! Brings pieces into the order of their places. A view of millions of records is opened while somebody waits, so all processors sort, and what
//! is sorted already in the footers that the pieces come from is made use of.

use super::IndexPiece;

/// Fewer are sorted at once, in the thread that asks.
const PARALLEL_MIN: usize = 1 << 17;
/// Pieces are spread over this many buckets, each sorted by itself.
const BUCKETS: usize = 512;
/// Pieces looked at for each border between buckets.
const SAMPLES_PER_BUCKET: usize = 16;
const THREADS_MAX: usize = 8;

/// Sorts by place; pieces at one place come in any order. Each of `runs` ends before the next one begins, and is in order. `spare` is memory,
/// empty before and after.
pub(super) fn sort_by_place(pieces: &mut Vec<IndexPiece>, runs: &[usize], spare: &mut Vec<IndexPiece>) {
    if pieces.len() < PARALLEL_MIN {
        pieces.sort_unstable_by_key(|piece| piece.offset_bytes);
        return;
    }
    let borders = borders(pieces);
    let mut runs: Vec<&[IndexPiece]> = {
        let ends = runs[1..].iter().copied().chain([pieces.len()]);
        runs.iter().copied().zip(ends).map(|(begin, end)| &pieces[begin..end]).collect()
    };
    // Bucket by bucket what each run has of it.
    let mut counts = [0; BUCKETS];
    spare.reserve(pieces.len());
    for (bucket, count) in counts.iter_mut().enumerate() {
        let before = spare.len();
        for run in &mut runs {
            let end = match borders.get(bucket) {
                Some(border) => first_from(run, *border),
                None => run.len(),
            };
            let (part, rest) = run.split_at(end);
            spare.extend_from_slice(part);
            *run = rest;
        }
        *count = spare.len() - before;
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

/// How many pieces of a run are before a place. Looked for from its start on, since buckets are taken in order and have few pieces of a run.
fn first_from(run: &[IndexPiece], place: u64) -> usize {
    let is_before = |piece: &IndexPiece| piece.offset_bytes < place;
    let mut reach = 8;
    while reach < run.len() && is_before(&run[reach]) {
        reach *= 2;
    }
    run[..run.len().min(reach)].partition_point(is_before)
}

/// Places that divide the pieces into buckets of about the same size, in order.
fn borders(pieces: &[IndexPiece]) -> [u64; BUCKETS - 1] {
    let count = BUCKETS * SAMPLES_PER_BUCKET;
    let step = pieces.len() / count;
    // At no fixed distance, or what repeats in the pieces would repeat in the samples.
    let place = |number: usize| number * step + number.wrapping_mul(0x9e37_79b9) % step;
    let mut samples: Vec<u64> = (0..count).map(|number| pieces[place(number)].offset_bytes).collect();
    samples.sort_unstable();
    std::array::from_fn(|bucket| samples[(bucket + 1) * SAMPLES_PER_BUCKET])
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
            // Runs of any length, one of them empty.
            let runs = [0, 1, 1, 1000, 70_000, 70_007, 200_000];
            for (at, begin) in runs.into_iter().enumerate() {
                let end = runs.get(at + 1).copied().unwrap_or(count);
                pieces[begin..end].sort_unstable_by_key(|piece| piece.offset_bytes);
            }
            let mut expected = pieces.clone();
            sort_by_place(&mut pieces, &runs, &mut Vec::new());
            assert!(pieces.is_sorted_by_key(|piece| piece.offset_bytes), "case {case}");
            let key = |piece: &IndexPiece| (piece.offset_bytes, piece.seq);
            expected.sort_unstable_by_key(key);
            pieces.sort_unstable_by_key(key);
            assert!(pieces == expected, "case {case}");
        }
    }
}
