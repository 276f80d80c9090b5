//! The provider: an inventory that is kept up to date by what the vCenter tells.

use std::io;
use std::time::{Duration, Instant};

use super::client::{CallError, Client};
use super::inventory::{Source, inventory_of};
use super::objects::Objects;
use super::session::Session;
use super::settings::{Settings, SettingsError};
use crate::inventory::{ChangedFuture, Inventory, InventoryError, Provider, ReadFuture, Reading};

/// Most parts of news that are followed before a reading is given up.
const MAX_PARTS_OF_NEWS: usize = 10_000;

/// Between two questions for news, when the vCenter doesn't hold its answer back until there are some.
const MIN_NEWS_INTERVAL: Duration = Duration::from_secs(1);

/// From a login until its loss is told, at least: whoever is told reads, and logs in again.
const MIN_LOGIN_INTERVAL: Duration = Duration::from_secs(2);

const LOGIN: &str = "correct the user name or the password; a login is tried once a minute at most, so that the account isn't locked";
const PERMISSION: &str = "give the account the role Read-only at the root of the vCenter, with propagation";
const CERTIFICATE: &str = "compare the fingerprint with the one that the vCenter shows at its console, and pin it if they are the same";
const SETTINGS: &str = "correct the source's settings";

/// Reads one vCenter. Logs in with the first reading, and again when the session was lost.
#[derive(Debug)]
pub struct VCenter {
    settings: Settings,
    connected: Option<Connected>,
    /// What was read last; none after an error.
    last: Option<Inventory>,
    /// When and why a login was refused.
    refused: Option<(Instant, String)>,
    /// When it is to be told that the session was lost.
    loss_told_at: Option<Instant>,
}

/// A session with what it has told.
struct Connected {
    session: Session,
    since: Instant,
    source: Source,
    objects: Objects,
    /// Whether the objects have changed since they were made an inventory.
    has_news: bool,
    /// Whether only a part of the last news has come, so that the objects don't fit together.
    is_partial: bool,
    /// How many properties the log has said not to be readable.
    unreadable_told: usize,
}

impl VCenter {
    /// A provider that has not connected yet.
    ///
    /// # Errors
    /// Settings that cannot be used.
    pub fn new(settings: Settings) -> Result<Self, SettingsError> {
        settings.check_credentials()?;
        Client::new(&settings)?;
        Ok(Self { settings, connected: None, last: None, refused: None, loss_told_at: None })
    }

    async fn read_within_limit(&mut self, reading: Reading) -> Result<Option<Inventory>, InventoryError> {
        let limit = self.settings.timing.reading;
        let result = match tokio::time::timeout(limit, self.read_now(reading)).await {
            Ok(result) => result,
            Err(_) => {
                let reason = format!("it was not read within {limit:?}");
                Err(io::Error::new(io::ErrorKind::TimedOut, reason).into())
            }
        };
        result.map_err(|error| {
            self.connected = None;
            self.last = None;
            self.error(error)
        })
    }

    async fn read_now(&mut self, reading: Reading) -> Result<Option<Inventory>, CallError> {
        if let Some(connected) = &mut self.connected {
            match connected.refresh(reading).await {
                Ok(()) => return Ok(self.take_news()),
                Err(error) if error.is_loss() => self.lose(&error),
                Err(error) => return Err(error),
            }
        }
        self.connected = Some(self.connect().await?);
        self.loss_told_at = None;
        Ok(self.take_news())
    }

    async fn connect(&mut self) -> Result<Connected, CallError> {
        if let Some((when, reason)) = &self.refused
            && when.elapsed() < self.settings.timing.login_pause
        {
            return Err(refused_login(reason));
        }
        let client = Client::new(&self.settings)?;
        let session = match Session::open(client, &self.settings).await {
            Err(CallError::Fault { method: "Login", fault }) => {
                let reason = fault.to_string();
                let error = refused_login(&reason);
                self.refused = Some((Instant::now(), reason));
                return Err(error);
            }
            opened => opened?,
        };
        self.refused = None;
        let source = Source {
            name: self.settings.name.clone(),
            site: self.settings.site.clone(),
            instance: session.instance,
        };
        let mut connected = Connected {
            session,
            since: Instant::now(),
            source,
            objects: Objects::default(),
            has_news: true,
            is_partial: false,
            unreadable_told: 0,
        };
        connected.follow_news(false).await?;
        connected.tell_unreadable();
        Ok(connected)
    }

    /// The inventory, if it is another one than last time.
    fn take_news(&mut self) -> Option<Inventory> {
        let connected = self.connected.as_mut()?;
        let has_news = std::mem::take(&mut connected.has_news);
        if !has_news && self.last.is_some() {
            return None;
        }
        let inventory = inventory_of(&connected.objects, &connected.source);
        if self.last.as_ref() == Some(&inventory) {
            return None;
        }
        self.last = Some(inventory.clone());
        Some(inventory)
    }

    /// Gives the session up.
    fn lose(&mut self, error: &CallError) {
        tracing::info!(source = self.settings.name, %error, "the session at the vCenter was lost; the next reading logs in anew");
        if let Some(mut connected) = self.connected.take() {
            self.loss_told_at = Some(connected.since + MIN_LOGIN_INTERVAL);
            if error.is_logged_out() {
                connected.session.note_logout();
            }
        }
    }

    fn error(&self, error: CallError) -> InventoryError {
        let from = self.describe();
        match error {
            CallError::Unreachable(source) => InventoryError::Read { from, source },
            CallError::Status(_) => {
                InventoryError::Read { from, source: io::Error::other(error.to_string()) }
            }
            CallError::Certificate(_) => {
                InventoryError::Refused { from, reason: error.to_string(), remedy: CERTIFICATE }
            }
            CallError::Settings(_) => {
                InventoryError::Refused { from, reason: error.to_string(), remedy: SETTINGS }
            }
            CallError::Fault { method: "Login", ref fault } => {
                InventoryError::Refused { from, reason: fault.to_string(), remedy: LOGIN }
            }
            CallError::Fault { ref fault, .. } if fault.name == "NoPermission" => {
                InventoryError::Refused { from, reason: error.to_string(), remedy: PERMISSION }
            }
            CallError::Fault { .. } | CallError::Unusable(_) => {
                InventoryError::Protocol { from, reason: error.to_string() }
            }
        }
    }

    async fn wait_for_change(&mut self) {
        if let Some(connected) = &mut self.connected {
            match connected.wait_for_news().await {
                Ok(()) => return,
                Err(error) => self.lose(&error),
            }
        }
        let Some(at) = self.loss_told_at else { return std::future::pending().await };
        tokio::time::sleep_until(at.into()).await;
        self.loss_told_at = None;
    }
}

impl Connected {
    async fn refresh(&mut self, reading: Reading) -> Result<(), CallError> {
        if reading == Reading::News && self.has_news && !self.is_partial {
            return Ok(());
        }
        self.follow_news(false).await?;
        if reading == Reading::Whole {
            self.objects = self.session.retrieve().await?;
            self.has_news = true;
            self.tell_unreadable();
        }
        Ok(())
    }

    /// Ends when there are news, whole ones. Cancel safe.
    async fn wait_for_news(&mut self) -> Result<(), CallError> {
        while !self.has_news || self.is_partial {
            let begun = Instant::now();
            self.follow_news(true).await?;
            if !self.has_news && begun.elapsed() < MIN_NEWS_INTERVAL {
                tokio::time::sleep(MIN_NEWS_INTERVAL).await;
            }
        }
        Ok(())
    }

    /// Applies what the session tells, all parts of it. Cancel safe.
    async fn follow_news(&mut self, is_patient: bool) -> Result<(), CallError> {
        for _ in 0..MAX_PARTS_OF_NEWS {
            let Some(news) = self.session.news(is_patient || self.is_partial).await? else {
                self.is_partial = false;
                return Ok(());
            };
            for change in &news.changes {
                let applied = self.objects.apply(change);
                self.has_news |= applied.map_err(|error| CallError::Unusable(error.to_string()))?;
            }
            self.is_partial = news.is_truncated;
            if !self.is_partial {
                return Ok(());
            }
        }
        Err(CallError::Unusable(format!("WaitForUpdatesEx: news in more than {MAX_PARTS_OF_NEWS} parts")))
    }

    fn tell_unreadable(&mut self) {
        let unreadable = self.objects.take_unreadable();
        if unreadable.count > self.unreadable_told {
            tracing::warn!(
                source = self.source.name,
                count = unreadable.count,
                example = unreadable.example,
                "the vCenter does not let its account read everything: give it the role Read-only at the root, with propagation"
            );
        }
        self.unreadable_told = unreadable.count;
    }
}

impl Provider for VCenter {
    fn describe(&self) -> String {
        format!("vCenter {} ({})", self.settings.name, self.settings.url)
    }

    fn read(&mut self, reading: Reading) -> ReadFuture<'_> {
        Box::pin(self.read_within_limit(reading))
    }

    fn changed(&mut self) -> ChangedFuture<'_> {
        Box::pin(self.wait_for_change())
    }
}

impl std::fmt::Debug for Connected {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connected")
            .field("source", &self.source)
            .field("has_news", &self.has_news)
            .finish_non_exhaustive()
    }
}

fn refused_login(reason: &str) -> CallError {
    let fault = super::soap::Fault { name: String::new(), message: reason.into() };
    CallError::Fault { method: "Login", fault }
}
