//! The edges of the ublk door: what is not offered, what is refused, and what a dead daemon still holds.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use ublk::backing::{Backing, BackingError, BackingSettings};

use super::ram_disk::RamDisk;
use crate::suite::context::Context;
use crate::suite::ublk::UblkServer;
use crate::suite::{Body, Case, MachineNeeds, Need};

const DISK: MachineNeeds = MachineNeeds { disks_mib: &[128], ..MachineNeeds::USUAL };
const OURS: &[Need] = &[Need::Tool("vra-ublk")];
const NULL_BLK: &[Need] = &[Need::Tool("vra-ublk"), Need::Module("null_blk")];

pub(super) const CASES: &[Case] = &[
    Case::new(
        "ublk-null-reads-zeroes",
        "The null target takes writes and reads zeroes, never what went through its buffers before.",
        Body::Inside(null_reads_zeroes),
    )
    .needs(OURS),
    Case::new(
        "ublk-flush-for-each",
        "Sixteen fsyncs are at least sixteen flushes below, sixteen FUA writes sixteen more, and plain writes none.",
        Body::Inside(flush_for_each),
    )
    .needs(OURS)
    .machine(DISK),
    Case::new(
        "ublk-discard-not-offered",
        "Over a device that cannot zero ranges neither discard nor write-zeroes is offered.",
        Body::Inside(discard_not_offered),
    )
    .needs(NULL_BLK),
    Case::new(
        "ublk-no-partition-scan",
        "A guest's partition table is not read by the host when its disk's device starts.",
        Body::Inside(no_partition_scan),
    )
    .needs(&[Need::Tool("vra-ublk"), Need::Module("brd")]),
    Case::new(
        "ublk-dead-daemon-fenced",
        "While a killed daemon's write is in the block layer, neither its disk nor its device can be taken.",
        Body::Inside(dead_daemon_fenced),
    )
    .needs(NULL_BLK),
    Case::new(
        "ublk-recover-changed",
        "A device is not recovered with a disk that was cut; with a longer one it is, and has what is new where the driver can do that.",
        Body::Inside(recover_changed),
    )
    .needs(OURS),
    Case::new(
        "ublk-remedies",
        "An odd disk, a taken number, settings out of bounds, missing capabilities and a missing driver are named with the remedy.",
        Body::Inside(remedies),
    )
    .needs(OURS)
    .limit_s(90),
];

fn null_reads_zeroes(context: &mut Context) -> Result<()> {
    let device = UblkServer::add(context, &["null", "--size", "64M", "--queues", "2"])?;
    let path = device.device();
    context.run(&["dd", "if=/dev/urandom", &format!("of={path}"), "bs=64k", "count=64", "oflag=direct"])?;
    context.run(&["cmp", "-n", "4194304", &path, "/dev/zero"])?;
    device.delete(context)
}

fn flush_for_each(context: &mut Context) -> Result<()> {
    let device = UblkServer::add(context, &["loop", "/dev/vda"])?;
    let path = device.device();
    let flushes = |syncs: &[&str]| -> Result<u64> {
        let before = flush_count(context)?;
        let filename = format!("--filename={path}");
        let write = [&filename, "--rw=write", "--bs=4k", "--size=64k", "--direct=1", "--ioengine=psync"];
        context.fio(&[&write[..], syncs].concat())?;
        Ok(flush_count(context)? - before)
    };
    let (plain, fsync) = (flushes(&[])?, flushes(&["--fsync=1", "--end_fsync=1"])?);
    let fua = flushes(&["--sync=1"])?;
    context.note(format_args!("flushes for 16 writes: {plain} plain, {fsync} with fsync, {fua} with O_SYNC"));
    ensure!(plain <= 2, "{plain} flushes of a guest that wanted none");
    ensure!(fsync >= 16, "only {fsync} flushes for 16 of the guest's");
    // The guest's kernel makes of each O_SYNC write a FUA write and a flush.
    ensure!(fua >= 32, "only {fua} flushes for 16 FUA writes, each with a flush");
    device.delete(context)
}

/// Flushes that `/dev/vda` has completed: field 16 of Documentation/block/stat.rst.
fn flush_count(context: &Context) -> Result<u64> {
    let stat = context.read("/sys/block/vda/stat")?;
    stat.split_ascii_whitespace().nth(15).context("the kernel counts no flushes")?.parse().context("a count")
}

fn discard_not_offered(context: &mut Context) -> Result<()> {
    let _below = NullBlk::new(context, &[])?;
    let device = UblkServer::add(context, &["loop", "/dev/nullb0"])?;
    for limit in ["discard_max_bytes", "write_zeroes_max_bytes"] {
        let offered = device.sysfs(context, &format!("queue/{limit}"))?;
        ensure!(offered == "0", "{limit} is {offered} over a device that has none");
    }
    device.delete(context)
}

/// Over a device whose every I/O takes three seconds.
fn no_partition_scan(context: &mut Context) -> Result<()> {
    let ram = RamDisk::new(context, 16)?;
    // A master boot record with one Linux partition of 2048 sectors from sector 2048 on.
    let mut record = [0; 512];
    record[446..462].copy_from_slice(&[0, 0, 0, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 8, 0, 0]);
    record[510..].copy_from_slice(&[0x55, 0xaa]);
    std::fs::OpenOptions::new().write(true).open(ram.device())?.write_all(&record)?;
    let server = UblkServer::add(context, &["loop", ram.device()])?;
    let read = std::fs::read(server.device())?;
    ensure!(read[..512] == record, "the device does not have the table");
    let partition = format!("/sys/block/ublkb{0}/ublkb{0}p1", server.id);
    ensure!(!Path::new(&partition).exists(), "the host looked for partitions and found one");
    server.delete(context)
}

fn dead_daemon_fenced(context: &mut Context) -> Result<()> {
    let _below = NullBlk::new(context, &["irqmode=2", "completion_nsec=3000000000", "memory_backed=1"])?;
    let in_flight = || Ok::<_, anyhow::Error>(!context.read("/sys/block/nullb0/inflight")?.ends_with(" 0"));
    let mut device = UblkServer::add(context, &["loop", "/dev/nullb0"])?;
    let (id, output) = (device.id, format!("of={}", device.device()));
    let mut write = context.spawn(&["dd", "if=/dev/urandom", &output, "bs=4k", "count=1", "oflag=direct"])?;
    context.wait_for("the write to reach the slow device", 20, || Ok(in_flight()?.then_some(())))?;
    device.process.kill()?;
    let settings = BackingSettings { lock_wait: Duration::ZERO, ..BackingSettings::RECOVERY };
    let disk = Backing::open(Path::new("/dev/nullb0"), settings).map(drop);
    let char_device = File::options().read(true).write(true).open(format!("/dev/ublkc{id}"));
    ensure!(in_flight()?, "the write ended too soon to tell");
    ensure!(matches!(disk, Err(BackingError::Busy { .. })), "the disk could be taken: {disk:?}");
    let errno = char_device.err().and_then(|error| error.raw_os_error());
    ensure!(errno == Some(libc::EBUSY), "the device could be taken: {errno:?}");
    device.crash(context)?;
    let device = UblkServer::recover(context, id, &["loop", "/dev/nullb0"])?;
    write.finish(20)?;
    device.delete(context)
}

fn recover_changed(context: &mut Context) -> Result<()> {
    let file = context.path("disk.raw").to_string_lossy().into_owned();
    context.run(&["truncate", "-s", "16M", &file])?;
    let id = UblkServer::add(context, &["loop", &file])?.crash(context)?;
    context.run(&["truncate", "-s", "8M", &file])?;
    let changed = "its size was 16777216 bytes and is 8388608 bytes";
    refused(context, &["vra-ublk", "recover", &id.to_string(), "loop", &file], changed)?;
    context.run(&["truncate", "-s", "32M", &file])?;
    let server = UblkServer::recover(context, id, &["loop", &file])?;
    let features = context.run(&["vra-ublk", "features"])?;
    let expected_bytes: u64 = if features.contains("UPDATE_SIZE") { 32 << 20 } else { 16 << 20 };
    let sectors: u64 = server.sysfs(context, "size")?.trim().parse()?;
    ensure!(sectors << 9 == expected_bytes, "the device has {} bytes", sectors << 9);
    server.delete(context)
}

fn remedies(context: &mut Context) -> Result<()> {
    let odd = context.path("odd.raw").to_string_lossy().into_owned();
    context.run(&["truncate", "-s", "1000", &odd])?;
    let not_a_multiple = "has 1000 bytes, which is not a multiple";
    refused(context, &["vra-ublk", "add", "loop", &odd], not_a_multiple)?;
    refused(context, &["vra-ublk", "del", "77"], "there is no ublk device 77")?;
    refused(context, &["vra-ublk", "add", "null", "--depth", "5000"], "at most 4096")?;
    let device = UblkServer::add(context, &["null"])?;
    refused(context, &["vra-ublk", "add", "null", "--id", &device.id.to_string()], "the number is taken")?;
    device.delete(context)?;
    let nobody = ["unshare", "--user", "--map-root-user", "vra-ublk", "add", "null"];
    refused(context, &nobody, "as root")?;
    context.run(&["rmmod", "ublk_drv"])?;
    let missing = refused(context, &["vra-ublk", "add", "null"], "modprobe ublk_drv");
    context.run(&["modprobe", "ublk_drv"])?;
    missing
}

/// The kernel's own null device, `/dev/nullb0`, that goes with its owner.
struct NullBlk<'a> {
    context: &'a Context,
}

impl<'a> NullBlk<'a> {
    fn new(context: &'a Context, parameters: &[&str]) -> Result<Self> {
        context.run(&[&["modprobe", "null_blk", "nr_devices=1"], parameters].concat())?;
        Ok(Self { context })
    }
}

impl Drop for NullBlk<'_> {
    fn drop(&mut self) {
        let _ = self.context.run(&["modprobe", "-r", "null_blk"]);
    }
}

fn refused(context: &Context, words: &[&str], expected: &str) -> Result<()> {
    let (status, _, stderr) = context.try_run(words)?;
    ensure!(!status.success(), "{words:?} worked");
    ensure!(stderr.contains(expected), "{words:?} says {stderr:?} and not {expected:?}");
    Ok(())
}
