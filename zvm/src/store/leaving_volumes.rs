//! Volumes that are no longer to be served once no guest uses them any more.

use vra::api::{VmId, VolumeId, VraId};

use super::{Connection, Reader, StoreError};

/// One of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeavingVolume {
    /// Who serves it.
    pub vra: VraId,
    /// Its id.
    pub volume: VolumeId,
    /// Its VM.
    pub vm: VmId,
    /// Name of the source that tells whether a guest uses it.
    pub source: String,
    /// The served device, as definitions name it.
    pub device: String,
}

/// All of them.
pub async fn list(db: &mut Connection) -> Result<Vec<LeavingVolume>, StoreError> {
    let query =
        "SELECT volume_id, vra_id, vm_id, source, device FROM leaving_volume ORDER BY volume_id, vra_id";
    let rows = sqlx::query(query).fetch_all(db).await?;
    rows.iter()
        .map(|row| {
            let read = Reader::new("leaving_volume", row);
            Ok(LeavingVolume {
                vra: VraId(read.uuid("vra_id")?),
                volume: VolumeId(read.uuid("volume_id")?),
                vm: VmId(read.uuid("vm_id")?),
                source: read.text("source")?,
                device: read.text("device")?,
            })
        })
        .collect()
}

/// Adds one, if it isn't there.
pub async fn insert(db: &mut Connection, leaving: &LeavingVolume) -> Result<(), StoreError> {
    delete(db, leaving.volume, leaving.vra).await?;
    sqlx::query(
        "INSERT INTO leaving_volume (volume_id, vra_id, vm_id, source, device) VALUES ($1, $2, $3, $4, $5)",
    )
    .bind(leaving.volume.to_string())
    .bind(leaving.vra.to_string())
    .bind(leaving.vm.to_string())
    .bind(&leaving.source)
    .bind(&leaving.device)
    .execute(db)
    .await?;
    Ok(())
}

/// Forgets one.
pub async fn delete(db: &mut Connection, volume: VolumeId, vra: VraId) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM leaving_volume WHERE volume_id = $1 AND vra_id = $2")
        .bind(volume.to_string())
        .bind(vra.to_string())
        .execute(db)
        .await?;
    Ok(())
}

/// Forgets those of a VM.
pub async fn delete_of_vm(db: &mut Connection, vm: VmId) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM leaving_volume WHERE vm_id = $1").bind(vm.to_string()).execute(db).await?;
    Ok(())
}
