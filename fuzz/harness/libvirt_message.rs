//! A hostile libvirt daemon. Input: one byte that says how the rest is cut, then the daemon's bytes.

use zvm::inventory::libvirt::message::event::Event;
use zvm::inventory::libvirt::message::{FrameBuffer, HEADER_BYTES, Message, MessageError, reply};

/// All numbers of events that are read, and one that isn't.
const EVENTS: [i32; 7] = [315, 318, 333, 339, 354, 370, 1];

pub fn run(data: &[u8]) {
    let Some((&cut, bytes)) = data.split_first() else { return };
    let (messages, end) = read_all([bytes]);
    let pieces = read_all(bytes.chunks(usize::from(cut) + 1));
    assert_eq!((&messages, &end), (&pieces.0, &pieces.1), "what was sent doesn't depend on how it was cut");
    assert!(messages.len() <= bytes.len() / HEADER_BYTES);
    for message in &messages {
        match message {
            Message::Reply { outcome: Ok(body), .. } | Message::Event { body, .. } => read_body(body),
            Message::Reply { outcome: Err(error), .. } => {
                assert!(!error.message.chars().any(char::is_control), "it goes to logs");
                assert!(error.message.chars().count() <= 500);
            }
            Message::KeepAlive => {}
        }
    }
}

fn read_all<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> (Vec<Message>, Option<MessageError>) {
    let mut frames = FrameBuffer::default();
    let mut messages = Vec::new();
    for piece in pieces {
        frames.push(piece);
        loop {
            match frames.next_message() {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => break,
                Err(error) => return (messages, Some(error)),
            }
        }
    }
    (messages, None)
}

/// As each kind of body that there is.
fn read_body(body: &[u8]) {
    for procedure in EVENTS {
        let _ = Event::parse(procedure, body);
    }
    let _ = reply::auth_kinds(body);
    let _ = reply::number(body);
    let _ = reply::nothing(body);
    let _ = reply::text(body).map(|text| assert!(text.len() <= body.len()));
    let _ = reply::lib_version(body);
    let _ = reply::domains(body).map(|list| assert!(list.len() <= body.len() / 24));
    let _ = reply::networks(body).map(|list| assert!(list.len() <= body.len() / 20));
    let _ = reply::pools(body).map(|list| assert!(list.len() <= body.len() / 20));
    let _ = reply::domain(body);
    let _ = reply::volume(body);
    let _ = reply::block_info(body);
    let _ = reply::block_job(body);
    let _ = reply::domain_stats(body).map(|list| assert!(list.len() <= body.len() / 28));
}
