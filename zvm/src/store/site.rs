//! The one row that tells whose database it is.

use vra::api::ZvmId;

use super::{Connection, Reader, StoreError, int};

/// The site.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Site {
    /// Its name.
    pub name: String,
    /// Its manager.
    pub zvm: ZvmId,
    /// Version of the list of revoked certificates.
    pub trust_version: u64,
}

/// Writes the row that `zvm init` makes.
pub async fn insert(db: &mut Connection, site: &Site) -> Result<(), StoreError> {
    sqlx::query("INSERT INTO site (id, name, zvm_id, trust_version) VALUES (1, $1, $2, $3)")
        .bind(&site.name)
        .bind(site.zvm.to_string())
        .bind(int(site.trust_version))
        .execute(db)
        .await?;
    Ok(())
}

/// The site; none before `zvm init`.
pub async fn get(db: &mut Connection) -> Result<Option<Site>, StoreError> {
    let row =
        sqlx::query("SELECT name, zvm_id, trust_version FROM site WHERE id = 1").fetch_optional(db).await?;
    row.map(|row| {
        let read = Reader::new("site", &row);
        Ok(Site {
            name: read.text("name")?,
            zvm: ZvmId(read.uuid("zvm_id")?),
            trust_version: read.number("trust_version")?,
        })
    })
    .transpose()
}

/// Raises the version of the list of revoked certificates.
pub async fn raise_trust_version(db: &mut Connection) -> Result<(), StoreError> {
    sqlx::query("UPDATE site SET trust_version = trust_version + 1 WHERE id = 1").execute(db).await?;
    Ok(())
}

/// Sets the version of the list of revoked certificates.
pub async fn set_trust_version(db: &mut Connection, version: u64) -> Result<(), StoreError> {
    sqlx::query("UPDATE site SET trust_version = $1 WHERE id = 1").bind(int(version)).execute(db).await?;
    Ok(())
}
