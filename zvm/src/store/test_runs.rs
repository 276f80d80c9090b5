//! Tests of groups, for as long as a trace of them is left.

use uuid::Uuid;
use vra::api::{TimeUs, VpgId};

use super::{Connection, Reader, StoreError, int, to_json};
use crate::model::test_run::{TestRun, TestState};

/// All of them.
pub async fn list(db: &mut Connection) -> Result<Vec<TestRun>, StoreError> {
    let rows = sqlx::query("SELECT id, vpg_id, state, started_us, details FROM test_run ORDER BY started_us")
        .fetch_all(db)
        .await?;
    rows.iter()
        .map(|row| {
            let read = Reader::new("test_run", row);
            Ok(TestRun {
                id: read.uuid("id")?,
                vpg: VpgId(read.uuid("vpg_id")?),
                state: read.parse("state")?,
                started_us: TimeUs(read.number("started_us")?),
                details: read.json("details")?,
            })
        })
        .collect()
}

/// Adds a test. [`StoreError::is_taken`] if its group is being tested already.
pub async fn insert(db: &mut Connection, test: &TestRun) -> Result<(), StoreError> {
    sqlx::query("INSERT INTO test_run (id, vpg_id, state, started_us, details) VALUES ($1, $2, $3, $4, $5)")
        .bind(test.id.to_string())
        .bind(test.vpg.to_string())
        .bind(test.state.as_str())
        .bind(int(test.started_us.0))
        .bind(to_json(&test.details))
        .execute(db)
        .await?;
    Ok(())
}

/// Moves a test on, from one of the states `from`. False if it is not in any of them.
pub async fn move_on(
    db: &mut Connection,
    test: &TestRun,
    from: TestState,
    to: TestState,
) -> Result<bool, StoreError> {
    let done = sqlx::query("UPDATE test_run SET state = $3, details = $4 WHERE id = $1 AND state = $2")
        .bind(test.id.to_string())
        .bind(from.as_str())
        .bind(to.as_str())
        .bind(to_json(&test.details))
        .execute(db)
        .await?;
    Ok(done.rows_affected() == 1)
}

/// Forgets a test.
pub async fn delete(db: &mut Connection, test: Uuid) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM test_run WHERE id = $1").bind(test.to_string()).execute(db).await?;
    Ok(())
}
