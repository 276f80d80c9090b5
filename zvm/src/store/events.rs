//! Events.

use vra::api::TimeUs;

use super::{Connection, Reader, StoreError, int};
use crate::model::event::{Entity, Event};

/// Adds an event.
pub async fn insert(db: &mut Connection, event: &Event) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO event (id, at_us, kind, success, description, entity_kind, entity_id, task_id) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
    )
    .bind(event.id.to_string())
    .bind(int(event.at_us.0))
    .bind(event.kind.as_str())
    .bind(i64::from(event.success))
    .bind(&event.description)
    .bind(event.entity.kind.as_str())
    .bind(&event.entity.id)
    .bind(event.task.map(|task| task.to_string()))
    .execute(db)
    .await?;
    Ok(())
}

/// The newest `limit` events, newest first.
pub async fn list(db: &mut Connection, limit: u32) -> Result<Vec<Event>, StoreError> {
    let rows = sqlx::query(
        "SELECT id, at_us, kind, success, description, entity_kind, entity_id, task_id \
         FROM event ORDER BY at_us DESC, id LIMIT $1",
    )
    .bind(i64::from(limit))
    .fetch_all(db)
    .await?;
    rows.iter()
        .map(|row| {
            let read = Reader::new("event", row);
            Ok(Event {
                id: read.uuid("id")?,
                at_us: TimeUs(read.number("at_us")?),
                kind: read.parse("kind")?,
                success: read.number("success")? != 0,
                description: read.text("description")?,
                entity: Entity { kind: read.parse("entity_kind")?, id: read.text("entity_id")? },
                task: read.optional_uuid("task_id")?,
            })
        })
        .collect()
}

/// Forgets all but the newest `keep` events.
pub async fn trim(db: &mut Connection, keep: u32) -> Result<(), StoreError> {
    sqlx::query(
        "DELETE FROM event WHERE at_us < \
         (SELECT MIN(at_us) FROM (SELECT at_us FROM event ORDER BY at_us DESC LIMIT $1) kept)",
    )
    .bind(i64::from(keep))
    .execute(db)
    .await?;
    Ok(())
}
