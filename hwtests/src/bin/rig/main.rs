//! `rig`: kernels with ublk, machines that boot them, tests that run inside.

mod benchmarks;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Args, Parser, Subcommand};
use hwtests::bench;
use hwtests::cache::{Cache, repository_root};
use hwtests::cases;
use hwtests::initramfs::Job;
use hwtests::kernel::{Kernel, Series};
use hwtests::machine::{Disk, DiskContent, Machine};
use hwtests::mode::{self, Accel, ModeChoice};
use hwtests::qemu::Qemu;
use hwtests::suite::{self, Case, Place, Report, Runner};

#[derive(Parser)]
#[command(version, about = "Real kernels with ublk, anywhere: boots them, runs tests inside")]
struct Cli {
    /// Folder for kernels, emulator and logs [default: .cache/rig in the repository]
    #[arg(long, global = true, value_name = "DIR")]
    cache: Option<PathBuf>,
    #[command(subcommand)]
    command: Cmd,
}

#[derive(Subcommand)]
enum Cmd {
    /// Fetch the kernels and the emulator into the cache
    Kernels {
        /// Ask the mirror for newer ones
        #[arg(long)]
        refresh: bool,
    },
    /// Run the rig's tests: a line for each, non-zero when one failed
    Test(TestArgs),
    /// Run tests by their whole names and show all they say
    Run(TestArgs),
    /// List the tests
    List,
    /// Run benchmarks beside their peers
    Bench(BenchArgs),
    /// Measure pairs in this very machine (the dispatcher does that)
    #[command(hide = true)]
    InsideBench {
        /// The benchmark
        name: String,
        /// How many pairs
        pairs: u32,
    },
    /// Run cases in this very machine (the runner does that)
    #[command(hide = true)]
    Inside {
        /// Their names
        cases: Vec<String>,
    },
    /// Run one case in this very process (the runner does that)
    #[command(hide = true)]
    InsideOne {
        /// Its name
        case: String,
    },
    /// Run a command in a machine, or a shell when none is given
    Shell(ShellArgs),
}

#[derive(Args)]
struct TestArgs {
    /// Tests whose names contain one of these [default: all]
    #[arg(value_name = "TEST")]
    names: Vec<String>,
    /// The same as naming a test
    #[arg(long, value_name = "TEST")]
    filter: Vec<String>,
    /// Which kernels: 6.12, 7 or all
    #[arg(long, default_value = "all", value_parser = kernel_choice)]
    kernel: KernelChoice,
    /// Where to run
    #[arg(long, value_enum, default_value_t)]
    mode: ModeChoice,
    /// The long tests too
    #[arg(long)]
    long: bool,
    /// Show all that the tests say
    #[arg(long, short)]
    verbose: bool,
}

#[derive(Args)]
struct BenchArgs {
    /// Benchmarks [default: all]
    #[arg(value_name = "NAME")]
    names: Vec<String>,
    /// One object a line
    #[arg(long)]
    json: bool,
    /// Names and what they measure
    #[arg(long)]
    list: bool,
    /// How many pairs
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(5..=1000))]
    pairs: u32,
    /// Kernel of the machines
    #[arg(long, default_value = "7", value_parser = series)]
    kernel: Series,
    /// Where to run those that need a kernel with ublk
    #[arg(long, value_enum, default_value_t)]
    mode: ModeChoice,
}

#[derive(Clone, Debug)]
struct KernelChoice(Vec<Series>);

#[derive(Args)]
struct ShellArgs {
    /// Which kernel: 6.12 or 7
    #[arg(long, default_value = "7", value_parser = series)]
    kernel: Series,
    /// Emulate even where KVM works, or the other way round
    #[arg(long, value_enum, default_value_t)]
    mode: ModeChoice,
    /// Memory of the machine
    #[arg(long, value_name = "MIB", default_value_t = 1500)]
    memory: u64,
    /// Processors of the machine
    #[arg(long, default_value_t = 2)]
    cpus: u32,
    /// Stop the machine after this time
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    limit: u64,
    /// An empty disk (/dev/vda, …) of this many MiB; `:log` keeps a log of its writes
    #[arg(long, value_name = "MIB[:log]", value_parser = disk)]
    disk: Vec<Disk>,
    /// A program to bring along, besides the project's own
    #[arg(long, value_name = "FILE")]
    program: Vec<PathBuf>,
    /// A file to bring along
    #[arg(long, value_name = "FILE:PLACE", value_parser = file_and_place)]
    file: Vec<(PathBuf, String)>,
    /// A kernel module to load first
    #[arg(long, value_name = "NAME", default_values = ["ublk_drv", "loop"])]
    module: Vec<String>,
    /// Where to copy what the command left in $RIG_OUT
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// The command and its arguments
    #[arg(last = true)]
    command: Vec<String>,
}

fn main() -> ExitCode {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    // The commands for the inside of a machine work without a cache.
    let cache = || Cache::open(cli.cache.as_deref());
    match cli.command {
        Cmd::Kernels { refresh } => kernels(&cache()?, refresh),
        Cmd::Test(args) => test(&cache()?, args, false),
        Cmd::Run(args) => test(&cache()?, args, true),
        Cmd::List => list(),
        Cmd::Inside { cases } => {
            let chosen: Vec<Case> = cases.iter().filter_map(|name| cases::named(name)).collect();
            suite::run_all_inside(&chosen)?;
            Ok(ExitCode::SUCCESS)
        }
        Cmd::InsideOne { case } => {
            suite::run_one_inside(&cases::named(&case).context("no such case")?)?;
            Ok(ExitCode::SUCCESS)
        }
        Cmd::Bench(args) => benchmarks::run(cache, &args),
        Cmd::InsideBench { name, pairs } => {
            let all = bench::all();
            let benchmark = all.iter().find(|one| one.name == name).context("no such benchmark")?;
            bench::run_here(benchmark, pairs)?;
            Ok(ExitCode::SUCCESS)
        }
        Cmd::Shell(args) => shell(&cache()?, args),
    }
}

fn kernels(cache: &Cache, refresh: bool) -> Result<ExitCode> {
    for series in Series::ALL {
        let kernel = Kernel::get(cache, series, refresh)?;
        println!("{series}: {}", kernel.release);
    }
    println!("QEMU: {}", Qemu::get(cache)?.version);
    Ok(ExitCode::SUCCESS)
}

fn list() -> Result<ExitCode> {
    for case in cases::all() {
        let long = if case.long { " (long)" } else { "" };
        println!("{:<44} {}{long}", case.name, case.idea);
    }
    Ok(ExitCode::SUCCESS)
}

fn test(cache: &Cache, args: TestArgs, whole_names: bool) -> Result<ExitCode> {
    let all = cases::all();
    let wanted: Vec<&String> = args.names.iter().chain(&args.filter).collect();
    let matches = |case: &Case| {
        wanted.iter().any(|name| if whole_names { case.name == *name } else { case.name.contains(*name) })
    };
    let chosen: Vec<&Case> = all
        .iter()
        .filter(|case| if wanted.is_empty() { !whole_names } else { matches(case) })
        .filter(|case| args.long || whole_names || !case.long)
        .collect();
    ensure!(!chosen.is_empty(), "no test has such a name; `rig list` shows them all");
    let programs = project_programs()?;
    let verbose = args.verbose || whole_names;
    let mut report = Report::default();
    if args.mode == ModeChoice::Native || (args.mode == ModeChoice::Auto && mode::native_works()) {
        println!("on this host's own kernel {}", nix::sys::utsname::uname()?.release().to_string_lossy());
        let runner = Runner { cache, place: Place::Native, programs, verbose, quiet: false };
        report.add(runner.run(&chosen)?);
    } else {
        let qemu = Qemu::get(cache)?;
        for (number, series) in args.kernel.0.into_iter().enumerate() {
            let chosen: Vec<&Case> =
                chosen.iter().copied().filter(|case| number == 0 || args.long || !case.once).collect();
            let kernel = Kernel::get(cache, series, false)?;
            let accel = accel(args.mode, cache, &qemu, &kernel)?;
            println!("kernel {} under {} (QEMU {})", kernel.release, accel.name(), qemu.version);
            let place = Place::Machines { qemu: &qemu, accel, kernel: &kernel, series: series.to_string() };
            let runner = Runner { cache, place, programs: programs.clone(), verbose, quiet: false };
            report.add(runner.run(&chosen)?);
        }
    }
    report.print_totals();
    Ok(if report.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn accel(choice: ModeChoice, cache: &Cache, qemu: &Qemu, kernel: &Kernel) -> Result<Accel> {
    Ok(match choice {
        ModeChoice::Kvm => Accel::Kvm,
        ModeChoice::Tcg => Accel::Tcg,
        _ if mode::kvm_works(cache, qemu, kernel)? => Accel::Kvm,
        _ => Accel::Tcg,
    })
}

fn shell(cache: &Cache, args: ShellArgs) -> Result<ExitCode> {
    let started = Instant::now();
    let qemu = Qemu::get(cache)?;
    let kernel = Kernel::get(cache, args.kernel, false)?;
    let accel = accel(args.mode, cache, &qemu, &kernel)?;
    let mut machine = Machine::new(cache, &qemu, accel, &kernel);
    machine.memory_mib = args.memory;
    machine.cpus = args.cpus;
    machine.limit = Duration::from_secs(args.limit);
    machine.disks = args.disk;
    let mut job = Job { argv: args.command, files: args.file, modules: args.module, ..Job::default() };
    job.programs = project_programs()?;
    job.programs.extend(args.program);
    eprintln!("rig: {} under {} (QEMU {})", kernel.release, accel.name(), qemu.version);
    if job.argv.is_empty() {
        machine.interact(&job)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut stdout = std::io::stdout();
    let finished = machine.run(&job, &mut |chunk| {
        // A reader that went away doesn't stop the machine.
        let _ = stdout.write_all(chunk).and_then(|()| stdout.flush());
    })?;
    if let Some(out) = args.out {
        copy_out(&finished.file(""), &out)?;
    }
    eprintln!(
        "rig: exit {} after {:.1} s ({:.1} s of boot); logs in {}",
        finished.exit,
        started.elapsed().as_secs_f64(),
        finished.boot_s,
        finished.folder.path().display()
    );
    Ok(ExitCode::from(u8::try_from(finished.exit).unwrap_or(1)))
}

/// The project's binaries that were built into the same folder as this program, and the peers that were built.
fn project_programs() -> Result<Vec<PathBuf>> {
    let own = std::env::current_exe().context("finding the rig's own program")?;
    let folder = own.parent().context("the rig's own program has no folder")?;
    let names = ["vra", "vra-journal", "vra-ublk", "zvm", "rig"];
    let own = names.iter().map(|name| folder.join(name));
    let peers = [repository_root().join(".cache/peers/bin/rublk")];
    Ok(own.chain(peers).filter(|path| path.is_file()).collect())
}

fn copy_out(from: &std::path::Path, to: &std::path::Path) -> Result<()> {
    if from.is_dir() {
        std::fs::create_dir_all(to)?;
        hwtests::tool::run(std::process::Command::new("cp").arg("-a").arg(from.join(".")).arg(to))?;
    }
    Ok(())
}

fn series(name: &str) -> Result<Series, String> {
    Series::ALL.into_iter().find(|series| series.name() == name).ok_or_else(|| "6.12 or 7".to_owned())
}

fn kernel_choice(name: &str) -> Result<KernelChoice, String> {
    Ok(KernelChoice(if name == "all" { Series::ALL.to_vec() } else { vec![series(name)?] }))
}

fn disk(text: &str) -> Result<Disk, String> {
    let (size, log_writes) = match text.strip_suffix(":log") {
        Some(size) => (size, true),
        None => (text, false),
    };
    let size_mib = size.parse().map_err(|_| "a size in MiB, as 64 or 64:log".to_owned())?;
    Ok(Disk { content: DiskContent::Empty { size_mib }, log_writes })
}

fn file_and_place(text: &str) -> Result<(PathBuf, String), String> {
    let (file, place) = text.split_once(':').ok_or("FILE:PLACE, as ./x.sh:/root/x.sh")?;
    Ok((PathBuf::from(file), place.to_owned()))
}
