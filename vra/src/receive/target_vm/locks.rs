//! Checkpoints that are kept when they grow older than the history.

use std::sync::Arc;
use std::time::Duration;

use journal::writer::ChangeError;
use tokio::sync::oneshot;

use super::{TargetVm, kept_locks};
use crate::api::CheckpointId;
use crate::api::status::Severity;
use crate::receive::error_chain;
use crate::receive::manifest::LockedCheckpoint;
use crate::receive::target_error::TargetError;

/// Locks of one VM at most: each takes some 200 bytes of the journal's manifest, which has room for 384 KiB in all.
const MAX_LOCKS: usize = 1000;

/// Wait between attempts to keep a lock that is in the way.
const RETRY_WAIT: Duration = Duration::from_secs(10);

const GIVEN_UP: &str = "lock-given-up";
/// The alert of a lock that can neither be kept nor given up.
pub(super) const IN_THE_WAY: &str = "lock-in-the-way";

/// The end of a manifest's writing, if that could begin.
type Written = Option<oneshot::Receiver<Result<(), ChangeError>>>;

impl TargetVm {
    /// The checkpoints that are locked.
    pub fn locked_checkpoints(&self) -> Vec<LockedCheckpoint> {
        self.lock().manifest.locked.clone()
    }

    /// Locks a checkpoint, durably. Again is harmless.
    ///
    /// # Errors
    /// There is no such checkpoint, too many are locked, or the journal failed: then it is locked only if it was.
    pub async fn lock_checkpoint(self: &Arc<Self>, checkpoint: CheckpointId) -> Result<(), TargetError> {
        let _one = self.locking.lock().await;
        // The pin comes first (C2): what is looked up now must still be there when the lock is in force.
        let _pin = self.pin();
        self.oldest_seq().await?;
        let listed = self.checkpoints().await?.find(checkpoint).cloned();
        let listed = listed.ok_or(TargetError::NoSuchCheckpoint { vm: self.vm, checkpoint })?;
        let (is_new, written) = {
            let mut inner = self.lock();
            let locked = &mut inner.manifest.locked;
            let is_new = locked.iter().all(|locked| locked.checkpoint != checkpoint);
            if is_new {
                if locked.len() >= MAX_LOCKS {
                    return Err(TargetError::TooManyLocks { vm: self.vm, most: MAX_LOCKS });
                }
                locked.push(LockedCheckpoint::from(&listed));
                locked.sort_by_key(|locked| locked.cut);
            }
            inner.alerts.remove(GIVEN_UP);
            inner.alerts.remove(kept_locks::LOST);
            self.tell_locks(&inner);
            // Also if it is there already: whoever asked for it first may not have seen it become durable.
            (is_new, self.write_manifest(&inner))
        };
        let result = self.manifest_written(written).await;
        if result.is_err() && is_new {
            let mut inner = self.lock();
            inner.manifest.locked.retain(|locked| locked.checkpoint != checkpoint);
            self.tell_locks(&inner);
            // The file may have it.
            self.write_manifest(&inner);
        }
        result
    }

    /// Unlocks a checkpoint, durably, whether or not it can still be opened. Gives it if it was locked.
    ///
    /// # Errors
    /// The journal failed: then it stays locked.
    pub async fn unlock_checkpoint(
        self: &Arc<Self>,
        checkpoint: CheckpointId,
    ) -> Result<Option<LockedCheckpoint>, TargetError> {
        // Goes on if nobody waits for it any more: what was kept must be let go of.
        let released = self.clone().release(move |locked| locked.checkpoint == checkpoint);
        let released = self.runtime.spawn(released).await.unwrap_or_else(|error| {
            Err(crate::receive::files::host("unlocking a checkpoint", std::io::Error::other(error)))
        })?;
        self.lock().alerts.remove(GIVEN_UP);
        Ok(released.into_iter().next())
    }

    /// A locked checkpoint keeps a full journal from making room, or none does any more.
    pub(super) fn lock_in_the_way(self: &Arc<Self>, cut: Option<u64>) {
        let mut inner = self.lock();
        inner.lock_in_the_way = cut;
        if cut.is_none() {
            inner.alerts.remove(IN_THE_WAY);
        } else if !std::mem::replace(&mut inner.is_keeping_lock, true) {
            drop(inner);
            self.runtime.spawn(self.clone().keep_locks());
        }
        self.lock_told.notify_one();
    }

    /// Makes overlays for the locks that are in the way, one after the other.
    async fn keep_locks(self: Arc<Self>) {
        loop {
            let cut = {
                let mut inner = self.lock();
                let cut = inner.lock_in_the_way.filter(|_| !inner.closed);
                inner.is_keeping_lock = cut.is_some();
                cut
            };
            let Some(cut) = cut else { return };
            if let Err(error) = self.keep_lock(cut).await
                && self.lock_not_kept(cut, &error_chain(&error))
            {
                // Others of the same cut are just as much in the way.
                self.give_up_locks(move |locked| locked.cut == cut);
            }
            // Whoever is told of the pins looks again; a failure may have passed some time later.
            let is_same = || self.lock().lock_in_the_way == Some(cut);
            let deadline = tokio::time::Instant::now() + RETRY_WAIT;
            while is_same() && tokio::time::timeout_at(deadline, self.lock_told.notified()).await.is_ok() {}
        }
    }

    async fn keep_lock(self: &Arc<Self>, cut: u64) -> Result<(), TargetError> {
        let _one = self.locking.lock().await;
        let is_due = {
            let inner = self.lock();
            // Else it is on its way out, or has its overlays: the receiver is told of that.
            inner.manifest.locked.iter().any(|locked| locked.cut == cut)
                && !inner.kept_locks.contains_key(&cut)
        };
        if is_due {
            self.make_overlays(cut).await?;
            tracing::info!(vm = %self.vm, cut, "a locked checkpoint is kept by copying from now on: the journal has no room");
        }
        self.tell_locks(&self.lock());
        Ok(())
    }

    /// A locked checkpoint can't be kept: it is to be given up, if the group prefers that to an end of its replication (C5). False if not.
    pub(super) fn lock_not_kept(&self, cut: u64, why: &str) -> bool {
        let inner = self.lock();
        let Some(time_us) =
            inner.manifest.locked.iter().find(|locked| locked.cut == cut).map(|locked| locked.time_us)
        else {
            // It is on its way out: the receiver is told of that.
            return true;
        };
        let gives_up = inner.manifest.vm().is_ok_and(|definition| definition.give_up_history);
        drop(inner);
        let what = format!(
            "the journal {} has no room, and the locked checkpoint of {time_us} can't be kept by copying what promotion changes: {why}",
            self.folder.journal().display()
        );
        if gives_up {
            let remedy =
                "raise the VM's journal limit or the VRA's target.scratch_mib, or unlock checkpoints in time";
            self.alert(GIVEN_UP, Severity::Warning, format!("{what}; its lock was given up"), remedy);
        } else {
            let remedy = "unlock it, or raise the VM's journal limit: until then replication pauses";
            self.alert(IN_THE_WAY, Severity::Critical, what, remedy);
        }
        gives_up
    }

    /// Tells of locks whose checkpoints are gone though nobody gave them up.
    pub(super) fn tell_lost(&self, lost: &[LockedCheckpoint]) {
        let Some(first) = lost.first() else { return };
        let message = format!(
            "{} locked checkpoints of the journal {} are lost, the first of {}: they are older than the history, and their overlays are gone",
            lost.len(),
            self.folder.journal().display(),
            first.time_us
        );
        self.alert(kept_locks::LOST, Severity::Critical, message, kept_locks::LOST_REMEDY);
    }

    /// Locks are given up, soon: nobody waits for that. Should it fail, the receiver finds them in the way once more.
    pub(super) fn give_up_locks(
        self: &Arc<Self>,
        is_given_up: impl Fn(&LockedCheckpoint) -> bool + Send + 'static,
    ) {
        let vm = self.clone();
        self.runtime.spawn(async move {
            if let Err(error) = vm.clone().release(is_given_up).await {
                let error = error_chain(&error);
                tracing::warn!(vm = %vm.vm, error, "locked checkpoints were not given up");
            }
        });
    }

    /// Takes locks out of the manifest. What they keep is let go of when that is durable: else a crash would bring back a lock whose checkpoint
    /// has gone.
    pub(super) async fn release(
        self: Arc<Self>,
        is_released: impl Fn(&LockedCheckpoint) -> bool,
    ) -> Result<Vec<LockedCheckpoint>, TargetError> {
        let _one = self.locking.lock().await;
        let (released, written) = {
            let mut inner = self.lock();
            let locked = std::mem::take(&mut inner.manifest.locked);
            let (released, kept): (Vec<_>, Vec<_>) = locked.into_iter().partition(is_released);
            inner.manifest.locked = kept;
            if released.is_empty() {
                return Ok(released);
            }
            inner.releasing.clone_from(&released);
            (released, self.write_manifest(&inner))
        };
        let result = self.manifest_written(written).await;
        let mut inner = self.lock();
        inner.releasing.clear();
        if result.is_err() {
            inner.manifest.locked.extend(released.iter().cloned());
            inner.manifest.locked.sort_by_key(|locked| locked.cut);
            // The file may lack them.
            self.write_manifest(&inner);
        }
        self.tell_locks(&inner);
        drop(inner);
        if result.is_ok() {
            self.drop_overlays();
        }
        result.map(|()| released)
    }

    async fn manifest_written(&self, written: Written) -> Result<(), TargetError> {
        let not_open = || TargetError::NotOpen { vm: self.vm, reason: self.lock().not_open.clone() };
        let written = written.ok_or_else(not_open)?.await.map_err(|_| not_open())?;
        written.map_err(|source| TargetError::ManifestNotWritten { path: self.folder.journal(), source })
    }
}
