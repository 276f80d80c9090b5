//! VMs that were taken out of their groups: their files go, or are set aside.

use super::{TargetHost, TargetVm, journal_id_in, own_folders};
use crate::api::{FormerVm, VpgId};
use crate::receive::files;
use crate::receive::folder::VmFolder;
use crate::receive::target_error::TargetError;

/// What became of a former VM's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FormerFiles {
    /// They are removed.
    Removed,
    /// They are set aside, so that the VM may get a new journal.
    Kept,
    /// There are none.
    None,
}

impl TargetHost {
    /// Whether the journal that a former VM had is open.
    pub fn has_open(&self, former: &FormerVm) -> bool {
        self.open_former(former).is_some()
    }

    /// Ends this VRA's part as target of a VM that was taken out of its group, of which name and id are given. What was done already is done again without harm, also when it
    /// was cut short.
    ///
    /// # Errors
    /// Views of it are open, or the datastore's.
    pub async fn let_go(&self, vpg: (&str, VpgId), former: &FormerVm) -> Result<FormerFiles, TargetError> {
        let folder = match self.open_former(former) {
            Some(_) => Some(self.close(former.id).await?),
            None => self.folder_of_former(vpg, former),
        };
        let Some(folder) = folder else { return Ok(FormerFiles::None) };
        let (keep, journal) = (former.keep_files, former.journal);
        let ended = tokio::task::spawn_blocking(move || match keep {
            true => folder.set_aside(&journal.short()).map(|()| FormerFiles::Kept),
            false => folder.remove().map(|()| FormerFiles::Removed),
        });
        let ended = ended
            .await
            .map_err(|error| files::host("letting go of a VM's files", std::io::Error::other(error)))?;
        ended.map_err(TargetError::Folder)
    }

    fn open_former(&self, former: &FormerVm) -> Option<std::sync::Arc<TargetVm>> {
        self.vm(former.id).filter(|vm| vm.journal() == former.journal)
    }

    /// Its folder: where its journal is, or where a removal was cut short, which takes the journal first.
    fn folder_of_former(&self, vpg: (&str, VpgId), former: &FormerVm) -> Option<VmFolder> {
        let mut folders = own_folders(&former.datastore, vpg.1, former.id);
        let with_journal = folders.find(|folder| journal_id_in(folder) == Some(former.journal));
        let standard = VmFolder::of(&former.datastore, vpg, (&former.name, former.id));
        let is_cut_short = || {
            !former.keep_files
                && self.vm(former.id).is_none()
                && standard.path().is_dir()
                && !standard.is_complete()
        };
        with_journal.or_else(|| is_cut_short().then_some(standard.clone()))
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::api::{JournalId, VpgDefinition};
    use crate::receive::test_pair::{SETTINGS, definition};

    fn scratch(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("holdfast-former-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).expect("a scratch folder");
        path
    }

    fn group(vpg: &VpgDefinition) -> (&str, VpgId) {
        (&vpg.name, vpg.id)
    }

    fn former(vpg: &VpgDefinition, keep_files: bool) -> FormerVm {
        let vm = &vpg.vms[0];
        FormerVm {
            id: vm.id,
            name: vm.name.clone(),
            journal: vm.journal,
            target: vm.target.id,
            datastore: vm.datastore.clone(),
            keep_files,
            revision: 2,
        }
    }

    fn with_new_journal(vpg: &VpgDefinition) -> VpgDefinition {
        let mut vpg = vpg.clone();
        vpg.vms[0].journal = JournalId::random();
        vpg
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn files_go_once_and_those_of_a_later_journal_stay() {
        let datastore = scratch("go");
        let vpg = definition(&datastore, 2);
        let host = TargetHost::start(SETTINGS).expect("started");
        let vm = host.ensure(&vpg, vpg.vms[0].id).await.expect("made");
        let former = former(&vpg, false);
        let pin = vm.pin();
        let busy = host.let_go(group(&vpg), &former).await.expect_err("a view of it may be open");
        assert!(matches!(busy, TargetError::InUse { .. }), "{busy}");
        drop(pin);
        drop(vm);
        assert_eq!(host.let_go(group(&vpg), &former).await.expect("removed"), FormerFiles::Removed);
        assert_eq!(std::fs::read_dir(&datastore).expect("the datastore").count(), 0);
        assert_eq!(host.let_go(group(&vpg), &former).await.expect("again"), FormerFiles::None);
        // It came back: its new journal is not meant, open or not.
        let again = with_new_journal(&vpg);
        let vm = host.ensure(&again, again.vms[0].id).await.expect("made anew");
        assert_eq!(host.let_go(group(&again), &former).await.expect("not it"), FormerFiles::None);
        assert!(vm.folder().is_complete());
        let folder = host.close(again.vms[0].id).await.expect("closed");
        assert_eq!(host.let_go(group(&again), &former).await.expect("not it"), FormerFiles::None);
        assert!(folder.is_complete() && folder.disk(1).exists());
        std::fs::remove_dir_all(&datastore).expect("removed");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_vra_that_died_meanwhile_goes_on_where_it_was() {
        let datastore = scratch("died");
        let vpg = definition(&datastore, 2);
        let host = TargetHost::start(SETTINGS).expect("started");
        host.ensure(&vpg, vpg.vms[0].id).await.expect("made");
        let folder = host.close(vpg.vms[0].id).await.expect("closed");
        // It was closed, and the journal is gone, but not yet the disks.
        std::fs::remove_file(folder.journal()).expect("the journal");
        assert!(matches!(
            host.ensure(&vpg, vpg.vms[0].id).await,
            Err(TargetError::Folder(crate::receive::FolderError::OrphanDisks { .. }))
        ));
        let kept = FormerVm { keep_files: true, ..former(&vpg, true) };
        assert_eq!(host.let_go(group(&vpg), &kept).await.expect("nothing to set aside"), FormerFiles::None);
        assert!(folder.disk(0).exists());
        assert_eq!(
            host.let_go(group(&vpg), &former(&vpg, false)).await.expect("removed"),
            FormerFiles::Removed
        );
        assert_eq!(std::fs::read_dir(&datastore).expect("the datastore").count(), 0);
        std::fs::remove_dir_all(&datastore).expect("removed");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn files_that_are_kept_make_way_for_a_new_journal() {
        let datastore = scratch("kept");
        let mut vpg = definition(&datastore, 1);
        let host = TargetHost::start(SETTINGS).expect("started");
        let mut kept = Vec::new();
        for _ in 0..2 {
            let vm = host.ensure(&vpg, vpg.vms[0].id).await.expect("made");
            let folder = vm.folder().path().to_owned();
            drop(vm);
            let former = former(&vpg, true);
            assert_eq!(host.let_go(group(&vpg), &former).await.expect("kept"), FormerFiles::Kept);
            assert_eq!(host.let_go(group(&vpg), &former).await.expect("again"), FormerFiles::None);
            assert!(!folder.exists());
            let mut name = folder.file_name().expect("a name").to_owned();
            name.push(format!("-kept-{}", former.journal.short()));
            kept.push(VmFolder::at(folder.with_file_name(name)));
            vpg = with_new_journal(&vpg);
        }
        assert!(kept.iter().all(|folder| folder.is_complete() && folder.disk(0).exists()));
        host.ensure(&vpg, vpg.vms[0].id).await.expect("a third one");
        std::fs::remove_dir_all(&datastore).expect("removed");
    }
}
