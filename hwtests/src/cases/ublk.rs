//! The ublk driver of ours against a real kernel: what a device says of itself, and that data comes back.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use anyhow::{Context as _, Result, ensure};

pub(super) use super::content::same_content;
use super::content::{aligned, direct, filled_with};
use super::ram_disk::RamDisk;
use crate::suite::context::Context;
use crate::suite::ublk::{UblkServer, list, state};
use crate::suite::{Body, Case, MachineNeeds, Need};

const DISK: MachineNeeds = MachineNeeds { disks_mib: &[128], ..MachineNeeds::USUAL };
const BRD: &[Need] = &[Need::Tool("vra-ublk"), Need::Module("brd")];
const OURS: &[Need] = &[Need::Tool("vra-ublk")];

pub(super) const CASES: &[Case] = &[
    Case::new(
        "ublk-features",
        "The driver offers recovery with reissue on every kernel that we support.",
        Body::Inside(features),
    )
    .needs(OURS),
    Case::new(
        "ublk-null-sysfs-limits",
        "A null device shows its size, block sizes, queues and limits in sysfs as they were asked for.",
        Body::Inside(null_sysfs_limits),
    )
    .needs(OURS),
    Case::new(
        "ublk-loop-sysfs-limits",
        "A device over a disk with a volatile cache passes cache, FUA and block sizes on truthfully.",
        Body::Inside(loop_sysfs_limits),
    )
    .needs(OURS)
    .machine(DISK),
    Case::new(
        "ublk-loop-fio-verify",
        "Random writes of 4k to 256k on two queues with fdatasync mixed in come back, and lie in the disk below byte by byte.",
        Body::Inside(loop_fio_verify),
    )
    .needs(BRD),
    Case::new(
        "ublk-loop-flush-fua",
        "fdatasync and O_DSYNC on the device reach the disk below as flushes or FUA writes.",
        Body::Inside(loop_flush_fua),
    )
    .needs(OURS)
    .machine(DISK),
    Case::new(
        "ublk-loop-discard-zeroes",
        "Discard and write-zeroes read zeroes afterwards, free the file's blocks, and touch no neighbour.",
        Body::Inside(loop_discard_zeroes),
    )
    .needs(OURS)
    .machine(DISK),
    Case::new(
        "ublk-loop-filesystems",
        "ext4 and xfs on a device keep their files over an unmount, and their checkers find nothing.",
        Body::Inside(loop_filesystems),
    )
    .needs(BRD)
    .limit_s(120),
    Case::new(
        "ublk-del-while-busy",
        "A mounted device is not deleted without force; under load deletion ends the load with errors and never hangs.",
        Body::Inside(del_while_busy),
    )
    .needs(BRD)
    .kernel_log_allowed(&["I/O error, dev ublkb"]),
    Case::new(
        "ublk-term-deletes",
        "SIGTERM ends a server, and its device with it.",
        Body::Inside(term_deletes),
    )
    .needs(OURS),
    Case::new(
        "ublk-refuses-what-is-in-use",
        "A disk that is served already, one that isn't there and a device that isn't there are refused by name.",
        Body::Inside(refuses_in_use),
    )
    .needs(BRD),
    Case::new(
        "ublk-recover-refuses-live-server",
        "A recovery of a device whose server lives gives up after its patience and names the server.",
        Body::Inside(recover_refuses_live),
    )
    .needs(OURS)
    .limit_s(90)
    .long(),
];

fn features(context: &mut Context) -> Result<()> {
    let features = context.run(&["vra-ublk", "features"])?;
    for name in ["USER_RECOVERY", "USER_RECOVERY_REISSUE", "CMD_IOCTL_ENCODE"] {
        ensure!(features.lines().any(|line| line == name), "no {name} among:\n{features}");
    }
    Ok(())
}

fn null_sysfs_limits(context: &mut Context) -> Result<()> {
    let server = UblkServer::add(
        context,
        &["null", "--size", "3G", "--queues", "2", "--depth", "32", "--buffer-kib", "128"],
    )?;
    for (file, expected) in [
        ("size", "6291456"),
        ("ro", "0"),
        ("queue/logical_block_size", "512"),
        ("queue/physical_block_size", "4096"),
        ("queue/max_hw_sectors_kb", "128"),
        ("queue/rotational", "0"),
        ("queue/write_cache", "write through"),
        ("queue/fua", "0"),
        ("queue/discard_max_hw_bytes", "1073741824"),
        ("queue/write_zeroes_max_bytes", "1073741824"),
    ] {
        let found = server.sysfs(context, file)?;
        ensure!(found == expected, "{file} is {found}, not {expected}");
    }
    let queues = fs::read_dir(format!("/sys/block/ublkb{}/mq", server.id))?.count();
    ensure!(queues == 2, "{queues} hardware queues");
    server.delete(context)
}

fn loop_sysfs_limits(context: &mut Context) -> Result<()> {
    let disk = context.disk(0);
    let below = |file: &str| context.read(format!("/sys/block/{}/{file}", disk.trim_start_matches("/dev/")));
    ensure!(
        below("queue/write_cache")? == "write back",
        "the disk below has no volatile cache: the test shows nothing"
    );
    let server = UblkServer::add(context, &["loop", disk])?;
    for file in ["size", "ro", "queue/logical_block_size", "queue/physical_block_size", "queue/write_cache"] {
        let (ours, theirs) = (server.sysfs(context, file)?, below(file)?);
        ensure!(ours == theirs, "{file} is {ours}, below it is {theirs}");
    }
    let fua = server.sysfs(context, "queue/fua")?;
    ensure!(fua == "1", "FUA is not offered beside a volatile cache");
    server.delete(context)
}

fn loop_fio_verify(context: &mut Context) -> Result<()> {
    let ram = RamDisk::new(context, 48)?;
    let server = UblkServer::add(context, &["loop", ram.device(), "--queues", "2", "--depth", "32"])?;
    let device = server.device();
    let filename = format!("--filename={device}");
    let shape = [
        "--rw=randwrite",
        "--bsrange=4k-256k",
        "--size=48m",
        "--ioengine=libaio",
        "--direct=1",
        "--iodepth=32",
    ];
    let checks = ["--verify=crc32c", "--fdatasync=32", "--randrepeat=0", "--do_verify=1"];
    context.fio(&[&[filename.as_str()], &shape[..], &checks[..]].concat())?;
    context.fio(&[
        &filename,
        "--rw=randwrite",
        "--bs=16k",
        "--size=8m",
        "--ioengine=libaio",
        "--direct=1",
        "--sync=dsync",
        "--iodepth=8",
        "--verify=crc32c",
    ])?;
    same_content(&device, ram.device(), 48 << 20)?;
    server.delete(context)
}

fn loop_flush_fua(context: &mut Context) -> Result<()> {
    let disk = context.disk(0);
    let server = UblkServer::add(context, &["loop", disk])?;
    let flushes = || -> Result<u64> {
        // Documentation/block/stat.rst: the 16th number counts flushes.
        let stat = context.read(format!("/sys/block/{}/stat", disk.trim_start_matches("/dev/")))?;
        Ok(stat.split_whitespace().nth(15).context("stat is short")?.parse()?)
    };
    let mut file = direct(&server.device())?;
    file.write_all(&aligned(1).0)?;
    let before = flushes()?;
    file.sync_data()?;
    let after_sync = flushes()?;
    ensure!(after_sync > before, "fdatasync of the device made no flush below");
    let mut durable =
        File::options().write(true).custom_flags(libc::O_DIRECT | libc::O_DSYNC).open(server.device())?;
    durable.write_all(&aligned(2).0)?;
    ensure!(flushes()? > after_sync, "an O_DSYNC write to the device made no flush below");
    drop((file, durable));
    server.delete(context)
}

fn loop_discard_zeroes(context: &mut Context) -> Result<()> {
    const MIB: u64 = 1 << 20;
    context.run(&["mkfs.ext4", "-q", "-F", context.disk(0)])?;
    let place = context.path("mount").to_string_lossy().into_owned();
    let _mount = Mount::new(context, context.disk(0), &place)?;
    let below = format!("{place}/disk.raw");
    File::create(&below)?.set_len(64 * MIB)?;
    let server = UblkServer::add(context, &["loop", &below])?;
    let device = server.device();
    context.fio(&[
        &format!("--filename={device}"),
        "--rw=write",
        "--bs=256k",
        "--size=16m",
        "--direct=1",
        "--buffer_pattern=0xa5",
        "--end_fsync=1",
    ])?;
    let blocks = |wanted: &str| -> Result<u64> {
        let used = fs::metadata(&below)?.blocks() * 512;
        context.note(format_args!("{wanted}: {used} bytes used below"));
        Ok(used)
    };
    let written = blocks("written")?;
    context.run(&["blkdiscard", "-o", &(4 * MIB).to_string(), "-l", &(2 * MIB).to_string(), &device])?;
    let punched = blocks("discarded")?;
    ensure!(punched + 2 * MIB <= written, "a discard of 2 MiB freed only {} bytes", written - punched);
    context.run(&["blkdiscard", "-z", "-o", &(8 * MIB).to_string(), "-l", &MIB.to_string(), &device])?;
    for (start, end, fill) in [(0, 4, 0xa5), (4, 6, 0), (6, 8, 0xa5), (8, 9, 0), (9, 16, 0xa5)] {
        filled_with(&device, start * MIB..end * MIB, fill)?;
    }
    server.delete(context)
}

fn loop_filesystems(context: &mut Context) -> Result<()> {
    context.run(&["modprobe", "xfs"])?;
    for (make, check) in [
        (&["mkfs.ext4", "-q", "-F"][..], &["e2fsck", "-fn"][..]),
        (&["mkfs.xfs", "-q", "-f"][..], &["xfs_repair", "-n"][..]),
    ] {
        let ram = RamDisk::new(context, 384)?;
        let server = UblkServer::add(context, &["loop", ram.device(), "--queues", "2"])?;
        let device = server.device();
        context.run(&[make, &[device.as_str()]].concat())?;
        let files =
            ["busybox", "bash", "fio"].map(|name| crate::tool::find(name).unwrap_or_else(|| name.into()));
        let place = context.path("mount").to_string_lossy().into_owned();
        {
            let _mount = Mount::new(context, &device, &place)?;
            for file in &files {
                context.run(&["cp", &file.to_string_lossy(), &place])?;
            }
        }
        {
            let _mount = Mount::new(context, &device, &place)?;
            for file in &files {
                let name = file.file_name().unwrap_or_default().to_string_lossy();
                context.run(&["cmp", &file.to_string_lossy(), &format!("{place}/{name}")])?;
            }
        }
        context.run(&[check, &[device.as_str()]].concat())?;
        server.delete(context)?;
    }
    Ok(())
}

fn del_while_busy(context: &mut Context) -> Result<()> {
    let ram = RamDisk::new(context, 32)?;
    let server = UblkServer::add(context, &["loop", ram.device()])?;
    let (device, id) = (server.device(), server.id.to_string());
    context.run(&["mkfs.ext4", "-q", "-F", &device])?;
    {
        let place = context.path("mount").to_string_lossy().into_owned();
        let _mount = Mount::new(context, &device, &place)?;
        let (status, _, said) = context.try_run(&["vra-ublk", "del", &id])?;
        ensure!(
            !status.success() && said.contains("in use"),
            "a mounted device was not refused: {status} {said}"
        );
    }
    let mut load = context.spawn(&[
        "fio",
        "--name=load",
        &format!("--filename={device}"),
        "--rw=randrw",
        "--bs=4k",
        "--ioengine=libaio",
        "--direct=1",
        "--iodepth=32",
        "--time_based",
        "--runtime=600",
    ])?;
    std::thread::sleep(std::time::Duration::from_secs(1));
    ensure!(load.ended()?.is_none(), "the load ended by itself:\n{}", load.output());
    context.run(&["vra-ublk", "del", "--force", &id])?;
    let status = context.wait_for("the load to end with its device", 20, || load.ended())?;
    ensure!(!status.success(), "the load lost its device without an error");
    ensure!(state(server.id)?.is_none(), "the device is still listed");
    drop(server);
    Ok(())
}

fn term_deletes(context: &mut Context) -> Result<()> {
    let mut server = UblkServer::add(context, &["null"])?;
    server.process.terminate()?;
    server.process.finish(10)?;
    ensure!(list()?.is_empty(), "the device is still listed");
    ensure!(!Path::new(&server.device()).exists(), "{} is still there", server.device());
    Ok(())
}

fn refuses_in_use(context: &mut Context) -> Result<()> {
    let ram = RamDisk::new(context, 16)?;
    let server = UblkServer::add(context, &["loop", ram.device()])?;
    refused(context, &["add", "loop", ram.device()], &[ram.device()])?;
    refused(context, &["add", "loop", "/dev/no-such-disk"], &["/dev/no-such-disk"])?;
    refused(context, &["recover", "63", "null"], &["63"])?;
    server.delete(context)
}

fn recover_refuses_live(context: &mut Context) -> Result<()> {
    let server = UblkServer::add(context, &["null"])?;
    refused(context, &["recover", &server.id.to_string(), "null"], &[&server.process.pid().to_string()])?;
    server.delete(context)
}

fn refused(context: &Context, words: &[&str], parts: &[&str]) -> Result<()> {
    let (status, _, said) = context.try_run(&[&["vra-ublk"], words].concat())?;
    ensure!(!status.success(), "{words:?} was not refused");
    ensure!(parts.iter().all(|part| said.contains(part)), "the refusal says nothing of {parts:?}: {said}");
    Ok(())
}

/// A mount that ends with its owner.
pub(super) struct Mount<'a> {
    context: &'a Context,
    place: &'a str,
}

impl<'a> Mount<'a> {
    pub(super) fn new(context: &'a Context, device: &str, place: &'a str) -> Result<Self> {
        fs::create_dir_all(place)?;
        context.run(&["mount", device, place])?;
        Ok(Self { context, place })
    }
}

impl Drop for Mount<'_> {
    fn drop(&mut self) {
        let _ = self.context.run(&["umount", self.place]);
    }
}
