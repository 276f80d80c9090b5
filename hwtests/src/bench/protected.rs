//! What a guest pays for protection: the 99th percentile of its writes at a fixed rate on a disk that replicates, beside an unprotected one.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail, ensure};
use vra::api::TimeUs;

use super::ublk::RublkDevice;
use super::{BenchPlace, Benchmark, Better, Pair, in_turn};
use crate::site::{Binaries, DiskAt, Door, Side, Site, SiteSettings, Vm};
use crate::suite::context::Context;

pub(super) const BENCHMARKS: &[Benchmark] = &[
    Benchmark {
        name: "guest-4k",
        what: "99th percentile of 4 KiB random writes at 1,000 IOPS to a protected, replicating ublk disk",
        peer: "rublk loop, unprotected",
        unit: "us",
        better: Better::Lower,
        gate: None,
        place: BenchPlace::Rig { disks_mib: &[GUEST_DISK_MIB, DATASTORE_MIB] },
        programs: &["vra", "zvm", "rublk"],
        pair: guest_4k,
    },
    Benchmark {
        name: "nbd-4k",
        what: "99th percentile of 4 KiB random writes at 5,000 IOPS to a protected, replicating NBD disk",
        peer: "qemu-nbd, unprotected",
        unit: "us",
        better: Better::Lower,
        gate: None,
        place: BenchPlace::Host,
        programs: &["vra", "zvm", "qemu-nbd", "fio"],
        pair: nbd_4k,
    },
];

/// Size of the guest's disk in the rig.
const GUEST_DISK_MIB: u64 = 128;

/// Size of the datastore's disk in the rig: journal, recovery disk and the filesystem's own.
const DATASTORE_MIB: u64 = 1024;

/// Size of the guest's disk over NBD.
const NBD_DISK_MIB: usize = 512;

/// How long anything of the set-up may take.
const PATIENCE_S: u64 = 120;

fn guest_4k(context: &mut Context, number: u32) -> Result<Pair> {
    let (disk, store) = (PathBuf::from(context.disk(0)), context.path("store"));
    let load = Load { rate_iops: 1000, options: &["--ioengine=libaio", "--direct=1"] };
    in_turn(
        number,
        || {
            context.run(&["mkfs.ext4", "-q", "-F", context.disk(1)])?;
            std::fs::create_dir_all(&store)?;
            context.run(&["mount", "-t", "ext4", context.disk(1), &store.to_string_lossy()])?;
            let settings = SiteSettings { datastore: Some(store.join("vms")), ..SiteSettings::SMALL };
            let folder = context.path(&format!("site-{number}"));
            let p99_us = protected(context, &folder, &settings, (&disk, Door::Ublk), &load);
            context.run(&["umount", &store.to_string_lossy()])?;
            p99_us
        },
        || {
            let device = RublkDevice::add(context, &["loop", "--file", &disk.to_string_lossy()])?;
            let p99_us = load.p99_us(context, &format!("--filename={}", device.path()));
            device.delete()?;
            p99_us
        },
    )
}

fn nbd_4k(context: &mut Context, number: u32) -> Result<Pair> {
    let disk = context.path("disk.raw");
    // Written in full, so that neither side pays for a first write to a part of the file.
    std::fs::write(&disk, vec![0; NBD_DISK_MIB << 20])?;
    std::fs::File::open(&disk)?.sync_all()?;
    let load = Load { rate_iops: 5000, options: &["--ioengine=nbd"] };
    in_turn(
        number,
        || {
            let folder = context.path(&format!("site-{number}"));
            protected(context, &folder, &SiteSettings::SMALL, (&disk, Door::Nbd), &load)
        },
        || {
            let socket = context.path("qemu-nbd.sock");
            let words = ["qemu-nbd", "--persistent", "--format=raw", "--cache=none", "--aio=native"];
            let place = [&format!("--socket={}", socket.display()), &*disk.to_string_lossy()];
            let mut server = context.spawn(&[&words[..], &place].concat())?;
            context.wait_for("qemu-nbd", PATIENCE_S, || Ok(socket.exists().then_some(())))?;
            let p99_us = load.p99_us(context, &uri(&socket, ""));
            server.kill()?;
            std::fs::remove_file(&socket)?;
            p99_us
        },
    )
}

/// The load's 99th percentile on a disk that a new site protects. All of the load has reached the target when it is given.
fn protected(
    context: &Context,
    folder: &Path,
    settings: &SiteSettings,
    (disk, door): (&Path, Door),
    load: &Load,
) -> Result<f64> {
    let mut site = Site::start(Binaries::beside_this_one()?, folder, settings)?;
    let uuid = vra::api::VmId::random().to_string();
    let vms = [Vm { name: "guest", uuid, disks: vec![disk.to_owned()] }];
    site.write_inventory(&vms)?;
    let at = site.attach(&vms[0], 0, door)?;
    context.wait_for("the group", PATIENCE_S, || Ok(site.protect("bench", &vms).ok()))?;
    site.wait_for_checkpoint("bench", 0, PATIENCE_S)?;
    let p99_us = match &at {
        DiskAt::Ublk { path, .. } => load.p99_us(context, &format!("--filename={}", path.display())),
        DiskAt::Nbd { socket, export } => load.p99_us(context, &uri(socket, export)),
    }?;
    site.wait_for_checkpoint("bench", TimeUs::now().0, PATIENCE_S)?;
    site.zvm(&["vpg", "delete", "bench"])?;
    if let DiskAt::Ublk { .. } = at {
        site.vra(Side::Source, &["detach", &format!("{}:0", vms[0].name)])?;
    }
    site.stop()?;
    std::fs::remove_dir_all(folder)?;
    Ok(p99_us)
}

/// Writes at a fixed rate.
struct Load {
    rate_iops: u32,
    options: &'static [&'static str],
}

impl Load {
    /// `place` is fio's option that says where. An engine's own options must follow the engine's name.
    fn p99_us(&self, context: &Context, place: &str) -> Result<f64> {
        let rate = format!("--rate_iops={}", self.rate_iops);
        let shape = ["--rw=randwrite", "--bs=4k", "--iodepth=32", "--norandommap", "--size=100%"];
        let time = ["--time_based", "--ramp_time=2", "--runtime=8"];
        let report = context.fio(&[self.options, &[place, &rate], &shape, &time].concat())?;
        ensure!(
            report.write_iops > 0.95 * f64::from(self.rate_iops),
            "only {:.0} of {} IOPS were reached: this machine is too slow for the figure to mean anything",
            report.write_iops,
            self.rate_iops
        );
        if report.write_p99_us == 0.0 {
            bail!("fio reports no latency");
        }
        Ok(report.write_p99_us)
    }
}

fn uri(socket: &Path, export: &str) -> String {
    format!("--uri=nbd+unix:///{export}?socket={}", socket.display())
}
