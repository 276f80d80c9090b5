//! Who is to be woken on a reactor thread: a bit for each source and the thread's own sleep state. Marking is two atomic
//! operations, and only a mark that finds the thread asleep costs a system call.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

/// How many sources one thread can serve.
pub(crate) const SOURCES_MAX: u32 = 4096;

/// The thread is running or has nothing pending.
const AWAKE: u8 = 0;
/// The thread is about to wait in the kernel, or does.
const ASLEEP: u8 = 1;
/// Something was marked since the last [`WakeSet::collect`].
const MARKED: u8 = 2;

/// The marks of one thread. All threads may mark; only the owner sleeps and collects.
///
/// No mark is lost: a marker sets its bit before it swaps the state to MARKED; the owner swaps the state away before it
/// reads the bits, and goes to sleep only by exchanging AWAKE for ASLEEP.
pub(crate) struct WakeSet {
    state: AtomicU8,
    sources: [AtomicU64; SOURCES_MAX as usize / 64],
}

impl WakeSet {
    pub(crate) fn new() -> Self {
        Self {
            state: AtomicU8::new(AWAKE),
            sources: [const { AtomicU64::new(0) }; SOURCES_MAX as usize / 64],
        }
    }

    /// Marks a source. True if the thread sleeps and its bell must be rung; each sleep is ended by one marker only.
    pub(crate) fn mark(&self, index: u32) -> bool {
        let bit = 1_u64 << (index % 64);
        let word = &self.sources[(index / 64) as usize];
        // Always a read-modify-write: a plain load could see a bit that the owner has already taken.
        if word.fetch_or(bit, Ordering::AcqRel) & bit != 0 {
            return false;
        }
        self.mark_messages()
    }

    /// Marks that there are messages. True if the bell must be rung.
    pub(crate) fn mark_messages(&self) -> bool {
        self.state.swap(MARKED, Ordering::AcqRel) == ASLEEP
    }

    /// Owner: whether it may wait in the kernel; from then on a mark rings the bell.
    pub(crate) fn prepare_sleep(&self) -> bool {
        self.state.compare_exchange(AWAKE, ASLEEP, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Owner, after a wait: appends the marked sources to `woken`; true if anything was marked.
    pub(crate) fn collect(&self, woken: &mut Vec<u32>) -> bool {
        if self.state.swap(AWAKE, Ordering::AcqRel) != MARKED {
            return false;
        }
        for (base, word) in (0..).step_by(64).zip(&self.sources) {
            if word.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let mut bits = word.swap(0, Ordering::AcqRel);
            while bits != 0 {
                woken.push(base + bits.trailing_zeros());
                bits &= bits - 1;
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicU32;

    use super::*;

    #[test]
    fn only_a_sleeper_needs_the_bell_and_only_once() {
        let wakes = WakeSet::new();
        assert!(!wakes.mark(7));
        assert!(!wakes.prepare_sleep(), "a mark forbids to sleep");
        let mut woken = Vec::new();
        assert!(wakes.collect(&mut woken));
        assert_eq!(woken, [7]);
        assert!(wakes.prepare_sleep());
        assert!(wakes.mark(4095));
        assert!(!wakes.mark(4095));
        assert!(!wakes.mark(64));
        woken.clear();
        assert!(wakes.collect(&mut woken));
        assert_eq!(woken, [64, 4095]);
        assert!(!wakes.collect(&mut woken));
    }

    /// Each marker raises a count before it marks; the owner must see the last count of each without a further mark.
    #[test]
    fn no_mark_is_lost_between_threads() {
        const ROUNDS: u32 = 50_000;
        let wakes = Arc::new(WakeSet::new());
        let counts: Arc<[AtomicU32; 2]> = Arc::new([AtomicU32::new(0), AtomicU32::new(0)]);
        let bell = Arc::new(AtomicU32::new(0));
        std::thread::scope(|scope| {
            for index in 0..2_u32 {
                let (wakes, counts, bell) = (Arc::clone(&wakes), Arc::clone(&counts), Arc::clone(&bell));
                scope.spawn(move || {
                    for _ in 0..ROUNDS {
                        counts[index as usize].fetch_add(1, Ordering::Relaxed);
                        if wakes.mark(index) {
                            bell.fetch_add(1, Ordering::Release);
                        }
                    }
                });
            }
            let (mut seen, mut rung, mut woken) = ([0; 2], 0, Vec::new());
            while seen != [ROUNDS; 2] {
                if wakes.prepare_sleep() {
                    while bell.load(Ordering::Acquire) == rung {
                        std::thread::yield_now();
                    }
                    rung += 1;
                }
                wakes.collect(&mut woken);
                for index in woken.drain(..) {
                    seen[index as usize] = counts[index as usize].load(Ordering::Relaxed);
                }
            }
        });
    }
}
