//! What happens at the target and on the way there.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::load::Load;
use super::stand::{PATIENCE_S, RawDisk, SITE, Stand, sleep_until, with_stand};
use crate::site::{Door, Side, SiteSettings};
use crate::suite::context::Context;

pub(super) fn fio_verify(context: &mut Context) -> Result<()> {
    with_stand(context, &SITE, RawDisk::BlockDevice, &[], |stand| {
        stand.start_load(Load { rounds: 2, pause_ms: 0 })?.finish(PATIENCE_S)?;
        stand.recovers("quiet")?;
        stand.view_equals("quiet", Door::Nbd, &stand.raw_disk())
    })
}

pub(super) fn killed(context: &mut Context, kills: u32) -> Result<()> {
    with_stand(context, &SITE, RawDisk::File, &[], |stand| {
        // Memory must hold what is written until the source notices by silence that its peer is gone.
        let pause_ms = if kills > 1 { 1500 } else { 300 };
        same_stream_after(stand, Load { rounds: 2, pause_ms }, kills, |stand| {
            stand.site.kill(Side::Target)?;
            std::thread::sleep(Duration::from_millis(500));
            stand.site.start_vra(Side::Target)
        })
    })
}

pub(super) fn link_cut(context: &mut Context) -> Result<()> {
    const CUT: Duration = Duration::from_secs(10);
    let site = SiteSettings { relayed: true, ..SITE };
    with_stand(context, &site, RawDisk::File, &[], |stand| {
        same_stream_after(stand, Load { rounds: 2, pause_ms: 1500 }, 1, |stand| {
            let started = Instant::now();
            stand.site.cut(true)?;
            sleep_until(started, CUT);
            let vm = stand.source()?;
            ensure!(vm.durable_through < vm.last_sequence, "nothing waits behind the cut: {vm:?}");
            stand.site.cut(false)
        })
    })
}

/// Runs a load that memory can hold, lets something happen in the middle of it, as often as asked for, and sees to it that the stream then goes
/// on as it was and that all arrives.
fn same_stream_after(
    stand: &mut Stand,
    load: Load,
    times: u32,
    mut event: impl FnMut(&mut Stand) -> Result<()>,
) -> Result<()> {
    let before = stand.wait_until_streaming()?;
    let mut running = stand.start_load(load)?;
    for _ in 0..times {
        running.keep_running(|| stand.start_load(load))?;
        stand.wait_for_writes(60)?;
        event(stand)?;
        if times == 1 {
            running.ensure_running()?;
        } else {
            stand.wait_until_caught_up()?;
        }
    }
    running.finish(PATIENCE_S)?;
    let after = stand.wait_until_streaming()?;
    ensure!(
        after.generation == before.generation && after.last_sequence > before.last_sequence,
        "the stream did not go on as it was: before {before:?}, after {after:?}"
    );
    stand.recovers("quiet")
}
