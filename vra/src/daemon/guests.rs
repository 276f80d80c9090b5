//! Freezing guests for checkpoints, and seeing to it that they are thawed (D5).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::{Daemon, Finding, lock};
use crate::api::guest::{FreezeGuests, GuestsFrozen, SetGuestAgent, ThawGuests};
use crate::api::vpg::VmDefinition;
use crate::api::{ApiError, ErrorCode, Severity, VmId, VpgDefinition, VpgId};
use crate::checkpoint::Freeze;
use crate::config::StoreError;
use crate::guest::{AgentError, FrozenGuest, FrozenGuests, Guard, GuestAgent, LONGEST_FREEZE};
use crate::report::chain;

/// Longest that a guest may take to write out what is dirty and be frozen.
const FREEZE_WITHIN: Duration = Duration::from_secs(5);

/// Longest that it may take to be thawed before its guard sees to it.
const THAW_WITHIN: Duration = Duration::from_secs(2);

/// So long before its guard thaws it a guest isn't taken for frozen any more.
const MARGIN: Duration = Duration::from_millis(500);

/// Limits of [`FreezeGuests::limit_ms`].
const LIMIT_MS: std::ops::RangeInclusive<u32> = 500..=LONGEST_FREEZE.as_millis() as u32;

/// How long a guest that was left frozen is tried to be thawed before that is told. Its VM may have been stopped: then nobody answers any more.
const TELL_AFTER: Duration = Duration::from_secs(10);
const TRY_EVERY: Duration = Duration::from_secs(1);

/// The guests of this host's VMs.
pub(super) struct Guests {
    list: FrozenGuests,
    freezes: Mutex<BTreeMap<VmId, Freeze>>,
    frozen: Mutex<BTreeMap<VpgId, FrozenVpg>>,
    /// Guests that couldn't be thawed, since when.
    stuck: Mutex<BTreeMap<VmId, Instant>>,
    /// Held while guests are frozen or thawed.
    changing: tokio::sync::Mutex<()>,
}

/// The guests of a VPG that are frozen together.
struct FrozenVpg {
    vms: Vec<FrozenVm>,
    without_agent: Vec<VmId>,
    until: Instant,
}

struct FrozenVm {
    vm: VmId,
    socket: PathBuf,
    guard: Guard,
}

/// Why a guest isn't frozen.
#[derive(Debug, thiserror::Error)]
enum FreezeError {
    #[error(transparent)]
    Agent(#[from] AgentError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("cannot start the process that would thaw it")]
    Guard(#[source] std::io::Error),
}

impl Guests {
    /// With what a former daemon left.
    pub(super) fn open(folder: &Path) -> Result<Self, StoreError> {
        Ok(Self {
            list: FrozenGuests::open(folder)?,
            freezes: Mutex::default(),
            frozen: Mutex::default(),
            stuck: Mutex::default(),
            changing: tokio::sync::Mutex::default(),
        })
    }

    /// Whether a VM's guest is frozen, for its checkpoints.
    pub(super) fn freeze_of(&self, vm: VmId, has_agent: bool) -> Freeze {
        let freeze = lock(&self.freezes).entry(vm).or_default().clone();
        freeze.set_agent(has_agent);
        freeze
    }

    /// Freezes one guest. If that fails after it was asked, it stays noted and is thawed again.
    fn freeze(&self, vm: &VmDefinition, socket: PathBuf, limit: Duration) -> Result<FrozenVm, FreezeError> {
        self.list.note(vm.id, FrozenGuest { name: vm.name.clone(), socket: socket.clone() })?;
        // The very file that runs, whatever lies under its name by now.
        let guard = Guard::start(Path::new("/proc/self/exe"), &socket, limit).map_err(FreezeError::Guard)?;
        let mut agent = match GuestAgent::connect(&socket, FREEZE_WITHIN.min(limit)) {
            Ok(agent) => agent,
            Err(error) => {
                // It was asked nothing.
                guard.dismiss();
                self.list.forget(vm.id)?;
                return Err(error.into());
            }
        };
        match agent.freeze() {
            Ok(filesystems) => {
                tracing::info!(vm = vm.name, filesystems, "froze the guest");
                Ok(FrozenVm { vm: vm.id, socket, guard })
            }
            // It may be frozen, or become so: the guard, dropped here, thaws it.
            Err(error) => {
                lock(&self.stuck).insert(vm.id, Instant::now());
                Err(error.into())
            }
        }
    }

    /// Thaws one guest; if that can't be done its guard does it.
    fn thaw(&self, frozen: FrozenVm) {
        let thawed = GuestAgent::connect(&frozen.socket, THAW_WITHIN).and_then(|mut agent| agent.thaw());
        match thawed {
            Ok(()) => {
                frozen.guard.dismiss();
                self.forget(frozen.vm);
            }
            Err(error) => {
                tracing::warn!(vm = %frozen.vm, error = chain(&error), "the guest isn't thawed yet: its guard goes on");
                lock(&self.stuck).insert(frozen.vm, Instant::now());
            }
        }
    }

    fn forget(&self, vm: VmId) {
        if let Err(error) = self.list.forget(vm) {
            tracing::warn!(%vm, error = chain(&error), "the guest is thawed once more at the next start");
        }
        lock(&self.stuck).remove(&vm);
    }

    /// Guests that couldn't be thawed are tried again.
    fn thaw_stuck(&self) {
        let noted = self.list.all();
        let stuck: Vec<VmId> = lock(&self.stuck).keys().copied().collect();
        for vm in stuck {
            let Some(guest) = noted.get(&vm) else {
                lock(&self.stuck).remove(&vm);
                continue;
            };
            match GuestAgent::connect(&guest.socket, THAW_WITHIN).and_then(|mut agent| agent.thaw()) {
                Ok(()) => {
                    tracing::info!(vm = guest.name, "the guest is thawed");
                    self.forget(vm);
                }
                // QEMU removes its sockets: a VM that was stopped has no frozen guest.
                Err(AgentError::Connect { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                    self.forget(vm);
                }
                Err(_) => {}
            }
        }
    }
}

impl Daemon {
    /// Says where a guest's agent is.
    pub(super) async fn set_guest_agent(&self, set: SetGuestAgent) -> Result<(), ApiError> {
        let mut change = self.state.change().await;
        if let Some(socket) = &set.socket {
            if !change.get().volumes.values().any(|volume| volume.vm == set.vm) {
                let message = format!("VM {} has no volume here", set.vm);
                return Err(ApiError::new(ErrorCode::NotFound, message).remedy("attach its disks first"));
            }
            if !socket.is_absolute() {
                let message = format!("{} is not an absolute path", socket.display());
                return Err(ApiError::new(ErrorCode::BadRequest, message));
            }
        }
        change.update(|state| match &set.socket {
            Some(socket) => state.guest_agents.insert(set.vm, socket.clone()),
            None => state.guest_agents.remove(&set.vm),
        })?;
        self.guests.freeze_of(set.vm, set.socket.is_some());
        Ok(())
    }

    /// Freezes the guests of a VPG here, all that have an agent or none.
    pub(super) async fn freeze_guests(&self, freeze: FreezeGuests) -> Result<GuestsFrozen, ApiError> {
        if !LIMIT_MS.contains(&freeze.limit_ms) {
            let (least, most) = (LIMIT_MS.start(), LIMIT_MS.end());
            let message = format!("limit_ms is {}; it must be {least} to {most}", freeze.limit_ms);
            return Err(ApiError::new(ErrorCode::BadRequest, message));
        }
        let vpg = self.vpg(freeze.vpg)?;
        let _changing = self.guests.changing.lock().await;
        if self.has_frozen(vpg.id) {
            let message = format!("the guests of VPG \"{}\" are frozen for another checkpoint", vpg.name);
            return Err(ApiError::new(ErrorCode::Busy, message).remedy("try again in some seconds"));
        }
        let limit = Duration::from_millis(freeze.limit_ms.into());
        tokio::task::block_in_place(|| {
            // Those of a checkpoint whose time is over.
            self.thaw_vpg(vpg.id);
            self.freeze_vpg(&vpg, limit)
        })
    }

    fn freeze_vpg(&self, vpg: &VpgDefinition, limit: Duration) -> Result<GuestsFrozen, ApiError> {
        let agents = &self.seen().guest_agents;
        let here = vpg.vms.iter().filter(|vm| vm.source.id == self.vra);
        let (with, without): (Vec<&VmDefinition>, Vec<_>) = here.partition(|vm| agents.contains_key(&vm.id));
        let until = Instant::now() + limit.saturating_sub(MARGIN);
        let frozen: Vec<(&VmDefinition, Result<FrozenVm, FreezeError>)> = std::thread::scope(|scope| {
            let freezing: Vec<_> = with
                .iter()
                .map(|vm| (*vm, scope.spawn(|| self.guests.freeze(vm, agents[&vm.id].clone(), limit))))
                .collect();
            let joined =
                freezing.into_iter().map(|(vm, thread)| (vm, thread.join().expect("it panics nowhere")));
            joined.collect()
        });
        let (mut vms, mut failed) = (Vec::new(), None);
        for (vm, frozen) in frozen {
            match frozen {
                Ok(frozen) => vms.push(frozen),
                Err(error) => failed = failed.or(Some((vm, error))),
            }
        }
        if let Some((vm, error)) = failed {
            vms.into_iter().for_each(|frozen| self.guests.thaw(frozen));
            let message = format!("the guest of VM {} can't be frozen: {}", vm.name, chain(&error));
            return Err(ApiError::new(ErrorCode::NotReady, message).remedy(
                "see to its guest agent (qemu-guest-agent runs, its channel is that of `vra guest-agent`), or make a checkpoint without it",
            ));
        }
        let told = GuestsFrozen {
            frozen: vms.iter().map(|frozen| frozen.vm).collect(),
            without_agent: without.iter().map(|vm| vm.id).collect(),
        };
        for frozen in &vms {
            self.guests.freeze_of(frozen.vm, true).begin(until);
        }
        let without_agent = told.without_agent.clone();
        lock(&self.guests.frozen).insert(vpg.id, FrozenVpg { vms, without_agent, until });
        Ok(told)
    }

    /// Thaws the guests of a VPG. Those whose agent doesn't answer now are thawed by their guards.
    pub(super) async fn thaw_guests(&self, thaw: ThawGuests) -> GuestsFrozen {
        let _changing = self.guests.changing.lock().await;
        tokio::task::block_in_place(|| self.thaw_vpg(thaw.vpg))
    }

    fn thaw_vpg(&self, vpg: VpgId) -> GuestsFrozen {
        let Some(FrozenVpg { vms, without_agent, .. }) = lock(&self.guests.frozen).remove(&vpg) else {
            return GuestsFrozen::default();
        };
        let told = GuestsFrozen { frozen: vms.iter().map(|frozen| frozen.vm).collect(), without_agent };
        std::thread::scope(|scope| {
            for frozen in vms {
                self.guests.freeze_of(frozen.vm, true).end();
                scope.spawn(|| self.guests.thaw(frozen));
            }
        });
        told
    }

    /// Whether a VPG's guests here are frozen.
    pub(super) fn has_frozen(&self, vpg: VpgId) -> bool {
        lock(&self.guests.frozen).get(&vpg).is_some_and(|frozen| Instant::now() < frozen.until)
    }

    /// Thaws what a former daemon left frozen, what was forgotten by whoever asked for it, and what couldn't be thawed at once. Ends only when
    /// cancelled.
    pub(super) async fn keep_thawed(self: Arc<Self>) {
        let left: Vec<VmId> = self.guests.list.all().into_keys().collect();
        for vm in left {
            tracing::warn!(%vm, "the guest may have been left frozen: it is thawed");
            // Told at once if it doesn't work: nobody knows for how long it has been so.
            let since = Instant::now().checked_sub(TELL_AFTER).unwrap_or_else(Instant::now);
            lock(&self.guests.stuck).insert(vm, since);
        }
        loop {
            let _changing = self.guests.changing.lock().await;
            tokio::task::block_in_place(|| {
                let now = Instant::now();
                let overdue: Vec<VpgId> = {
                    let frozen = lock(&self.guests.frozen);
                    frozen.iter().filter(|(_, vpg)| vpg.until <= now).map(|(id, _)| *id).collect()
                };
                overdue.into_iter().for_each(|vpg| _ = self.thaw_vpg(vpg));
                self.guests.thaw_stuck();
            });
            drop(_changing);
            tokio::time::sleep(TRY_EVERY).await;
        }
    }

    /// Guests that are frozen and can't be thawed.
    pub(super) fn guest_findings(&self, found: &mut Vec<Finding>) {
        let noted = self.guests.list.all();
        for (vm, since) in lock(&self.guests.stuck).iter() {
            let Some(guest) = noted.get(vm).filter(|_| since.elapsed() >= TELL_AFTER) else { continue };
            found.push(Finding {
                code: "guest-frozen",
                severity: Severity::Critical,
                vm: Some(*vm),
                vpg: None,
                message: format!(
                    "the guest of VM {} may be frozen, and its agent at {} doesn't answer",
                    guest.name,
                    guest.socket.display()
                ),
                remedy: Some(
                    "thaw it (`virsh domfsthaw`), or restart it: nothing writes in it until then".to_owned(),
                ),
            });
        }
    }
}
