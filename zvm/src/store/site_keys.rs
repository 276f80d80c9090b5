//! Names of the site keys that the manager has had: the keys themselves are in their file alone.

use std::collections::BTreeSet;

use vra::api::TimeUs;

use super::{Connection, Reader, StoreError, int};

/// All of them.
pub async fn list(db: &mut Connection) -> Result<BTreeSet<String>, StoreError> {
    let rows = sqlx::query("SELECT id FROM site_key").fetch_all(db).await?;
    rows.iter().map(|row| Reader::new("site_key", row).text("id")).collect()
}

/// Makes it these: others are forgotten.
pub async fn replace(db: &mut Connection, ids: &[String], now_us: TimeUs) -> Result<(), StoreError> {
    let noted = list(db).await?;
    for id in noted.iter().filter(|id| !ids.contains(id)) {
        sqlx::query("DELETE FROM site_key WHERE id = $1").bind(id).execute(&mut *db).await?;
    }
    for id in ids.iter().filter(|id| !noted.contains(*id)) {
        sqlx::query("INSERT INTO site_key (id, noted_us) VALUES ($1, $2)")
            .bind(id)
            .bind(int(now_us.0))
            .execute(&mut *db)
            .await?;
    }
    Ok(())
}
