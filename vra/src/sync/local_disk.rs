//! Reads of a local disk that a sync makes: direct, beside its guest's.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use ublk::arena::Slot;

use super::Extent;
use crate::capture::numbering::ByteRange;
use crate::capture::payload::Piece;

/// Whether there is data or a hole at the range's start. Where the file can't tell, all is data.
pub(super) fn probe(file: &File, range: ByteRange) -> io::Result<Extent> {
    let data_start = match seek(file, range.start, libc::SEEK_DATA) {
        Ok(start) => start,
        Err(Errno::ENXIO) => return Ok(Extent { is_data: false, end: range.end }),
        Err(Errno::EINVAL | Errno::EOPNOTSUPP) => return Ok(Extent { is_data: true, end: range.end }),
        Err(errno) => return Err(errno.into()),
    };
    if data_start > range.start {
        return Ok(Extent { is_data: false, end: data_start });
    }
    let end = seek(file, range.start, libc::SEEK_HOLE)?;
    Ok(Extent { is_data: true, end })
}

/// Moves the position of the open file, which nobody uses: all I/O to it names its place.
fn seek(file: &File, offset_bytes: u64, whence: i32) -> Result<u64, Errno> {
    let offset = libc::off_t::try_from(offset_bytes).map_err(|_| Errno::EINVAL)?;
    // SAFETY: lseek touches no memory, and the descriptor is open for as long as `file`.
    let found = Errno::result(unsafe { libc::lseek(file.as_raw_fd(), offset, whence) })?;
    Ok(u64::try_from(found).expect("lseek gives no negative position"))
}

/// Reads the range; none if it is all zeroes.
pub(super) fn read(file: &File, range: ByteRange, mut slot: Slot) -> io::Result<Option<Piece>> {
    let len_bytes = range.len_bytes() as usize;
    file.read_exact_at(&mut slot[..len_bytes], range.start)?;
    if slot[..len_bytes].chunks(ZEROES.len()).all(|chunk| chunk == &ZEROES[..chunk.len()]) {
        return Ok(None);
    }
    Ok(Some(Piece::of_slot(slot.share(), len_bytes)))
}

const ZEROES: [u8; 4096] = [0; 4096];
