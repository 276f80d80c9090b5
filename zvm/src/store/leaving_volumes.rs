//! Volumes that are no longer to be served once their guests use them no more.

use std::path::{Path, PathBuf};

use vra::api::{TimeUs, VmId, VolumeId, VraId};

use super::{Connection, Reader, StoreError, int};

/// One of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeavingVolume {
    /// Who serves it.
    pub vra: VraId,
    /// Its id.
    pub volume: VolumeId,
    /// Its VM.
    pub vm: VmId,
    /// The disk.
    pub path: PathBuf,
    /// Since when its VM's definition has the disk itself.
    pub since_us: TimeUs,
}

/// All of them.
pub async fn list(db: &mut Connection) -> Result<Vec<LeavingVolume>, StoreError> {
    let rows =
        sqlx::query("SELECT volume_id, vra_id, vm_id, path, since_us FROM leaving_volume ORDER BY volume_id")
            .fetch_all(db)
            .await?;
    rows.iter()
        .map(|row| {
            let read = Reader::new("leaving_volume", row);
            Ok(LeavingVolume {
                vra: VraId(read.uuid("vra_id")?),
                volume: VolumeId(read.uuid("volume_id")?),
                vm: VmId(read.uuid("vm_id")?),
                path: read.text("path")?.into(),
                since_us: TimeUs(read.number("since_us")?),
            })
        })
        .collect()
}

/// Adds one, or has it wait anew.
pub async fn insert(
    db: &mut Connection,
    vra: VraId,
    volume: VolumeId,
    vm: VmId,
    path: &Path,
    since_us: TimeUs,
) -> Result<(), StoreError> {
    delete(db, volume).await?;
    sqlx::query(
        "INSERT INTO leaving_volume (volume_id, vra_id, vm_id, path, since_us) VALUES ($1, $2, $3, $4, $5)",
    )
    .bind(volume.to_string())
    .bind(vra.to_string())
    .bind(vm.to_string())
    .bind(path.display().to_string())
    .bind(int(since_us.0))
    .execute(db)
    .await?;
    Ok(())
}

/// Forgets one.
pub async fn delete(db: &mut Connection, volume: VolumeId) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM leaving_volume WHERE volume_id = $1")
        .bind(volume.to_string())
        .execute(db)
        .await?;
    Ok(())
}
