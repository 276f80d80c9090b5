//! An image being written: under another name until it is complete.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, Flock, FlockArg, RenameFlags, renameat2};
use nix::sys::statvfs::statvfs;

use super::text;
use crate::receive::VmFolder;

/// Zeroes of at least this length become a hole, in bytes.
pub(super) const HOLE_BYTES: u64 = 64 << 10;

/// An image. Until it has its name it goes when this is dropped.
#[derive(Debug)]
pub(super) struct Image {
    /// Locked, so that nobody else writes it.
    file: Flock<File>,
    partial: PathBuf,
    path: PathBuf,
    force: bool,
    name: Name,
}

/// Whether an image has its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Name {
    /// Not yet.
    Partial,
    /// It has, and nothing had it before.
    New,
    /// It has, and what had it before lies where the image was until then.
    Exchanged,
    /// It has, and what had it before is gone: not every filesystem can exchange two names.
    Replaced,
}

impl Image {
    /// An empty one that will be `path`.
    pub(super) fn create(path: &Path, force: bool) -> anyhow::Result<Self> {
        check_free(path, force)?;
        let mut name = path.file_name().context("an image needs a file's name")?.to_owned();
        name.push(".partial");
        // qemu-img takes what stands before a colon for a protocol, unless the path begins with a slash.
        let path = std::path::absolute(path)?;
        let partial = path.with_file_name(name);
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&partial)
            .with_context(|| format!("cannot create {}", partial.display()))?;
        let busy =
            || format!("another vra-journal is writing {}; choose another name, or wait", partial.display());
        let file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(file) => file,
            Err((_, Errno::EWOULDBLOCK)) => bail!(busy()),
            Err((_, errno)) => {
                return Err(errno).with_context(|| format!("cannot lock {}", partial.display()));
            }
        };
        let is_still_its_name = std::fs::metadata(&partial)
            .and_then(|named| Ok(file.metadata()?.ino() == named.ino()))
            .unwrap_or(false);
        if !is_still_its_name {
            bail!(busy());
        }
        let image = Self { file, partial, path, force, name: Name::Partial };
        // Something is left of one that was killed.
        image.set_len(0)?;
        Ok(image)
    }

    /// Where it is until it is complete.
    pub(super) fn partial(&self) -> &Path {
        &self.partial
    }

    /// Where it will be.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes it this long, in bytes; new bytes are a hole.
    pub(super) fn set_len(&self, size_bytes: u64) -> anyhow::Result<()> {
        self.file.set_len(size_bytes).with_context(|| {
            format!("{} cannot become {} long", self.partial.display(), text::bytes(size_bytes))
        })
    }

    /// Writes all but long runs of zeroes; how much that was, in bytes.
    pub(super) fn write(&self, offset_bytes: u64, bytes: &[u8]) -> anyhow::Result<u64> {
        let mut written = 0;
        for (number, block) in (0..).zip(bytes.chunks(HOLE_BYTES as usize)) {
            if block.iter().all(|byte| *byte == 0) {
                continue;
            }
            self.file
                .write_all_at(block, offset_bytes + number * HOLE_BYTES)
                .with_context(|| format!("cannot write {}", self.partial.display()))?;
            written += block.len() as u64;
        }
        Ok(written)
    }

    /// Makes it durable.
    pub(super) fn sync(&self) -> anyhow::Result<()> {
        self.file.sync_all().with_context(|| format!("cannot write {}", self.partial.display()))
    }

    /// Gives it its name.
    pub(super) fn publish(&mut self) -> anyhow::Result<()> {
        let (partial, path) = (&self.partial, &self.path);
        let rename = |flags| renameat2(AT_FDCWD, partial, AT_FDCWD, path, flags);
        let is_unknown = |errno| matches!(errno, Errno::EINVAL | Errno::ENOSYS);
        let renamed = match self.force {
            true => match rename(RenameFlags::RENAME_EXCHANGE) {
                Ok(()) => Ok(Name::Exchanged),
                Err(Errno::ENOENT) => rename(RenameFlags::empty()).map(|()| Name::New),
                Err(errno) if is_unknown(errno) => {
                    let is_new = !path.exists();
                    let name = if is_new { Name::New } else { Name::Replaced };
                    rename(RenameFlags::empty()).map(|()| name)
                }
                Err(errno) => Err(errno),
            },
            false => match rename(RenameFlags::RENAME_NOREPLACE) {
                // Not every filesystem knows how to leave a file of that name alone.
                Err(errno) if is_unknown(errno) => {
                    check_free(path, false)?;
                    rename(RenameFlags::empty()).map(|()| Name::New)
                }
                renamed => renamed.map(|()| Name::New),
            },
        };
        self.name =
            renamed.with_context(|| format!("cannot rename {} to {}", partial.display(), path.display()))?;
        let folder = path.parent().unwrap_or(Path::new("/"));
        File::open(folder)
            .and_then(|folder| folder.sync_all())
            .with_context(|| format!("cannot make the name {} durable", path.display()))
    }

    /// Takes its name back, since others of its set could not get theirs: what had the name before has it again, unless it is gone.
    pub(super) fn withdraw(&mut self) {
        match self.name {
            Name::New => _ = std::fs::remove_file(&self.path),
            Name::Exchanged => {
                let flags = RenameFlags::RENAME_EXCHANGE;
                if renameat2(AT_FDCWD, &self.partial, AT_FDCWD, &self.path, flags).is_ok() {
                    self.name = Name::Partial;
                }
            }
            Name::Partial | Name::Replaced => {}
        }
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // What is there is the image itself, or what it replaced.
        if matches!(self.name, Name::Partial | Name::Exchanged) {
            let _ = std::fs::remove_file(&self.partial);
        }
    }
}

pub(super) fn check_free(path: &Path, force: bool) -> anyhow::Result<()> {
    if VmFolder::has_file(path) {
        bail!(
            "{} is a file of the VM whose journal is in that folder, and nothing brings it back; choose another name, or another folder",
            path.display()
        );
    }
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.is_file() => bail!(
            "{} is not a regular file; use `vra-journal serve` with nbdcopy or qemu-img for other targets",
            path.display()
        ),
        Ok(_) if !force => {
            bail!("{} exists; choose another name, or --force to replace it", path.display())
        }
        _ => Ok(()),
    }
}

/// Refuses if a folder's filesystem hasn't this much free, in bytes.
pub(super) fn check_space(folder: &Path, needed_bytes: u64) -> anyhow::Result<()> {
    let space = statvfs(folder).with_context(|| format!("cannot look at {}", folder.display()))?;
    // Unsigned long is 64 bits wide on every host that Holdfast runs on, but not by its type.
    #[allow(clippy::useless_conversion, reason = "see above")]
    let free_bytes = u64::from(space.blocks_available()).saturating_mul(u64::from(space.fragment_size()));
    if free_bytes < needed_bytes {
        bail!(
            "{} has {} free, up to {} are needed: free space, choose another place, or --no-space-check if what is zeroes or \
             compressed there makes it fit",
            folder.display(),
            text::bytes(free_bytes),
            text::bytes(needed_bytes)
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("holdfast-image-{name}-{}.img", std::process::id()));
        let _ = std::fs::remove_file(&path);
        path
    }

    #[test]
    fn what_came_meanwhile_is_not_replaced() {
        let path = place("meanwhile");
        let mut image = Image::create(&path, false).expect("free");
        image.write(0, &[1; 512]).expect("space");
        std::fs::write(&path, "precious").expect("written");
        let error = format!("{:#}", image.publish().expect_err("taken"));
        assert!(error.contains(&path.display().to_string()), "{error}");
        let partial = image.partial().to_owned();
        drop(image);
        assert!(!partial.exists());
        assert_eq!(std::fs::read(&path).expect("there"), b"precious");
        std::fs::remove_file(path).expect("removed");
    }

    #[test]
    fn what_was_replaced_comes_back_when_the_set_fails() {
        let (path, new) = (place("replaced"), place("not-replaced"));
        std::fs::write(&path, "precious").expect("written");
        let mut images = [&path, &new].map(|path| Image::create(path, true).expect("forced"));
        for image in &mut images {
            image.write(0, &[1; 512]).expect("space");
            image.publish().expect("named");
        }
        assert_eq!(
            [&path, &new].map(|path| std::fs::read(path).expect("there")),
            [vec![1; 512], vec![1; 512]]
        );
        images.iter_mut().for_each(Image::withdraw);
        let partials = images.each_ref().map(|image| image.partial().to_owned());
        drop(images);
        assert_eq!(std::fs::read(&path).expect("there"), b"precious");
        assert!(!new.exists() && partials.iter().all(|partial| !partial.exists()));

        let mut image = Image::create(&path, true).expect("forced");
        image.write(0, &[2; 512]).expect("space");
        image.publish().expect("named");
        drop(image);
        assert_eq!(std::fs::read(&path).expect("there"), [2; 512]);
        assert!(!partials[0].exists(), "what was replaced is left");
        std::fs::remove_file(path).expect("removed");
    }

    #[test]
    fn one_image_has_one_writer_and_takes_over_what_a_dead_one_left() {
        let path = place("writers");
        let image = Image::create(&path, false).expect("free");
        let error = Image::create(&path, false).expect_err("taken").to_string();
        assert!(error.contains("another vra-journal"), "{error}");
        image.write(8192, &[1; 4096]).expect("space");
        let partial = image.partial().to_owned();
        // As after a kill: the file stays, the lock doesn't.
        let stays = partial.with_extension("stays");
        std::fs::hard_link(&partial, &stays).expect("linked");
        drop(image);
        std::fs::rename(&stays, &partial).expect("back");
        let mut image = Image::create(&path, false).expect("taken over");
        image.set_len(4096).expect("short");
        image.publish().expect("named");
        assert_eq!(std::fs::read(&path).expect("there"), [0; 4096]);
        std::fs::remove_file(path).expect("removed");
    }

    #[test]
    fn too_little_space_is_told_with_numbers() {
        let folder = std::env::temp_dir();
        check_space(&folder, 0).expect("always");
        let error = check_space(&folder, u64::MAX).expect_err("never").to_string();
        assert!(error.contains(&folder.display().to_string()) && error.contains("are needed"), "{error}");
    }
}
