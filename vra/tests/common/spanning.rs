//! VPGs whose VMs are on several source VRAs.

pub mod chain;

use std::time::{Duration, Instant};

use ::vra::api::status::{SourceMode, TargetState};
use ::vra::api::{CheckpointId, CheckpointInfo, DoorAddress, VmId, VpgDefinition, VraStatus};

use super::TestCa;
use super::pair::{DISK_BYTES, apply, checkpoints, definition, door};
use super::vra::{PATIENCE, Vra};

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
        Self::of(sources, targets, change).await
    }

    /// One of these VRAs that streams: a VM for each source, whose journals are on the targets in turn.
    pub async fn of(
        sources: Vec<Vra>,
        targets: Vec<Vra>,
        change: impl FnOnce(&mut VpgDefinition, &[Vra]),
    ) -> Self {
        let (mut doors, mut vms, mut whole) = (Vec::new(), Vec::new(), None::<VpgDefinition>);
        for (number, source) in sources.iter().enumerate() {
            let vm = VmId::random();
            let disk = source.disk("0.raw", DISK_BYTES);
            let volume = source.attach(vm, &format!("vm{number}"), &disk).await;
            doors.push(door(&volume));
            vms.push(vm);
            let mut part = definition(source, &targets[number % targets.len()], &[volume]);
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

    /// Waits until all sources stream and all targets journal.
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
            if Instant::now() >= deadline {
                panic!("no checkpoint comes:\n{}", self.told().await);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// What all VRAs say of themselves, and have logged.
    async fn told(&self) -> String {
        let mut told = String::new();
        for vra in self.sources.iter().chain(&self.targets) {
            told += &format!("{}: {:#?}\n{}\n", vra.id, vra.status().await, vra.log());
        }
        told
    }

    pub async fn wait_until_offered(&self, id: CheckpointId) {
        let deadline = Instant::now() + PATIENCE;
        while !self.offered().await.iter().any(|info| info.id == id) {
            assert!(Instant::now() < deadline, "checkpoint {id} isn't offered");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}
