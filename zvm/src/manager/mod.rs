//! The manager at work: it holds the store, the authority, the inventory and what was last seen of the VRAs. User actions
//! are in files by noun; [`engine`] is the loop that brings the world to where it should be.

mod adopting;
pub mod attaching;
mod changes;
pub mod checkpoint_locks;
mod checkpoints;
pub mod engine;
pub mod enrolment;
mod following;
mod guests;
pub mod inventory_watch;
pub mod listings;
pub mod members;
pub mod replication;
pub mod site_keys;
pub mod sources;
pub mod spec;
pub mod test_runs;
pub mod transfer;
pub mod vpgs;
pub mod vra_watch;
pub mod vras;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Notify;
use uuid::Uuid;
use vra::api::{ApiError, ErrorCode, TimeUs, VpgId, VraId, ZvmId};
use vra::pki::Credentials;
use vra::report::chain;

use crate::api::PassTimes;
use crate::authority::{Authority, AuthorityError};
use crate::clock::Clock;
use crate::config::Config;
use crate::health;
use crate::inventory::Inventory;
use crate::model::event::{Entity, Event, EventKind};
use crate::model::status::VpgReport;
use crate::model::task::{Task, TaskKind, TaskState};
use crate::model::vpg::Vpg;
use crate::model::vra::{Vra, VraState};
use crate::reconcile::{Desired, Observed, SiteKeyWish};
use crate::remote::Remote;
use crate::site_key_file::{LostSiteKeys, SiteKeyError, SiteKeyFile};
use crate::store::{self, Connection, Store, StoreError};

/// Everything that the parts of the manager share.
#[derive(Debug)]
pub struct Manager {
    config: Config,
    clock: Clock,
    store: Store,
    authority: Authority,
    site_keys: SiteKeyFile,
    credentials: Credentials,
    zvm: ZvmId,
    site_name: String,
    remote: Remote,
    inventory: Mutex<inventory_watch::Known>,
    /// Wakes who begins and ends the reading of sources.
    sources_changed: Notify,
    /// Locked by who locks and unlocks checkpoints.
    locks_to_undo: tokio::sync::Mutex<BTreeSet<checkpoint_locks::LockToUndo>>,
    /// Held by who changes which disks are served: two at once would undo each other's work.
    attaching: tokio::sync::Mutex<()>,
    /// Wakes who ends the serving of volumes.
    volumes_leave: Notify,
    observed: Mutex<Observed>,
    passes: Mutex<PassTimes>,
    /// Problems of the manager's own that the engine turns into alerts, by code.
    own_problems: Mutex<BTreeMap<(&'static str, Entity), OwnProblem>>,
    /// Wakes the engine.
    wake: Notify,
}

/// A problem of the manager's own.
#[derive(Debug, Clone, PartialEq, Eq)]
struct OwnProblem {
    description: String,
    remedy: String,
}

/// Why the manager could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Keys and certificates.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Keys of encrypted journals.
    #[error(transparent)]
    SiteKeys(#[from] SiteKeyError),
    /// The database is not that of these keys.
    #[error(
        "the database in {state_dir} belongs to another manager than the keys there: restore both from one backup"
    )]
    Mixed {
        /// The state folder.
        state_dir: std::path::PathBuf,
    },
    /// The UDP socket for requests to VRAs.
    #[error("cannot open a UDP socket for requests to VRAs")]
    Link(#[from] vra::link::LinkError),
    /// The UDP socket for enrolment.
    #[error(
        "cannot listen for enrolment on udp {address}: {source}; is another `zvm serve` running? Set `listen` in the configuration"
    )]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The unix socket.
    #[error(
        "cannot listen at {path}: {source}; is another `zvm serve` running? Set `socket` in the configuration"
    )]
    Socket {
        /// The socket.
        path: std::path::PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// Another manager runs on the same state.
    #[error(
        "{path} is locked: another `zvm serve` runs on this state folder; stop it, or set another state_dir"
    )]
    Locked {
        /// The lock file.
        path: std::path::PathBuf,
    },
}

impl Manager {
    /// Opens the state that [`initialise`] made. Must run inside tokio.
    pub async fn open(config: Config, lost: LostSiteKeys) -> Result<Arc<Self>, StartError> {
        let clock = Clock::new();
        let authority = Authority::open(&config.pki_dir())?;
        let credentials = authority.open_identity(&config.pki_dir(), clock.now_us())?;
        let store = Store::open(&config.database_path()).await?;
        let mixed = || StartError::Mixed { state_dir: config.state_dir.clone() };
        let site = store::site::get(&mut *store.read().await?).await?.ok_or_else(mixed)?;
        let zvm = credentials.own.identity.as_zvm().filter(|zvm| *zvm == site.zvm).ok_or_else(mixed)?;
        let site_keys = site_keys::open(&config, &store, lost, TimeUs(clock.now_us())).await?;
        let remote = Remote::new(config.listen.ip(), credentials.clone())?;
        Ok(Arc::new(Self {
            config,
            clock,
            store,
            authority,
            site_keys,
            credentials,
            zvm,
            site_name: site.name,
            remote,
            inventory: Mutex::default(),
            sources_changed: Notify::new(),
            locks_to_undo: tokio::sync::Mutex::default(),
            attaching: tokio::sync::Mutex::default(),
            volumes_leave: Notify::new(),
            observed: Mutex::default(),
            passes: Mutex::default(),
            own_problems: Mutex::default(),
            wake: Notify::new(),
        }))
    }

    /// The configuration that it runs with.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Ends connections and folds the database's log into its file.
    pub async fn close(&self) {
        self.remote.close().await;
        self.store.close().await;
    }

    fn now_us(&self) -> TimeUs {
        TimeUs(self.clock.now_us())
    }

    fn request_timeout(&self) -> Duration {
        Duration::from_millis(self.config.reconcile.request_timeout_ms)
    }

    fn inventory(&self) -> Arc<Inventory> {
        self.known().world.inventory()
    }

    fn observed(&self) -> Observed {
        self.observed.lock().expect("no code panics while it holds this lock").clone()
    }

    fn passes(&self) -> PassTimes {
        *self.passes.lock().expect("no code panics while it holds this lock")
    }

    fn set_own_problem(&self, code: &'static str, entity: Entity, problem: Option<OwnProblem>) {
        let mut problems = self.own_problems.lock().expect("no code panics while it holds this lock");
        let key = (code, entity);
        if problems.get(&key) == problem.as_ref() {
            return;
        }
        match problem {
            Some(problem) => problems.insert(key, problem),
            None => problems.remove(&key),
        };
        self.wake.notify_one();
    }

    /// What should be, as the database has it now.
    async fn desired(&self) -> Result<Desired, StoreError> {
        let mut db = self.store.read().await?;
        let vras = store::vras::list(&mut db).await?;
        Ok(Desired {
            vras: vras
                .into_iter()
                .filter(|vra| vra.state == VraState::Enrolled)
                .map(|vra| (vra.id, vra))
                .collect(),
            vpgs: store::vpgs::list(&mut db).await?,
            tests: store::test_runs::list(&mut db).await?,
            leftovers: store::leftovers::list(&mut db).await?,
            trust: store::certificates::trust(&mut db, self.now_us()).await?,
            site_keys: SiteKeyWish { ids: self.site_keys.ids(), request: self.site_keys.request() },
        })
    }

    fn reports(&self, desired: &Desired, observed: &Observed) -> Vec<VpgReport> {
        let now_us = self.clock.now_us();
        desired
            .vpgs
            .iter()
            .map(|vpg| health::report(vpg, &desired.vras, observed, &desired.tests, now_us))
            .collect()
    }

    /// Adds an event.
    async fn note(
        &self,
        db: &mut Connection,
        kind: EventKind,
        success: bool,
        entity: Entity,
        description: impl Into<String>,
        task: Option<Uuid>,
    ) -> Result<(), StoreError> {
        let event = Event {
            id: Uuid::new_v4(),
            at_us: self.now_us(),
            kind,
            success,
            description: description.into(),
            entity,
            task,
        };
        store::events::insert(db, &event).await
    }

    fn new_task(&self, kind: TaskKind, subject: &str, vpg: Option<VpgId>, step: &str) -> Task {
        Task {
            id: Uuid::new_v4(),
            kind,
            state: TaskState::InProgress,
            progress_percent: 0,
            step: step.into(),
            subject: subject.into(),
            vpg,
            started_us: self.now_us(),
            completed_us: None,
        }
    }

    async fn find_vpg(&self, name_or_id: &str) -> Result<Vpg, ApiError> {
        let vpgs =
            store::vpgs::list(&mut *self.store.read().await.map_err(internal)?).await.map_err(internal)?;
        vpgs.into_iter().find(|vpg| vpg.name == name_or_id || vpg.id.to_string() == name_or_id).ok_or_else(
            || {
                ApiError::new(ErrorCode::NotFound, format!("there is no VPG {name_or_id:?}"))
                    .remedy("`zvm vpg list` shows those that there are")
            },
        )
    }

    /// The VRA of that name or id: an enrolled one rather than a revoked one.
    async fn find_vra(&self, name_or_id: &str) -> Result<Vra, ApiError> {
        let vras =
            store::vras::list(&mut *self.store.read().await.map_err(internal)?).await.map_err(internal)?;
        vras.into_iter().find(|vra| vra.name == name_or_id || vra.id.to_string() == name_or_id).ok_or_else(
            || {
                ApiError::new(ErrorCode::NotFound, format!("there is no VRA {name_or_id:?}")).remedy(
                    "`zvm vra list` shows those that there are; `zvm vra token create` lets one enrol",
                )
            },
        )
    }

    async fn vra_names(&self) -> Result<HashMap<VraId, String>, ApiError> {
        let vras =
            store::vras::list(&mut *self.store.read().await.map_err(internal)?).await.map_err(internal)?;
        Ok(vras.into_iter().map(|vra| (vra.id, vra.name)).collect())
    }
}

/// Makes a new site: authority, identity and database. Fails if there is one in the state folder already.
pub async fn initialise(config: &Config, site_name: &str) -> Result<(ZvmId, [u8; 32]), StartError> {
    let (authority, zvm) = Authority::create(&config.pki_dir(), site_name, Clock::new().now_us())?;
    let store = Store::open(&config.database_path()).await?;
    let mut tx = store.begin().await?;
    let site = store::site::Site { name: site_name.into(), zvm: ZvmId(zvm), trust_version: 1 };
    store::site::insert(&mut tx, &site).await?;
    tx.commit().await.map_err(StoreError::from)?;
    store.close().await;
    Ok((ZvmId(zvm), authority.fingerprint()))
}

/// A failure of the manager's own, for its user. The details are in the log.
fn internal(error: StoreError) -> ApiError {
    let reason = chain(&error);
    tracing::error!(error = reason, "the database failed");
    ApiError::new(ErrorCode::Io, reason).remedy("check the disk of the manager's state folder, and its log")
}

/// A change that was made of what somebody else has changed since.
fn changed_meanwhile(vpg: &Vpg) -> ApiError {
    let message = format!("VPG {} was changed by somebody else meanwhile", vpg.name);
    ApiError::new(ErrorCode::Conflict, message).remedy("look at it, and try again")
}

/// Refuses names that could not be a folder's, or that break tables.
fn check_name(what: &str, name: &str) -> Result<(), ApiError> {
    let bad = name.is_empty()
        || name.len() > vra::api::volume::MAX_NAME_BYTES
        || name.starts_with('.')
        || name.trim() != name
        || name.chars().any(|c| c == '/' || c.is_control());
    if bad {
        let message = format!("{name:?} cannot be the name of a {what}");
        return Err(ApiError::new(ErrorCode::BadRequest, message).remedy(
            "use 1 to 128 bytes without slashes, control characters, a leading dot or outer spaces",
        ));
    }
    Ok(())
}
