//! What the scrub asks of a target VM, and what it tells.

use tokio::sync::oneshot;

use super::TargetVm;
use crate::api::status::Severity;
use crate::receive::scrub::{ScrubReport, Sealed};
use crate::receive::worker::Input;

impl TargetVm {
    /// The first segment after `number` that has been full for `cold_us`, or that there is none; nothing if the journal isn't open. Waits
    /// for the journal's thread.
    pub(in crate::receive) fn sealed_segment(
        &self,
        after_number: u64,
        cold_us: u64,
    ) -> Option<Option<Sealed>> {
        let (answer, sealed) = oneshot::channel();
        let vm = self.lock().key?;
        self.worker.tell(Input::SealedSegment { vm, after_number, cold_us, answer });
        sealed.blocking_recv().ok()
    }

    /// Takes what the scrub found out.
    pub(in crate::receive) fn scrubbed(&self, report: ScrubReport) {
        let mut inner = self.lock();
        inner.scrub = Some(report.status);
        let found: Vec<_> = report.damage.iter().collect();
        if inner.scrub_damage == report.damage {
            return;
        }
        inner.alerts.remove(CODE);
        let told = found.first().and_then(|(segment, findings)| {
            let first = findings.first()?;
            let places: usize = report.damage.values().map(Vec::len).sum();
            let record = first.seq.map(|seq| format!(", record {seq}")).unwrap_or_default();
            Some(format!(
                "the scrub found {places} damaged places in {} segments of the journal {}, the first in segment {segment}{record}: {}",
                report.damage.len(),
                self.folder.journal().display(),
                first.what,
            ))
        });
        inner.scrub_damage = report.damage;
        drop(inner);
        if let Some(message) = told {
            let remedy = "look at the datastore's disk; `vra-journal verify` names all places. Checkpoints that need them read errors there; \
                          what the guest writes from now on isn't concerned";
            self.alert(CODE, Severity::Critical, message, remedy);
        }
    }
}

const CODE: &str = "journal-damaged";
