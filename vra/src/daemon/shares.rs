//! Shared disks at work: follows [`Ownership`] for each, with the locks, the gate and the capture.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::time::{Duration, Instant};

use ublk::backing::{Backing, BackingError};

use super::volumes::LiveVolume;
use super::{Daemon, Finding, lock};
use crate::api::volume::SharedState;
use crate::api::{ApiError, ErrorCode, Severity, VmId, VolumeId};
use crate::capture::WriteGate;
use crate::report::chain;
use crate::sharing::{Facts, Mark, MarkError, Ownership, Standing, Step};

/// Time between two looks: a guest that was migrated waits for so long, a few times over.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Time between two looks of an owner for whoever asks: each is a lock and an unlock on the storage.
const LOOK_FOR_ASKERS_EVERY: Duration = Duration::from_millis(100);

/// Time between two looks of an owner whether it has the lock still: storage that hosts share can take it away.
const LOOK_FOR_LOCK_EVERY: Duration = Duration::from_secs(1);

/// What failed to follow is tried again after this.
const RETRY_AFTER: Duration = Duration::from_secs(2);

/// Writes that wait for longer are an alert.
const LONG_WAIT: Duration = Duration::from_secs(10);

/// This VRA's part in a shared disk.
pub(super) struct Share {
    gate: Arc<WriteGate>,
    backing: Arc<Backing>,
    mark: Mark,
    /// As `at_work` says, for those who must not wait for it.
    owned: AtomicBool,
    /// A thread takes a step: its storage may hang.
    is_stepping: AtomicBool,
    at_work: Mutex<AtWork>,
}

struct AtWork {
    ownership: Ownership,
    looked_at: Option<Instant>,
    /// When the lock was found to be there.
    locked_at: Option<Instant>,
    /// The failure that was told of.
    told: Option<String>,
}

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
enum ShareError {
    #[error(transparent)]
    Backing(#[from] BackingError),
    #[error("cannot lock or unlock the mark beside the disk")]
    Mark(#[source] std::io::Error),
    #[error("cannot sync the disk before it is given up")]
    Sync(#[source] std::io::Error),
    #[error("the storage has given the disk's lock to another host: its guest's writes wait here")]
    LockLost,
}

/// What a step needs to know of the volume.
struct Around {
    volume: VolumeId,
    vm: VmId,
    /// The revision of the definition that says that the VM's source is here, if one does.
    source_by: Option<u64>,
}

impl Share {
    /// Makes a disk that is locked a shared one, owned here.
    pub(super) fn begin(backing: &Arc<Backing>, volume: VolumeId) -> Result<Self, ApiError> {
        let mark = Mark::make(backing.path(), volume).map_err(|error| unmarked(&error))?;
        let share = Self::new(backing, mark, true);
        share.gate.open();
        Ok(share)
    }

    /// Has a part in a disk that another VRA owns now.
    ///
    /// # Errors
    /// It can't be told for sure that it is the owner's disk, and that locks hold from there to here.
    pub(super) fn join(backing: &Arc<Backing>, volume: VolumeId) -> Result<Self, ApiError> {
        let mark = Mark::open(backing.path(), volume).map_err(|error| unmarked(&error))?;
        if backing.try_lock()? {
            backing.unlock()?;
            return Err(ApiError::new(
                ErrorCode::Conflict,
                format!("{} has no owner whose lock is seen here", backing.path().display()),
            )
            .remedy(
                "attach it at its owner first; on NFS, locks must go through the server: mount without `nolock` and `local_lock`",
            ));
        }
        Ok(Self::new(backing, mark, false))
    }

    /// Goes on with a share after a start of the daemon: as a standby, whatever it was. An owner that let go of the disk for good has taken the
    /// mark away; whoever has the lock then makes it again.
    pub(super) fn resume(backing: &Arc<Backing>, volume: VolumeId) -> Result<Self, ApiError> {
        let mark = match Mark::open(backing.path(), volume) {
            Err(MarkError::Missing { .. }) if backing.try_lock()? => {
                let made = Mark::make(backing.path(), volume);
                backing.unlock()?;
                made
            }
            opened => opened,
        };
        let mark = mark.map_err(|error| unmarked(&error))?;
        Ok(Self::new(backing, mark, false))
    }

    fn new(backing: &Arc<Backing>, mark: Mark, owner: bool) -> Self {
        let at_work =
            AtWork { ownership: Ownership::new(owner), looked_at: None, locked_at: None, told: None };
        Self {
            gate: Arc::default(),
            backing: Arc::clone(backing),
            mark,
            owned: AtomicBool::new(owner),
            is_stepping: AtomicBool::new(false),
            at_work: Mutex::new(at_work),
        }
    }

    /// The gate of its writes.
    pub(super) fn gate(&self) -> &Arc<WriteGate> {
        &self.gate
    }

    /// Whether this VRA may write.
    pub(super) fn is_owned(&self) -> bool {
        self.owned.load(Ordering::Acquire)
    }

    /// As it is told.
    pub(super) fn state(&self) -> SharedState {
        match (self.is_owned(), self.gate.waiting_since()) {
            (true, _) => SharedState::Owner,
            (false, Some(_)) => SharedState::Waiting,
            (false, None) => SharedState::Standby,
        }
    }

    /// What is known of the ownership, unless a step with the storage is under way.
    fn try_at_work(&self) -> Option<MutexGuard<'_, AtWork>> {
        match self.at_work.try_lock() {
            Ok(at_work) => Some(at_work),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Takes the disk if nobody has it: its guest is here.
    ///
    /// # Errors
    /// The filesystem can't say.
    pub(super) fn claim(&self, has_clients: impl FnOnce() -> bool) -> Result<(), ApiError> {
        let mut at_work = lock(&self.at_work);
        if at_work.ownership.standing() == Standing::Standby && self.backing.try_lock()? {
            at_work.ownership = Ownership::new(true);
            self.open_gate(has_clients);
            self.owned.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// With the lock: lets in what waits, if its client is there. Taking the lock may have lasted, and what a client wanted that has gone would be
    /// an old write over new ones.
    fn open_gate(&self, has_clients: impl FnOnce() -> bool) {
        if self.gate.waiting_since().is_some() && !has_clients() {
            self.gate.turn_away();
        }
        self.gate.open();
    }

    /// Ends this VRA's part before the door closes: writes that wait fail.
    pub(super) fn end(&self) {
        let was = lock(&self.at_work).ownership.end();
        self.owned.store(false, Ordering::Release);
        self.gate.end();
        if was == Standing::Asking {
            // The lock goes with the file otherwise.
            let _ = self.mark.stop_asking();
        }
    }

    /// Takes the mark away, if nobody else owns the disk. After the door has closed.
    pub(super) fn clear(&self) {
        if matches!(self.backing.try_lock(), Ok(true))
            && let Err(error) = self.mark.remove()
        {
            tracing::warn!(disk = %self.backing.path().display(), %error, "the mark of a disk that was shared stays");
        }
    }
}

impl Daemon {
    /// Follows the ownership of shared disks, each on its own: storage that hangs holds up its own disks alone. Ends only when cancelled.
    pub(super) async fn drive_shares(self: Arc<Self>) {
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            for (around, share) in self.shares() {
                if share.is_stepping.load(Ordering::Acquire) || !self.has_to_step(&around, &share) {
                    continue;
                }
                let stepping = Stepping::begin(share);
                let daemon = Arc::clone(&self);
                tokio::task::spawn_blocking(move || {
                    if daemon.step_share(&around, &stepping.0) {
                        daemon.owners_changed.notify_one();
                    }
                });
            }
        }
    }

    /// Whether there is more to do with a shared disk than to rest. Doesn't touch its storage.
    fn has_to_step(&self, around: &Around, share: &Share) -> bool {
        // Whoever has the lock otherwise is claiming or ending it, and may wait for the storage.
        let Some(at_work) = share.try_at_work() else { return false };
        let is_due = |last: Option<Instant>, every| last.is_none_or(|last| last.elapsed() >= every);
        if at_work.ownership.standing() == Standing::Owner && is_due(at_work.locked_at, LOOK_FOR_LOCK_EVERY) {
            return true;
        }
        match at_work.ownership.next(&self.facts_of(around, share)) {
            Step::Rest => false,
            Step::LookForAsker => is_due(at_work.looked_at, LOOK_FOR_ASKERS_EVERY),
            Step::TurnAway | Step::Ask | Step::StopAsking | Step::TakeLock | Step::GiveUp => true,
        }
    }

    fn facts_of(&self, around: &Around, share: &Share) -> Facts {
        // Before the clients: one that comes in between has not written by then.
        let writes_wait = share.gate.waiting_since().is_some();
        Facts {
            has_clients: self.has_writers(around.volume),
            writes_wait,
            was_written: share.gate.was_used(),
            source_by: around.source_by,
        }
    }

    /// Starts and stops source VMs as shared disks come and go. Ends only when cancelled.
    pub(super) async fn follow_owners(self: Arc<Self>) {
        loop {
            self.owners_changed.notified().await;
            let change = self.state.change().await;
            let followed = self.follow_sources(change.get());
            drop(change);
            if let Err(error) = followed {
                tracing::error!(%error, "can't protect all VMs: trying again");
                tokio::time::sleep(RETRY_AFTER).await;
                self.owners_changed.notify_one();
            }
        }
    }

    /// Shared disks whose guests' writes have waited for long.
    pub(super) fn share_findings(&self, found: &mut Vec<Finding>) {
        let seen = self.seen();
        for (around, share) in self.shares() {
            let waited = share.gate.waiting_since().map(|since| since.elapsed());
            let (Some(waited), Some(record)) =
                (waited.filter(|waited| *waited >= LONG_WAIT), seen.volumes.get(&around.volume))
            else {
                continue;
            };
            let failed = match share.try_at_work() {
                Some(at_work) => at_work.told.clone(),
                None => Some("the storage has not answered yet".to_owned()),
            };
            found.push(Finding {
                code: "volume-waits-for-owner",
                severity: Severity::Critical,
                vm: Some(record.vm),
                vpg: None,
                message: format!(
                    "writes of VM {} to volume {} have waited for {} s: {}",
                    record.vm_name,
                    record.number,
                    waited.as_secs(),
                    failed.as_deref().unwrap_or("another host owns the disk")
                ),
                remedy: Some(
                    "see at the VM's other hosts (`vra list`) which one owns it, and whether a guest of the VM still runs there: it must be stopped; the VRA there lets go by itself then"
                        .to_owned(),
                ),
            });
        }
    }

    fn shares(&self) -> Vec<(Around, Arc<Share>)> {
        let seen = self.seen();
        let volumes = lock(&self.volumes);
        let shares = volumes.iter().filter_map(|(id, live)| {
            let LiveVolume::Served { share: Some(share), .. } = live else { return None };
            let vm = seen.volumes.get(id)?.vm;
            let source_by = seen.vpg_of(vm).filter(|vpg| {
                vpg.vms.iter().any(|member| {
                    member.id == vm
                        && member.source.id == self.vra
                        && member.volumes.iter().any(|volume| volume.id == *id)
                })
            });
            let around = Around { volume: *id, vm, source_by: source_by.map(|vpg| vpg.revision) };
            Some((around, Arc::clone(share)))
        });
        shares.collect()
    }

    /// Whether clients that may write have a volume open now.
    pub(super) fn has_writers(&self, volume: VolumeId) -> bool {
        match lock(&self.volumes).get(&volume) {
            Some(LiveVolume::Served { door, .. }) => self.doors.has_writers(door),
            _ => false,
        }
    }

    /// Takes the next step with a shared disk. Whether a source VM may have to follow.
    fn step_share(&self, around: &Around, share: &Share) -> bool {
        let mut at_work = lock(&share.at_work);
        if at_work.ownership.standing() == Standing::Owner
            && let Err(error) = self.check_lock(&mut at_work, around, share)
        {
            at_work.tell(around, share, &error);
            return false;
        }
        let facts = self.facts_of(around, share);
        let step = at_work.ownership.next(&facts);
        if step == Step::LookForAsker {
            if at_work.looked_at.is_some_and(|looked| looked.elapsed() < LOOK_FOR_ASKERS_EVERY) {
                return false;
            }
            at_work.looked_at = Some(Instant::now());
        }
        match self.take_step(step, around, share) {
            Ok(so) => {
                at_work.ownership.done(step, so, &facts);
                let is_owner = at_work.ownership.standing() == Standing::Owner;
                share.owned.store(is_owner, Ordering::Release);
                if step != Step::Rest {
                    at_work.told = None;
                }
                so && step == Step::TakeLock
            }
            Err(error) => {
                at_work.tell(around, share, &error);
                false
            }
        }
    }

    /// Sees now and then to it that an owner has the lock still. Without it the disk is another host's: the capture ends, and no checkpoint is
    /// taken of it here.
    fn check_lock(&self, at_work: &mut AtWork, around: &Around, share: &Share) -> Result<(), ShareError> {
        if at_work.locked_at.is_some_and(|looked| looked.elapsed() < LOOK_FOR_LOCK_EVERY) {
            return Ok(());
        }
        at_work.locked_at = Some(Instant::now());
        if share.backing.try_lock()? {
            return Ok(());
        }
        share.gate.close();
        share.owned.store(false, Ordering::Release);
        at_work.ownership = Ownership::new(false);
        self.end_source(around.vm);
        Err(ShareError::LockLost)
    }

    fn end_source(&self, vm: VmId) {
        let source = lock(&self.sources).remove(&vm);
        if let Some(source) = source {
            source.leave();
            tracing::info!(%vm, name = source.definition().name, "no longer a source: its disk is another host's");
        }
    }

    fn take_step(&self, step: Step, around: &Around, share: &Share) -> Result<bool, ShareError> {
        let Around { volume, vm, .. } = around;
        match step {
            Step::Rest => Ok(false),
            Step::TurnAway => {
                tracing::info!(%volume, %vm, "writes that waited for a shared disk failed: their client has gone");
                share.gate.turn_away();
                Ok(true)
            }
            // If somebody else asks, the owner gives up to whoever takes the lock.
            Step::Ask => share.mark.ask().map(|_| true).map_err(ShareError::Mark),
            Step::StopAsking => share.mark.stop_asking().map(|()| true).map_err(ShareError::Mark),
            Step::TakeLock => {
                if !share.backing.try_lock()? {
                    // Who had locked the mark may have the disk now, and must see that it is asked for.
                    share.mark.ask().map_err(ShareError::Mark)?;
                    return Ok(false);
                }
                tracing::info!(%volume, %vm, disk = %share.backing.path().display(), "owns a shared disk");
                share.open_gate(|| self.has_writers(*volume));
                if let Err(error) = share.mark.stop_asking() {
                    // It is the owner all the same, and finds its own lock there when it looks for others.
                    tracing::warn!(%volume, %error, "the mark of a shared disk stays locked");
                }
                Ok(true)
            }
            Step::LookForAsker => {
                let asked = share.mark.is_asked_for().map_err(ShareError::Mark)?;
                if asked {
                    share.gate.close();
                }
                Ok(asked)
            }
            Step::GiveUp => {
                if !share.gate.close() {
                    return Ok(false);
                }
                self.end_source(*vm);
                share.backing.file().sync_data().map_err(ShareError::Sync)?;
                share.backing.unlock()?;
                tracing::info!(%volume, %vm, disk = %share.backing.path().display(), "gave a shared disk up");
                Ok(true)
            }
        }
    }
}

/// A share whose next step is under way, however that ends.
struct Stepping(Arc<Share>);

impl Stepping {
    fn begin(share: Arc<Share>) -> Self {
        share.is_stepping.store(true, Ordering::Release);
        Self(share)
    }
}

impl Drop for Stepping {
    fn drop(&mut self) {
        self.0.is_stepping.store(false, Ordering::Release);
    }
}

impl AtWork {
    /// Tells a failure, once as long as it is the same.
    fn tell(&mut self, around: &Around, share: &Share, error: &ShareError) {
        let error = chain(error);
        if self.told.as_ref() != Some(&error) {
            tracing::error!(volume = %around.volume, disk = %share.backing.path().display(), error, "who owns a shared disk can't be settled");
            self.told = Some(error);
        }
    }
}

fn unmarked(error: &MarkError) -> ApiError {
    let code = match error {
        MarkError::Missing { .. } => ErrorCode::NotFound,
        MarkError::Differs { .. } => ErrorCode::Conflict,
        MarkError::Io { .. } => ErrorCode::Io,
    };
    ApiError::new(code, chain(error)).remedy(
        "attach the disk at its owner first; its path must lead to the same file at all hosts, whose VRAs may write to its folder",
    )
}
