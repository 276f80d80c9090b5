//! Frames of libvirt's protocol (`virnetprotocol.x`), sans-I/O: bytes in, messages out.
//!
//! A frame is its own length (`u32`, the length field included), a header of six words, and a body in XDR. One call is answered by one reply
//! of the same serial, in any order; events come between.

pub mod event;
pub mod procedure;
pub mod remote_error;
pub mod reply;

use procedure::Procedure;
use remote_error::RemoteError;

use super::xdr::{Reader, Writer, XdrError};

/// `REMOTE_PROGRAM` of `remote_protocol.x`.
const REMOTE_PROGRAM: u32 = 0x2000_8086;
/// `KEEPALIVE_PROGRAM` of `virkeepaliveprotocol.x`.
const KEEPALIVE_PROGRAM: u32 = 0x6b65_6570;
/// `REMOTE_PROTOCOL_VERSION`.
const VERSION: u32 = 1;

/// Length field and header.
pub const HEADER_BYTES: usize = 4 + 24;
/// The longest frame that is taken. libvirt allows 32 MiB; the longest text in one has 4 MiB (`VIR_NET_MESSAGE_STRING_MAX`), and the longest
/// list that is asked for fits, too.
pub const MAX_FRAME_BYTES: usize = 8 << 20;
/// The longest text (`REMOTE_STRING_MAX`).
pub const MAX_TEXT_BYTES: u32 = 4 << 20;

/// `virNetMessageType`.
mod kind {
    pub(super) const CALL: i32 = 0;
    pub(super) const REPLY: i32 = 1;
    pub(super) const EVENT: i32 = 2;
}

/// Why bytes are none of this protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// A frame shorter than its header, or longer than [`MAX_FRAME_BYTES`].
    #[error("it gave a frame of {len_bytes} bytes: no libvirt does")]
    FrameLength {
        /// The length that it tells.
        len_bytes: u32,
    },
    /// Another program or version.
    #[error("it speaks program {program:#x} version {version} instead of libvirt's")]
    Program {
        /// The program's number.
        program: u32,
        /// Its version.
        version: u32,
    },
    /// A message that was not asked for, by its kind, status, serial or procedure.
    #[error("it gave a message of {what} {value}, which was not asked for")]
    NotAsked {
        /// What about it.
        what: &'static str,
        /// Its number.
        value: i64,
    },
    /// A body that can't be read.
    #[error("its answer to {procedure} cannot be read: {reason}")]
    Body {
        /// What was called.
        procedure: Procedure,
        /// What is wrong.
        reason: XdrError,
    },
    /// A header, an event or an error that can't be read.
    #[error("{what} cannot be read: {reason}")]
    Unreadable {
        /// What it is.
        what: &'static str,
        /// What is wrong.
        reason: XdrError,
    },
}

/// What a daemon sends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// The answer to a call.
    Reply {
        /// The call's serial.
        serial: u32,
        /// The number of the procedure that was called.
        procedure: i32,
        /// What it gave, or the daemon's error.
        outcome: Result<Vec<u8>, RemoteError>,
    },
    /// Something happened.
    Event {
        /// The number of the kind of event.
        procedure: i32,
        /// What it tells.
        body: Vec<u8>,
    },
    /// A sign of life.
    KeepAlive,
}

/// A call's frame.
pub fn encode_call(procedure: Procedure, serial: u32, arguments: &[u8]) -> Vec<u8> {
    let len = u32::try_from(HEADER_BYTES + arguments.len()).unwrap_or(u32::MAX);
    let mut frame = Writer::default()
        .u32(len)
        .u32(REMOTE_PROGRAM)
        .u32(VERSION)
        .i32(procedure.number())
        .i32(kind::CALL)
        .u32(serial)
        .i32(0)
        .into_bytes();
    frame.extend(arguments);
    frame
}

/// Puts frames together from bytes as they come.
#[derive(Debug, Default)]
pub struct FrameBuffer {
    bytes: Vec<u8>,
    /// Where the first frame that wasn't taken begins.
    begin: usize,
}

impl FrameBuffer {
    /// Takes what came.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.begin > 0 {
            self.bytes.drain(..self.begin);
            self.begin = 0;
        }
        self.bytes.extend(bytes);
    }

    /// The next message; none as long as it isn't there whole.
    pub fn next_message(&mut self) -> Result<Option<Message>, MessageError> {
        let rest = self.bytes.get(self.begin..).unwrap_or_default();
        let Some(length) = rest.first_chunk::<4>() else { return Ok(None) };
        let len_bytes = u32::from_be_bytes(*length);
        let len = usize::try_from(len_bytes).unwrap_or(usize::MAX);
        if !(HEADER_BYTES..=MAX_FRAME_BYTES).contains(&len) {
            return Err(MessageError::FrameLength { len_bytes });
        }
        let Some(frame) = rest.get(4..len) else { return Ok(None) };
        let message = Message::parse(frame)?;
        self.begin += len;
        if self.begin == self.bytes.len() {
            // A long frame's memory is given back, too.
            self.bytes = Vec::new();
            self.begin = 0;
        }
        Ok(Some(message))
    }
}

impl Message {
    /// Reads a frame without its length field.
    fn parse(frame: &[u8]) -> Result<Self, MessageError> {
        let unreadable = |reason| MessageError::Unreadable { what: "a frame's header", reason };
        let mut reader = Reader::new(frame);
        let program = reader.u32().map_err(unreadable)?;
        let version = reader.u32().map_err(unreadable)?;
        let procedure = reader.i32().map_err(unreadable)?;
        let kind = reader.i32().map_err(unreadable)?;
        let serial = reader.u32().map_err(unreadable)?;
        let status = reader.i32().map_err(unreadable)?;
        if (program, version) == (KEEPALIVE_PROGRAM, VERSION) {
            return Ok(Self::KeepAlive);
        }
        if (program, version) != (REMOTE_PROGRAM, VERSION) {
            return Err(MessageError::Program { program, version });
        }
        let body = frame.get(HEADER_BYTES - 4..).unwrap_or_default();
        match (kind, status) {
            (kind::REPLY, 0) => Ok(Self::Reply { serial, procedure, outcome: Ok(body.to_vec()) }),
            (kind::REPLY, 1) => {
                let error = RemoteError::parse(body)
                    .map_err(|reason| MessageError::Unreadable { what: "its error", reason })?;
                Ok(Self::Reply { serial, procedure, outcome: Err(error) })
            }
            (kind::EVENT, 0) => Ok(Self::Event { procedure, body: body.to_vec() }),
            (kind::REPLY | kind::EVENT, status) => {
                Err(MessageError::NotAsked { what: "status", value: status.into() })
            }
            (kind, _) => Err(MessageError::NotAsked { what: "kind", value: kind.into() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `REMOTE_PROC_CONNECT_GET_LIB_VERSION` and its answer, from libvirtd 9.0.0.
    const LIB_VERSION_REPLY: [u8; 36] = [
        0, 0, 0, 36, 0x20, 0, 0x80, 0x86, 0, 0, 0, 1, 0, 0, 0, 157, 0, 0, 0, 1, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0,
        0, 0, 0, 0x89, 0x54, 0x40,
    ];

    fn all(frames: &mut FrameBuffer) -> Result<Vec<Message>, MessageError> {
        std::iter::from_fn(|| frames.next_message().transpose()).collect()
    }

    #[test]
    fn frames_may_come_in_pieces_or_together() {
        let mut frames = FrameBuffer::default();
        let mut messages = Vec::new();
        for byte in LIB_VERSION_REPLY {
            frames.push(&[byte]);
            messages.extend(all(&mut frames).unwrap());
        }
        frames.push(&[LIB_VERSION_REPLY, LIB_VERSION_REPLY].concat());
        messages.extend(all(&mut frames).unwrap());
        assert_eq!(messages.len(), 3);
        for message in messages {
            let Message::Reply { serial: 5, procedure: 157, outcome: Ok(body) } = message else {
                panic!("{message:?}")
            };
            assert_eq!(reply::lib_version(&body), Ok(9_000_000));
        }
    }

    #[test]
    fn a_calls_frame_has_its_length_and_header() {
        let frame = encode_call(Procedure::GetLibVersion, 5, &[]);
        assert_eq!(frame[..4], [0, 0, 0, 28]);
        assert_eq!(frame[4..16], LIB_VERSION_REPLY[4..16]);
        assert_eq!(frame[16..], [0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0]);
    }

    #[test]
    fn what_is_no_libvirt_is_told_apart() {
        let parse = |edit: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = LIB_VERSION_REPLY.to_vec();
            edit(&mut bytes);
            let mut frames = FrameBuffer::default();
            frames.push(&bytes);
            frames.next_message()
        };
        let with_length = |length: u32| parse(&|bytes| bytes[..4].copy_from_slice(&length.to_be_bytes()));
        for length in [0, 27, u32::MAX] {
            assert_eq!(with_length(length), Err(MessageError::FrameLength { len_bytes: length }));
        }
        assert_eq!(
            parse(&|bytes| bytes[..20].copy_from_slice(b"SSH-2.0-OpenSSH_9.2p")),
            Err(MessageError::FrameLength { len_bytes: 0x5353_482d })
        );
        assert!(matches!(parse(&|bytes| bytes[4] = 9), Err(MessageError::Program { .. })));
        assert!(matches!(parse(&|bytes| bytes[11] = 2), Err(MessageError::Program { version: 2, .. })));
        for (at, what) in [(19, "kind"), (27, "status")] {
            let found = parse(&|bytes| bytes[at] = 3);
            assert_eq!(found, Err(MessageError::NotAsked { what, value: 3 }));
        }
        assert!(
            matches!(parse(&|bytes| bytes[27] = 1), Err(MessageError::Unreadable { what: "its error", .. })),
            "an error has more in it than a number"
        );
        assert_eq!(
            parse(&|bytes| bytes[4..8].copy_from_slice(&KEEPALIVE_PROGRAM.to_be_bytes())),
            Ok(Some(Message::KeepAlive))
        );
    }
}
