//! The rig itself: what every other case relies on.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Context as _, Result, ensure};

use super::ram_disk::RamDisk;
use crate::machine::{Disk, DiskContent};
use crate::powercut::log::Log;
use crate::powercut::replay::Fate;
use crate::suite::context::Context;
use crate::suite::{Body, Case, Need, Outside};

pub(super) const CASES: &[Case] = &[
    Case::new(
        "machine-ublk-control",
        "The kernel has the ublk driver and its control device.",
        Body::Inside(ublk_control),
    ),
    Case::new(
        "machine-brd-fio-verify",
        "fio finds its own pattern again on a RAM disk, so its verdict on other devices counts.",
        Body::Inside(brd_fio_verify),
    )
    .needs(&[Need::Tool("fio"), Need::Module("brd")]),
    Case::new(
        "machine-write-log-replay",
        "The log of a disk's writes, replayed whole, gives that disk; cut before a flush, only what was flushed stays.",
        Body::Outside(write_log_replay),
    ),
];

fn ublk_control(context: &mut Context) -> Result<()> {
    context.note(context.read("/proc/version")?);
    let misc = context.read("/sys/class/misc/ublk-control/dev")?;
    ensure!(misc.starts_with("10:"), "ublk-control is device {misc}, not a misc device");
    ensure!(std::fs::exists("/dev/ublk-control")?, "/dev/ublk-control is missing");
    Ok(())
}

fn brd_fio_verify(context: &mut Context) -> Result<()> {
    let ram = RamDisk::new(context, 16)?;
    let report = context.fio(&[
        &format!("--filename={}", ram.device()),
        "--rw=randwrite",
        "--bs=4k",
        "--size=4m",
        "--ioengine=libaio",
        "--direct=1",
        "--iodepth=8",
        "--verify=crc32c",
    ])?;
    ensure!(report.write_iops > 0.0, "fio wrote nothing");
    Ok(())
}

fn write_log_replay(outside: &Outside) -> Result<()> {
    const SIZE_MIB: u64 = 64;
    let mut machine = outside.machine();
    machine.disks = vec![Disk { content: DiskContent::Empty { size_mib: SIZE_MIB }, log_writes: true }];
    let job = outside.script(
        "mkfs.ext4 -q /dev/vda; mount /dev/vda /mnt; cp /bin/busybox /mnt/first; sync -f /mnt; \
         cp /bin/busybox /mnt/second; fstrim /mnt || true; umount /mnt; sync",
    );
    let finished = machine.run(&job, &mut |_| {})?;
    ensure!(finished.exit == 0, "the job failed:\n{}", finished.output()?);
    let log = Log::open(&finished.disk_log(0))?;
    ensure!(log.entries().iter().any(|entry| entry.flush), "no flush in {} entries", log.entries().len());

    let base = finished.folder.path().join("disk-base.raw");
    File::create(&base)?.set_len(SIZE_MIB << 20)?;
    let target = finished.folder.path().join("disk-replayed.raw");
    log.replay(&base, log.entries().len(), Fate::AllLanded, &target)?;
    same_content(&finished.disk_image(0), &target)?;

    for cut in log.cut_points(6, 1) {
        log.replay(&base, cut, Fate::Random { seed: cut as u64 }, &target)?;
        // The journal of ext4 must bring any such disk back to a consistent state once the file system was made.
        let made = log.entries()[..cut].iter().filter(|entry| entry.flush).count() > 2;
        if made {
            let output = std::process::Command::new("e2fsck").arg("-fy").arg(&target).output()?;
            let code = output.status.code().context("e2fsck was killed")?;
            let said = String::from_utf8_lossy(&output.stdout);
            ensure!(code <= 1, "after a cut at entry {cut} e2fsck ends with {code}:\n{said}");
        }
    }
    Ok(())
}

fn same_content(one: &std::path::Path, other: &std::path::Path) -> Result<()> {
    let (one, other) = (File::open(one)?, File::open(other)?);
    let size = one.metadata()?.len();
    ensure!(size == other.metadata()?.len(), "the disks differ in size");
    let (mut left, mut right) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    for offset in (0..size).step_by(1 << 20) {
        one.read_exact_at(&mut left, offset)?;
        other.read_exact_at(&mut right, offset)?;
        ensure!(left == right, "the disks differ in the MiB at {offset}");
    }
    Ok(())
}
