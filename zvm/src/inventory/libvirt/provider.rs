//! The inventory of one host, from its libvirt daemon.

use std::time::Duration;

use tokio::sync::mpsc::{self, error::TryRecvError};
use tokio::time::timeout;
use uuid::Uuid;

use super::address::Address;
use super::client::Client;
use super::connection::Timeouts;
use super::error::LibvirtError;
use super::message::event::Event;
use super::tls::TlsFiles;
use super::{host, reading};
use crate::inventory::{
    ChangedFuture, Inventory, InventoryError, Network, Origin, Provider, ReadFuture, Reading,
};

/// A host, and how it is reached.
#[derive(Debug, Clone)]
pub struct HostSettings {
    /// The source's name, which goes with all that comes from it.
    pub source: String,
    /// Where its daemon is.
    pub address: Address,
    /// Name of the site that the host is at.
    pub site: String,
    /// Name under which the host's VRA is enrolled; the host's name, if none is given.
    pub vra: Option<String>,
    /// Files for [`Address::Tls`].
    pub tls: TlsFiles,
    /// How long is waited for it.
    pub timeouts: Timeouts,
}

/// The provider for one host. The connection stays open between readings, for the events.
#[derive(Debug)]
pub struct LibvirtHost {
    settings: HostSettings,
    session: Option<Session>,
    last: Option<Inventory>,
    /// The last reading failed: whatever the next one finds is new.
    failed: bool,
    /// There were events since the last reading.
    told: bool,
}

#[derive(Debug)]
struct Session {
    client: Client,
    events: mpsc::Receiver<Event>,
    host_uuid: Uuid,
}

impl HostSettings {
    pub(super) fn network(&self, host: &str, name: String, id: String) -> Network {
        let origin = Origin { source: self.source.clone(), id };
        Network { name, site: self.site.clone(), hosts: vec![host.to_owned()], origin }
    }
}

impl LibvirtHost {
    /// A provider that has not connected yet.
    pub fn new(settings: HostSettings) -> Self {
        Self { settings, session: None, last: None, failed: false, told: false }
    }

    async fn try_read(&mut self, reading: Reading) -> Result<Option<Inventory>, LibvirtError> {
        let mut is_new = false;
        let session = match &mut self.session {
            Some(session) => session,
            none => {
                is_new = true;
                none.insert(Session::begin(&self.settings).await?)
            }
        };
        self.told |= session.take_events()?;
        if reading == Reading::News && !(self.told || self.failed || is_new) {
            return Ok(None);
        }
        // What happens from here on is told again after this reading.
        self.told = false;
        let inventory =
            reading::read(&session.client, &self.settings, session.host_uuid, self.last.as_ref()).await?;
        if !self.failed && self.last.as_ref() == Some(&inventory) {
            return Ok(None);
        }
        self.last = Some(inventory.clone());
        Ok(Some(inventory))
    }

    async fn read_in_time(&mut self, reading: Reading) -> Result<Option<Inventory>, InventoryError> {
        let limit_ms = self.settings.timeouts.inventory_ms;
        let read = timeout(Duration::from_millis(limit_ms), self.try_read(reading)).await;
        let late = LibvirtError::Timeout { what: "all that was asked".into(), timeout_ms: limit_ms };
        let read = read.unwrap_or(Err(late));
        self.failed = read.is_err();
        if read.is_err() {
            // Dropped, a connection says goodbye by itself.
            self.session = None;
        }
        read.map_err(|error| error.into_inventory_error(self.describe()))
    }
}

impl Session {
    async fn begin(settings: &HostSettings) -> Result<Self, LibvirtError> {
        let (client, events) = Client::connect(&settings.address, &settings.tls, settings.timeouts).await?;
        client.subscribe().await?;
        let capabilities = client.capabilities().await?;
        let host_uuid = host::host_uuid(&capabilities)
            .map_err(|error| LibvirtError::definition("the host", &error))?
            .ok_or_else(|| {
                LibvirtError::definition("the host", &"it has no UUID: set host_uuid in libvirtd.conf")
            })?;
        tracing::debug!(address = %settings.address, host = %host_uuid, "connected to libvirt");
        Ok(Self { client, events, host_uuid })
    }

    /// Takes the events that have come. Whether there were any; an error if the connection has ended.
    fn take_events(&mut self) -> Result<bool, LibvirtError> {
        let mut any = false;
        loop {
            match self.events.try_recv() {
                Ok(_) => any = true,
                Err(TryRecvError::Empty) => return self.client.ended().map_or(Ok(any), Err),
                Err(TryRecvError::Disconnected) => {
                    return Err(self.client.ended().unwrap_or_else(|| LibvirtError::Lost("it ended".into())));
                }
            }
        }
    }
}

impl Provider for LibvirtHost {
    fn describe(&self) -> String {
        self.settings.address.to_string()
    }

    fn read(&mut self, reading: Reading) -> ReadFuture<'_> {
        Box::pin(self.read_in_time(reading))
    }

    fn changed(&mut self) -> ChangedFuture<'_> {
        Box::pin(async {
            match &mut self.session {
                // The end of the channel is that of the connection.
                Some(session) => self.told |= session.events.recv().await.is_some(),
                None => std::future::pending().await,
            }
        })
    }
}
