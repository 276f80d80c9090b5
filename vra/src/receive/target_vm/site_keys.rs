//! Which of the site's keys a target VM needs.

use std::collections::BTreeSet;

use journal::crypt::SiteKeyId;
use tokio::sync::oneshot;

use super::TargetVm;
use crate::receive::worker::Input;

impl TargetVm {
    /// Names of the site keys that its journal can't be read without; none while the journal isn't open.
    pub(in crate::receive) async fn site_key_ids(&self) -> BTreeSet<SiteKeyId> {
        let (answer, ids) = oneshot::channel();
        let Some(vm) = self.lock().key else { return BTreeSet::new() };
        self.worker.tell(Input::SiteKeys { vm, answer });
        ids.await.unwrap_or_default()
    }
}
