//! Locked checkpoints that a promotion passes because the journal has no room (C5): what it is about to change beneath them goes to overlays
//! first, files beside the journal in the form of a scratch.
//!
//! Such a lock is a view that no door serves. It keeps the history as a view does and makes way as a view with scratch does; views of its
//! checkpoint lie on top of it. Overlays are made when the journal needs the room, not before.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use journal::view::ViewError;
use uuid::Uuid;

use super::opening::ViewKind;
use super::pins::{Pin, Purpose};
use super::{OpenedView, TargetVm};
use crate::api::status::Severity;
use crate::api::vpg::{VmDefinition, VolumeDefinition};
use crate::receive::target_error::TargetError;
use crate::receive::{error_chain, files};
use crate::view::{
    ScratchError, ScratchFile, ScratchFormatError, ScratchOwner, ViewDisk, ViewDiskError, ViewSettings,
    remove_overlay,
};

/// Wait between attempts to open overlays again that another process has.
const BUSY_WAIT: Duration = Duration::from_secs(2);

/// The alert of locks whose overlays are gone.
pub(super) const LOST: &str = "lock-lost";
pub(super) const LOST_REMEDY: &str = "look at the datastore; lock another checkpoint";
const NOT_OPEN: &str = "lock-not-open";

/// A lock that promotion may pass.
pub(super) struct KeptLock {
    /// Of the volumes that there were, in their order.
    disks: Vec<Arc<ViewDisk>>,
    files: Vec<PathBuf>,
    /// Nobody is to find it again.
    is_released: AtomicBool,
    /// The process ends: what views need of it is to be found by the next one.
    is_leaving: Arc<AtomicBool>,
}

/// What there is of a lock's overlays.
pub(super) enum Kept {
    /// Files of a former process, which are being opened. What they keep is pinned by this.
    Former {
        _pin: Pin,
    },
    Open(Arc<KeptLock>),
}

impl Kept {
    /// The overlays, as far as they are open.
    pub(super) fn disks(&self) -> &[Arc<ViewDisk>] {
        match self {
            Self::Former { .. } => &[],
            Self::Open(kept) => &kept.disks,
        }
    }
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
        if !self.is_released.load(Ordering::Acquire) || self.is_leaving.load(Ordering::Acquire) {
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
        let opened = self.disks.iter().map(|disk| disk.scratch_identity());
        // The file of that name may be another lock's of the same moment.
        let own = self.files.iter().zip(opened.chain(std::iter::repeat(None)));
        for (path, _) in own.filter(|(path, opened)| opened.is_none() || file_identity(path) == *opened) {
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
        let pin = self.pin_for(cut, 0, Purpose::Lock);
        let kept = self.open_overlays(pin, cut, 0, Instant::now()).await?;
        let mut inner = self.lock();
        if inner.closed {
            // It goes again, with its files.
            drop(inner);
            kept.release();
            return Err(TargetError::NotOpen { vm: self.vm, reason: None });
        }
        inner.kept_locks.insert(cut, Kept::Open(Arc::new(kept)));
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
            let kept_seq = self.lock().pins.kept_of_lock(cut);
            let pin = self.pin_for(cut, kept_seq, Purpose::Lock);
            let opened = match self.overlays_kept_seq(cut) {
                Ok(kept_seq) => self.open_overlays(pin, cut, kept_seq, lock_until).await,
                Err(error) => Err(error),
            };
            if self.lock().closed || !self.is_former(cut) {
                // Nobody wants them any more, and whoever let go of them removed their names.
                return;
            }
            let error = match opened {
                Ok(kept) => {
                    let former = {
                        let mut inner = self.lock();
                        inner.alerts.remove(NOT_OPEN);
                        inner.kept_locks.insert(cut, Kept::Open(Arc::new(kept)))
                    };
                    // Its pin wants the lock that was held.
                    drop(former);
                    self.tell_locks(&self.lock());
                    // The view that it was opened for may have been closed meanwhile.
                    self.drop_overlays();
                    return tracing::info!(vm = %self.vm, cut, "the overlays of a locked checkpoint are open again");
                }
                Err(error) => error,
            };
            let journal = self.folder.journal();
            let why = error_chain(&error);
            if !is_lost(&error) {
                let message = format!(
                    "overlays of a locked checkpoint of the journal {} can't be opened: {why}",
                    journal.display()
                );
                let remedy = "mend that: the VRA tries again by itself. Until then the journal keeps all that came after the checkpoint";
                self.alert(NOT_OPEN, Severity::Warning, message, remedy);
                tokio::time::sleep(BUSY_WAIT).await;
                continue;
            }
            self.lock().alerts.remove(NOT_OPEN);
            let message = format!("a locked checkpoint of the journal {} is lost: {why}", journal.display());
            self.alert(LOST, Severity::Critical, message, LOST_REMEDY);
            // The files stay as long as somebody may look for them.
            if let Err(error) = self.clone().release(move |locked| locked.cut == cut).await {
                tracing::warn!(vm = %self.vm, cut, error = error_chain(&error), "a lost lock was not given up");
            }
            let former = self.lock().kept_locks.remove(&cut);
            drop(former);
            return self.remove_overlays(cut);
        }
    }

    fn is_former(&self, cut: u64) -> bool {
        matches!(self.lock().kept_locks.get(&cut), Some(Kept::Former { .. }))
    }

    /// Through which number the overlays of a former process keep everything.
    fn overlays_kept_seq(&self, cut: u64) -> Result<u64, TargetError> {
        let definition = self.definition();
        let paths = definition.volumes.iter().map(|volume| self.folder.overlay(cut, volume.number));
        let mut kept_seq = u64::MAX;
        for path in paths {
            match ScratchFile::kept_seq_at(&path, Instant::now()) {
                Ok(found) => kept_seq = kept_seq.min(found),
                // A volume that joined later has none.
                Err(ScratchError::Missing { .. }) => {}
                Err(error) => return Err(overlay_error(path, error.into())),
            }
        }
        Ok(if kept_seq == u64::MAX { 0 } else { kept_seq })
    }

    /// Opens the overlays of a locked checkpoint, or makes them if nothing was promoted past it.
    async fn open_overlays(
        self: &Arc<Self>,
        pin: Pin,
        cut: u64,
        kept_seq: u64,
        lock_until: Instant,
    ) -> Result<KeptLock, TargetError> {
        let oldest_seq = self.oldest_seq().await?;
        let opened = self.open_pinned(ViewKind::Former, (pin, oldest_seq), (cut, kept_seq), None).await?;
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
        let is_leaving = Arc::clone(&self.is_leaving);
        let mut kept =
            KeptLock { disks: Vec::new(), files: Vec::new(), is_released: false.into(), is_leaving };
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
            // No VRA's, and no view's: whoever has the folder has its locks.
            vra: Uuid::nil(),
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

    /// Lets go of the overlays of checkpoints that are locked no more. Views of them keep theirs, also those that are to be opened again.
    pub(super) fn drop_overlays(&self) {
        let mut inner = self.lock();
        let mut wanted: BTreeSet<u64> = inner.manifest.locked.iter().map(|locked| locked.cut).collect();
        wanted.extend(inner.pins.awaited_seqs());
        let dropped: Vec<(u64, Kept)> =
            inner.kept_locks.extract_if(.., |cut, _| !wanted.contains(cut)).collect();
        drop(inner);
        for (cut, kept) in dropped {
            match &kept {
                Kept::Open(kept) => kept.release(),
                Kept::Former { .. } => self.remove_overlays(cut),
            }
            drop(kept);
        }
    }

    /// The process ends: overlays stay for the next one, as long as a view or lock needs them.
    pub(in crate::receive) fn leave_overlays(&self) {
        self.is_leaving.store(true, Ordering::Release);
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

fn file_identity(path: &Path) -> Option<(u64, u64)> {
    std::fs::metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

/// Whether the overlays will never be there again.
fn is_lost(error: &TargetError) -> bool {
    match error {
        TargetError::View(ViewError::Gone { .. } | ViewError::NoHistory) => true,
        TargetError::Overlay { source: ViewDiskError::Scratch(error), .. } => match error {
            ScratchError::Missing { .. } | ScratchError::Damaged { .. } | ScratchError::Other { .. } => true,
            // What a newer release wrote is there for it.
            ScratchError::Format { source, .. } => !matches!(source, ScratchFormatError::Version(_)),
            _ => false,
        },
        _ => false,
    }
}

#[cfg(test)]
mod tests;
