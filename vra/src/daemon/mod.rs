//! `vra serve`: everything wired together.
//!
//! Order of start: the process is prepared before any thread exists; one daemon for each state folder; reactors; attached volumes (ublk
//! devices that a former daemon left are recovered first, their guests wait); VPGs; views; the control socket; the link. Guests' disks are
//! served whatever else fails: what isn't there is an alert.

mod alerts;
mod checkpoints;
mod definition;
mod device_links;
mod doors;
mod error;
mod force_sync;
mod former_vms;
mod group_checkpoints;
mod growth;
mod guests;
mod handler;
mod identity;
mod linking;
mod readiness;
mod restore;
mod shares;
mod source_groups;
mod source_status;
mod sources;
mod spanning;
mod spanning_lines;
mod spanning_status;
mod state;
mod status;
mod targets;
mod view_restore;
mod views;
mod volumes;
mod vpgs;

pub use alerts::{AlertBook, Finding};
pub use definition::check as check_definition;
pub use error::DaemonError;
pub use group_checkpoints::{GroupCheckpoints, MemberJournal};
pub use identity::LocalIdentity;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;
use ublk::arena::Arena;
use ublk::process::ProcessSettings;
use ublk::reactor::{ReactorSettings, Reactors};

use self::device_links::DeviceLinks;
use self::doors::Doors;
use self::guests::Guests;
use self::linking::SharedLink;
use self::sources::LiveSource;
use self::spanning::Spanning;
use self::state::{State, StateFile};
use self::view_restore::Orphans;
use self::views::LiveView;
use self::volumes::LiveVolume;
use crate::api::{ApiError, TimeUs, ViewId, VmId, VolumeId, VpgId, VraId};
use crate::checkpoint::Checkpointer;
use crate::config::{Config, read_site_keys};
use crate::control::UnixServer;
use crate::pki::Trust;
use crate::receive::{ScrubSettings, TargetHost, TargetSettings};

/// Time between two looks for what is wrong.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Length of a slot of guest data, in bytes: the longest request of a ublk device.
const SLOT_BYTES: usize = 64 << 10;

/// Runs the daemon until SIGTERM or SIGINT. To be called by a process that has no threads yet.
///
/// # Errors
/// [`DaemonError`], when it can't start.
pub fn run(config: &Config) -> Result<(), DaemonError> {
    // Without ublk no file system of this host can wait for this process.
    let prepare = config.memory.lock && ublk::host::require_ublk().is_ok();
    ublk::process::prepare(ProcessSettings {
        io_flusher: prepare,
        lock_memory: prepare,
        private_mounts: prepare,
    })?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|source| DaemonError::System { action: "start the runtime", source })?;
    runtime.block_on(serve(config))?;
    runtime.shutdown_timeout(Duration::from_secs(5));
    Ok(())
}

async fn serve(config: &Config) -> Result<(), DaemonError> {
    let signals =
        |kind| signal(kind).map_err(|source| DaemonError::System { action: "catch signals", source });
    let mut terminate = signals(SignalKind::terminate())?;
    let mut interrupt = signals(SignalKind::interrupt())?;
    let _only_one = lock_state(config)?;
    let daemon = Arc::new(tokio::task::block_in_place(|| Daemon::new(config))?);
    tokio::task::block_in_place(|| {
        daemon.restore_volumes();
        daemon.thaw_left_guests();
    });
    daemon.restore_definitions().await;
    let path = config.socket_path();
    let server = UnixServer::bind(&path).await.map_err(|source| DaemonError::Socket { path, source })?;
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(linking::keep_linked(Arc::clone(&daemon)));
    tasks.spawn(look_for_wrong(Arc::clone(&daemon)));
    tasks.spawn(Arc::clone(&daemon).tick_sources());
    tasks.spawn(Arc::clone(&daemon).keep_serving());
    tasks.spawn(Arc::clone(&daemon).look_for_growth());
    tasks.spawn(Arc::clone(&daemon).drive_shares());
    tasks.spawn(Arc::clone(&daemon).follow_owners());
    tasks.spawn(Arc::clone(&daemon).drive_spanning());
    tasks.spawn(Arc::clone(&daemon).keep_thawed());
    let handler = Arc::clone(&daemon);
    tasks.spawn(async move { server.serve(handler).await });
    tracing::info!(vra = %daemon.vra, name = config.name, version = env!("CARGO_PKG_VERSION"), "started");
    readiness::tell();
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("stopping: ublk devices stay for the next start, their guests wait");
    tasks.shutdown().await;
    daemon.stop().await;
    Ok(())
}

/// The daemon's parts.
pub(crate) struct Daemon {
    config: Config,
    vra: VraId,
    started_us: TimeUs,
    state: StateFile,
    trust: Trust,
    link: SharedLink,
    doors: Doors,
    links: DeviceLinks,
    volumes: Mutex<BTreeMap<VolumeId, LiveVolume>>,
    /// Protected volumes whose local disks have grown, with what those have, in bytes.
    grown: Mutex<BTreeMap<VolumeId, u64>>,
    /// Another VRA took a shared disk over, or let go of it.
    owners_changed: Notify,
    /// The ublk devices of former daemons were looked through.
    swept: AtomicBool,
    views: Mutex<BTreeMap<ViewId, LiveView>>,
    orphans: Mutex<Orphans>,
    sources: Mutex<BTreeMap<VmId, Arc<LiveSource>>>,
    targets: Arc<TargetHost>,
    /// Target VMs whose journals can't be opened, and why.
    target_problems: Mutex<BTreeMap<VmId, ApiError>>,
    /// What keeps files of VMs that left their groups.
    former_problems: Mutex<BTreeMap<VmId, ApiError>>,
    /// Those of them that a site key is missing for.
    awaiting_keys: Mutex<BTreeSet<VmId>>,
    checkpointer: Checkpointer,
    /// Checkpoints of VPGs whose VMs are on several hosts.
    spanning: Spanning,
    guests: Guests,
    /// What the checkpointer was told of each group: revision, and which cores.
    groups: Mutex<BTreeMap<VpgId, (u64, Vec<usize>)>>,
    alerts: Mutex<AlertBook>,
}

impl Daemon {
    fn new(config: &Config) -> Result<Self, DaemonError> {
        let vra = LocalIdentity::open(config)?.vra();
        let state = StateFile::open(&config.state_dir)?;
        let trust = Trust::default();
        trust.set(state.seen().trust.clone());
        let defaults = ReactorSettings::for_this_host();
        let reactors = Reactors::start(ReactorSettings {
            thread_count: config.reactors.threads.unwrap_or(defaults.thread_count),
            ring_entries: config.reactors.ring_entries,
        })?;
        let mib = config.memory.arena_mib;
        let slots = mib * u32::try_from((1 << 20) / SLOT_BYTES).expect("a slot is smaller than a MiB");
        let arena = Arena::new(SLOT_BYTES, slots).map_err(|source| DaemonError::Arena { mib, source })?;
        identity::make_run_folder(&config.run_dir)?;
        let targets = TargetHost::start(TargetSettings {
            worker_count: config.target.journal_threads,
            memory_bytes: (config.target.memory_mib as usize) << 20,
            scrub: ScrubSettings {
                bytes_per_s: u64::from(config.scrub.mib_per_s) << 20,
                cold_after: Duration::from_secs(config.scrub.cold_after_s.into()),
                pass_every: Duration::from_secs(config.scrub.pass_every_s.into()),
            },
            overlay_bytes: u64::from(config.target.scratch_mib) << 20,
            views_memory_bytes: u64::from(config.target.views_memory_mib) << 20,
            ..TargetSettings::STANDARD
        })?;
        if let Some(path) = &config.target.site_key_file {
            targets.keys().set_own(read_site_keys(path)?);
        }
        let checkpointer = Checkpointer::start(sources::incarnation())
            .map_err(|source| DaemonError::System { action: "start the checkpointer", source })?;
        let spanning = Spanning::new(vra, sources::incarnation(), checkpointer.clock());
        let doors = Doors::open(config, Arc::new(reactors), arena)?;
        Ok(Self {
            config: config.clone(),
            vra,
            started_us: TimeUs::now(),
            state,
            trust,
            link: SharedLink::default(),
            targets: Arc::new(targets),
            target_problems: Mutex::default(),
            former_problems: Mutex::default(),
            awaiting_keys: Mutex::default(),
            checkpointer,
            spanning,
            guests: Guests::open(&config.state_dir)?,
            sources: Mutex::default(),
            groups: Mutex::default(),
            doors,
            links: DeviceLinks::fresh(),
            volumes: Mutex::default(),
            grown: Mutex::default(),
            owners_changed: Notify::new(),
            swept: AtomicBool::new(false),
            views: Mutex::default(),
            orphans: Mutex::default(),
            alerts: Mutex::default(),
        })
    }

    fn seen(&self) -> Arc<State> {
        self.state.seen()
    }

    /// Follows the definitions that were in force before the start, and opens the views again. What can't be done is logged, and shows as an
    /// alert.
    async fn restore_definitions(&self) {
        let mut change = self.state.change().await;
        self.await_views();
        if let Err(error) = self.follow_definitions(&mut change).await {
            tracing::error!(%error, "can't follow all definitions");
        }
        self.restore_views(&mut change).await;
        self.forget_swept_views(&mut change);
    }

    async fn stop(&self) {
        // While their disks are still served.
        self.thaw_all_guests().await;
        self.spanning.stop().await;
        lock(&self.sources).clear();
        let link = lock(&self.link).take();
        if let Some(link) = link {
            link.close().await;
        }
        tokio::task::block_in_place(|| {
            self.doors.stop_nbd();
            self.targets.leave();
            self.leave_views();
        });
        self.targets.shut_down().await;
        tokio::task::block_in_place(|| self.leave_volumes());
    }
}

/// A lock that is good even when a thread panicked while it had it: what it guards is changed in single steps.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn lock_state(config: &Config) -> Result<Flock<File>, DaemonError> {
    let folder = &config.state_dir;
    identity::make_folder(folder)?;
    let failed = |source| DaemonError::System { action: "lock the state folder", source };
    let file = File::create(folder.join("lock")).map_err(failed)?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        nix::errno::Errno::EWOULDBLOCK => DaemonError::Running { path: folder.clone() },
        errno => failed(errno.into()),
    })
}

async fn look_for_wrong(daemon: Arc<Daemon>) {
    let mut ticks = tokio::time::interval(LOOK_EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        daemon.retry_targets().await;
        let found = daemon.findings();
        let (raised, cleared) = lock(&daemon.alerts).look(found, TimeUs::now());
        for alert in raised {
            let remedy = alert.remedy.unwrap_or_default();
            tracing::warn!(code = alert.code, remedy, "alert: {}", alert.message);
        }
        for alert in cleared {
            tracing::info!(code = alert.code, "no longer: {}", alert.message);
        }
    }
}
