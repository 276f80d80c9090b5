//! A scripted NBD client over a real socket.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::{OptionReply, Reply, ReplyReader, hello};
use ublk::nbd::Address;
use ublk::nbd::wire::{info, option_reply};

pub(crate) trait Stream: Read + Write + Send {}

impl<T: Read + Write + Send> Stream for T {}

pub(crate) struct Client {
    stream: Box<dyn Stream>,
    reader: ReplyReader,
    /// Transmission flags of the export.
    pub(crate) flags: u16,
}

impl Client {
    /// Connects and asks to enter, without waiting for the answer.
    pub(crate) fn ask(address: &Address, export: &str) -> Self {
        let limit = Some(Duration::from_secs(30));
        let stream: Box<dyn Stream> = match address {
            Address::Unix { path, .. } => {
                let stream = UnixStream::connect(path).expect("connect");
                stream.set_read_timeout(limit).expect("timeout");
                Box::new(stream)
            }
            Address::Tcp(address) => {
                let stream = TcpStream::connect(address).expect("connect");
                stream.set_read_timeout(limit).expect("timeout");
                Box::new(stream)
            }
        };
        let mut client = Self { stream, reader: ReplyReader::default(), flags: 0 };
        client.send(&hello(export, true, true));
        client
    }

    /// Waits until the server lets it in; false if it hangs up instead.
    pub(crate) fn enter(&mut self) -> bool {
        let Some(()) = self.next(ReplyReader::greeting) else { return false };
        loop {
            let Some(OptionReply { option, reply, data }) = self.next(ReplyReader::option_reply) else {
                return false;
            };
            assert!(
                reply < option_reply::ERR_UNSUP,
                "refused: {reply:#x} {}",
                String::from_utf8_lossy(&data)
            );
            if reply == option_reply::INFO && super::u16_at(&data, 0) == info::EXPORT {
                self.flags = super::u16_at(&data, 10);
            }
            if option == ublk::nbd::wire::option::GO && reply == option_reply::ACK {
                return true;
            }
        }
    }

    pub(crate) fn connect(address: &Address, export: &str) -> Self {
        let mut client = Self::ask(address, export);
        assert!(client.enter(), "the server hung up");
        client
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("send");
    }

    /// The next reply, or none when the server has hung up.
    pub(crate) fn reply(&mut self) -> Option<Reply> {
        self.next(|reader| reader.reply(|_| 0))
    }

    /// Sends a request and waits for its success; the data of all chunks.
    pub(crate) fn call(&mut self, request: &[u8]) -> Vec<u8> {
        self.send(request);
        let mut data = Vec::new();
        loop {
            match self.reply().expect("a reply") {
                Reply::Chunk { done, kind, data: chunk, .. } => {
                    assert!(kind < 1 << 15, "error {chunk:?}");
                    if kind == 1 {
                        data.extend(&chunk[8..]);
                    }
                    if done {
                        return data;
                    }
                }
                Reply::Simple { error, .. } => {
                    assert_eq!(error, 0);
                    return data;
                }
            }
        }
    }

    fn next<T>(&mut self, take: impl Fn(&mut ReplyReader) -> Option<T>) -> Option<T> {
        loop {
            if let Some(found) = take(&mut self.reader) {
                return Some(found);
            }
            let mut bytes = [0; 65536];
            match self.stream.read(&mut bytes) {
                Ok(0) => return None,
                Ok(len) => self.reader.feed(&bytes[..len]),
                Err(error) if matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => {
                    return None;
                }
                Err(error) => panic!("recv: {error}"),
            }
        }
    }
}
