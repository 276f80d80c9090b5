//! Our ublk targets beside rublk's, in the same machine with the same queues, depth and buffers.

use anyhow::{Context as _, Result};

use super::{BenchPlace, Benchmark, Better, Pair};
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
        place: BenchPlace::Rig,
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
        place: BenchPlace::Rig,
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

/// Every second pair begins with the peer.
fn in_turn(
    number: u32,
    ours: impl FnOnce() -> Result<f64>,
    peer: impl FnOnce() -> Result<f64>,
) -> Result<Pair> {
    if number.is_multiple_of(2) {
        let ours = ours()?;
        Ok(Pair { ours, peer: peer()? })
    } else {
        let peer = peer()?;
        Ok(Pair { ours: ours()?, peer })
    }
}

fn ours(context: &Context, target: &[&str]) -> Result<f64> {
    let shape = ["--queues", "1", "--depth", "64", "--buffer-kib", "64"];
    let server = UblkServer::add(context, &[target, &shape].concat())?;
    let iops = iops(context, &server.device(), target)?;
    server.delete(context)?;
    Ok(iops)
}

fn rublk(context: &Context, target: &[&str]) -> Result<f64> {
    let (kind, rest) = target.split_first().context("a target has a name")?;
    let shape = ["-n", RUBLK_ID, "--queue", "1", "--depth", "64", "--io-buf-size", "64KiB", "--quiet"];
    context.run(&[&["rublk", "add", kind], &shape[..], rest].concat())?;
    let device = format!("/dev/ublkb{RUBLK_ID}");
    context.wait_for("rublk's device", 20, || Ok(std::fs::exists(&device)?.then_some(())))?;
    let iops = iops(context, &device, target);
    context.run(&["rublk", "del", "-n", RUBLK_ID])?;
    iops
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
