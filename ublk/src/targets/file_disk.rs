//! The `loop` target: a disk that is a raw file or block device.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::backing::Backing;
use crate::serve::{
    Completion, Disk, Errno, FileId, FileIo, FileOp, Geometry, IoBuffer, Lane, Op, Port, Request, Waker,
};

/// A raw file or block device as a disk.
#[derive(Debug)]
pub struct FileDisk {
    backing: Backing,
    /// A sync has failed: what was written before it may be lost, and a later sync would not say so.
    poisoned: AtomicBool,
}

impl FileDisk {
    /// Serves an opened backing.
    pub fn new(backing: Backing) -> Self {
        Self { backing, poisoned: AtomicBool::new(false) }
    }
}

impl Disk for FileDisk {
    fn geometry(&self) -> Geometry {
        self.backing.geometry().clone()
    }

    fn files(&self) -> &[File] {
        std::slice::from_ref(self.backing.file())
    }

    fn lane(self: Arc<Self>, _waker: Waker) -> Box<dyn Lane> {
        Box::new(FileLane { disk: self })
    }
}

/// Stateless: all that is to be known of a request goes with its I/O, in the token and the buffer.
struct FileLane {
    disk: Arc<FileDisk>,
}

/// [`FileIo::token`] is the request's tag, with these bits on top.
const TOKEN_SYNC_FOLLOWS: u64 = 1 << 63;
/// The I/O promises durability, so its failure poisons the disk.
const TOKEN_DURABLE: u64 = 1 << 62;

impl FileLane {
    fn refusal(&self, op: Op) -> Option<Errno> {
        let geometry = self.disk.backing.geometry();
        let writes = !matches!(op, Op::Read | Op::Flush);
        let offered = match op {
            Op::Discard => geometry.discard.is_some(),
            Op::WriteZeroes { .. } => geometry.write_zeroes.is_some(),
            Op::Read | Op::Write | Op::Flush => true,
        };
        if writes && geometry.read_only {
            Some(Errno(libc::EROFS))
        } else if !offered {
            Some(Errno(libc::EOPNOTSUPP))
        } else if op != Op::Read && self.disk.poisoned.load(Ordering::Acquire) {
            Some(Errno(libc::EIO))
        } else {
            None
        }
    }
}

impl Lane for FileLane {
    fn request(&mut self, request: Request, port: &mut dyn Port) {
        let Request { tag, op, offset_bytes, len_bytes, fua, slot } = request;
        if let Some(errno) = self.refusal(op) {
            port.complete(Completion { tag, result: Err(errno), slot });
            return;
        }
        let (file_op, bits) = match op {
            Op::Read => (FileOp::Read, 0),
            Op::Write => (FileOp::Write { dsync: fua }, if fua { TOKEN_DURABLE } else { 0 }),
            Op::Flush => (FileOp::Sync, TOKEN_DURABLE),
            Op::Discard | Op::WriteZeroes { unmap: true } => {
                (FileOp::PunchHole, if fua { TOKEN_SYNC_FOLLOWS } else { 0 })
            }
            Op::WriteZeroes { unmap: false } => (FileOp::ZeroRange, if fua { TOKEN_SYNC_FOLLOWS } else { 0 }),
        };
        port.submit(FileIo {
            token: tag | bits,
            file: FileId(0),
            op: file_op,
            offset_bytes,
            len_bytes,
            buffer_offset_bytes: 0,
            buffer: slot.map_or(IoBuffer::None, IoBuffer::Owned),
        });
    }

    fn file_done(&mut self, token: u64, result: Result<(), Errno>, buffer: IoBuffer, port: &mut dyn Port) {
        let tag = token & !(TOKEN_SYNC_FOLLOWS | TOKEN_DURABLE);
        if token & TOKEN_SYNC_FOLLOWS != 0 && result.is_ok() {
            port.submit(FileIo {
                token: tag | TOKEN_DURABLE,
                file: FileId(0),
                op: FileOp::Sync,
                offset_bytes: 0,
                len_bytes: 0,
                buffer_offset_bytes: 0,
                buffer: IoBuffer::None,
            });
            return;
        }
        if token & TOKEN_DURABLE != 0 && result.is_err() {
            self.disk.poisoned.store(true, Ordering::Release);
        }
        let slot = match buffer {
            IoBuffer::Owned(slot) => Some(slot),
            IoBuffer::None | IoBuffer::Shared(_) => None,
        };
        port.complete(Completion { tag, result, slot });
    }

    fn wake(&mut self, _: &mut dyn Port) {}
}

#[cfg(test)]
mod tests;
