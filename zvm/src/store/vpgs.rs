//! Groups.

use sqlx::sqlite::SqliteRow;
use uuid::Uuid;
use vra::api::{TimeUs, VpgId, VraId};

use super::{Connection, Reader, StoreError, int, to_json};
use crate::model::vpg::{Removal, Vpg, VpgSettings, VpgState};

/// All of them, by name.
pub async fn list(db: &mut Connection) -> Result<Vec<Vpg>, StoreError> {
    let query = "SELECT id, name, state, revision, applied_revision, created_us, last_test_us, stamp, settings, removal \
                 FROM vpg ORDER BY name";
    sqlx::query(query).fetch_all(db).await?.iter().map(read).collect()
}

/// Adds a group. [`StoreError::is_taken`] if its name is.
pub async fn insert(db: &mut Connection, vpg: &Vpg) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO vpg (id, name, state, revision, applied_revision, created_us, settings, stamp) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
    )
    .bind(vpg.id.to_string())
    .bind(&vpg.name)
    .bind(vpg.state.as_str())
    .bind(int(vpg.revision))
    .bind(int(vpg.applied_revision))
    .bind(int(vpg.created_us.0))
    .bind(to_json(&vpg.settings))
    .bind(vpg.stamp.map(|stamp| stamp.to_string()))
    .execute(db)
    .await?;
    Ok(())
}

/// The revision of a group; none if there is no such group any more.
pub async fn revision(db: &mut Connection, vpg: VpgId) -> Result<Option<u64>, StoreError> {
    let row = sqlx::query("SELECT revision FROM vpg WHERE id = $1")
        .bind(vpg.to_string())
        .fetch_optional(db)
        .await?;
    row.map(|row| Reader::new("vpg", &row).number("revision")).transpose()
}

/// Begins a group's deletion, or changes how it goes.
pub async fn set_removal(db: &mut Connection, vpg: VpgId, removal: Removal) -> Result<(), StoreError> {
    sqlx::query("UPDATE vpg SET state = $2, removal = $3 WHERE id = $1")
        .bind(vpg.to_string())
        .bind(VpgState::Deleting.as_str())
        .bind(to_json(&removal))
        .execute(db)
        .await?;
    Ok(())
}

/// Notes that all VRAs have a revision.
pub async fn set_applied(db: &mut Connection, vpg: VpgId, revision: u64) -> Result<(), StoreError> {
    sqlx::query("UPDATE vpg SET applied_revision = $2 WHERE id = $1 AND applied_revision < $2")
        .bind(vpg.to_string())
        .bind(int(revision))
        .execute(db)
        .await?;
    Ok(())
}

/// Notes that all disks of a test were open.
pub async fn set_tested(db: &mut Connection, vpg: VpgId, at_us: TimeUs) -> Result<(), StoreError> {
    sqlx::query("UPDATE vpg SET last_test_us = $2 WHERE id = $1")
        .bind(vpg.to_string())
        .bind(int(at_us.0))
        .execute(db)
        .await?;
    Ok(())
}

/// Changes a group's settings, and raises the revision, so that its VRAs get them; false if the group is another one by now.
pub async fn set_settings(
    db: &mut Connection,
    vpg: VpgId,
    revision: u64,
    settings: &VpgSettings,
) -> Result<bool, StoreError> {
    let query =
        "UPDATE vpg SET settings = $3, revision = revision + 1, stamp = $4 WHERE id = $1 AND revision = $2";
    let changed = sqlx::query(query)
        .bind(vpg.to_string())
        .bind(int(revision))
        .bind(to_json(settings))
        .bind(new_stamp())
        .execute(db)
        .await?;
    Ok(changed.rows_affected() == 1)
}

/// Takes over the settings, revision and stamp of `adopted`; false if the group is another one by now.
pub async fn adopt(db: &mut Connection, adopted: &Vpg, former_revision: u64) -> Result<bool, StoreError> {
    let query = "UPDATE vpg SET settings = $4, revision = $3, stamp = $5 WHERE id = $1 AND revision = $2";
    let changed = sqlx::query(query)
        .bind(adopted.id.to_string())
        .bind(int(former_revision))
        .bind(int(adopted.revision))
        .bind(to_json(&adopted.settings))
        .bind(adopted.stamp.map(|stamp| stamp.to_string()))
        .execute(db)
        .await?;
    Ok(changed.rows_affected() == 1)
}

/// Raises the revision, so that the definition goes out again.
pub async fn raise_revision(db: &mut Connection, vpg: VpgId) -> Result<(), StoreError> {
    sqlx::query("UPDATE vpg SET revision = revision + 1, stamp = $2 WHERE id = $1")
        .bind(vpg.to_string())
        .bind(new_stamp())
        .execute(db)
        .await?;
    Ok(())
}

/// Raises the revision of every group that a VRA has a part in and that `is_meant`.
pub async fn raise_revisions_at(
    db: &mut Connection,
    vra: VraId,
    is_meant: impl Fn(&Vpg) -> bool,
) -> Result<(), StoreError> {
    for vpg in list(db).await? {
        if vpg.vras().contains(&vra) && is_meant(&vpg) {
            raise_revision(db, vpg.id).await?;
        }
    }
    Ok(())
}

fn new_stamp() -> String {
    Uuid::new_v4().to_string()
}

/// Forgets a group.
pub async fn delete(db: &mut Connection, vpg: VpgId) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM vpg WHERE id = $1").bind(vpg.to_string()).execute(db).await?;
    Ok(())
}

fn read(row: &SqliteRow) -> Result<Vpg, StoreError> {
    let read = Reader::new("vpg", row);
    Ok(Vpg {
        id: VpgId(read.uuid("id")?),
        name: read.text("name")?,
        state: read.parse("state")?,
        revision: read.number("revision")?,
        applied_revision: read.number("applied_revision")?,
        created_us: TimeUs(read.number("created_us")?),
        last_test_us: read.optional_number("last_test_us")?.map(TimeUs),
        stamp: read.optional_uuid("stamp")?,
        settings: read.json("settings")?,
        removal: read.optional_json("removal")?,
    })
}

#[cfg(test)]
mod tests {
    use sqlx::migrate::Migrator;

    use super::*;
    use crate::store::{Store, migrator};

    #[tokio::test]
    async fn groups_of_an_older_manager_are_read_and_know_of_their_tests_after_a_restart() {
        let path = std::env::temp_dir().join(format!("zvm-store-{}.db", uuid::Uuid::new_v4()));
        let options = sqlx::sqlite::SqliteConnectOptions::new().filename(&path).create_if_missing(true);
        let older = sqlx::SqlitePool::connect_with(options).await.expect("a database");
        let steps = migrator().iter().filter(|step| step.version <= 2).cloned().collect();
        Migrator::with_migrations(steps).run(&older).await.expect("the older schema");
        let settings = r#"{ "description": "", "priority": "High", "member_set_version": 1, "checkpoint_interval_ms": 5000,
            "hold_deadline_ms": 100, "history_s": 3600, "rpo_target_s": 30, "give_up_history": true, "vms": [] }"#;
        let id = VpgId::random();
        sqlx::query("INSERT INTO vpg VALUES ($1, 'shop', 'active', 3, 3, 7, $2, NULL)")
            .bind(id.to_string())
            .bind(settings)
            .execute(&older)
            .await
            .expect("a group");
        older.close().await;

        let store = Store::open(&path).await.expect("opened");
        let vpg = list(&mut store.read().await.expect("open")).await.expect("read").remove(0);
        assert_eq!((vpg.id, vpg.last_test_us, vpg.settings.test_reminder_days), (id, None, None));
        assert_eq!(vpg.stamp, None);
        let mut tx = store.begin().await.expect("open");
        set_tested(&mut tx, id, TimeUs(9)).await.expect("noted");
        tx.commit().await.expect("noted");
        store.close().await;
        let store = Store::open(&path).await.expect("opened again");
        let vpg = list(&mut store.read().await.expect("open")).await.expect("read").remove(0);
        assert_eq!(vpg.last_test_us, Some(TimeUs(9)));
        store.close().await;
        std::fs::remove_file(path).expect("removed");
    }
}
