//! Which of the site's keys a target VM needs.

use std::collections::BTreeSet;

use journal::crypt::SiteKeyId;
use tokio::sync::oneshot;

use super::TargetVm;
use super::kept_locks::Kept;
use crate::receive::worker::Input;

impl TargetVm {
    /// Names of the site keys that its journal, and what was written to views and copied for locked checkpoints, can't be read without; none
    /// while the journal isn't open.
    pub(in crate::receive) async fn site_key_ids(&self) -> BTreeSet<SiteKeyId> {
        let (answer, ids) = oneshot::channel();
        let (vm, disks) = {
            let inner = self.lock();
            let Some(vm) = inner.key else { return BTreeSet::new() };
            let views = inner.pins.views().into_iter().flat_map(|(_, disks)| disks);
            let locks = inner.kept_locks.values().flat_map(Kept::disks).cloned();
            (vm, views.chain(locks).collect::<Vec<_>>())
        };
        self.worker.tell(Input::SiteKeys { vm, answer });
        let mut ids = ids.await.unwrap_or_default();
        ids.extend(disks.iter().filter_map(|disk| disk.site_key_id()));
        ids
    }
}
