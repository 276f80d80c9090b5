//! Our ublk targets beside rublk's, in the same machine with the same queues, depth and buffers.

use anyhow::{Context as _, Result};

use super::{BenchPlace, Benchmark, Better, Pair, in_turn};
use crate::cases::ram_disk::RamDisk;
use crate::suite::context::Context;
use crate::suite::ublk::UblkServer;

pub(super) const BENCHMARKS: &[Benchmark] = &[
    Benchmark {
        name: "ublk-null",
        what: "4 KiB random writes to a device that forgets them, depth 32, one queue: the driver alone",
        peer: "rublk null",
        unit: "IOPS",
        better: Better::Higher,
        gate: Some(0.9),
        place: BenchPlace::Rig { disks_mib: &[] },
        programs: &["vra-ublk", "rublk"],
        pair: |context, number| in_turn(number, || ours(context, &["null"]), || rublk(context, &["null"])),
    },
    Benchmark {
        name: "ublk-loop",
        what: "4 KiB random reads and writes over a RAM disk, depth 32, one queue",
        peer: "rublk loop",
        unit: "IOPS",
        better: Better::Higher,
        gate: Some(0.9),
        place: BenchPlace::Rig { disks_mib: &[] },
        programs: &["vra-ublk", "rublk"],
        pair: over_ram_disk,
    },
];

/// An id that no device of ours gets by itself.
const RUBLK_ID: &str = "40";

fn over_ram_disk(context: &mut Context, number: u32) -> Result<Pair> {
    let ram = RamDisk::new(context, 256)?;
    in_turn(
        number,
        || ours(context, &["loop", ram.device()]),
        || rublk(context, &["loop", "--file", ram.device()]),
    )
}

fn ours(context: &Context, target: &[&str]) -> Result<f64> {
    let shape = ["--queues", "1", "--depth", "64", "--buffer-kib", "64"];
    let server = UblkServer::add(context, &[target, &shape].concat())?;
    let iops = iops(context, &server.device(), target)?;
    server.delete(context)?;
    Ok(iops)
}

fn rublk(context: &Context, target: &[&str]) -> Result<f64> {
    let device = RublkDevice::add(context, target)?;
    let iops = iops(context, device.path(), target);
    device.delete()?;
    iops
}

/// A device of rublk, with one queue of the depth that ours has.
pub(super) struct RublkDevice<'a> {
    context: &'a Context,
    path: String,
}

impl<'a> RublkDevice<'a> {
    /// Adds it; `target` is its kind and the kind's own options.
    pub(super) fn add(context: &'a Context, target: &[&str]) -> Result<Self> {
        let (kind, rest) = target.split_first().context("a target has a name")?;
        let shape = ["-n", RUBLK_ID, "--queue", "1", "--depth", "64", "--io-buf-size", "64KiB", "--quiet"];
        context.run(&[&["rublk", "add", kind], &shape[..], rest].concat())?;
        let path = format!("/dev/ublkb{RUBLK_ID}");
        context.wait_for("rublk's device", 20, || Ok(std::fs::exists(&path)?.then_some(())))?;
        Ok(Self { context, path })
    }

    /// The block device.
    pub(super) fn path(&self) -> &str {
        &self.path
    }

    /// Deletes it.
    pub(super) fn delete(self) -> Result<()> {
        self.context.run(&["rublk", "del", "-n", RUBLK_ID]).map(drop)
    }
}

fn iops(context: &Context, device: &str, target: &[&str]) -> Result<f64> {
    let pattern = if target[0] == "null" { "--rw=randwrite" } else { "--rw=randrw" };
    let report = context.fio(&[
        &format!("--filename={device}"),
        pattern,
        "--bs=4k",
        "--ioengine=libaio",
        "--direct=1",
        "--iodepth=32",
        "--time_based",
        "--ramp_time=1",
        "--runtime=4",
        "--norandommap",
    ])?;
    Ok(report.read_iops + report.write_iops)
}
