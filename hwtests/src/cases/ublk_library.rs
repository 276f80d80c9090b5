//! The library as a daemon uses it: many devices on one thread, sweeps, quiescing.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use ublk::arena::Arena;
use ublk::control::Control;
use ublk::cookie::Cookie;
use ublk::device::{DeviceSettings, DeviceState, Driver};
use ublk::process::{self, ProcessSettings};
use ublk::reactor::{ReactorSettings, Reactors};
use ublk::serve::{Completion, Disk, Errno, Geometry, IoBuffer, Lane, Port, Request, Waker};
use ublk::sweep::{self, Verdict};
use ublk::targets::NullDisk;

use crate::suite::context::Context;
use crate::suite::ublk::UblkServer;
use crate::suite::{Body, Case, Need};

const SLOT_BYTES: usize = 16 << 10;

pub(super) const CASES: &[Case] = &[
    Case::new(
        "ublk-many-on-one-thread",
        "Of twenty devices on one thread any one is deleted at once while the others are idle, and the others go on.",
        Body::Inside(many_on_one_thread),
    )
    .limit_s(120),
    Case::new(
        "ublk-quiesce-recover",
        "A device that was quiesced keeps the guest's request waiting until it is recovered, and no request comes twice.",
        Body::Inside(quiesce_recover),
    )
    .needs(&[Need::UblkFeature("QUIESCE")]),
    Case::new(
        "ublk-grow",
        "A device grows while it is written, its new end can be written, too, and a successor finds it as large.",
        Body::Inside(grow),
    )
    .needs(&[Need::UblkFeature("UPDATE_SIZE"), Need::UblkFeature("QUIESCE")]),
    Case::new(
        "ublk-leave-busy",
        "A device all of whose tags are busy is left once they are answered: nobody waits for tags that the driver keeps.",
        Body::Inside(leave_busy),
    )
    .needs(&[Need::UblkFeature("QUIESCE")])
    .kernel_log_allowed(&["I/O error, dev ublkb", "Buffer I/O error"]),
    Case::new(
        "ublk-sweep",
        "A sweep asks about orphans alone: what a living process serves stays.",
        Body::Inside(sweep_orphans),
    ),
    Case::new(
        "ublk-small-arena",
        "A device that the arena has too few buffers for is refused and leaves nothing behind.",
        Body::Inside(small_arena),
    ),
];

fn driver(thread_count: usize) -> Result<Driver> {
    process::prepare(ProcessSettings { private_mounts: false, ..ProcessSettings::FOR_UBLK })?;
    let reactors = Reactors::start(ReactorSettings { thread_count, ring_entries: 256 })?;
    Ok(Driver::open(Arc::new(reactors))?)
}

fn settings(disk_id: u32) -> DeviceSettings {
    DeviceSettings { depth: 8, ..DeviceSettings::new(Cookie { disk_id }) }
}

fn disk() -> Arc<dyn Disk> {
    Arc::new(NullDisk::new(16 << 20))
}

fn write_block(path: &std::path::Path) -> Result<()> {
    let mut file = std::fs::File::options().read(true).write(true).open(path)?;
    file.write_all(&[7; 4096])?;
    file.sync_all()?;
    Ok(())
}

fn many_on_one_thread(context: &mut Context) -> Result<()> {
    let driver = driver(1)?;
    let arena = Arena::new(SLOT_BYTES, 20 * 8)?;
    let mut devices = Vec::new();
    for disk_id in 0..20 {
        devices.push(driver.add(disk(), &arena, settings(disk_id))?);
    }
    ensure!(arena.free_count() == 0, "{} slots are free", arena.free_count());
    // The first, one in the middle, the last.
    for place in [19, 7, 0] {
        let device = devices.remove(place);
        let started = Instant::now();
        device.delete()?;
        context.note(format_args!("deleted one in {} ms", started.elapsed().as_millis()));
        ensure!(started.elapsed() < Duration::from_secs(5), "an idle neighbour holds up the deletion");
    }
    ensure!(arena.free_count() == 3 * 8, "slots of deleted devices: {} are free", arena.free_count());
    for device in &devices {
        write_block(&device.block_path())?;
    }
    for device in devices {
        device.delete()?;
    }
    ensure!(arena.free_count() == 20 * 8, "not all slots came back");
    Ok(())
}

fn quiesce_recover(context: &mut Context) -> Result<()> {
    let driver = driver(2)?;
    let arena = Arena::new(SLOT_BYTES, 64)?;
    let mut device = driver.add(disk(), &arena, settings(5))?;
    let path = device.block_path();
    write_block(&path)?;
    device.leave(Duration::from_secs(5))?;
    let id = device.id();
    drop(device);
    ensure!(arena.free_count() == 64, "a quiesced device holds slots");
    let list = driver.list()?;
    ensure!(list.iter().any(|info| info.id == id && info.state == DeviceState::Quiesced), "{list:?}");
    let reader = {
        let path = path.clone();
        std::thread::spawn(move || -> Result<()> {
            let mut file = std::fs::File::open(path)?;
            Ok(file.read_exact(&mut [0; 65_536])?)
        })
    };
    std::thread::sleep(Duration::from_millis(300));
    ensure!(!reader.is_finished(), "a read ended while nobody served the device");
    let device = driver.recover(id, disk(), &arena)?;
    context.wait_for("the waiting read", 10, || Ok(reader.is_finished().then_some(())))?;
    reader.join().ok().context("the reader panicked")??;
    device.delete()?;
    Ok(())
}

fn grow(context: &mut Context) -> Result<()> {
    const GROWN_BYTES: u64 = 24 << 20;
    let driver = driver(2)?;
    let arena = Arena::new(SLOT_BYTES, 64)?;
    let mut device = driver.add(disk(), &arena, settings(7))?;
    let path = device.block_path();
    let mut load = context.spawn(&[
        "fio",
        "--name=load",
        &format!("--filename={}", path.display()),
        "--rw=randwrite",
        "--bs=4k",
        "--size=8m",
        "--ioengine=libaio",
        "--direct=1",
        "--iodepth=4",
        "--time_based",
        "--runtime=3",
    ])?;
    device.size().grow(GROWN_BYTES)?;
    ensure!(device.size().bytes() == GROWN_BYTES, "it says {} bytes", device.size().bytes());
    let seen_bytes = |context: &Context| -> Result<u64> {
        let sectors = context.read(format!("/sys/block/ublkb{}/size", device.id()))?;
        Ok(sectors.trim().parse::<u64>()? << 9)
    };
    ensure!(seen_bytes(context)? == GROWN_BYTES, "the kernel shows {} bytes", seen_bytes(context)?);
    let write_end = || -> Result<()> {
        let file = File::options().write(true).open(&path)?;
        file.write_all_at(&[7; 4096], GROWN_BYTES - 4096)?;
        Ok(file.sync_all()?)
    };
    write_end()?;
    load.finish(30)?;
    let id = device.id();
    device.leave(Duration::from_secs(5))?;
    drop(device);
    let device = driver.recover(id, Arc::new(NullDisk::new(GROWN_BYTES)), &arena)?;
    write_end()?;
    device.delete()?;
    Ok(())
}

fn leave_busy(context: &mut Context) -> Result<()> {
    let driver = driver(1)?;
    let arena = Arena::new(SLOT_BYTES, 64)?;
    let slow: Arc<dyn Disk> = Arc::new(SlowDisk(NullDisk::new(16 << 20)));
    let mut device = driver.add(slow, &arena, settings(6))?;
    let mut load = context.spawn(&[
        "fio",
        "--name=load",
        &format!("--filename={}", device.block_path().display()),
        "--rw=randwrite",
        "--bs=4k",
        "--ioengine=libaio",
        "--direct=1",
        "--iodepth=16",
        "--time_based",
        "--runtime=60",
    ])?;
    // All tags are busy nearly all of the time.
    std::thread::sleep(Duration::from_secs(3));
    ensure!(load.ended()?.is_none(), "the load ended:\n{}", load.output());
    let started = Instant::now();
    device.leave(Duration::from_secs(10))?;
    context.note(format_args!("left after {} ms", started.elapsed().as_millis()));
    std::thread::sleep(ANSWER_AFTER * 4);
    ensure!(load.ended()?.is_none(), "a left device failed a request:\n{}", load.output());
    device.delete()?;
    context.wait_for("the load to end with its device", 20, || load.ended())?;
    ensure!(arena.free_count() == 64, "not all slots came back");
    Ok(())
}

/// How old a request of a [`SlowDisk`] is when it is answered.
const ANSWER_AFTER: Duration = Duration::from_millis(300);

/// Forgets writes, late.
struct SlowDisk(NullDisk);

struct SlowLane {
    waiting: VecDeque<(Instant, Request)>,
    /// The thread that wakes this lane goes on as long as this is there.
    _alive: Arc<()>,
}

impl Disk for SlowDisk {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }

    fn files(&self) -> &[File] {
        &[]
    }

    fn lane(self: Arc<Self>, waker: Waker) -> Box<dyn Lane> {
        let alive = Arc::new(());
        let lives: Weak<()> = Arc::downgrade(&alive);
        std::thread::spawn(move || {
            while lives.strong_count() > 0 {
                std::thread::sleep(Duration::from_millis(20));
                waker.wake();
            }
        });
        Box::new(SlowLane { waiting: VecDeque::new(), _alive: alive })
    }
}

impl Lane for SlowLane {
    fn request(&mut self, request: Request, _port: &mut dyn Port) {
        self.waiting.push_back((Instant::now(), request));
    }

    fn file_done(&mut self, _: u64, _: Result<(), Errno>, _: IoBuffer, _: &mut dyn Port) {}

    fn wake(&mut self, port: &mut dyn Port) {
        while let Some((_, request)) = self.waiting.pop_front_if(|(came, _)| came.elapsed() >= ANSWER_AFTER) {
            port.complete(Completion { tag: request.tag, result: Ok(()), slot: request.slot });
        }
    }
}

fn sweep_orphans(context: &mut Context) -> Result<()> {
    let orphan = UblkServer::add(context, &["null", "--disk-id", "1"])?.crash(context)?;
    let served = UblkServer::add(context, &["null", "--disk-id", "2"])?;
    let recoverable = UblkServer::add(context, &["null", "--disk-id", "3"])?.crash(context)?;
    let mut asked = Vec::new();
    let swept = sweep::sweep(&Control::open()?, |info, cookie| {
        asked.push((info.id, cookie.disk_id));
        if cookie.disk_id == 1 { Verdict::Delete } else { Verdict::Recover }
    })?;
    ensure!(asked == [(orphan, 1), (recoverable, 3)], "asked about {asked:?}");
    ensure!(swept.deleted == [orphan] && swept.failed.is_empty(), "{swept:?}");
    ensure!(swept.to_recover.len() == 1 && swept.to_recover[0].1.disk_id == 3, "{swept:?}");
    let recovered = UblkServer::recover(context, recoverable, &["null"])?;
    write_block(std::path::Path::new(&recovered.device()))?;
    recovered.delete(context)?;
    served.delete(context)
}

fn small_arena(_context: &mut Context) -> Result<()> {
    let driver = driver(1)?;
    let arena = Arena::new(SLOT_BYTES, 7)?;
    let refused = driver.add(disk(), &arena, settings(1)).err().context("served with too few slots")?;
    let text = refused.to_string();
    ensure!(text.contains("needs 8 buffers") && text.contains("has 7 free ones"), "{text}");
    ensure!(driver.list()?.is_empty(), "a device is left: {:?}", driver.list()?);
    ensure!(arena.free_count() == 7, "slots are lost");
    Ok(())
}
