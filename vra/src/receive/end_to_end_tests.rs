//! From a ring of records over real QUIC into real files, and back out as views.

use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use journal::batch::{Checkpoint, CheckpointKind, Epoch, Record};
use journal::storage::ring::RingStorage;
use journal::storage::{Blocking, Purpose};
use quinn::{Connection, Endpoint, RecvStream, SendStream};
use uuid::Uuid;

use super::*;
use crate::api::vpg::{VmDefinition, VolumeDefinition, VpgDefinition, VraEndpoint};
use crate::api::{CheckpointId, GenerationId, JournalId, VmId, VolumeId, VpgId, VraId, view::PointInTime};
use crate::link::transport_config;
use crate::receive::worker::Input;
use crate::ship::shell::{ConnectError, DataConnector, Shipper, ShipperParts};
use crate::ship::{
    Doorbell, GenerationStart, Phase, PlainRing, Retained, Sender, SenderEvent, SenderLimits, StreamIdentity,
};
use crate::view::test_guest::Guest;
use crate::view::{Freshness, ViewDisk, ViewSettings, ViewSource};

const DISK_BYTES: u64 = 8 << 20;
const NONCE: u128 = 0xfeed;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_is_what_every_checkpoint_shows() {
    let datastore = Datastore::new("checkpoints");
    let vpg = definition(&datastore.0, 2);
    let mut target = Target::start(&vpg).await;
    let mut source = Source::start(&vpg, target.address);

    source.full_sync(1);
    let sync_end = source.published_through();
    source.wait_durable(sync_end).await;
    assert_eq!(target.vm().status().state, crate::api::status::TargetState::Journaling);

    for round in 0..6 {
        for _ in 0..200 {
            source.random_write();
        }
        source.checkpoint();
        match round {
            1 => target.cut_connections(),
            3 => target.restart().await,
            _ => {}
        }
    }
    source.wait_durable(source.published_through()).await;
    assert_eq!(target.vm().checkpoints().await.expect("open").len(), 6);
    assert_eq!(target.vm().status().checkpoint_count, 6);
    for (counter, disks) in source.checkpoints.clone() {
        let checkpoint = CheckpointId { nonce: NONCE, counter };
        compare(&target.vm(), PointInTime::Checkpoint { checkpoint }, &disks).await;
    }

    // A source that restarts has no checkpoint to lose: the history stays, the sync goes through the journal.
    source.new_generation().await;
    source.full_sync(2);
    for _ in 0..50 {
        source.random_write();
    }
    source.checkpoint();
    source.wait_durable(source.published_through()).await;
    target.restart().await;
    assert_eq!(target.vm().checkpoints().await.expect("open").len(), 7);
    for (counter, disks) in source.checkpoints.clone() {
        let checkpoint = CheckpointId { nonce: NONCE, counter };
        compare(&target.vm(), PointInTime::Checkpoint { checkpoint }, &disks).await;
    }
    target.host.delete(target.vm().id()).await.expect("deleted");
    assert_eq!(fs::read_dir(&datastore.0).expect("datastore").count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stranger_and_a_wrong_journal_are_refused() {
    let datastore = Datastore::new("stranger");
    let vpg = definition(&datastore.0, 1);
    let target = Target::start(&vpg).await;
    let refused = |vpg: VpgDefinition| async move {
        let source = Source::start(&vpg, target.address);
        let event = source.next_refusal().await;
        format!("{event:?}")
    };
    let mut other = vpg.clone();
    other.vms[0].journal = JournalId::random();
    assert!(refused(other).await.contains("JournalDiffers"));
    let mut other = vpg.clone();
    other.vms[0].id = VmId::random();
    assert!(refused(other).await.contains("UnknownVm"));
    let mut other = vpg.clone();
    other.vms[0].volumes[0].size_bytes *= 2;
    assert!(refused(other).await.contains("VolumesDiffer"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_that_do_not_fit_are_named() {
    let datastore = Datastore::new("misfit");
    let vpg = definition(&datastore.0, 1);
    let vm = vpg.vms[0].id;
    let host = TargetHost::start(SETTINGS).expect("started");
    let target = host.ensure(&vpg, vm).await.expect("made");
    let folder = target.folder().clone();
    host.close(vm).await.expect("closed");

    let mut other = vpg.clone();
    other.vms[0].journal = JournalId::random();
    let error = host.ensure(&other, vm).await.err().expect("another journal").to_string();
    assert!(error.contains("journal.hfj is journal"), "{error}");

    // The journal of another VM.
    let mut other = definition(&datastore.0, 1);
    other.vms[0].journal = vpg.vms[0].journal;
    let stranger = other.vms[0].id;
    host.ensure(&other, stranger).await.expect("made");
    let place = host.close(stranger).await.expect("closed");
    fs::copy(folder.journal(), place.journal()).expect("copied");
    let error = error_chain(&host.ensure(&other, stranger).await.err().expect("another VM's"));
    assert!(error.contains(&vm.to_string()) && error.contains(&stranger.to_string()), "{error}");

    let error = host.ensure(&definition(&datastore.0.join("nowhere"), 1), VmId::random()).await.err();
    assert!(error.expect("no such VM").to_string().contains("not in the group"));
    let missing = definition(&datastore.0.join("nowhere"), 1);
    let error = host.ensure(&missing, missing.vms[0].id).await.err().expect("no datastore").to_string();
    assert!(error.contains("nowhere is not there"), "{error}");

    // A newer format.
    let mut bytes = fs::read(folder.journal()).expect("journal");
    for superblock in [0, 64 << 10] {
        bytes[superblock + 8] = 99;
    }
    fs::write(folder.journal(), bytes).expect("changed");
    let error = error_chain(&host.ensure(&vpg, vm).await.err().expect("newer"));
    assert!(error.contains("99") && error.contains("newer release"), "{error}");
}

/// VMs made from one template can have ids that begin alike; a VM that was renamed keeps its folder.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ids_that_begin_alike_are_told_apart() {
    let datastore = Datastore::new("alike");
    let mut vpg = definition(&datastore.0, 1);
    let mut twin = definition(&datastore.0, 1).vms.remove(0);
    let mut bytes = vpg.vms[0].id.0.into_bytes();
    bytes[15] ^= 1;
    twin.id = VmId(Uuid::from_bytes(bytes));
    twin.name = "twin".into();
    vpg.vms.push(twin.clone());
    let host = TargetHost::start(SETTINGS).expect("started");
    let first = host.ensure(&vpg, vpg.vms[0].id).await.expect("made");
    let second = host.ensure(&vpg, twin.id).await.expect("made beside the other");
    assert_ne!(first.folder().path(), second.folder().path());
    let place = host.close(twin.id).await.expect("closed");
    vpg.vms[1].name = "renamed".into();
    let again = host.ensure(&vpg, twin.id).await.expect("found again");
    assert_eq!(again.folder().path(), place.path());
}

/// A failure of the storage makes the journal move its newest segment, and the places that it lay in are used again while the view is open.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_view_outlives_a_failure_of_the_storage() {
    let datastore = Datastore::new("view-failure");
    let vpg = definition(&datastore.0, 1);
    let target = Target::start(&vpg).await;
    let mut source = Source::start(&vpg, target.address);
    source.full_sync(1);
    for _ in 0..50 {
        source.random_write();
    }
    source.checkpoint();
    source.wait_durable(source.published_through()).await;

    let checkpoint = CheckpointId { nonce: NONCE, counter: 1 };
    let opened = target.vm().open_view(PointInTime::Checkpoint { checkpoint }).await.expect("opened");
    let (disk, pin) = view_disk(opened);
    pin.shows(&disk).expect("nothing has failed");
    let as_it_was = &source.checkpoints[&1][0].clone();
    Guest::new(&disk, 2, 1).compare(as_it_was);

    // One that is being opened meanwhile is not served by places that may be old.
    let between = target.vm().open_view(PointInTime::Checkpoint { checkpoint }).await.expect("opened");
    target.fail_storage().await;
    let (late, late_pin) = view_disk(between);
    let refused = late_pin.shows(&late).expect_err("the journal was opened anew meanwhile");
    assert!(matches!(refused, TargetError::NotOpen { .. }), "{refused}");
    // More than all slots that there were.
    for _ in 0..1500 {
        source.random_write();
    }
    source.wait_durable(source.published_through()).await;
    Guest::new(&disk, 2, 2).compare(as_it_was);
    assert_eq!((disk.first_damage(), disk.is_gone()), (None, false));
}

fn view_disk(opened: OpenedView) -> (Arc<ViewDisk>, Arc<Pin>) {
    let OpenedView { mut view, journal, mut disks, pin } = opened;
    let pin = Arc::new(pin);
    let file = |file: &journal::storage::ring::DirectFile| file.file().try_clone().expect("a descriptor");
    let source = ViewSource {
        seq: view.seq(),
        volume: view.take_volume(0).expect("it was there"),
        journal: file(&journal),
        recovery_disk: file(&disks.remove(0)),
        freshness: Freshness::Superblock,
        keep: Box::new(Arc::clone(&pin)),
    };
    let settings = ViewSettings { logical_block_bytes: 512, look_for_holes: false };
    (ViewDisk::new(source, settings, None).expect("a view"), pin)
}

const SETTINGS: TargetSettings =
    TargetSettings { worker_count: 1, memory_bytes: 64 << 20, window_bytes: 16 << 20 };

struct Datastore(PathBuf);

impl Datastore {
    fn new(name: &str) -> Self {
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

fn definition(datastore: &std::path::Path, volumes: u16) -> VpgDefinition {
    let volume = |number| VolumeDefinition {
        id: VolumeId::random(),
        number,
        // The last page of the second disk is not whole.
        size_bytes: DISK_BYTES - u64::from(number) * 512,
        logical_block_bytes: if number == 0 { 4096 } else { 512 },
        source_path: "/dev/null".into(),
    };
    let endpoint = || VraEndpoint { id: VraId::random(), address: "127.0.0.1:1".into() };
    VpgDefinition {
        id: VpgId::random(),
        name: "group".into(),
        revision: 1,
        member_set_version: 1,
        checkpoint_interval_ms: 1000,
        hold_deadline_ms: 100,
        vms: vec![VmDefinition {
            id: VmId::random(),
            name: "machine".into(),
            journal: JournalId::random(),
            volumes: (0..volumes).map(volume).collect(),
            source: endpoint(),
            target: endpoint(),
            datastore: datastore.to_owned(),
            journal_limit_bytes: 256 << 20,
            history_s: 3600,
            give_up_history: true,
        }],
    }
}

struct Target {
    vpg: VpgDefinition,
    host: Arc<TargetHost>,
    address: SocketAddr,
    current: Arc<Mutex<Arc<TargetHost>>>,
    connections: Arc<Mutex<Vec<Connection>>>,
}

impl Target {
    async fn start(vpg: &VpgDefinition) -> Self {
        let host = Arc::new(TargetHost::start(SETTINGS).expect("started"));
        host.ensure(vpg, vpg.vms[0].id).await.expect("made");
        let mut config = server_config();
        config.transport_config(transport_config());
        let endpoint = Endpoint::server(config, (Ipv4Addr::LOCALHOST, 0).into()).expect("bound");
        let address = endpoint.local_addr().expect("bound");
        let current = Arc::new(Mutex::new(host.clone()));
        let connections = Arc::new(Mutex::new(Vec::new()));
        let source = vpg.vms[0].source.id;
        tokio::spawn(serve(endpoint, source, current.clone(), connections.clone()));
        Self { vpg: vpg.clone(), host, address, current, connections }
    }

    fn vm(&self) -> Arc<TargetVm> {
        self.host.vm(self.vpg.vms[0].id).expect("it is there")
    }

    fn cut_connections(&self) {
        for connection in self.connections.lock().expect("no panic").drain(..) {
            connection.close(0_u32.into(), b"cut");
        }
    }

    /// Lets the storage fail, and waits until the files are open again.
    async fn fail_storage(&self) {
        let vm = self.vm();
        let key = vm.key().expect("open");
        vm.worker().tell(Input::Fail { vm: key });
        for _ in 0..600 {
            if vm.key().is_some_and(|now| now != key) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("the files are not open again");
    }

    async fn restart(&mut self) {
        self.cut_connections();
        self.host.shut_down().await;
        let host = Arc::new(TargetHost::start(SETTINGS).expect("started"));
        host.ensure(&self.vpg, self.vpg.vms[0].id).await.expect("opened");
        *self.current.lock().expect("no panic") = host.clone();
        self.host = host;
    }
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

type Disks = Vec<Vec<u8>>;

struct Source {
    ring: SharedRing,
    doorbell: Arc<Doorbell>,
    shipper: Shipper,
    generation: GenerationId,
    events: tokio::sync::Mutex<tokio::sync::mpsc::UnboundedReceiver<SenderEvent>>,
    /// The disks as the guest sees them.
    disks: Disks,
    checkpoints: BTreeMap<u64, Disks>,
    random: u64,
}

impl Source {
    fn start(vpg: &VpgDefinition, address: SocketAddr) -> Self {
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
            sender: Sender::new(identity, start, SenderLimits::STANDARD, 7),
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

    fn published_through(&self) -> u64 {
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
    fn full_sync(&mut self, sync_id: u64) {
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

    fn random_write(&mut self) {
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

    fn checkpoint(&mut self) {
        let counter = self.checkpoints.len() as u64 + 1;
        self.checkpoints.insert(counter, self.disks.clone());
        self.publish(|seq| {
            let checkpoint = Checkpoint {
                epoch: Epoch { nonce: Uuid::from_u128(NONCE), counter },
                cut: seq - 1,
                member_set_version: 1,
                time_us: seq,
                kind: CheckpointKind::Automatic,
                tag: String::new(),
            };
            Record::checkpoint(seq, seq, &checkpoint)
        });
    }

    async fn new_generation(&mut self) {
        let ancestors = vec![self.generation];
        self.generation = GenerationId::random();
        let first_seq = 1 << 20;
        self.ring = SharedRing(Arc::new(Mutex::new(PlainRing::new(first_seq))));
        let start = GenerationStart { generation: self.generation, ancestors, first_seq };
        self.shipper.begin_generation(start, Box::new(self.ring.clone())).await;
    }

    async fn wait_durable(&self, seq: u64) {
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

    async fn next_refusal(&self) -> SenderEvent {
        let mut events = self.events.lock().await;
        loop {
            let event = events.recv().await.expect("the shipper runs");
            if matches!(event, SenderEvent::Refused(_) | SenderEvent::Stopped(_)) {
                return event;
            }
        }
    }
}

async fn compare(vm: &Arc<TargetVm>, at: PointInTime, expected: &Disks) {
    let OpenedView { view, journal, disks, pin } = vm.open_view(at).await.expect("opened");
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

fn server_config() -> quinn::ServerConfig {
    let certificate = certificate();
    let key =
        rustls::pki_types::PrivateKeyDer::try_from(certificate.signing_key.serialize_der()).expect("a key");
    quinn::ServerConfig::with_single_cert(vec![certificate.cert.der().clone()], key).expect("a configuration")
}

fn client_config() -> quinn::ClientConfig {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate().cert.der().clone()).expect("a root");
    quinn::ClientConfig::with_root_certificates(Arc::new(roots)).expect("a configuration")
}
