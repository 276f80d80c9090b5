//! The source of a load: the product's sender over the product's link.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use journal::batch::Record;
use quinn::{Connection, RecvStream, SendStream};
use tokio::sync::watch;
use vra::api::vpg::{VpgDefinition, VraEndpoint};
use vra::link::{Link, LinkError, StreamKind, open_stream};
use vra::pki::Identity;
use vra::ship::shell::{ConnectError, DataConnector, Shipper, ShipperParts};
use vra::ship::{Doorbell, GenerationStart, Retained, Sender, SenderEvent, SenderLimits, StreamIdentity};

use super::load::Load;

/// Ships a load, as far as it is told to.
pub struct Source {
    published: Arc<AtomicU64>,
    durable: Arc<AtomicU64>,
    doorbell: Arc<Doorbell>,
    shipper: Shipper,
    story: Arc<Mutex<Story>>,
    reachable: watch::Sender<bool>,
    connection: Arc<Mutex<Option<Connection>>>,
}

/// What the sender told of the stream.
#[derive(Clone, Debug, Default)]
pub struct Story {
    /// How often the target took the stream.
    pub grants: u64,
    /// How often it had nothing of the generation yet: each is the begin of a full sync.
    pub beginnings: u64,
    /// The last grant was of a generation that had nothing durable.
    begins: bool,
    /// Refusals that no later attempt can mend, and why the sender gave up.
    pub trouble: Vec<String>,
}

impl Source {
    /// Begins. `on_durable` is told each acknowledged number, on the shipper's task: it must not block. Until the target is said to be
    /// reachable no connection is tried.
    pub fn start(
        load: Load,
        definition: &VpgDefinition,
        link: Link,
        mut on_durable: impl FnMut(u64) + Send + 'static,
    ) -> Self {
        let vm = &definition.vms[0];
        let identity =
            StreamIdentity { vm: vm.id, vpg: definition.id, journal: vm.journal, volumes: Load::shapes(vm) };
        let start = GenerationStart { generation: load.generation(), ancestors: Vec::new(), first_seq: 1 };
        let (published, durable) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let noted = Arc::clone(&durable);
        let retained = Generated {
            load,
            published: Arc::clone(&published),
            on_free: Box::new(move |seq| {
                noted.fetch_max(seq, Ordering::AcqRel);
                on_durable(seq);
            }),
        };
        let doorbell = Arc::new(Doorbell::new());
        let story = Arc::new(Mutex::new(Story::default()));
        let told = Arc::clone(&story);
        let (reachable, is_reachable) = watch::channel(false);
        let connection = Arc::new(Mutex::new(None));
        let connector =
            Connector { link, target: vm.target.clone(), is_reachable, connection: Arc::clone(&connection) };
        let shipper = Shipper::start(ShipperParts {
            paused: false,
            sender: Sender::new(identity, start, SenderLimits::STANDARD, 1),
            retained: Box::new(retained),
            doorbell: Arc::clone(&doorbell),
            connector,
            on_event: Box::new(move |event| lock(&told).note(event)),
        });
        Self { published, durable, doorbell, shipper, story, reachable, connection }
    }

    /// The target has been started: try to connect now.
    pub async fn target_is_up(&self) {
        self.reachable.send_replace(true);
        self.shipper.resume().await;
    }

    /// The target has been killed: don't wait until the connection is found to be dead.
    pub fn target_is_down(&self) {
        self.reachable.send_replace(false);
        if let Some(connection) = lock(&self.connection).take() {
            connection.close(0_u32.into(), b"the target was killed");
        }
    }

    /// Lets everything up to `seq` be sent.
    pub fn publish(&self, seq: u64) {
        self.published.fetch_max(seq, Ordering::AcqRel);
        self.doorbell.ring();
    }

    /// The last record that may have been sent.
    pub fn published_through(&self) -> u64 {
        self.published.load(Ordering::Acquire)
    }

    /// The last record that the target has acknowledged as durable.
    pub fn durable_through(&self) -> u64 {
        self.durable.load(Ordering::Acquire)
    }

    /// What was told so far.
    pub fn story(&self) -> Story {
        lock(&self.story).clone()
    }

    /// Publishes and waits until `seq` is durable, with at most `ahead` records on their way.
    ///
    /// # Errors
    /// The sender gave up, or nothing was acknowledged for `patience`.
    pub async fn run_through(&self, seq: u64, ahead: u64, patience: Duration) -> Result<()> {
        let mut last = (self.durable_through(), tokio::time::Instant::now());
        while self.durable_through() < seq {
            let durable = self.durable_through();
            self.publish(seq.min(durable + ahead));
            if durable > last.0 {
                last = (durable, tokio::time::Instant::now());
            }
            let story = self.story();
            ensure!(story.trouble.is_empty(), "the stream ended: {}", story.trouble.join("; "));
            if last.1.elapsed() > patience {
                bail!(
                    "nothing was acknowledged after {durable} for {patience:?}: {:?}",
                    self.shipper.status()
                );
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(())
    }
}

impl Story {
    fn note(&mut self, event: SenderEvent) {
        match event {
            SenderEvent::Granted { new_generation, .. } => {
                self.grants += 1;
                // Until something of it is durable, each grant of a generation says that it is new.
                self.beginnings += u64::from(new_generation && !self.begins);
                self.begins = new_generation;
            }
            SenderEvent::Stopped(reason) => self.trouble.push(reason.to_string()),
            // Both end with another attempt.
            SenderEvent::Disconnected { .. } | SenderEvent::Refused(_) => {}
        }
    }
}

/// A load's records as the sender takes them: made when they are wanted, however often.
struct Generated {
    load: Load,
    published: Arc<AtomicU64>,
    on_free: Box<dyn FnMut(u64) + Send>,
}

impl Retained for Generated {
    fn take_ready(&mut self, from_seq: u64, max_bytes: usize, max_records: usize, out: &mut Vec<Record>) {
        let mut taken_bytes = 0;
        for seq in (from_seq..=self.published_through()).take(max_records) {
            if taken_bytes >= max_bytes {
                break;
            }
            let record = self.load.record(seq);
            taken_bytes += record.payload.len();
            out.push(record);
        }
    }

    fn free_through(&mut self, seq: u64) {
        (self.on_free)(seq);
    }

    fn published_through(&self) -> u64 {
        self.published.load(Ordering::Acquire)
    }
}

struct Connector {
    link: Link,
    target: VraEndpoint,
    is_reachable: watch::Receiver<bool>,
    connection: Arc<Mutex<Option<Connection>>>,
}

impl DataConnector for Connector {
    async fn open(&self) -> Result<(SendStream, RecvStream), ConnectError> {
        let failed = |error: LinkError| ConnectError(format!("{:#}", anyhow::Error::from(error)));
        // Fails only when the source ends.
        let _ = self.is_reachable.clone().wait_for(|reachable| *reachable).await;
        let peer = Identity::vra(self.target.id);
        let connection = self.link.connect(peer, &self.target.address).await.map_err(failed)?;
        *lock(&self.connection) = Some(connection.clone());
        open_stream(&connection, StreamKind::Data, &self.target.address).await.map_err(failed)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
