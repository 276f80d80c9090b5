//! Freezing guests for checkpoints, and seeing to it that they are thawed (D5). Only their guards speak with the guests' agents.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::{Daemon, Finding, lock};
use crate::api::guest::{FreezeGuests, GuestsFrozen, SetGuestAgent, ThawGuests};
use crate::api::vpg::VmDefinition;
use crate::api::{ApiError, ErrorCode, Severity, VmId, VpgDefinition, VpgId};
use crate::checkpoint::Freeze;
use crate::config::StoreError;
use crate::guest::{FrozenGuest, FrozenGuests, Guard, GuardEnd, LONGEST_FREEZE, Told};
use crate::report::chain;

/// Longest that a guest's thawing is waited for; its guard goes on.
const THAW_WITHIN: Duration = Duration::from_secs(2);

/// Longest that a new freeze waits for the guard of a former one.
const FORMER_WITHIN: Duration = Duration::from_secs(1);

/// So long before its guard thaws it a guest isn't taken for frozen any more.
const MARGIN: Duration = Duration::from_millis(500);

/// Limits of [`FreezeGuests::limit_ms`].
const LIMIT_MS: std::ops::RangeInclusive<u32> = 2_000..=LONGEST_FREEZE.as_millis() as u32;

/// How long a guest that was left frozen is tried to be thawed before that is told. Its VM may have been stopped: then nobody answers any more.
const TELL_AFTER: Duration = Duration::from_secs(10);
const TRY_EVERY: Duration = Duration::from_secs(1);

/// The very file that runs, whatever lies under its name by now.
const PROGRAM: &str = "/proc/self/exe";

/// The guests of this host's VMs.
pub(super) struct Guests {
    list: FrozenGuests,
    freezes: Mutex<BTreeMap<VmId, Freeze>>,
    frozen: Mutex<BTreeMap<VpgId, FrozenVpg>>,
    /// Guests that are noted and not in `frozen`: they are being thawed.
    thawing: Mutex<BTreeMap<VmId, Thawing>>,
    /// Held while guests are frozen or thawed.
    changing: tokio::sync::Mutex<()>,
}

/// The guests of a VPG that are frozen together.
struct FrozenVpg {
    vms: Vec<FrozenVm>,
    without_agent: Vec<VmId>,
    until: Instant,
}

impl FrozenVpg {
    /// Whether they are to be thawed: nobody wants them any more, or they aren't all frozen any more.
    fn is_over(&self, now: Instant) -> bool {
        self.until <= now || self.vms.iter().any(|frozen| !frozen.guard.is_sure())
    }
}

struct FrozenVm {
    vm: VmId,
    guard: Guard,
}

struct Thawing {
    since: Instant,
    /// None if it could not be started.
    guard: Option<Guard>,
}

/// Why a guest isn't frozen.
#[derive(Debug, thiserror::Error)]
enum FreezeError {
    #[error("{0}")]
    Agent(String),
    #[error("it was frozen before, and isn't thawed yet")]
    NotThawed,
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("cannot start the process that freezes and thaws it")]
    Guard(#[source] std::io::Error),
}

impl FreezeError {
    fn code(&self) -> ErrorCode {
        match self {
            Self::NotThawed => ErrorCode::Busy,
            _ => ErrorCode::NotReady,
        }
    }
}

impl Guests {
    /// With what a former daemon left.
    pub(super) fn open(folder: &Path) -> Result<Self, StoreError> {
        Ok(Self {
            list: FrozenGuests::open(folder)?,
            freezes: Mutex::default(),
            frozen: Mutex::default(),
            thawing: Mutex::default(),
            changing: tokio::sync::Mutex::default(),
        })
    }

    /// Whether a VM's guest is frozen, for its checkpoints.
    pub(super) fn freeze_of(&self, vm: VmId, has_agent: bool) -> Freeze {
        let freeze = self.known_freeze_of(vm);
        freeze.set_agent(has_agent);
        freeze
    }

    /// The same, whether it has an agent or not.
    fn known_freeze_of(&self, vm: VmId) -> Freeze {
        lock(&self.freezes).entry(vm).or_default().clone()
    }

    /// Freezes one guest. If that fails after it was asked, it stays noted and is thawed again.
    fn freeze(&self, vm: &VmDefinition, socket: PathBuf, limit: Duration) -> Result<FrozenVm, FreezeError> {
        if !self.is_thawed(vm.id) {
            return Err(FreezeError::NotThawed);
        }
        self.list.note(vm.id, FrozenGuest { name: vm.name.clone(), socket: socket.clone() })?;
        let freeze = self.known_freeze_of(vm.id);
        let guard = match Guard::freeze(Path::new(PROGRAM), &socket, limit, move || freeze.end()) {
            Ok(guard) => guard,
            Err(error) => {
                self.forget(vm.id);
                return Err(FreezeError::Guard(error));
            }
        };
        let reason = match guard.how_it_went(limit) {
            Some(Told::Frozen { filesystems }) => {
                tracing::info!(vm = vm.name, filesystems, "froze the guest");
                return Ok(FrozenVm { vm: vm.id, guard });
            }
            Some(Told::Refused { reason }) => {
                self.forget(vm.id);
                return Err(FreezeError::Agent(reason));
            }
            Some(Told::Silent { reason }) => reason,
            _ => "the process that freezes and thaws it says nothing".to_owned(),
        };
        self.leave_to(vm.id, guard);
        Err(FreezeError::Agent(reason))
    }

    /// Whether nothing of a former freeze is left, or will be within a moment.
    fn is_thawed(&self, vm: VmId) -> bool {
        // Taken out: looking at all of them mustn't wait for this one.
        let former = lock(&self.thawing).remove(&vm);
        let Some(former) = former else { return !self.list.all().contains_key(&vm) };
        let end = former.guard.as_ref().map_or(GuardEnd::Died, |guard| guard.wait(FORMER_WITHIN));
        if end == GuardEnd::Thawed {
            self.forget(vm);
            return true;
        }
        lock(&self.thawing).insert(vm, former);
        false
    }

    /// Thaws one guest; if that takes long its guard goes on alone.
    fn thaw(&self, mut frozen: FrozenVm) {
        self.known_freeze_of(frozen.vm).end();
        frozen.guard.thaw();
        match frozen.guard.wait(THAW_WITHIN) {
            GuardEnd::Thawed => self.forget(frozen.vm),
            GuardEnd::NotYet | GuardEnd::Died => {
                tracing::warn!(vm = %frozen.vm, "the guest isn't thawed yet: that is tried on");
                self.leave_to(frozen.vm, frozen.guard);
            }
        }
    }

    /// Thaws guests, all at the same time.
    fn thaw_all(&self, vms: Vec<FrozenVm>) {
        std::thread::scope(|scope| {
            for frozen in vms {
                scope.spawn(|| self.thaw(frozen));
            }
        });
    }

    /// A guest is thawed by its guard, whenever that can be done.
    fn leave_to(&self, vm: VmId, mut guard: Guard) {
        self.known_freeze_of(vm).end();
        guard.thaw();
        lock(&self.thawing).insert(vm, Thawing { since: Instant::now(), guard: Some(guard) });
    }

    fn forget(&self, vm: VmId) {
        if let Err(error) = self.list.forget(vm) {
            tracing::warn!(%vm, error = chain(&error), "the guest is thawed once more");
        }
    }

    /// Sees to it that every noted guest that isn't frozen now is being thawed. Waits for nothing.
    pub(super) fn thaw_noted(&self) {
        let frozen: BTreeSet<VmId> =
            lock(&self.frozen).values().flat_map(|vpg| vpg.vms.iter().map(|frozen| frozen.vm)).collect();
        let mut thawing = lock(&self.thawing);
        for (vm, guest) in self.list.all() {
            if frozen.contains(&vm) {
                continue;
            }
            let known = thawing.get(&vm);
            let end = known.and_then(|known| known.guard.as_ref()).map(|guard| guard.wait(Duration::ZERO));
            match end {
                Some(GuardEnd::NotYet) => {}
                Some(GuardEnd::Thawed) => {
                    tracing::info!(vm = guest.name, "the guest is thawed");
                    thawing.remove(&vm);
                    self.forget(vm);
                }
                Some(GuardEnd::Died) | None => {
                    tracing::warn!(vm = guest.name, "the guest may have been left frozen: it is thawed");
                    self.known_freeze_of(vm).end();
                    let since = known.map_or_else(Instant::now, |known| known.since);
                    let guard = Guard::only_thaw(Path::new(PROGRAM), &guest.socket);
                    if let Err(error) = &guard {
                        tracing::error!(vm = guest.name, %error, "cannot start the process that thaws it");
                    }
                    thawing.insert(vm, Thawing { since, guard: guard.ok() });
                }
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
        let without_agent: Vec<VmId> = without.iter().map(|vm| vm.id).collect();
        if let Some((vm, error)) = failed {
            self.guests.thaw_all(vms);
            let message = format!("the guest of VM {} can't be frozen: {}", vm.name, chain(&error));
            let remedy = match error {
                FreezeError::NotThawed => "it is being thawed: try again in some seconds",
                _ => {
                    "see to its guest agent (qemu-guest-agent runs, its channel is that of `vra guest-agent` and nobody else uses it), or make a checkpoint without it"
                }
            };
            return Err(ApiError::new(error.code(), message).remedy(remedy));
        }
        if Instant::now() >= until {
            self.guests.thaw_all(vms);
            let message = format!("the guests of VPG \"{}\" took too long to be frozen", vpg.name);
            return Err(ApiError::new(ErrorCode::NotReady, message)
                .remedy("try again with a larger limit, or when they write less"));
        }
        for frozen in &vms {
            let freeze = self.guests.known_freeze_of(frozen.vm);
            freeze.begin(until);
            // Its guard calls `end` after it has told: if not before this, then later.
            if !frozen.guard.is_sure() {
                freeze.end();
            }
        }
        let told = GuestsFrozen { frozen: vms.iter().map(|frozen| frozen.vm).collect(), without_agent };
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
        self.guests.thaw_all(vms);
        told
    }

    /// Thaws all guests that are frozen, before the daemon ends.
    pub(super) async fn thaw_all_guests(&self) {
        let _changing = self.guests.changing.lock().await;
        tokio::task::block_in_place(|| {
            let all = std::mem::take(&mut *lock(&self.guests.frozen));
            self.guests.thaw_all(all.into_values().flat_map(|vpg| vpg.vms).collect());
        });
    }

    /// Whether a VPG's guests here are frozen.
    pub(super) fn has_frozen(&self, vpg: VpgId) -> bool {
        lock(&self.guests.frozen).get(&vpg).is_some_and(|frozen| Instant::now() < frozen.until)
    }

    /// Starts to thaw what a former daemon left frozen. To be called as soon as the guests' disks are served.
    pub(super) fn thaw_left_guests(&self) {
        self.guests.thaw_noted();
    }

    /// Thaws what was forgotten by whoever asked for it, and what couldn't be thawed at once. Ends only when cancelled.
    pub(super) async fn keep_thawed(self: Arc<Self>) {
        loop {
            let changing = self.guests.changing.lock().await;
            tokio::task::block_in_place(|| {
                let now = Instant::now();
                let overdue: Vec<VpgId> = {
                    let frozen = lock(&self.guests.frozen);
                    frozen.iter().filter(|(_, vpg)| vpg.is_over(now)).map(|(id, _)| *id).collect()
                };
                overdue.into_iter().for_each(|vpg| _ = self.thaw_vpg(vpg));
                self.guests.thaw_noted();
            });
            drop(changing);
            tokio::time::sleep(TRY_EVERY).await;
        }
    }

    /// Guests that are frozen and can't be thawed.
    pub(super) fn guest_findings(&self, found: &mut Vec<Finding>) {
        let noted = self.guests.list.all();
        for (vm, thawing) in lock(&self.guests.thawing).iter() {
            let is_late = thawing.since.elapsed() >= TELL_AFTER;
            let Some(guest) = noted.get(vm).filter(|_| is_late) else { continue };
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
