//! A disk in memory whose writes can be held back, to see what a server does meanwhile.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use ublk::serve::*;

pub(crate) struct MemoryDisk {
    geometry: Geometry,
    state: Mutex<State>,
    arrived: Condvar,
    /// Writes are taken but not done while it is set.
    held: AtomicBool,
}

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    /// Offsets of writes in the order in which they were done.
    written: Vec<u64>,
    held: usize,
    flushes: usize,
    wakers: Vec<Waker>,
}

impl MemoryDisk {
    pub(crate) fn new(size_bytes: usize, read_only: bool) -> Arc<Self> {
        let limits = Some(ZeroLimits { granularity_bytes: 4096, max_bytes: 1 << 20 });
        let geometry = Geometry {
            size_bytes: size_bytes as u64,
            logical_block_bytes: 512,
            physical_block_bytes: 4096,
            volatile_cache: true,
            fua: true,
            read_only,
            discard: limits,
            write_zeroes: limits,
        };
        let state = State { bytes: vec![0; size_bytes], ..State::default() };
        let (state, arrived) = (Mutex::new(state), Condvar::new());
        Arc::new(Self { geometry, state, arrived, held: AtomicBool::new(false) })
    }

    pub(crate) fn bytes(&self, from: usize, len: usize) -> Vec<u8> {
        self.state.lock().expect("state").bytes[from..from + len].to_vec()
    }

    pub(crate) fn fill(&self, from: usize, bytes: &[u8]) {
        self.state.lock().expect("state").bytes[from..from + bytes.len()].copy_from_slice(bytes);
    }

    pub(crate) fn written(&self) -> Vec<u64> {
        self.state.lock().expect("state").written.clone()
    }

    pub(crate) fn flushes(&self) -> usize {
        self.state.lock().expect("state").flushes
    }

    pub(crate) fn hold_writes(&self) {
        self.held.store(true, Ordering::SeqCst);
    }

    pub(crate) fn release_writes(&self) {
        self.held.store(false, Ordering::SeqCst);
        self.state.lock().expect("state").wakers.iter().for_each(|waker| waker.wake());
    }

    /// Waits until `count` writes are held.
    pub(crate) fn wait_for_held(&self, count: usize) {
        let state = self.state.lock().expect("state");
        let held =
            self.arrived.wait_timeout_while(state, Duration::from_secs(30), |state| state.held < count);
        assert!(!held.expect("state").1.timed_out(), "{count} writes never came");
    }
}

impl Disk for MemoryDisk {
    fn geometry(&self) -> Geometry {
        self.geometry.clone()
    }

    fn files(&self) -> &[std::fs::File] {
        &[]
    }

    fn lane(self: Arc<Self>, waker: Waker) -> Box<dyn Lane> {
        self.state.lock().expect("state").wakers.push(waker);
        Box::new(MemoryLane { disk: self, held: Vec::new() })
    }

    fn extents(&self, offset_bytes: u64, len_bytes: u64, count_max: usize) -> Vec<Extent> {
        let bytes = self.bytes(offset_bytes as usize, len_bytes as usize);
        let mut extents: Vec<Extent> = Vec::new();
        for block in bytes.chunks(4096) {
            let zero = block.iter().all(|byte| *byte == 0);
            let allocation = if zero { Allocation::Hole } else { Allocation::Data };
            let count = extents.len();
            match extents.last_mut() {
                Some(last) if last.allocation == allocation => last.len_bytes += block.len() as u64,
                _ if count == count_max => break,
                _ => extents.push(Extent { len_bytes: block.len() as u64, allocation }),
            }
        }
        extents
    }
}

struct MemoryLane {
    disk: Arc<MemoryDisk>,
    held: Vec<Request>,
}

impl Lane for MemoryLane {
    fn request(&mut self, request: Request, port: &mut dyn Port) {
        if request.op == Op::Write && self.disk.held.load(Ordering::SeqCst) {
            self.held.push(request);
            self.disk.state.lock().expect("state").held += 1;
            self.disk.arrived.notify_all();
            return;
        }
        let Request { tag, op, offset_bytes, len_bytes, mut slot, .. } = request;
        let mut state = self.disk.state.lock().expect("state");
        let range = offset_bytes as usize..(offset_bytes + len_bytes) as usize;
        match op {
            Op::Read => slot.as_mut().expect("slot")[..range.len()].copy_from_slice(&state.bytes[range]),
            Op::Write => {
                state.bytes[range.clone()].copy_from_slice(&slot.as_ref().expect("slot")[..range.len()]);
                state.written.push(offset_bytes);
            }
            Op::Discard | Op::WriteZeroes { .. } => state.bytes[range].fill(0),
            Op::Flush => state.flushes += 1,
        }
        drop(state);
        port.complete(Completion { tag, result: Ok(()), slot });
    }

    fn file_done(&mut self, _: u64, _: Result<(), Errno>, _: IoBuffer, _: &mut dyn Port) {
        unreachable!("no file I/O was asked for");
    }

    fn wake(&mut self, port: &mut dyn Port) {
        if self.disk.held.load(Ordering::SeqCst) {
            return;
        }
        for request in std::mem::take(&mut self.held) {
            self.disk.state.lock().expect("state").held -= 1;
            self.request(request, port);
        }
    }
}
