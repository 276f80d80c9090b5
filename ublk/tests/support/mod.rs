//! An NBD client's half of the wire for tests: bytes out, replies in.

#![allow(dead_code, reason = "each test binary uses its own part")]

pub(crate) mod client;
pub(crate) mod memory_disk;
pub(crate) mod server;

use ublk::nbd::wire::{self, option};

/// Client flags and options up to (and with) GO.
pub(crate) fn hello(export: &str, structured: bool, block_status: bool) -> Vec<u8> {
    let mut bytes = 3_u32.to_be_bytes().to_vec();
    if structured {
        bytes.extend(option_bytes(option::STRUCTURED_REPLY, &[]));
    }
    if block_status {
        let query = [&1_u32.to_be_bytes()[..], &counted(wire::BASE_ALLOCATION)].concat();
        let data = [&counted(export)[..], &query].concat();
        bytes.extend(option_bytes(option::SET_META_CONTEXT, &data));
    }
    bytes.extend(option_bytes(option::GO, &[&counted(export)[..], &[0, 1, 0, 3]].concat()));
    bytes
}

/// One option of the handshake.
pub(crate) fn option_bytes(option: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = wire::OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

fn counted(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes()[..], text.as_bytes()].concat()
}

/// The head of a request; a write's payload goes after it.
pub(crate) fn request(command: u16, flags: u16, cookie: u64, offset_bytes: u64, len_bytes: u32) -> Vec<u8> {
    let mut bytes = wire::REQUEST_MAGIC.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset_bytes.to_be_bytes());
    bytes.extend(len_bytes.to_be_bytes());
    bytes
}

/// A write with its payload.
pub(crate) fn write(flags: u16, cookie: u64, offset_bytes: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = request(wire::command::WRITE, flags, cookie, offset_bytes, payload.len() as u32);
    bytes.extend(payload);
    bytes
}

/// What the server said in the handshake.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct OptionReply {
    pub(crate) option: u32,
    pub(crate) reply: u32,
    pub(crate) data: Vec<u8>,
}

/// A message of the transmission phase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    /// A simple reply with its data.
    Simple { cookie: u64, error: u32, data: Vec<u8> },
    /// A chunk.
    Chunk { cookie: u64, done: bool, kind: u16, data: Vec<u8> },
}

/// Splits the server's bytes.
#[derive(Default)]
pub(crate) struct ReplyReader {
    bytes: Vec<u8>,
}

impl ReplyReader {
    pub(crate) fn feed(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub(crate) fn greeting(&mut self) -> Option<()> {
        let bytes = self.take(18)?;
        assert_eq!(bytes[..8], wire::GREETING_MAGIC.to_be_bytes());
        assert_eq!(bytes[8..16], wire::OPTION_MAGIC.to_be_bytes());
        Some(())
    }

    pub(crate) fn option_reply(&mut self) -> Option<OptionReply> {
        let head = self.bytes.get(..20)?;
        assert_eq!(head[..8], wire::OPTION_REPLY_MAGIC.to_be_bytes());
        let (option, reply) = (u32_at(head, 8), u32_at(head, 12));
        let data = self.take(20 + u32_at(head, 16) as usize)?.split_off(20);
        Some(OptionReply { option, reply, data })
    }

    /// The next message; `read_len` tells how much data a successful simple reply to a cookie has.
    pub(crate) fn reply(&mut self, read_len: impl Fn(u64) -> usize) -> Option<Reply> {
        let head = self.bytes.get(..16)?;
        match u32_at(head, 0) {
            wire::SIMPLE_REPLY_MAGIC => {
                let (error, cookie) = (u32_at(head, 4), u64_at(head, 8));
                let len = if error == 0 { read_len(cookie) } else { 0 };
                let data = self.take(16 + len)?.split_off(16);
                Some(Reply::Simple { cookie, error, data })
            }
            wire::CHUNK_MAGIC => {
                let head = self.bytes.get(..20)?;
                let (flags, kind) = (u16_at(head, 4), u16_at(head, 6));
                let cookie = u64_at(head, 8);
                let data = self.take(20 + u32_at(head, 16) as usize)?.split_off(20);
                Some(Reply::Chunk { cookie, done: flags & wire::CHUNK_DONE != 0, kind, data })
            }
            magic => panic!("the server said {magic:#x}, which is no reply"),
        }
    }

    fn take(&mut self, len: usize) -> Option<Vec<u8>> {
        if self.bytes.len() < len {
            return None;
        }
        let rest = self.bytes.split_off(len);
        Some(std::mem::replace(&mut self.bytes, rest))
    }
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(bytes[at..at + 2].try_into().expect("two bytes"))
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
