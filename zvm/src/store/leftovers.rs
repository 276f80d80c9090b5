//! Parts of groups at VRAs that have none in them any more: of deleted groups, those that could not be reached; of others, those whose last VM was
//! taken out.

use vra::api::{VpgId, VraId};

use super::{Connection, Reader, StoreError};
use crate::reconcile::Leftover;

/// All of them.
pub async fn list(db: &mut Connection) -> Result<Vec<Leftover>, StoreError> {
    let rows = sqlx::query("SELECT vpg_id, vra_id, keep_files FROM leftover ORDER BY vpg_id, vra_id")
        .fetch_all(db)
        .await?;
    rows.iter()
        .map(|row| {
            let read = Reader::new("leftover", row);
            Ok(Leftover {
                vpg: VpgId(read.uuid("vpg_id")?),
                vra: VraId(read.uuid("vra_id")?),
                keep_files: read.number("keep_files")? != 0,
            })
        })
        .collect()
}

/// Adds one. If there is one already, files that either leaves are left.
pub async fn insert(db: &mut Connection, leftover: &Leftover) -> Result<(), StoreError> {
    let query = "INSERT INTO leftover (vpg_id, vra_id, keep_files) VALUES ($1, $2, $3) \
         ON CONFLICT (vpg_id, vra_id) DO UPDATE SET \
         keep_files = CASE WHEN excluded.keep_files = 1 THEN 1 ELSE leftover.keep_files END";
    sqlx::query(query)
        .bind(leftover.vpg.to_string())
        .bind(leftover.vra.to_string())
        .bind(i64::from(leftover.keep_files))
        .execute(db)
        .await?;
    Ok(())
}

/// Forgets one.
pub async fn delete(db: &mut Connection, vpg: VpgId, vra: VraId) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM leftover WHERE vpg_id = $1 AND vra_id = $2")
        .bind(vpg.to_string())
        .bind(vra.to_string())
        .execute(db)
        .await?;
    Ok(())
}

/// Forgets those at a VRA that is no longer one of ours.
pub async fn delete_of_vra(db: &mut Connection, vra: VraId) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM leftover WHERE vra_id = $1").bind(vra.to_string()).execute(db).await?;
    Ok(())
}
