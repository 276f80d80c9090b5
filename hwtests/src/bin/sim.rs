//! Runs the simulation's seeds: one to look into, or many.

use clap::Parser;
use hwtests::sim::hosts::{run_hosts_seed, run_many_hosts};
use hwtests::sim::{
    Case, Coverage, Effort, PlantedBug, run_case, run_many, run_matrix, run_seed, trace_seed,
};

/// Guest, source, target and storage under one seed, against a model that knows every acknowledged write.
#[derive(Debug, Parser)]
struct Options {
    /// First seed.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// How many seeds.
    #[arg(long, default_value_t = 1000)]
    seeds: u64,
    /// A bug to plant; `list` names them all.
    #[arg(long)]
    bug: Option<String>,
    /// Print what was reached, and how often.
    #[arg(long)]
    coverage: bool,
    /// Print what happens, if it is one seed.
    #[arg(long)]
    trace: bool,
    /// Checkpoints across hosts instead of the whole way of a write.
    #[arg(long, conflicts_with = "matrix")]
    hosts: bool,
    /// The crash matrix instead of seeds: scripted runs that crash at every operation in every way.
    #[arg(long)]
    matrix: bool,
    /// More seeds and second crashes of the matrix.
    #[arg(long, requires = "matrix")]
    long: bool,
    /// One crash of the matrix, as a failure names it; prints what happens.
    #[arg(long, requires = "matrix")]
    case: Option<Case>,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let bug = match options.bug.as_deref() {
        None => None,
        Some("list") => {
            let all = PlantedBug::all().into_iter().chain(PlantedBug::of_hosts());
            all.for_each(|bug| println!("{bug}"));
            return Ok(());
        }
        Some(name) => Some(bug_of(name)?),
    };
    if options.matrix {
        return matrix(&options, bug);
    }
    if options.hosts {
        return hosts(&options, bug);
    }
    let coverage = match options.seeds {
        1 if options.trace => trace_seed(options.from, bug)?,
        1 => run_seed(options.from, bug)?,
        count => run_many(options.from..options.from.saturating_add(count), bug)?,
    };
    println!("{} seeds from {}: every promise was kept", options.seeds, options.from);
    if options.coverage {
        print_coverage(&coverage);
    }
    let missing = coverage.missing();
    if !missing.is_empty() {
        println!("not reached: {}", missing.join(", "));
    }
    Ok(())
}

fn hosts(options: &Options, bug: Option<PlantedBug>) -> anyhow::Result<()> {
    let reached = match options.seeds {
        1 => run_hosts_seed(options.from, bug, options.trace)?,
        count => run_many_hosts(options.from..options.from.saturating_add(count), bug)?,
    };
    println!("{} seeds from {}: every promise was kept", options.seeds, options.from);
    if options.coverage {
        println!("{:>10}  links\n{:>10}  epochs by the clock", reached.links, reached.epochs);
        reached.counts.iter().for_each(|(what, count)| println!("{count:>10}  {what:?}"));
    }
    let missing = reached.missing();
    if !missing.is_empty() {
        println!("not reached: {missing:?}");
    }
    Ok(())
}

fn matrix(options: &Options, bug: Option<PlantedBug>) -> anyhow::Result<()> {
    let effort = if options.long { Effort::Long } else { Effort::Short };
    if let Some(case) = &options.case {
        return Ok(run_case(case, effort, bug)?);
    }
    let matrix = run_matrix(effort, bug)?;
    let [first, second, later] = matrix.counts();
    println!("{matrix}");
    println!(
        "{first} crashes, {second} second ones in the openings after them, {later} later ones: every promise was kept"
    );
    let missing = matrix.missing();
    if !missing.is_empty() {
        println!("not reached: {}", missing.join(", "));
    }
    Ok(())
}

fn bug_of(name: &str) -> anyhow::Result<PlantedBug> {
    let mut all = PlantedBug::all().into_iter().chain(PlantedBug::of_hosts());
    let found = all.find(|bug| bug.to_string() == name);
    found.ok_or_else(|| anyhow::anyhow!("no bug is called {name}: see --bug list"))
}

fn print_coverage(coverage: &Coverage) {
    for ((fault, (purpose, verb)), count) in &coverage.faults {
        println!("{count:>10}  {fault:?} at {purpose:?} {verb}");
    }
    for ((disturbance, moment), count) in &coverage.meetings {
        println!("{count:>10}  {disturbance:?} while {moment:?}");
    }
    for (happening, count) in &coverage.happenings {
        println!("{count:>10}  {happening:?}");
    }
}
