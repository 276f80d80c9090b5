//! Checkpoints that are kept: locked at all targets of their group, or at none.

use vra::api::{ApiError, CheckpointInfo, ErrorCode, LockCheckpoint, Request, Response};

use super::checkpoints::{GroupTarget, MAX_SEARCH_PAGES, newest_at, no_such};
use super::{Manager, internal};
use crate::api::At;
use crate::model::event::{Entity, EventKind};
use crate::model::vpg::Vpg;
use crate::model::vra::Vra;
use crate::store::StoreError;

impl Manager {
    /// Locks a checkpoint at all targets of its group, or at none; or unlocks it wherever it is locked.
    pub async fn lock_checkpoint(
        &self,
        name: &str,
        at: &At,
        locked: bool,
    ) -> Result<CheckpointInfo, ApiError> {
        let vpg = self.find_vpg(name).await?;
        let targets = self.targets(&vpg).await?;
        let (found, kind, what) = match locked {
            true => (self.lock_at(&vpg, &targets, at).await?, EventKind::LockCheckpoint, "locked"),
            false => (self.unlock_at(&vpg, &targets, at).await?, EventKind::UnlockCheckpoint, "unlocked"),
        };
        let description =
            format!("checkpoint {} of {} of VPG {} was {what}", found.id, found.time_us, vpg.name);
        let save = async {
            let mut tx = self.store.begin().await?;
            self.note(&mut tx, kind, true, Entity::vpg(vpg.id), description, None).await?;
            Ok::<_, StoreError>(tx.commit().await?)
        };
        save.await.map_err(internal)?;
        Ok(CheckpointInfo { locked, ..found })
    }

    async fn lock_at(&self, vpg: &Vpg, targets: &[GroupTarget], at: &At) -> Result<CheckpointInfo, ApiError> {
        let found = self.find_checkpoint(vpg, at).await?;
        let lock = LockCheckpoint { vpg: vpg.id, checkpoint: found.id, locked: true };
        let targets: Vec<&Vra> =
            targets.iter().filter(|target| target.is_of(&found)).map(|target| &target.vra).collect();
        for (number, target) in targets.iter().enumerate() {
            let Err(error) = self.set_lock(target, lock).await else { continue };
            for former in targets[..number].iter().filter(|_| !found.locked) {
                if let Err(error) = self.set_lock(former, LockCheckpoint { locked: false, ..lock }).await {
                    tracing::warn!(vra = %former.name, %error, "a checkpoint stays locked at one target alone");
                }
            }
            return Err(error);
        }
        Ok(found)
    }

    /// What was locked need not be complete any more, nor known to every target: VMs may have joined the group since, and a journal without
    /// room may have given up its own lock.
    async fn unlock_at(
        &self,
        vpg: &Vpg,
        targets: &[GroupTarget],
        at: &At,
    ) -> Result<CheckpointInfo, ApiError> {
        let checkpoint = match at {
            At::Checkpoint { checkpoint } => *checkpoint,
            At::Latest | At::Time { .. } | At::Tag { .. } => {
                match self.find_locked(vpg, targets, at).await? {
                    Some(found) => found.id,
                    // Again is harmless.
                    None => self.find_checkpoint(vpg, at).await?.id,
                }
            }
        };
        let lock = LockCheckpoint { vpg: vpg.id, checkpoint, locked: false };
        let (mut unlocked, mut result) = (None, Ok(()));
        for target in targets {
            match self.set_lock(&target.vra, lock).await {
                Ok(info) => unlocked = unlocked.or(Some(info)),
                Err(error) if error.code == ErrorCode::NotFound => {}
                Err(error) => result = result.and(Err(error)),
            }
        }
        result?;
        unlocked.ok_or_else(|| no_such(vpg, at))
    }

    /// The newest locked checkpoint that a user may mean.
    async fn find_locked(
        &self,
        vpg: &Vpg,
        targets: &[GroupTarget],
        at: &At,
    ) -> Result<Option<CheckpointInfo>, ApiError> {
        for target in targets {
            let mut query = newest_at(vpg, at);
            for _ in 0..MAX_SEARCH_PAGES {
                let page = self.page(&target.vra, query.clone()).await?;
                let is_meant = |info: &CheckpointInfo| match at {
                    At::Tag { tag } => info.locked && info.tag.as_ref() == Some(tag),
                    _ => info.locked,
                };
                if let Some(found) = page.checkpoints.into_iter().find(is_meant) {
                    return Ok(Some(found));
                }
                query.after = page.next;
                if page.next.is_none() {
                    break;
                }
            }
        }
        Ok(None)
    }

    async fn set_lock(&self, target: &Vra, lock: LockCheckpoint) -> Result<CheckpointInfo, ApiError> {
        let request = Request::LockCheckpoint(lock);
        match self.remote.call(&target.endpoint(), request, self.request_timeout()).await {
            Ok(Response::Checkpoint(info)) => Ok(info),
            Ok(_) => Err(ApiError::new(ErrorCode::Other, format!("VRA {} gave a wrong answer", target.name))),
            Err(error) => Err(error.into_api_error(&target.name)),
        }
    }
}
