//! A target VM follows its group's definition.

use std::sync::PoisonError;

use super::{Inner, TargetVm, policy};
use crate::api::VpgDefinition;
use crate::receive::files;
use crate::receive::redefinition::{Present, Wanted, definition_in};
use crate::receive::target_error::TargetError;
use crate::receive::worker::Input;

impl TargetVm {
    /// Whether another definition can be followed, and what it needs. If volumes join nobody has views open: they can join while the files are
    /// closed.
    ///
    /// # Errors
    /// It can't, or not now.
    pub(in crate::receive) fn check_definition(&self, vpg: &VpgDefinition) -> Result<Wanted, TargetError> {
        self.may_encrypt(vpg)?;
        let inner = self.lock();
        let wanted = self.check_in(&inner, vpg)?;
        if wanted.added.is_empty() {
            return Ok(wanted);
        }
        let count = inner.pins.count();
        if count > 0 {
            return Err(TargetError::InUse { vm: self.vm, count });
        }
        if inner.key.is_none() {
            return Err(TargetError::NotOpen { vm: self.vm, reason: inner.not_open.clone() });
        }
        Ok(wanted)
    }

    fn check_in(&self, inner: &Inner, vpg: &VpgDefinition) -> Result<Wanted, TargetError> {
        let current = inner.manifest.vm().expect("checked when the manifest was read or set");
        let present = Present {
            manifest: &inner.manifest,
            identity: &files::identity(current)?,
            bases: &inner.volume_bases,
            slot_bytes: slot_bytes(inner),
            journal: self.folder.journal(),
        };
        present.check(vpg)
    }

    /// Takes another definition of the same journal and volumes, of which some may leave, or have grown: their recovery disks have. The journal
    /// keeps it.
    ///
    /// # Errors
    /// What [`Self::check_definition`] would have told.
    pub fn redefine(&self, vpg: &VpgDefinition) -> Result<(), TargetError> {
        let definition = definition_in(vpg, self.vm)?;
        let mut inner = self.lock();
        let volumes = files::identity(definition)?.volumes;
        if !self.check_in(&inner, vpg)?.added.is_empty() {
            return Err(TargetError::VolumesDiffer { vm: self.vm, path: self.folder.journal() });
        }
        if inner.manifest.vpg == *vpg {
            return Ok(());
        }
        // What of such a disk still comes until the source knows, nobody misses: a full sync of the VM follows.
        let newest_seq = inner.status.lock().unwrap_or_else(PoisonError::into_inner).durable_through;
        let mut manifest = inner.manifest.redefined(vpg);
        manifest.note_left(definition, newest_seq + 1);
        inner.manifest = manifest;
        if let Some(vm) = inner.key {
            let policy = policy(vpg, definition, slot_bytes(&inner), self.settings.window_bytes);
            self.worker.tell(Input::SetPolicy { vm, policy });
            // Nobody waits for it: should it be lost with the files, it is written when they are open again.
            self.write_manifest(&inner);
            // After that, so that no stream without a disk begins before the journal knows that it has left.
            self.worker.tell(Input::SetVolumes { vm, volumes });
        }
        drop(inner);
        self.redefined.notify_waiters();
        Ok(())
    }

    /// Whether there is a key, if the group wants encryption.
    fn may_encrypt(&self, vpg: &VpgDefinition) -> Result<(), TargetError> {
        if vpg.encrypt && self.keys.site().is_empty() { Err(TargetError::NoSiteKey) } else { Ok(()) }
    }

    /// Makes the journal encrypt, or not, as the group's definition says, with the site keys as they are now.
    ///
    /// # Errors
    /// Encryption is wanted, and there is no site key.
    pub(in crate::receive) fn follow_encryption(&self) -> Result<(), TargetError> {
        let (inner, site) = (self.lock(), self.keys.site());
        let wanted = inner.manifest.vpg.encrypt;
        self.may_encrypt(&inner.manifest.vpg)?;
        if let Some(vm) = inner.key {
            self.worker.tell(Input::SetEncryption { vm, wanted, site });
        }
        Ok(())
    }
}

/// Length of a slot of the journal, in bytes.
fn slot_bytes(inner: &Inner) -> u64 {
    inner.status.lock().unwrap_or_else(PoisonError::into_inner).slot_bytes
}
