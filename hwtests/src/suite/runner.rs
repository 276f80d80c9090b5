//! The part of the runner outside: shares machines among cases, reads what they tell, and starts a new machine
//! when one died or was left dirty.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::context::Skip;
use super::report::{Event, Lines, Report, print_case};
use super::{Body, Case, MachineNeeds, Verdict};
use crate::cache::Cache;
use crate::hypervisor;
use crate::initramfs::Job;
use crate::kernel::Kernel;
use crate::machine::{Disk, DiskContent, Machine};
use crate::mode::Accel;
use crate::qemu::Qemu;

/// Time that a machine may take besides its cases', under emulation on a busy host.
const BOOT_LIMIT_S: u64 = 60;

/// Where cases run.
#[derive(Debug)]
pub enum Place<'a> {
    /// On this host itself.
    Native,
    /// In machines.
    Machines {
        /// The emulator.
        qemu: &'a Qemu,
        /// How they run.
        accel: Accel,
        /// What they boot.
        kernel: &'a Kernel,
        /// The kernel's short name in the report.
        series: String,
    },
}

/// Runs cases at one place.
#[derive(Debug)]
pub struct Runner<'a> {
    /// Where machines are made.
    pub cache: &'a Cache,
    /// Where the cases run.
    pub place: Place<'a>,
    /// Programs that machines bring, among them `rig` itself.
    pub programs: Vec<PathBuf>,
    /// Print all that the cases say.
    pub verbose: bool,
    /// Print nothing at all.
    pub quiet: bool,
}

/// What a case outside of machines works with.
#[derive(Debug)]
pub struct Outside<'a> {
    /// Where machines are made.
    pub cache: &'a Cache,
    /// The emulator.
    pub qemu: &'a Qemu,
    /// How machines run.
    pub accel: Accel,
    /// What they boot.
    pub kernel: &'a Kernel,
    /// Programs for [`Job::programs`].
    pub programs: &'a [PathBuf],
}

impl Outside<'_> {
    /// A machine of the usual size.
    pub fn machine(&self) -> Machine<'_> {
        Machine::new(self.cache, self.qemu, self.accel, self.kernel)
    }

    /// A job that runs a script of the machine's shell with the project's programs at hand.
    pub fn script(&self, text: &str) -> Job {
        let argv = ["sh", "-ec", text].map(str::to_owned).to_vec();
        Job { argv, programs: self.programs.to_vec(), ..Job::default() }
    }
}

impl Runner<'_> {
    /// Runs the cases, prints a line for each, and counts.
    pub fn run(&self, cases: &[&Case]) -> Result<Report> {
        let mut report = Report::default();
        let (inside, outside): (Vec<&Case>, Vec<&Case>) =
            cases.iter().copied().partition(|case| matches!(case.body, Body::Inside(_)));
        for group in groups(&inside) {
            self.run_group(&group, &mut report)?;
        }
        for case in outside {
            self.run_outside(case, &mut report);
        }
        Ok(report)
    }

    fn run_outside(&self, case: &Case, report: &mut Report) {
        let started = Instant::now();
        let Body::Outside(body) = case.body else { return };
        let verdict = match &self.place {
            Place::Native => Verdict::Skipped {
                reason: "drives machines of its own: run it with --mode kvm or tcg".into(),
            },
            Place::Machines { qemu, accel, kernel, .. } => {
                let outside =
                    Outside { cache: self.cache, qemu, accel: *accel, kernel, programs: &self.programs };
                match body(&outside) {
                    Ok(()) => Verdict::Passed,
                    Err(error) => match error.downcast_ref::<Skip>() {
                        Some(Skip(reason)) => Verdict::Skipped { reason: reason.clone() },
                        None => Verdict::Failed { reason: format!("{error:#}") },
                    },
                }
            }
        };
        report.record(case.name, &verdict);
        if !self.quiet {
            print_case(&self.place_name(), case.name, &verdict, started.elapsed(), &[]);
        }
    }

    fn run_group(&self, group: &[&Case], report: &mut Report) -> Result<()> {
        let place = self.place_name();
        let mut listener = Listener {
            report,
            place: &place,
            verbose: self.verbose,
            quiet: self.quiet,
            ended: Vec::new(),
            current: None,
            log: Vec::new(),
        };
        let mut pending: Vec<&Case> = group.to_vec();
        while !pending.is_empty() {
            let already_ended = listener.ended.len();
            let outcome = match &self.place {
                Place::Native => run_on_host(&pending, &mut listener),
                Place::Machines { qemu, accel, kernel, .. } => {
                    let machine = machine_for(Machine::new(self.cache, qemu, *accel, kernel), &pending);
                    run_in_machine(&machine, &pending, &self.programs, &mut listener)
                }
            };
            let why = match outcome {
                Ok(()) => "its machine ended without a word about it".to_owned(),
                Err(error) => format!("{error:#}"),
            };
            if listener.current.is_some() {
                listener.fail_current(&why);
            } else if listener.ended.len() == already_ended {
                for case in &pending {
                    listener.start(case.name);
                    listener.fail_current(&why);
                }
            }
            pending.retain(|case| !listener.ended.iter().any(|ended| ended == case.name));
        }
        Ok(())
    }

    fn place_name(&self) -> String {
        match &self.place {
            Place::Native => "host".into(),
            Place::Machines { series, .. } => series.clone(),
        }
    }
}

/// Turns the output of a machine into the report.
struct Listener<'a> {
    report: &'a mut Report,
    place: &'a str,
    verbose: bool,
    quiet: bool,
    ended: Vec<String>,
    current: Option<(String, Instant)>,
    log: Vec<String>,
}

impl Listener<'_> {
    fn line(&mut self, line: String) {
        match Event::parse(&line) {
            Some(Event::Begin { case }) => self.start(&case),
            Some(Event::End { case, verdict, took_ms }) => {
                self.current = None;
                self.end(case, &verdict, Duration::from_millis(took_ms));
            }
            None => {
                if self.verbose && !line.is_empty() {
                    println!("     | {line}");
                }
                self.log.push(line);
            }
        }
    }

    fn start(&mut self, case: &str) {
        self.log.clear();
        self.current = Some((case.to_owned(), Instant::now()));
        if self.verbose {
            println!("RUN  {:<5} {case}", self.place);
        }
    }

    fn fail_current(&mut self, why: &str) {
        if let Some((case, since)) = self.current.take() {
            self.end(case, &Verdict::Failed { reason: why.to_owned() }, since.elapsed());
        }
    }

    fn end(&mut self, case: String, verdict: &Verdict, took: Duration) {
        let log: &[String] = if self.verbose { &[] } else { &self.log };
        self.report.record(&case, verdict);
        if !self.quiet {
            print_case(self.place, &case, verdict, took, log);
        }
        self.ended.push(case);
    }
}

fn run_in_machine(
    machine: &Machine,
    cases: &[&Case],
    programs: &[PathBuf],
    listener: &mut Listener,
) -> Result<()> {
    let mut job =
        Job { argv: vec!["rig".into(), "inside".into()], programs: programs.to_vec(), ..Job::default() };
    job.argv.extend(cases.iter().map(|case| case.name.to_owned()));
    job.modules = ["ublk_drv", "loop"].map(str::to_owned).to_vec();
    if cases.first().is_some_and(|case| case.machine.runs_guests) {
        hypervisor::add_to(&mut job)?;
    }
    let mut lines = Lines::default();
    let finished = machine.run(&job, &mut |chunk| {
        for line in lines.feed(chunk) {
            listener.line(line);
        }
    })?;
    anyhow::ensure!(finished.exit == 0, "the runner inside ended with {}", finished.exit);
    Ok(())
}

fn run_on_host(cases: &[&Case], listener: &mut Listener) -> Result<()> {
    let program = std::env::current_exe()?;
    let folder = program.parent().context("the rig's own program has no folder")?;
    let path = std::env::var("PATH").unwrap_or_default();
    let mut child = Command::new(&program)
        .arg("inside")
        .args(cases.iter().map(|case| case.name))
        .env("PATH", format!("{}:{path}", folder.display()))
        .env("RIG_MODE", "native")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut lines = Lines::default();
    let mut output = child.stdout.take().context("the output is a pipe")?;
    let mut chunk = [0; 8192];
    loop {
        let len = std::io::Read::read(&mut output, &mut chunk)?;
        if len == 0 {
            break;
        }
        for line in lines.feed(&chunk[..len]) {
            listener.line(line);
        }
    }
    anyhow::ensure!(child.wait()?.success(), "the runner on this host failed");
    Ok(())
}

fn machine_for<'a>(mut machine: Machine<'a>, cases: &[&Case]) -> Machine<'a> {
    let needs = cases.first().map_or(MachineNeeds::USUAL, |case| case.machine);
    machine.memory_mib = needs.memory_mib;
    machine.disks = needs
        .disks_mib
        .iter()
        .map(|&size_mib| Disk { content: DiskContent::Empty { size_mib }, log_writes: false })
        .collect();
    let cases_s: u64 = cases.iter().map(|case| case.limit_s).sum();
    machine.limit = Duration::from_secs(BOOT_LIMIT_S + cases_s);
    machine
}

/// Cases that want the same machine, in the table's order.
fn groups<'a>(cases: &[&'a Case]) -> Vec<Vec<&'a Case>> {
    let mut groups: Vec<Vec<&Case>> = Vec::new();
    for case in cases {
        match groups.iter_mut().find(|group| group[0].machine == case.machine) {
            Some(group) => group.push(case),
            None => groups.push(vec![case]),
        }
    }
    groups
}
