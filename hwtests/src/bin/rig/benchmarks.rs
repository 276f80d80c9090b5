//! `rig bench`: runs benchmarks where they belong and prints their results.

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use hwtests::bench::{self, BenchPlace, Benchmark, Outcome, Pair};
use hwtests::cache::{Cache, repository_root};
use hwtests::error::RigError;
use hwtests::kernel::Kernel;
use hwtests::machine::Machine;
use hwtests::mode::{self, ModeChoice};
use hwtests::qemu::Qemu;
use hwtests::tool;

use crate::{BenchArgs, accel, project_programs};

pub(crate) fn run(cache: impl Fn() -> Result<Cache, RigError>, args: &BenchArgs) -> Result<ExitCode> {
    let all = bench::all();
    if args.list {
        for benchmark in &all {
            println!(
                "{:<14} {} (beside {}, {})",
                benchmark.name, benchmark.what, benchmark.peer, benchmark.unit
            );
        }
        return Ok(ExitCode::SUCCESS);
    }
    for name in &args.names {
        ensure!(
            all.iter().any(|one| one.name == name),
            "no benchmark is called {name}; --list shows them all"
        );
    }
    let chosen =
        all.iter().filter(|one| args.names.is_empty() || args.names.iter().any(|name| name == one.name));
    if !args.json {
        println!("{}", Outcome::head());
    }
    let mut all_reached = true;
    for benchmark in chosen {
        build_peers(benchmark)?;
        let outcome = Outcome::of(benchmark, &measure(&cache, benchmark, args)?)?;
        if args.json {
            println!("{}", serde_json::to_string(&outcome)?);
        } else {
            println!("{}", outcome.row());
        }
        if let Some(gate) = benchmark.gate.filter(|gate| outcome.ratio < *gate) {
            eprintln!("{}: a ratio of {:.2} misses its gate of {gate}", benchmark.name, outcome.ratio);
            all_reached = false;
        }
    }
    Ok(if all_reached { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn measure(
    cache: &impl Fn() -> Result<Cache, RigError>,
    benchmark: &Benchmark,
    args: &BenchArgs,
) -> Result<Vec<Pair>> {
    let native = args.mode == ModeChoice::Native || (args.mode == ModeChoice::Auto && mode::native_works());
    if benchmark.place == BenchPlace::Host || native {
        return in_child(benchmark, args.pairs);
    }
    let cache = cache()?;
    let qemu = Qemu::get(&cache)?;
    let kernel = Kernel::get(&cache, args.kernel, false)?;
    let accel = accel(args.mode, &cache, &qemu, &kernel)?;
    eprintln!("{}: on {} under {} (QEMU {})", benchmark.name, kernel.release, accel.name(), qemu.version);
    let machine = Machine::new(&cache, &qemu, accel, &kernel);
    bench::run_in_machine(benchmark, args.pairs, machine, &project_programs()?)
}

/// In a process of its own, with the project's programs and the peers in its `PATH`.
fn in_child(benchmark: &Benchmark, pairs: u32) -> Result<Vec<Pair>> {
    let own = std::env::current_exe()?;
    let mut folders = vec![own.parent().context("the rig's own program has no folder")?.to_path_buf()];
    folders.push(repository_root().join(".cache/peers/bin"));
    folders.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
    let mut command = std::process::Command::new(&own);
    command
        .args(["inside-bench", benchmark.name, &pairs.to_string()])
        .env("PATH", std::env::join_paths(folders)?);
    bench::pairs_in(&tool::run(&mut command)?)
}

/// Builds what the benchmark is measured against, if that is not in Debian.
fn build_peers(benchmark: &Benchmark) -> Result<()> {
    if benchmark.programs.contains(&"rublk") {
        let script = repository_root().join("hwtests/peers/rublk.sh");
        tool::run(&mut std::process::Command::new(script))?;
    }
    Ok(())
}
