//! Enrolled and revoked VRAs.

use sqlx::sqlite::SqliteRow;
use vra::api::{TimeUs, VraId};

use super::{Connection, Reader, StoreError, int};
use crate::model::vra::{Vra, VraState};

/// Every VRA with its newest certificate.
const SELECT: &str = "SELECT vra.id, vra.name, vra.address, vra.version, vra.state, vra.enrolled_us, vra.revoked_us, \
     cert.serial, cert.ends_us \
     FROM vra JOIN vra_certificate cert ON cert.vra_id = vra.id \
     WHERE cert.issued_us = (SELECT MAX(issued_us) FROM vra_certificate newest WHERE newest.vra_id = vra.id) \
     ORDER BY vra.state, vra.name, vra.id";

/// All of them: enrolled ones first, by name.
pub async fn list(db: &mut Connection) -> Result<Vec<Vra>, StoreError> {
    sqlx::query(SELECT).fetch_all(db).await?.iter().map(read).collect()
}

/// Adds an enrolled VRA, or takes the new name, address and version of one that enrols again.
pub async fn save_enrolled(db: &mut Connection, vra: &Vra) -> Result<(), StoreError> {
    let known: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM vra WHERE id = $1")
        .bind(vra.id.to_string())
        .fetch_one(&mut *db)
        .await?;
    let query = if known == 0 {
        "INSERT INTO vra (id, name, address, version, state, enrolled_us) VALUES ($1, $2, $3, $4, $5, $6)"
    } else {
        "UPDATE vra SET name = $2, address = $3, version = $4, state = $5, enrolled_us = $6 WHERE id = $1"
    };
    sqlx::query(query)
        .bind(vra.id.to_string())
        .bind(&vra.name)
        .bind(&vra.address)
        .bind(&vra.version)
        .bind(VraState::Enrolled.as_str())
        .bind(int(vra.enrolled_us.0))
        .execute(db)
        .await?;
    Ok(())
}

/// Marks a VRA as revoked.
pub async fn revoke(db: &mut Connection, vra: VraId, now_us: TimeUs) -> Result<(), StoreError> {
    sqlx::query("UPDATE vra SET state = $2, revoked_us = $3 WHERE id = $1")
        .bind(vra.to_string())
        .bind(VraState::Revoked.as_str())
        .bind(int(now_us.0))
        .execute(db)
        .await?;
    Ok(())
}

/// Changes what a VRA is called.
pub async fn set_name(db: &mut Connection, vra: VraId, name: &str) -> Result<(), StoreError> {
    sqlx::query("UPDATE vra SET name = $2 WHERE id = $1")
        .bind(vra.to_string())
        .bind(name)
        .execute(db)
        .await?;
    Ok(())
}

/// Changes where a VRA is reached.
pub async fn set_address(db: &mut Connection, vra: VraId, address: &str) -> Result<(), StoreError> {
    sqlx::query("UPDATE vra SET address = $2 WHERE id = $1")
        .bind(vra.to_string())
        .bind(address)
        .execute(db)
        .await?;
    Ok(())
}

fn read(row: &SqliteRow) -> Result<Vra, StoreError> {
    let read = Reader::new("vra", row);
    Ok(Vra {
        id: VraId(read.uuid("id")?),
        name: read.text("name")?,
        address: read.text("address")?,
        version: read.text("version")?,
        state: read.parse("state")?,
        enrolled_us: TimeUs(read.number("enrolled_us")?),
        revoked_us: read.optional_number("revoked_us")?.map(TimeUs),
        certificate_serial: read.text("serial")?,
        certificate_ends_us: TimeUs(read.number("ends_us")?),
    })
}
