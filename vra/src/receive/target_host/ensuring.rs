//! Makes this VRA the target of VMs: what that takes is reserved for all VMs of a definition before any of them follows it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use journal::crypt::Keys;

use super::{TargetHost, TargetVm, find_folder, journal_id_in};
use crate::api::{VmId, VpgDefinition, vpg::VmDefinition};
use crate::receive::files::{self, VmFiles};
use crate::receive::folder::{AddedDisks, GrownDisks, Unfinished, VmFolder};
use crate::receive::redefinition::{Present, Wanted, definition_in};
use crate::receive::target_error::TargetError;
use crate::receive::target_vm::HostParts;
use crate::receive::worker::VmKey;

/// What a definition takes for one VM, reserved; given back when dropped.
#[derive(Debug)]
pub struct Prepared {
    vm: VmId,
    files: NewFiles,
}

impl Prepared {
    /// Whose.
    pub fn vm(&self) -> VmId {
        self.vm
    }
}

#[derive(Debug, Default)]
enum NewFiles {
    /// None, or it isn't known yet.
    #[default]
    None,
    /// All that a VM has.
    All(Unfinished),
    /// Recovery disks of the volumes that join or grow, as far as there are any.
    Disks(Option<AddedDisks>, Option<GrownDisks>),
}

impl TargetHost {
    /// Does all that can fail of making this VRA a VM's target as a definition says, and leaves everything as it is: checks the definition
    /// against the VM's files, and reserves what it takes. With `awaits_former` the files of a former journal of the VM are still to go: then
    /// it is only looked whether there is room for new ones.
    ///
    /// # Errors
    /// What is wrong with the definition, the datastore or the files.
    pub async fn prepare(
        &self,
        vpg: &VpgDefinition,
        vm: VmId,
        awaits_former: bool,
    ) -> Result<Prepared, TargetError> {
        let _changing = self.changing.lock().await;
        let definition = definition_in(vpg, vm)?.clone();
        let (vpg, keys) = (vpg.clone(), self.keys.keys());
        let is_of_former = |journal| awaits_former && journal != definition.journal;
        if let Some(target) = self.vm(vm).filter(|target| !is_of_former(target.journal())) {
            let wanted = target.check_definition(&vpg)?;
            let folder = target.folder().clone();
            let files = blocking(move || make_disks(&folder, &definition, &wanted)).await?;
            return Ok(Prepared { vm, files });
        }
        let folder = folder_of(&vpg, &definition);
        if awaits_former && journal_id_in(&folder) != Some(definition.journal) {
            blocking(move || files::check_new(&folder, &vpg, &definition, &keys)).await?;
            return Ok(Prepared { vm, files: NewFiles::None });
        }
        let files = blocking(move || {
            if !folder.is_complete() {
                return files::make(&folder, &vpg, &definition, &keys).map(NewFiles::All);
            }
            let opened = files::open(&folder, vm, None, keys)?;
            let wanted = check_files(&folder, &opened, &vpg)?;
            drop(opened);
            make_disks(&folder, &definition, &wanted)
        });
        Ok(Prepared { vm, files: files.await? })
    }

    /// Makes this VRA the target of a VM, as its group's definition says, with what was prepared for that.
    ///
    /// # Errors
    /// The datastore's or the kernel's: it can be tried again with [`TargetHost::ensure`].
    pub async fn take(&self, vpg: &VpgDefinition, prepared: Prepared) -> Result<Arc<TargetVm>, TargetError> {
        self.ensure_with(vpg, prepared.vm, prepared.files).await
    }

    /// Makes this VRA the target of a VM, as its group's definition says: makes its files, or opens those that are there. Doing it again with
    /// a newer definition takes that over.
    ///
    /// # Errors
    /// What is wrong with the definition, the datastore or the files.
    pub async fn ensure(&self, vpg: &VpgDefinition, vm: VmId) -> Result<Arc<TargetVm>, TargetError> {
        self.ensure_with(vpg, vm, NewFiles::None).await
    }

    async fn ensure_with(
        &self,
        vpg: &VpgDefinition,
        vm: VmId,
        new: NewFiles,
    ) -> Result<Arc<TargetVm>, TargetError> {
        let _changing = self.changing.lock().await;
        if let Some(target) = self.vm(vm) {
            // What can't be done as a whole isn't begun.
            let wanted = target.check_definition(vpg)?;
            if wanted.added.is_empty() {
                // Most definitions touch no storage, which may hang.
                if !wanted.grown.is_empty() {
                    let (folder, definition) = (target.folder().clone(), definition_in(vpg, vm)?.clone());
                    blocking(move || grow(&folder, &definition, &wanted, new)).await?;
                }
                target.redefine(vpg)?;
                target.follow_encryption()?;
                return Ok(target);
            }
            self.lock().remove(&vm);
            target.close().await;
        }
        let definition = definition_in(vpg, vm)?;
        let folder = folder_of(vpg, definition);
        let (making, owned, wanted) = (folder.clone(), vpg.clone(), definition.clone());
        let keys = self.keys.keys();
        let opened = blocking(move || open(&making, &owned, &wanted, new, keys)).await?;
        let awaited = self.lock_awaited().remove(&vm).unwrap_or_default();
        let counter = self.next_key.clone();
        let next_key = Box::new(move || VmKey(counter.fetch_add(1, Ordering::Relaxed)));
        let target = TargetVm::attach(
            folder,
            opened,
            self.next_worker().clone(),
            HostParts {
                settings: self.settings,
                keys: self.keys.clone(),
                view_memory: Arc::clone(&self.view_memory),
            },
            awaited.clone(),
            next_key,
        );
        self.lock().insert(vm, target.clone());
        if let Err(error) = target.redefine(vpg).and_then(|()| target.follow_encryption()) {
            self.lock().remove(&vm);
            target.close().await;
            self.lock_awaited().insert(vm, awaited);
            return Err(error);
        }
        Ok(target)
    }
}

/// Makes a VM's files if there are none, opens them, and gives them the volumes that the definition has and they don't.
fn open(
    folder: &VmFolder,
    vpg: &VpgDefinition,
    definition: &VmDefinition,
    new: NewFiles,
    keys: Keys,
) -> Result<VmFiles, TargetError> {
    let (mut added, mut grown) = (None, None);
    match new {
        NewFiles::All(made) => made.finish()?,
        NewFiles::None if !folder.is_complete() => {
            files::make(folder, vpg, definition, &keys)?.finish()?;
        }
        NewFiles::None => {}
        NewFiles::Disks(made, longer) => (added, grown) = (made, longer),
    }
    let opened = files::open(folder, definition.id, None, keys.clone())?;
    if added.is_none() {
        folder.remove_surplus_disks(opened.identity.volumes.len());
    }
    let wanted = check_files(folder, &opened, vpg)?;
    grow(folder, definition, &wanted, NewFiles::Disks(None, grown))?;
    if wanted.added.is_empty() {
        return Ok(opened);
    }
    files::add_volumes(folder, vpg, definition, opened, added, keys)
}

/// What a definition needs that a VM's files don't have.
fn check_files(folder: &VmFolder, files: &VmFiles, vpg: &VpgDefinition) -> Result<Wanted, TargetError> {
    let superblock = &files.opened.superblock;
    let bases: Vec<u64> = superblock.volumes.iter().map(|volume| volume.base_seq).collect();
    let present = Present {
        manifest: &files.manifest,
        identity: &files.identity,
        bases: &bases,
        slot_bytes: superblock.slot_len_bytes,
        journal: folder.journal(),
    };
    present.check(vpg)
}

/// Makes recovery disks of volumes that join, and longer ones of those that grow.
fn make_disks(
    folder: &VmFolder,
    definition: &VmDefinition,
    wanted: &Wanted,
) -> Result<NewFiles, TargetError> {
    let datastore = &definition.datastore;
    let added = match wanted.added.first() {
        Some(first) => Some(folder.add_disks(datastore, first.volume, &files::new_disks(&wanted.added))?),
        None => None,
    };
    let grown = match wanted.grown.is_empty() {
        true => None,
        false => Some(folder.grow_disks(datastore, &sizes(wanted))?),
    };
    Ok(NewFiles::Disks(added, grown))
}

/// Has the recovery disks of volumes that grow as long as they will be, whether or not that was prepared: the journal may know of it then.
fn grow(
    folder: &VmFolder,
    definition: &VmDefinition,
    wanted: &Wanted,
    made: NewFiles,
) -> Result<(), TargetError> {
    match made {
        _ if wanted.grown.is_empty() => {}
        NewFiles::Disks(_, Some(grown)) => grown.keep(),
        _ => folder.grow_disks(&definition.datastore, &sizes(wanted))?.keep(),
    }
    Ok(())
}

fn sizes(wanted: &Wanted) -> Vec<(u16, u64)> {
    wanted.grown.iter().map(|volume| (volume.volume, volume.size_bytes)).collect()
}

/// Where a VM's files are, or are to be.
fn folder_of(vpg: &VpgDefinition, definition: &VmDefinition) -> VmFolder {
    let standard =
        || VmFolder::of(&definition.datastore, (&vpg.name, vpg.id), (&definition.name, definition.id));
    find_folder(&definition.datastore, vpg.id, definition.id).unwrap_or_else(standard)
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, TargetError> + Send + 'static,
) -> Result<T, TargetError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(files::host("opening the files", std::io::Error::other(error))))
}
