//! Power cuts at the target: what it acknowledged as durable is there afterwards.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use crate::durability::acks::{Acknowledged, REGION_BYTES};
use crate::durability::changes::{Change, Changes};
use crate::durability::check::{CheckError, Found, check, recover, verify_after_power_cut};
use crate::durability::load::Load;
use crate::machine::{Disk, DiskContent, Finished};
use crate::powercut::log::Log;
use crate::powercut::replay::{Fate, Replayer};
use crate::site::Binaries;
use crate::suite::context::Skip;
use crate::suite::{Body, Case, Outside};
use crate::tool;
use vra::api::VraId;
use vra::api::vpg::VraEndpoint;

pub(super) const CASES: &[Case] = &[
    Case::new(
        "powercut-journal-ext4",
        "What a target acknowledged outlives a power cut, while its journal is promoted, grows and gets shorter: 10 cuts, ext4.",
        Body::Outside(|outside| survives(outside, Filesystem::Ext4, SHORT)),
    ),
    Case::new(
        "powercut-journal-xfs",
        "What a target acknowledged outlives a power cut, while its journal is promoted, grows and gets shorter: 10 cuts, xfs.",
        Body::Outside(|outside| survives(outside, Filesystem::Xfs, SHORT)),
    ),
    Case::new(
        "powercut-without-sync-loses",
        "A target that acknowledges before its fdatasync is found out by power cuts.",
        Body::Outside(without_sync_loses),
    )
    .once(),
    Case::new(
        "powercut-journal-ext4-100",
        "The same with 100 cuts of a longer load, ext4.",
        Body::Outside(|outside| survives(outside, Filesystem::Ext4, LONG)),
    )
    .long(),
    Case::new(
        "powercut-journal-xfs-100",
        "The same with 100 cuts of a longer load, xfs.",
        Body::Outside(|outside| survives(outside, Filesystem::Xfs, LONG)),
    )
    .long(),
];

/// How much of it.
#[derive(Clone, Copy)]
struct Extent {
    /// What the load ships at least.
    records: u64,
    /// Power cuts before the first sync is acknowledged.
    sync_cuts: usize,
    /// Power cuts at any moment after that.
    journal_cuts: usize,
    /// Power cuts during promotions, as many during growth, and as many while the file gets shorter, where there are so many moments.
    change_cuts: usize,
}

const SHORT: Extent = Extent { records: 500, sync_cuts: 2, journal_cuts: 2, change_cuts: 2 };
const LONG: Extent = Extent { records: 4_000, sync_cuts: 20, journal_cuts: 44, change_cuts: 12 };

/// The load's, and where power goes.
const SEED: u64 = 1;

const DISK_MIB: u64 = 384;

/// The filesystem ends here; what is behind it is for acknowledged numbers.
const FILESYSTEM_MIB: u64 = DISK_MIB - 1;

const ACKS_OFFSET_BYTES: u64 = FILESYSTEM_MIB << 20;

const _: () = assert!(ACKS_OFFSET_BYTES + REGION_BYTES <= DISK_MIB << 20);

/// What the datastore lies on.
#[derive(Clone, Copy, Debug)]
enum Filesystem {
    Ext4,
    Xfs,
}

impl Filesystem {
    fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
        }
    }

    /// Skips the case where this host can't mount such a filesystem.
    fn require_here(self) -> Result<()> {
        if !nix::unistd::geteuid().is_root() {
            return Err(Skip("mounting the rebuilt disks needs root".into()).into());
        }
        let name = self.name();
        let known = std::fs::read_to_string("/proc/filesystems").context("read /proc/filesystems")?;
        if known.split_whitespace().any(|word| word == name)
            || tool::run(Command::new("modprobe").arg(name)).is_ok()
        {
            return Ok(());
        }
        Err(Skip(format!("this host's own kernel has no {name} to mount the rebuilt disks with")).into())
    }

    /// Makes one that leaves the disk's last MiB alone.
    fn make(self, device: &str) -> String {
        match self {
            Self::Ext4 => format!(
                "mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 {device} {}k",
                FILESYSTEM_MIB << 10
            ),
            Self::Xfs => format!("modprobe xfs; mkfs.xfs -q -d size={FILESYSTEM_MIB}m {device}"),
        }
    }
}

fn survives(outside: &Outside, filesystem: Filesystem, extent: Extent) -> Result<()> {
    let load = Cuts::run(outside, filesystem, extent, false)?;
    let cuts = load.all()?;
    for change in Change::ALL {
        let met = cuts.iter().filter(|cut| load.changes.is_under_way(change, cut.place)).count();
        ensure!(met > 0 || extent.change_cuts == 0, "no power cut met a {change:?}");
    }
    let (mut promoted, mut checkpoints) = (BTreeSet::new(), 0);
    for Cut { place, acknowledged, outcome } in cuts {
        let what = || format!("power cut after entry {place} of the log, {acknowledged} acknowledged");
        let found = outcome.with_context(what)?;
        promoted.extend((!found.is_base_sync).then_some(found.promoted_through));
        checkpoints += found.checkpoints;
    }
    // Otherwise all of it was looked at on recovery disks that nothing was promoted to, or no checkpoint was.
    ensure!(
        promoted.len() > 1 && checkpoints > 0,
        "promoted through {promoted:?}, {checkpoints} checkpoints"
    );
    Ok(())
}

fn without_sync_loses(outside: &Outside) -> Result<()> {
    // Whether a cut takes something depends on what the host's kernel had written back by then.
    let extent = Extent { sync_cuts: 0, journal_cuts: 60, change_cuts: 0, ..SHORT };
    let takes_something = |cut: &Cut| matches!(cut.outcome, Err(CheckError::Lost { .. }));
    let cuts = Cuts::run(outside, Filesystem::Ext4, extent, true)?.until(takes_something)?;
    ensure!(
        cuts.last().is_some_and(takes_something),
        "none of {} power cuts took an acknowledged record",
        cuts.len()
    );
    Ok(())
}

/// A load's log, and where it is cut.
struct Cuts {
    finished: Finished,
    log: Log,
    acknowledged: Acknowledged,
    changes: Changes,
    /// The last record that was sent.
    published: u64,
    extent: Extent,
    filesystem: Filesystem,
}

/// A power cut and what came of it.
struct Cut {
    /// How many entries of the log came before it.
    place: usize,
    /// What had been acknowledged.
    acknowledged: u64,
    outcome: Result<Found, CheckError>,
}

impl Cuts {
    /// Runs the load in a machine.
    fn run(outside: &Outside, filesystem: Filesystem, extent: Extent, without_sync: bool) -> Result<Self> {
        filesystem.require_here()?;
        let mut machine = outside.machine();
        machine.disks = vec![Disk { content: DiskContent::Empty { size_mib: DISK_MIB }, log_writes: true }];
        // A busy host may take ten times as long as an idle one.
        machine.limit = Duration::from_secs(240 + extent.records / 2);
        let without_sync = if without_sync { "--without-sync" } else { "" };
        let mut job = outside.script(&format!(
            "{}; mount /dev/vda /mnt; mkdir /mnt/datastore /tmp/scratch; sync -f /mnt; \
             durability run-on-disk --device /dev/vda --acks-offset {ACKS_OFFSET_BYTES} --datastore /mnt/datastore \
             --scratch /tmp/scratch --seed {SEED} --records {} {without_sync}",
            filesystem.make("/dev/vda"),
            extent.records
        ));
        job.programs.push(Binaries::beside_this_one()?.path("durability"));
        let finished = machine.run(&job, &mut |_| {})?;
        ensure!(finished.exit == 0, "the load failed:\n{}", finished.output()?);
        let log = Log::open(&finished.disk_log(0))?;
        let acknowledged = Acknowledged::read(&log, ACKS_OFFSET_BYTES)?;
        let published = acknowledged.at(log.entries().len());
        ensure!(published >= extent.records, "the last acknowledged record is {published}");
        ensure!(acknowledged.count() > 10, "only {} acknowledgements", acknowledged.count());
        let changes = Changes::read(&log, *acknowledged.span(Load::sync_end()).start())?;
        Ok(Self { finished, log, acknowledged, changes, published, extent, filesystem })
    }

    /// Where power is cut: at random moments during the full sync and after it, and while the journal is changed.
    fn places(&self) -> Result<BTreeSet<usize>> {
        let Extent { sync_cuts, journal_cuts, change_cuts, .. } = self.extent;
        let (all, after_sync) = (self.acknowledged.span(0), self.acknowledged.span(Load::sync_end()));
        let mut places = BTreeSet::new();
        places.extend(self.log.cut_points_in(*all.start()..=*after_sync.start() - 1, sync_cuts, SEED));
        for change in Change::ALL {
            let spans: Vec<_> = self.changes.of(change).collect();
            ensure!(!spans.is_empty(), "the load brought no {change:?} about");
            let moments: BTreeSet<usize> = spans.into_iter().flatten().collect();
            let moments: Vec<usize> = moments.into_iter().filter(|moment| !places.contains(moment)).collect();
            let chosen = self.log.cut_points_in(1..=moments.len(), change_cuts, SEED);
            places.extend(chosen.into_iter().map(|number| moments[number - 1]));
        }
        // A change may have fewer moments than cuts are wanted in it.
        let wanted = sync_cuts + journal_cuts + Change::ALL.len() * change_cuts;
        for seed in SEED.. {
            let missing = wanted.saturating_sub(places.len());
            if missing == 0 {
                break;
            }
            places.extend(self.log.cut_points_in(after_sync.clone(), missing, seed));
        }
        Ok(places)
    }

    /// Cuts power at moments of the load, and checks what is left.
    fn all(&self) -> Result<Vec<Cut>> {
        self.until(|_| false)
    }

    /// The same, but no more cuts after one that is enough.
    fn until(&self, is_enough: impl Fn(&Cut) -> bool) -> Result<Vec<Cut>> {
        let folder = self.finished.folder.path();
        let (base, work) = (folder.join("base.raw"), folder.join("work.raw"));
        let (image, mount) = (folder.join("cut.raw"), folder.join("mount"));
        std::fs::File::create(&base)?.set_len(DISK_MIB << 20)?;
        std::fs::create_dir_all(&mount)?;
        let vra_journal = Binaries::beside_this_one()?.path("vra-journal");
        let mut replayer = Replayer::new(&self.log, &base, &work)?;
        let mut cuts = Vec::new();
        for (number, place) in self.places()?.into_iter().enumerate() {
            let fate = if number % 4 == 0 { Fate::AllLost } else { Fate::Random { seed: SEED } };
            replayer.cut(place, fate, &image)?;
            let acknowledged = self.acknowledged.at(place);
            let mounted = Mounted::new(&image, &mount, self.filesystem)?;
            let datastore = mount.join("datastore");
            let outcome = check_datastore(&datastore, (acknowledged, self.published))?;
            if outcome.is_ok() {
                let what = || format!("power cut after entry {place}");
                verify_after_power_cut(&vra_journal, &datastore).with_context(what)?;
            }
            mounted.unmount()?;
            cuts.push(Cut { place, acknowledged, outcome });
            if cuts.last().is_some_and(&is_enough) {
                break;
            }
        }
        for file in [&base, &work, &image] {
            std::fs::remove_file(file).with_context(|| format!("delete {}", file.display()))?;
        }
        Ok(cuts)
    }
}

/// Starts a target on a datastore as after a power cut, then looks what is there.
fn check_datastore(
    datastore: &Path,
    (acknowledged, published): (u64, u64),
) -> Result<Result<Found, CheckError>> {
    let load = Load::new(SEED);
    let nowhere = || VraEndpoint { id: VraId::random(), address: "127.0.0.1:1".to_owned() };
    let definition = load.definition(nowhere(), nowhere(), datastore);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(recover(&definition)).and_then(|durable_through| {
        let found = check(&definition, load, (acknowledged, published), 0)?;
        if found.through == durable_through {
            return Ok(found);
        }
        Err(CheckError::Lost { acknowledged: durable_through, found_through: found.through })
    }))
}

/// A rebuilt disk, mounted natively.
struct Mounted {
    at: Option<PathBuf>,
}

impl Mounted {
    /// Mounts it, as a host does that starts after a power cut: the filesystem replays its own journal.
    fn new(image: &Path, at: &Path, filesystem: Filesystem) -> Result<Self> {
        tool::run(Command::new("mount").args(["-t", filesystem.name(), "-o", "loop"]).args([image, at]))?;
        Ok(Self { at: Some(at.to_owned()) })
    }

    fn unmount(mut self) -> Result<()> {
        let Some(at) = self.at.take() else { bail!("unmounted twice") };
        tool::run(Command::new("umount").arg(at))?;
        Ok(())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Some(at) = self.at.take() {
            // The error that brought us here says more.
            let _ = tool::run(Command::new("umount").arg(at));
        }
    }
}
