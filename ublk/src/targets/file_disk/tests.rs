use std::path::PathBuf;

use super::*;
use crate::arena::{Arena, Slot};
use crate::backing::BackingSettings;
use crate::serve::Wake;

struct NoWake;

impl Wake for NoWake {
    fn wake(&self) {}
}

/// A port that keeps what it is given.
struct Kept {
    arena: Arena,
    submitted: Vec<FileIo>,
    completed: Vec<Completion>,
}

impl Port for Kept {
    fn submit(&mut self, io: FileIo) {
        self.submitted.push(io);
    }
    fn complete(&mut self, completion: Completion) {
        self.completed.push(completion);
    }
    fn take_slot(&mut self) -> Option<Slot> {
        self.arena.take()
    }
}

struct Rig {
    lane: Box<dyn Lane>,
    port: Kept,
    path: PathBuf,
}

impl Rig {
    fn new(name: &str, read_only: bool) -> Self {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tmp");
        std::fs::create_dir_all(&folder).expect("folder");
        let path = folder.join(format!("file-disk-{name}-{}", std::process::id()));
        File::create(&path).and_then(|file| file.set_len(1 << 20)).expect("file");
        let settings = BackingSettings { read_only, ..BackingSettings::FIRST_ATTACH };
        let disk = Arc::new(FileDisk::new(Backing::open(&path, settings).expect("open")));
        let arena = Arena::new(8192, 4).expect("arena");
        let port = Kept { arena, submitted: Vec::new(), completed: Vec::new() };
        Self { lane: disk.lane(Arc::new(NoWake)), port, path }
    }

    fn request(&mut self, tag: u64, op: Op, fua: bool) {
        let slot = matches!(op, Op::Read | Op::Write).then(|| self.port.arena.take().expect("slot"));
        let len_bytes = if op == Op::Flush { 0 } else { 8192 };
        let request = Request { tag, op, offset_bytes: 4096, len_bytes, fua, slot };
        self.lane.request(request, &mut self.port);
    }

    /// Ends the oldest I/O and says what it was.
    fn end_io(&mut self, result: Result<(), Errno>) -> FileOp {
        let io = self.port.submitted.remove(0);
        self.lane.file_done(io.token, result, io.buffer, &mut self.port);
        io.op
    }

    fn answer(&mut self) -> (u64, Result<(), Errno>, bool) {
        let completion = self.port.completed.remove(0);
        (completion.tag, completion.result, completion.slot.is_some())
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[test]
fn each_request_becomes_its_io_and_the_slot_comes_back() {
    let mut rig = Rig::new("ops", false);
    let cases = [
        (Op::Read, false, FileOp::Read),
        (Op::Write, false, FileOp::Write { dsync: false }),
        (Op::Write, true, FileOp::Write { dsync: true }),
        (Op::Flush, false, FileOp::Sync),
        (Op::Discard, false, FileOp::PunchHole),
        (Op::WriteZeroes { unmap: true }, false, FileOp::PunchHole),
        (Op::WriteZeroes { unmap: false }, false, FileOp::ZeroRange),
    ];
    for (tag, (op, fua, file_op)) in (0..).zip(cases) {
        rig.request(tag, op, fua);
        assert_eq!(rig.end_io(Ok(())), file_op);
        assert_eq!(rig.answer(), (tag, Ok(()), matches!(op, Op::Read | Op::Write)));
    }
    assert_eq!(rig.port.arena.free_count(), 4);
}

#[test]
fn durable_zeroes_are_answered_after_the_sync_that_follows() {
    let mut rig = Rig::new("fua", false);
    rig.request(9, Op::WriteZeroes { unmap: true }, true);
    assert_eq!(rig.end_io(Ok(())), FileOp::PunchHole);
    assert!(rig.port.completed.is_empty());
    assert_eq!(rig.end_io(Ok(())), FileOp::Sync);
    assert_eq!(rig.answer(), (9, Ok(()), false));
}

/// After a failed sync the kernel forgets what was not written; only the first caller is told.
#[test]
fn after_a_failed_sync_nothing_is_called_durable_again() {
    let mut rig = Rig::new("poison", false);
    rig.request(1, Op::Write, false);
    rig.request(2, Op::Flush, false);
    rig.end_io(Ok(()));
    rig.end_io(Err(Errno(libc::EIO)));
    assert_eq!(rig.answer(), (1, Ok(()), true));
    assert_eq!(rig.answer(), (2, Err(Errno(libc::EIO)), false));
    for (tag, op) in [(3, Op::Flush), (4, Op::Write)] {
        rig.request(tag, op, false);
        assert!(rig.port.submitted.is_empty());
        assert_eq!(rig.answer(), (tag, Err(Errno(libc::EIO)), op == Op::Write));
    }
    rig.request(5, Op::Read, false);
    assert_eq!(rig.end_io(Ok(())), FileOp::Read);
}

#[test]
fn a_failed_plain_write_is_the_guests_to_know_and_no_poison() {
    let mut rig = Rig::new("eio", false);
    rig.request(1, Op::Write, false);
    rig.end_io(Err(Errno(libc::ENOSPC)));
    assert_eq!(rig.answer(), (1, Err(Errno(libc::ENOSPC)), true));
    rig.request(2, Op::Flush, false);
    assert_eq!(rig.end_io(Ok(())), FileOp::Sync);
}

#[test]
fn a_read_only_disk_takes_no_change() {
    let mut rig = Rig::new("read-only", true);
    for op in [Op::Write, Op::Discard, Op::WriteZeroes { unmap: true }] {
        rig.request(1, op, false);
        assert_eq!(rig.answer().1, Err(Errno(libc::EROFS)));
    }
    rig.request(2, Op::Read, false);
    assert_eq!(rig.end_io(Ok(())), FileOp::Read);
}
