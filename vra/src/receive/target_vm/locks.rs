//! Checkpoints that are kept when they grow older than the history.

use std::sync::Arc;

use journal::writer::ChangeError;
use tokio::sync::oneshot;

use super::TargetVm;
use crate::api::CheckpointId;
use crate::api::status::Severity;
use crate::receive::manifest::LockedCheckpoint;
use crate::receive::target_error::TargetError;

/// Locks of one VM at most: each takes some 200 bytes of the journal's manifest, which has room for 384 KiB in all.
const MAX_LOCKS: usize = 1000;

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
                locked.push(LockedCheckpoint { checkpoint, cut: listed.cut, time_us: listed.time_us });
                locked.sort_by_key(|locked| locked.cut);
            }
            inner.alerts.remove("lock-given-up");
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
        self.lock().alerts.remove("lock-given-up");
        Ok(released.into_iter().next())
    }

    /// A locked checkpoint keeps a full journal from making room: it is given up, if the group prefers that to an end of its replication (C5).
    pub(super) fn lock_in_the_way(self: &Arc<Self>, cut: u64) {
        let inner = self.lock();
        let Some(time_us) =
            inner.manifest.locked.iter().find(|locked| locked.cut == cut).map(|locked| locked.time_us)
        else {
            // It is on its way out: the receiver is told of that.
            return;
        };
        let gives_up = inner.manifest.vm().is_ok_and(|definition| definition.give_up_history);
        drop(inner);
        let journal = self.folder.journal();
        let (code, severity, message, remedy) = if gives_up {
            // Others of the same cut are just as much in the way.
            self.give_up_locks(move |locked| locked.cut == cut);
            (
                "lock-given-up",
                Severity::Warning,
                format!(
                    "the journal {} has no room: the lock of the checkpoint of {time_us} was given up",
                    journal.display()
                ),
                "raise the VM's journal limit, or unlock checkpoints in time",
            )
        } else {
            (
                "lock-in-the-way",
                Severity::Critical,
                format!(
                    "the journal {} has no room, and the locked checkpoint of {time_us} keeps it from making some",
                    journal.display()
                ),
                "unlock it, or raise the VM's journal limit",
            )
        };
        self.alert(code, severity, message, remedy);
    }

    /// Locks are given up, soon: nobody waits for that. Should it fail, the receiver finds them in the way once more.
    pub(super) fn give_up_locks(
        self: &Arc<Self>,
        is_given_up: impl Fn(&LockedCheckpoint) -> bool + Send + 'static,
    ) {
        let vm = self.clone();
        self.runtime.spawn(async move {
            if let Err(error) = vm.clone().release(is_given_up).await {
                let error = crate::receive::error_chain(&error);
                tracing::warn!(vm = %vm.vm, error, "locked checkpoints were not given up");
            }
        });
    }

    /// Takes locks out of the manifest. What they keep is let go of when that is durable: else a crash would bring back a lock whose checkpoint
    /// has gone.
    async fn release(
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
            inner.manifest.locked.extend(&released);
            inner.manifest.locked.sort_by_key(|locked| locked.cut);
            // The file may lack them.
            self.write_manifest(&inner);
        }
        self.tell_locks(&inner);
        result.map(|()| released)
    }

    async fn manifest_written(&self, written: Written) -> Result<(), TargetError> {
        let not_open = || TargetError::NotOpen { vm: self.vm, reason: self.lock().not_open.clone() };
        let written = written.ok_or_else(not_open)?.await.map_err(|_| not_open())?;
        written.map_err(|source| TargetError::ManifestNotWritten { path: self.folder.journal(), source })
    }
}
