//! Discards, and the life of a protected disk.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use anyhow::{Result, ensure};

use super::load::Load;
use super::stand::{DISK_BYTES, PATIENCE_S, RawDisk, SITE, VPG, with_stand};
use crate::cases::content::{aligned, direct, filled_with, same_content};
use crate::site::{DiskAt, Door, Side};
use crate::suite::context::Context;

const MIB: u64 = 1 << 20;

pub(super) fn discard_zeroes(context: &mut Context) -> Result<()> {
    with_stand(context, &SITE, RawDisk::File, &[], |stand| {
        let device = stand.device()?.to_owned();
        let place = |from: u64, len: u64| {
            ["-o".to_owned(), (from * MIB).to_string(), "-l".to_owned(), (len * MIB).to_string()]
        };
        stand.fill()?;
        for (from, len, zeroes) in [(4, 2, false), (8, 1, true), (12, 2, false), (12, 2, true)] {
            let words = place(from, len);
            let [o, from, l, len] = words.each_ref().map(String::as_str);
            let how: &[&str] = if zeroes { &["-z"] } else { &[] };
            context.run(&[&["blkdiscard"], how, &[o, from, l, len, &device]].concat())?;
        }
        // Written again after it was discarded: later than the zeroes.
        direct(&device)?.write_all_at(&aligned(0x3c).0, 5 * MIB)?;
        stand.recovers("quiet")?;
        let disks = stand.site.start_test(VPG, "quiet", Door::Ublk)?;
        let DiskAt::Ublk { path, .. } = &disks[0].at else { anyhow::bail!("not a ublk device") };
        let view = path.to_string_lossy();
        for (start, end, fill) in
            [(0, 4, 0xa5), (4, 5, 0), (6, 8, 0xa5), (8, 9, 0), (9, 12, 0xa5), (12, 14, 0), (14, 32, 0xa5)]
        {
            filled_with(&view, start * MIB..end * MIB, fill)?;
        }
        let mut block = aligned(0);
        direct(&view)?.read_exact_at(&mut block.0, 5 * MIB)?;
        ensure!(block.0.iter().all(|&byte| byte == 0x3c), "what was written after the discard is not there");
        stand.site.stop_test(VPG)
    })
}

pub(super) fn grow(context: &mut Context) -> Result<()> {
    const GROWN_BYTES: u64 = DISK_BYTES + 8 * MIB;
    with_stand(context, &SITE, RawDisk::File, &["code=\"volume-grown\""], |stand| {
        stand.fill()?;
        stand.wait_until_streaming()?;
        stand.checkpoint("before")?;
        let copy = stand.copy_of_disk()?;
        let generation = stand.source()?.generation;
        let load = stand.start_load(Load { rounds: 2, pause_ms: 100 })?;
        File::options().write(true).open(stand.raw_disk())?.set_len(GROWN_BYTES)?;
        let device = stand.device()?.to_owned();
        context.wait_for("the device to grow", PATIENCE_S, || {
            let end = File::open(&device)?.seek(SeekFrom::End(0))?;
            Ok((end == GROWN_BYTES).then_some(()))
        })?;
        direct(&device)?.write_all_at(&aligned(0x3c).0, GROWN_BYTES - 4096)?;
        load.finish(PATIENCE_S)?;
        ensure!(stand.source()?.generation == generation, "a growth needs no full sync");
        stand.wait_until_streaming()?;
        stand.checkpoint("after")?;
        let disks = stand.site.start_test(VPG, "after", Door::Ublk)?;
        let DiskAt::Ublk { path, .. } = &disks[0].at else { anyhow::bail!("not a ublk device") };
        same_content(&path.to_string_lossy(), &stand.raw_disk(), GROWN_BYTES)?;
        stand.site.stop_test(VPG)?;
        stand.view_equals("before", Door::Ublk, &copy)?;

        // A successor finds the device as large.
        stand.site.stop_vra(Side::Source)?;
        stand.site.start_vra(Side::Source)?;
        direct(&device)?.write_all_at(&aligned(0x3d).0, GROWN_BYTES - 8192)?;
        stand.wait_until_streaming().map(drop)
    })
}

pub(super) fn detach_attach_delete(context: &mut Context) -> Result<()> {
    let expected = ["code=\"volumes-missing\"", "code=\"volume-not-served\"", "a volume can't be served"];
    with_stand(context, &SITE, RawDisk::File, &expected, |stand| {
        stand.fill()?;
        let copy = stand.copy_of_disk()?;
        let refused = stand.site.vra(Side::Source, &["detach", "guest:0"]);
        ensure!(
            refused.is_err_and(|error| error.to_string().contains("protected by VPG")),
            "a protected disk was detached without --force"
        );
        stand.detach_by_force()?;
        same_content(&copy, &stand.raw_disk(), DISK_BYTES)?;
        stand.attach()?;
        stand.start_load(Load { rounds: 1, pause_ms: 0 })?.finish(PATIENCE_S)?;
        stand.recovers("attached-again")?;
        stand.unprotect()?;
        stand.fill()?;
        stand.protect()?;
        stand.recovers("protected-again")?;

        // A disk that was cut behind the VRA's back isn't served, and its device waits.
        stand.site.kill(Side::Source)?;
        let raw = File::options().write(true).open(stand.raw_disk())?;
        raw.set_len(DISK_BYTES - MIB)?;
        stand.site.start_vra(Side::Source)?;
        let status = stand.site.vra_status(Side::Source)?;
        ensure!(status.volumes.iter().any(|volume| volume.problem.is_some()), "a cut disk is served");
        stand.detach_by_force()?;
        raw.set_len(DISK_BYTES)?;
        stand.attach()?;
        stand.recovers("changed-back")
    })
}
