//! Sources of inventory, their sealed passwords and their last good readings.

use sqlx::sqlite::SqliteRow;
use vra::api::TimeUs;

use super::{Connection, Reader, StoreError, int, to_json};
use crate::inventory::Inventory;
use crate::model::source::Source;

/// A source as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredSource {
    /// The source.
    pub source: Source,
    /// Its sealed password.
    pub password: Option<String>,
}

/// A reading as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredReading {
    /// The source's name; empty for the inventory file.
    pub source: String,
    /// When it was read.
    pub read_us: TimeUs,
    /// What was read.
    pub inventory: Inventory,
}

/// All sources, by name.
pub async fn list(db: &mut Connection) -> Result<Vec<StoredSource>, StoreError> {
    let rows = sqlx::query("SELECT name, settings, password FROM source ORDER BY name").fetch_all(db).await?;
    rows.iter().map(read).collect()
}

/// Adds one.
///
/// # Errors
/// [`StoreError::is_taken`] if there is one of its name.
pub async fn insert(db: &mut Connection, stored: &StoredSource) -> Result<(), StoreError> {
    sqlx::query("INSERT INTO source (name, settings, password) VALUES ($1, $2, $3)")
        .bind(&stored.source.name)
        .bind(to_json(&stored.source.settings))
        .bind(&stored.password)
        .execute(db)
        .await?;
    Ok(())
}

/// Gives one other settings and another password.
pub async fn update(db: &mut Connection, stored: &StoredSource) -> Result<(), StoreError> {
    sqlx::query("UPDATE source SET settings = $2, password = $3 WHERE name = $1")
        .bind(&stored.source.name)
        .bind(to_json(&stored.source.settings))
        .bind(&stored.password)
        .execute(db)
        .await?;
    Ok(())
}

/// Forgets one with its reading.
pub async fn delete(db: &mut Connection, name: &str) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM source WHERE name = $1").bind(name).execute(&mut *db).await?;
    delete_reading(db, name).await
}

/// The last good readings.
pub async fn readings(db: &mut Connection) -> Result<Vec<StoredReading>, StoreError> {
    let rows = sqlx::query("SELECT source, read_us, inventory FROM source_reading").fetch_all(db).await?;
    rows.iter()
        .map(|row| {
            let read = Reader::new("source_reading", row);
            Ok(StoredReading {
                source: read.text("source")?,
                read_us: TimeUs(read.number("read_us")?),
                inventory: read.json("inventory")?,
            })
        })
        .collect()
}

/// Keeps a reading in place of the source's former one.
pub async fn save_reading(
    db: &mut Connection,
    source: &str,
    read_us: TimeUs,
    inventory: &Inventory,
) -> Result<(), StoreError> {
    delete_reading(db, source).await?;
    sqlx::query("INSERT INTO source_reading (source, read_us, inventory) VALUES ($1, $2, $3)")
        .bind(source)
        .bind(int(read_us.0))
        .bind(to_json(inventory))
        .execute(db)
        .await?;
    Ok(())
}

async fn delete_reading(db: &mut Connection, source: &str) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM source_reading WHERE source = $1").bind(source).execute(db).await?;
    Ok(())
}

fn read(row: &SqliteRow) -> Result<StoredSource, StoreError> {
    let read = Reader::new("source", row);
    let source = Source { name: read.text("name")?, settings: read.json("settings")? };
    Ok(StoredSource { source, password: read.optional_text("password")? })
}
