//! A test's disk while the target VRA that serves it ends and comes back.

use std::os::unix::fs::FileExt;
use std::time::Duration;

use anyhow::{Result, bail, ensure};

use super::load::Load;
use super::stand::{DISK_BYTES, PATIENCE_S, RawDisk, SITE, Stand, VPG, with_stand};
use crate::cases::content::{aligned, direct, same_content};
use crate::site::{DiskAt, Door, Side};
use crate::suite::context::Context;
use crate::suite::ublk::list;

/// Where a block is written that is never flushed, beyond what a [`Load`] uses.
const UNFLUSHED_OFFSET_BYTES: u64 = 40 << 20;

pub(super) fn survives(context: &mut Context, kills: u32) -> Result<()> {
    with_stand(context, &SITE, RawDisk::File, &[], |stand| {
        stand.fill()?;
        stand.wait_until_streaming()?;
        stand.checkpoint("tested")?;
        let disks = stand.site.start_test(VPG, "tested", Door::Ublk)?;
        let [disk] = disks.as_slice() else { bail!("the test shows {} disks instead of one", disks.len()) };
        let DiskAt::Ublk { path, .. } = &disk.at else { bail!("not a ublk device") };
        let device = path.to_string_lossy().into_owned();
        same_content(&device, &stand.raw_disk(), DISK_BYTES)?;
        let load_of_guest = Load { rounds: 1 + kills, pause_ms: 200 };
        let mut load = load_of_guest.start(context, &device)?;
        for kill in 0..kills {
            load.keep_running(|| load_of_guest.start(context, &device))?;
            std::thread::sleep(Duration::from_secs(1));
            answered_is_there(stand, &device, kill)?;
        }
        load.finish(PATIENCE_S)?;
        shown_as_running(context, stand, &device)?;
        stand.site.stop_test(VPG)?;
        stand.recovers("after")
    })
}

/// Writes without a flush, kills the target and starts it again: the device has what was answered.
fn answered_is_there(stand: &mut Stand, device: &str, kill: u32) -> Result<()> {
    let fill = 0x30 + kill as u8;
    let disk = direct(device)?;
    disk.write_all_at(&aligned(fill).0, UNFLUSHED_OFFSET_BYTES)?;
    stand.site.kill(Side::Target)?;
    std::thread::sleep(Duration::from_millis(500));
    stand.site.start_vra(Side::Target)?;
    let mut found = aligned(0);
    disk.read_exact_at(&mut found.0, UNFLUSHED_OFFSET_BYTES)?;
    ensure!(found.0.iter().all(|byte| *byte == fill), "what was answered before kill {kill} is lost");
    // One of the source's, one of the test's.
    let devices = list()?;
    ensure!(devices.len() == 2, "instead of two devices there are {devices:?}");
    Ok(())
}

fn shown_as_running(context: &Context, stand: &Stand, device: &str) -> Result<()> {
    // The manager notices only after a while that the VRA it speaks to is another process.
    let shown = || match stand.site.zvm_json(&["test", "show", VPG]) {
        Ok(shown) => Ok(Some(shown.to_string())),
        Err(_) => Ok(None),
    };
    let shown = context.wait_for("the manager's answer", PATIENCE_S, shown)?;
    ensure!(shown.contains(device) && shown.contains("running"), "the test is shown as {shown}");
    Ok(())
}
