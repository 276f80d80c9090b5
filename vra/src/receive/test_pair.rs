//! A source and a target for tests: a ring of records over real QUIC into real files.

use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use journal::batch::{Checkpoint, CheckpointKind, Epoch, Record};
use journal::storage::ring::RingStorage;
use journal::storage::{Blocking, Purpose, StorageError};
use quinn::{Connection, Endpoint, RecvStream, SendStream};
use uuid::Uuid;

use super::*;
use crate::api::vpg::{VmDefinition, VolumeDefinition, VpgDefinition, VraEndpoint};
use crate::api::{GenerationId, JournalId, MemberSince, VmId, VolumeId, VpgId, VraId, view::PointInTime};
use crate::link::transport_config;
use crate::receive::receiver_types::Failure;
use crate::receive::worker::{Input, VmKey};
use crate::ship::shell::{ConnectError, DataConnector, Shipper, ShipperParts};
use crate::ship::{
    Doorbell, GenerationStart, Phase, PlainRing, Retained, Sender, SenderEvent, SenderLimits, StreamIdentity,
};

const DISK_BYTES: u64 = 8 << 20;
pub(super) const NONCE: u128 = 0xfeed;

pub(super) const SETTINGS: TargetSettings = TargetSettings {
    worker_count: 1,
    memory_bytes: 64 << 20,
    window_bytes: 16 << 20,
    scrub: super::ScrubSettings::OFF,
    overlay_bytes: 64 << 20,
    views_memory_bytes: 64 << 20,
};

pub(super) struct Datastore(pub(super) PathBuf);

impl Datastore {
    pub(super) fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("holdfast-stream-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).expect("a scratch folder");
        Self(path)
    }
}

impl Drop for Datastore {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

pub(super) fn definition(datastore: &std::path::Path, volumes: u16) -> VpgDefinition {
    let volume = |number| VolumeDefinition {
        id: VolumeId::random(),
        number,
        // The last page of the second disk is not whole.
        size_bytes: DISK_BYTES - u64::from(number) * 512,
        logical_block_bytes: if number == 0 { 4096 } else { 512 },
        source_path: "/dev/null".into(),
        left: false,
        swap: false,
    };
    let endpoint = || VraEndpoint { id: VraId::random(), address: "127.0.0.1:1".into() };
    VpgDefinition {
        id: VpgId::random(),
        name: "group".into(),
        revision: 1,
        member_set_version: 1,
        checkpoint_interval_ms: 1000,
        hold_deadline_ms: 100,
        encrypt: false,
        paused: false,
        notes: None,
        coordinators: Vec::new(),
        vms: vec![VmDefinition {
            id: VmId::random(),
            name: "machine".into(),
            journal: JournalId::random(),
            member_since: MemberSince::default(),
            volumes: (0..volumes).map(volume).collect(),
            source: endpoint(),
            takeover: None,
            target: endpoint(),
            datastore: datastore.to_owned(),
            journal_limit_bytes: 256 << 20,
            journal_limit_percent: None,
            journal_warning: None,
            journal_minimum_bytes: 0,
            history_s: 3600,
            give_up_history: true,
        }],
        former: Vec::new(),
    }
}

pub(super) struct Target {
    vpg: VpgDefinition,
    settings: TargetSettings,
    pub(super) host: Arc<TargetHost>,
    pub(super) address: SocketAddr,
    current: Arc<Mutex<Arc<TargetHost>>>,
    connections: Arc<Mutex<Vec<Connection>>>,
}

impl Target {
    pub(super) async fn start(vpg: &VpgDefinition) -> Self {
        Self::start_with(vpg, SETTINGS).await
    }

    pub(super) async fn start_with(vpg: &VpgDefinition, settings: TargetSettings) -> Self {
        let host = Arc::new(TargetHost::start(settings).expect("started"));
        host.ensure(vpg, vpg.vms[0].id).await.expect("made");
        let mut config = server_config();
        config.transport_config(transport_config());
        let endpoint = Endpoint::server(config, (Ipv4Addr::LOCALHOST, 0).into()).expect("bound");
        let address = endpoint.local_addr().expect("bound");
        let current = Arc::new(Mutex::new(host.clone()));
        let connections = Arc::new(Mutex::new(Vec::new()));
        let source = vpg.vms[0].source.id;
        tokio::spawn(serve(endpoint, source, current.clone(), connections.clone()));
        Self { vpg: vpg.clone(), settings, host, address, current, connections }
    }

    pub(super) fn vm(&self) -> Arc<TargetVm> {
        self.host.vm(self.vpg.vms[0].id).expect("it is there")
    }

    pub(super) fn cut_connections(&self) {
        for connection in self.connections.lock().expect("no panic").drain(..) {
            connection.close(0_u32.into(), b"cut");
        }
    }

    /// Lets the storage fail, and waits until the files are open again.
    pub(super) async fn fail_storage(&self) {
        let vm = self.vm();
        let key = vm.key().expect("open");
        vm.worker().tell(Input::Fail { vm: key, failure: write_failure() });
        wait_until_open(&vm, |now| now != key).await;
    }

    /// Lets the storage fail when a manifest is written next.
    pub(super) fn fail_at_manifest(&self) {
        let vm = self.vm();
        vm.worker().tell(Input::FailAtManifest { vm: vm.key().expect("open") });
    }

    pub(super) async fn wait_open_again(&self) {
        wait_until_open(&self.vm(), |_| true).await;
    }

    pub(super) async fn restart(&mut self) {
        self.cut_connections();
        self.host.shut_down().await;
        let host = Arc::new(TargetHost::start(self.settings).expect("started"));
        host.ensure(&self.vpg, self.vpg.vms[0].id).await.expect("opened");
        *self.current.lock().expect("no panic") = host.clone();
        self.host = host;
    }
}

/// As when an operation on the journal fails.
pub(super) fn write_failure() -> Failure {
    let (verb, purpose, errno) = ("write", Purpose::Append, nix::errno::Errno::EIO);
    Failure::Journal(StorageError { verb, purpose, offset_bytes: 0, errno })
}

async fn wait_until_open(vm: &TargetVm, is_meant: impl Fn(VmKey) -> bool) {
    for _ in 0..600 {
        if vm.key().is_some_and(&is_meant) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("the files are not open again");
}

async fn serve(
    endpoint: Endpoint,
    source: VraId,
    current: Arc<Mutex<Arc<TargetHost>>>,
    connections: Arc<Mutex<Vec<Connection>>>,
) {
    while let Some(incoming) = endpoint.accept().await {
        let Ok(connection) = incoming.await else { continue };
        connections.lock().expect("no panic").push(connection.clone());
        let current = current.clone();
        tokio::spawn(async move {
            while let Ok((send, recv)) = connection.accept_bi().await {
                let host = current.lock().expect("no panic").clone();
                tokio::spawn(async move { host.serve(source, send, recv).await });
            }
        });
    }
}

#[derive(Clone)]
struct SharedRing(Arc<Mutex<PlainRing>>);

impl Retained for SharedRing {
    fn take_ready(&mut self, from_seq: u64, max_bytes: usize, max_records: usize, out: &mut Vec<Record>) {
        self.0.lock().expect("no panic").take_ready(from_seq, max_bytes, max_records, out);
    }

    fn free_through(&mut self, seq: u64) {
        self.0.lock().expect("no panic").free_through(seq);
    }

    fn published_through(&self) -> u64 {
        self.0.lock().expect("no panic").published_through()
    }
}

struct Dialer {
    endpoint: Endpoint,
    address: SocketAddr,
}

impl DataConnector for Dialer {
    async fn open(&self) -> Result<(SendStream, RecvStream), ConnectError> {
        let explain = |error: &dyn std::error::Error| ConnectError(error.to_string());
        let connecting = self.endpoint.connect(self.address, "localhost").map_err(|error| explain(&error))?;
        let connection = connecting.await.map_err(|error| explain(&error))?;
        connection.open_bi().await.map_err(|error| explain(&error))
    }
}

pub(super) type Disks = Vec<Vec<u8>>;

pub(super) struct Source {
    ring: SharedRing,
    doorbell: Arc<Doorbell>,
    shipper: Shipper,
    generation: GenerationId,
    events: tokio::sync::Mutex<tokio::sync::mpsc::UnboundedReceiver<SenderEvent>>,
    /// The disks as the guest sees them.
    disks: Disks,
    pub(super) checkpoints: BTreeMap<u64, Disks>,
    random: u64,
}

impl Source {
    pub(super) fn start(vpg: &VpgDefinition, address: SocketAddr) -> Self {
        let vm = &vpg.vms[0];
        let VmIdentity { volumes, .. } = files::identity(vm).expect("a good definition");
        let disks = volumes.iter().map(|volume| vec![0; volume.size_bytes as usize]).collect();
        let identity = StreamIdentity { vm: vm.id, vpg: vpg.id, journal: vm.journal, volumes };
        let generation = GenerationId::random();
        let start = GenerationStart { generation, ancestors: Vec::new(), first_seq: 1 };
        let ring = SharedRing(Arc::new(Mutex::new(PlainRing::new(1))));
        let doorbell = Arc::new(Doorbell::new());
        let mut endpoint = Endpoint::client((Ipv4Addr::LOCALHOST, 0).into()).expect("bound");
        let mut config = client_config();
        config.transport_config(transport_config());
        endpoint.set_default_client_config(config);
        let (sender, events) = tokio::sync::mpsc::unbounded_channel();
        let shipper = Shipper::start(ShipperParts {
            paused: false,
            sender: Sender::new(
                identity,
                start,
                SenderLimits { retry_slow_us: 500_000, ..SenderLimits::STANDARD },
                7,
            ),
            retained: Box::new(ring.clone()),
            doorbell: doorbell.clone(),
            connector: Dialer { endpoint, address },
            on_event: Box::new(move |event| drop(sender.send(event))),
        });
        let events = tokio::sync::Mutex::new(events);
        let (checkpoints, random) = (BTreeMap::new(), 0x9e37_79b9_7f4a_7c15);
        Self { ring, doorbell, shipper, generation, events, disks, checkpoints, random }
    }

    fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    pub(super) fn published_through(&self) -> u64 {
        self.ring.published_through()
    }

    fn publish(&self, record: impl FnOnce(u64) -> Record) {
        let mut ring = self.ring.0.lock().expect("no panic");
        let seq = ring.published_through() + 1;
        ring.publish(record(seq));
        drop(ring);
        self.doorbell.ring();
    }

    /// Sends the disks as they are, with writes of the guest in between.
    pub(super) fn full_sync(&mut self, sync_id: u64) {
        let sizes: Vec<u64> = self.disks.iter().map(|disk| disk.len() as u64).collect();
        for (volume, &size_bytes) in (0_u16..).zip(&sizes) {
            self.publish(|seq| Record::sync_begin(seq, seq, volume, size_bytes, sync_id));
        }
        for (volume, &size_bytes) in (0_u16..).zip(&sizes) {
            for offset in (0..size_bytes).step_by(256 << 10) {
                let end = size_bytes.min(offset + (256 << 10));
                let data =
                    Bytes::copy_from_slice(&self.disks[usize::from(volume)][offset as usize..end as usize]);
                self.publish(|seq| Record::sync_data(seq, seq, volume, offset, sync_id, data));
                self.random_write();
                self.random_write();
            }
        }
        for (volume, &size_bytes) in (0_u16..).zip(&sizes) {
            self.publish(|seq| Record::sync_end(seq, seq, volume, size_bytes, sync_id));
        }
    }

    pub(super) fn random_write(&mut self) {
        let volume = self.random() as usize % self.disks.len();
        let block = if volume == 0 { 4096 } else { 512 };
        let blocks = self.disks[volume].len() / block;
        let len = (1 + self.random() as usize % 24) * block;
        let offset = self.random() as usize % (blocks - 24) * block;
        let fill = self.random() as u8;
        let range = offset..offset + len;
        if fill.is_multiple_of(8) {
            self.disks[volume][range].fill(0);
            self.publish(|seq| Record::zeroes(seq, seq, volume as u16, offset as u64, len as u64));
        } else {
            self.disks[volume][range].fill(fill);
            let data = Bytes::from(vec![fill; len]);
            self.publish(|seq| Record::write(seq, seq, volume as u16, offset as u64, data));
        }
    }

    pub(super) fn checkpoint(&mut self) {
        self.checkpoint_at(self.published_through());
    }

    /// One whose content is that of the last number before it at which anything was written.
    pub(super) fn checkpoint_at(&mut self, cut: u64) {
        let counter = self.checkpoints.len() as u64 + 1;
        self.checkpoints.insert(counter, self.disks.clone());
        self.publish(|seq| {
            let checkpoint = Checkpoint {
                epoch: Epoch { nonce: Uuid::from_u128(NONCE), counter },
                cut,
                member_set_version: 1,
                time_us: seq * 1000,
                kind: CheckpointKind::Automatic,
                tag: String::new(),
            };
            Record::checkpoint(seq, seq, &checkpoint)
        });
    }

    pub(super) async fn new_generation(&mut self) {
        let ancestors = vec![self.generation];
        self.generation = GenerationId::random();
        let first_seq = 1 << 20;
        self.ring = SharedRing(Arc::new(Mutex::new(PlainRing::new(first_seq))));
        let start = GenerationStart { generation: self.generation, ancestors, first_seq };
        self.shipper.begin_generation(start, Box::new(self.ring.clone())).await;
    }

    pub(super) async fn wait_durable(&self, seq: u64) {
        for _ in 0..600 {
            let status = self.shipper.status();
            if let Phase::Stopped(reason) = &status.phase {
                panic!("the sender stopped: {reason}");
            }
            if status.durable_through >= seq && status.generation == self.generation {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("record {seq} is not durable: {:?}", self.shipper.status());
    }

    pub(super) async fn next_refusal(&self) -> SenderEvent {
        let mut events = self.events.lock().await;
        loop {
            let event = events.recv().await.expect("the shipper runs");
            if matches!(event, SenderEvent::Refused(_) | SenderEvent::Stopped(_)) {
                return event;
            }
        }
    }
}

pub(super) async fn compare(vm: &Arc<TargetVm>, at: PointInTime, expected: &Disks) {
    let OpenedView { view, journal, disks, pin, .. } = vm.open_view(at).await.expect("opened");
    let mut storage = RingStorage::new(16).expect("io_uring");
    let journal = storage.add_file(journal);
    let disks: Vec<_> = disks.into_iter().map(|disk| storage.add_file(disk)).collect();
    for (number, expected) in (0_u16..).zip(expected) {
        let volume = view.volume(number).expect("it was there");
        let mut found = vec![0xee; expected.len()];
        let disk = disks[usize::from(number)];
        for (piece, found) in found.chunks_mut(1 << 20).enumerate() {
            volume
                .read(&mut storage, journal, (piece << 20) as u64, found, |storage, offset, into| {
                    let begin = offset / 4096 * 4096;
                    let len = (offset + into.len() as u64).next_multiple_of(4096) - begin;
                    let page = Blocking::new(storage, disk, Purpose::View).read(begin, len as usize)?;
                    into.copy_from_slice(&page[(offset - begin) as usize..][..into.len()]);
                    Ok(())
                })
                .expect("readable");
        }
        let differs = found.iter().zip(expected).position(|(found, expected)| found != expected);
        assert_eq!(differs, None, "volume {number} differs at {at:?}");
    }
    drop(pin);
}

fn certificate() -> &'static rcgen::CertifiedKey<rcgen::KeyPair> {
    static CERTIFICATE: std::sync::OnceLock<rcgen::CertifiedKey<rcgen::KeyPair>> = std::sync::OnceLock::new();
    CERTIFICATE
        .get_or_init(|| rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate"))
}

pub(crate) fn server_config() -> quinn::ServerConfig {
    let certificate = certificate();
    let key =
        rustls::pki_types::PrivateKeyDer::try_from(certificate.signing_key.serialize_der()).expect("a key");
    quinn::ServerConfig::with_single_cert(vec![certificate.cert.der().clone()], key).expect("a configuration")
}

pub(crate) fn client_config() -> quinn::ClientConfig {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate().cert.der().clone()).expect("a root");
    quinn::ClientConfig::with_root_certificates(Arc::new(roots)).expect("a configuration")
}
