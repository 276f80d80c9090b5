//! A VRA that only says that it does what it is told: the link, certificates and answers are real, disks and journals are not.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use ::vra::api::status::{
    HoldTimes, HostInfo, LastCheckpoint, Rpo, SourceMode, SourceVmStatus, TargetState, TargetVmStatus,
    VpgStatus,
};
use ::vra::api::vpg::{CheckpointKind, CheckpointPlace, VmDefinition, VpgApplied};
use ::vra::api::{
    ApiError, CheckpointId, CheckpointInfo, CheckpointPage, ErrorCode, GenerationId, GuestsFrozen,
    HelloReply, ListCheckpoints, Request, Response, TimeUs, VmId, VolumeId, VolumeInfo, VpgDefinition, VpgId,
    VraId, VraStatus,
};
use ::vra::control::{Caller, Handler, serve_stream};
use ::vra::link::{Link, LinkSettings, StreamKind};
use ::vra::pki::{Credentials, Trust};

/// Checkpoints that each group has.
const CHECKPOINTS: u64 = 1_000;

/// Asks for all checkpoints of a group that is to be named.
const ALL: ListCheckpoints = ListCheckpoints {
    vpg: VpgId(uuid::Uuid::nil()),
    vm: None,
    from_us: None,
    to_us: None,
    tagged: false,
    newest_first: true,
    by_cut: false,
    after: None,
    limit: 0,
};

/// One of them.
pub(crate) struct SimulatedVra {
    id: VraId,
    name: String,
    /// What it serves as a source.
    volumes: Vec<VolumeInfo>,
    vpgs: Mutex<BTreeMap<VpgId, VpgDefinition>>,
    /// Checkpoints that it has locked.
    locked: Mutex<BTreeSet<CheckpointId>>,
    /// It locks checkpoints, and doesn't answer in time.
    is_slow_to_lock: AtomicBool,
}

impl SimulatedVra {
    /// One that serves a disk of each of these VMs.
    pub(crate) fn new(id: VraId, name: &str, vms: &[(VmId, String, PathBuf)]) -> Arc<Self> {
        let volume = |(vm, vm_name, path): &(VmId, String, PathBuf)| VolumeInfo {
            volume: VolumeId(vm.0),
            vm: *vm,
            vm_name: vm_name.clone(),
            number: 0,
            path: path.clone(),
            size_bytes: 64 << 30,
            grown_bytes: None,
            logical_block_bytes: 512,
            vpg: None,
            door: None,
            link: None,
            problem: None,
            shared: None,
        };
        let volumes = vms.iter().map(volume).collect();
        Arc::new(Self {
            id,
            name: name.to_owned(),
            volumes,
            vpgs: Mutex::default(),
            locked: Mutex::default(),
            is_slow_to_lock: AtomicBool::default(),
        })
    }

    /// Answers the manager, for as long as the runtime is there. Must be called inside it.
    pub(crate) fn serve(self: &Arc<Self>, port: u16, credentials: Credentials) {
        let listen = ([127, 0, 0, 1], port).into();
        let bound = Link::bind(&LinkSettings { listen }, credentials, Trust::default());
        let (link, mut accepted) = bound.expect("a port");
        let vra = Arc::clone(self);
        tokio::spawn(async move {
            let _link = link;
            while let Some(mut stream) = accepted.recv().await {
                let (StreamKind::Control, Some(zvm)) = (stream.kind, stream.peer.identity.as_zvm()) else {
                    continue;
                };
                let vra = Arc::clone(&vra);
                tokio::spawn(async move {
                    let _ = serve_stream(&mut stream.recv, &mut stream.send, Caller::Zvm(zvm), &*vra).await;
                });
            }
        });
    }

    /// From now on it does what it is told with checkpoints' locks and says so too late, or in time again.
    #[allow(dead_code, reason = "each test binary uses a part of it")]
    pub(crate) fn be_slow_to_lock(&self, is_slow: bool) {
        self.is_slow_to_lock.store(is_slow, Ordering::Relaxed);
    }

    /// Checkpoints that it has locked.
    pub(crate) fn locked(&self) -> MutexGuard<'_, BTreeSet<CheckpointId>> {
        self.locked.lock().expect("no code panics while it holds this lock")
    }

    fn vpgs(&self) -> MutexGuard<'_, BTreeMap<VpgId, VpgDefinition>> {
        self.vpgs.lock().expect("no code panics while it holds this lock")
    }

    fn status(&self) -> VraStatus {
        let now_us = TimeUs::now();
        let vpgs = self.vpgs();
        let members = |is_here: fn(&VmDefinition) -> VraId| {
            vpgs.values()
                .flat_map(|vpg| vpg.vms.iter().map(move |vm| (vpg, vm)))
                .filter(move |(_, vm)| is_here(vm) == self.id)
        };
        VraStatus {
            vra: self.id,
            name: self.name.clone(),
            version: "1".into(),
            now_us,
            started_us: TimeUs(1),
            host: HostInfo { hostname: self.name.clone(), kernel: "6.12".into(), ublk_features: None },
            site: None,
            site_keys: Vec::new(),
            awaits_site_key: false,
            guest_agents: Vec::new(),
            volumes: self.volumes.clone(),
            vpgs: vpgs.values().map(|vpg| vpg_status(vpg, now_us)).collect(),
            source_vms: members(|vm| vm.source.id).map(|(vpg, vm)| source_vm(vpg, vm)).collect(),
            target_vms: members(|vm| vm.target.id).map(|(vpg, vm)| target_vm(vpg, vm, now_us)).collect(),
            views: Vec::new(),
            alerts: Vec::new(),
        }
    }

    fn checkpoints(&self, asked: &ListCheckpoints) -> CheckpointPage {
        let vpgs = self.vpgs();
        let now_s = TimeUs::now().0 / 1_000_000;
        let newest = now_s.saturating_sub(asked.after.map_or(0, |after| now_s + 1 - after.counter));
        let vms: Vec<VmId> = vpgs
            .get(&asked.vpg)
            .map(|vpg| vpg.vms.iter().filter(|vm| vm.target.id == self.id).map(|vm| vm.id).collect())
            .unwrap_or_default();
        let from = asked.from_us.map_or(0, |from| from.0 / 1_000_000);
        let to = asked.to_us.map_or(newest, |to| newest.min(to.0 / 1_000_000));
        let last = from.max(now_s - CHECKPOINTS);
        let all = (last..=to).rev().take(asked.limit as usize);
        let info = |counter: u64| CheckpointInfo {
            id: CheckpointId { nonce: 1, counter },
            time_us: TimeUs(counter * 1_000_000),
            kind: CheckpointKind::Automatic,
            tag: None,
            member_set_version: 1,
            complete: true,
            locked: self.locked().contains(&CheckpointId { nonce: 1, counter }),
            partly_locked: false,
            vms: vms.iter().map(|vm| CheckpointPlace { vm: *vm, cut: counter }).collect(),
        };
        let checkpoints: Vec<CheckpointInfo> = all.map(info).collect();
        let next = checkpoints.last().map(|oldest| oldest.id).filter(|oldest| oldest.counter > last);
        CheckpointPage { checkpoints, total: CHECKPOINTS, next }
    }
}

impl Handler for SimulatedVra {
    async fn handle(&self, _: Caller, request: Request) -> Result<Response, ApiError> {
        Ok(match request {
            Request::Hello(_) => Response::Hello(HelloReply {
                protocol: 1,
                vra: self.id,
                name: self.name.clone(),
                version: "1".into(),
                features: Vec::new(),
            }),
            Request::Status => Response::Status(Box::new(self.status())),
            Request::List => Response::Volumes(self.volumes.clone()),
            Request::ApplyVpg(definition) => {
                let applied = VpgApplied {
                    vpg: definition.id,
                    revision: definition.revision,
                    source_vms: Vec::new(),
                    target_vms: Vec::new(),
                    missing_volumes: Vec::new(),
                };
                self.vpgs().insert(definition.id, definition);
                Response::Vpg(applied)
            }
            Request::ListCheckpoints(asked) => Response::Checkpoints(self.checkpoints(&asked)),
            Request::LockCheckpoint(lock) => {
                match lock.locked {
                    true => _ = self.locked().insert(lock.checkpoint),
                    false => _ = self.locked().remove(&lock.checkpoint),
                }
                if self.is_slow_to_lock.load(Ordering::Relaxed) {
                    tokio::time::sleep(Duration::from_secs(60)).await;
                }
                let asked = ListCheckpoints { vpg: lock.vpg, limit: u32::MAX, ..ALL };
                let found = self.checkpoints(&asked).checkpoints.into_iter();
                let mut found = found.filter(|info| info.id == lock.checkpoint);
                Response::Checkpoint(found.next().ok_or_else(|| {
                    ApiError::new(ErrorCode::NotFound, format!("there is no checkpoint {}", lock.checkpoint))
                })?)
            }
            // The first VM that it serves has an agent.
            Request::FreezeGuests(_) | Request::ThawGuests(_) => {
                let mut vms = self.volumes.iter().map(|volume| volume.vm);
                Response::Guests(GuestsFrozen {
                    frozen: vms.next().into_iter().collect(),
                    without_agent: vms.collect(),
                })
            }
            Request::TagCheckpoint(tag) => Response::Checkpoint(CheckpointInfo {
                id: CheckpointId { nonce: 2, counter: 1 },
                time_us: TimeUs::now(),
                kind: if tag.application { CheckpointKind::Application } else { CheckpointKind::Tagged },
                tag: Some(tag.tag),
                member_set_version: 1,
                complete: false,
                locked: false,
                partly_locked: false,
                vms: Vec::new(),
            }),
            Request::SetTrust(_) => Response::Done,
            _ => return Err(ApiError::new(ErrorCode::Unsupported, "a simulated VRA doesn't do that")),
        })
    }
}

fn vpg_status(vpg: &VpgDefinition, now_us: TimeUs) -> VpgStatus {
    let id = CheckpointId { nonce: 1, counter: now_us.0 / 1_000_000 };
    VpgStatus {
        vpg: vpg.id,
        name: vpg.name.clone(),
        revision: vpg.revision,
        stamp: vpg.stamp(),
        last_checkpoint: Some(LastCheckpoint { id, time_us: now_us, tag: None }),
        held_checkpoint: Some(LastCheckpoint { id, time_us: now_us, tag: None }),
        checkpoint_count: CHECKPOINTS,
        aborted_epochs: 0,
        coordinator: None,
        missing: Vec::new(),
        last_failure: None,
        hold: HoldTimes::default(),
    }
}

fn source_vm(vpg: &VpgDefinition, vm: &VmDefinition) -> SourceVmStatus {
    SourceVmStatus {
        vm: vm.id,
        name: vm.name.clone(),
        vpg: vpg.id,
        target: vm.target.id,
        mode: SourceMode::Streaming,
        connected: true,
        generation: GenerationId::random(),
        last_sequence: 1_000_000,
        durable_through: 1_000_000,
        rpo: Rpo::default(),
        sync: None,
        retained_bytes: 0,
        retained_limit_bytes: 32 << 20,
        sent_bytes: 1 << 40,
        hold: HoldTimes::default(),
        local_errors: 0,
    }
}

fn target_vm(vpg: &VpgDefinition, vm: &VmDefinition, now_us: TimeUs) -> TargetVmStatus {
    TargetVmStatus {
        vm: vm.id,
        name: vm.name.clone(),
        vpg: vpg.id,
        source: vm.source.id,
        state: TargetState::Journaling,
        connected: true,
        journal: vm.journal,
        generation: None,
        durable_through: 1_000_000,
        history_from_us: Some(TimeUs(now_us.0 - CHECKPOINTS * 1_000_000)),
        history_to_us: Some(now_us),
        checkpoint_count: CHECKPOINTS,
        journal_used_bytes: 1 << 30,
        journal_limit_bytes: vm.journal_limit(),
        write_rate_bytes_per_s: 1 << 20,
        reachable_history_s: Some(86_400),
        limit_reached_in_s: None,
        site_key: None,
        scrub: None,
        received_bytes: 1 << 40,
        folder: vm.datastore.clone(),
    }
}
