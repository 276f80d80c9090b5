//! The source VRA ends under load and comes back.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use vra::api::status::SourceMode;

use super::load::Load;
use super::stand::{PATIENCE_S, RawDisk, SITE, Stand, VPG, now_us, with_stand};
use crate::site::{Door, Side, time_of};
use crate::suite::context::Context;

/// How the daemon ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// `kill -9`.
    Kill,
    /// SIGTERM.
    Terminate,
}

pub(super) fn restarted(context: &mut Context, end: End, times: u32) -> Result<()> {
    with_stand(context, &SITE, RawDisk::File, &[], |stand| {
        stand.fill()?;
        stand.recovers("before")?;
        let copy = stand.copy_of_disk()?;
        let load_of_guest = Load { rounds: 1 + times, pause_ms: 200 };
        let mut load = stand.start_load(load_of_guest)?;
        for _ in 0..times {
            load.keep_running(|| stand.start_load(load_of_guest))?;
            stand.wait_for_writes(60)?;
            restart(context, stand, end)?;
        }
        load.finish(PATIENCE_S)?;
        stand.recovers("after")?;
        stand.view_equals("before", Door::Ublk, &copy)
    })
}

/// Ends and starts the source, and looks at its full sync.
fn restart(context: &Context, stand: &mut Stand, end: End) -> Result<()> {
    let before = stand.source()?;
    match end {
        End::Kill => stand.site.kill(Side::Source)?,
        End::Terminate => stand.site.stop_vra(Side::Source)?,
    }
    let ended_us = now_us();
    let ended = Instant::now();
    stand.site.start_vra(Side::Source)?;
    context.note(format_args!("the source answers again after {:.1} s", ended.elapsed().as_secs_f64()));
    let (mut syncing, mut alerted) = (None, false);
    context.wait_for("the end of the full sync", PATIENCE_S, || {
        let newest = stand.site.newest_checkpoint(VPG);
        let status = stand.site.vra_status(Side::Source)?;
        let vm = stand.source()?;
        ensure!(vm.generation != before.generation, "the generation of a dead daemon goes on");
        if vm.mode == SourceMode::Syncing {
            syncing.get_or_insert_with(Instant::now);
        }
        alerted |= status.alerts.iter().any(|alert| alert.code == "full-sync");
        if vm.mode != SourceMode::Streaming
            && let Some(newest) = newest
        {
            ensure!(time_of(&newest)? < ended_us, "a checkpoint counts before the end of the sync: {newest}");
        }
        Ok((vm.mode == SourceMode::Streaming).then_some(()))
    })?;
    let lasted = syncing.map(|began: Instant| began.elapsed()).unwrap_or_default();
    context.note(format_args!("a full sync of about {:.1} s, alerted: {alerted}", lasted.as_secs_f64()));
    // Alerts are looked for every second.
    ensure!(alerted || lasted < Duration::from_secs(3), "the status had no alert of the full sync");
    stand.site.wait_for_checkpoint(VPG, ended_us, PATIENCE_S).map(drop)
}
