//! Checkpoints of a group: listed at its targets, named at its source.

use std::collections::{BTreeMap, BTreeSet};

use vra::api::vpg::is_moment;
use vra::api::{
    ApiError, CheckpointId, CheckpointInfo, CheckpointPage, ErrorCode, ListCheckpoints,
    MAX_CHECKPOINTS_PER_PAGE, MemberSince, Request, Response, TagCheckpoint, TimeUs,
};

use super::{Manager, internal};
use crate::api::{At, TaggedCheckpoint};
use crate::model::event::{Entity, EventKind};
use crate::model::task::{TaskKind, TaskState};
use crate::model::vpg::Vpg;
use crate::model::vra::Vra;
use crate::store::{self, StoreError};

/// Pages that a search for one checkpoint reads at most: some hundred of a group with the most VMs are in one.
pub(super) const MAX_SEARCH_PAGES: usize = 10_000;

/// A target of a group.
#[derive(Debug, Clone)]
pub(super) struct GroupTarget {
    /// The VRA.
    pub(super) vra: Vra,
    /// Since when it has had journals of it: it can't be asked about what is older.
    since: MemberSince,
}

impl GroupTarget {
    /// Whether it has to have a checkpoint.
    pub(super) fn is_of(&self, checkpoint: &CheckpointInfo) -> bool {
        self.since.is_in(checkpoint.member_set_version)
    }
}

impl Manager {
    /// A group's checkpoints, newest first, at most `limit`. One counts as complete, and as locked, when all targets say so.
    pub async fn list_checkpoints(
        &self,
        name: &str,
        tagged: bool,
        from_us: Option<TimeUs>,
        to_us: Option<TimeUs>,
        limit: u32,
    ) -> Result<Vec<CheckpointInfo>, ApiError> {
        let vpg = self.find_vpg(name).await?;
        let targets = self.targets(&vpg).await?;
        let (first, others) = split(&targets, &vpg)?;
        let mut found: Vec<CheckpointInfo> = Vec::new();
        let mut query = ListCheckpoints { tagged, from_us, to_us, ..newest_of(&vpg) };
        while found.len() < limit as usize {
            let left = limit as usize - found.len();
            query.limit = u32::try_from(left).unwrap_or(u32::MAX).min(MAX_CHECKPOINTS_PER_PAGE);
            let page = self.page(first, query.clone()).await?;
            found.extend(page.checkpoints);
            query.after = page.next;
            if page.next.is_none() {
                break;
            }
        }
        for other in others {
            let theirs = self.those_of(&other.vra, &vpg, &found).await?;
            for checkpoint in found.iter_mut().filter(|checkpoint| other.is_of(checkpoint)) {
                merge(checkpoint, theirs.get(&checkpoint.id));
            }
        }
        Ok(found)
    }

    /// What another target has of the checkpoints that were found at one.
    async fn those_of(
        &self,
        target: &Vra,
        vpg: &Vpg,
        found: &[CheckpointInfo],
    ) -> Result<BTreeMap<CheckpointId, CheckpointInfo>, ApiError> {
        let times = found.iter().map(|checkpoint| checkpoint.time_us);
        let Some((from_us, to_us)) = times.clone().min().zip(times.max()) else { return Ok(BTreeMap::new()) };
        let ids: BTreeSet<CheckpointId> = found.iter().map(|checkpoint| checkpoint.id).collect();
        let tagged = found.iter().all(|checkpoint| checkpoint.tag.is_some());
        let mut query =
            ListCheckpoints { tagged, from_us: Some(from_us), to_us: Some(to_us), ..newest_of(vpg) };
        let mut theirs = BTreeMap::new();
        for _ in 0..MAX_SEARCH_PAGES {
            let page = self.page(target, query.clone()).await?;
            let meant = page.checkpoints.into_iter().filter(|info| ids.contains(&info.id));
            theirs.extend(meant.map(|info| (info.id, info)));
            query.after = page.next;
            if query.after.is_none() || theirs.len() == ids.len() {
                break;
            }
        }
        Ok(theirs)
    }

    /// Makes a checkpoint at the source now and names it; with the guests frozen meanwhile, if `application`. The journals may get it later.
    pub async fn tag_checkpoint(
        &self,
        name: &str,
        tag: &str,
        application: bool,
    ) -> Result<TaggedCheckpoint, ApiError> {
        let vpg = self.find_vpg(name).await?;
        if tag.trim().is_empty()
            || tag.len() > vra::api::volume::MAX_NAME_BYTES
            || tag.chars().any(char::is_control)
        {
            return Err(ApiError::new(
                ErrorCode::BadRequest,
                "a tag has 1 to 128 bytes and no control characters",
            ));
        }
        let vras = self.desired().await.map_err(internal)?.vras;
        let source = vpg.sources().into_iter().find_map(|vra| vras.get(&vra)).ok_or_else(|| {
            ApiError::new(ErrorCode::NotReady, format!("no source VRA of VPG {name} is enrolled"))
        })?;
        if is_moment(tag) {
            let message = format!("{tag:?} can't be a checkpoint's name: it means a moment by itself");
            return Err(ApiError::new(ErrorCode::BadRequest, message)
                .remedy("choose a name that is neither `latest`, nor a time or a checkpoint's id"));
        }
        let frozen = if application { self.freeze_guests(&vpg, &vras).await } else { Ok(Vec::new()) };
        let result = match frozen {
            Ok(without_agent) => {
                let tagged = self.tag_at(source, &vpg, tag, application).await;
                if application {
                    self.thaw_guests(&vpg, &vras).await;
                }
                tagged.map(|checkpoint| TaggedCheckpoint { checkpoint, without_agent })
            }
            Err(error) => Err(error),
        };
        let now_us = self.now_us();
        let mut task = self.new_task(TaskKind::InsertTaggedCp, &vpg.name, Some(vpg.id), "");
        task.completed_us = Some(now_us);
        let description;
        match &result {
            Ok(tagged) => {
                task.state = TaskState::Completed;
                task.progress_percent = 100;
                let without = match &tagged.without_agent[..] {
                    [] => String::new(),
                    vms => format!(", without freezing VM {}: no guest agent is known there", vms.join(", ")),
                };
                description = format!(
                    "checkpoint {tag:?} of VPG {} was made ({}){without}; it is on its way to the journals",
                    vpg.name, tagged.checkpoint.id
                );
            }
            Err(error) => {
                task.state = TaskState::Failed;
                description = format!("checkpoint {tag:?} of VPG {} could not be made: {error}", vpg.name);
            }
        }
        task.step.clone_from(&description);
        let save = async {
            let mut tx = self.store.begin().await?;
            store::tasks::insert(&mut tx, &task).await?;
            let entity = Entity::vpg(vpg.id);
            let kind = EventKind::InsertTaggedCp;
            self.note(&mut tx, kind, result.is_ok(), entity, description, Some(task.id)).await?;
            Ok::<_, StoreError>(tx.commit().await?)
        };
        save.await.map_err(internal)?;
        result
    }

    async fn tag_at(
        &self,
        source: &Vra,
        vpg: &Vpg,
        tag: &str,
        application: bool,
    ) -> Result<CheckpointInfo, ApiError> {
        let request = Request::TagCheckpoint(TagCheckpoint { vpg: vpg.id, tag: tag.into(), application });
        match self.remote.call(&source.endpoint(), request, self.request_timeout()).await {
            Ok(Response::Checkpoint(checkpoint)) => Ok(checkpoint),
            Ok(_) => Err(ApiError::new(ErrorCode::Other, format!("VRA {} gave a wrong answer", source.name))),
            Err(error) => Err(error.into_api_error(&source.name)),
        }
    }

    /// The complete checkpoint that a user means.
    pub(super) async fn find_checkpoint(&self, vpg: &Vpg, at: &At) -> Result<CheckpointInfo, ApiError> {
        let targets = self.targets(vpg).await?;
        let (first, others) = split(&targets, vpg)?;
        let mut query = newest_at(vpg, at);
        for _ in 0..MAX_SEARCH_PAGES {
            let page = self.page(first, query.clone()).await?;
            for candidate in page.checkpoints {
                let meant = match at {
                    At::Latest | At::Time { .. } => candidate.complete,
                    At::Checkpoint { checkpoint } => candidate.id == *checkpoint,
                    At::Tag { tag } => candidate.complete && candidate.tag.as_ref() == Some(tag),
                };
                if !meant {
                    continue;
                }
                let mut candidate = candidate;
                for other in others.iter().filter(|other| other.is_of(&candidate)).collect::<Vec<_>>() {
                    if candidate.complete {
                        let theirs = self.at(&other.vra, vpg, &candidate).await?;
                        merge(&mut candidate, theirs.as_ref());
                    }
                }
                if candidate.complete {
                    return Ok(candidate);
                }
                if matches!(at, At::Checkpoint { .. }) {
                    let message = format!("checkpoint {} of VPG {} is not complete", candidate.id, vpg.name);
                    return Err(ApiError::new(ErrorCode::NotReady, message).remedy(
                        "not every VM's journal holds it: choose another, or wait until all have arrived",
                    ));
                }
            }
            query.after = page.next;
            if page.next.is_none() {
                break;
            }
        }
        Err(no_such(vpg, at))
    }

    /// A group's targets, those first that have been that the longest: the first of them has all checkpoints that may be complete.
    pub(super) async fn targets(&self, vpg: &Vpg) -> Result<Vec<GroupTarget>, ApiError> {
        let vras = self.desired().await.map_err(internal)?.vras;
        let targets = vpg
            .targets_since()
            .into_iter()
            .map(|(vra, since)| {
                let known = vras.get(&vra).cloned().map(|vra| GroupTarget { vra, since });
                known.ok_or_else(|| {
                    ApiError::new(
                        ErrorCode::NotReady,
                        format!("target VRA {vra} of VPG {} is revoked", vpg.name),
                    )
                    .remedy(
                        "recover from its datastore with `vra-journal`: a revoked VRA is never let in again",
                    )
                })
            })
            .collect::<Result<Vec<_>, _>>();
        targets.map(|mut targets| {
            targets.sort_by_key(|target| target.since);
            targets
        })
    }

    /// What a target has of a checkpoint.
    pub(super) async fn at(
        &self,
        target: &Vra,
        vpg: &Vpg,
        checkpoint: &CheckpointInfo,
    ) -> Result<Option<CheckpointInfo>, ApiError> {
        Ok(self.those_of(target, vpg, std::slice::from_ref(checkpoint)).await?.remove(&checkpoint.id))
    }

    pub(super) async fn page(
        &self,
        target: &Vra,
        query: ListCheckpoints,
    ) -> Result<CheckpointPage, ApiError> {
        let request = Request::ListCheckpoints(query);
        match self.remote.call(&target.endpoint(), request, self.request_timeout()).await {
            Ok(Response::Checkpoints(page)) => Ok(page),
            Ok(_) => Err(ApiError::new(ErrorCode::Other, format!("VRA {} gave a wrong answer", target.name))),
            Err(error) => Err(error.into_api_error(&target.name)),
        }
    }
}

/// Puts to what one target has of a checkpoint what another one has.
fn merge(checkpoint: &mut CheckpointInfo, other: Option<&CheckpointInfo>) {
    checkpoint.complete = checkpoint.complete && other.is_some_and(|other| other.complete);
    let is_locked_there = other.is_some_and(|other| other.locked);
    let is_partly = |info: &CheckpointInfo| info.locked || info.partly_locked;
    let is_locked_somewhere = is_partly(checkpoint) || other.is_some_and(is_partly);
    checkpoint.locked = checkpoint.locked && is_locked_there;
    checkpoint.partly_locked = is_locked_somewhere && !checkpoint.locked;
}

fn newest_of(vpg: &Vpg) -> ListCheckpoints {
    ListCheckpoints {
        vpg: vpg.id,
        vm: None,
        from_us: None,
        to_us: None,
        tagged: false,
        newest_first: true,
        by_cut: false,
        after: None::<CheckpointId>,
        limit: MAX_CHECKPOINTS_PER_PAGE,
    }
}

/// The same, of those only that a moment may mean.
pub(super) fn newest_at(vpg: &Vpg, at: &At) -> ListCheckpoints {
    let query = newest_of(vpg);
    match at {
        At::Latest => ListCheckpoints { by_cut: true, ..query },
        At::Checkpoint { .. } => query,
        At::Time { time_us } => ListCheckpoints { to_us: Some(*time_us), ..query },
        At::Tag { .. } => ListCheckpoints { tagged: true, ..query },
    }
}

fn split<'a>(targets: &'a [GroupTarget], vpg: &Vpg) -> Result<(&'a Vra, &'a [GroupTarget]), ApiError> {
    targets
        .split_first()
        .map(|(first, others)| (&first.vra, others))
        .ok_or_else(|| ApiError::new(ErrorCode::NotReady, format!("VPG {} has no VMs", vpg.name)))
}

pub(super) fn no_such(vpg: &Vpg, at: &At) -> ApiError {
    let what = match at {
        At::Latest => {
            return ApiError::new(
                ErrorCode::NotReady,
                format!("VPG {} has no complete checkpoint yet", vpg.name),
            )
            .remedy("wait for its first sync: `zvm status` shows how far it is");
        }
        At::Checkpoint { checkpoint } => format!("checkpoint {checkpoint}"),
        At::Time { time_us } => format!("complete checkpoint at or before {time_us}"),
        At::Tag { tag } => format!("complete checkpoint named {tag:?}"),
    };
    ApiError::new(ErrorCode::NotFound, format!("VPG {} has no {what}", vpg.name))
        .remedy(format!("`zvm checkpoint list {}` shows those that there are", vpg.name))
}
