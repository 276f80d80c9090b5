//! Certificates given to VRAs, and the list of those that no longer count.

use vra::api::{SetTrust, TimeUs, VraId};
use vra::pki::PeerCertificate;

use super::{Connection, Reader, StoreError, int, site};
use crate::authority::Issued;
use crate::model::vra::VraState;

/// Notes a certificate; call after [`super::vras::save_enrolled`].
pub async fn insert(
    db: &mut Connection,
    vra: VraId,
    issued: &Issued,
    now_us: TimeUs,
) -> Result<(), StoreError> {
    sqlx::query("INSERT INTO vra_certificate (serial, vra_id, issued_us, ends_us) VALUES ($1, $2, $3, $4)")
        .bind(&issued.serial)
        .bind(vra.to_string())
        .bind(int(now_us.0))
        .bind(int(issued.not_after_us))
        .execute(db)
        .await?;
    Ok(())
}

/// Notes which certificate it is that another serial number stood for.
pub async fn recognise(
    db: &mut Connection,
    vra: VraId,
    former_serial: &str,
    certificate: &PeerCertificate,
) -> Result<(), StoreError> {
    let query = "UPDATE vra_certificate SET serial = $3, ends_us = $4 WHERE vra_id = $1 AND serial = $2";
    sqlx::query(query)
        .bind(vra.to_string())
        .bind(former_serial)
        .bind(&certificate.serial)
        .bind(int(certificate.ends_us.0))
        .execute(db)
        .await?;
    Ok(())
}

/// Revokes every certificate of a VRA that still counts and says how many there were.
pub async fn revoke_all(db: &mut Connection, vra: VraId, now_us: TimeUs) -> Result<u64, StoreError> {
    let done =
        sqlx::query("UPDATE vra_certificate SET revoked_us = $2 WHERE vra_id = $1 AND revoked_us IS NULL")
            .bind(vra.to_string())
            .bind(int(now_us.0))
            .execute(db)
            .await?;
    Ok(done.rows_affected())
}

/// What VRAs must not trust. Certificates that ended long ago are left out: their dates already tell.
pub async fn trust(db: &mut Connection, now_us: TimeUs) -> Result<SetTrust, StoreError> {
    // A VRA's clock may be behind, but not by a month.
    const ENDED_SLACK_US: u64 = 30 * 86_400_000_000;
    let version = site::get(db).await?.map_or(0, |site| site.trust_version);
    let rows = sqlx::query(
        "SELECT serial FROM vra_certificate WHERE revoked_us IS NOT NULL AND ends_us > $1 ORDER BY serial",
    )
    .bind(int(now_us.0.saturating_sub(ENDED_SLACK_US)))
    .fetch_all(&mut *db)
    .await?;
    let revoked_serials = rows
        .iter()
        .map(|row| Reader::new("vra_certificate", row).text("serial"))
        .collect::<Result<_, _>>()?;
    let rows = sqlx::query("SELECT id FROM vra WHERE state = $1 ORDER BY id")
        .bind(VraState::Revoked.as_str())
        .fetch_all(db)
        .await?;
    let revoked_vras =
        rows.iter().map(|row| Reader::new("vra", row).uuid("id").map(VraId)).collect::<Result<_, _>>()?;
    Ok(SetTrust { version, revoked_serials, revoked_vras })
}
