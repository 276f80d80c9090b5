//! Memory of a map's words: shared with a file, so that it outlives the process, or the process's own.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use uuid::Uuid;

use super::format::PAGE_BYTES;

/// Begins a file of words: `HFSCRLIV`.
const MAGIC: u64 = u64::from_le_bytes(*b"HFSCRLIV");
/// Words before the map's own: magic, boot, file, count.
const HEAD_WORDS: usize = PAGE_BYTES / 8;

/// Words that are read and changed one by one. Zero at first.
///
/// A file's words are stored in place, without a system call: what was stored before the process died is there for the next one, in the
/// order in which it was stored. They are for the same run of the kernel only.
#[derive(Debug)]
pub(in crate::view) struct Words {
    base: NonNull<AtomicU64>,
    map_bytes: usize,
    first: usize,
    len: usize,
}

// SAFETY: the mapping is the value's own and lives as long; it is reached through atomics alone.
unsafe impl Send for Words {}
// SAFETY: as above.
unsafe impl Sync for Words {}

impl Words {
    /// `len` words of this process.
    pub(in crate::view) fn own(len: usize) -> io::Result<Self> {
        Self::map(None, 0, len)
    }

    /// The same, with `fill` as their content.
    pub(super) fn own_with(fill: &[u64]) -> io::Result<Self> {
        let words = Self::own(fill.len())?;
        for (word, value) in words.iter().zip(fill) {
            word.store(*value, Ordering::Relaxed);
        }
        Ok(words)
    }

    /// Makes a file of words, with `fill` as its content, where one of that name is replaced as a whole. Its memory is reserved.
    pub(super) fn create(path: &Path, boot: Uuid, file_id: Uuid, fill: &[u64]) -> io::Result<Self> {
        let mut fresh = path.as_os_str().to_owned();
        fresh.push(".new");
        let made = Self::create_at(Path::new(&fresh), boot, file_id, fill)
            .and_then(|words| std::fs::rename(&fresh, path).map(|()| words));
        made.inspect_err(|_| {
            let _ = std::fs::remove_file(&fresh);
        })
    }

    fn create_at(path: &Path, boot: Uuid, file_id: Uuid, fill: &[u64]) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(true).mode(0o600).open(path)?;
        let bytes = (HEAD_WORDS + fill.len()) * 8;
        // A page that can't be had later would end the process.
        match fallocate(&file, FallocateFlags::empty(), 0, bytes as i64) {
            Ok(()) => {}
            Err(Errno::EOPNOTSUPP) => file.write_all_at(&vec![0; bytes], 0)?,
            Err(errno) => return Err(errno.into()),
        }
        let words = Self::map(Some(&file), HEAD_WORDS, fill.len())?;
        for (index, word) in head(boot, file_id, fill.len()).into_iter().enumerate() {
            words.raw(index).store(word, Ordering::Relaxed);
        }
        for (word, value) in words.iter().zip(fill) {
            word.store(*value, Ordering::Relaxed);
        }
        Ok(words)
    }

    /// The words that an earlier process of this run of the kernel has left. None where there are none, or others.
    pub(super) fn open(path: &Path, boot: Uuid, file_id: Uuid, len: usize) -> io::Result<Option<Self>> {
        let file = match OpenOptions::new().read(true).write(true).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        if file.metadata()?.len() < ((HEAD_WORDS + len) * 8) as u64 {
            return Ok(None);
        }
        let words = Self::map(Some(&file), HEAD_WORDS, len)?;
        let expected = head(boot, file_id, len);
        let is_it = expected
            .into_iter()
            .enumerate()
            .all(|(index, word)| words.raw(index).load(Ordering::Relaxed) == word);
        Ok(is_it.then_some(words))
    }

    fn map(file: Option<&File>, first: usize, len: usize) -> io::Result<Self> {
        let map_bytes = (first + len).max(1) * 8;
        let (kind, descriptor) = match file {
            Some(file) => (libc::MAP_SHARED | libc::MAP_POPULATE, file.as_raw_fd()),
            None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1),
        };
        // SAFETY: a mapping with no address wish touches no existing memory.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                map_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                kind,
                descriptor,
                0,
            )
        };
        match NonNull::new(base.cast::<AtomicU64>()) {
            Some(base) if base.as_ptr().cast() != libc::MAP_FAILED => {
                Ok(Self { base, map_bytes, first, len })
            }
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn raw(&self, index: usize) -> &AtomicU64 {
        assert!(index < self.first + self.len, "inside the mapping");
        // SAFETY: inside the mapping, which is aligned to a page and lives as long as `self`.
        unsafe { self.base.add(index).as_ref() }
    }
}

impl Deref for Words {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: inside the mapping, which is aligned to a page and lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.base.add(self.first).as_ptr(), self.len) }
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: the mapping is the value's own, and nothing of it is borrowed any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.map_bytes) };
    }
}

/// The name of this run of the kernel; nil where it doesn't tell.
pub(super) fn this_boot() -> Uuid {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    text.trim().parse().unwrap_or_default()
}

fn head(boot: Uuid, file_id: Uuid, len: usize) -> [u64; 6] {
    let (boot, file_id) = (boot.as_u64_pair(), file_id.as_u64_pair());
    [MAGIC, boot.0, boot.1, file_id.0, file_id.1, len as u64]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_outlive_their_mapping_and_are_for_one_boot_and_file() {
        let path = std::env::temp_dir().join(format!("holdfast-words-{}", std::process::id()));
        let (boot, file) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let words = Words::create(&path, boot, file, &[0, 7, 0]).expect("made");
        words[2].store(9, Ordering::Release);
        drop(words);
        let again = Words::open(&path, boot, file, 3).expect("opened").expect("the same");
        let found: Vec<u64> = again.iter().map(|word| word.load(Ordering::Relaxed)).collect();
        assert_eq!(found, [0, 7, 9]);
        for (boot, file, len) in [(Uuid::nil(), file, 3), (boot, boot, 3), (boot, file, 2), (boot, file, 4)] {
            assert!(Words::open(&path, boot, file, len).expect("read").is_none(), "{boot} {file} {len}");
        }
        std::fs::remove_file(&path).expect("removed");
        assert!(Words::open(&path, boot, file, 3).expect("read").is_none());
    }
}
