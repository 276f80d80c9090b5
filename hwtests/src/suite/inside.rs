//! The part of the runner that works inside a machine: each case in a process of its own, under its time limit.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use super::context::{Context, Skip};
use super::leftover::{KernelLog, MARK, Surroundings, marked_processes};
use super::report::Event;
use super::{Body, Case, Need, Verdict};
use crate::tool;

const VERDICT_FILE: &str = "RIG_VERDICT";

/// Runs cases one after the other and tells of each. Ends early when one leaves something behind that would
/// disturb the next: the runner outside goes on in a new machine.
pub fn run_all_inside(cases: &[Case]) -> Result<()> {
    let mut kernel_log = KernelLog::follow();
    for case in cases {
        Event::Begin { case: case.name.to_owned() }.print();
        let started = Instant::now();
        let before = Surroundings::now();
        let mut verdict = run_in_child(case)?;
        let left = clean_up(case, &before);
        let trouble = kernel_log.trouble(case.kernel_log_allowed);
        if verdict == Verdict::Passed && !trouble.is_empty() {
            verdict = failed(format!("the kernel says: {}", trouble.join("; ")));
        }
        if verdict == Verdict::Passed && !left.is_empty() {
            verdict = failed(format!("left behind: {}", left.join(", ")));
        }
        let took_ms = started.elapsed().as_millis() as u64;
        Event::End { case: case.name.to_owned(), verdict, took_ms }.print();
        if !left.is_empty() {
            return Ok(());
        }
    }
    Ok(())
}

/// Runs one case in this process and leaves its verdict where the parent looks for it.
pub fn run_one_inside(case: &Case) -> Result<()> {
    let verdict = match run_body(case) {
        Ok(()) => Verdict::Passed,
        Err(error) => match error.downcast_ref::<Skip>() {
            Some(Skip(reason)) => Verdict::Skipped { reason: reason.clone() },
            None => failed(format!("{error:#}")),
        },
    };
    let path = std::env::var_os(VERDICT_FILE).context("not started by the rig")?;
    std::fs::write(path, serde_json::to_vec(&verdict)?)?;
    Ok(())
}

fn run_body(case: &Case) -> Result<()> {
    let mut context = Context::new(case.name)?;
    for need in case.needs {
        check_need(*need, &context)?;
    }
    if context.is_native()
        && std::fs::read_dir("/sys/class/ublk-char").is_ok_and(|mut all| all.next().is_some())
    {
        return Err(context.skip("this host has ublk devices already, which the case might disturb"));
    }
    context.attach_disks(case.machine.disks_mib)?;
    match case.body {
        Body::Inside(body) => body(&mut context),
        Body::Outside(_) => bail!("{} runs outside of machines", case.name),
    }
}

fn check_need(need: Need, context: &Context) -> Result<()> {
    match need {
        Need::Tool(name) if tool::find(name).is_none() => Err(context.skip(format!("{name} is not there"))),
        Need::Module(name) => {
            let loaded = Path::new("/sys/module").join(name).exists();
            if !loaded && !context.try_run(&["modprobe", "-D", name])?.0.success() {
                return Err(context.skip(format!("the kernel has no module {name}")));
            }
            Ok(())
        }
        Need::UblkFeature(name) => {
            let features = context.run(&["vra-ublk", "features"])?;
            if !features.split_whitespace().any(|word| word == name) {
                return Err(context.skip(format!("this kernel's ublk has no {name}")));
            }
            Ok(())
        }
        Need::Tool(_) => Ok(()),
    }
}

fn run_in_child(case: &Case) -> Result<Verdict> {
    let verdict_file = std::env::temp_dir().join(format!("rig-verdict-{}", std::process::id()));
    let _ = std::fs::remove_file(&verdict_file);
    let mut child = Command::new(std::env::current_exe()?)
        .args(["inside-one", case.name])
        .env(MARK, case.name)
        .env(VERDICT_FILE, &verdict_file)
        .stdin(Stdio::null())
        .process_group(0)
        .spawn()
        .context("starting a case")?;
    let ended = wait(&mut child, Duration::from_secs(case.limit_s))?;
    let verdict = std::fs::read(&verdict_file);
    let _ = std::fs::remove_file(&verdict_file);
    Ok(match (ended, verdict) {
        (None, _) => failed(format!("did not end in {} s", case.limit_s)),
        (Some(_), Ok(json)) => serde_json::from_slice(&json)?,
        (Some(status), Err(_)) => failed(format!("its process ended: {status}")),
    })
}

fn wait(child: &mut Child, limit: Duration) -> Result<Option<std::process::ExitStatus>> {
    let started = Instant::now();
    while started.elapsed() < limit {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill()?;
    child.wait()?;
    Ok(None)
}

/// Waits a moment for what is still ending; then kills the case's processes. Gives what was left.
fn clean_up(case: &Case, before: &Surroundings) -> Vec<String> {
    let started = Instant::now();
    loop {
        let processes = marked_processes(case.name);
        let mut left = Surroundings::now().added_since(before);
        left.extend(processes.iter().map(|(pid, name)| format!("process {name} ({pid})")));
        if left.is_empty() {
            return left;
        }
        if started.elapsed() > Duration::from_secs(3) {
            for (pid, _) in processes {
                let pid = nix::unistd::Pid::from_raw(pid);
                let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            }
            return left;
        }
        std::thread::sleep(Duration::from_millis(30));
    }
}

fn failed(reason: String) -> Verdict {
    Verdict::Failed { reason }
}
