//! A hostile NBD client after the handshake. Input: a byte of switches, a byte that seeds the order of events, then the
//! client's bytes. Whatever they are, requests stay inside the disk, and in the end all memory is back.

use std::sync::Arc;

use ublk::arena::Arena;
use ublk::nbd::connection::Connection;
use ublk::nbd::handshake::{Catalog, Offer};
use ublk::nbd::wire::{self, option};
use ublk::serve::{Allocation, Completion, Errno, Extent, Geometry, Op, Request, ZeroLimits};

const SIZE_BYTES: u64 = 1 << 20;
const SLOTS: u32 = 4;
const SLOT_BYTES: usize = 8192;

pub fn run(data: &[u8]) {
    let [switches, seed, bytes @ ..] = data else { return };
    let (structured, read_only, failing) = (switches & 1 != 0, switches & 2 != 0, switches & 4 != 0);
    let arena = Arena::new(SLOT_BYTES, SLOTS).expect("a small arena");
    let catalog = Arc::new(One { read_only });
    let mut world = World {
        connection: Connection::new(Arc::clone(&catalog) as _),
        at_disk: Vec::new(),
        random: u32::from(*seed) | 0x100,
        failing,
    };
    world.run(&mut hello(structured));
    let entry = world.connection.take_entry().expect("the canned handshake enters");
    let slots = std::iter::from_fn(|| arena.take()).collect();
    let offer = catalog.find("").expect("the only export");
    world.connection.enter(&offer, &entry, slots);
    world.run(&mut bytes.to_vec());
    world.connection.finish();
    world.run(&mut Vec::new());
    assert!(world.connection.is_over(), "nothing is left to do, and yet it is not over");
    drop(world);
    assert_eq!(arena.free_count(), SLOTS as usize, "memory was lost");
}

struct World {
    connection: Connection,
    at_disk: Vec<Request>,
    random: u32,
    failing: bool,
}

impl World {
    fn random(&mut self, below: usize) -> usize {
        self.random = self.random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (self.random >> 8) as usize % below
    }

    fn run(&mut self, bytes: &mut Vec<u8>) {
        let mut idle = 0;
        while idle < 3 {
            let moved = match self.random(3) {
                0 => self.give(bytes),
                1 => self.send(),
                _ => self.end_one(),
            };
            idle = if moved || self.give(bytes) || self.send() || self.end_one() { 0 } else { idle + 1 };
        }
    }

    fn give(&mut self, bytes: &mut Vec<u8>) -> bool {
        if bytes.is_empty() {
            return false;
        }
        let Some(mut recv) = self.connection.next_recv() else { return false };
        let len = 1 + self.random(recv.buffer().len().min(bytes.len()));
        recv.buffer()[..len].copy_from_slice(&bytes[..len]);
        bytes.drain(..len);
        self.connection.received(recv, len);
        true
    }

    fn send(&mut self) -> bool {
        let Some(mut batch) = self.connection.next_send() else { return false };
        let len: usize = batch.slices().map(<[u8]>::len).sum();
        assert!(batch.advance(len), "a batch sent whole is sent");
        self.connection.sent(batch);
        true
    }

    fn end_one(&mut self) -> bool {
        self.at_disk.extend(std::iter::from_fn(|| self.connection.next_request()));
        if let Some(query) = self.connection.next_query() {
            assert!(query.offset_bytes + query.len_bytes <= SIZE_BYTES);
            let extent = Extent { len_bytes: query.len_bytes / 2, allocation: Allocation::Hole };
            self.connection.answer(query, &[extent]);
            return true;
        }
        if self.at_disk.is_empty() {
            return false;
        }
        let index = self.random(self.at_disk.len());
        let Request { tag, op, offset_bytes, len_bytes, slot, .. } = self.at_disk.swap_remove(index);
        assert!(offset_bytes.checked_add(len_bytes).is_some_and(|end| end <= SIZE_BYTES));
        let with_memory = matches!(op, Op::Read | Op::Write);
        assert_eq!(slot.is_some(), with_memory);
        assert!(!with_memory || (1..=SLOT_BYTES as u64).contains(&len_bytes));
        let result = if self.failing && self.random(4) == 0 { Err(Errno(5)) } else { Ok(()) };
        self.connection.complete(Completion { tag, result, slot });
        true
    }
}

fn hello(structured: bool) -> Vec<u8> {
    let mut bytes = 3_u32.to_be_bytes().to_vec();
    let mut put = |option: u32, data: &[u8]| {
        bytes.extend(wire::OPTION_MAGIC.to_be_bytes());
        bytes.extend(option.to_be_bytes());
        bytes.extend((data.len() as u32).to_be_bytes());
        bytes.extend(data);
    };
    if structured {
        put(option::STRUCTURED_REPLY, &[]);
        let mut contexts = vec![0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, wire::BASE_ALLOCATION.len() as u8];
        contexts.extend(wire::BASE_ALLOCATION.as_bytes());
        put(option::SET_META_CONTEXT, &contexts);
    }
    put(option::GO, &[0; 6]);
    bytes
}

struct One {
    read_only: bool,
}

impl Catalog for One {
    fn names(&self) -> Vec<String> {
        Vec::new()
    }

    fn find(&self, _: &str) -> Option<Offer> {
        let limits = Some(ZeroLimits { granularity_bytes: 4096, max_bytes: 65536 });
        Some(Offer {
            name: "disk".to_owned(),
            description: String::new(),
            geometry: Geometry {
                size_bytes: SIZE_BYTES,
                logical_block_bytes: 512,
                physical_block_bytes: 4096,
                volatile_cache: true,
                fua: true,
                read_only: self.read_only,
                discard: limits,
                write_zeroes: limits,
            },
            multi_conn: false,
            slot_len_bytes: SLOT_BYTES,
        })
    }
}
