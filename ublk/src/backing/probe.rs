//! What a file or device can do: its size, its block sizes, its cache, and whether it can zero ranges.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::backing::{BackingError, BackingKind};
use crate::serve::{Geometry, ZeroLimits};

/// The beginning of the disk, aligned for direct I/O.
#[repr(C, align(4096))]
pub(super) struct Head([u8; 4096]);

/// Longest range that is zeroed in one request: long ones hold up others on the same file.
const ZERO_MAX_BYTES: u32 = 128 << 20;

/// What was found.
pub(super) struct Facts {
    pub(super) head: Box<Head>,
    size_bytes: u64,
    logical_block_bytes: u32,
    physical_block_bytes: u32,
    volatile_cache: bool,
    /// `FALLOC_FL_PUNCH_HOLE` works, after which the range reads zeroes.
    can_punch: bool,
}

impl Facts {
    /// After the look at the format: images have odd sizes, and are not to be grown.
    pub(super) fn check_size(&self, path: &Path) -> Result<(), BackingError> {
        let (size_bytes, block_bytes) = (self.size_bytes, self.logical_block_bytes);
        if size_bytes == 0 {
            return Err(BackingError::Empty { path: path.to_owned() });
        }
        if !size_bytes.is_multiple_of(u64::from(block_bytes)) {
            return Err(BackingError::Size { path: path.to_owned(), size_bytes, block_bytes });
        }
        Ok(())
    }

    pub(super) fn geometry(&self, read_only: bool) -> Geometry {
        let limits = ZeroLimits { granularity_bytes: self.physical_block_bytes, max_bytes: ZERO_MAX_BYTES };
        let zeroing = (self.can_punch && !read_only).then_some(limits);
        Geometry {
            size_bytes: self.size_bytes,
            logical_block_bytes: self.logical_block_bytes,
            physical_block_bytes: self.physical_block_bytes,
            volatile_cache: self.volatile_cache,
            // RWF_DSYNC: the kernel uses the device's FUA, or flushes.
            fua: self.volatile_cache,
            read_only,
            discard: zeroing,
            write_zeroes: zeroing,
        }
    }
}

pub(super) fn probe(file: &File, kind: BackingKind, path: &Path) -> Result<Facts, BackingError> {
    let io_error = |action| move |source| BackingError::Io { action, path: path.to_owned(), source };
    let facts = match kind {
        BackingKind::File => {
            let metadata = file.metadata().map_err(io_error("look at"))?;
            let logical_block_bytes = direct_io_align(file).map_err(io_error("probe"))?;
            Facts {
                head: Box::new(Head([0; 4096])),
                size_bytes: metadata.len(),
                logical_block_bytes,
                physical_block_bytes: logical_block_bytes.max(4096),
                volatile_cache: true,
                can_punch: can_punch_file(file, metadata.len()),
            }
        }
        BackingKind::BlockDevice => {
            let queue = queue_folder(file).map_err(io_error("look at"))?;
            let logical_block_bytes = ioctl_u32(file, BLKSSZGET).map_err(io_error("probe"))?;
            let physical_block_bytes = ioctl_u32(file, BLKPBSZGET).map_err(io_error("probe"))?;
            Facts {
                head: Box::new(Head([0; 4096])),
                size_bytes: device_size_bytes(file).map_err(io_error("probe"))?,
                logical_block_bytes,
                physical_block_bytes: physical_block_bytes.max(logical_block_bytes),
                // What cannot be read is taken for a cache: a needless flush does no harm.
                volatile_cache: read_attribute(&queue, "write_cache").as_deref() != Some("write through"),
                can_punch: read_attribute(&queue, "write_zeroes_max_bytes")
                    .is_some_and(|bytes| bytes.parse::<u64>().is_ok_and(|bytes| bytes > 0)),
            }
        }
    };
    check_and_read_head(facts, file, path)
}

/// How large it is now, in bytes.
pub(super) fn size_bytes(file: &File, kind: BackingKind) -> io::Result<u64> {
    match kind {
        BackingKind::File => Ok(file.metadata()?.len()),
        BackingKind::BlockDevice => device_size_bytes(file),
    }
}

/// What the beginning of a disk says of its format, if it is one that holds a disk inside.
pub(super) fn image_format(head: &Head) -> Option<&'static str> {
    let has = |offset: usize, magic: &[u8]| head.0[offset..].starts_with(magic);
    match () {
        () if has(0, b"QFI\xfb") => Some("qcow2"),
        () if has(0, b"QED\0") => Some("QED"),
        () if has(0, b"KDMV") || has(0, b"COWD") || has(0, b"# Disk DescriptorFile") => Some("VMDK"),
        () if has(0, b"vhdxfile") => Some("VHDX"),
        () if has(0, b"conectix") => Some("VHD"),
        () if has(64, &[0x7f, 0x10, 0xda, 0xbe]) => Some("VDI"),
        () if has(0, b"LUKS\xba\xbe") => Some("LUKS"),
        () if has(0, b"WithoutFreeSpace") || has(0, b"WithouFreSpacExt") => Some("Parallels"),
        () => None,
    }
}

fn check_and_read_head(mut facts: Facts, file: &File, path: &Path) -> Result<Facts, BackingError> {
    let path = || path.to_owned();
    let block_bytes = facts.logical_block_bytes;
    if block_bytes == 0 || block_bytes > 4096 {
        return Err(BackingError::Alignment { path: path(), align_bytes: block_bytes });
    }
    let head_bytes = facts.head.0.len().min(usize::try_from(facts.size_bytes).unwrap_or(usize::MAX));
    let mut done_bytes = 0;
    while done_bytes < head_bytes {
        match file.read_at(&mut facts.head.0[done_bytes..], done_bytes as u64) {
            Ok(0) => break,
            Ok(read_bytes) => done_bytes += read_bytes,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(source) => {
                return Err(BackingError::Io { action: "read the first block of", path: path(), source });
            }
        }
    }
    Ok(facts)
}

/// Unit of direct I/O on a file opened for it, in bytes: what the filesystem says (`STATX_DIOALIGN`), else what a try tells.
///
/// # Errors
/// The kernel's.
pub fn direct_io_align(file: &File) -> io::Result<u32> {
    let mut stat = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: an empty path with AT_EMPTY_PATH means the descriptor itself; `stat` is large enough.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            stat.as_mut_ptr(),
        )
    };
    if result == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: zeroed before, and filled by the call.
    let stat = unsafe { stat.assume_init() };
    if stat.stx_mask & libc::STATX_DIOALIGN != 0 && stat.stx_dio_offset_align != 0 {
        return Ok(stat.stx_dio_offset_align.max(stat.stx_dio_mem_align.min(4096)).max(512));
    }
    let mut head = Box::new(Head([0; 4096]));
    match file.read_at(&mut head.0[..512], 512) {
        Ok(_) => Ok(512),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(4096),
        Err(error) => Err(error),
    }
}

/// Tried behind the end of the file, where there is nothing to lose.
fn can_punch_file(file: &File, size_bytes: u64) -> bool {
    let Ok(offset) = libc::off_t::try_from(size_bytes.next_multiple_of(4096)) else {
        return false;
    };
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: the descriptor is open; no memory is involved.
    unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, 4096) == 0 }
}

/// `_IO(0x12, 104)` of include/uapi/linux/fs.h.
const BLKSSZGET: libc::Ioctl = 0x1268;
/// `_IO(0x12, 123)`.
const BLKPBSZGET: libc::Ioctl = 0x127b;
/// `_IOR(0x12, 114, size_t)`.
const BLKGETSIZE64: libc::Ioctl = 0x8008_1272_u32 as libc::Ioctl;

fn ioctl_u32(file: &File, request: libc::Ioctl) -> io::Result<u32> {
    let mut value: libc::c_uint = 0;
    // SAFETY: both requests that come here write one int.
    if unsafe { libc::ioctl(file.as_raw_fd(), request, &raw mut value) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(value)
}

fn device_size_bytes(file: &File) -> io::Result<u64> {
    let mut size_bytes: u64 = 0;
    // SAFETY: the request writes one u64.
    if unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &raw mut size_bytes) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(size_bytes)
}

/// `queue/` in sysfs of a device, or of the one that a partition lies on.
fn queue_folder(file: &File) -> io::Result<PathBuf> {
    let device = file.metadata()?.rdev();
    let own = format!("/sys/dev/block/{}:{}", libc::major(device), libc::minor(device));
    let own = std::fs::canonicalize(own)?;
    let queue = own.join("queue");
    Ok(if queue.exists() { queue } else { own.join("../queue") })
}

fn read_attribute(folder: &Path, name: &str) -> Option<String> {
    Some(std::fs::read_to_string(folder.join(name)).ok()?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_formats_are_known_by_their_beginning_and_raw_disks_are_none() {
        let head = |offset: usize, magic: &[u8]| {
            let mut head = Head([0; 4096]);
            head.0[offset..offset + magic.len()].copy_from_slice(magic);
            head
        };
        assert_eq!(image_format(&head(0, b"QFI\xfb\0\0\0\x03")), Some("qcow2"));
        assert_eq!(image_format(&head(0, b"KDMV")), Some("VMDK"));
        assert_eq!(image_format(&head(64, &[0x7f, 0x10, 0xda, 0xbe])), Some("VDI"));
        assert_eq!(image_format(&head(510, &[0x55, 0xaa])), None);
    }
}
