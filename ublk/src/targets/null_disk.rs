//! The `null` target: answers at once, keeps nothing.

use std::fs::File;
use std::sync::Arc;

use crate::serve::{Completion, Disk, Errno, Geometry, IoBuffer, Lane, Op, Port, Request, Waker, ZeroLimits};

/// A disk that takes every write, forgets it, and reads zeroes.
#[derive(Debug)]
pub struct NullDisk {
    geometry: Geometry,
}

impl NullDisk {
    /// A disk of `size_bytes`, which the door checks.
    pub fn new(size_bytes: u64) -> Self {
        let zeroing = Some(ZeroLimits { granularity_bytes: 4096, max_bytes: 1 << 30 });
        Self {
            geometry: Geometry {
                size_bytes,
                logical_block_bytes: 512,
                physical_block_bytes: 4096,
                volatile_cache: false,
                fua: false,
                read_only: false,
                discard: zeroing,
                write_zeroes: zeroing,
            },
        }
    }
}

impl Disk for NullDisk {
    fn geometry(&self) -> Geometry {
        self.geometry.clone()
    }

    fn files(&self) -> &[File] {
        &[]
    }

    fn lane(self: Arc<Self>, _waker: Waker) -> Box<dyn Lane> {
        Box::new(NullLane)
    }
}

struct NullLane;

impl Lane for NullLane {
    fn request(&mut self, mut request: Request, port: &mut dyn Port) {
        if request.op == Op::Read
            && let Some(slot) = &mut request.slot
        {
            // The slot holds what was written through it before.
            slot[..request.len_bytes as usize].fill(0);
        }
        port.complete(Completion { tag: request.tag, result: Ok(()), slot: request.slot });
    }

    fn file_done(&mut self, _: u64, _: Result<(), Errno>, _: IoBuffer, _: &mut dyn Port) {}

    fn wake(&mut self, _: &mut dyn Port) {}
}
