//! Keys of the site, for encrypted journals.

use vra::api::{ApiError, ErrorCode, TimeUs};
use vra::report::chain;

use super::{Manager, StartError, internal};
use crate::api::SiteKeyList;
use crate::config::Config;
use crate::model::event::{Entity, EventKind};
use crate::site_key_file::{LostSiteKeys, NotedSiteKeys, SiteKeyFile};
use crate::store::{self, Store, StoreError};

/// Opens the file of site keys, and notes their names in the database: should the file be lost, that tells.
pub(super) async fn open(
    config: &Config,
    store: &Store,
    lost: LostSiteKeys,
    now_us: TimeUs,
) -> Result<SiteKeyFile, StartError> {
    let mut tx = store.begin().await?;
    let groups = store::vpgs::list(&mut tx).await?;
    let noted = NotedSiteKeys {
        ids: store::site_keys::list(&mut tx).await?,
        are_in_use: groups.iter().any(|group| group.settings.encrypt),
    };
    let file = SiteKeyFile::open(&config.site_key_path(), &noted, lost)?;
    store::site_keys::replace(&mut tx, &file.ids(), now_us).await?;
    tx.commit().await.map_err(StoreError::from)?;
    Ok(file)
}

impl Manager {
    /// The names of the site's keys.
    pub fn list_site_keys(&self) -> SiteKeyList {
        SiteKeyList { file: self.site_keys.path().to_owned(), ids: self.site_keys.ids() }
    }

    /// Makes a new key. The VRAs get it with the next pass; each journal that is encrypted then gets a new key too.
    pub async fn rotate_site_key(&self) -> Result<SiteKeyList, ApiError> {
        self.site_keys.rotate().map_err(|error| ApiError::new(ErrorCode::Io, chain(&error)))?;
        let list = self.list_site_keys();
        let description = format!("Site key {} is used from now on", list.ids[0]);
        let mut tx = self.store.begin().await.map_err(internal)?;
        store::site_keys::replace(&mut tx, &list.ids, self.now_us()).await.map_err(internal)?;
        self.note(&mut tx, EventKind::SiteKeyRotated, true, Entity::zvm(), description, None)
            .await
            .map_err(internal)?;
        tx.commit().await.map_err(|error| internal(error.into()))?;
        self.wake.notify_one();
        Ok(list)
    }
}
