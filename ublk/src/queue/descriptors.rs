//! The request descriptors that the driver shares with its server.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use crate::uapi::{self, IoDesc};

/// The mapping of one queue's descriptors.
pub(super) struct Descriptors {
    base: NonNull<IoDesc>,
    len_bytes: usize,
    depth: u16,
}

// SAFETY: the mapping is read-only memory without thread affinity.
unsafe impl Send for Descriptors {}

impl Descriptors {
    pub(super) fn map(char_file: &File, queue: u16, depth: u16) -> io::Result<Self> {
        let page_bytes = page_bytes();
        let len_bytes = uapi::descriptors_len_bytes(depth, page_bytes);
        let offset_bytes = uapi::descriptors_offset_bytes(queue, page_bytes);
        // SAFETY: a new shared mapping with no address wish touches no existing memory.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len_bytes,
                libc::PROT_READ,
                libc::MAP_SHARED | libc::MAP_POPULATE,
                char_file.as_raw_fd(),
                offset_bytes as libc::off_t,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, len_bytes, depth })
    }

    /// The descriptor of a tag whose fetch has completed.
    pub(super) fn read(&self, tag: u16) -> IoDesc {
        assert!(tag < self.depth, "tags come from our own submissions");
        // SAFETY: inside the mapping, page-aligned plus a multiple of the structure. Volatile: the driver writes it between
        // requests, but not between a tag's completion and its commit.
        unsafe { self.base.as_ptr().add(usize::from(tag)).read_volatile() }
    }
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        // SAFETY: mapped in `map` with this length, and nothing refers to it any more.
        let unmapped = unsafe { libc::munmap(self.base.as_ptr().cast(), self.len_bytes) };
        debug_assert_eq!(unmapped, 0);
    }
}

fn page_bytes() -> usize {
    // SAFETY: sysconf has no preconditions.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(bytes).unwrap_or(4096)
}
