//! A VM's files opened again after a failure, beneath the views that are open.

use std::sync::Arc;
use std::time::Duration;

use journal::recovery::SurveyOptions;
use journal::storage::ring::{Access, DirectFile};
use journal::view::{Reader, ViewError};

use super::file_watch::OpenedFiles;
use super::{TargetVm, attach_files, locks, preserving};
use crate::receive::files::{self, VmFiles};
use crate::receive::target_error::TargetError;

/// Wait between attempts to open a VM's files again after a failure.
const REOPEN_WAIT: Duration = Duration::from_secs(5);

/// Alerts that a receiver raises and takes back.
const OF_THE_RECEIVER: [&str; 7] = [
    "storage-failed",
    "journal-full",
    "datastore-full",
    "history-shortened",
    "promotion-stuck",
    locks::IN_THE_WAY,
    preserving::IN_THE_WAY,
];

impl TargetVm {
    /// Opens the files again after a failure, until it works or the VM is closed.
    pub(super) async fn reopen(self: Arc<Self>, trusted_through: u64) {
        loop {
            let vm = self.clone();
            let opened = self.runtime.spawn_blocking(move || {
                let before = vm.lock().opened_files.clone();
                if let Some(path) = before.first_moved() {
                    return Err(TargetError::Moved { path: path.to_owned() });
                }
                let files = files::open(&vm.folder, vm.vm, Some(trusted_through), vm.keys.keys())?;
                // Again: what was opened may have come between.
                if let Some(path) = before.first_other(&OpenedFiles::of(&vm.folder, &files)) {
                    return Err(TargetError::Moved { path: path.to_owned() });
                }
                vm.repoint_views()?;
                Ok(files)
            });
            let opened = opened
                .await
                .unwrap_or_else(|error| Err(files::host("opening the files", std::io::Error::other(error))));
            if self.attach_again(opened) {
                return;
            }
            tokio::time::sleep(REOPEN_WAIT).await;
        }
    }

    /// An opening moves the journal's newest segment, whatever is pinned, and whoever writes next uses its old place again: open views
    /// are told before that (C3). No view is added meanwhile, since [`super::Pin::shows`] refuses that as long as the files are not open.
    fn repoint_views(&self) -> Result<(), TargetError> {
        let views = self.lock().pins.views();
        if views.is_empty() {
            return Ok(());
        }
        let mut storage = files::ring()?;
        let file = storage.add_file(DirectFile::open(&self.folder.journal(), Access::ReadOnly)?);
        let options = SurveyOptions { keys: self.keys.site(), ..SurveyOptions::default() };
        let reader = Reader::open(&mut storage, file, &options).map_err(TargetError::View)?;
        for (seq, disks) in views {
            let kept_seq = disks.iter().map(|disk| disk.kept_seq()).min().unwrap_or_default();
            let mut view = match reader.view_kept(seq, kept_seq) {
                Ok(view) => view,
                // It was not durable when the storage failed.
                Err(ViewError::Gone { .. } | ViewError::NoHistory) => {
                    disks.iter().for_each(|disk| disk.set_gone());
                    continue;
                }
                Err(error) => return Err(TargetError::View(error)),
            };
            view.follow(&self.promoted);
            for disk in disks {
                disk.repoint(view.take_volume(disk.number()).map_err(TargetError::View)?);
            }
        }
        Ok(())
    }

    /// Goes on with files that were opened again. False when it should be tried once more.
    fn attach_again(self: &Arc<Self>, opened: Result<VmFiles, TargetError>) -> bool {
        let mut inner = self.lock();
        if inner.closed {
            return true;
        }
        let files = match opened {
            Ok(files) => files,
            Err(error) => {
                inner.not_open = Some(crate::receive::error_chain(&error));
                return false;
            }
        };
        let superblock = &files.opened.superblock;
        let bad_ranges = self.promoted.reopened(superblock.low_water.seq, &files.opened.bad_ranges);
        let key = (inner.next_key)();
        inner.opened_files = OpenedFiles::of(&self.folder, &files);
        // Before the worker does anything with the files (C2).
        let overlays = inner.kept_locks.keys().copied().collect();
        let lost = inner.manifest.forget_stale_locks(superblock, &overlays);
        let is_noted = inner.manifest == files.manifest;
        let pins = inner.needed();
        let (window_bytes, vm) = (self.settings.window_bytes, Arc::downgrade(self));
        // By what is in force, which the file may not have yet.
        inner.status = attach_files(&self.worker, key, files, &inner.manifest, window_bytes, pins, vm);
        // Whoever receives now begins anew with what it tells.
        (inner.wanted_way, inner.lock_in_the_way) = (None, None);
        OF_THE_RECEIVER.iter().for_each(|code| drop(inner.alerts.remove(code)));
        (inner.key, inner.not_open) = (Some(key), None);
        inner.reopenings += 1;
        if !is_noted {
            // What was to be written when the storage failed.
            self.write_manifest(&inner);
        }
        inner.not_kept_since.clear();
        drop(inner);
        self.tell_lost(&lost);
        self.drop_overlays();
        self.tell_bad_ranges(&bad_ranges);
        if let Err(error) = self.follow_encryption() {
            let error = crate::receive::error_chain(&error);
            tracing::warn!(vm = %self.vm, error, "the journal's encryption doesn't follow the definition");
        }
        tracing::info!(vm = %self.vm, "the journal is open again");
        true
    }
}
