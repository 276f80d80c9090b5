//! Enrolment tokens, by the hash of their secrets.

use vra::api::enroll::{hex, unhex32};
use vra::api::{TimeUs, VraId};

use super::{Connection, Reader, StoreError, int};
use crate::model::vra::EnrolToken;

/// Adds a token.
pub async fn insert(db: &mut Connection, token: &EnrolToken) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO enrol_token (secret_sha256, vra_name, created_us, ends_us) VALUES ($1, $2, $3, $4)",
    )
    .bind(hex(&token.secret_sha256))
    .bind(&token.vra_name)
    .bind(int(token.created_us.0))
    .bind(int(token.ends_us.0))
    .execute(db)
    .await?;
    Ok(())
}

/// The token of that hash.
pub async fn get(db: &mut Connection, secret_sha256: &[u8; 32]) -> Result<Option<EnrolToken>, StoreError> {
    let row = sqlx::query(
        "SELECT secret_sha256, vra_name, created_us, ends_us, used_us, used_by FROM enrol_token WHERE secret_sha256 = $1",
    )
    .bind(hex(secret_sha256))
    .fetch_optional(db)
    .await?;
    row.map(|row| {
        let read = Reader::new("enrol_token", &row);
        Ok(EnrolToken {
            secret_sha256: unhex32(&read.text("secret_sha256")?)
                .ok_or_else(|| read.damaged("secret_sha256", "not 64 hex digits".into()))?,
            vra_name: read.text("vra_name")?,
            created_us: TimeUs(read.number("created_us")?),
            ends_us: TimeUs(read.number("ends_us")?),
            used: match (read.optional_number("used_us")?, read.optional_uuid("used_by")?) {
                (Some(used_us), Some(vra)) => Some((TimeUs(used_us), VraId(vra))),
                _ => None,
            },
        })
    })
    .transpose()
}

/// Marks a token as used. False if it was before.
pub async fn mark_used(
    db: &mut Connection,
    secret_sha256: &[u8; 32],
    vra: VraId,
    now_us: TimeUs,
) -> Result<bool, StoreError> {
    let done = sqlx::query(
        "UPDATE enrol_token SET used_us = $2, used_by = $3 WHERE secret_sha256 = $1 AND used_us IS NULL",
    )
    .bind(hex(secret_sha256))
    .bind(int(now_us.0))
    .bind(vra.to_string())
    .execute(db)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Forgets tokens that ended before `before_us`.
pub async fn forget_ended(db: &mut Connection, before_us: TimeUs) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM enrol_token WHERE ends_us < $1").bind(int(before_us.0)).execute(db).await?;
    Ok(())
}
