//! A VPG whose VMs are on three source VRAs and whose journals are on two targets: every checkpoint that all journals hold is one moment.

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ::vra::api::status::{SourceMode, TargetState};
use ::vra::api::{
    CheckpointId, CheckpointInfo, CloseView, DoorAddress, JournalId, PointInTime, Request, ViewMode, VmId,
    VpgDefinition, VraStatus,
};
use common::TestCa;
use common::nbd::NbdClient;
use common::pair::{DISK_BYTES, apply, checkpoints, definition, door, open, open_view, tag};
use common::vra::{PATIENCE, Vra};

/// Each link of the chain has a sector of its own.
const LINK_BYTES: u64 = 512;

/// Links of the chain between two checkpoints at least.
const LEAST_LINKS: u64 = 20;

struct Site {
    sources: Vec<Vra>,
    targets: Vec<Vra>,
    doors: Vec<DoorAddress>,
    vms: Vec<VmId>,
    definition: VpgDefinition,
}

impl Site {
    /// Three sources with a VM each, whose journals are on two targets, streaming.
    async fn streaming(name: &str, ca: &TestCa) -> Self {
        let start = |role: &str, number: usize| Vra::start(&format!("{name}-{role}{number}"), Some(ca));
        let sources: Vec<Vra> = (0..3).map(|number| start("s", number)).collect();
        let targets: Vec<Vra> = (0..2).map(|number| start("t", number)).collect();
        let (mut doors, mut vms, mut whole) = (Vec::new(), Vec::new(), None::<VpgDefinition>);
        for (number, source) in sources.iter().enumerate() {
            let vm = VmId::random();
            let disk = source.disk("0.raw", DISK_BYTES);
            let volume = source.attach(vm, &format!("vm{number}"), &disk).await;
            doors.push(door(&volume));
            vms.push(vm);
            let mut part = definition(source, &targets[number % 2], &[volume]);
            match &mut whole {
                Some(whole) => whole.vms.append(&mut part.vms),
                None => whole = Some(part),
            }
        }
        let mut definition = whole.expect("three parts");
        definition.coordinators = sources.iter().map(|source| source.id).collect();
        let site = Self { sources, targets, doors, vms, definition };
        for vra in site.targets.iter().chain(&site.sources) {
            apply(vra, &site.definition).await;
        }
        site.wait_until_streaming().await;
        site
    }

    async fn wait_until_streaming(&self) {
        for source in &self.sources {
            let streams = |status: &VraStatus| {
                status.source_vms.iter().all(|vm| vm.mode == SourceMode::Streaming && vm.connected)
            };
            source.wait_for("streaming", streams).await;
        }
        for target in &self.targets {
            let journals =
                |status: &VraStatus| status.target_vms.iter().all(|vm| vm.state == TargetState::Journaling);
            target.wait_for("journaling", journals).await;
        }
    }

    /// Checkpoints that all journals hold, in the order of their times.
    async fn offered(&self) -> Vec<CheckpointInfo> {
        let vpg = self.definition.id;
        let (one, other) =
            (checkpoints(&self.targets[0], vpg).await, checkpoints(&self.targets[1], vpg).await);
        let is_there = |info: &CheckpointInfo| other.iter().any(|at| at.id == info.id && at.complete);
        one.into_iter().filter(|info| info.complete && is_there(info)).collect()
    }

    /// Waits until a checkpoint is offered that was taken after a time.
    async fn wait_for_newer(&self, than: u64) -> CheckpointInfo {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let newest = self.offered().await.pop();
            if let Some(newest) = newest.filter(|info| info.time_us.0 > than) {
                return newest;
            }
            assert!(Instant::now() < deadline, "no checkpoint comes:\n{}", self.sources[0].log());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn wait_until_offered(&self, id: CheckpointId) {
        let deadline = Instant::now() + PATIENCE;
        while !self.offered().await.iter().any(|info| info.id == id) {
            assert!(Instant::now() < deadline, "checkpoint {id} isn't offered");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// How far the chain has come at a checkpoint, of which every VM must show its part.
    async fn newest_link(&self, checkpoint: CheckpointId, links: &[usize]) -> u64 {
        let mut disks = BTreeMap::new();
        for target in &self.targets {
            let at = PointInTime::Checkpoint { checkpoint };
            let view = open_view(target, &open(self.definition.id, at, ViewMode::ReadOnly)).await;
            for disk in &view.disks {
                let mut client = NbdClient::connect(&disk.door).expect("a view's door");
                let mut shown = Vec::new();
                for offset_bytes in (0..DISK_BYTES).step_by(1 << 20) {
                    shown.extend(client.read(offset_bytes, 1 << 20).expect("read"));
                }
                disks.insert(disk.vm, shown);
            }
            target.ask(Request::CloseView(CloseView { view: view.view })).await;
        }
        let shows = |link: u64, vm: usize| {
            let at = (link * LINK_BYTES) as usize;
            disks[&self.vms[vm]][at..at + 8] == link.to_le_bytes()
        };
        let numbered = || (1..).zip(links.iter().copied());
        let newest = numbered().filter(|(link, vm)| shows(*link, *vm)).map(|(link, _)| link).last();
        let newest = newest.unwrap_or_default();
        for (link, vm) in numbered().take(newest as usize) {
            assert!(
                shows(link, vm),
                "checkpoint {checkpoint} has link {newest} and not link {link} of VM {vm}"
            );
        }
        newest
    }
}

/// Writes links, each after the answer to the one before, on one VM after the other; gives the VM of each.
fn chain(doors: Vec<DoorAddress>, stop: Arc<AtomicBool>) -> JoinHandle<Vec<usize>> {
    std::thread::spawn(move || {
        let mut clients: Vec<NbdClient> =
            doors.iter().map(|door| NbdClient::connect(door).expect("a disk's door")).collect();
        let mut links = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            let link = links.len() as u64 + 1;
            if (link + 1) * LINK_BYTES > DISK_BYTES {
                break;
            }
            let vm = (link as usize * 7 + link as usize / 5) % clients.len();
            links.push(vm);
            let mut sector = [0; LINK_BYTES as usize];
            sector[..8].copy_from_slice(&link.to_le_bytes());
            clients[vm].write(link * LINK_BYTES, &sector).expect("a guest's write never fails");
            std::thread::sleep(Duration::from_micros(300));
        }
        links
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn every_checkpoint_over_three_hosts_holds_a_beginning_of_the_chain() {
    let ca = TestCa::new();
    let site = Site::streaming("chain", &ca).await;
    let vpg = site.definition.id;
    let first = site.wait_for_newer(0).await;
    let stop = Arc::new(AtomicBool::new(false));
    let writing = chain(site.doors.clone(), Arc::clone(&stop));
    tokio::time::sleep(Duration::from_secs(6)).await;
    // Any source makes one that is asked for.
    let tagged = tag(&site.sources[2], vpg, "by hand").await;
    assert_eq!(tagged.vms.len(), 3);
    stop.store(true, Ordering::Relaxed);
    let links = writing.join().expect("the chain was written");
    site.wait_until_offered(tagged.id).await;

    let offered: Vec<CheckpointInfo> =
        site.offered().await.into_iter().filter(|info| info.time_us >= first.time_us).collect();
    assert!(offered.len() >= 4, "{offered:?}");
    assert!(offered.iter().any(|info| info.tag.as_deref() == Some("by hand")));
    let mut newest = Vec::new();
    for info in offered.iter().rev().take(8).rev() {
        newest.push(site.newest_link(info.id, &links).await);
    }
    let automatic = newest.windows(2).filter(|pair| pair[1] >= pair[0] + LEAST_LINKS).count();
    assert!(automatic >= 3, "the chain came to {newest:?} at the checkpoints");

    let coordinator = site.sources[0].status().await;
    let status = &coordinator.vpgs[0];
    assert_eq!((status.coordinator, status.missing.len()), (Some(site.sources[0].id), 0));
    assert!(status.last_checkpoint.is_some() && status.hold.count > 0, "{status:?}");
    let held = &site.sources[1].status().await.source_vms[0].hold;
    assert!(0 < held.median_us && held.median_us <= held.p99_us && held.p99_us <= held.max_us, "{held:?}");
    println!("{} links, holds of the second source: {held:?}", links.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_member_there_is_no_checkpoint_and_whoever_is_next_says_so() {
    let ca = TestCa::new();
    let mut site = Site::streaming("missing", &ca).await;
    let before = site.wait_for_newer(0).await;
    for dead in [2, 0] {
        let next = if dead == 0 { 1 } else { 0 };
        site.sources[dead].kill();
        let is_named = |status: &VraStatus| {
            status.alerts.iter().any(|alert| {
                alert.code == "group-member-missing" && alert.message.contains(&format!("vm{dead}"))
            })
        };
        let status = site.sources[next].wait_for("an alert", is_named).await;
        assert_eq!(status.vpgs[0].coordinator, Some(site.sources[next].id));
        assert_eq!(status.vpgs[0].missing, [site.sources[dead].id]);
        let refused = site.sources[next].refusal(Request::TagCheckpoint(::vra::api::TagCheckpoint {
            vpg: site.definition.id,
            tag: "without it".to_owned(),
        }));
        let refused = refused.await;
        assert!(refused.message.contains("doesn't answer") && refused.remedy.is_some(), "{refused}");
        let newest = site.offered().await.pop().expect("older ones stay");
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(site.offered().await.pop().map(|info| info.id), Some(newest.id));
        site.sources[dead].serve();
        site.wait_until_streaming().await;
        let newer = site.wait_for_newer(newest.time_us.0.max(before.time_us.0)).await;
        assert_ne!(newer.id, newest.id);
        site.sources[next].wait_for("no alert", |status| !is_named(status)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_definition_that_names_coordinators_wrongly_is_refused() {
    let ca = TestCa::new();
    let vra = Vra::start("coordinators", Some(&ca));
    let volume = vra.attach(VmId::random(), "db", &vra.disk("0.raw", DISK_BYTES)).await;
    let mut wrong = definition(&vra, &vra, &[volume]);
    wrong.vms[0].journal = JournalId::random();
    wrong.coordinators = vec![::vra::api::VraId::random()];
    let error = vra.refusal(Request::ApplyVpg(wrong)).await;
    assert!(error.message.contains("is not a source VRA of it"), "{error}");
}
