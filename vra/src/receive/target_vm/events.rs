//! What a target VM learns from its receiver, and what of it is an alert.

use std::sync::Arc;

use journal::bad_ranges::BadRanges;

use super::TargetVm;
use crate::api::TimeUs;
use crate::api::status::{Alert, Severity};
use crate::receive::error_chain;
use crate::receive::receiver_types::{Failure, ReceiverEvent};

impl TargetVm {
    pub(super) fn event(self: Arc<Self>, event: ReceiverEvent) {
        match event {
            ReceiverEvent::Granted { new_generation } => {
                tracing::info!(vm = %self.vm, new_generation, "a source streams");
            }
            ReceiverEvent::SyncEnded => {
                tracing::info!(vm = %self.vm, "the sync is complete: checkpoints count from now on");
                self.promoted.advance(0, &BadRanges::default());
                self.tell_bad_ranges(&BadRanges::default());
                self.lock().alerts.remove("history-given-up");
            }
            ReceiverEvent::HistoryGivenUp { checkpoints } => {
                // The journal's changes are made in their order: the manifest is not written before the history has gone.
                self.give_up_locks(|_| true);
                let message =
                    format!("{checkpoints} checkpoints were given up so that a full sync can go on");
                let remedy = "wait for the sync's end: until then nothing can be recovered";
                self.alert("history-given-up", Severity::Critical, message, remedy);
            }
            ReceiverEvent::Full { no_space: true } => {
                let message = format!("the datastore of {} is full", self.folder.path().display());
                self.alert("datastore-full", Severity::Critical, message, "free space there");
            }
            ReceiverEvent::Full { no_space: false } => {
                let message = format!("the journal {} is full", self.folder.journal().display());
                self.alert("journal-full", Severity::Critical, message, "raise the VM's journal limit");
            }
            ReceiverEvent::Room => {
                tracing::info!(vm = %self.vm, "the journal takes writes again");
                let mut inner = self.lock();
                inner.alerts.remove("journal-full");
                inner.alerts.remove("datastore-full");
            }
            ReceiverEvent::Promoted { through_seq, written_bytes, bad_ranges } => {
                self.promoted.advance(through_seq, &bad_ranges);
                self.tell_bad_ranges(&bad_ranges);
                self.lock().alerts.remove("promotion-stuck");
                tracing::debug!(vm = %self.vm, through_seq, written_bytes, "promoted");
            }
            ReceiverEvent::HistoryShortened { through_us } => {
                let through = crate::api::TimeUs(through_us);
                let message = format!(
                    "the journal {} has no room for the whole history: checkpoints through {through} are given up",
                    self.folder.journal().display()
                );
                let remedy = "raise the VM's journal limit, or shorten its history";
                self.alert("history-shortened", Severity::Warning, message, remedy);
            }
            ReceiverEvent::HistoryFits => {
                tracing::info!(vm = %self.vm, "the journal has room for the whole history again");
                self.lock().alerts.remove("history-shortened");
            }
            ReceiverEvent::PromotionStuck { error } => {
                let message = format!(
                    "nothing can be promoted to the recovery disks in {}: {}",
                    self.folder.path().display(),
                    error_chain(&error)
                );
                let remedy = "the journal fills up meanwhile: free space on the datastore, or replicate the VM anew if its journal is damaged";
                self.alert("promotion-stuck", Severity::Critical, message, remedy);
            }
            ReceiverEvent::LockInTheWay { cut } => self.lock_in_the_way(Some(cut)),
            ReceiverEvent::ViewInTheWay { through_seq } => self.view_in_the_way(through_seq),
            ReceiverEvent::LockOutOfTheWay => self.lock_in_the_way(None),
            ReceiverEvent::Failed { failure, durable_through } => {
                let reason = error_chain(&failure);
                let message = format!("the storage in {} failed: {reason}", self.folder.path().display());
                let remedy = match failure {
                    Failure::Moved { .. } => {
                        "put the file back that was there, or, if what is there now is a whole copy of journal and recovery disks made together, restart the VRA"
                    }
                    Failure::Journal(_) | Failure::Disk(_) => "look at the datastore",
                };
                self.alert("storage-failed", Severity::Critical, message, remedy);
                let mut inner = self.lock();
                inner.key = None;
                inner.not_open = Some(reason);
                drop(inner);
                self.runtime.clone().spawn(self.reopen(durable_through));
            }
        }
    }

    /// Says what of the recovery disks can't be trusted, or nothing any more.
    pub(super) fn tell_bad_ranges(&self, bad_ranges: &BadRanges) {
        let mut inner = self.lock();
        if inner.told_bad_ranges == *bad_ranges {
            return;
        }
        inner.told_bad_ranges = bad_ranges.clone();
        inner.alerts.remove("recovery-disk-damaged");
        drop(inner);
        let Some(first) = bad_ranges.iter().next() else { return };
        let all_bytes: u64 = bad_ranges.iter().map(|bad| bad.len_bytes).sum();
        let message = format!(
            "{all_bytes} bytes of the recovery disks in {} are lost, in {} places, and read as errors: records of the journal were damaged \
             before they were promoted, the first one at {} of disk {}, record {}",
            self.folder.path().display(),
            bad_ranges.len(),
            first.offset_bytes,
            first.volume,
            first.seq,
        );
        let remedy = "look at the datastore's disk; writing there in the guest mends a place, replicating the VM anew mends all";
        self.alert("recovery-disk-damaged", Severity::Critical, message, remedy);
    }

    /// Raises an alert, unless it is there with the same message.
    pub(super) fn alert(&self, code: &'static str, severity: Severity, message: String, remedy: &str) {
        let mut inner = self.lock();
        if inner.alerts.get(code).is_some_and(|alert| alert.message == message) {
            return;
        }
        tracing::warn!(vm = %self.vm, code, remedy, "{message}");
        let (vpg, remedy) = (Some(inner.manifest.vpg.id), Some(remedy.to_owned()));
        let since_us = TimeUs::now();
        let alert =
            Alert { code: code.to_owned(), severity, vm: Some(self.vm), vpg, message, remedy, since_us };
        inner.alerts.insert(code, alert);
    }
}
