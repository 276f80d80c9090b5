//! A journal that uses more than its owner wants to be told of.

use std::sync::PoisonError;

use super::TargetVm;
use crate::api::status::Severity;

const CODE: &str = "journal-warning";

impl TargetVm {
    /// Looks whether the journal uses more than its definition's warning threshold.
    pub(in crate::receive) fn look_at_journal_size(&self) {
        let mut inner = self.lock();
        let Ok(definition) = inner.manifest.vm() else { return };
        let (warning_bytes, limit_bytes) = (definition.journal_warning_bytes(), definition.journal_limit());
        let used_bytes = inner.status.lock().unwrap_or_else(PoisonError::into_inner).journal_used_bytes;
        let is_told = inner.alerts.contains_key(CODE);
        let Some(warning_bytes) = warning_bytes.filter(|warning| is_over(used_bytes, *warning, is_told))
        else {
            inner.alerts.remove(CODE);
            return;
        };
        drop(inner);
        let message = format!(
            "the journal in {} has reached its warning threshold, {} MiB of {} MiB",
            self.folder.path().display(),
            warning_bytes >> 20,
            limit_bytes >> 20,
        );
        let remedy = "at the limit the history gets shorter: raise the journal limit (`zvm vpg edit --journal-limit`), shorten the history, or \
                      look at what the VM writes";
        self.alert(CODE, Severity::Warning, message, remedy);
    }
}

/// Use goes up and down by whole slots with each promotion: an alert stays until it is a sixteenth below.
fn is_over(used_bytes: u64, warning_bytes: u64, is_told: bool) -> bool {
    let slack_bytes = if is_told { warning_bytes / 16 } else { 0 };
    used_bytes >= warning_bytes - slack_bytes && used_bytes > 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_told_at_the_threshold_and_not_taken_back_at_once() {
        assert!(!is_over(99, 100, false) && is_over(100, 100, false));
        assert!(is_over(94, 100, true) && !is_over(93, 100, true));
        assert!(!is_over(0, 0, false), "an empty journal");
    }
}
