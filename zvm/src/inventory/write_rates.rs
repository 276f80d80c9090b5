//! How much VMs write, from the counters of their disks: what protecting them would take. No I/O, no clock of its own.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Inventory, Vm};

/// Parts of an hour that a peak is told of, microseconds: shorter ones are levelled by the memory of the source's VRA.
const PEAK_OVER_US: u64 = 60_000_000;

/// What a journal takes more than what was written: headers, checksums, footers, checkpoints, in percent.
const JOURNAL_OVERHEAD_PERCENT: u64 = 5;

/// What is known of all VMs' writes.
#[derive(Debug, Default)]
pub struct WriteRates {
    vms: BTreeMap<Uuid, Watched>,
}

/// How much a VM writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriteRate {
    /// For how long its counters were watched, microseconds.
    pub watched_us: u64,
    /// Bytes a second, on average over that time.
    pub average_bytes_per_s: u64,
    /// Bytes a second in its busiest minute.
    pub peak_bytes_per_s: u64,
}

/// What protecting a VM would take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Demand {
    /// Space for the journal of the history, bytes.
    pub journal_bytes: u64,
    /// What the link must carry without falling behind in the busiest minute, bits a second.
    pub link_bits_per_s: u64,
}

#[derive(Debug)]
struct Watched {
    /// The last reading: when, microseconds, and each disk's counter.
    at_us: u64,
    counters: BTreeMap<String, u64>,
    watched_us: u64,
    written_bytes: u64,
    /// The minute that is being counted: how long, microseconds, and how many bytes.
    minute: (u64, u64),
    peak_bytes_per_s: u64,
}

impl WriteRates {
    /// Takes the counters of a reading.
    pub fn note<'a>(&mut self, vms: impl IntoIterator<Item = &'a Vm>, now_us: u64) {
        for vm in vms {
            let counters = counters(vm);
            match self.vms.get_mut(&vm.uuid) {
                Some(watched) => watched.note(counters, now_us),
                None if counters.is_empty() => {}
                None => {
                    let watched = Watched {
                        at_us: now_us,
                        counters,
                        watched_us: 0,
                        written_bytes: 0,
                        minute: (0, 0),
                        peak_bytes_per_s: 0,
                    };
                    self.vms.insert(vm.uuid, watched);
                }
            }
        }
    }

    /// Forgets VMs that are no more.
    pub fn keep(&mut self, inventory: &Inventory) {
        let known: BTreeSet<Uuid> = inventory.vms.iter().map(|vm| vm.uuid).collect();
        self.vms.retain(|uuid, _| known.contains(uuid));
    }

    /// How much a VM writes, if it was watched for a while.
    pub fn of(&self, vm: Uuid) -> Option<WriteRate> {
        let watched = self.vms.get(&vm).filter(|watched| watched.watched_us > 0)?;
        let average_bytes_per_s = per_second(watched.written_bytes, watched.watched_us);
        Some(WriteRate {
            watched_us: watched.watched_us,
            average_bytes_per_s,
            peak_bytes_per_s: watched.peak_bytes_per_s.max(average_bytes_per_s),
        })
    }
}

impl WriteRate {
    /// What a history of so many seconds would take, if the VM goes on like this.
    pub fn demand(&self, history_s: u64) -> Demand {
        let written_bytes = self.average_bytes_per_s.saturating_mul(history_s);
        let overhead_bytes = written_bytes / 100 * JOURNAL_OVERHEAD_PERCENT;
        Demand {
            journal_bytes: written_bytes.saturating_add(overhead_bytes),
            link_bits_per_s: self.peak_bytes_per_s.saturating_mul(8),
        }
    }
}

impl Watched {
    fn note(&mut self, counters: BTreeMap<String, u64>, now_us: u64) {
        let passed_us = now_us.saturating_sub(self.at_us);
        if passed_us == 0 {
            return;
        }
        // Counters begin anew with the guest's process, and of a guest that is off there are none.
        let written_bytes = counters
            .iter()
            .map(|(disk, now)| match self.counters.get(disk) {
                Some(before) if before <= now => now - before,
                Some(_) => *now,
                None => 0,
            })
            .fold(0_u64, u64::saturating_add);
        self.at_us = now_us;
        self.counters = counters;
        self.watched_us = self.watched_us.saturating_add(passed_us);
        self.written_bytes = self.written_bytes.saturating_add(written_bytes);
        self.minute = (self.minute.0 + passed_us, self.minute.1.saturating_add(written_bytes));
        if self.minute.0 >= PEAK_OVER_US {
            self.peak_bytes_per_s = self.peak_bytes_per_s.max(per_second(self.minute.1, self.minute.0));
            self.minute = (0, 0);
        }
    }
}

fn counters(vm: &Vm) -> BTreeMap<String, u64> {
    let counter = |disk: &super::Disk| Some((disk.name.clone(), disk.written_bytes?));
    vm.disks.iter().filter_map(counter).collect()
}

fn per_second(bytes: u64, us: u64) -> u64 {
    let per_second = u128::from(bytes) * 1_000_000 / u128::from(us.max(1));
    u64::try_from(per_second).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inventory::{Disk, DiskKind, Origin, Power};

    const SECOND_US: u64 = 1_000_000;
    const VM: Uuid = Uuid::from_u128(1);

    fn reading(written: &[Option<u64>]) -> Inventory {
        let disk = |(number, written_bytes): (usize, &Option<u64>)| Disk {
            name: format!("vd{number}"),
            path: "/d".into(),
            size_bytes: None,
            kind: DiskKind::Raw,
            served: None,
            written_bytes: *written_bytes,
        };
        let vm = Vm {
            uuid: VM,
            name: "db".into(),
            host: "h1".into(),
            power: Power::On,
            disks: written.iter().enumerate().map(disk).collect(),
            nics: Vec::new(),
            origin: Origin::default(),
        };
        Inventory { vms: vec![vm], ..Inventory::default() }
    }

    #[test]
    fn averages_and_peaks_survive_a_restart_of_the_guest() {
        let mut rates = WriteRates::default();
        rates.note(&reading(&[Some(5_000), Some(0)]).vms, 0);
        assert_eq!(rates.of(VM), None, "one reading tells no rate");
        rates.note(&reading(&[Some(65_000), Some(6_000)]).vms, 60 * SECOND_US);
        rates.note(&reading(&[Some(65_000), Some(6_000)]).vms, 120 * SECOND_US);
        let rate = rates.of(VM).unwrap();
        assert_eq!((rate.average_bytes_per_s, rate.peak_bytes_per_s), (550, 1_100));
        // It was started anew: 600 bytes since then.
        rates.note(&reading(&[Some(600), Some(0)]).vms, 180 * SECOND_US);
        assert_eq!(rates.of(VM).unwrap().average_bytes_per_s, 370);
        // It was off, and a disk came: what it wrote before it was watched doesn't count.
        rates.note(&reading(&[None, None]).vms, 240 * SECOND_US);
        rates.note(&reading(&[Some(0), Some(0), Some(1 << 40)]).vms, 300 * SECOND_US);
        let rate = rates.of(VM).unwrap();
        assert_eq!((rate.watched_us, rate.average_bytes_per_s), (300 * SECOND_US, 222));
        let demand = rate.demand(3_600);
        assert_eq!((demand.journal_bytes, demand.link_bits_per_s), (799_200 + 39_960, 8_800));
        rates.keep(&Inventory::default());
        assert_eq!(rates.of(VM), None);
    }
}
