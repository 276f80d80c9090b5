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
