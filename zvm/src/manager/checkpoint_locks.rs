//! Checkpoints that are kept: locked at all targets of their group, or at none.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use vra::api::{
    ApiError, CheckpointId, CheckpointInfo, ErrorCode, LockCheckpoint, Request, Response, VpgId, VraId,
};

use super::checkpoints::{GroupTarget, MAX_SEARCH_PAGES, newest_at, no_such};
use super::{Manager, internal};
use crate::api::At;
use crate::model::event::{Entity, EventKind};
use crate::model::vpg::Vpg;
use crate::model::vra::Vra;
use crate::store::StoreError;

/// Time between two tries to undo locks.
const UNDO_EVERY: Duration = Duration::from_secs(2);

/// A lock that is to be undone, since another target didn't lock the checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct LockToUndo {
    vpg: VpgId,
    vra: VraId,
    checkpoint: CheckpointId,
}

impl Manager {
    /// Locks a checkpoint at all targets of its group, or at none: what a failure leaves behind is undone, at a VRA that doesn't answer as soon as it
    /// does. Or unlocks it wherever it is locked.
    pub async fn lock_checkpoint(
        &self,
        name: &str,
        at: &At,
        locked: bool,
    ) -> Result<CheckpointInfo, ApiError> {
        let vpg = self.find_vpg(name).await?;
        let targets = self.targets(&vpg).await?;
        let mut undone = self.locks_to_undo.lock().await;
        let (found, kind, what) = match locked {
            true => {
                (self.lock_at(&vpg, &targets, at, &mut undone).await?, EventKind::LockCheckpoint, "locked")
            }
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
        Ok(CheckpointInfo { locked, partly_locked: false, ..found })
    }

    async fn lock_at(
        &self,
        vpg: &Vpg,
        targets: &[GroupTarget],
        at: &At,
        to_undo: &mut BTreeSet<LockToUndo>,
    ) -> Result<CheckpointInfo, ApiError> {
        let found = self.find_checkpoint(vpg, at).await?;
        let lock = LockCheckpoint { vpg: vpg.id, checkpoint: found.id, locked: true };
        let targets: Vec<&Vra> =
            targets.iter().filter(|target| target.is_of(&found)).map(|target| &target.vra).collect();
        let mut had = BTreeSet::new();
        for target in &targets {
            let there = self.at(target, vpg, &found).await?;
            had.extend(there.filter(|info| info.locked).map(|_| target.id));
        }
        to_undo.retain(|undo| undo.checkpoint != found.id);
        for (number, target) in targets.iter().enumerate() {
            let Err(error) = self.set_lock(target, lock).await else { continue };
            // The one whose answer is missing may have it, or get it yet.
            for vra in targets[..=number].iter().filter(|vra| !had.contains(&vra.id)) {
                let undo = LockToUndo { vpg: vpg.id, vra: vra.id, checkpoint: found.id };
                if !self.undo_lock(vra, undo).await {
                    to_undo.insert(undo);
                }
            }
            return Err(error);
        }
        Ok(found)
    }

    /// Undoes locks that failed at another target, until cancelled: again and again where a VRA doesn't answer.
    pub async fn undo_locks(self: Arc<Self>) {
        loop {
            tokio::time::sleep(UNDO_EVERY).await;
            let mut to_undo = self.locks_to_undo.lock().await;
            if to_undo.is_empty() {
                continue;
            }
            let Ok(desired) = self.desired().await.map_err(internal) else { continue };
            for undo in to_undo.clone() {
                let is_undone = match desired.vras.get(&undo.vra) {
                    Some(vra) => self.undo_lock(vra, undo).await,
                    None => true,
                };
                if is_undone {
                    to_undo.remove(&undo);
                }
            }
        }
    }

    /// Whether a VRA has a checkpoint locked no more.
    async fn undo_lock(&self, vra: &Vra, undo: LockToUndo) -> bool {
        let lock = LockCheckpoint { vpg: undo.vpg, checkpoint: undo.checkpoint, locked: false };
        match self.set_lock(vra, lock).await {
            Ok(_) => true,
            // There is nothing to undo, and there won't be.
            Err(error) if !matches!(error.code, ErrorCode::NotReady | ErrorCode::Busy | ErrorCode::Io) => {
                true
            }
            Err(error) => {
                tracing::warn!(vra = %vra.name, %error, "a checkpoint may stay locked at one target alone; it is tried again");
                false
            }
        }
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
                    At::Tag { tag } => is_kept(info) && info.tag.as_ref() == Some(tag),
                    _ => is_kept(info),
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

/// Whether a checkpoint is kept in any journal.
fn is_kept(info: &CheckpointInfo) -> bool {
    info.locked || info.partly_locked
}
