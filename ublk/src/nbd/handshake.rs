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
mod tests {
    use super::*;
    use crate::serve::ZeroLimits;

    struct One;

    impl Catalog for One {
        fn names(&self) -> Vec<String> {
            vec!["disk".to_owned()]
        }

        fn find(&self, name: &str) -> Option<Offer> {
            (name.is_empty() || name == "disk").then(|| Offer {
                name: "disk".to_owned(),
                description: "a disk".to_owned(),
                geometry: Geometry {
                    size_bytes: 1 << 30,
                    logical_block_bytes: 512,
                    physical_block_bytes: 4096,
                    volatile_cache: true,
                    fua: true,
                    read_only: false,
                    discard: Some(ZeroLimits { granularity_bytes: 4096, max_bytes: 1 << 20 }),
                    write_zeroes: None,
                },
                multi_conn: true,
                slot_len_bytes: 128 << 10,
            })
        }
    }

    /// A handshake past the client's flags.
    fn haggling() -> Handshake {
        let mut out = Vec::new();
        let mut handshake = Handshake::new(&mut out);
        assert_eq!(out[..8], *b"NBDMAGIC");
        let (used, step) = handshake.receive(&3_u32.to_be_bytes(), &One, &mut out);
        assert!(matches!((used, step), (4, Step::More)));
        handshake
    }

    fn option_bytes(option: u32, data: &[u8]) -> Vec<u8> {
        let mut bytes = b"IHAVEOPT".to_vec();
        bytes.extend_from_slice(&option.to_be_bytes());
        bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
        bytes.extend_from_slice(data);
        bytes
    }

    fn named(name: &str, tail: &[u8]) -> Vec<u8> {
        let mut data = (name.len() as u32).to_be_bytes().to_vec();
        data.extend_from_slice(name.as_bytes());
        data.extend_from_slice(tail);
        data
    }

    /// The (option, reply, data) triples in `out`.
    fn replies(mut out: &[u8]) -> Vec<(u32, u32, Vec<u8>)> {
        let mut found = Vec::new();
        while !out.is_empty() {
            let (head, rest) = OptionReplyHead::read_from_prefix(out).expect("whole reply");
            assert_eq!(head.magic.get(), wire::OPTION_REPLY_MAGIC);
            let (data, rest) = rest.split_at(head.len_bytes.get() as usize);
            found.push((head.option.get(), head.reply.get(), data.to_vec()));
            out = rest;
        }
        found
    }

    fn ask(handshake: &mut Handshake, option: u32, data: &[u8]) -> (Vec<(u32, u32, Vec<u8>)>, Step) {
        let mut out = Vec::new();
        let bytes = option_bytes(option, data);
        let (used, step) = handshake.receive(&bytes, &One, &mut out);
        assert_eq!(used, bytes.len());
        (replies(&out), step)
    }

    #[test]
    fn go_enters_with_what_was_agreed() {
        let mut handshake = haggling();
        let (acks, _) = ask(&mut handshake, option::STRUCTURED_REPLY, &[]);
        assert_eq!(acks[0].1, option_reply::ACK);
        let query = named("disk", &[&1_u32.to_be_bytes()[..], &named(BASE_ALLOCATION, &[])].concat());
        let (contexts, _) = ask(&mut handshake, option::SET_META_CONTEXT, &query);
        assert_eq!(contexts.len(), 2);
        assert_eq!(contexts[0].1, option_reply::META_CONTEXT);
        let (none, step) = ask(&mut handshake, option::GO, &named("disk", &[0, 1, 0, 3]));
        assert!(none.is_empty(), "nothing is answered before the session is ready");
        let Step::Enter(entry) = step else { panic!("not entering: {step:?}") };
        assert_eq!(entry.export, "disk");
        assert_eq!(entry.agreed, Agreed { structured: true, base_allocation: true });
        let mut out = Vec::new();
        handshake.enter(&One.find("disk").expect("known"), &mut out);
        let infos = replies(&out);
        assert_eq!(infos.last().map(|last| last.1), Some(option_reply::ACK));
        let export = infos.iter().find(|(_, _, data)| data[..2] == [0, 0]).expect("export info");
        assert_eq!(export.2[2..10], (1_u64 << 30).to_be_bytes());
        let flags = u16::from_be_bytes([export.2[10], export.2[11]]);
        assert_eq!(flags, 0b1_1010_1101);
        let sizes = infos.iter().find(|(_, _, data)| data[..2] == [0, 3]).expect("block size info");
        assert_eq!(sizes.2[2..], [0, 0, 2, 0, 0, 0, 0x10, 0, 2, 0, 0, 0]);
    }

    #[test]
    fn export_name_answers_without_frame() {
        let mut handshake = haggling();
        let (none, step) = ask(&mut handshake, option::EXPORT_NAME, b"");
        assert!(none.is_empty() && matches!(step, Step::Enter(_)));
        let mut out = Vec::new();
        handshake.enter(&One.find("").expect("default"), &mut out);
        assert_eq!(out.len(), 10, "the client asked for no padding");
    }

    #[test]
    fn what_is_not_offered_is_refused_by_name() {
        let mut handshake = haggling();
        for (option, data, expected) in [
            (option::STARTTLS, Vec::new(), option_reply::ERR_POLICY),
            (option::STARTTLS, vec![1], option_reply::ERR_INVALID),
            (option::LIST, vec![1], option_reply::ERR_INVALID),
            (11, Vec::new(), option_reply::ERR_UNSUP),
            (option::GO, named("other", &[0, 0]), option_reply::ERR_UNKNOWN),
            (option::GO, named("disk", &[0, 1]), option_reply::ERR_INVALID),
            (option::INFO, vec![0, 0, 0, 9, 1], option_reply::ERR_INVALID),
            (option::GO, named("di\0k", &[0, 0]), option_reply::ERR_INVALID),
            (option::SET_META_CONTEXT, named("disk", &[0; 4]), option_reply::ERR_INVALID),
        ] {
            let (answers, step) = ask(&mut handshake, option, &data);
            assert!(matches!(step, Step::More));
            assert_eq!(answers.len(), 1);
            assert_eq!((answers[0].0, answers[0].1), (option, expected));
        }
    }

    #[test]
    fn a_context_of_another_export_does_not_count() {
        let mut handshake = haggling();
        ask(&mut handshake, option::STRUCTURED_REPLY, &[]);
        let query = named("disk", &[&1_u32.to_be_bytes()[..], &named("x-other:thing", &[])].concat());
        let (contexts, _) = ask(&mut handshake, option::SET_META_CONTEXT, &query);
        assert_eq!(contexts.len(), 1);
        let (_, step) = ask(&mut handshake, option::GO, &named("disk", &[0, 0]));
        let Step::Enter(entry) = step else { panic!("not entering: {step:?}") };
        assert!(!entry.agreed.base_allocation);
    }

    #[test]
    fn list_and_abort() {
        let mut handshake = haggling();
        let (names, _) = ask(&mut handshake, option::LIST, &[]);
        assert_eq!(names[0], (option::LIST, option_reply::SERVER, named("disk", &[])));
        let (acks, step) = ask(&mut handshake, option::ABORT, &[]);
        assert_eq!(acks[0].1, option_reply::ACK);
        assert!(matches!(step, Step::Close));
    }

    #[test]
    fn a_refused_go_may_try_again_and_a_refused_export_name_may_not() {
        let mut handshake = haggling();
        let (_, step) = ask(&mut handshake, option::GO, &named("disk", &[0, 0]));
        assert!(matches!(step, Step::Enter(_)));
        let mut out = Vec::new();
        assert!(matches!(handshake.refuse(option_reply::ERR_SHUTDOWN, "going down", &mut out), Step::More));
        assert_eq!(replies(&out)[0].1, option_reply::ERR_SHUTDOWN);
        let (_, step) = ask(&mut handshake, option::EXPORT_NAME, b"disk");
        assert!(matches!(step, Step::Enter(_)));
        assert!(matches!(handshake.refuse(option_reply::ERR_SHUTDOWN, "", &mut out), Step::Close));
    }

    #[test]
    fn hostile_lengths_and_magics_end_it() {
        let mut out = Vec::new();
        let mut long = option_bytes(option::LIST, &[]);
        long[12..16].copy_from_slice(&u32::MAX.to_be_bytes());
        assert!(matches!(haggling().receive(&long, &One, &mut out), (0, Step::Close)));
        let mut wrong = option_bytes(option::LIST, &[]);
        wrong[0] = b'X';
        assert!(matches!(haggling().receive(&wrong, &One, &mut out), (0, Step::Close)));
        let mut handshake = Handshake::new(&mut out);
        assert!(matches!(handshake.receive(&[0x80, 0, 0, 3], &One, &mut out), (4, Step::Close)));
    }

    #[test]
    fn too_long_an_option_is_skipped_in_bounded_memory() {
        let mut handshake = haggling();
        let bytes = option_bytes(option::INFO, &vec![0; MAX_OPTION_BYTES + 1]);
        let mut out = Vec::new();
        let mut at = 0;
        while at < bytes.len() {
            let end = bytes.len().min(at + 1000);
            let (used, step) = handshake.receive(&bytes[at..end], &One, &mut out);
            assert!(matches!(step, Step::More));
            at += used;
        }
        assert_eq!(replies(&out)[0].1, option_reply::ERR_TOO_BIG);
        let (names, _) = ask(&mut handshake, option::LIST, &[]);
        assert_eq!(names.len(), 2);
    }

    #[test]
    fn endless_haggling_ends() {
        let mut handshake = haggling();
        let mut out = Vec::new();
        let list = option_bytes(option::STARTTLS, &[]);
        let ended = (0..=MAX_OPTIONS).any(|_| {
            out.clear();
            matches!(handshake.receive(&list, &One, &mut out).1, Step::Close)
        });
        assert!(ended);
    }
}
