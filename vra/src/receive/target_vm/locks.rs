//! Checkpoints that are kept when they grow older than the history.

use std::sync::Arc;

use tokio::sync::oneshot;

use super::TargetVm;
use crate::api::CheckpointId;
use crate::api::status::Severity;
use crate::receive::manifest::LockedCheckpoint;
use crate::receive::target_error::TargetError;
use crate::receive::worker::Input;

impl TargetVm {
    /// The checkpoints that are locked.
    pub fn locked_checkpoints(&self) -> Vec<CheckpointId> {
        self.lock().manifest.locked.iter().map(|locked| locked.checkpoint).collect()
    }

    /// Locks or unlocks a checkpoint, durably. Again is harmless.
    ///
    /// # Errors
    /// There is no such checkpoint, or the journal failed.
    pub async fn set_lock(
        self: &Arc<Self>,
        checkpoint: CheckpointId,
        locks: bool,
    ) -> Result<(), TargetError> {
        // The pin comes first (C2): what is looked up now must still be there when the lock is in force.
        let _pin = self.pin();
        self.oldest_seq().await?;
        let listed = self.checkpoints().await?.find(checkpoint).cloned();
        let listed = listed.ok_or(TargetError::NoSuchCheckpoint { vm: self.vm, checkpoint })?;
        let written = {
            let mut inner = self.lock();
            let locked = &mut inner.manifest.locked;
            if locked.iter().any(|locked| locked.checkpoint == checkpoint) == locks {
                return Ok(());
            }
            if locks {
                locked.push(LockedCheckpoint { checkpoint, cut: listed.cut, time_us: listed.time_us });
                locked.sort_by_key(|locked| locked.cut);
            } else {
                locked.retain(|locked| locked.checkpoint != checkpoint);
            }
            inner.alerts.remove("lock-given-up");
            self.tell_pins(&inner, None);
            self.write_manifest(&inner)
        };
        let not_open = || TargetError::NotOpen { vm: self.vm, reason: self.lock().not_open.clone() };
        written.ok_or_else(not_open)?.await.map_err(|_| not_open())
    }

    /// The journal has no more room: the oldest locked checkpoint is given up, if the group prefers that to an end of its replication (C5).
    pub(super) fn lock_in_the_way(&self, cut: u64) {
        let mut inner = self.lock();
        let Some(index) = inner.manifest.locked.iter().position(|locked| locked.cut == cut) else { return };
        let time_us = inner.manifest.locked[index].time_us;
        let journal = self.folder.journal();
        let gives_up = inner.manifest.vm().is_ok_and(|definition| definition.give_up_history);
        if gives_up {
            inner.manifest.locked.remove(index);
            self.tell_pins(&inner, None);
            // Nobody waits for it: should it be lost, the lock is found in the way once more.
            self.write_manifest(&inner);
            drop(inner);
            let message = format!(
                "the journal {} has no room: the lock of the checkpoint of {time_us} was given up",
                journal.display()
            );
            let remedy = "raise the VM's journal limit, or unlock checkpoints in time";
            self.alert("lock-given-up", Severity::Warning, message, remedy);
        } else {
            drop(inner);
            let message = format!(
                "the journal {} has no room, and the locked checkpoint of {time_us} keeps it from making some",
                journal.display()
            );
            self.alert(
                "lock-in-the-way",
                Severity::Critical,
                message,
                "unlock it, or raise the VM's journal limit",
            );
        }
    }

    /// All checkpoints are gone.
    pub(super) fn forget_locks(&self) {
        let mut inner = self.lock();
        if !std::mem::take(&mut inner.manifest.locked).is_empty() {
            self.tell_pins(&inner, None);
            self.write_manifest(&inner);
        }
    }

    /// None if the files are closed.
    fn write_manifest(&self, inner: &super::Inner) -> Option<oneshot::Receiver<()>> {
        let (answer, written) = oneshot::channel();
        let (vm, text) = (inner.key?, inner.manifest.to_text());
        self.worker.tell(Input::SetManifest { vm, text, answer: Some(answer) }).then_some(written)
    }
}
