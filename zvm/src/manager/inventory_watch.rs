//! Keeps the inventory up to date: one task for each source, which reads it when it tells of a change, and whole from time to time. A bad
//! reading leaves the last good one in force and raises an alert.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::Instant;
use vra::api::TimeUs;
use vra::report::chain;

use super::{Manager, OwnProblem};
use crate::inventory::changes::Change;
use crate::inventory::static_file::StaticFile;
use crate::inventory::world::{FILE, Scope, Taken, World};
use crate::inventory::write_rates::WriteRates;
use crate::inventory::{HostState, Inventory, InventoryError, Provider, Reading};
use crate::model::event::{Entity, EventKind};
use crate::store::sources::StoredSource;
use crate::store::{self, StoreError};

/// Code of the alert for a source that cannot be read.
pub(super) const UNREADABLE: &str = "inventory-unreadable";

/// Code of the alert for sources that contradict each other.
const CONFLICT: &str = "inventory-conflict";

/// A change seldom comes alone: the source is read so long after it told of the first one.
const GATHER: Duration = Duration::from_millis(100);

/// A source that can't be read is tried again after this, after twice as long, and so on up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(30);

/// What is known of the inventory.
#[derive(Debug, Default)]
pub(super) struct Known {
    pub(super) world: World,
    /// How much VMs write.
    pub(super) rates: WriteRates,
    /// How the reading of each source goes.
    pub(super) readings: BTreeMap<String, SourceReading>,
    /// Each wakes the task that reads a source.
    wakers: BTreeMap<String, Arc<Notify>>,
}

/// How the reading of a source goes.
#[derive(Debug, Clone, Default)]
pub(super) struct SourceReading {
    /// What is read, for people.
    pub(super) from: String,
    /// When it was last read well.
    pub(super) read_us: Option<TimeUs>,
    /// Why the newest reading failed.
    pub(super) error: Option<String>,
}

/// A task that reads a source.
struct Watcher {
    stored: StoredSource,
    task: AbortHandle,
}

impl Manager {
    /// Reads all sources until cancelled.
    pub async fn watch_inventory(self: Arc<Self>) {
        let mut tasks = JoinSet::new();
        let file_interval = Duration::from_millis(self.config.inventory.reread_interval_ms.max(50));
        let file = Box::new(self.inventory_file());
        tasks.spawn(self.clone().watch_source(FILE.into(), Scope::Site, file, file_interval));
        let mut watchers = BTreeMap::new();
        loop {
            match self.stored_sources().await {
                Ok(sources) => self.match_watchers(sources, &mut watchers, &mut tasks),
                Err(error) => {
                    tracing::error!(
                        error = chain(&error),
                        "the list of sources could not be read; it is tried again"
                    );
                    tokio::time::sleep(RETRY_MIN).await;
                    continue;
                }
            }
            tokio::select! {
                () = self.sources_changed.notified() => {}
                Some(Err(error)) = tasks.join_next() => {
                    if error.is_panic() {
                        tracing::error!(%error, "the reading of a source ended abnormally");
                    }
                }
            }
        }
    }

    /// Takes the readings that an earlier run made, and reads the file: the first requests must not meet an empty inventory.
    pub async fn begin_inventory(&self) -> Result<(), StoreError> {
        let (sources, readings) = {
            let mut db = self.store.read().await?;
            (store::sources::list(&mut db).await?, store::sources::readings(&mut db).await?)
        };
        let scope = |name: &str| match sources.iter().find(|stored| stored.source.name == name) {
            Some(stored) => Some(stored.source.settings.access.scope()),
            None => (name == FILE).then_some(Scope::Site),
        };
        for reading in readings {
            if let Some(scope) = scope(&reading.source) {
                self.known().world.restore(&reading.source, scope, reading.inventory);
            }
        }
        self.read_source(FILE, Scope::Site, &mut self.inventory_file(), Reading::Whole).await;
        Ok(())
    }

    fn inventory_file(&self) -> StaticFile {
        StaticFile::new(self.config.inventory.file.clone())
    }

    /// Begins and ends tasks, so that each source as it is stored has one.
    fn match_watchers(
        self: &Arc<Self>,
        sources: Vec<StoredSource>,
        watchers: &mut BTreeMap<String, Watcher>,
        tasks: &mut JoinSet<()>,
    ) {
        watchers.retain(|_, watcher| {
            let stays = sources.contains(&watcher.stored) && !watcher.task.is_finished();
            if !stays {
                watcher.task.abort();
            }
            stays
        });
        let names: BTreeSet<&str> = sources.iter().map(|stored| stored.source.name.as_str()).collect();
        self.forget_sources(&names);
        for stored in sources {
            let (name, settings) = (stored.source.name.clone(), &stored.source.settings);
            if watchers.contains_key(&name) {
                continue;
            }
            let provider = match self.provider_of(&stored) {
                Ok(provider) => provider,
                Err(error) => {
                    tracing::error!(source = name, %error, "the source cannot be read");
                    let remedy = error.remedy.unwrap_or_else(|| "correct it with `zvm source edit`".into());
                    self.note_failure(&name, settings.access.address().to_owned(), error.message, remedy);
                    continue;
                }
            };
            let interval = Duration::from_millis(settings.reread_interval_ms);
            let watch = self.clone().watch_source(name.clone(), settings.access.scope(), provider, interval);
            let task = tasks.spawn(watch);
            watchers.insert(name, Watcher { stored, task });
        }
    }

    /// Forgets what was read of sources that there are no more.
    fn forget_sources(&self, names: &BTreeSet<&str>) {
        let mut known = self.known();
        let is_gone = |name: &&str| *name != FILE && !names.contains(name);
        let read = known.readings.keys().map(String::as_str).chain(known.world.sources());
        let gone: BTreeSet<String> = read.filter(is_gone).map(str::to_owned).collect();
        for name in gone {
            known.readings.remove(&name);
            known.wakers.remove(&name);
            // That it is gone is one event, of its removal.
            let _changes = known.world.remove(&name);
            drop(known);
            self.set_own_problem(UNREADABLE, Entity::source(&name), None);
            known = self.known();
        }
        drop(known);
        self.tell_conflicts();
    }

    async fn watch_source(
        self: Arc<Self>,
        source: String,
        scope: Scope,
        mut provider: Box<dyn Provider>,
        interval: Duration,
    ) {
        let wake = Arc::new(Notify::new());
        self.known().wakers.insert(source.clone(), wake.clone());
        let mut retry_after = RETRY_MIN;
        let (mut reading, mut whole_at) = (Reading::Whole, Instant::now());
        loop {
            if self.read_source(&source, scope, &mut *provider, reading).await {
                if reading == Reading::Whole {
                    whole_at = Instant::now() + interval;
                }
                retry_after = RETRY_MIN;
                reading = tokio::select! {
                    () = provider.changed() => {
                        tokio::time::sleep(GATHER).await;
                        Reading::News
                    }
                    () = wake.notified() => Reading::Whole,
                    () = tokio::time::sleep_until(whole_at) => Reading::Whole,
                };
            } else {
                tokio::select! {
                    () = wake.notified() => {}
                    () = tokio::time::sleep(retry_after.min(interval)) => {}
                }
                retry_after = (retry_after * 2).min(RETRY_MAX);
                reading = Reading::Whole;
            }
        }
    }

    /// Reads a source once and says whether that went well.
    pub async fn read_source(
        &self,
        source: &str,
        scope: Scope,
        provider: &mut dyn Provider,
        reading: Reading,
    ) -> bool {
        let from = provider.describe();
        match provider.read(reading).await {
            // Who has got live sources since needs no file.
            Ok(None)
                if source == FILE && !self.config.inventory.file.exists() && self.has_sources().await =>
            {
                if self.known().readings.get(source).is_some_and(|reading| reading.error.is_some()) {
                    self.take_inventory(source, scope, from, Inventory::default()).await;
                }
                true
            }
            Ok(None) => {
                let changes = self.confirm(source, reading);
                if let Some(changes) = changes.as_ref().filter(|changes| !changes.is_empty()) {
                    self.note_changes(source, None, changes, None).await;
                }
                changes.is_some()
            }
            Ok(Some(inventory)) => {
                self.take_inventory(source, scope, from, inventory).await;
                true
            }
            // Who has live sources needs no file.
            Err(error) if source == FILE && is_missing(&error) && self.has_sources().await => {
                self.take_inventory(source, scope, from, Inventory::default()).await;
                true
            }
            Err(error) => {
                let reason = chain(&error);
                // Once, however often it is tried again.
                if self.known().readings.get(source).and_then(|reading| reading.error.as_ref())
                    != Some(&reason)
                {
                    tracing::warn!(
                        from,
                        error = reason,
                        "the inventory could not be read; the last good one stays in force"
                    );
                }
                let changes = self.note_failure(source, from, reason, error.remedy().to_owned());
                self.note_changes(source, None, &changes, None).await;
                false
            }
        }
    }

    /// A source is as it was. What follows from that for others; nothing if its last reading failed.
    fn confirm(&self, source: &str, reading: Reading) -> Option<Vec<Change>> {
        let now_us = self.now_us();
        let mut known = self.known();
        let inventory = known.world.inventory();
        known.rates.note(inventory.vms.iter().filter(|vm| vm.origin.source == source), now_us.0);
        let state = known.readings.get_mut(source).filter(|state| state.error.is_none())?;
        if reading == Reading::News {
            return Some(Vec::new());
        }
        state.read_us = Some(now_us);
        Some(known.world.confirm(source))
    }

    /// Has a source read now. Whether there is one of that name that is being read.
    pub(super) fn wake_source(&self, source: &str) -> bool {
        let known = self.known();
        let waker = known.wakers.get(source);
        waker.inspect(|waker| waker.notify_one()).is_some()
    }

    async fn has_sources(&self) -> bool {
        self.stored_sources().await.is_ok_and(|sources| !sources.is_empty())
    }

    pub(super) fn known(&self) -> MutexGuard<'_, Known> {
        self.inventory.lock().expect("no code panics while it holds this lock")
    }

    async fn take_inventory(&self, source: &str, scope: Scope, from: String, inventory: Inventory) {
        let now_us = self.now_us();
        let (changes, is_told, differs, to_read) = {
            let mut known = self.known();
            let reading = known.readings.entry(source.into()).or_default();
            let is_told = reading.read_us.is_none() || reading.error.is_some() || source == FILE;
            *reading = SourceReading { from: from.clone(), read_us: Some(now_us), error: None };
            let Taken { changes, differs } = known.world.take(source, scope, inventory.clone());
            let merged = known.world.inventory();
            // Of a VM that other hosts have defined, too, where it runs counts.
            known.rates.note(merged.vms.iter().filter(|vm| vm.origin.source == source), now_us.0);
            known.rates.keep(&merged);
            let to_read: Vec<Arc<Notify>> = known
                .world
                .to_read()
                .into_iter()
                .filter_map(|name| known.wakers.get(name))
                .cloned()
                .collect();
            (changes, is_told, differs, to_read)
        };
        for waker in to_read {
            waker.notify_one();
        }
        self.set_own_problem(UNREADABLE, entity(source), None);
        self.tell_conflicts();
        let (vms, hosts) = (inventory.vms.len(), inventory.hosts.len());
        let description =
            is_told.then(|| format!("the inventory was read from {from}: {vms} VMs on {hosts} hosts"));
        if description.is_some() {
            tracing::info!(from, vms, hosts, "the inventory was read");
        }
        if is_told || differs || !changes.is_empty() {
            self.note_changes(source, Some((now_us, &inventory)), &changes, description).await;
        }
    }

    fn tell_conflicts(&self) {
        let conflicts = self.known().world.conflicts().to_vec();
        let problem = (!conflicts.is_empty()).then(|| OwnProblem {
            description: conflicts.join("; "),
            remedy: "give the things other names, or take one of the sources out".into(),
        });
        self.set_own_problem(CONFLICT, Entity::zvm(), problem);
    }

    fn note_failure(&self, source: &str, from: String, reason: String, remedy: String) -> Vec<Change> {
        let changes = {
            let mut known = self.known();
            let reading = known.readings.entry(source.into()).or_default();
            reading.from = from;
            reading.error = Some(reason.clone());
            known.world.fail(source)
        };
        self.set_own_problem(UNREADABLE, entity(source), Some(OwnProblem { description: reason, remedy }));
        changes
    }

    /// Keeps a reading and an event for each change, in one transaction: after a crash before it the changes are found again.
    async fn note_changes(
        &self,
        source: &str,
        reading: Option<(TimeUs, &Inventory)>,
        changes: &[Change],
        read: Option<String>,
    ) {
        let save = async {
            let mut tx = self.store.begin().await?;
            if let Some((read_us, inventory)) = reading {
                store::sources::save_reading(&mut tx, source, read_us, inventory).await?;
            }
            if let Some(description) = read {
                self.note(&mut tx, EventKind::InventoryRead, true, entity(source), description, None).await?;
            }
            for change in changes {
                let is_good = !matches!(change, Change::HostStateChanged { host, .. } if host.state == HostState::NotResponding);
                self.note(&mut tx, change.event_kind(), is_good, change.entity(), change.to_string(), None)
                    .await?;
            }
            Ok::<_, StoreError>(tx.commit().await?)
        };
        if let Err(error) = save.await {
            tracing::error!(error = chain(&error), "changes of the inventory could not be noted as events");
        }
        self.wake.notify_one();
    }
}

fn entity(source: &str) -> Entity {
    if source == FILE { Entity::zvm() } else { Entity::source(source) }
}

fn is_missing(error: &InventoryError) -> bool {
    matches!(error, InventoryError::Read { source, .. } if source.kind() == std::io::ErrorKind::NotFound)
}
