//! Sources of inventory: list, add, edit, remove, read now.

use vra::api::{ApiError, ErrorCode};
use vra::report::chain;
use zeroize::Zeroizing;

use super::{Manager, check_name, internal};
use crate::api::{Secret, SourceEdit, SourceShown};
use crate::credentials::{CredentialError, CredentialKey};
use crate::inventory::{Provider, Reading, source};
use crate::model::event::{Entity, EventKind};
use crate::model::source::{Access, Source, Trust};
use crate::store::sources::StoredSource;
use crate::store::{self, StoreError};

/// Times between two whole readings that may be set, milliseconds.
const REREAD_INTERVAL_MS: std::ops::RangeInclusive<u64> = 1_000..=86_400_000;

/// Longest password, in bytes.
const MAX_PASSWORD_BYTES: usize = 1_024;

impl Manager {
    /// All sources and how their reading goes; the inventory file is not among them.
    pub async fn list_sources(&self) -> Result<Vec<SourceShown>, ApiError> {
        let sources = self.stored_sources().await.map_err(internal)?;
        let known = self.known();
        let inventory = known.world.inventory();
        let shown = sources.into_iter().map(|stored| {
            let name = &stored.source.name;
            let reading = known.readings.get(name).cloned().unwrap_or_default();
            SourceShown {
                hosts: inventory.hosts.iter().filter(|host| host.origin.source == *name).count(),
                vms: inventory.vms.iter().filter(|vm| vm.origin.source == *name).count(),
                read_us: reading.read_us,
                error: reading.error,
                source: stored.source,
            }
        });
        Ok(shown.collect())
    }

    /// Adds a source, after it could be read; with `unchecked` even if it can't be reached now.
    pub async fn add_source(
        &self,
        source: Source,
        password: Option<Secret>,
        unchecked: bool,
    ) -> Result<Vec<SourceShown>, ApiError> {
        check_name("source", &source.name)?;
        self.check_settings(&source)?;
        let password = password.map(|password| self.sealed(&source, &password)).transpose()?;
        let stored = StoredSource { source, password };
        if self.find_source(&stored.source.name).await.is_ok() {
            let message = format!("there is a source {:?} already", stored.source.name);
            return Err(ApiError::new(ErrorCode::Conflict, message)
                .remedy("change it with `zvm source edit`, or give this one another name"));
        }
        self.try_source(&stored, unchecked).await?;
        let access = &stored.source.settings.access;
        let description =
            format!("{} source {} at {} was added", access.kind(), stored.source.name, access.address());
        let save = async {
            let mut tx = self.store.begin().await?;
            store::sources::insert(&mut tx, &stored).await?;
            let entity = Entity::source(&stored.source.name);
            self.note(&mut tx, EventKind::SourceAdded, true, entity, description, None).await?;
            Ok::<_, StoreError>(tx.commit().await?)
        };
        save.await.map_err(internal)?;
        self.sources_changed.notify_one();
        self.list_sources().await
    }

    /// Changes a source's settings, under the same condition as adding it.
    pub async fn edit_source(
        &self,
        name: &str,
        edit: SourceEdit,
        unchecked: bool,
    ) -> Result<Vec<SourceShown>, ApiError> {
        let mut stored = self.find_source(name).await?;
        edit.settings
            .apply(&mut stored.source.settings)
            .map_err(|reason| ApiError::new(ErrorCode::BadRequest, format!("source {name:?} {reason}")))?;
        self.check_settings(&stored.source)?;
        if let Some(password) = &edit.password {
            stored.password = Some(self.sealed(&stored.source, password)?);
        }
        self.try_source(&stored, unchecked).await?;
        let description = format!("the settings of source {name} were changed");
        let save = async {
            let mut tx = self.store.begin().await?;
            store::sources::update(&mut tx, &stored).await?;
            self.note(&mut tx, EventKind::SourceEdited, true, Entity::source(name), description, None)
                .await?;
            Ok::<_, StoreError>(tx.commit().await?)
        };
        save.await.map_err(internal)?;
        self.sources_changed.notify_one();
        self.list_sources().await
    }

    /// Forgets a source. VMs of groups that only it tells of raise alerts; their protection goes on.
    pub async fn remove_source(&self, name: &str, force: bool) -> Result<Vec<SourceShown>, ApiError> {
        let stored = self.find_source(name).await?;
        let desired = self.desired().await.map_err(internal)?;
        let inventory = self.inventory();
        let is_its = |uuid: uuid::Uuid| {
            inventory.vms.iter().any(|vm| vm.uuid == uuid && vm.origin.source == stored.source.name)
        };
        let uses = |vpg: &&crate::model::vpg::Vpg| vpg.settings.vms.iter().any(|member| is_its(member.vm.0));
        if let Some(vpg) = desired.vpgs.iter().find(uses).filter(|_| !force) {
            let message = format!("VMs of VPG {} are known from source {name}", vpg.name);
            return Err(ApiError::new(ErrorCode::Busy, message).remedy(
                "with --force it is removed all the same: protection goes on, and changes of these VMs are no longer noticed",
            ));
        }
        let description = format!("source {name} was removed");
        let save = async {
            let mut tx = self.store.begin().await?;
            store::sources::delete(&mut tx, name).await?;
            self.note(&mut tx, EventKind::SourceRemoved, true, Entity::source(name), description, None)
                .await?;
            Ok::<_, StoreError>(tx.commit().await?)
        };
        save.await.map_err(internal)?;
        self.sources_changed.notify_one();
        self.list_sources().await
    }

    /// Has a source read whole, now; none: all of them.
    pub async fn read_sources(&self, name: Option<&str>) -> Result<Vec<SourceShown>, ApiError> {
        match name {
            Some(name) => {
                self.find_source(name).await?;
                self.wake_source(name);
            }
            None => {
                for stored in self.stored_sources().await.map_err(internal)? {
                    self.wake_source(&stored.source.name);
                }
            }
        }
        self.list_sources().await
    }

    pub(super) async fn stored_sources(&self) -> Result<Vec<StoredSource>, StoreError> {
        store::sources::list(&mut *self.store.read().await?).await
    }

    /// What reads a source.
    pub(super) fn provider_of(&self, stored: &StoredSource) -> Result<Box<dyn Provider>, ApiError> {
        let source = &stored.source;
        let password = match &stored.password {
            Some(sealed) => {
                let key = self.credential_key().map_err(refused_password)?;
                key.unseal(&source.name, sealed).map_err(refused_password)?
            }
            None => Zeroizing::default(),
        };
        source::provider_of(source, password).map_err(|error| {
            ApiError::new(ErrorCode::BadRequest, format!("source {:?}: {error}", source.name))
        })
    }

    async fn find_source(&self, name: &str) -> Result<StoredSource, ApiError> {
        let sources = self.stored_sources().await.map_err(internal)?;
        sources.into_iter().find(|stored| stored.source.name == name).ok_or_else(|| {
            ApiError::new(ErrorCode::NotFound, format!("there is no source {name:?}"))
                .remedy("`zvm source list` shows those that there are; the inventory file is none of them")
        })
    }

    fn check_settings(&self, source: &Source) -> Result<(), ApiError> {
        let settings = &source.settings;
        check_name("site", &settings.site)?;
        if !REREAD_INTERVAL_MS.contains(&settings.reread_interval_ms) {
            let message =
                format!("source {:?} can't be read every {} ms", source.name, settings.reread_interval_ms);
            return Err(ApiError::new(ErrorCode::BadRequest, message).remedy("give it 1 second to 1 day"));
        }
        if let Access::Vcenter { trust: Trust::Pin(pin), .. } = &settings.access
            && (pin.len() != 64 || !pin.bytes().all(|byte| byte.is_ascii_hexdigit()))
        {
            let message = format!("{pin:?} is no SHA-256 of a certificate");
            return Err(ApiError::new(ErrorCode::BadRequest, message)
                .remedy("give 64 hex digits, with or without colons"));
        }
        Ok(())
    }

    /// Reads a source as it would be stored, once; unchecked, only its description is looked at.
    async fn try_source(&self, stored: &StoredSource, unchecked: bool) -> Result<(), ApiError> {
        let mut provider = self.provider_of(stored)?;
        if unchecked {
            return Ok(());
        }
        let read = provider.read(Reading::Whole).await;
        read.map(drop).map_err(|error| {
            let message = chain(&error);
            ApiError::new(ErrorCode::NotReady, message)
                .remedy(format!("{}; --unchecked takes it all the same", error.remedy()))
        })
    }

    fn sealed(&self, source: &Source, password: &Secret) -> Result<String, ApiError> {
        if password.reveal().is_empty() || password.reveal().len() > MAX_PASSWORD_BYTES {
            let message = format!("a password has 1 to {MAX_PASSWORD_BYTES} bytes");
            return Err(ApiError::new(ErrorCode::BadRequest, message));
        }
        let key = self.credential_key().map_err(refused_password)?;
        key.seal(&source.name, password.reveal()).map_err(refused_password)
    }

    /// Read anew each time: it is rarely needed, and then it isn't in memory.
    fn credential_key(&self) -> Result<CredentialKey, CredentialError> {
        CredentialKey::open(&self.config.credential_key_path())
    }
}

fn refused_password(error: CredentialError) -> ApiError {
    ApiError::new(ErrorCode::Io, chain(&error))
}
