//! Volumes that are served until no guest uses them any more. Who doesn't know keeps serving: a disk that is pulled away from under a guest is
//! worse than one that is served for nothing.

use std::sync::Arc;
use std::time::Duration;

use vra::api::{ApiError, Detach, ErrorCode, Request};
use vra::report::chain;

use super::Failed;
use crate::inventory::libvirt::served::names_device;
use crate::inventory::source::libvirt_client;
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
            let _alone = self.attaching.lock().await;
            // Its VM may have been protected again since.
            let left = store::leaving_volumes::list(&mut *self.store.read().await?).await?;
            if !left.contains(&leaving) {
                continue;
            }
            let is_over = match self.is_used(&leaving).await {
                Ok(false) => self.end_volume(&leaving).await,
                Ok(true) => false,
                Err(reason) => {
                    tracing::debug!(volume = %leaving.volume, reason, "whether a volume is used isn't known: it is served on");
                    false
                }
            };
            if is_over {
                let mut tx = self.store.begin().await?;
                store::leaving_volumes::delete(&mut tx, leaving.volume, leaving.vra).await?;
                tx.commit().await?;
            }
        }
        Ok(())
    }

    /// Whether a guest of the host has the device, or would have it at its next start. Asked of the host itself, now: what the inventory
    /// says may be a minute old.
    async fn is_used(&self, leaving: &LeavingVolume) -> Result<bool, String> {
        let sources = self.stored_sources().await.map_err(|error| chain(&error))?;
        let source = sources.into_iter().find(|stored| stored.source.name == leaving.source);
        let source = source.ok_or_else(|| format!("source {} is gone", leaving.source))?;
        let asked = async {
            let client = libvirt_client(&source.source.settings.access).await.map_err(Failed::Access)?;
            if client.saved_domains().await?.iter().any(|domain| domain.uuid == leaving.vm.0) {
                return Ok(true);
            }
            for domain in client.domains().await? {
                let definitions =
                    [client.domain_xml(&domain).await?, client.inactive_domain_xml(&domain).await?];
                for xml in definitions {
                    if names_device(&xml, &leaving.device)? {
                        return Ok(true);
                    }
                }
            }
            client.close().await;
            Ok(false)
        };
        asked.await.map_err(|failed: Failed| failed.reason())
    }

    /// Whether that is over: done, or there is nothing to end.
    async fn end_volume(&self, leaving: &LeavingVolume) -> bool {
        let ended = async {
            let vra = self.find_vra(&leaving.vra.to_string()).await?;
            let detach = Request::Detach(Detach { volume: leaving.volume, force: false });
            self.ask_vra(&vra, detach).await
        };
        match ended.await {
            Ok(_) => true,
            // It is gone, or a group protects it again.
            Err(ApiError { code: ErrorCode::NotFound | ErrorCode::Conflict, .. }) => true,
            Err(error) => {
                tracing::debug!(volume = %leaving.volume, %error, "the volume is still served");
                false
            }
        }
    }
}
