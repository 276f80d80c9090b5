//! Benchmarks beside a peer: both measured in turn, at least five times, and compared pair by pair, so that what
//! else the machine does meanwhile falls on both.

mod journal;
mod protected;
mod ship;
mod site_ca;
mod ublk;
mod view;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::initramfs::Job;
use crate::machine::{Disk, DiskContent, Machine};
use crate::suite::context::Context;

/// Fewest pairs that make a result.
pub const PAIRS_MIN: u32 = 5;

const PAIR_MARK: &str = "@pair@ ";

/// One benchmark.
#[derive(Clone, Copy, Debug)]
pub struct Benchmark {
    /// Its name.
    pub name: &'static str,
    /// What is measured, in one sentence.
    pub what: &'static str,
    /// The peer.
    pub peer: &'static str,
    /// The unit of both values.
    pub unit: &'static str,
    /// What is better.
    pub better: Better,
    /// The ratio that must be reached; none for a figure that is only reported.
    pub gate: Option<f64>,
    /// Where it runs.
    pub place: BenchPlace,
    /// Programs that must be at hand.
    pub programs: &'static [&'static str],
    /// Measures one pair; `number` counts from 0.
    pub pair: fn(context: &mut Context, number: u32) -> Result<Pair>,
}

/// Which of two values is the better one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Better {
    /// The larger, as of a throughput.
    Higher,
    /// The smaller, as of a latency.
    Lower,
}

/// Where a benchmark runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BenchPlace {
    /// In a machine of the rig (on this host where it has ublk).
    Rig {
        /// Its empty disks, of these sizes in MiB.
        disks_mib: &'static [u64],
    },
    /// On this host.
    Host,
}

/// Our value and the peer's, measured one right after the other.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Pair {
    /// Ours.
    pub ours: f64,
    /// The peer's.
    pub peer: f64,
}

/// A benchmark's result, as printed by `--json`.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Outcome {
    /// The benchmark.
    pub name: String,
    /// Median of our values.
    pub value: f64,
    /// The peer.
    pub peer: String,
    /// Median of the peer's values.
    pub peer_value: f64,
    /// Their unit.
    pub unit: String,
    /// Median over the pairs of how many times better than the peer we are.
    pub ratio: f64,
    /// Distance between the best and the worst pair's ratio, as a part of the median one.
    pub spread: f64,
}

/// All benchmarks.
pub fn all() -> Vec<Benchmark> {
    [ship::BENCHMARKS, journal::BENCHMARKS, view::BENCHMARKS, ublk::BENCHMARKS, protected::BENCHMARKS]
        .concat()
}

impl Outcome {
    /// Sums up what was measured.
    pub fn of(benchmark: &Benchmark, pairs: &[Pair]) -> Result<Self> {
        ensure!(pairs.len() >= PAIRS_MIN as usize, "{}: only {} pairs", benchmark.name, pairs.len());
        for pair in pairs {
            let sound = |value: f64| value.is_finite() && value > 0.0;
            ensure!(sound(pair.ours) && sound(pair.peer), "{}: measured {pair:?}", benchmark.name);
        }
        let mut ratios: Vec<f64> = pairs
            .iter()
            .map(|pair| match benchmark.better {
                Better::Higher => pair.ours / pair.peer,
                Better::Lower => pair.peer / pair.ours,
            })
            .collect();
        let ratio = median(&mut ratios);
        Ok(Self {
            name: benchmark.name.to_owned(),
            value: median(&mut pairs.iter().map(|pair| pair.ours).collect::<Vec<_>>()),
            peer: benchmark.peer.to_owned(),
            peer_value: median(&mut pairs.iter().map(|pair| pair.peer).collect::<Vec<_>>()),
            unit: benchmark.unit.to_owned(),
            ratio,
            spread: (ratios[ratios.len() - 1] - ratios[0]) / ratio,
        })
    }

    /// The head of the table that [`Outcome::row`] continues.
    pub fn head() -> String {
        format!(
            "{:<14} {:>12} {:<22} {:>12} {:<8} {:>6} {:>7}",
            "name", "value", "peer", "peer value", "unit", "ratio", "spread"
        )
    }

    /// One line of the table.
    pub fn row(&self) -> String {
        format!(
            "{:<14} {:>12.1} {:<22} {:>12.1} {:<8} {:>6.2} {:>6.0}%",
            self.name,
            self.value,
            self.peer,
            self.peer_value,
            self.unit,
            self.ratio,
            self.spread * 100.0
        )
    }
}

/// Measures pairs in this very process and prints each for whoever started it.
pub fn run_here(benchmark: &Benchmark, pairs: u32) -> Result<Vec<Pair>> {
    let mut context = Context::new(benchmark.name)?;
    if let BenchPlace::Rig { disks_mib } = benchmark.place {
        context.attach_disks(disks_mib)?;
    }
    (0..pairs)
        .map(|number| {
            let pair = (benchmark.pair)(&mut context, number).with_context(|| format!("pair {number}"))?;
            println!("{PAIR_MARK}{}", serde_json::to_string(&pair)?);
            Ok(pair)
        })
        .collect()
}

/// Measures pairs in a machine.
pub fn run_in_machine(
    benchmark: &Benchmark,
    pairs: u32,
    mut machine: Machine,
    programs: &[PathBuf],
) -> Result<Vec<Pair>> {
    let argv = ["rig", "inside-bench", benchmark.name, &pairs.to_string()].map(str::to_owned).to_vec();
    let modules = ["ublk_drv", "loop"].map(str::to_owned).to_vec();
    let job = Job { argv, programs: programs.to_vec(), modules, ..Job::default() };
    if let BenchPlace::Rig { disks_mib } = benchmark.place {
        let empty =
            |size_mib: &u64| Disk { content: DiskContent::Empty { size_mib: *size_mib }, log_writes: false };
        machine.disks = disks_mib.iter().map(empty).collect();
    }
    machine.limit = Duration::from_secs(60 + 60 * u64::from(pairs));
    let finished = machine.run(&job, &mut |_| {})?;
    let output = finished.output()?;
    ensure!(finished.exit == 0, "{} failed:\n{}", benchmark.name, crate::tool::tail(&output, 30));
    pairs_in(&output)
}

/// The pairs that [`run_here`] printed.
pub fn pairs_in(output: &str) -> Result<Vec<Pair>> {
    output
        .lines()
        .filter_map(|line| line.strip_prefix(PAIR_MARK))
        .map(|json| Ok(serde_json::from_str(json)?))
        .collect()
}

/// Every second pair begins with the peer.
fn in_turn(
    number: u32,
    ours: impl FnOnce() -> Result<f64>,
    peer: impl FnOnce() -> Result<f64>,
) -> Result<Pair> {
    if number.is_multiple_of(2) {
        let ours = ours()?;
        Ok(Pair { ours, peer: peer()? })
    } else {
        let peer = peer()?;
        Ok(Pair { ours: ours()?, peer })
    }
}

/// Sorts the values and gives the middle one, or the mean of the two in the middle.
fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len().is_multiple_of(2) {
        f64::midpoint(values[middle - 1], values[middle])
    } else {
        values[middle]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn benchmark(better: Better) -> Benchmark {
        Benchmark {
            name: "x",
            what: "",
            peer: "p",
            unit: "ms",
            better,
            gate: None,
            place: BenchPlace::Host,
            programs: &[],
            pair: |_, _| Ok(Pair { ours: 1.0, peer: 1.0 }),
        }
    }

    #[test]
    fn a_ratio_above_one_is_always_better_than_the_peer() {
        let pairs: Vec<Pair> = [2.0, 2.0, 2.0, 4.0, 1.0].map(|ours| Pair { ours, peer: 2.0 }).to_vec();
        let higher = Outcome::of(&benchmark(Better::Higher), &pairs).expect("enough pairs");
        assert_eq!((higher.value, higher.peer_value, higher.ratio, higher.spread), (2.0, 2.0, 1.0, 1.5));
        let fast: Vec<Pair> = [1.0; 5].map(|ours| Pair { ours, peer: 2.0 }).to_vec();
        assert_eq!(Outcome::of(&benchmark(Better::Lower), &fast).expect("enough pairs").ratio, 2.0);
        assert_eq!(Outcome::of(&benchmark(Better::Higher), &fast).expect("enough pairs").ratio, 0.5);
    }

    #[test]
    fn too_few_pairs_or_an_empty_measurement_are_no_result() {
        let pairs = vec![Pair { ours: 1.0, peer: 1.0 }; 4];
        assert!(Outcome::of(&benchmark(Better::Higher), &pairs).is_err());
        let zero = vec![Pair { ours: 0.0, peer: 1.0 }; 5];
        assert!(Outcome::of(&benchmark(Better::Higher), &zero).is_err());
    }

    #[test]
    fn json_has_the_documented_keys_in_their_order() {
        let pairs = vec![Pair { ours: 3.0, peer: 2.0 }; 5];
        let outcome = Outcome::of(&benchmark(Better::Higher), &pairs).expect("enough pairs");
        let json = serde_json::to_string(&outcome).expect("plain data");
        assert_eq!(
            json,
            r#"{"name":"x","value":3.0,"peer":"p","peer_value":2.0,"unit":"ms","ratio":1.5,"spread":0.0}"#
        );
    }
}
