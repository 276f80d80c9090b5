//! Alerts: those that last, and those that are over.

use sqlx::sqlite::SqliteRow;
use uuid::Uuid;
use vra::api::TimeUs;

use super::{Connection, Reader, StoreError, int};
use crate::model::alert::{Alert, Condition};
use crate::model::event::Entity;

/// Those that last, oldest first.
pub async fn open(db: &mut Connection) -> Result<Vec<Alert>, StoreError> {
    let query = "SELECT id, code, level, entity_kind, entity_id, description, remedy, turned_on_us, turned_off_us \
                 FROM alert WHERE turned_off_us IS NULL ORDER BY turned_on_us, id";
    sqlx::query(query).fetch_all(db).await?.iter().map(read).collect()
}

/// The newest `limit`, over or not, newest first.
pub async fn list(db: &mut Connection, limit: u32) -> Result<Vec<Alert>, StoreError> {
    let query = "SELECT id, code, level, entity_kind, entity_id, description, remedy, turned_on_us, turned_off_us \
                 FROM alert ORDER BY turned_on_us DESC, id LIMIT $1";
    sqlx::query(query).bind(i64::from(limit)).fetch_all(db).await?.iter().map(read).collect()
}

/// Turns an alert on.
pub async fn turn_on(db: &mut Connection, alert: &Alert) -> Result<(), StoreError> {
    let condition = &alert.condition;
    sqlx::query(
        "INSERT INTO alert (id, code, level, entity_kind, entity_id, description, remedy, turned_on_us) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
    )
    .bind(alert.id.to_string())
    .bind(&condition.code)
    .bind(condition.level.as_str())
    .bind(condition.entity.kind.as_str())
    .bind(&condition.entity.id)
    .bind(&condition.description)
    .bind(&condition.remedy)
    .bind(int(alert.turned_on_us.0))
    .execute(db)
    .await?;
    Ok(())
}

/// Takes the present wording and level of an alert that lasts.
pub async fn reword(db: &mut Connection, alert: Uuid, condition: &Condition) -> Result<(), StoreError> {
    sqlx::query("UPDATE alert SET level = $2, description = $3, remedy = $4 WHERE id = $1")
        .bind(alert.to_string())
        .bind(condition.level.as_str())
        .bind(&condition.description)
        .bind(&condition.remedy)
        .execute(db)
        .await?;
    Ok(())
}

/// Turns an alert off.
pub async fn turn_off(db: &mut Connection, alert: Uuid, now_us: TimeUs) -> Result<(), StoreError> {
    sqlx::query("UPDATE alert SET turned_off_us = $2 WHERE id = $1")
        .bind(alert.to_string())
        .bind(int(now_us.0))
        .execute(db)
        .await?;
    Ok(())
}

/// Forgets alerts that were over before `before_us`.
pub async fn forget_over(db: &mut Connection, before_us: TimeUs) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM alert WHERE turned_off_us < $1").bind(int(before_us.0)).execute(db).await?;
    Ok(())
}

fn read(row: &SqliteRow) -> Result<Alert, StoreError> {
    let read = Reader::new("alert", row);
    Ok(Alert {
        id: read.uuid("id")?,
        condition: Condition {
            code: read.text("code")?,
            entity: Entity { kind: read.parse("entity_kind")?, id: read.text("entity_id")? },
            level: read.parse("level")?,
            description: read.text("description")?,
            remedy: read.text("remedy")?,
        },
        turned_on_us: TimeUs(read.number("turned_on_us")?),
        turned_off_us: read.optional_number("turned_off_us")?.map(TimeUs),
    })
}
