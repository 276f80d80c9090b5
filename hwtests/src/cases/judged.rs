//! Cases that go wrong on purpose, and the case that sees to it that the runner notices. A test bench that calls
//! everything good is worth nothing.

use std::process::Command;

use anyhow::{Result, bail, ensure};

use crate::suite::context::Context;
use crate::suite::{Body, Case, Need, Outside, Place, Runner, Verdict};

pub(super) const CASES: &[Case] = &[Case::new(
    "machine-runner-judges",
    "A case that fails, hangs, panics, leaves something behind or takes the kernel down is seen, and the next one still runs.",
    Body::Outside(runner_judges),
)
.long()];

/// Never listed; run by `machine-runner-judges` alone.
pub(super) const WRONG_CASES: &[Case] = &[
    Case::new("wrong-fails", "Fails.", Body::Inside(|_| bail!("as it should"))),
    Case::new("wrong-hangs", "Hangs.", Body::Inside(|_| hang())).limit_s(2),
    Case::new("wrong-panics", "Panics.", Body::Inside(|_| panic!("as it should"))),
    Case::new("wrong-leaves-process", "Leaves a process.", Body::Inside(leave_process)),
    Case::new("wrong-leaves-mount", "Leaves a mount.", Body::Inside(leave_mount)),
    Case::new("wrong-kernel-warns", "The kernel complains.", Body::Inside(kernel_complains)),
    Case::new("wrong-kernel-dies", "The kernel panics.", Body::Inside(kernel_dies)),
    Case::new("wrong-needs-unknown", "Needs what nobody has.", Body::Inside(|_| Ok(())))
        .needs(&[Need::Tool("no-such-tool")]),
    Case::new("wrong-not-at-all", "Passes, after all of these.", Body::Inside(|_| Ok(()))),
];

fn runner_judges(outside: &Outside) -> Result<()> {
    let runner = Runner {
        cache: outside.cache,
        place: Place::Machines {
            qemu: outside.qemu,
            accel: outside.accel,
            kernel: outside.kernel,
            series: String::new(),
        },
        programs: outside.programs.to_vec(),
        verbose: false,
        quiet: true,
    };
    let report = runner.run(&WRONG_CASES.iter().collect::<Vec<_>>())?;
    let expected = [
        ("wrong-fails", "failed: as it should"),
        ("wrong-hangs", "failed: did not end in 2 s"),
        ("wrong-panics", "failed: its process ended"),
        ("wrong-leaves-process", "failed: left behind: process sleep"),
        ("wrong-leaves-mount", "failed: left behind: mount of tmpfs at /mnt"),
        ("wrong-kernel-warns", "failed: the kernel says: "),
        ("wrong-kernel-dies", "failed: the machine died"),
        ("wrong-needs-unknown", "skipped: no-such-tool is not there"),
        ("wrong-not-at-all", "passed"),
    ];
    ensure!(report.verdicts.len() == expected.len(), "verdicts: {:?}", report.verdicts);
    for ((name, verdict), (expected_name, begin)) in report.verdicts.iter().zip(expected) {
        let shown = match verdict {
            Verdict::Passed => "passed".to_owned(),
            Verdict::Failed { reason } => format!("failed: {reason}"),
            Verdict::Skipped { reason } => format!("skipped: {reason}"),
        };
        ensure!(name == expected_name && shown.starts_with(begin), "{name}: {shown}; expected {begin}");
    }
    Ok(())
}

fn hang() -> Result<()> {
    loop {
        std::thread::sleep(std::time::Duration::from_secs(1));
    }
}

fn leave_process(_: &mut Context) -> Result<()> {
    Command::new("sleep").arg("1000").spawn()?;
    Ok(())
}

fn leave_mount(context: &mut Context) -> Result<()> {
    context.run(&["mount", "-t", "tmpfs", "tmpfs", "/mnt"]).map(drop)
}

fn kernel_complains(_: &mut Context) -> Result<()> {
    std::fs::write("/dev/kmsg", "WARNING: as it should\n")?;
    Ok(())
}

fn kernel_dies(_: &mut Context) -> Result<()> {
    std::fs::write("/proc/sysrq-trigger", "c")?;
    hang()
}
