//! Deaths and failures at an exact operation, each way on purpose: what a systematic test goes through one by one.

use super::file::{Fate, put};
use super::{Crash, Fault, InFlight, Inner, SECTOR_BYTES, SimDisk, SimRng};
use crate::storage::{Completion, Op, Purpose};

/// What happens at an operation: how a process ends there, or that it fails. What else was written and not synced a kill leaves as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Strike {
    /// It is killed before the operation has done anything.
    KillBefore,
    /// It is killed when the operation is done, before it learns of that.
    KillAfter,
    /// The power goes before the operation; of all that was not synced nothing is left.
    PowerBefore,
    /// The power goes when the operation is done; of all else that was not synced nothing is left: the writes before it were
    /// overtaken.
    PowerAfter,
    /// The power goes while it is under way: a write is torn, and of all else that was not synced each write is there, gone, or torn.
    PowerDuring,
    /// The operation fails and the process lives: a write is there in part, what a sync was for can be read and is never durable.
    Fail,
}

impl Strike {
    /// All deaths.
    pub const DEATHS: [Self; 5] =
        [Self::KillBefore, Self::KillAfter, Self::PowerBefore, Self::PowerAfter, Self::PowerDuring];
    /// The deaths, and the failure.
    pub const ALL: [Self; 6] = [
        Self::KillBefore,
        Self::KillAfter,
        Self::PowerBefore,
        Self::PowerAfter,
        Self::PowerDuring,
        Self::Fail,
    ];
}

/// What an operation was for, and what it did: `read`, `write`, `fdatasync`, `allocate`, `punch` or `truncate`.
pub type OpKind = (Purpose, &'static str);

impl SimDisk {
    /// Lets the operation after this many more be the last one of the process that is the living one then, or fail. `seed` decides what that
    /// leaves.
    pub fn arm_strike(&self, after_ops: u64, strike: Strike, seed: u64) {
        self.lock().strike = Some((after_ops, strike, seed));
    }

    /// Whether what was armed has not happened yet.
    pub fn is_strike_armed(&self) -> bool {
        self.lock().strike.is_some()
    }

    /// From now on the operations that are run are noted.
    pub fn note_ops(&self) {
        self.lock().run_ops = Some(Vec::new());
    }

    /// Those that were run since [`Self::note_ops`], in order.
    pub fn run_ops(&self) -> Vec<OpKind> {
        self.lock().run_ops.clone().unwrap_or_default()
    }

    /// The same files on another disk, after all I/O of dead processes. The living process has none under way.
    pub fn copy(&self, seed: u64) -> Self {
        self.fence();
        let inner = self.lock();
        assert!(inner.in_flight.is_empty(), "a copy has no I/O under way");
        let copy = Self::new(seed);
        {
            let mut copied = copy.lock();
            copied.files.clone_from(&inner.files);
            copied.capacity_bytes = inner.capacity_bytes;
            copied.next_write = inner.next_write;
        }
        copy
    }
}

impl Inner {
    pub(super) fn note_run(&mut self, flight: &InFlight) {
        if let Some(ops) = &mut self.run_ops {
            ops.push((flight.purpose, flight.op.verb()));
        }
    }

    /// The process dies at the operation with this index, or gets it back failed.
    pub(super) fn strike(&mut self, index: usize, strike: Strike, seed: u64) -> Option<Completion> {
        (self.rng, self.strike) = (SimRng::new(seed), None);
        let flight = self.in_flight.swap_remove(index);
        self.note_run(&flight);
        match strike {
            Strike::KillBefore => self.die(Crash::Kill, None),
            Strike::KillAfter => {
                self.run(flight);
                self.die(Crash::Kill, None);
            }
            Strike::PowerBefore => self.lose_all(),
            Strike::PowerAfter => {
                self.persist(flight, None);
                self.lose_all();
            }
            Strike::PowerDuring => {
                let granule = if self.rng.one_in(2) { 1 } else { 8 };
                let torn = Fate { fault: Fault::TornWrite, granule, salt: self.rng.next_u64() };
                if matches!(flight.op, Op::Write { .. } | Op::Punch { .. }) {
                    self.persist(flight, Some(torn));
                }
                self.die(Crash::PowerCut, None);
            }
            Strike::Fail => return Some(self.fail(&flight)),
        }
        None
    }

    /// The operation is done; what it wrote is durable, or as much of it as is not torn off.
    fn persist(&mut self, flight: InFlight, torn: Option<Fate>) {
        let (file, write) = (flight.file.0 as usize, self.next_write);
        // Of older content none has reached the disk by itself.
        let before = std::mem::take(&mut self.files[file].dirty);
        if matches!(flight.op, Op::Sync) {
            self.files[file].dirty = before;
            self.run(flight);
            return;
        }
        self.run(flight);
        let sim_file = &mut self.files[file];
        for (sector, dirty) in std::mem::replace(&mut sim_file.dirty, before) {
            if dirty.write == write && torn.is_none_or(|torn| torn.keeps(sector)) {
                put(&mut sim_file.durable, sector, &dirty.data[..SECTOR_BYTES]);
                sim_file.dirty.remove(&sector);
            } else {
                sim_file.undo(sector);
            }
        }
    }

    /// The power goes, and nothing that was not synced is left.
    fn lose_all(&mut self) {
        self.in_flight.clear();
        self.orphans.clear();
        for file in &mut self.files {
            for sector in std::mem::take(&mut file.dirty).into_keys() {
                file.undo(sector);
            }
        }
        self.die(Crash::PowerCut, None);
    }
}
