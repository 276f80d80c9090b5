//! A protected VM and its target in one process, joined by a real link over loopback.

use std::fs::File;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::Thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use journal::batch::Record;
use quinn::{RecvStream, SendStream};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use ublk::serve::Geometry;
use vra::api::status::TargetState;
use vra::api::vpg::{VmDefinition, VolumeDefinition, VpgDefinition, VraEndpoint};
use vra::api::{GenerationId, JournalId, MemberSince, VmId, VolumeId, VpgId, VraId};
use vra::capture::modes::Mode;
use vra::capture::{
    CaptureLimits, FileSequenceStore, ProtectedDisk, RetainedEntries, SourceAction, SourceAlert, SourceVm,
};
use vra::clock::Clock;
use vra::link::{Accepted, Link, LinkSettings, StreamKind};
use vra::pki::{Credentials, Trust};
use vra::receive::{TargetHost, TargetSettings};
use vra::ship::shell::{ConnectError, DataConnector, Shipper, ShipperParts};
use vra::ship::{Doorbell, Retained, Sender, SenderEvent, SenderLimits, StreamIdentity};
use vra::sync::{SyncJob, SyncThread};
use vra::wire::VolumeShape;

use super::{RUN_BYTES, runtime};
use crate::bench::site_ca::SiteCa;

/// How long anything may take before the run counts as failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// Memory that the VM may retain: far above what the guest is ahead, so that capture never stops.
const RETAINED_BYTES: u64 = 512 << 20;

/// Both ends, streaming into the journal.
pub(super) struct Replication {
    disk: Arc<ProtectedDisk>,
    vm: Arc<SourceVm>,
    progress: Arc<Progress>,
    shipper: Shipper,
    source: (Runtime, Link),
    target: (Runtime, Link),
    host: Arc<TargetHost>,
}

impl Replication {
    /// Starts both ends and waits until the initial sync of the (empty) disk is over.
    pub(super) fn start(ca: &SiteCa, folder: &Path) -> Result<Self> {
        let (source_id, source) = ca.enrol()?;
        let (target_id, target) = ca.enrol()?;
        let (source_link, _) = bind(source)?;
        let (target_link, accepted) = bind(target)?;
        let address = target_link.1.local_address().to_string();
        let endpoint = VraEndpoint { id: target_id, address };
        let vpg = definition(folder, source_id, endpoint.clone());
        let definition = &vpg.vms[0];

        let host = {
            let _in_runtime = target_link.0.enter();
            Arc::new(TargetHost::start(TargetSettings::STANDARD)?)
        };
        target_link.0.block_on(host.ensure(&vpg, definition.id))?;
        target_link.0.spawn(serve(accepted, source_id, host.clone()));

        let disk = Arc::new(empty_disk(folder)?);
        let store = Arc::new(FileSequenceStore::new(folder.join("numbers.json")));
        let limits = CaptureLimits { retained_bytes: RETAINED_BYTES, ..CaptureLimits::STANDARD };
        let vm = Arc::new(SourceVm::protect(vec![disk.clone()], limits, store, GenerationId::random())?);
        let doorbell = Arc::new(Doorbell::new());
        vm.set_doorbell(doorbell.clone());
        let volumes = definition.volumes.iter().map(shape_of).collect();
        let (id, journal) = (definition.id, definition.journal);
        let identity = StreamIdentity { vm: id, vpg: vpg.id, journal, volumes };
        let progress =
            Arc::new(Progress { durable_through: AtomicU64::new(0), guest: std::thread::current() });
        let parts = ShipperParts {
            paused: false,
            sender: Sender::new(identity, vm.generation(), SenderLimits::STANDARD, rand::random()),
            retained: Box::new(Watched { entries: RetainedEntries(vm.clone()), progress: progress.clone() }),
            doorbell,
            connector: Connector { link: source_link.1.clone(), target: endpoint },
            on_event: {
                let vm = vm.clone();
                Box::new(move |event| {
                    if let SenderEvent::Granted { generation, fresh_image, .. } = event {
                        vm.granted(generation, fresh_image);
                    }
                })
            },
        };
        let shipper = {
            let _inside = source_link.0.enter();
            Shipper::start(parts)
        };
        let replication =
            Self { disk, vm, progress, shipper, source: source_link, target: target_link, host };
        replication.sync(id)?;
        Ok(replication)
    }

    /// The guest's disk.
    pub(super) fn disk(&self) -> Arc<ProtectedDisk> {
        self.disk.clone()
    }

    /// The highest number that the target has acknowledged as durable.
    pub(super) fn durable_through(&self) -> u64 {
        self.progress.durable_through.load(Ordering::Acquire)
    }

    /// Waits until a number is durable. To be called by the thread that started the replication.
    pub(super) fn wait_durable(&self, seq: u64) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while self.durable_through() < seq {
            ensure!(Instant::now() < deadline, "number {seq} is not durable: {:?}", self.shipper.status());
            std::thread::park_timeout(Duration::from_millis(100));
        }
        Ok(())
    }

    /// Ends both ends. Fails if capture had stopped meanwhile: then the figures mean nothing.
    pub(super) fn stop(self) -> Result<()> {
        let snapshot = self.vm.snapshot();
        let whole = matches!(snapshot.mode, Mode::Streaming { .. }) && snapshot.overflow_count == 0;
        ensure!(
            whole && snapshot.last_seq == snapshot.freed_through,
            "the stream was not whole: {snapshot:?}"
        );
        self.vm.unprotect();
        drop(self.shipper);
        self.source.0.block_on(self.source.1.close());
        self.target.0.block_on(async {
            self.host.shut_down().await;
            self.target.1.close().await;
        });
        Ok(())
    }

    /// Drives the initial sync to its end.
    fn sync(&self, id: VmId) -> Result<()> {
        let clock = Clock::start();
        let deadline = Instant::now() + PATIENCE;
        let mut sync = None;
        let journaling = || {
            let target = self.host.vm(id);
            target.is_some_and(|target| target.status().state == TargetState::Journaling)
        };
        while sync.as_ref().is_none_or(|sync: &SyncThread| !sync.is_over()) || !journaling() {
            ensure!(Instant::now() < deadline, "the sync doesn't end: {:?}", self.shipper.status());
            for action in self.vm.tick(clock.now(), &mut rand::random::<u128>) {
                match action {
                    SourceAction::Alert(SourceAlert::FullSync) => {}
                    SourceAction::BeginSync(begun) => {
                        let (core, disks) = (self.vm.core().clone(), self.vm.disks());
                        let job = SyncJob { name: "bench".into(), core, disks, sync: begun };
                        sync = Some(SyncThread::start(job)?);
                    }
                    other => bail!("the source wants {other:?}"),
                }
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.wait_durable(self.vm.snapshot().last_seq)
    }
}

/// How far the target is, for the guest's thread.
struct Progress {
    durable_through: AtomicU64,
    guest: Thread,
}

/// What capture retains, seen when it is freed: that is when the durable acknowledgement has come.
struct Watched {
    entries: RetainedEntries,
    progress: Arc<Progress>,
}

impl Retained for Watched {
    fn take_ready(&mut self, from_seq: u64, max_bytes: usize, max_records: usize, out: &mut Vec<Record>) {
        self.entries.take_ready(from_seq, max_bytes, max_records, out);
    }

    fn free_through(&mut self, seq: u64) {
        self.entries.free_through(seq);
        self.progress.durable_through.store(seq, Ordering::Release);
        self.progress.guest.unpark();
    }

    fn published_through(&self) -> u64 {
        self.entries.published_through()
    }
}

struct Connector {
    link: Link,
    target: VraEndpoint,
}

impl DataConnector for Connector {
    async fn open(&self) -> Result<(SendStream, RecvStream), ConnectError> {
        let opened = self.link.peer(&self.target).open(&self.link, StreamKind::Data).await;
        opened.map(|(_, send, recv)| (send, recv)).map_err(|error| ConnectError(error.to_string()))
    }
}

async fn serve(mut accepted: mpsc::Receiver<Accepted>, source: VraId, host: Arc<TargetHost>) {
    while let Some(stream) = accepted.recv().await {
        host.serve(source, stream.send, stream.recv).await;
    }
}

type End = (Runtime, Link);

fn bind(credentials: Credentials) -> Result<(End, mpsc::Receiver<Accepted>)> {
    let runtime = runtime()?;
    let settings = LinkSettings { listen: (Ipv4Addr::LOCALHOST, 0).into() };
    let (link, accepted) =
        runtime.block_on(async { Link::bind(&settings, credentials, Trust::default()) })?;
    Ok(((runtime, link), accepted))
}

/// A disk with nothing on it. The guest's door never really writes to it.
fn empty_disk(folder: &Path) -> Result<ProtectedDisk> {
    let file = File::options().read(true).write(true).create_new(true).open(folder.join("source.raw"))?;
    file.set_len(RUN_BYTES)?;
    let geometry = Geometry {
        size_bytes: RUN_BYTES,
        logical_block_bytes: 4096,
        physical_block_bytes: 4096,
        volatile_cache: true,
        fua: true,
        read_only: false,
        discard: None,
        write_zeroes: None,
    };
    let clock = Clock::start();
    Ok(ProtectedDisk::new(file, geometry, Arc::new(move || clock.now().wall_us)))
}

fn definition(folder: &Path, source: VraId, target: VraEndpoint) -> VpgDefinition {
    let volume = VolumeDefinition {
        id: VolumeId::random(),
        number: 0,
        size_bytes: RUN_BYTES,
        logical_block_bytes: 4096,
        source_path: folder.join("source.raw"),
        left: false,
        swap: false,
    };
    let vm = VmDefinition {
        id: VmId::random(),
        name: "guest".into(),
        journal: JournalId::random(),
        member_since: MemberSince::default(),
        volumes: vec![volume],
        source: VraEndpoint { id: source, address: "127.0.0.1:1".into() },
        takeover: None,
        target,
        datastore: folder.to_owned(),
        journal_limit_bytes: 4 * RUN_BYTES,
        journal_limit_percent: None,
        journal_warning: None,
        journal_minimum_bytes: 0,
        history_s: 3600,
        give_up_history: true,
    };
    VpgDefinition {
        id: VpgId::random(),
        name: "bench".into(),
        revision: 1,
        member_set_version: 1,
        checkpoint_interval_ms: 1000,
        hold_deadline_ms: 100,
        encrypt: false,
        paused: false,
        notes: None,
        coordinators: Vec::new(),
        vms: vec![vm],
        former: Vec::new(),
    }
}

fn shape_of(volume: &VolumeDefinition) -> VolumeShape {
    VolumeShape {
        volume: volume.number,
        id: volume.id,
        logical_block_bytes: volume.logical_block_bytes,
        size_bytes: volume.size_bytes,
        left: false,
    }
}
