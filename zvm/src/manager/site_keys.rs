//! Keys of the site, for encrypted journals.

use vra::api::{ApiError, ErrorCode};
use vra::report::chain;

use super::{Manager, internal};
use crate::api::SiteKeyList;
use crate::model::event::{Entity, EventKind};

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
        self.note(&mut tx, EventKind::SiteKeyRotated, true, Entity::zvm(), description, None)
            .await
            .map_err(internal)?;
        tx.commit().await.map_err(|error| internal(error.into()))?;
        self.wake.notify_one();
        Ok(list)
    }
}
