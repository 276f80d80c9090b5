//! A load in rounds: the journal's file grows while its history is kept, and is promoted and gets shorter while it isn't.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use journal::format::{PAGE_BYTES, SUPERBLOCK_OFFSETS, Superblock};
use journal::recovery::choose_superblock;
use journal::storage::ring::{Access, DirectFile, RingStorage};
use journal::storage::{Blocking, FileId, Purpose};

use super::load::Load;
use super::source::Source;
use super::target::Target;

/// Slots that a round lets the file grow by.
const GROWN_SLOTS: u32 = 3;

/// Records that are shipped between two looks at the journal.
const STEP_RECORDS: u64 = 8;

/// While the file is to get shorter the load only trickles: what is promoted must first grow old, which takes two seconds, and in that time
/// no more may come than a slot holds, or the slots in use never get fewer.
const TRICKLE: Duration = Duration::from_millis(400);

/// Half of a round takes no longer.
const HALF_LIMIT: Duration = Duration::from_secs(180);

/// A history that nothing grows out of, in seconds.
const LONG_HISTORY_S: u64 = 3600;

/// How a load goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    /// Records on their way at most.
    pub(super) ahead: u64,
    /// Without any acknowledgement for so long the load has failed.
    pub(super) patience: Duration,
}

/// Ships the full sync, then rounds until at least `records` are acknowledged; the last round is a whole one. Gives the number of the last
/// record.
///
/// # Errors
/// The load doesn't come through, or a round's file doesn't follow it.
pub(super) async fn ship_in_rounds(
    target: &mut Target,
    source: &Source,
    pace: Pace,
    records: u64,
) -> Result<u64> {
    source.run_through(Load::sync_end(), pace.ahead, pace.patience).await?;
    let mut journal = Watched::open(&Load::folder(target.definition()).journal())?;
    while source.durable_through() < records {
        let before = journal.superblock()?;
        target.redefine(|vm| vm.history_s = LONG_HISTORY_S).await?;
        let grown = before.slot_count + GROWN_SLOTS;
        let has_grown = |now: &Superblock| now.slot_count >= grown;
        ship_until(source, pace, &mut journal, has_grown, Duration::ZERO).await.context("growth")?;
        target.redefine(|vm| vm.history_s = 0).await?;
        let has_shrunk =
            |now: &Superblock| now.slot_count < grown && now.low_water.seq > before.low_water.seq;
        ship_until(source, pace, &mut journal, has_shrunk, TRICKLE)
            .await
            .context("promotion and shrinking")?;
    }
    Ok(source.durable_through())
}

/// Ships until the journal is as it is to be, with a pause after each step.
async fn ship_until(
    source: &Source,
    pace: Pace,
    journal: &mut Watched,
    is_done: impl Fn(&Superblock) -> bool,
    pause: Duration,
) -> Result<()> {
    let started = Instant::now();
    loop {
        let now = journal.superblock()?;
        if is_done(&now) {
            return Ok(());
        }
        ensure!(
            started.elapsed() < HALF_LIMIT,
            "after {HALF_LIMIT:?} the journal has {} slots, and its low-water mark is at {} of {}",
            now.slot_count,
            now.low_water.seq,
            source.durable_through()
        );
        source.run_through(source.durable_through() + STEP_RECORDS, pace.ahead, pace.patience).await?;
        tokio::time::sleep(pause).await;
    }
}

/// A journal beside its writer.
struct Watched {
    storage: RingStorage,
    file: FileId,
}

impl Watched {
    fn open(path: &Path) -> Result<Self> {
        let mut storage = RingStorage::new(2).context("a ring for looking at the journal")?;
        let file = storage.add_file(DirectFile::open(path, Access::ReadOnly)?);
        Ok(Self { storage, file })
    }

    fn superblock(&mut self) -> Result<Superblock> {
        let mut io = Blocking::new(&mut self.storage, self.file, Purpose::View);
        let [first, second] = SUPERBLOCK_OFFSETS.map(|place| io.read(place, PAGE_BYTES));
        Ok(choose_superblock(Superblock::decode(&first?), Superblock::decode(&second?))?)
    }
}
