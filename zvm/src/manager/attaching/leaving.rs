//! Volumes that are served until their guests use them no more.

use std::sync::Arc;
use std::time::Duration;

use vra::api::{Detach, ErrorCode, Request};
use vra::report::chain;

use super::is_used;
use crate::manager::Manager;
use crate::store::leaving_volumes::LeavingVolume;
use crate::store::{self, StoreError};

/// Time between two looks at them.
const LOOK_EVERY: Duration = Duration::from_secs(2);

impl Manager {
    /// Ends the serving of volumes whose VMs have their own disks back, until cancelled.
    pub async fn end_volumes(self: Arc<Self>) {
        loop {
            if let Err(error) = self.end_unused_volumes().await {
                tracing::error!(error = chain(&error), "the database failed; the manager tries again");
            }
            tokio::select! {
                () = self.volumes_leave.notified() => {}
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
        }
    }

    async fn end_unused_volumes(&self) -> Result<(), StoreError> {
        let leaving = store::leaving_volumes::list(&mut *self.store.read().await?).await?;
        for leaving in leaving {
            let inventory = self.inventory();
            let vm = inventory.vms.iter().find(|vm| vm.uuid == leaving.vm.0);
            // What was read before the definition was changed says nothing.
            let is_known =
                self.known().is_read_since(vm.map(|vm| vm.origin.source.as_str()), leaving.since_us);
            if is_known && !vm.is_some_and(|vm| is_used(vm, &leaving.path)) && self.end_volume(&leaving).await
            {
                let mut tx = self.store.begin().await?;
                store::leaving_volumes::delete(&mut tx, leaving.volume).await?;
                tx.commit().await?;
            }
        }
        Ok(())
    }

    /// Whether that is over: done, or there is nothing to end.
    async fn end_volume(&self, leaving: &LeavingVolume) -> bool {
        let Ok(vra) = self.find_vra(&leaving.vra.to_string()).await else { return true };
        let detach = Request::Detach(Detach { volume: leaving.volume, force: false });
        match self.ask_vra(&vra, detach).await {
            Ok(_) => true,
            // A group protects it again, or it is gone.
            Err(error) if matches!(error.code, ErrorCode::NotFound | ErrorCode::Conflict) => true,
            Err(error) => {
                tracing::warn!(vra = vra.name, volume = %leaving.volume, %error, "the volume is still served");
                false
            }
        }
    }
}
