//! Locked checkpoints that a promotion passes because the journal has no room (C5): what it is about to change beneath them goes to overlays
//! first, files beside the journal in the form of a scratch.
//!
//! Such a lock is a view that no door serves. It keeps the history as a view does and makes way as a view with scratch does; views of its
//! checkpoint lie on top of it. Overlays are made when the journal needs the room, not before.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use journal::view::ViewError;
use uuid::Uuid;

use super::pins::{Pin, Purpose};
use super::{OpenedView, TargetVm};
use crate::api::status::Severity;
use crate::api::vpg::{VmDefinition, VolumeDefinition};
use crate::receive::target_error::TargetError;
use crate::receive::{error_chain, files};
use crate::view::{
    ScratchError, ScratchFile, ScratchOwner, ViewDisk, ViewDiskError, ViewSettings, remove_overlay,
};

/// Wait between attempts to open overlays again that another process has.
const BUSY_WAIT: Duration = Duration::from_secs(2);

pub(super) const LOST: &str = "lock-lost";

/// A lock that promotion may pass.
pub(super) struct KeptLock {
    /// Of the volumes that there were, in their order.
    disks: Vec<Arc<ViewDisk>>,
    files: Vec<PathBuf>,
    /// Nobody is to find it again.
    is_released: AtomicBool,
}

/// What there is of a lock's overlays.
pub(super) enum Kept {
    /// Files of a former process, which are being opened. What they keep is pinned by this.
    Former {
        _pin: Pin,
    },
    Open(Arc<KeptLock>),
}

impl KeptLock {
    /// The disk of a volume, if there was one.
    pub(super) fn disk(&self, volume: u16) -> Option<Arc<ViewDisk>> {
        self.disks.iter().find(|disk| disk.number() == volume).cloned()
    }

    /// Through where promotion changes nothing that they don't have.
    pub(super) fn kept_seq(&self) -> u64 {
        self.disks.iter().map(|disk| disk.kept_seq()).min().unwrap_or_default()
    }

    /// The files go with the last view of it.
    fn release(&self) {
        self.is_released.store(true, Ordering::Release);
    }
}

impl Drop for KeptLock {
    fn drop(&mut self) {
        if !self.is_released.load(Ordering::Acquire) {
            for disk in &self.disks {
                if let Err(error) = disk.close_scratch() {
                    tracing::warn!(
                        error = error_chain(&error),
                        "an overlay could not be closed in order: what was flushed is there"
                    );
                }
            }
            return;
        }
        for path in &self.files {
            if let Err(error) = remove_overlay(path) {
                tracing::warn!(error = error_chain(&error), "an overlay of a lock can't be removed");
            }
        }
    }
}

impl TargetVm {
    /// The locked checkpoint at this number, if promotion may pass it.
    ///
    /// # Errors
    /// Its overlays are not open yet.
    pub(super) fn kept_at(&self, seq: u64) -> Result<Option<Arc<KeptLock>>, TargetError> {
        match self.lock().kept_locks.get(&seq) {
            None => Ok(None),
            Some(Kept::Open(kept)) => Ok(Some(Arc::clone(kept))),
            Some(Kept::Former { .. }) => {
                let reason = Some("overlays of a locked checkpoint are being opened".to_owned());
                Err(TargetError::NotOpen { vm: self.vm, reason })
            }
        }
    }

    /// Makes overlays for a locked checkpoint.
    ///
    /// # Errors
    /// It can't be kept that way.
    pub(super) async fn make_overlays(self: &Arc<Self>, cut: u64) -> Result<(), TargetError> {
        let kept = self.open_overlays(cut, 0, Instant::now()).await?;
        self.lock().kept_locks.insert(cut, Kept::Open(Arc::new(kept)));
        Ok(())
    }

    /// Opens the overlays of a former process again. `pin` keeps everything meanwhile, from before the worker promotes anything.
    pub(super) fn await_overlays(self: &Arc<Self>, cut: u64, pin: u64) {
        let pin = self.pin_of(pin);
        self.lock().kept_locks.insert(cut, Kept::Former { _pin: pin });
        self.runtime.spawn(self.clone().open_former(cut));
    }

    async fn open_former(self: Arc<Self>, cut: u64) {
        loop {
            let lock_until = Instant::now() + BUSY_WAIT;
            let kept_seq = self.overlays_kept_seq(cut);
            let opened = match kept_seq {
                Ok(kept_seq) => self.open_overlays(cut, kept_seq, lock_until).await,
                Err(error) => Err(error),
            };
            if self.lock().closed {
                return;
            }
            let error = match opened {
                Ok(kept) => {
                    let former = {
                        let mut inner = self.lock();
                        if !inner.manifest.locked.iter().any(|locked| locked.cut == cut) {
                            kept.release();
                        }
                        inner.kept_locks.insert(cut, Kept::Open(Arc::new(kept)))
                    };
                    // Its pin wants the lock that was held.
                    drop(former);
                    self.tell_locks(&self.lock());
                    return tracing::info!(vm = %self.vm, cut, "the overlays of a locked checkpoint are open again");
                }
                Err(error) => error,
            };
            if !is_lost(&error) {
                tracing::warn!(vm = %self.vm, cut, error = error_chain(&error), "overlays of a locked checkpoint can't be opened yet");
                tokio::time::sleep(BUSY_WAIT).await;
                continue;
            }
            let former = self.lock().kept_locks.remove(&cut);
            drop(former);
            self.remove_overlays(cut);
            let journal = self.folder.journal();
            let message = format!(
                "a locked checkpoint of the journal {} is lost: {}",
                journal.display(),
                error_chain(&error)
            );
            self.alert(LOST, Severity::Critical, message, "look at the datastore; lock another checkpoint");
            self.give_up_locks(move |locked| locked.cut == cut);
            return;
        }
    }

    /// Through which number the overlays of a former process keep everything.
    fn overlays_kept_seq(&self, cut: u64) -> Result<u64, TargetError> {
        let definition = self.definition();
        let paths = definition.volumes.iter().map(|volume| self.folder.overlay(cut, volume.number));
        let mut kept_seq = u64::MAX;
        // A volume that joined later has none.
        for path in paths.filter(|path| path.exists()) {
            let found = ScratchFile::kept_seq_at(&path, Instant::now())
                .map_err(|error| overlay_error(path, error.into()))?;
            kept_seq = kept_seq.min(found);
        }
        Ok(if kept_seq == u64::MAX { 0 } else { kept_seq })
    }

    /// Opens the overlays of a locked checkpoint, or makes them if nothing was promoted past it.
    async fn open_overlays(
        self: &Arc<Self>,
        cut: u64,
        kept_seq: u64,
        lock_until: Instant,
    ) -> Result<KeptLock, TargetError> {
        let pin = self.pin();
        let oldest_seq = self.oldest_seq().await?;
        let opened = self.open_pinned(pin, oldest_seq, cut, kept_seq, None).await?;
        let vm = self.clone();
        let opening = self.runtime.spawn_blocking(move || vm.disks_over(opened, cut, kept_seq, lock_until));
        let opened = opening.await;
        opened.unwrap_or_else(|error| Err(files::host("opening overlays", std::io::Error::other(error))))
    }

    fn disks_over(
        &self,
        mut opened: OpenedView,
        cut: u64,
        kept_seq: u64,
        lock_until: Instant,
    ) -> Result<KeptLock, TargetError> {
        let definition = self.definition();
        let mut kept = KeptLock { disks: Vec::new(), files: Vec::new(), is_released: false.into() };
        // Without all of them they are of no use: what was made goes again.
        let is_new = kept_seq == 0;
        kept.is_released.store(is_new, Ordering::Release);
        for volume in &definition.volumes {
            let source = match opened.source(volume.number) {
                Err(TargetError::View(ViewError::NoVolume(_))) => continue,
                source => source?,
            };
            let owner = Self::overlay_owner(&definition, volume, cut, source.volume.size_bytes());
            let (path, keys) = (self.folder.overlay(cut, volume.number), opened.scratch_keys());
            let file = if is_new {
                // What a process left that did not come to use it.
                remove_overlay(&path).and_then(|()| {
                    ScratchFile::make_overlay(&path, &owner, &keys, self.settings.overlay_bytes)
                })
            } else {
                ScratchFile::open_overlay(&path, &owner, &keys, lock_until)
            };
            let file = file.map_err(|error| overlay_error(path.clone(), error.into()))?;
            kept.files.push(path.clone());
            let settings =
                ViewSettings { logical_block_bytes: volume.logical_block_bytes, look_for_holes: false };
            let disk = ViewDisk::new(source, settings, Some(file));
            let disk = disk.map_err(|error| overlay_error(path, error))?;
            opened.pin.is_for(Purpose::Lock);
            opened.pin.shows(&disk)?;
            kept.disks.push(disk);
        }
        kept.is_released.store(false, Ordering::Release);
        Ok(kept)
    }

    fn overlay_owner(
        vm: &VmDefinition,
        volume: &VolumeDefinition,
        cut: u64,
        disk_bytes: u64,
    ) -> ScratchOwner {
        ScratchOwner {
            vra: vm.target.id.0,
            // No view's.
            view: Uuid::nil(),
            vm: vm.id.0,
            journal: vm.journal.0,
            volume: volume.id.0,
            number: volume.number,
            seq: cut,
            disk_bytes,
            logical_block_bytes: volume.logical_block_bytes,
        }
    }

    pub(super) fn remove_overlays(&self, cut: u64) {
        let definition = self.definition();
        for volume in &definition.volumes {
            if let Err(error) = remove_overlay(&self.folder.overlay(cut, volume.number)) {
                tracing::warn!(vm = %self.vm, error = error_chain(&error), "an overlay of no lock can't be removed");
            }
        }
    }

    /// Lets go of the overlays of checkpoints that are locked no more. Views of them keep theirs.
    pub(super) fn drop_overlays(&self) {
        let mut inner = self.lock();
        let locked: BTreeSet<u64> = inner.manifest.locked.iter().map(|locked| locked.cut).collect();
        let dropped: Vec<Kept> =
            inner.kept_locks.extract_if(.., |cut, _| !locked.contains(cut)).map(|(_, kept)| kept).collect();
        drop(inner);
        for kept in dropped {
            if let Kept::Open(kept) = &kept {
                kept.release();
            }
            drop(kept);
        }
    }

    /// Lets go of all overlays, for the next opening.
    pub(super) fn close_overlays(&self) {
        let kept = std::mem::take(&mut self.lock().kept_locks);
        drop(kept);
    }
}

fn overlay_error(path: PathBuf, source: ViewDiskError) -> TargetError {
    TargetError::Overlay { path, source }
}

/// Whether the overlays will never be there again.
fn is_lost(error: &TargetError) -> bool {
    match error {
        TargetError::View(_) => true,
        TargetError::Overlay { source: ViewDiskError::Scratch(error), .. } => matches!(
            error,
            ScratchError::Missing { .. }
                | ScratchError::Format { .. }
                | ScratchError::Damaged { .. }
                | ScratchError::Other { .. }
        ),
        _ => false,
    }
}

#[cfg(test)]
mod tests;
