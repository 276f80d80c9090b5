use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU32};

use super::*;
use crate::arena::Arena;
use crate::reactor::lane_host::LaneHost;
use crate::serve::*;

const SETTINGS: ReactorSettings = ReactorSettings { thread_count: 2, ring_entries: 8 };

fn scratch(name: &str, len_bytes: u64) -> File {
    let path = std::env::temp_dir().join(format!("holdfast-reactor-{name}-{}", std::process::id()));
    let file =
        File::options().read(true).write(true).create(true).truncate(true).open(&path).expect("scratch");
    std::fs::remove_file(&path).expect("unlink");
    file.set_len(len_bytes).expect("length");
    file
}

/// Counts wake-ups and ends when told.
struct Sleeper {
    wakes: Arc<AtomicU32>,
    dropped: Arc<AtomicBool>,
    done: bool,
}

impl Source for Sleeper {
    fn completed(&mut self, _: Token, _: i32, _: u32, _: &mut SourceRing<'_>) {}
    fn woken(&mut self, _: &mut SourceRing<'_>) {
        self.wakes.fetch_add(1, Ordering::SeqCst);
    }
    fn stopping(&mut self, _: &mut SourceRing<'_>) {
        self.done = true;
    }
    fn finished(&self) -> bool {
        self.done
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        self.dropped.store(true, Ordering::SeqCst);
    }
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "{what} never came");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn wakes_reach_a_sleeping_thread_and_stop_drops_the_source() {
    let reactors = Reactors::start(SETTINGS).expect("reactors");
    let (wakes, dropped) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicBool::new(false)));
    let (send_waker, waker) = mpsc::channel();
    let source = Sleeper { wakes: Arc::clone(&wakes), dropped: Arc::clone(&dropped), done: false };
    let handle = reactors
        .attach(Box::new(move |ring| {
            send_waker.send(ring.waker()).expect("receiver");
            Ok(Box::new(source) as Box<dyn Source>)
        }))
        .expect("attach");
    let waker = waker.recv().expect("waker");
    for round in 1..=100 {
        waker.wake();
        wait_until("wake", || wakes.load(Ordering::SeqCst) >= round);
    }
    assert!(!handle.wait(Duration::from_millis(1)));
    handle.stop();
    assert!(handle.wait(Duration::from_secs(20)));
    assert!(dropped.load(Ordering::SeqCst));
    waker.wake();
    handle.stop();
}

#[test]
fn a_source_that_cannot_start_leaves_nothing_behind() {
    let reactors = Reactors::start(SETTINGS).expect("reactors");
    let file = scratch("failing", 4096);
    for _ in 0..3 {
        let clone = file.try_clone().expect("clone");
        let failed = reactors.attach(Box::new(move |ring| {
            ring.install(clone.as_fd())?;
            Err(io::Error::other("no"))
        }));
        assert!(matches!(failed, Err(ReactorError::Attach { .. })));
    }
}

/// A disk of one file whose lane copies block 0 to block 1 through its own slots for each request.
struct Copier {
    files: [File; 1],
}

struct CopierLane {
    slot: Option<Slot>,
}

use crate::arena::Slot;

impl Disk for Copier {
    fn geometry(&self) -> Geometry {
        Geometry {
            size_bytes: 8192,
            logical_block_bytes: 512,
            physical_block_bytes: 4096,
            volatile_cache: true,
            fua: true,
            read_only: false,
            discard: None,
            write_zeroes: None,
        }
    }
    fn files(&self) -> &[File] {
        &self.files
    }
    fn lane(self: Arc<Self>, _: Waker) -> Box<dyn Lane> {
        Box::new(CopierLane { slot: None })
    }
}

fn transfer(token: u64, op: FileOp, offset_bytes: u64, buffer: IoBuffer) -> FileIo {
    FileIo { token, file: FileId(0), op, offset_bytes, len_bytes: 4096, buffer_offset_bytes: 0, buffer }
}

impl Lane for CopierLane {
    fn request(&mut self, request: Request, port: &mut dyn Port) {
        assert_eq!(request.op, Op::Flush);
        let slot = port.take_slot().expect("a free slot");
        port.submit(transfer(request.tag, FileOp::Read, 0, IoBuffer::Owned(slot)));
    }

    fn file_done(&mut self, token: u64, result: Result<(), Errno>, buffer: IoBuffer, port: &mut dyn Port) {
        result.expect("I/O works");
        match buffer {
            IoBuffer::Owned(slot) => {
                let shared = slot.share();
                self.slot = None;
                let write = FileOp::Write { dsync: true };
                port.submit(transfer(token, write, 4096, IoBuffer::Shared(shared)));
            }
            IoBuffer::Shared(_) => {
                port.submit(FileIo { len_bytes: 0, ..transfer(token, FileOp::Sync, 0, IoBuffer::None) });
            }
            IoBuffer::None => port.complete(Completion { tag: token, result: Ok(()), slot: None }),
        }
    }

    fn wake(&mut self, _: &mut dyn Port) {}
}

/// A door that asks for a number of copies at once and then ends.
struct Door {
    host: LaneHost,
    waiting: u32,
}

impl Door {
    fn take(&mut self) {
        for completion in self.host.completions() {
            completion.result.expect("copied");
            self.waiting -= 1;
        }
    }
}

impl Source for Door {
    fn completed(&mut self, token: Token, result: i32, _: u32, ring: &mut SourceRing<'_>) {
        assert_eq!(token.kind, Token::LANE_IO);
        self.host.file_completed(token.key, result, ring);
        self.take();
    }
    fn woken(&mut self, ring: &mut SourceRing<'_>) {
        self.host.wake(ring);
        self.take();
    }
    fn stopping(&mut self, _: &mut SourceRing<'_>) {}
    fn finished(&self) -> bool {
        self.waiting == 0 && self.host.transfer_count() == 0
    }
}

/// More requests than the submission queue has entries, so that the backlog is used too.
#[test]
fn a_lane_does_file_io_through_its_port() {
    let reactors = Reactors::start(SETTINGS).expect("reactors");
    let file = scratch("copier", 8192);
    file.write_all_at(&[0xa5; 4096], 0).expect("write");
    let disk = Arc::new(Copier { files: [file.try_clone().expect("clone")] });
    let arena = Arena::new(4096, 64).expect("arena");
    let door_arena = arena.clone();
    let handle = reactors
        .attach(Box::new(move |ring| {
            let mut door = Door { host: LaneHost::open(disk, door_arena, ring)?, waiting: 64 };
            for tag in 0..64 {
                let flush =
                    Request { tag, op: Op::Flush, offset_bytes: 0, len_bytes: 0, fua: false, slot: None };
                door.host.request(flush, ring);
            }
            Ok(Box::new(door) as Box<dyn Source>)
        }))
        .expect("attach");
    assert!(handle.wait(Duration::from_secs(20)), "all copies end");
    let mut copied = [0; 4096];
    file.read_exact_at(&mut copied, 4096).expect("read");
    assert_eq!(copied, [0xa5; 4096]);
    assert_eq!(arena.free_count(), 64);
}
