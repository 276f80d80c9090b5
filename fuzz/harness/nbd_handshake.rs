//! A hostile NBD client in the handshake. Input: one byte that says how the rest is cut, then the client's bytes.

use std::sync::Arc;

use ublk::nbd::connection::Connection;
use ublk::nbd::handshake::{Catalog, Offer};
use ublk::serve::Geometry;

pub fn run(data: &[u8]) {
    let Some((&cut, mut bytes)) = data.split_first() else { return };
    let mut connection = Connection::new(Arc::new(Two));
    let mut sent_bytes = 0;
    loop {
        let mut moved = false;
        while let Some(mut batch) = connection.next_send() {
            let len: usize = batch.slices().map(<[u8]>::len).sum();
            assert!(batch.advance(len), "a batch sent whole is sent");
            connection.sent(batch);
            sent_bytes += len;
            moved = true;
        }
        if connection.take_entry().is_some() {
            connection.refuse(ublk::nbd::wire::option_reply::ERR_POLICY, "not today");
            moved = true;
        }
        if !bytes.is_empty()
            && let Some(mut recv) = connection.next_recv()
        {
            let len = recv.buffer().len().min(bytes.len()).min(usize::from(cut) * 7 + 1);
            recv.buffer()[..len].copy_from_slice(&bytes[..len]);
            bytes = &bytes[len..];
            connection.received(recv, len);
            moved = true;
        }
        if !moved {
            break;
        }
    }
    assert!(
        bytes.is_empty() || connection.is_ending(),
        "the server stopped reading and lets the client hang"
    );
    assert!(sent_bytes <= 64 + data.len() * 64, "a small question with a huge answer");
    connection.stop();
    assert!(connection.is_over());
}

struct Two;

impl Catalog for Two {
    fn names(&self) -> Vec<String> {
        vec!["one".to_owned(), "two".to_owned()]
    }

    fn find(&self, name: &str) -> Option<Offer> {
        ["", "one", "two"].contains(&name).then(|| Offer {
            name: if name == "two" { "two" } else { "one" }.to_owned(),
            description: "fuzzed".to_owned(),
            geometry: Geometry {
                size_bytes: 1 << 40,
                logical_block_bytes: 512,
                physical_block_bytes: 4096,
                volatile_cache: true,
                fua: true,
                read_only: name == "two",
                discard: None,
                write_zeroes: None,
            },
            multi_conn: false,
            slot_len_bytes: 65536,
        })
    }
}
