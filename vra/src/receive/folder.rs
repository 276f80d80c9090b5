//! A VM's folder in a datastore: where its files are.

mod new_files;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::api::{ViewId, VmId, VpgId};

pub use new_files::{AddedDisks, GrownDisks, NewDisk, Unfinished};

/// Where a VM's files are. The journal's manifest says everything else, so the folder alone is enough for a recovery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmFolder {
    path: PathBuf,
}

/// Why a VM's files could not be made or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FolderError {
    /// The datastore isn't there.
    #[error("datastore {} is not there: create the folder, or mount what belongs there", path.display())]
    NoDatastore {
        /// The datastore.
        path: PathBuf,
    },
    /// The datastore takes no writes.
    #[error("datastore {} is read-only: remount it read-write, or name another datastore in the VPG", path.display())]
    ReadOnly {
        /// The datastore.
        path: PathBuf,
    },
    /// The process may not write there.
    #[error("no permission to write to {}: give it to the user that the VRA runs as", path.display())]
    Permission {
        /// The file or folder.
        path: PathBuf,
    },
    /// Too little space.
    #[error(
        "datastore {} has {} MiB free, {} MiB are needed: free space, lower the journal limit, or name another datastore in the VPG",
        path.display(), free_bytes >> 20, needed_bytes >> 20
    )]
    NoSpace {
        /// The datastore.
        path: PathBuf,
        /// What is free, in bytes.
        free_bytes: u64,
        /// What is needed, in bytes.
        needed_bytes: u64,
    },
    /// No space, though there seemed to be enough.
    #[error("datastore {} is full: free space, or name another datastore in the VPG", path.display())]
    Full {
        /// The datastore.
        path: PathBuf,
    },
    /// Recovery disks without their journal.
    #[error(
        "{} holds recovery disks but no journal: put {JOURNAL_FILE} back, or move the folder away to begin with a new journal",
        path.display()
    )]
    OrphanDisks {
        /// The folder.
        path: PathBuf,
    },
    /// Anything else that the operating system says.
    #[error("{operation} {} failed", path.display())]
    Io {
        /// What was being done.
        operation: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// Name of the journal's file.
pub const JOURNAL_FILE: &str = "journal.hfj";

/// Name of the journal's file while the VM's files are being made.
const UNFINISHED_JOURNAL_FILE: &str = "journal.hfj.new";

/// Mode of the VM's folder, and of its group's: what is in them are the VM's disks.
const FOLDER_MODE: u32 = 0o700;
/// Mode of the files in it.
const FILE_MODE: u32 = 0o600;

impl VmFolder {
    /// A VM's folder in a datastore.
    pub fn of(datastore: &Path, vpg: (&str, VpgId), vm: (&str, VmId)) -> Self {
        let vpg = format!("{}-{}", plain_name(vpg.0), vpg.1.short());
        let vm = format!("{}-{}", plain_name(vm.0), vm.1.short());
        Self { path: datastore.join(vpg).join(vm) }
    }

    /// The folder at a path.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The journal's file.
    pub fn journal(&self) -> PathBuf {
        self.path.join(JOURNAL_FILE)
    }

    /// The recovery disk of a volume.
    pub fn disk(&self, volume: u16) -> PathBuf {
        self.path.join(format!("disk-{volume}.raw"))
    }

    /// The scratch file of a volume in a view.
    pub fn scratch(&self, view: ViewId, volume: u16) -> PathBuf {
        self.path.join(format!("scratch-{view}-{volume}.raw"))
    }

    /// What was promoted past the locked checkpoint at a number, of a volume.
    pub fn overlay(&self, cut: u64, volume: u16) -> PathBuf {
        self.path.join(format!("lock-{cut}-{volume}.raw"))
    }

    /// The numbers of locked checkpoints that there are overlays of.
    ///
    /// # Errors
    /// The folder can't be read.
    pub fn overlay_cuts(&self) -> Result<BTreeSet<u64>, FolderError> {
        let explain = |error| self.explain("reading", &self.path, error);
        let mut cuts = BTreeSet::new();
        for entry in fs::read_dir(&self.path).map_err(explain)? {
            let name = entry.map_err(explain)?.file_name();
            let cut = name.to_str().and_then(|name| {
                let (cut, volume) = name.strip_prefix("lock-")?.strip_suffix(".raw")?.split_once('-')?;
                volume.parse::<u16>().ok()?;
                cut.parse::<u64>().ok()
            });
            cuts.extend(cut);
        }
        Ok(cuts)
    }

    /// Whether the VM's files were made completely: the journal gets its name last.
    pub fn is_complete(&self) -> bool {
        self.journal().exists()
    }

    /// Takes from others the right to read the VM's folder and files, which somebody may have copied here with the modes of elsewhere. What
    /// can't be changed is logged: the files can be used all the same.
    pub fn tighten(&self) {
        let entries = fs::read_dir(&self.path).into_iter().flatten().flatten();
        let own = entries.filter(|entry| is_own_name(&entry.file_name().to_string_lossy()));
        let files = own.map(|entry| (entry.path(), FILE_MODE));
        for (path, mode) in std::iter::once((self.path.clone(), FOLDER_MODE)).chain(files) {
            let tighten = || {
                let found = fs::symlink_metadata(&path)?;
                if found.file_type().is_symlink() || found.permissions().mode() & 0o077 == 0 {
                    return Ok(());
                }
                fs::set_permissions(&path, fs::Permissions::from_mode(mode))
            };
            if let Err(error) = tighten() {
                tracing::warn!(
                    path = %path.display(),
                    %error,
                    "others can read a VM's data here, and its mode can't be changed: do it by hand, folders 0700, files 0600"
                );
            }
        }
    }

    /// Whether a path names a file of the VM, there or not, whose journal is in its folder: whoever else writes it takes away what is kept there.
    pub fn has_file(path: &Path) -> bool {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        // Behind a symbolic link, too.
        let folder = path.parent().and_then(|folder| fs::canonicalize(folder.join(".")).ok());
        is_own_name(&name) && folder.is_some_and(|folder| folder.join(JOURNAL_FILE).exists())
    }

    /// Removes all files of the VM, and the folders that are empty then.
    ///
    /// # Errors
    /// The file that can't be removed.
    pub fn remove(&self) -> Result<(), FolderError> {
        let explain = |path: &Path, error| self.explain("removing", path, error);
        // The journal goes first: without it nobody takes the rest for a VM.
        remove_file(&self.journal()).map_err(|error| explain(&self.journal(), error))?;
        let entries = match fs::read_dir(&self.path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(explain(&self.path, error)),
        };
        for entry in entries {
            let entry = entry.map_err(|error| explain(&self.path, error))?;
            if is_own_name(&entry.file_name().to_string_lossy()) {
                remove_file(&entry.path()).map_err(|error| explain(&entry.path(), error))?;
            }
        }
        // Both stay when somebody else's files are in them.
        if fs::remove_dir(&self.path).is_ok()
            && let Some(parent) = self.path.parent()
        {
            let _ = fs::remove_dir(parent);
        }
        // A power cut doesn't bring back what nobody would remove a second time.
        let left = self.path.ancestors().find(|path| path.is_dir()).unwrap_or(&self.path);
        sync_folder(left).map_err(|error| self.explain("syncing", left, error))
    }

    /// Gives the folder, whose files must be closed, another name: they stay, and the VM can get new ones. `mark` tells it from others that
    /// were set aside.
    ///
    /// # Errors
    /// The datastore's.
    pub fn set_aside(&self, mark: &str) -> Result<(), FolderError> {
        let mut name = self.path.file_name().unwrap_or_default().to_owned();
        name.push(format!("-kept-{mark}"));
        let kept = self.path.with_file_name(name);
        fs::rename(&self.path, &kept).map_err(|error| self.explain("renaming", &self.path, error))?;
        let parent = kept.parent().unwrap_or(&kept);
        sync_folder(parent).map_err(|error| self.explain("syncing", parent, error))
    }

    fn explain(&self, operation: &'static str, path: &Path, source: io::Error) -> FolderError {
        let datastore = || self.path.ancestors().nth(2).unwrap_or(&self.path).to_owned();
        match source.kind() {
            io::ErrorKind::NotFound if operation == "looking at" => {
                FolderError::NoDatastore { path: path.into() }
            }
            io::ErrorKind::ReadOnlyFilesystem => FolderError::ReadOnly { path: datastore() },
            io::ErrorKind::PermissionDenied => FolderError::Permission { path: path.into() },
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                FolderError::Full { path: datastore() }
            }
            _ => FolderError::Io { operation, path: path.into(), source },
        }
    }
}

fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

fn is_own_name(name: &str) -> bool {
    name == JOURNAL_FILE
        || name == UNFINISHED_JOURNAL_FILE
        || name.ends_with(".raw") && ["disk-", "scratch-", "lock-"].iter().any(|kind| name.starts_with(kind))
}

/// A name as a part of a path: letters, digits and `._-` stay, at most 80 bytes, no dot in front.
fn plain_name(name: &str) -> String {
    let keep = |c: char| if c.is_alphanumeric() || "._-".contains(c) { c } else { '_' };
    let mut plain: String = name.chars().map(keep).collect();
    plain.truncate(plain.floor_char_boundary(80));
    if plain.starts_with('.') || plain.is_empty() {
        plain.insert(0, '_');
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("holdfast-folder-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).expect("a scratch folder");
        path
    }

    fn folder(datastore: &Path) -> VmFolder {
        VmFolder::of(datastore, ("web shop", VpgId::random()), ("../db 1", VmId::random()))
    }

    fn disk(size_bytes: u64) -> NewDisk {
        NewDisk { size_bytes, stays_empty: false }
    }

    #[test]
    fn a_folder_is_made_finished_and_removed() {
        let datastore = scratch("make");
        let folder = folder(&datastore);
        assert_eq!(folder.path().parent().and_then(Path::parent), Some(&*datastore), "names can't climb");
        let made = folder.make(&datastore, &[disk(1 << 20), disk(513 * 512)], 1 << 20).expect("made");
        assert!(!folder.is_complete());
        fs::write(made.journal(), b"journal").expect("the journal");
        made.finish().expect("finished");
        assert!(folder.is_complete());
        let mode = |path: &Path| fs::metadata(path).expect("it is there").permissions().mode() & 0o777;
        let assert_private = || {
            assert_eq!((mode(folder.path()), mode(&folder.journal())), (0o700, 0o600));
            assert_eq!(mode(&folder.disk(1)), 0o600);
        };
        assert_private();
        assert_eq!(mode(folder.path().parent().expect("the group's")), 0o700);
        for (path, mode) in [(folder.journal(), 0o644), (folder.disk(1), 0o664), (folder.path.clone(), 0o755)]
        {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("its mode");
        }
        folder.tighten();
        assert_private();
        assert_eq!(fs::metadata(folder.disk(1)).expect("disk 1").len(), 266_240, "whole pages");
        fs::write(folder.path().join("notes.txt"), b"mine").expect("a stranger's file");
        folder.remove().expect("removed");
        assert!(!folder.disk(0).exists() && !folder.is_complete());
        assert!(folder.path().join("notes.txt").exists());
        fs::remove_dir_all(&datastore).expect("cleaned");
    }

    #[test]
    fn a_making_that_fails_leaves_nothing_and_one_cut_short_is_made_again() {
        let datastore = scratch("again");
        let folder = folder(&datastore);
        drop(folder.make(&datastore, &[disk(1 << 20)], 0).expect("made"));
        assert_eq!(fs::read_dir(&datastore).expect("datastore").count(), 0);
        // The process ended before there was a disk.
        fs::create_dir_all(folder.path()).expect("the folder");
        fs::write(folder.path().join(UNFINISHED_JOURNAL_FILE), b"").expect("the marker");
        let cut_short = folder.make(&datastore, &[disk(1 << 20)], 0).expect("made");
        std::mem::forget(cut_short);
        folder.make(&datastore, &[disk(1 << 20)], 0).expect("made again").finish().expect("finished");
        fs::remove_dir_all(&datastore).expect("cleaned");
    }

    #[test]
    fn disks_without_their_journal_are_not_touched() {
        let datastore = scratch("orphan");
        let folder = folder(&datastore);
        folder.make(&datastore, &[disk(1 << 20)], 0).expect("made").finish().expect("finished");
        fs::remove_file(folder.journal()).expect("lost");
        let error = folder.make(&datastore, &[disk(1 << 20)], 0).expect_err("disks are there");
        assert!(matches!(&error, FolderError::OrphanDisks { path } if path == folder.path()), "{error}");
        assert!(folder.disk(0).exists());
        fs::remove_dir_all(&datastore).expect("cleaned");
    }

    #[test]
    fn what_is_missing_is_named_with_its_remedy() {
        let datastore = scratch("missing");
        let folder = folder(&datastore);
        let error = folder.make(&datastore.join("nowhere"), &[disk(1 << 20)], 0).expect_err("no datastore");
        assert!(error.to_string().contains("nowhere is not there: create"), "{error}");
        let error = folder.make(&datastore, &[disk(1 << 60)], 0).expect_err("no disk is that large");
        assert!(error.to_string().contains("MiB are needed: free space"), "{error}");
        assert_eq!(fs::read_dir(&datastore).expect("datastore").count(), 0);
        fs::remove_dir_all(&datastore).expect("cleaned");
    }
}
