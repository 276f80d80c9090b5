//! How a VM's files come to be: all of them, or recovery disks beside those that there are. Nothing of it counts before its last step, and what
//! isn't brought there is removed again.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::statvfs::statvfs;

use super::{
    FILE_MODE, FOLDER_MODE, FolderError, UNFINISHED_JOURNAL_FILE, VmFolder, remove_file, sync_folder,
};
use crate::wire::MAX_VOLUMES;

/// Recovery disks are this long or a little longer, in whole pages, since all their I/O is direct.
const DISK_UNIT_BYTES: u64 = 4096;

/// A recovery disk that is to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewDisk {
    /// Its size, in bytes.
    pub size_bytes: u64,
    /// Nothing is ever written to it: it takes no space.
    pub stays_empty: bool,
}

impl NewDisk {
    /// What it takes of the datastore, in bytes.
    fn needed_bytes(&self) -> u64 {
        if self.stays_empty { 0 } else { self.size_bytes.next_multiple_of(DISK_UNIT_BYTES) }
    }
}

impl VmFolder {
    /// Begins to make the VM's files in `datastore`: folder, recovery disks, with their space reserved. The journal is then to be made at
    /// [`Unfinished::journal`].
    ///
    /// # Errors
    /// What is missing, and what to do about it. What was made is gone again, as far as the datastore lets it.
    pub fn make(
        &self,
        datastore: &Path,
        disks: &[NewDisk],
        journal_bytes: u64,
    ) -> Result<Unfinished, FolderError> {
        self.check_space(datastore, disks, journal_bytes)?;
        let mut made =
            Unfinished { folder: self.clone(), disks: Vec::new(), reserved: true, finished: false };
        fs::DirBuilder::new()
            .recursive(true)
            .mode(FOLDER_MODE)
            .create(&self.path)
            .map_err(|error| self.explain("creating", &self.path, error))?;
        self.clear_unfinished()?;
        let marker = self.path.join(UNFINISHED_JOURNAL_FILE);
        let create = || OpenOptions::new().write(true).create_new(true).mode(FILE_MODE).open(&marker);
        create().map_err(|error| self.explain("creating", &marker, error))?;
        sync_folder(&self.path).map_err(|error| self.explain("syncing", &self.path, error))?;
        for (volume, disk) in (0..).zip(disks) {
            let path = self.disk(volume);
            made.disks.push(path.clone());
            made.reserved &= self.make_disk(&path, *disk)?;
        }
        if !made.reserved {
            self.warn_of_sparse_disks();
        }
        Ok(made)
    }

    /// Makes recovery disks for a VM that has others, from number `first` on, with their space reserved; durable when this returns. No journal
    /// has them yet: what an attempt that was cut short has left of them is replaced.
    ///
    /// # Errors
    /// As for [`VmFolder::make`].
    pub fn add_disks(
        &self,
        datastore: &Path,
        first: u16,
        disks: &[NewDisk],
    ) -> Result<AddedDisks, FolderError> {
        let paths: Vec<PathBuf> = (first..).zip(disks).map(|(volume, _)| self.disk(volume)).collect();
        for path in &paths {
            remove_file(path).map_err(|error| self.explain("removing", path, error))?;
        }
        self.check_space(datastore, disks, 0)?;
        let mut added = AddedDisks { paths: Vec::new(), reserved: true, kept: false };
        for (path, disk) in paths.into_iter().zip(disks) {
            added.paths.push(path.clone());
            added.reserved &= self.make_disk(&path, *disk)?;
        }
        sync_folder(&self.path).map_err(|error| self.explain("syncing", &self.path, error))?;
        if !added.reserved {
            self.warn_of_sparse_disks();
        }
        Ok(added)
    }

    /// Makes recovery disks longer, to these sizes in bytes, with the space reserved; durable when this returns. Where they are as long already
    /// nothing changes.
    ///
    /// # Errors
    /// As for [`VmFolder::make`]; they are as they were then.
    pub fn grow_disks(&self, datastore: &Path, sizes: &[(u16, u64)]) -> Result<GrownDisks, FolderError> {
        let mut grown = GrownDisks { disks: Vec::new(), kept: false };
        let mut wanted = Vec::new();
        for &(volume, size_bytes) in sizes {
            let path = self.disk(volume);
            let open = OpenOptions::new().write(true).open(&path);
            let opened = open.and_then(|file| Ok((file.metadata()?.len(), file)));
            let (old_bytes, file) = opened.map_err(|error| self.explain("opening", &path, error))?;
            let new_bytes = size_bytes.next_multiple_of(DISK_UNIT_BYTES);
            if new_bytes > old_bytes {
                let more = NewDisk { size_bytes: new_bytes - old_bytes, stays_empty: false };
                wanted.push((path, file, old_bytes, more));
            }
        }
        let more: Vec<NewDisk> = wanted.iter().map(|(_, _, _, more)| *more).collect();
        self.check_space(datastore, &more, 0)?;
        for (path, file, old_bytes, more) in wanted {
            grown.disks.push((path.clone(), old_bytes));
            grow_disk(&file, old_bytes, more.size_bytes)
                .map_err(|error| self.explain("growing", &path, error))?;
        }
        Ok(grown)
    }

    /// Removes recovery disks from number `count` on, which the VM's journal doesn't have: a process that died while they joined left them.
    pub(in crate::receive) fn remove_surplus_disks(&self, count: usize) {
        for path in (count..MAX_VOLUMES).filter_map(|number| Some(self.disk(u16::try_from(number).ok()?))) {
            match fs::remove_file(&path) {
                Ok(()) => {
                    tracing::info!(path = %path.display(), "removed a recovery disk that never joined its VM");
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "a recovery disk that never joined its VM can't be removed");
                }
            }
        }
    }

    /// Makes a disk that reads zeroes. Says whether the space that it needs is reserved.
    fn make_disk(&self, path: &Path, disk: NewDisk) -> Result<bool, FolderError> {
        let len_bytes = disk.size_bytes.next_multiple_of(DISK_UNIT_BYTES);
        make_disk(path, len_bytes, disk.needed_bytes()).map_err(|error| self.explain("creating", path, error))
    }

    fn warn_of_sparse_disks(&self) {
        tracing::warn!(
            folder = %self.path.display(),
            "the datastore's filesystem can't reserve space: the recovery disks are sparse, and can run out of it"
        );
    }

    /// Whether the datastore has room for such disks and a journal.
    ///
    /// # Errors
    /// It hasn't, or can't be looked at.
    pub(in crate::receive) fn check_space(
        &self,
        datastore: &Path,
        disks: &[NewDisk],
        journal_bytes: u64,
    ) -> Result<(), FolderError> {
        let space =
            statvfs(datastore).map_err(|errno| self.explain("looking at", datastore, errno.into()))?;
        // Unsigned long is 64 bits wide on every host that Holdfast runs on, but not by its type.
        #[allow(clippy::useless_conversion, reason = "see above")]
        let free_bytes = u64::from(space.blocks_available()) * u64::from(space.fragment_size());
        let needed_bytes =
            disks.iter().fold(journal_bytes, |sum, disk| sum.saturating_add(disk.needed_bytes()));
        if needed_bytes > free_bytes {
            return Err(FolderError::NoSpace { path: datastore.into(), free_bytes, needed_bytes });
        }
        Ok(())
    }

    /// Removes what a making that was cut short has left.
    fn clear_unfinished(&self) -> Result<(), FolderError> {
        let unfinished = self.path.join(UNFINISHED_JOURNAL_FILE);
        let disks = (0..MAX_VOLUMES as u16).map(|volume| self.disk(volume));
        let mut disks: Vec<PathBuf> = disks.filter(|path| path.exists()).collect();
        if !disks.is_empty() && !unfinished.exists() {
            return Err(FolderError::OrphanDisks { path: self.path.clone() });
        }
        disks.push(unfinished);
        for path in disks {
            remove_file(&path).map_err(|error| self.explain("removing", &path, error))?;
        }
        Ok(())
    }
}

/// Files that are being made: removed again when dropped before [`Unfinished::finish`].
#[derive(Debug)]
pub struct Unfinished {
    folder: VmFolder,
    disks: Vec<PathBuf>,
    reserved: bool,
    finished: bool,
}

impl Unfinished {
    /// Where the journal is to be made. An empty file is there.
    pub fn journal(&self) -> PathBuf {
        self.folder.path.join(UNFINISHED_JOURNAL_FILE)
    }

    /// Whether the disks' space is reserved.
    pub fn is_reserved(&self) -> bool {
        self.reserved
    }

    /// Gives the journal, which must be durable, its name: from now on the files are the VM's.
    ///
    /// # Errors
    /// The datastore's.
    pub fn finish(mut self) -> Result<(), FolderError> {
        let folder = &self.folder;
        let rename = fs::rename(self.journal(), folder.journal()).and_then(|()| sync_folder(&folder.path));
        rename.map_err(|error| folder.explain("renaming", &folder.journal(), error))?;
        if let Some(parent) = folder.path.parent() {
            sync_folder(parent).map_err(|error| folder.explain("syncing", parent, error))?;
        }
        self.finished = true;
        Ok(())
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        // As far as the datastore lets it: what stays is cleared by the next attempt.
        for path in self.disks.iter().chain([&self.journal()]) {
            let _ = fs::remove_file(path);
        }
        if fs::remove_dir(&self.folder.path).is_ok()
            && let Some(parent) = self.folder.path.parent()
        {
            let _ = fs::remove_dir(parent);
        }
    }
}

/// Recovery disks that no journal has yet: removed again when dropped before [`AddedDisks::keep`].
#[derive(Debug)]
pub struct AddedDisks {
    paths: Vec<PathBuf>,
    reserved: bool,
    kept: bool,
}

impl AddedDisks {
    /// Whether their space is reserved.
    pub fn is_reserved(&self) -> bool {
        self.reserved
    }

    /// The journal may have them from now on: they stay.
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for AddedDisks {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        // As far as the datastore lets it: what stays is replaced by the next attempt, or removed at the next opening.
        for path in &self.paths {
            let _ = fs::remove_file(path);
        }
    }
}

/// Recovery disks that are longer than their journal knows yet: cut again when dropped before [`GrownDisks::keep`].
#[derive(Debug)]
pub struct GrownDisks {
    /// Each with its former length, in bytes.
    disks: Vec<(PathBuf, u64)>,
    kept: bool,
}

impl GrownDisks {
    /// The journal may know of their sizes from now on: they stay.
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for GrownDisks {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        for (path, old_bytes) in &self.disks {
            let cut = OpenOptions::new().write(true).open(path).and_then(|file| file.set_len(*old_bytes));
            // A longer one does no harm: its next growth takes what is there.
            if let Err(error) = cut {
                tracing::warn!(path = %path.display(), %error, "a recovery disk that should have grown can't be cut again");
            }
        }
    }
}

/// Makes a file longer; what is new reads zeroes. Its space is reserved where the filesystem can do that.
fn grow_disk(file: &File, old_bytes: u64, more_bytes: u64) -> io::Result<()> {
    let (offset, len) = (i64::try_from(old_bytes), i64::try_from(more_bytes));
    let (Ok(offset), Ok(len)) = (offset, len) else { return Err(io::ErrorKind::FileTooLarge.into()) };
    match fallocate(file, FallocateFlags::empty(), offset, len) {
        Ok(()) => {}
        Err(nix::errno::Errno::EOPNOTSUPP) => file.set_len(old_bytes + more_bytes)?,
        Err(errno) => return Err(errno.into()),
    }
    file.sync_all()
}

/// Makes a file that reads zeroes, with space for its first `reserved_bytes`. Says whether that is reserved.
fn make_disk(path: &Path, len_bytes: u64, reserved_bytes: u64) -> io::Result<bool> {
    let file = OpenOptions::new().write(true).create_new(true).mode(FILE_MODE).open(path)?;
    let reserved_len = i64::try_from(reserved_bytes).map_err(|_| io::ErrorKind::FileTooLarge)?;
    let reserve = || fallocate(&file, FallocateFlags::empty(), 0, reserved_len);
    let reserved = match if reserved_len == 0 { Ok(()) } else { reserve() } {
        Ok(()) => true,
        Err(nix::errno::Errno::EOPNOTSUPP) => false,
        Err(errno) => return Err(errno.into()),
    };
    file.set_len(len_bytes)?;
    file.sync_all()?;
    Ok(reserved)
}
