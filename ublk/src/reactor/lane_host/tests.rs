use super::*;
use crate::arena::Arena;
use crate::serve::FileId;

fn io(op: FileOp, len_bytes: u64, buffer: IoBuffer) -> FileIo {
    FileIo { token: 5, file: FileId(0), op, offset_bytes: 4096, len_bytes, buffer_offset_bytes: 0, buffer }
}

fn owned() -> IoBuffer {
    IoBuffer::Owned(Arena::new(8192, 1).expect("arena").take().expect("slot"))
}

fn files() -> Vec<FixedFile> {
    crate::reactor::ring::fixed_files_for_tests(1)
}

fn transfer(op: FileOp, len_bytes: u64, buffer: IoBuffer) -> Transfer {
    Transfer::new(io(op, len_bytes, buffer), &files()).unwrap_or_else(|_| panic!("well-formed"))
}

#[test]
fn a_short_transfer_goes_on_where_it_stopped() {
    let mut write = transfer(FileOp::Write { dsync: true }, 8192, owned());
    assert_eq!(write.advance(4096), Step::Again);
    assert_eq!((write.done_bytes, write.len_bytes), (4096, 8192));
    assert_eq!(write.advance(4096), Step::Done(Ok(())));
}

#[test]
fn the_end_of_the_file_is_an_error_not_a_success() {
    let mut read = transfer(FileOp::Read, 8192, owned());
    assert_eq!(read.advance(4096), Step::Again);
    assert_eq!(read.advance(0), Step::Done(Err(Errno(libc::EIO))));
}

#[test]
fn interruptions_are_retried_with_a_bound_and_other_errors_are_not() {
    let mut read = transfer(FileOp::Read, 4096, owned());
    for _ in 0..RETRIES_MAX {
        assert_eq!(read.advance(-libc::EAGAIN), Step::Again);
    }
    assert_eq!(read.advance(-libc::EAGAIN), Step::Done(Err(Errno(libc::EAGAIN))));
    let mut sync = transfer(FileOp::Sync, 0, IoBuffer::None);
    assert_eq!(sync.advance(-libc::EIO), Step::Done(Err(Errno(libc::EIO))));
    assert_eq!(transfer(FileOp::PunchHole, 4096, IoBuffer::None).advance(0), Step::Done(Ok(())));
}

#[test]
fn malformed_io_comes_back_with_its_buffer() {
    let shared = || match owned() {
        IoBuffer::Owned(slot) => IoBuffer::Shared(slot.share()),
        other => other,
    };
    let bad = [
        io(FileOp::Read, 4096, shared()),
        io(FileOp::Read, 4096, IoBuffer::None),
        io(FileOp::Write { dsync: false }, 8193, owned()),
        io(FileOp::Write { dsync: false }, 0, owned()),
        FileIo { buffer_offset_bytes: 4097, ..io(FileOp::Write { dsync: false }, 4096, owned()) },
        FileIo { file: FileId(1), ..io(FileOp::Read, 4096, owned()) },
        io(FileOp::Sync, 0, owned()),
        io(FileOp::PunchHole, 0, IoBuffer::None),
    ];
    for io in bad {
        let shown = format!("{io:?}");
        let refused = Transfer::new(io, &files());
        assert_eq!(refused.map(|_| ()).map_err(|(token, _)| token), Err(5), "{shown}");
    }
}
