//! Tasks.

use sqlx::sqlite::SqliteRow;
use uuid::Uuid;
use vra::api::{TimeUs, VpgId};

use super::{Connection, Reader, StoreError, int};
use crate::model::task::{Task, TaskKind, TaskState};

/// Adds a task.
pub async fn insert(db: &mut Connection, task: &Task) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO task (id, kind, state, progress_percent, step, subject, vpg_id, started_us, completed_us) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
    )
    .bind(task.id.to_string())
    .bind(task.kind.as_str())
    .bind(task.state.as_str())
    .bind(i64::from(task.progress_percent))
    .bind(&task.step)
    .bind(&task.subject)
    .bind(task.vpg.map(|vpg| vpg.to_string()))
    .bind(int(task.started_us.0))
    .bind(task.completed_us.map(|at| int(at.0)))
    .execute(db)
    .await?;
    Ok(())
}

/// The newest `limit` tasks, newest first.
pub async fn list(db: &mut Connection, limit: u32) -> Result<Vec<Task>, StoreError> {
    let query = "SELECT id, kind, state, progress_percent, step, subject, vpg_id, started_us, completed_us \
                 FROM task ORDER BY started_us DESC, id LIMIT $1";
    sqlx::query(query).bind(i64::from(limit)).fetch_all(db).await?.iter().map(read).collect()
}

/// The task of that id.
pub async fn get(db: &mut Connection, task: Uuid) -> Result<Option<Task>, StoreError> {
    let query = "SELECT id, kind, state, progress_percent, step, subject, vpg_id, started_us, completed_us \
                 FROM task WHERE id = $1";
    sqlx::query(query).bind(task.to_string()).fetch_optional(db).await?.as_ref().map(read).transpose()
}

/// A group's tasks of a kind that have not ended.
pub async fn open_of(db: &mut Connection, vpg: VpgId, kind: TaskKind) -> Result<Vec<Task>, StoreError> {
    let query = "SELECT id, kind, state, progress_percent, step, subject, vpg_id, started_us, completed_us \
                 FROM task WHERE vpg_id = $1 AND kind = $2 AND state = $3 ORDER BY started_us";
    sqlx::query(query)
        .bind(vpg.to_string())
        .bind(kind.as_str())
        .bind(TaskState::InProgress.as_str())
        .fetch_all(db)
        .await?
        .iter()
        .map(read)
        .collect()
}

/// Notes how far a task has come. One that has ended is left as it is.
pub async fn progress(db: &mut Connection, task: Uuid, percent: u8, step: &str) -> Result<(), StoreError> {
    sqlx::query("UPDATE task SET progress_percent = $2, step = $3 WHERE id = $1 AND state = $4")
        .bind(task.to_string())
        .bind(i64::from(percent.min(100)))
        .bind(step)
        .bind(TaskState::InProgress.as_str())
        .execute(db)
        .await?;
    Ok(())
}

/// Ends a task: as intended, or with what failed and what to do about it. False if it had ended.
pub async fn finish(
    db: &mut Connection,
    task: Uuid,
    state: TaskState,
    step: &str,
    now_us: TimeUs,
) -> Result<bool, StoreError> {
    let done = sqlx::query(
        "UPDATE task SET state = $2, step = $3, completed_us = $4, \
         progress_percent = CASE WHEN $2 = 'Completed' THEN 100 ELSE progress_percent END \
         WHERE id = $1 AND state = $5",
    )
    .bind(task.to_string())
    .bind(state.as_str())
    .bind(step)
    .bind(int(now_us.0))
    .bind(TaskState::InProgress.as_str())
    .execute(db)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Forgets all but the newest `keep` tasks that have ended.
pub async fn trim(db: &mut Connection, keep: u32) -> Result<(), StoreError> {
    sqlx::query(
        "DELETE FROM task WHERE completed_us IS NOT NULL AND started_us < \
         (SELECT MIN(started_us) FROM (SELECT started_us FROM task ORDER BY started_us DESC LIMIT $1) kept)",
    )
    .bind(i64::from(keep))
    .execute(db)
    .await?;
    Ok(())
}

fn read(row: &SqliteRow) -> Result<Task, StoreError> {
    let read = Reader::new("task", row);
    Ok(Task {
        id: read.uuid("id")?,
        kind: read.parse("kind")?,
        state: read.parse("state")?,
        progress_percent: u8::try_from(read.number("progress_percent")?).unwrap_or(100),
        step: read.text("step")?,
        subject: read.text("subject")?,
        vpg: read.optional_uuid("vpg_id")?.map(VpgId),
        started_us: TimeUs(read.number("started_us")?),
        completed_us: read.optional_number("completed_us")?.map(TimeUs),
    })
}
