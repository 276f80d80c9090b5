//! A load on a target whose datastore lies on a disk that keeps a log of its writes: the part inside of the machine.

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use journal::planted::{Bug, plant_everywhere};
use vra::config::Config;

use super::acks::AckWriter;
use super::load::Load;
use super::rounds::{Pace, ship_in_rounds};
use super::short_slots;
use super::source::Source;
use super::target::{Target, TargetProgram};

/// What [`run_on_disk`] does.
#[derive(Clone, Debug)]
pub struct RunOnDisk {
    /// The disk.
    pub device: PathBuf,
    /// The place on it for acknowledged numbers, outside of the filesystem, in bytes.
    pub acks_offset_bytes: u64,
    /// A folder on the disk's filesystem.
    pub datastore: PathBuf,
    /// A folder elsewhere, for everything that isn't the datastore.
    pub scratch: PathBuf,
    /// The target's process.
    pub program: TargetProgram,
    /// The load's seed.
    pub seed: u64,
    /// How many records to ship at least.
    pub records: u64,
}

/// Each acknowledgement then covers few records.
const PACE: Pace = Pace { ahead: 16, patience: Duration::from_secs(60) };

/// Ships a load to a target, beneath which it is promoted, grows and gets shorter, and notes each acknowledged number on the disk.
///
/// # Errors
/// The load didn't come through.
pub fn run_on_disk(run: &RunOnDisk) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let writer = AckWriter::open(&run.device, run.acks_offset_bytes)?;
    // From here on there is something to check: nothing is acknowledged yet.
    writer.write(0)?;
    let (acks, noted) = mpsc::channel();
    let noting = std::thread::spawn(move || note_acks(&writer, &noted));
    let shipped = runtime.block_on(ship(run, acks));
    drop(runtime);
    let noted = noting.join().map_err(|_| anyhow!("the thread that notes acknowledgements panicked"))?;
    shipped.and(noted)
}

async fn ship(run: &RunOnDisk, acks: mpsc::Sender<u64>) -> Result<()> {
    let load = Load::new(run.seed);
    let (mut target, link) = Target::create(load, &run.scratch, &run.datastore, &run.program)?;
    short_slots::make(target.definition()).await?;
    target.start()?;
    target.wait_until_up()?;
    target.define().await?;
    let source = Source::start(load, target.definition(), link, move |seq| {
        // Fails only when the disk failed, which the other thread reports.
        let _ = acks.send(seq);
    });
    source.target_is_up().await;
    let shipped = ship_in_rounds(&mut target, &source, PACE, run.records).await;
    target.kill()?;
    shipped.map(drop).with_context(|| target.log())
}

/// Notes the newest number while there are any.
fn note_acks(writer: &AckWriter, acks: &mpsc::Receiver<u64>) -> Result<()> {
    while let Ok(seq) = acks.recv() {
        writer.write(acks.try_iter().last().unwrap_or(seq))?;
    }
    Ok(())
}

/// Runs the daemon of `vra serve` as a build would that skips the fdatasync before an acknowledgement.
///
/// # Errors
/// The daemon can't start.
pub fn serve_without_sync(config: &Path) -> Result<()> {
    plant_everywhere(Bug::SkippedSyncBeforeAck);
    Ok(vra::daemon::run(&Config::load(Some(config))?)?)
}
