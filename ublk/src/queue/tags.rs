//! Who has each tag of a queue, and which slot goes with it. No I/O.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::arena::{Arena, Slot};
use crate::serve::{Completion, Errno, Op, Request};
use crate::uapi::{self, IoDesc};

/// The tags of one queue.
pub(super) struct Tags {
    tags: Box<[Tag]>,
    /// Where a lost slot is replaced from.
    arena: Arena,
    told_lost_slot: bool,
    ended: usize,
    size_bytes: Arc<AtomicU64>,
    block_mask: u64,
}

/// A tag's state. Its slot is never free while the driver may copy to it.
enum Tag {
    /// With the driver, which may copy a write's data into the slot at any time.
    Driver(Slot),
    /// With the lane. `slot` stays here for requests without data; a request with data took it along.
    Lane { slot: Option<Slot>, answer_bytes: i32 },
    /// The driver gave it back for good.
    Ended,
}

/// What to do with a tag that brought a request.
#[derive(Debug)]
pub(super) enum Arrival {
    /// Hand it to the lane.
    Serve(Request),
    /// Answer it at once: it is malformed.
    Answer(Commit),
}

/// A command to the driver for one tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Commit {
    pub(super) tag: u16,
    /// Bytes done, or a negative errno.
    pub(super) result: i32,
    /// Of the slot that holds a read's data now and takes the next write's.
    pub(super) address: u64,
}

impl Tags {
    /// Takes a slot for each tag, or none if the arena has too few.
    pub(super) fn new(
        depth: u16,
        size_bytes: Arc<AtomicU64>,
        logical_block_bytes: u32,
        arena: &Arena,
    ) -> Option<Self> {
        let tags = (0..depth).map(|_| arena.take().map(Tag::Driver)).collect::<Option<_>>()?;
        Some(Self {
            tags,
            arena: arena.clone(),
            told_lost_slot: false,
            ended: 0,
            size_bytes,
            block_mask: u64::from(logical_block_bytes) - 1,
        })
    }

    /// The first fetch of a tag.
    pub(super) fn fetch(&self, tag: u16) -> Commit {
        let Tag::Driver(slot) = &self.tags[usize::from(tag)] else {
            unreachable!("a tag is fetched first of all");
        };
        Commit { tag, result: 0, address: slot.as_ptr() as u64 }
    }

    /// Takes the request of a tag that the driver had.
    pub(super) fn arrived(&mut self, tag: u16, desc: IoDesc) -> Arrival {
        let place = &mut self.tags[usize::from(tag)];
        let Tag::Driver(slot) = std::mem::replace(place, Tag::Ended) else {
            unreachable!("the driver completes a command once, and each tag has one command");
        };
        let len_bytes = u64::from(desc.nr_sectors) << 9;
        let request = Request {
            tag: u64::from(tag),
            op: Op::Flush,
            offset_bytes: desc.start_sector.wrapping_shl(9),
            len_bytes,
            fua: desc.op_flags & uapi::IO_F_FUA != 0,
            slot: None,
        };
        let op = match desc.op_flags & 0xff {
            uapi::IO_OP_READ => Op::Read,
            uapi::IO_OP_WRITE => Op::Write,
            uapi::IO_OP_FLUSH => Op::Flush,
            uapi::IO_OP_DISCARD => Op::Discard,
            uapi::IO_OP_WRITE_ZEROES => Op::WriteZeroes { unmap: desc.op_flags & uapi::IO_F_NOUNMAP == 0 },
            _ => return self.answer(tag, slot, libc::EOPNOTSUPP),
        };
        let has_data = matches!(op, Op::Read | Op::Write);
        if op == Op::Flush {
            let request = Request { offset_bytes: 0, len_bytes: 0, ..request };
            self.tags[usize::from(tag)] = Tag::Lane { slot: Some(slot), answer_bytes: 0 };
            return Arrival::Serve(request);
        }
        let aligned = (request.offset_bytes | len_bytes) & self.block_mask == 0;
        let inside = desc.start_sector < 1 << 55
            && request
                .offset_bytes
                .checked_add(len_bytes)
                .is_some_and(|end| end <= self.size_bytes.load(Ordering::Relaxed));
        if !aligned || len_bytes == 0 {
            return self.answer(tag, slot, libc::EINVAL);
        }
        if !inside || (has_data && len_bytes > slot.len() as u64) {
            return self.answer(tag, slot, libc::EIO);
        }
        let (kept, given) = if has_data { (None, Some(slot)) } else { (Some(slot), None) };
        let answer_bytes = if has_data { len_bytes as i32 } else { 0 };
        self.tags[usize::from(tag)] = Tag::Lane { slot: kept, answer_bytes };
        Arrival::Serve(Request { op, slot: given, ..request })
    }

    /// Takes the lane's answer; the tag and the answer's slot are the driver's from now on.
    ///
    /// A lane that keeps a slot breaks its contract, but the other disks of the process must not pay for that: the request fails and the tag
    /// gets another slot. None when there is none either: then the request stays unanswered.
    pub(super) fn complete(&mut self, completion: Completion) -> Option<Commit> {
        let tag = completion.tag as u16;
        let place = &mut self.tags[usize::from(tag)];
        let Tag::Lane { slot: kept, answer_bytes } = std::mem::replace(place, Tag::Ended) else {
            panic!("a lane answers each request once (tag {tag})");
        };
        let result = match completion.result {
            Ok(()) => answer_bytes,
            Err(Errno(errno)) => -errno,
        };
        let (slot, result) = match kept.or(completion.slot) {
            Some(slot) => (slot, result),
            None => {
                if !std::mem::replace(&mut self.told_lost_slot, true) {
                    tracing::error!(
                        tag,
                        "a request was answered without its buffer: it fails with an I/O error"
                    );
                }
                (self.arena.take()?, -libc::EIO)
            }
        };
        let address = slot.as_ptr() as u64;
        *place = Tag::Driver(slot);
        Some(Commit { tag, result, address })
    }

    /// The driver gave the tag back and takes no more of it.
    pub(super) fn end(&mut self, tag: u16) {
        self.tags[usize::from(tag)] = Tag::Ended;
        self.ended += 1;
    }

    /// Whether the driver has given back every tag.
    pub(super) fn all_ended(&self) -> bool {
        self.ended == self.tags.len()
    }

    /// Whether the lane owes no answer.
    pub(super) fn none_with_lane(&self) -> bool {
        !self.tags.iter().any(|tag| matches!(tag, Tag::Lane { .. }))
    }

    fn answer(&mut self, tag: u16, slot: Slot, errno: i32) -> Arrival {
        let address = slot.as_ptr() as u64;
        self.tags[usize::from(tag)] = Tag::Driver(slot);
        Arrival::Answer(Commit { tag, result: -errno, address })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tags(depth: u16, arena: &Arena) -> Option<Tags> {
        Tags::new(depth, Arc::new(AtomicU64::new(1 << 20)), 4096, arena)
    }

    fn desc(op_flags: u32, start_sector: u64, nr_sectors: u32) -> IoDesc {
        IoDesc { op_flags, nr_sectors, start_sector, addr: 0 }
    }

    fn serve(arrival: Arrival) -> Request {
        match arrival {
            Arrival::Serve(request) => request,
            Arrival::Answer(commit) => panic!("answered {commit:?}"),
        }
    }

    #[test]
    fn a_write_takes_its_slot_along_and_the_commit_lends_the_one_that_came_back() {
        let arena = Arena::new(8192, 3).expect("arena");
        let mut tags = self::tags(2, &arena).expect("slots");
        let lent = tags.fetch(1).address;
        let request = serve(tags.arrived(1, desc(uapi::IO_OP_WRITE | uapi::IO_F_FUA, 8, 16)));
        assert_eq!((request.op, request.offset_bytes, request.len_bytes), (Op::Write, 4096, 8192));
        assert!(request.fua);
        let kept = request.slot.expect("a write brings its slot");
        assert_eq!(kept.as_ptr() as u64, lent);
        assert!(!tags.none_with_lane());
        let fresh = arena.take().expect("the third slot");
        let address = fresh.as_ptr() as u64;
        let commit = tags.complete(Completion { tag: request.tag, result: Ok(()), slot: Some(fresh) });
        assert_eq!(commit, Some(Commit { tag: 1, result: 8192, address }));
        assert_ne!(address, lent);
        assert!(tags.none_with_lane());
        drop(kept);
        assert_eq!(arena.free_count(), 1, "the lane's slot is free, both tags hold theirs");
    }

    #[test]
    fn requests_without_data_leave_the_slot_with_the_tag() {
        let arena = Arena::new(8192, 1).expect("arena");
        let mut tags = self::tags(1, &arena).expect("slots");
        let lent = tags.fetch(0).address;
        let ops = [
            (uapi::IO_OP_FLUSH, Op::Flush),
            (uapi::IO_OP_DISCARD, Op::Discard),
            (uapi::IO_OP_WRITE_ZEROES, Op::WriteZeroes { unmap: true }),
            (uapi::IO_OP_WRITE_ZEROES | uapi::IO_F_NOUNMAP, Op::WriteZeroes { unmap: false }),
        ];
        for (op_flags, op) in ops {
            // Longer than the slot: there is no data.
            let request = serve(tags.arrived(0, desc(op_flags, 0, 64)));
            assert_eq!(request.op, op);
            assert!(request.slot.is_none());
            let answer = Completion { tag: 0, result: Err(Errno(libc::EIO)), slot: None };
            assert_eq!(tags.complete(answer), Some(Commit { tag: 0, result: -libc::EIO, address: lent }));
        }
    }

    #[test]
    fn an_answer_without_its_slot_fails_the_request_and_no_more() {
        let arena = Arena::new(8192, 2).expect("arena");
        let mut tags = self::tags(1, &arena).expect("slots");
        for op_flags in [uapi::IO_OP_WRITE, uapi::IO_OP_READ] {
            drop(serve(tags.arrived(0, desc(op_flags, 8, 16))).slot);
            let commit =
                tags.complete(Completion { tag: 0, result: Ok(()), slot: None }).expect("a free slot");
            assert_eq!((commit.tag, commit.result), (0, -libc::EIO));
            assert_eq!(arena.free_count(), 1, "the tag has a slot again");
        }
        let request = serve(tags.arrived(0, desc(uapi::IO_OP_WRITE, 8, 16)));
        let other = arena.take();
        assert_eq!(tags.complete(Completion { tag: 0, result: Ok(()), slot: None }), None, "no slot is free");
        drop((request, other));
    }

    #[test]
    fn malformed_requests_never_reach_the_lane() {
        let arena = Arena::new(8192, 1).expect("arena");
        let mut tags = self::tags(1, &arena).expect("slots");
        let address = tags.fetch(0).address;
        let bad = [
            (desc(uapi::IO_OP_READ, 1, 8), libc::EINVAL),
            (desc(uapi::IO_OP_READ, 0, 0), libc::EINVAL),
            (desc(uapi::IO_OP_READ, 0, 24), libc::EIO),
            (desc(uapi::IO_OP_WRITE, 2040, 16), libc::EIO),
            (desc(uapi::IO_OP_DISCARD, 1 << 55, 8), libc::EIO),
            (desc(uapi::IO_OP_WRITE, u64::MAX - 7, 8), libc::EIO),
            (desc(17, 0, 8), libc::EOPNOTSUPP),
        ];
        for (desc, errno) in bad {
            match tags.arrived(0, desc) {
                Arrival::Answer(commit) => assert_eq!(commit, Commit { tag: 0, result: -errno, address }),
                Arrival::Serve(request) => panic!("{desc:?} was served as {request:?}"),
            }
        }
    }

    #[test]
    fn a_device_that_grows_takes_requests_behind_its_former_end() {
        let arena = Arena::new(8192, 1).expect("arena");
        let size_bytes = Arc::new(AtomicU64::new(1 << 20));
        let mut tags = Tags::new(1, Arc::clone(&size_bytes), 4096, &arena).expect("slots");
        let behind = desc(uapi::IO_OP_WRITE, 2048, 16);
        assert!(matches!(tags.arrived(0, behind), Arrival::Answer(commit) if commit.result == -libc::EIO));
        size_bytes.store(2 << 20, Ordering::Relaxed);
        assert_eq!(serve(tags.arrived(0, behind)).offset_bytes, 1 << 20);
    }

    #[test]
    fn a_queue_has_ended_when_every_tag_has_and_then_holds_no_slot() {
        let arena = Arena::new(4096, 2).expect("arena");
        assert!(tags(3, &arena).is_none(), "too few slots");
        let mut tags = self::tags(2, &arena).expect("slots");
        tags.end(0);
        assert!(!tags.all_ended());
        tags.end(1);
        assert!(tags.all_ended());
        assert_eq!(arena.free_count(), 2);
    }
}
