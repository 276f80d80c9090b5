//! A door that lives in this process: what ublk would do, without its kernel part.

use std::collections::{HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use journal::storage::ring::{Access, DirectFile, RingStorage};
use journal::storage::{AlignedBuf, Completion as FileCompletion, FileId, Op, Purpose, Storage as _};
use ublk::arena::{Arena, Slot};
use ublk::serve::{
    Completion, Disk, Errno, FileIo, FileOp, IoBuffer, Lane, Op as Asked, Port, Request, Wake,
};
use vra::view::ViewDisk;

/// One queue in front of a view.
pub(super) struct Door {
    lane: Box<dyn Lane>,
    io: Io,
}

/// What the lane asks for.
struct Io {
    arena: Arena,
    storage: RingStorage,
    files: Vec<FileId>,
    waiting: HashMap<u64, FileIo>,
    next_token: u64,
    answered: Vec<Completion>,
    depth: usize,
}

impl Door {
    /// In front of a view of these files.
    pub(super) fn new(disk: Arc<ViewDisk>, files: &[PathBuf], depth: usize) -> Result<Self> {
        let mut storage = RingStorage::new(256)?;
        let open = |path: &PathBuf| Ok(storage.add_file(DirectFile::open(path, Access::ReadOnly)?));
        let files = files.iter().map(open).collect::<Result<Vec<_>>>()?;
        let io = Io {
            arena: Arena::new(64 << 10, depth as u32)?,
            storage,
            files,
            waiting: HashMap::new(),
            next_token: 0,
            answered: Vec::new(),
            depth,
        };
        Ok(Self { lane: disk.lane(Arc::new(NoBell)), io })
    }

    /// Reads so often, at places that are asked for; gives how many reads were answered. As a guest with many threads does, each answer is
    /// followed by the next read at once: the disk has some to do while the answers of others are looked at.
    pub(super) fn read(&mut self, count: u64, len_bytes: u64, place: &mut dyn FnMut() -> u64) -> Result<u64> {
        let (mut asked, mut answered) = (0, 0);
        let mut done = VecDeque::<FileCompletion>::new();
        let mut ended = Vec::new();
        loop {
            while asked < count && asked - answered < self.io.depth as u64 {
                let slot = self.io.arena.take().context("the door has run out of slots")?;
                let (op, offset_bytes, slot) = (Asked::Read, place(), Some(slot));
                let request = Request { tag: asked, op, offset_bytes, len_bytes, fua: false, slot };
                self.lane.request(request, &mut self.io);
                asked += 1;
            }
            if answered == count {
                return Ok(answered);
            }
            self.io.storage.collect(done.is_empty() && self.io.answered.is_empty(), &mut ended)?;
            done.extend(ended.drain(..));
            let now = done.len().min(TOGETHER);
            for FileCompletion { token, result } in done.drain(..now) {
                let FileIo { token, buffer_offset_bytes, mut buffer, .. } =
                    self.io.waiting.remove(&token).context("an end of nothing")?;
                let result = match result {
                    Ok(read) => {
                        if let (Some(read), IoBuffer::Owned(slot)) = (read, &mut buffer) {
                            slot[buffer_offset_bytes as usize..][..read.len()].copy_from_slice(&read);
                        }
                        Ok(())
                    }
                    Err(error) => Err(Errno(error.errno as i32)),
                };
                self.lane.file_done(token, result, buffer, &mut self.io);
            }
            for completion in self.io.answered.drain(..) {
                ensure!(completion.result.is_ok(), "read {}: {:?}", completion.tag, completion.result);
                answered += 1;
            }
        }
    }
}

/// Ends that are taken before new reads begin.
const TOGETHER: usize = 4;

impl Port for Io {
    fn submit(&mut self, io: FileIo) {
        assert!(io.op == FileOp::Read, "a view that is read does nothing else");
        let buffer = AlignedBuf::zeroed(io.len_bytes as usize);
        let op = Op::Read { offset_bytes: io.offset_bytes, buffer };
        self.storage.submit(self.files[io.file.0 as usize], self.next_token, Purpose::View, op);
        self.waiting.insert(self.next_token, io);
        self.next_token += 1;
    }

    fn complete(&mut self, completion: Completion) {
        self.answered.push(completion);
    }

    fn take_slot(&mut self) -> Option<Slot> {
        self.arena.take()
    }
}

/// A lane of a view that is only read is never woken.
struct NoBell;

impl Wake for NoBell {
    fn wake(&self) {}
}
