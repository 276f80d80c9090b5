//! Journals that are encrypted with a key that wasn't given.

use std::path::{Path, PathBuf};

use journal::crypt::{KeyError, SiteKeyId, SiteKeys};
use journal::recovery::{OpenError, newest_manifest};

use super::place::{Manifest, open_file, read_superblock};
use crate::api::{VmId, VpgId};

/// What it can't be read without.
#[derive(Clone, Debug, thiserror::Error)]
#[error(
    "{} is encrypted and needs site key {site_key}, {given}: give the file that holds it with --key-file (a copy of the one that `zvm site-key list` names)",
    path.display()
)]
pub(super) struct Locked {
    /// The journal's file.
    pub(super) path: PathBuf,
    /// The key that is missing.
    pub(super) site_key: SiteKeyId,
    given: String,
}

impl Locked {
    /// A journal whose site key is not among those that were given.
    pub(super) fn new(path: &Path, site_key: SiteKeyId, keys: &SiteKeys) -> Self {
        let ids: Vec<String> = keys.iter().map(|key| key.id().to_string()).collect();
        let given = match ids.is_empty() {
            true => "and no key was given".to_owned(),
            false => format!("which is not among the keys that were given ({})", ids.join(", ")),
        };
        Self { path: path.to_owned(), site_key, given }
    }

    /// The error of an opening, with the remedy if it is that the key is missing.
    pub(super) fn or(error: anyhow::Error, path: &Path, keys: &SiteKeys) -> anyhow::Error {
        match missing_key(&error) {
            Some(site_key) => Self::new(path, site_key, keys).into(),
            None => error,
        }
    }
}

/// What is plain of a journal that can't be read without a key.
#[derive(Debug)]
pub(super) struct LockedJournal {
    pub(super) locked: Locked,
    pub(super) vm: VmId,
    /// The VM's name, or its id.
    pub(super) vm_name: String,
    pub(super) vpg: VpgId,
    /// The VPG's name, or its id.
    pub(super) vpg_name: String,
}

impl LockedJournal {
    /// What superblock and manifest say.
    pub(super) fn read(locked: Locked) -> anyhow::Result<Self> {
        let (mut storage, file) = open_file(&locked.path)?;
        let superblock = read_superblock(&mut storage, file);
        let manifest = newest_manifest(&mut storage, file)?;
        let manifest: Option<Manifest> =
            manifest.and_then(|manifest| serde_json::from_str(&manifest.text).ok());
        let ids =
            superblock.map_or_else(Default::default, |superblock| (superblock.vm_id, superblock.vpg_id));
        let (vm, vpg) = match &manifest {
            Some(manifest) => (manifest.vm, manifest.vpg.id),
            None => (VmId(ids.0), VpgId(ids.1)),
        };
        let vm_name = manifest.as_ref().and_then(Manifest::vm).map(|vm| vm.name.clone());
        let vpg_name = manifest.as_ref().map(|manifest| manifest.vpg.name.clone());
        let (vm_name, vpg_name) =
            (vm_name.unwrap_or_else(|| vm.to_string()), vpg_name.unwrap_or_else(|| vpg.to_string()));
        Ok(Self { locked, vm, vm_name, vpg, vpg_name })
    }

    /// The VM's folder.
    pub(super) fn folder(&self) -> &Path {
        self.locked.path.parent().unwrap_or(&self.locked.path)
    }
}

/// The site key that an error says is missing.
pub(super) fn missing_key(error: &anyhow::Error) -> Option<SiteKeyId> {
    error.chain().find_map(|cause| {
        let key = match cause.downcast_ref::<OpenError>() {
            Some(OpenError::Key(key)) => Some(key),
            _ => cause.downcast_ref::<KeyError>(),
        };
        match key {
            Some(KeyError::Missing(site_key)) => Some(*site_key),
            _ => cause.downcast_ref::<Locked>().map(|locked| locked.site_key),
        }
    })
}
