//! What the manager remembers: SQLite, one file, write-ahead log, every commit on disk before it is answered.
//!
//! Queries keep to what SQLite and PostgreSQL share (`$1`, no upserts by dialect). Functions of the submodules take a connection,
//! so that a user's action (row, task, event) is one transaction.

pub mod alerts;
pub mod certificates;
pub mod events;
pub mod leaving_volumes;
pub mod leftovers;
pub mod site;
pub mod site_keys;
pub mod sources;
pub mod tasks;
pub mod test_runs;
pub mod tokens;
pub mod vpgs;
pub mod vras;

use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sqlx::migrate::{Migration, MigrationType, Migrator};
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteRow, SqliteSynchronous,
};
use sqlx::{Connection as _, Row, SqlSafeStr};
use uuid::Uuid;

/// A connection, in a transaction or not.
pub type Connection = sqlx::SqliteConnection;

/// A transaction; dropped without commit it leaves nothing.
pub type Transaction = sqlx::Transaction<'static, sqlx::Sqlite>;

/// The database.
#[derive(Debug, Clone)]
pub struct Store {
    readers: SqlitePool,
    /// SQLite has one writer at a time: waiting for this one connection is fair, waiting for its lock is not.
    writer: SqlitePool,
}

/// What went wrong with the database.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file could not be opened.
    #[error(
        "cannot open database {path}: check that the folder exists, is writable, and no other `zvm serve` runs on it"
    )]
    Open {
        /// The file.
        path: PathBuf,
        /// The driver's reason.
        source: sqlx::Error,
    },
    /// The file was written by a newer manager, or its schema is not ours.
    #[error(
        "cannot bring database {path} to this version's schema: run the newest `zvm` that used it, or restore a backup"
    )]
    Migrate {
        /// The file.
        path: PathBuf,
        /// The driver's reason.
        source: sqlx::migrate::MigrateError,
    },
    /// A row that does not read back.
    #[error("the database holds an unreadable value in {table}.{column}: {reason}; restore a backup")]
    Damaged {
        /// The table.
        table: &'static str,
        /// The column.
        column: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// A query failed.
    #[error("the database failed")]
    Query(#[from] sqlx::Error),
}

impl StoreError {
    /// Whether a row could not be added because a unique value is taken.
    pub fn is_taken(&self) -> bool {
        matches!(self, Self::Query(sqlx::Error::Database(error)) if error.is_unique_violation())
    }
}

impl Store {
    /// Opens (or creates) the database at `path` and brings it to this version's schema.
    pub async fn open(path: &Path) -> Result<Self, StoreError> {
        let open = |source| StoreError::Open { path: path.into(), source };
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .busy_timeout(Duration::from_secs(10));
        let pool = |connections| {
            SqlitePoolOptions::new().max_connections(connections).before_acquire(|connection, _| {
                Box::pin(async move {
                    // A full disk makes SQLite roll back by itself. The driver goes on counting that transaction: later ones would be
                    // savepoints within it, and never be committed. Such a connection is closed, which ends what it had begun.
                    connection.ping().await?;
                    Ok(!connection.is_in_transaction())
                })
            })
        };
        // The file gets its mode before SQLite opens it; its log takes the same.
        std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(path)
            .map_err(|error| open(error.into()))?;
        let writer = pool(1).connect_with(options.clone()).await.map_err(open)?;
        migrator().run(&writer).await.map_err(|source| StoreError::Migrate { path: path.into(), source })?;
        let readers = pool(4).connect_with(options).await.map_err(open)?;
        Ok(Self { readers, writer })
    }

    /// A connection for reading.
    pub async fn read(&self) -> Result<sqlx::pool::PoolConnection<sqlx::Sqlite>, StoreError> {
        Ok(self.readers.acquire().await?)
    }

    /// The one transaction that may write now.
    pub async fn begin(&self) -> Result<Transaction, StoreError> {
        Ok(self.writer.begin().await?)
    }

    /// Ends all connections, so that the log is folded into the file.
    pub async fn close(&self) {
        self.readers.close().await;
        self.writer.close().await;
    }
}

/// The steps to this version's schema, in their order.
fn migrator() -> Migrator {
    let step = |version, name: &'static str, sql: &'static str| {
        Migration::new(version, name.into(), MigrationType::Simple, sql.into_sql_str(), false)
    };
    Migrator::with_migrations(vec![
        step(1, "initial", include_str!("../../migrations/0001_initial.sql")),
        step(2, "site_keys", include_str!("../../migrations/0002_site_keys.sql")),
        step(3, "last_test", include_str!("../../migrations/0003_last_test.sql")),
        step(4, "sources", include_str!("../../migrations/0004_sources.sql")),
        step(5, "leaving_standbys", include_str!("../../migrations/0005_leaving_standbys.sql")),
        step(6, "definition_stamp", include_str!("../../migrations/0006_definition_stamp.sql")),
    ])
}

/// Reads columns of one table's row into the manager's types.
struct Reader<'r> {
    table: &'static str,
    row: &'r SqliteRow,
}

impl<'r> Reader<'r> {
    fn new(table: &'static str, row: &'r SqliteRow) -> Self {
        Self { table, row }
    }

    fn text(&self, column: &'static str) -> Result<String, StoreError> {
        Ok(self.row.try_get(column)?)
    }

    fn optional_text(&self, column: &'static str) -> Result<Option<String>, StoreError> {
        Ok(self.row.try_get(column)?)
    }

    fn number(&self, column: &'static str) -> Result<u64, StoreError> {
        let number: i64 = self.row.try_get(column)?;
        u64::try_from(number).map_err(|_| self.damaged(column, format!("{number} is negative")))
    }

    fn optional_number(&self, column: &'static str) -> Result<Option<u64>, StoreError> {
        let number: Option<i64> = self.row.try_get(column)?;
        number
            .map(|number| {
                u64::try_from(number).map_err(|_| self.damaged(column, format!("{number} is negative")))
            })
            .transpose()
    }

    fn uuid(&self, column: &'static str) -> Result<Uuid, StoreError> {
        self.parse(column)
    }

    fn optional_uuid(&self, column: &'static str) -> Result<Option<Uuid>, StoreError> {
        let text: Option<String> = self.row.try_get(column)?;
        text.map(|text| text.parse().map_err(|error: uuid::Error| self.damaged(column, error.to_string())))
            .transpose()
    }

    fn parse<T: std::str::FromStr<Err: std::fmt::Display>>(
        &self,
        column: &'static str,
    ) -> Result<T, StoreError> {
        self.text(column)?.parse().map_err(|error: T::Err| self.damaged(column, error.to_string()))
    }

    fn json<T: serde::de::DeserializeOwned>(&self, column: &'static str) -> Result<T, StoreError> {
        serde_json::from_str(&self.text(column)?).map_err(|error| self.damaged(column, error.to_string()))
    }

    fn optional_json<T: serde::de::DeserializeOwned>(
        &self,
        column: &'static str,
    ) -> Result<Option<T>, StoreError> {
        let text: Option<String> = self.row.try_get(column)?;
        text.map(|text| serde_json::from_str(&text).map_err(|error| self.damaged(column, error.to_string())))
            .transpose()
    }

    fn damaged(&self, column: &'static str, reason: String) -> StoreError {
        StoreError::Damaged { table: self.table, column, reason }
    }
}

/// `value` as a database integer. Times and counters stay far below the limit.
fn int(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// `value` as JSON text.
fn to_json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).expect("the manager's own types have string keys and no failing serializers")
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A store in a folder of its own, removed when dropped.
    pub(crate) struct ScratchStore {
        pub(crate) store: Store,
        dir: PathBuf,
    }

    impl ScratchStore {
        pub(crate) async fn open() -> Self {
            let dir = std::env::temp_dir().join(format!("zvm-store-{}", Uuid::new_v4()));
            std::fs::create_dir(&dir).unwrap();
            let store = Store::open(&dir.join("zvm.db")).await.unwrap();
            Self { store, dir }
        }
    }

    impl Drop for ScratchStore {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }

    #[tokio::test]
    async fn every_connection_waits_for_the_disk() {
        let scratch = ScratchStore::open().await;
        let mut tx = scratch.store.begin().await.unwrap();
        let mode: String = sqlx::query_scalar("PRAGMA journal_mode").fetch_one(&mut *tx).await.unwrap();
        let synchronous: i64 = sqlx::query_scalar("PRAGMA synchronous").fetch_one(&mut *tx).await.unwrap();
        assert_eq!((mode.as_str(), synchronous), ("wal", 2));
    }

    #[tokio::test]
    async fn after_a_full_disk_commits_count_again() {
        let scratch = ScratchStore::open().await;
        let store = &scratch.store;
        let mut tx = store.begin().await.unwrap();
        sqlx::query("CREATE TABLE filler (text TEXT)").execute(&mut *tx).await.unwrap();
        tx.commit().await.unwrap();
        let fill = |bytes: usize| sqlx::query("INSERT INTO filler VALUES ($1)").bind("x".repeat(bytes));
        let count = async || -> i64 {
            let mut reader = store.read().await.unwrap();
            sqlx::query_scalar("SELECT count(*) FROM filler").fetch_one(&mut *reader).await.unwrap()
        };
        for round in 0..3 {
            let mut tx = store.begin().await.unwrap();
            let pages: i64 = sqlx::query_scalar("PRAGMA page_count").fetch_one(&mut *tx).await.unwrap();
            let limit = sqlx::AssertSqlSafe(format!("PRAGMA max_page_count = {}", pages + 1));
            sqlx::query(limit).execute(&mut *tx).await.unwrap();
            fill(10).execute(&mut *tx).await.unwrap();
            let error = fill(100_000).execute(&mut *tx).await.unwrap_err();
            assert!(error.to_string().contains("full"), "{error}");
            drop(tx);
            assert_eq!(count().await, round);
            let mut tx = store.begin().await.unwrap();
            fill(10).execute(&mut *tx).await.unwrap();
            tx.commit().await.unwrap();
            assert_eq!(count().await, round + 1);
        }
    }

    #[tokio::test]
    async fn a_store_of_a_newer_manager_is_refused() {
        let scratch = ScratchStore::open().await;
        let mut tx = scratch.store.begin().await.unwrap();
        sqlx::query("INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time) VALUES (999, 'later', 1, $1, 0)")
            .bind(&[0_u8; 4][..])
            .execute(&mut *tx)
            .await
            .unwrap();
        tx.commit().await.unwrap();
        let error = Store::open(&scratch.dir.join("zvm.db")).await.unwrap_err();
        assert!(matches!(error, StoreError::Migrate { .. }), "{error}");
    }
}
