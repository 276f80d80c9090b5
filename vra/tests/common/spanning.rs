//! VPGs whose VMs are on several source VRAs, and an application that spans them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ::vra::api::status::{SourceMode, TargetState};
use ::vra::api::{
    CheckpointId, CheckpointInfo, CloseView, DoorAddress, PointInTime, Request, ViewMode, VmId,
    VpgDefinition, VraStatus,
};

use super::TestCa;
use super::nbd::NbdClient;
use super::pair::{DISK_BYTES, apply, checkpoints, definition, door, open, open_view};
use super::vra::{PATIENCE, Vra};

/// Each link of the chain has a sector of its own.
const LINK_BYTES: u64 = 512;

/// Three sources with a VM each, whose journals are on two targets.
pub struct Site {
    pub sources: Vec<Vra>,
    pub targets: Vec<Vra>,
    pub doors: Vec<DoorAddress>,
    pub vms: Vec<VmId>,
    pub definition: VpgDefinition,
}

impl Site {
    /// One that streams, after `change` has had its way with the definition.
    pub async fn streaming(name: &str, ca: &TestCa, change: impl FnOnce(&mut VpgDefinition, &[Vra])) -> Self {
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
        change(&mut definition, &sources);
        let site = Self { sources, targets, doors, vms, definition };
        for vra in site.targets.iter().chain(&site.sources) {
            apply(vra, &site.definition).await;
        }
        site.wait_until_streaming().await;
        site
    }

    pub async fn wait_until_streaming(&self) {
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
    pub async fn offered(&self) -> Vec<CheckpointInfo> {
        let vpg = self.definition.id;
        let (one, other) =
            (checkpoints(&self.targets[0], vpg).await, checkpoints(&self.targets[1], vpg).await);
        let is_there = |info: &CheckpointInfo| other.iter().any(|at| at.id == info.id && at.complete);
        one.into_iter().filter(|info| info.complete && is_there(info)).collect()
    }

    /// Waits until a checkpoint is offered that was taken after a time.
    pub async fn wait_for_newer(&self, than: u64) -> CheckpointInfo {
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

    pub async fn wait_until_offered(&self, id: CheckpointId) {
        let deadline = Instant::now() + PATIENCE;
        while !self.offered().await.iter().any(|info| info.id == id) {
            assert!(Instant::now() < deadline, "checkpoint {id} isn't offered");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// How far the chain has come at a checkpoint, of which every VM must show its part.
    pub async fn newest_link(&self, checkpoint: CheckpointId, links: &[usize]) -> u64 {
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
pub fn chain(doors: Vec<DoorAddress>, stop: Arc<AtomicBool>, pause: Duration) -> JoinHandle<Vec<usize>> {
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
            std::thread::sleep(pause);
        }
        links
    })
}
