//! The handshake: option haggling of fixed newstyle, as a machine over bytes. It ends when the client enters transmission,
//! aborts, or breaks the protocol.

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use super::wire::{
    self, BASE_ALLOCATION, BASE_ALLOCATION_ID, Greeting, MAX_PAYLOAD_BYTES, MAX_STRING_BYTES, OptionHead,
    OptionReplyHead, handshake_flag, info, option, option_reply, transmission_flag,
};
use crate::serve::Geometry;

/// Longest data of one option, in bytes: a name, its head and a few queries.
pub const MAX_OPTION_BYTES: usize = 12 << 10;
/// Longest data of one option that is read only to be skipped, in bytes; beyond it the client is hostile.
const MAX_SKIPPED_OPTION_BYTES: u32 = 1 << 20;
/// Options of one connection before the server hangs up.
const MAX_OPTIONS: u32 = 512;
/// Queries in one metadata option.
const MAX_QUERIES: u32 = 64;
/// Smallest slot with which unfragmented reads can be promised, in bytes: the protocol's minimum for them.
pub const MIN_UNFRAGMENTED_BYTES: usize = 64 << 10;

/// What the handshake asks about exports.
pub trait Catalog: Send + Sync {
    /// Names of the exports that a client may list.
    fn names(&self) -> Vec<String>;
    /// The export of a name; the empty name is the default export.
    fn find(&self, name: &str) -> Option<Offer>;
}

/// What a client is told of an export.
#[derive(Clone, Debug)]
pub struct Offer {
    /// Canonical name.
    pub name: String,
    /// Text for a human.
    pub description: String,
    /// The disk behind it.
    pub geometry: Geometry,
    /// One client's sockets are coherent, and told apart from those of another client.
    pub multi_conn: bool,
    /// Longest read that one slot holds, in bytes.
    pub slot_len_bytes: usize,
}

impl Offer {
    /// Transmission flags, which depend on whether replies are structured.
    pub fn flags(&self, structured: bool) -> u16 {
        use transmission_flag as flag;
        let geometry = &self.geometry;
        let mut flags = flag::HAS_FLAGS | flag::SEND_FLUSH;
        let mut set = |bit, on| flags |= if on { bit } else { 0 };
        set(flag::READ_ONLY, geometry.read_only);
        set(flag::SEND_FUA, geometry.fua || !geometry.volatile_cache);
        set(flag::SEND_TRIM, geometry.discard.is_some() && !geometry.read_only);
        set(flag::SEND_WRITE_ZEROES, geometry.write_zeroes.is_some() && !geometry.read_only);
        set(flag::SEND_DF, structured && self.slot_len_bytes >= MIN_UNFRAGMENTED_BYTES);
        set(flag::CAN_MULTI_CONN, self.multi_conn);
        flags
    }
}

/// What the client and the server agreed on before transmission.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Agreed {
    /// Replies come in chunks.
    pub structured: bool,
    /// `base:allocation` was selected for this export.
    pub base_allocation: bool,
}

/// A client that wants to enter transmission.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The export's canonical name.
    pub export: String,
    /// What was agreed.
    pub agreed: Agreed,
}

/// What a piece of input led to.
#[derive(Debug)]
pub enum Step {
    /// Read on.
    More,
    /// Answer with [`Handshake::enter`] or [`Handshake::refuse`] before any further input.
    Enter(Entry),
    /// Send what is to be sent and hang up.
    Close,
}

/// The machine. Replies are appended to the `out` that each call is given.
#[derive(Debug)]
pub struct Handshake {
    state: State,
    no_zeroes: bool,
    structured: bool,
    /// The export for which `base:allocation` is selected.
    context_of: Option<String>,
    options: u32,
}

impl Handshake {
    /// A new connection; the greeting goes to `out`.
    pub fn new(out: &mut Vec<u8>) -> Self {
        let greeting = Greeting {
            magic: U64::new(wire::GREETING_MAGIC),
            option_magic: U64::new(wire::OPTION_MAGIC),
            flags: U16::new(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES),
        };
        out.extend_from_slice(greeting.as_bytes());
        Self { state: State::ClientFlags, no_zeroes: false, structured: false, context_of: None, options: 0 }
    }

    /// Takes bytes of the client, one option at most, so that the replies of a call stay few. Returns how many were used and
    /// what they led to; the caller keeps the rest and calls again, with more when none was used. An `input` of `16 +
    /// MAX_OPTION_BYTES` always gets on.
    pub fn receive(&mut self, input: &[u8], catalog: &dyn Catalog, out: &mut Vec<u8>) -> (usize, Step) {
        let mut used = 0;
        loop {
            let rest = &input[used..];
            match self.state {
                State::ClientFlags => {
                    let Ok((flags, _)) = U32::read_from_prefix(rest) else { return (used, Step::More) };
                    used += size_of::<U32>();
                    let known = u32::from(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
                    if flags.get() & !known != 0 {
                        return (used, self.close());
                    }
                    self.no_zeroes = flags.get() & u32::from(handshake_flag::NO_ZEROES) != 0;
                    self.state = State::Option;
                }
                State::Option => {
                    let Ok((head, data)) = OptionHead::read_from_prefix(rest) else {
                        return (used, Step::More);
                    };
                    let len_bytes = head.len_bytes.get();
                    if head.magic.get() != wire::OPTION_MAGIC || len_bytes > MAX_SKIPPED_OPTION_BYTES {
                        return (used, self.close());
                    }
                    if len_bytes as usize > MAX_OPTION_BYTES {
                        used += size_of::<OptionHead>();
                        self.state = State::Skip { option: head.option.get(), rest_bytes: len_bytes };
                        continue;
                    }
                    let Some(data) = data.get(..len_bytes as usize) else { return (used, Step::More) };
                    used += size_of::<OptionHead>() + data.len();
                    self.options += 1;
                    if self.options > MAX_OPTIONS {
                        return (used, self.close());
                    }
                    return (used, self.option(head.option.get(), data, catalog, out));
                }
                State::Skip { option, rest_bytes } => {
                    let skipped = rest.len().min(rest_bytes as usize);
                    used += skipped;
                    let rest_bytes = rest_bytes - skipped as u32;
                    if rest_bytes > 0 {
                        self.state = State::Skip { option, rest_bytes };
                        return (used, Step::More);
                    }
                    self.options += 1;
                    if option == option::EXPORT_NAME || self.options > MAX_OPTIONS {
                        return (used, self.close());
                    }
                    self.state = State::Option;
                    let text = "the option's data is longer than this server takes";
                    reply_error(out, option, option_reply::ERR_TOO_BIG, text);
                    return (used, Step::More);
                }
                State::Entering { .. } | State::Closed => return (used, Step::More),
            }
        }
    }

    /// Lets the waiting client enter transmission.
    pub fn enter(&mut self, offer: &Offer, out: &mut Vec<u8>) {
        let State::Entering { by } = std::mem::replace(&mut self.state, State::Closed) else { return };
        match by {
            EntryBy::ExportName => {
                out.extend_from_slice(&offer.geometry.size_bytes.to_be_bytes());
                out.extend_from_slice(&offer.flags(self.structured).to_be_bytes());
                if !self.no_zeroes {
                    out.extend_from_slice(&[0; 124]);
                }
            }
            EntryBy::Go { wanted } => {
                reply_infos(out, option::GO, offer, self.structured, wanted);
                reply(out, option::GO, option_reply::ACK, &[]);
            }
        }
    }

    /// Refuses the waiting client. It may go on haggling if it can be told so, else the connection ends.
    pub fn refuse(&mut self, reply_type: u32, text: &str, out: &mut Vec<u8>) -> Step {
        match std::mem::replace(&mut self.state, State::Option) {
            State::Entering { by: EntryBy::Go { .. } } => {
                reply_error(out, option::GO, reply_type, text);
                Step::More
            }
            _ => self.close(),
        }
    }

    fn close(&mut self) -> Step {
        self.state = State::Closed;
        Step::Close
    }

    fn option(&mut self, option: u32, data: &[u8], catalog: &dyn Catalog, out: &mut Vec<u8>) -> Step {
        match option {
            option::EXPORT_NAME => {
                let offer = text(data).and_then(|name| catalog.find(name));
                match offer {
                    Some(offer) => self.entering(offer.name, EntryBy::ExportName),
                    None => self.close(),
                }
            }
            option::ABORT => {
                reply(out, option, option_reply::ACK, &[]);
                self.close()
            }
            option::LIST if data.is_empty() => {
                for name in catalog.names() {
                    let mut entry = (name.len() as u32).to_be_bytes().to_vec();
                    entry.extend_from_slice(name.as_bytes());
                    reply(out, option, option_reply::SERVER, &entry);
                }
                reply(out, option, option_reply::ACK, &[]);
                Step::More
            }
            option::STARTTLS if data.is_empty() => {
                reply_error(out, option, option_reply::ERR_POLICY, "this server does not offer TLS");
                Step::More
            }
            option::STRUCTURED_REPLY if data.is_empty() => {
                self.structured = true;
                reply(out, option, option_reply::ACK, &[]);
                Step::More
            }
            option::INFO | option::GO => self.info_or_go(option, data, catalog, out),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                self.meta_context(option, data, catalog, out);
                Step::More
            }
            option::LIST | option::STARTTLS | option::STRUCTURED_REPLY => {
                reply_error(out, option, option_reply::ERR_INVALID, "the option takes no data");
                Step::More
            }
            _ => {
                reply_error(out, option, option_reply::ERR_UNSUP, "");
                Step::More
            }
        }
    }

    fn info_or_go(&mut self, option: u32, data: &[u8], catalog: &dyn Catalog, out: &mut Vec<u8>) -> Step {
        let Some((name, wanted)) = parse_info_request(data) else {
            reply_error(out, option, option_reply::ERR_INVALID, "malformed option");
            return Step::More;
        };
        let Some(offer) = catalog.find(name) else {
            reply_error(out, option, option_reply::ERR_UNKNOWN, "no export of that name");
            return Step::More;
        };
        if option == option::GO {
            return self.entering(offer.name, EntryBy::Go { wanted });
        }
        reply_infos(out, option, &offer, self.structured, wanted);
        reply(out, option, option_reply::ACK, &[]);
        Step::More
    }

    fn entering(&mut self, export: String, by: EntryBy) -> Step {
        self.state = State::Entering { by };
        let base_allocation = self.structured && self.context_of.as_ref() == Some(&export);
        Step::Enter(Entry { export, agreed: Agreed { structured: self.structured, base_allocation } })
    }

    fn meta_context(&mut self, option: u32, data: &[u8], catalog: &dyn Catalog, out: &mut Vec<u8>) {
        let setting = option == option::SET_META_CONTEXT;
        if setting {
            self.context_of = None;
        }
        if !self.structured {
            reply_error(out, option, option_reply::ERR_INVALID, "structured replies must be agreed on first");
            return;
        }
        let Some((name, queries)) = parse_meta_request(data) else {
            reply_error(out, option, option_reply::ERR_INVALID, "malformed option");
            return;
        };
        let Some(offer) = catalog.find(name) else {
            reply_error(out, option, option_reply::ERR_UNKNOWN, "no export of that name");
            return;
        };
        let chosen = if setting {
            queries.contains(&BASE_ALLOCATION)
        } else {
            queries.is_empty() || queries.iter().any(|query| [BASE_ALLOCATION, "base:"].contains(query))
        };
        if chosen {
            let id = if setting { BASE_ALLOCATION_ID } else { 0 };
            let mut context = id.to_be_bytes().to_vec();
            context.extend_from_slice(BASE_ALLOCATION.as_bytes());
            reply(out, option, option_reply::META_CONTEXT, &context);
            if setting {
                self.context_of = Some(offer.name);
            }
        }
        reply(out, option, option_reply::ACK, &[]);
    }
}

#[derive(Debug)]
enum State {
    ClientFlags,
    Option,
    Skip { option: u32, rest_bytes: u32 },
    Entering { by: EntryBy },
    Closed,
}

#[derive(Clone, Copy, Debug)]
enum EntryBy {
    ExportName,
    Go { wanted: WantedInfos },
}

#[derive(Clone, Copy, Debug, Default)]
struct WantedInfos {
    name: bool,
    description: bool,
}

fn parse_info_request(data: &[u8]) -> Option<(&str, WantedInfos)> {
    let (name, rest) = counted_text(data)?;
    let (count, mut rest) = U16::read_from_prefix(rest).ok()?;
    if rest.len() != usize::from(count.get()) * size_of::<U16>() {
        return None;
    }
    let mut wanted = WantedInfos::default();
    while let Ok((kind, after)) = U16::read_from_prefix(rest) {
        match kind.get() {
            info::NAME => wanted.name = true,
            info::DESCRIPTION => wanted.description = true,
            _ => {}
        }
        rest = after;
    }
    Some((name, wanted))
}

fn parse_meta_request(data: &[u8]) -> Option<(&str, Vec<&str>)> {
    let (name, rest) = counted_text(data)?;
    let (count, mut rest) = U32::read_from_prefix(rest).ok()?;
    if count.get() > MAX_QUERIES {
        return None;
    }
    let mut queries = Vec::new();
    for _ in 0..count.get() {
        let (query, after) = counted_text(rest)?;
        queries.push(query);
        rest = after;
    }
    rest.is_empty().then_some((name, queries))
}

/// A string with its length before it, and what follows.
fn counted_text(data: &[u8]) -> Option<(&str, &[u8])> {
    let (len_bytes, rest) = U32::read_from_prefix(data).ok()?;
    let (string, rest) = rest.split_at_checked(len_bytes.get() as usize)?;
    Some((text(string)?, rest))
}

fn text(bytes: &[u8]) -> Option<&str> {
    let string = std::str::from_utf8(bytes).ok()?;
    (bytes.len() <= MAX_STRING_BYTES && !bytes.contains(&0)).then_some(string)
}

fn reply(out: &mut Vec<u8>, option: u32, reply: u32, data: &[u8]) {
    let head = OptionReplyHead {
        magic: U64::new(wire::OPTION_REPLY_MAGIC),
        option: U32::new(option),
        reply: U32::new(reply),
        len_bytes: U32::new(data.len() as u32),
    };
    out.extend_from_slice(head.as_bytes());
    out.extend_from_slice(data);
}

fn reply_error(out: &mut Vec<u8>, option: u32, error: u32, text: &str) {
    reply(out, option, error, text.as_bytes());
}

fn reply_infos(out: &mut Vec<u8>, option: u32, offer: &Offer, structured: bool, wanted: WantedInfos) {
    let mut send = |kind: u16, parts: &[&[u8]]| {
        let mut data = kind.to_be_bytes().to_vec();
        parts.iter().for_each(|part| data.extend_from_slice(part));
        reply(out, option, option_reply::INFO, &data);
    };
    if wanted.name {
        send(info::NAME, &[offer.name.as_bytes()]);
    }
    if wanted.description {
        send(info::DESCRIPTION, &[offer.description.as_bytes()]);
    }
    let smallest = offer.geometry.logical_block_bytes;
    let preferred = offer.geometry.physical_block_bytes.max(smallest).max(4096);
    send(
        info::BLOCK_SIZE,
        &[&smallest.to_be_bytes(), &preferred.to_be_bytes(), &MAX_PAYLOAD_BYTES.to_be_bytes()],
    );
    let flags = offer.flags(structured);
    send(info::EXPORT, &[&offer.geometry.size_bytes.to_be_bytes(), &flags.to_be_bytes()]);
}

#[cfg(test)]
mod tests;
