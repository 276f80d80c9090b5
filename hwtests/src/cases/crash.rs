//! The death of a ublk server, and its successor: the guest must see nothing but a pause.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::ram_disk::RamDisk;
use super::ublk::same_content;
use crate::suite::context::Context;
use crate::suite::ublk::{UblkServer, list, state};
use crate::suite::{Body, Case, Need};

const BRD: &[Need] = &[Need::Tool("vra-ublk"), Need::Module("brd")];

pub(super) const CASES: &[Case] = &[
    Case::new(
        "crash-under-load-recover",
        "kill -9 of the server under load, three times, each time recovered: the load sees no error and finds its data.",
        Body::Inside(|context| under_load(context, End::Crash, 3)),
    )
    .needs(BRD)
    .limit_s(150),
    Case::new(
        "crash-under-load-recover-often",
        "The same, fifty times.",
        Body::Inside(|context| under_load(context, End::Crash, 50)),
    )
    .needs(BRD)
    .limit_s(900)
    .long(),
    Case::new(
        "leave-under-load-recover",
        "A server leaves a device all of whose tags are busy, four times, each time within 5 s, and another recovers it: the load sees no error and finds its data.",
        Body::Inside(|context| under_load(context, End::Leave, 4)),
    )
    .needs(&[Need::Tool("vra-ublk"), Need::Module("brd"), Need::UblkFeature("QUIESCE")])
    .limit_s(150),
    Case::new(
        "crash-then-delete",
        "A device whose server died can be deleted, with I/O waiting on it too.",
        Body::Inside(then_delete),
    )
    .needs(BRD)
    .kernel_log_allowed(&["I/O error, dev ublkb", "Buffer I/O error"]),
    Case::new(
        "crash-while-starting",
        "A server killed at any moment of its start leaves nothing that can't be deleted.",
        Body::Inside(|context| while_starting(context, 12)),
    )
    .needs(&[Need::Tool("vra-ublk")])
    .limit_s(150),
    Case::new(
        "crash-while-recovering",
        "A server killed at any moment of a recovery, with some of the tags fetched, leaves a device that the next one recovers.",
        Body::Inside(|context| while_recovering(context, 8)),
    )
    .needs(BRD)
    .limit_s(200),
    Case::new(
        "crash-delete-ours-spares-strangers",
        "Deleting all of ours by their cookie leaves another program's device alone.",
        Body::Inside(spares_strangers),
    )
    .needs(&[Need::Tool("vra-ublk"), Need::Tool("rublk")]),
];

/// How a server ends.
#[derive(Clone, Copy)]
enum End {
    Crash,
    Leave,
}

fn under_load(context: &mut Context, end: End, times: u32) -> Result<()> {
    let ram = RamDisk::new(context, 16)?;
    let depth = match end {
        End::Crash => "32",
        End::Leave => "8",
    };
    let mut server = UblkServer::add(context, &["loop", ram.device(), "--queues", "2", "--depth", depth])?;
    let device = server.device();
    let runtime = format!("--runtime={}", 4 + times * 3);
    // Each pass writes a range once and reads it back, over and over until the time is up.
    let mut load = context.spawn(&[
        "fio",
        "--name=load",
        &format!("--filename={device}"),
        "--rw=randwrite",
        "--bsrange=4k-64k",
        "--size=8m",
        "--ioengine=libaio",
        "--direct=1",
        "--iodepth=32",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--fdatasync=64",
        "--time_based",
        "--loops=1000",
        &runtime,
        "--error_dump=1",
    ])?;
    for round in 0..times {
        std::thread::sleep(Duration::from_millis(700 + u64::from(round) * 37 % 400));
        ensure!(load.ended()?.is_none(), "the load ended before round {round}:\n{}", load.output());
        let id = match end {
            End::Crash => server.crash(context)?,
            End::Leave => server.leave(context, 5)?,
        };
        server = UblkServer::recover(context, id, &["loop", ram.device()])?;
        ensure!(state(id)?.as_deref() == Some("live"), "the device is not live after its recovery");
    }
    load.finish(120)?;
    same_content(&device, ram.device(), 8 << 20)?;
    server.delete(context)
}

fn then_delete(context: &mut Context) -> Result<()> {
    let ram = RamDisk::new(context, 16)?;
    let server = UblkServer::add(context, &["loop", ram.device()])?;
    let device = server.device();
    let mut load = context.spawn(&[
        "fio",
        "--name=load",
        &format!("--filename={device}"),
        "--rw=randwrite",
        "--bs=4k",
        "--ioengine=libaio",
        "--direct=1",
        "--iodepth=8",
        "--time_based",
        "--runtime=600",
    ])?;
    std::thread::sleep(Duration::from_millis(700));
    let id = server.crash(context)?;
    ensure!(load.ended()?.is_none(), "the load saw the crash:\n{}", load.output());
    context.run(&["vra-ublk", "del", "--force", &id.to_string()])?;
    context.wait_for("the load to end with its device", 20, || load.ended())?;
    ensure!(state(id)?.is_none(), "the device is still listed");
    Ok(())
}

fn while_starting(context: &mut Context, attempts: u64) -> Result<()> {
    for attempt in 0..attempts {
        let mut process = context.spawn(&["vra-ublk", "add", "null", "--queues", "2", "--depth", "64"])?;
        std::thread::sleep(Duration::from_millis(attempt * 23));
        process.kill()?;
        for device in list()? {
            let id = device["id"].to_string();
            context.note(format_args!(
                "killed after {} ms: device {id} is {}",
                attempt * 23,
                device["state"]
            ));
            context.run(&["vra-ublk", "del", "--force", &id])?;
        }
        context.wait_for("all devices to go", 15, || Ok(list()?.is_empty().then_some(())))?;
    }
    UblkServer::add(context, &["null"])?.delete(context)
}

fn while_recovering(context: &mut Context, attempts: u64) -> Result<()> {
    let ram = RamDisk::new(context, 16)?;
    let server = UblkServer::add(context, &["loop", ram.device(), "--queues", "2", "--depth", "64"])?;
    let device = server.device();
    let mut load = context.spawn(&[
        "fio",
        "--name=load",
        &format!("--filename={device}"),
        "--rw=randwrite",
        "--bs=4k",
        "--size=2m",
        "--ioengine=libaio",
        "--direct=1",
        "--iodepth=32",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--io_size=6m",
        "--loops=3",
    ])?;
    std::thread::sleep(Duration::from_millis(200));
    let id = server.crash(context)?;
    for attempt in 0..attempts {
        let mut successor = context.spawn(&["vra-ublk", "recover", &id.to_string(), "loop", ram.device()])?;
        std::thread::sleep(Duration::from_millis(10 + attempt * 29));
        successor.kill()?;
        context.note(format_args!("killed after {} ms: {:?}", 10 + attempt * 29, state(id)?));
    }
    // The driver may still be taking leave of the last one.
    let server = context.wait_for("a recovery", 30, || {
        Ok(UblkServer::recover(context, id, &["loop", ram.device()])
            .map_err(|error| context.note(error))
            .ok())
    })?;
    load.finish(120)?;
    same_content(&device, ram.device(), 2 << 20)?;
    server.delete(context)
}

fn spares_strangers(context: &mut Context) -> Result<()> {
    let before = list()?.len();
    ensure!(before == 0, "{before} devices before the test");
    context.run(&["rublk", "add", "null"])?;
    let stranger = context
        .wait_for("rublk's device", 10, || Ok(list()?.first().map(|device| device["id"].to_string())))?;
    let server = UblkServer::add(context, &["null"])?;
    context.run(&["vra-ublk", "del", "--ours"])?;
    let left: Vec<String> = list()?.iter().map(|device| device["id"].to_string()).collect();
    context.run(&["rublk", "del", "-n", &stranger])?;
    ensure!(left == [stranger.clone()], "left are {left:?}, not the stranger {stranger} alone");
    drop(server);
    Ok(())
}
