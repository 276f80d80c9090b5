//! What disks hold, read and written past the page cache.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use anyhow::{Context as _, Result, ensure};

/// Compares the first `len_bytes` of two disks; that is a multiple of a MiB.
pub(super) fn same_content(one: &str, other: &str, len_bytes: u64) -> Result<()> {
    let (left, right) = (direct_read(one)?, direct_read(other)?);
    let (mut a, mut b) = (aligned_mib(), aligned_mib());
    for offset in (0..len_bytes).step_by(1 << 20) {
        left.read_exact_at(a.as_mut(), offset)?;
        right.read_exact_at(b.as_mut(), offset)?;
        if a.as_ref() != b.as_ref() {
            let at = a.as_ref().iter().zip(b.as_ref()).position(|(a, b)| a != b).unwrap_or_default() as u64;
            let differ = a.as_ref().chunks(512).zip(b.as_ref().chunks(512)).filter(|(a, b)| a != b).count();
            anyhow::bail!(
                "{one} and {other} differ at {} and in {differ} sectors of the MiB at {offset}",
                offset + at
            );
        }
    }
    Ok(())
}

/// Sees to it that each byte of the range, in whole MiB, is `fill`.
pub(super) fn filled_with(path: &str, range: Range<u64>, fill: u8) -> Result<()> {
    let file = direct_read(path)?;
    let mut content = aligned_mib();
    for offset in range.step_by(1 << 20) {
        file.read_exact_at(content.as_mut(), offset)?;
        ensure!(
            content.as_ref().iter().all(|&byte| byte == fill),
            "the MiB at {offset} of {path} is not all {fill:#x}"
        );
    }
    Ok(())
}

/// Opens a disk for direct reads and writes.
pub(super) fn direct(path: &str) -> Result<File> {
    let file = File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(path);
    file.with_context(|| format!("opening {path}"))
}

fn direct_read(path: &str) -> Result<File> {
    let file = File::options().read(true).custom_flags(libc::O_DIRECT).open(path);
    file.with_context(|| format!("opening {path}"))
}

/// A block for direct I/O.
#[repr(align(4096))]
pub(super) struct Block(pub(super) [u8; 4096]);

/// A block of one byte's repetition.
pub(super) fn aligned(fill: u8) -> Block {
    Block([fill; 4096])
}

/// A MiB for direct I/O.
struct Mib {
    memory: Vec<u8>,
    start: usize,
}

fn aligned_mib() -> Mib {
    let memory = vec![0; (1 << 20) + 4096];
    let start = memory.as_ptr().align_offset(4096);
    Mib { memory, start }
}

impl AsRef<[u8]> for Mib {
    fn as_ref(&self) -> &[u8] {
        &self.memory[self.start..][..1 << 20]
    }
}

impl AsMut<[u8]> for Mib {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..][..1 << 20]
    }
}
