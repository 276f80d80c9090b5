//! Lanes of a view in a test, as a door would drive them.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use ublk::arena::{Arena, Slot};
use ublk::serve::{Completion, Disk, FileIo, FileOp, IoBuffer, Lane, Op, Port, Request, Wake};

use super::ViewDisk;

pub(super) const SLOT_BYTES: usize = 128 << 10;

/// Lanes of a view whose file I/O is done by this thread, one by one in a random order.
pub(crate) struct Guest {
    pub(super) disk: Arc<ViewDisk>,
    lanes: Vec<(Box<dyn Lane>, Arc<Bell>)>,
    pub(super) port: QueuePort,
    pub(super) rng: StdRng,
    tag: u64,
    /// I/O that fails.
    pub(super) fails: fn(&FileIo) -> bool,
}

#[derive(Default)]
struct Bell(AtomicBool);

impl Wake for Bell {
    fn wake(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

pub(super) struct QueuePort {
    lane: usize,
    pub(super) io: Vec<(usize, FileIo)>,
    pub(super) done: BTreeMap<u64, Completion>,
}

impl Port for QueuePort {
    fn submit(&mut self, io: FileIo) {
        self.io.push((self.lane, io));
    }

    fn complete(&mut self, completion: Completion) {
        assert!(self.done.insert(completion.tag, completion).is_none(), "completed twice");
    }

    fn take_slot(&mut self) -> Option<Slot> {
        None
    }
}

impl Guest {
    pub(crate) fn new(disk: &Arc<ViewDisk>, lanes: usize, seed: u64) -> Self {
        let lane = || {
            let bell = Arc::new(Bell::default());
            (Arc::clone(disk).lane(Arc::clone(&bell) as _), bell)
        };
        let port = QueuePort { lane: 0, io: Vec::new(), done: BTreeMap::new() };
        let lanes = (0..lanes).map(|_| lane()).collect();
        let rng = StdRng::seed_from_u64(seed);
        Self { disk: Arc::clone(disk), lanes, port, rng, tag: 0, fails: |_| false }
    }

    pub(super) fn start(&mut self, op: Op, offset_bytes: u64, len_bytes: u64, slot: Option<Slot>) -> u64 {
        let fua = self.rng.random();
        self.start_with(op, fua, offset_bytes, len_bytes, slot)
    }

    pub(super) fn start_with(
        &mut self,
        op: Op,
        fua: bool,
        offset_bytes: u64,
        len_bytes: u64,
        slot: Option<Slot>,
    ) -> u64 {
        self.tag += 1;
        let request = Request { tag: self.tag, op, offset_bytes, len_bytes, fua, slot };
        self.port.lane = self.rng.random_range(0..self.lanes.len());
        self.lanes[self.port.lane].0.request(request, &mut self.port);
        self.tag
    }

    pub(super) fn step(&mut self) -> bool {
        for (index, (lane, bell)) in self.lanes.iter_mut().enumerate() {
            if bell.0.swap(false, Ordering::SeqCst) {
                self.port.lane = index;
                lane.wake(&mut self.port);
            }
        }
        if self.port.io.is_empty() {
            return false;
        }
        let (lane, mut io) = self.port.io.swap_remove(self.rng.random_range(0..self.port.io.len()));
        let file = &self.disk.files()[io.file.0 as usize];
        let range = io.buffer_offset_bytes as usize..io.buffer_offset_bytes as usize + io.len_bytes as usize;
        let fails = (self.fails)(&io);
        let result = match (io.op, &mut io.buffer) {
            _ if fails => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
            (FileOp::Read, IoBuffer::Owned(slot)) => file.read_exact_at(&mut slot[range], io.offset_bytes),
            (FileOp::Write { .. }, IoBuffer::Shared(slot)) => {
                file.write_all_at(&slot[range], io.offset_bytes)
            }
            (FileOp::Sync, IoBuffer::None) => file.sync_data(),
            (op, buffer) => panic!("{op:?} with {buffer:?}"),
        };
        let result = result.map_err(|error| ublk::serve::Errno(error.raw_os_error().unwrap_or(libc::EIO)));
        self.port.lane = lane;
        self.lanes[lane].0.file_done(io.token, result, io.buffer, &mut self.port);
        true
    }

    pub(super) fn finish(&mut self) {
        while self.step() {}
        assert_eq!(self.port.done.len() as u64, self.tag, "a request was forgotten");
    }

    /// Reads a range at once; the errno if it failed.
    pub(crate) fn read(&mut self, offset_bytes: u64, len_bytes: u64) -> Result<Vec<u8>, i32> {
        let arena = Arena::new(SLOT_BYTES, 1).expect("arena");
        let mut slot = arena.take().expect("slot");
        slot.fill(0xA5);
        let tag = self.start(Op::Read, offset_bytes, len_bytes, Some(slot));
        self.finish();
        let completion = &self.port.done[&tag];
        completion.result.map_err(|errno| errno.0)?;
        Ok(completion.slot.as_ref().expect("slot")[..len_bytes as usize].to_vec())
    }

    /// A change at once; the errno if it failed. A slot that went comes back.
    pub(super) fn change(&mut self, op: Op, fua: bool, offset_bytes: u64, fill: u8) -> Result<(), i32> {
        let arena = Arena::new(SLOT_BYTES, 1).expect("arena");
        let slot = (op == Op::Write).then(|| {
            let mut slot = arena.take().expect("slot");
            slot.fill(fill);
            slot
        });
        let len_bytes = if op == Op::Flush { 0 } else { 4096 };
        let tag = self.start_with(op, fua, offset_bytes, len_bytes, slot);
        self.finish();
        let completion = &self.port.done[&tag];
        assert_eq!(completion.slot.is_some(), op == Op::Write, "the slot of {op:?} is lost");
        completion.result.map_err(|errno| errno.0)
    }

    /// Writes random blocks of 4 KiB, in the model too.
    pub(crate) fn write_some(&mut self, model: &mut [u8], count: usize) {
        for _ in 0..count {
            let offset_bytes = self.rng.random_range(0..model.len() as u64 / 4096) * 4096;
            let fill = self.rng.random();
            self.change(Op::Write, false, offset_bytes, fill).expect("written");
            model[offset_bytes as usize..][..4096].fill(fill);
        }
    }

    /// Nothing can be changed any more, and everything reads as it did.
    pub(super) fn is_failed_but_readable(&mut self, model: &[u8]) {
        self.fails = |_| false;
        assert!(self.disk.is_scratch_failed());
        for _ in 0..2 {
            for op in [Op::Write, Op::Flush, Op::Discard, Op::WriteZeroes { unmap: true }] {
                for fua in [false, op != Op::Flush] {
                    assert_eq!(self.change(op, fua, 0, 0xEE), Err(libc::EIO), "{op:?}");
                }
            }
        }
        self.compare(model);
    }

    /// Compares the whole disk with the model, in reads of all lengths.
    pub(crate) fn compare(&mut self, model: &[u8]) {
        let (mut at, size_bytes) = (0, model.len() as u64);
        while at < size_bytes {
            let len = (self.rng.random_range(1..=256_u64) * 512).min(size_bytes - at);
            let read = self.read(at, len).expect("readable");
            assert!(read == model[at as usize..(at + len) as usize], "different in {at}+{len}");
            at += len;
        }
    }
}
