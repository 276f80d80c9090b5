//! Tests of a group: all of its disks at a checkpoint, opened at the targets or not at all.

use uuid::Uuid;
use vra::api::{ApiError, DoorRequest, ErrorCode, Request, Response, ViewId};

use super::{Manager, internal};
use crate::api::{At, TestShown, ViewShown};
use crate::model::event::{Entity, EventKind};
use crate::model::task::{Task, TaskKind, TaskState};
use crate::model::test_run::{TestDetails, TestRun, TestState, TestView};
use crate::model::vpg::{Vpg, VpgState};
use crate::store::{self, StoreError};

impl Manager {
    /// Starts a test; the engine opens the disks, and closes them all if one cannot be opened.
    pub async fn start_test(&self, name: &str, at: At, door: DoorRequest) -> Result<Task, ApiError> {
        let vpg = self.find_vpg(name).await?;
        if vpg.state == VpgState::Deleting {
            return Err(ApiError::new(ErrorCode::Conflict, format!("VPG {name} is being deleted")));
        }
        if let DoorRequest::Nbd { listen: Some(_) } = door {
            let message = "a test opens several disks: let the VRA choose where they are exported";
            return Err(ApiError::new(ErrorCode::BadRequest, message));
        }
        let checkpoint = self.find_checkpoint(&vpg, &at).await?;
        let subject = format!("{} at {}", vpg.name, checkpoint.time_us);
        let task = self.new_task(TaskKind::FailOverTest, &subject, Some(vpg.id), "opening the disks");
        let test = TestRun {
            id: Uuid::new_v4(),
            vpg: vpg.id,
            state: TestState::Starting,
            started_us: self.now_us(),
            details: TestDetails {
                checkpoint: checkpoint.id,
                checkpoint_time_us: checkpoint.time_us,
                checkpoint_tag: checkpoint.tag.clone(),
                door,
                views: vpg
                    .targets_since()
                    .into_iter()
                    .filter(|(_, since)| since.is_in(checkpoint.member_set_version))
                    .map(|(vra, _)| TestView { vra, view: ViewId::random() })
                    .collect(),
                start_task: task.id,
                stop_task: None,
            },
        };
        let save = async {
            let mut tx = self.store.begin().await?;
            store::test_runs::insert(&mut tx, &test).await?;
            store::tasks::insert(&mut tx, &task).await?;
            let kind = EventKind::FailOverTest;
            let description = format!("a test of VPG {subject} was started");
            self.note(&mut tx, kind, true, Entity::vpg(vpg.id), description, Some(task.id)).await?;
            Ok::<_, StoreError>(tx.commit().await?)
        };
        save.await.map_err(|error| {
            if error.is_taken() {
                ApiError::new(ErrorCode::Busy, format!("VPG {name} is being tested already"))
                    .remedy(format!("stop that test first: `zvm test stop {name}`"))
            } else {
                internal(error)
            }
        })?;
        tracing::info!(vpg = %vpg.id, name = vpg.name, checkpoint = %checkpoint.id, "a test was started");
        self.wake.notify_one();
        Ok(task)
    }

    /// Ends a test; the engine closes its disks.
    pub async fn stop_test(&self, name: &str) -> Result<Task, ApiError> {
        let vpg = self.find_vpg(name).await?;
        let mut test = self.test_of(&vpg).await?;
        let task = self.new_task(TaskKind::StopFailOverTest, &vpg.name, Some(vpg.id), "closing the disks");
        let save = async {
            let mut tx = self.store.begin().await?;
            let open = store::tasks::open_of(&mut tx, vpg.id, TaskKind::StopFailOverTest).await?.pop();
            if let (TestState::Stopping, Some(open)) = (test.state, open) {
                return Ok(open);
            }
            let from = test.state;
            test.details.stop_task = Some(task.id);
            store::test_runs::move_on(&mut tx, &test, from, TestState::Stopping).await?;
            let now_us = self.now_us();
            let stopped = "the test was stopped before its disks were open";
            store::tasks::finish(&mut tx, test.details.start_task, TaskState::Failed, stopped, now_us)
                .await?;
            store::tasks::insert(&mut tx, &task).await?;
            let kind = EventKind::StopFailOverTest;
            let description = format!("the test of VPG {} is being stopped", vpg.name);
            self.note(&mut tx, kind, true, Entity::vpg(vpg.id), description, Some(task.id)).await?;
            tx.commit().await?;
            Ok::<_, StoreError>(task)
        };
        let task = save.await.map_err(internal)?;
        tracing::info!(vpg = %vpg.id, name = vpg.name, "a test is being stopped");
        self.wake.notify_one();
        Ok(task)
    }

    /// A test with its disks, as its VRAs tell them now.
    pub async fn show_test(&self, name: &str) -> Result<TestShown, ApiError> {
        let vpg = self.find_vpg(name).await?;
        let test = self.test_of(&vpg).await?;
        let vras = self.desired().await.map_err(internal)?.vras;
        let names = self.vra_names().await?;
        let mut views = Vec::with_capacity(test.details.views.len());
        for view in &test.details.views {
            let listed = match vras.get(&view.vra) {
                Some(vra) => {
                    match self.remote.call(&vra.endpoint(), Request::ListViews, self.request_timeout()).await
                    {
                        Ok(Response::Views(listed)) => listed,
                        Ok(_) => Vec::new(),
                        Err(error) => return Err(error.into_api_error(&vra.name)),
                    }
                }
                None => Vec::new(),
            };
            views.push(ViewShown {
                vra: names.get(&view.vra).cloned().unwrap_or_else(|| view.vra.to_string()),
                view: listed.into_iter().find(|listed| listed.view == view.view),
            });
        }
        Ok(TestShown { test, views })
    }

    async fn test_of(&self, vpg: &Vpg) -> Result<TestRun, ApiError> {
        let tests = store::test_runs::list(&mut *self.store.read().await.map_err(internal)?)
            .await
            .map_err(internal)?;
        tests.into_iter().find(|test| test.vpg == vpg.id).ok_or_else(|| {
            ApiError::new(ErrorCode::NotFound, format!("VPG {} is not being tested", vpg.name))
                .remedy(format!("`zvm test start {}` starts a test", vpg.name))
        })
    }
}
