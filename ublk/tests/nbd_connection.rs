//! The connection machine against a model: any cut of the byte stream, any order of completions, any size of sends.

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use support::{Reply, ReplyReader, request, u32_at, u64_at, write};
use ublk::arena::Arena;
use ublk::nbd::SendBatch;
use ublk::nbd::connection::Connection;
use ublk::nbd::handshake::{Catalog, Offer};
use ublk::nbd::wire::{chunk_type, command, command_flag, error, option_reply};
use ublk::serve::{Allocation, Completion, Errno, Extent, Geometry, Op, Request, ZeroLimits};

const BLOCK: usize = 512;
const SLOT: usize = 8192;
/// Reads come from the first half, which nobody writes; writes go to the second half, each to its own place.
const HALF: usize = 1 << 20;

struct One;

impl Catalog for One {
    fn names(&self) -> Vec<String> {
        vec!["disk".to_owned()]
    }

    fn find(&self, _: &str) -> Option<Offer> {
        let limits = Some(ZeroLimits { granularity_bytes: 4096, max_bytes: 16384 });
        Some(Offer {
            name: "disk".to_owned(),
            description: String::new(),
            geometry: Geometry {
                size_bytes: 2 * HALF as u64,
                logical_block_bytes: BLOCK as u32,
                physical_block_bytes: 4096,
                volatile_cache: true,
                fua: true,
                read_only: false,
                discard: limits,
                write_zeroes: limits,
            },
            multi_conn: false,
            slot_len_bytes: SLOT,
        })
    }
}

/// A connection past its handshake, a client, and a disk whose completions come in any order.
struct World {
    connection: Connection,
    reader: ReplyReader,
    arena: Arena,
    disk: Vec<u8>,
    at_disk: Vec<Request>,
    sending: Option<SendBatch>,
    fail_at: Option<u64>,
    rng: StdRng,
}

impl World {
    fn new(seed: u64, structured: bool, slots: u32) -> Self {
        let disk = (0..2 * HALF).map(|at| if at < HALF { (at / BLOCK * 7 + at % 251) as u8 } else { 0xEE });
        let mut world = Self {
            connection: Connection::new(Arc::new(One)),
            reader: ReplyReader::default(),
            arena: Arena::new(SLOT, slots).expect("arena"),
            disk: disk.collect(),
            at_disk: Vec::new(),
            sending: None,
            fail_at: None,
            rng: StdRng::seed_from_u64(seed),
        };
        let mut hello = support::hello("disk", structured, structured);
        let entry = loop {
            if let Some(entry) = world.connection.take_entry() {
                break entry;
            }
            assert!(world.give(&mut hello) | world.send_some(), "the handshake stands still");
        };
        let slots = std::iter::from_fn(|| world.arena.take()).collect();
        world.connection.enter(&One.find("").expect("one"), &entry, slots);
        while world.send_some() {}
        world.reader.greeting().expect("greeted");
        while let Some(reply) = world.reader.option_reply() {
            assert!(reply.reply < option_reply::ERR_UNSUP, "{reply:?}");
        }
        world
    }

    /// The socket brings some of `bytes`.
    fn give(&mut self, bytes: &mut Vec<u8>) -> bool {
        if bytes.is_empty() {
            return false;
        }
        let Some(mut recv) = self.connection.next_recv() else { return false };
        let most = recv.buffer().len().min(bytes.len());
        let len = if self.rng.random_bool(0.3) { self.rng.random_range(1..=most) } else { most };
        recv.buffer()[..len].copy_from_slice(&bytes[..len]);
        bytes.drain(..len);
        self.connection.received(recv, len);
        true
    }

    /// The socket takes some of what is to be sent.
    fn send_some(&mut self) -> bool {
        let Some(mut batch) = self.sending.take().or_else(|| self.connection.next_send()) else {
            return false;
        };
        let bytes: Vec<u8> = batch.slices().flatten().copied().collect();
        let len =
            if self.rng.random_bool(0.3) { self.rng.random_range(1..=bytes.len()) } else { bytes.len() };
        self.reader.feed(&bytes[..len]);
        if batch.advance(len) {
            self.connection.sent(batch);
        } else {
            self.sending = Some(batch);
        }
        true
    }

    /// The disk ends one of its requests.
    fn end_one(&mut self) -> bool {
        self.at_disk.extend(std::iter::from_fn(|| self.connection.next_request()));
        if let Some(query) = self.connection.next_query() {
            let half = Extent { len_bytes: query.len_bytes / 2, allocation: Allocation::Hole };
            let rest = Extent { len_bytes: u64::MAX, allocation: Allocation::Data };
            self.connection.answer(query, &[half, rest]);
            return true;
        }
        if self.at_disk.is_empty() {
            return false;
        }
        let index = self.rng.random_range(0..self.at_disk.len());
        let Request { tag, op, offset_bytes, len_bytes, mut slot, .. } = self.at_disk.swap_remove(index);
        let range = offset_bytes as usize..(offset_bytes + len_bytes) as usize;
        assert!(range.end <= self.disk.len());
        let failed = self.fail_at.is_some_and(|at| (offset_bytes..offset_bytes + len_bytes).contains(&at));
        match op {
            _ if failed => {}
            Op::Read => slot.as_mut().expect("slot")[..range.len()].copy_from_slice(&self.disk[range]),
            Op::Write => {
                let payload = &slot.as_ref().expect("slot")[..range.len()];
                self.disk[range.clone()].copy_from_slice(payload);
            }
            Op::Discard | Op::WriteZeroes { .. } => {
                assert!(range.start.is_multiple_of(4096) && range.len().is_multiple_of(4096));
                assert!(range.len() <= 16384);
                self.disk[range].fill(0);
            }
            Op::Flush => {}
        }
        let result = if failed { Err(Errno(libc::EIO)) } else { Ok(()) };
        self.connection.complete(Completion { tag, result, slot });
        true
    }

    /// Runs until nothing moves.
    fn run(&mut self, bytes: &mut Vec<u8>) {
        loop {
            let moved = match self.rng.random_range(0..3) {
                0 => self.give(bytes),
                1 => self.send_some(),
                _ => self.end_one(),
            };
            if !moved && !self.give(bytes) && !self.send_some() && !self.end_one() {
                return;
            }
        }
    }

    /// All replies, each request's put together: error and data by offset.
    fn answers(&mut self, reads: &BTreeMap<u64, (u64, u32)>) -> BTreeMap<u64, Answer> {
        let mut answers: BTreeMap<u64, Answer> = BTreeMap::new();
        while let Some(reply) =
            self.reader.reply(|cookie| reads.get(&cookie).map_or(0, |read| read.1 as usize))
        {
            match reply {
                Reply::Simple { cookie, error, data } => {
                    let answer = Answer { error, data: vec![(0, data)], done: 1, ..Answer::default() };
                    assert!(answers.insert(cookie, answer).is_none(), "two replies to {cookie}");
                }
                Reply::Chunk { cookie, done, kind, data } => {
                    let answer = answers.entry(cookie).or_default();
                    assert_eq!(answer.done, 0, "a chunk after the last one");
                    answer.done += u32::from(done);
                    match kind {
                        chunk_type::NONE => assert!(done && data.is_empty()),
                        chunk_type::OFFSET_DATA => answer.data.push((u64_at(&data, 0), data[8..].to_vec())),
                        chunk_type::ERROR => answer.error = u32_at(&data, 0),
                        chunk_type::BLOCK_STATUS => answer.status = data,
                        kind => panic!("chunk of kind {kind}"),
                    }
                }
            }
        }
        assert!(self.reader.is_empty(), "half a reply");
        answers
    }
}

#[derive(Debug, Default)]
struct Answer {
    error: u32,
    data: Vec<(u64, Vec<u8>)>,
    status: Vec<u8>,
    done: u32,
}

impl Answer {
    fn joined(mut self) -> Vec<u8> {
        self.data.sort();
        self.data.into_iter().flat_map(|(_, data)| data).collect()
    }
}

#[derive(Clone, Copy, Debug)]
enum Ask {
    Read { block: u64, blocks: u32 },
    Write { blocks: u32 },
    Zeroes { blocks: u32 },
    Trim { blocks: u32 },
    Flush,
    Status { block: u64, blocks: u32 },
    Refused,
    RefusedWrite { blocks: u32 },
}

fn ask() -> impl Strategy<Value = Ask> {
    let half = (HALF / BLOCK) as u64;
    prop_oneof![
        4 => (0..half - 128, 0..128_u32).prop_map(|(block, blocks)| Ask::Read { block, blocks }),
        4 => (0..50_u32).prop_map(|blocks| Ask::Write { blocks }),
        2 => (0..50_u32).prop_map(|blocks| Ask::Zeroes { blocks }),
        1 => (0..50_u32).prop_map(|blocks| Ask::Trim { blocks }),
        1 => Just(Ask::Flush),
        1 => (0..half - 128, 1..128_u32).prop_map(|(block, blocks)| Ask::Status { block, blocks }),
        1 => Just(Ask::Refused),
        1 => (1..100_u32).prop_map(|blocks| Ask::RefusedWrite { blocks }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn every_request_is_answered_once_and_truly(
        seed: u64,
        structured: bool,
        slots in 2_u32..12,
        asks in prop::collection::vec(ask(), 0..40),
    ) {
        let mut world = World::new(seed, structured, slots);
        let (mut bytes, mut reads, mut errors) = (Vec::new(), BTreeMap::new(), BTreeMap::new());
        let mut expected = world.disk.clone();
        let mut free = HALF;
        for (cookie, ask) in asks.iter().enumerate() {
            let cookie = cookie as u64;
            let mut place = |blocks: u32| {
                let len = blocks as usize * BLOCK;
                let at = free;
                free = at + len;
                (at as u64, len)
            };
            errors.insert(cookie, 0);
            match *ask {
                Ask::Read { block, blocks } => {
                    let (at, len) = (block * BLOCK as u64, blocks * BLOCK as u32);
                    reads.insert(cookie, (at, len));
                    bytes.extend(request(command::READ, 0, cookie, at, len));
                }
                Ask::Write { blocks } => {
                    let (at, len) = place(blocks);
                    let payload: Vec<u8> = (0..len).map(|byte| (cookie as usize * 31 + byte * 3) as u8).collect();
                    bytes.extend(write(command_flag::FUA, cookie, at, &payload));
                    expected[at as usize..at as usize + len].copy_from_slice(&payload);
                }
                Ask::Zeroes { blocks } => {
                    let (at, len) = place(blocks);
                    bytes.extend(request(command::WRITE_ZEROES, 0, cookie, at, len as u32));
                    expected[at as usize..at as usize + len].fill(0);
                }
                Ask::Trim { blocks } => {
                    let (at, len) = place(blocks);
                    bytes.extend(request(command::TRIM, 0, cookie, at, len as u32));
                    let (from, to) = ((at as usize).next_multiple_of(4096), (at as usize + len) / 4096 * 4096);
                    if from < to {
                        expected[from..to].fill(0);
                    }
                }
                Ask::Flush => bytes.extend(request(command::FLUSH, 0, cookie, 0, 0)),
                Ask::Status { block, blocks } => {
                    errors.insert(cookie, if structured { 0 } else { error::EINVAL });
                    let (at, len) = (block * BLOCK as u64, blocks * BLOCK as u32);
                    bytes.extend(request(command::BLOCK_STATUS, 0, cookie, at, len));
                }
                Ask::Refused => {
                    errors.insert(cookie, error::EINVAL);
                    bytes.extend(request(77, 0, cookie, 0, 512));
                }
                Ask::RefusedWrite { blocks } => {
                    errors.insert(cookie, error::ENOSPC);
                    let payload = vec![0x55; blocks as usize * BLOCK];
                    bytes.extend(write(0, cookie, 2 * HALF as u64, &payload));
                }
            }
        }
        world.run(&mut bytes);
        prop_assert!(bytes.is_empty(), "the connection stopped reading");
        let mut answers = world.answers(&reads);
        prop_assert_eq!(answers.len(), asks.len());
        for (cookie, expected_error) in errors {
            let answer = answers.remove(&cookie).expect("answered");
            prop_assert_eq!(answer.done, 1);
            prop_assert_eq!(answer.error, expected_error);
            if let Some(&(at, len)) = reads.get(&cookie) {
                prop_assert_eq!(&answer.joined(), &expected[at as usize..at as usize + len as usize]);
            } else if matches!(asks[cookie as usize], Ask::Status { .. }) && structured {
                prop_assert_eq!(u32_at(&answer.status, 0), 1);
                let told: u32 = answer.status[4..].chunks(8).map(|extent| u32_at(extent, 0)).sum();
                let Ask::Status { blocks, .. } = asks[cookie as usize] else { unreachable!() };
                prop_assert_eq!(told, blocks * BLOCK as u32);
            }
        }
        prop_assert!(world.disk == expected);
        bytes.extend(request(command::DISC, 0, 0, 0, 0));
        world.run(&mut bytes);
        prop_assert!(world.connection.is_over());
        drop(world.connection);
        prop_assert_eq!(world.arena.free_count(), slots as usize);
    }

    #[test]
    fn a_stop_at_any_moment_drains_and_gives_back_all_memory(
        seed: u64,
        structured: bool,
        steps in 0_usize..60,
    ) {
        let mut world = World::new(seed, structured, 6);
        let mut bytes = Vec::new();
        for cookie in 0..10 {
            bytes.extend(request(command::READ, 0, cookie, 0, 40_960));
            bytes.extend(write(0, cookie + 100, HALF as u64, &[1; 20_480]));
            bytes.extend(request(command::FLUSH, 0, cookie + 200, 0, 0));
        }
        for _ in 0..steps {
            match world.rng.random_range(0..3) {
                0 => world.give(&mut bytes),
                1 => world.send_some(),
                _ => world.end_one(),
            };
        }
        world.at_disk.extend(std::iter::from_fn(|| world.connection.next_request()));
        let lent = world.connection.next_recv();
        let before = world.disk.clone();
        world.connection.stop();
        prop_assert!(world.connection.next_request().is_none() && world.connection.next_recv().is_none());
        prop_assert_eq!(world.connection.is_drained(), world.at_disk.is_empty());
        if let Some(recv) = lent {
            prop_assert!(!world.connection.is_over());
            world.connection.received(recv, 0);
        }
        if let Some(batch) = world.sending.take() {
            world.connection.sent(batch);
        }
        while world.end_one() {}
        prop_assert!(world.connection.is_drained() && world.connection.is_over());
        prop_assert!(!world.send_some());
        prop_assert!(before.len() == world.disk.len());
        drop(world.connection);
        prop_assert_eq!(world.arena.free_count(), 6);
    }
}

#[test]
fn an_error_of_the_disk_reaches_the_client() {
    for (structured, len) in [(true, 4096), (true, 65536), (false, 4096)] {
        let mut world = World::new(2, structured, 12);
        world.fail_at = Some(0);
        let mut bytes = request(command::READ, 0, 9, 0, len);
        world.run(&mut bytes);
        let answers = world.answers(&BTreeMap::from([(9, (0, len))]));
        assert_eq!(answers[&9].error, error::EIO);
        assert_eq!(answers[&9].done, 1);
    }
}

#[test]
fn a_simple_read_that_fails_after_its_head_breaks_the_connection() {
    let mut world = World::new(3, false, 12);
    world.fail_at = Some(60_000);
    let mut bytes = request(command::READ, 0, 9, 0, 65536);
    while !world.connection.is_stopped() {
        let moved = world.give(&mut bytes) | world.send_some();
        world.at_disk.extend(std::iter::from_fn(|| world.connection.next_request()));
        world.at_disk.sort_by_key(|request| std::cmp::Reverse(request.offset_bytes));
        let first = world.at_disk.pop();
        let rest = std::mem::replace(&mut world.at_disk, first.into_iter().collect());
        let ended = world.end_one();
        world.at_disk.extend(rest);
        assert!(moved || ended, "neither answered nor broken");
    }
}

#[test]
fn a_client_that_takes_no_replies_is_not_read_for_ever() {
    let mut world = World::new(4, true, 4);
    let one = request(77, 0, 1, 0, 0);
    let mut taken = 0;
    while let Some(mut recv) = world.connection.next_recv() {
        let room = recv.buffer().len() / one.len() * one.len();
        recv.buffer()[..room].copy_from_slice(&one.repeat(room / one.len()));
        world.connection.received(recv, room);
        taken += room;
        assert!(taken < 1 << 20, "read without bound");
    }
}

#[test]
fn nonsense_breaks_the_connection() {
    let mut world = World::new(5, true, 4);
    let mut bytes = vec![0xFF; 4096];
    world.run(&mut bytes);
    assert!(world.connection.is_over());
}
