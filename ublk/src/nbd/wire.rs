//! Numbers and layouts of the NBD protocol (`doc/proto.md` of the NetworkBlockDevice project), big-endian as on the wire.

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::serve::Errno;

/// `NBDMAGIC`, the first eight bytes of a server.
pub const GREETING_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`, before each option of the client and second in the greeting.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Before each reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Before each request of the transmission phase.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Before each simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Before each chunk of a structured reply.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Longest payload of a request that the server takes, in bytes: what clients assume when nothing was agreed.
pub const MAX_PAYLOAD_BYTES: u32 = 32 << 20;
/// Longest name or query, in bytes, as the protocol bounds strings.
pub const MAX_STRING_BYTES: usize = 4096;

/// Handshake flags of the server (and, with the same bits, of the client).
pub mod handshake_flag {
    /// Options after `EXPORT_NAME` may follow and get replies.
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    /// The 124 bytes of padding after `EXPORT_NAME` are left out.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Transmission flags of an export.
pub mod transmission_flag {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// `FLUSH` is offered.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// `FUA` is offered.
    pub const SEND_FUA: u16 = 1 << 3;
    /// `TRIM` is offered.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// `WRITE_ZEROES` is offered.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// Unfragmented structured reads are offered.
    pub const SEND_DF: u16 = 1 << 7;
    /// Several sockets of one client are coherent.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
}

/// Options of the handshake.
pub mod option {
    /// Enter transmission; cannot fail politely.
    pub const EXPORT_NAME: u32 = 1;
    /// End the handshake.
    pub const ABORT: u32 = 2;
    /// Name all exports.
    pub const LIST: u32 = 3;
    /// Upgrade to TLS.
    pub const STARTTLS: u32 = 5;
    /// Describe an export.
    pub const INFO: u32 = 6;
    /// Describe an export and enter transmission.
    pub const GO: u32 = 7;
    /// Replies in chunks.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Name the metadata contexts of an export.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Choose metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Types of replies to options.
pub mod option_reply {
    /// Success, the last reply.
    pub const ACK: u32 = 1;
    /// One export's name.
    pub const SERVER: u32 = 2;
    /// One piece of information on an export.
    pub const INFO: u32 = 3;
    /// One metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// The option is unknown here.
    pub const ERR_UNSUP: u32 = (1 << 31) + 1;
    /// Known, but refused.
    pub const ERR_POLICY: u32 = (1 << 31) + 2;
    /// Malformed, or out of place.
    pub const ERR_INVALID: u32 = (1 << 31) + 3;
    /// No export of that name.
    pub const ERR_UNKNOWN: u32 = (1 << 31) + 6;
    /// The server is going down.
    pub const ERR_SHUTDOWN: u32 = (1 << 31) + 7;
    /// The option's data is longer than this server takes.
    pub const ERR_TOO_BIG: u32 = (1 << 31) + 9;
}

/// Kinds of information in an [`option_reply::INFO`].
pub mod info {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// Canonical name.
    pub const NAME: u16 = 1;
    /// Text for a human.
    pub const DESCRIPTION: u16 = 2;
    /// Smallest, preferred and longest request.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Commands of the transmission phase.
pub mod command {
    /// Read.
    pub const READ: u16 = 0;
    /// Write; the payload follows the request.
    pub const WRITE: u16 = 1;
    /// Disconnect; has no reply.
    pub const DISC: u16 = 2;
    /// Make completed writes durable.
    pub const FLUSH: u16 = 3;
    /// Deallocate.
    pub const TRIM: u16 = 4;
    /// Write zeroes.
    pub const WRITE_ZEROES: u16 = 6;
    /// Metadata of a range.
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of a command.
pub mod command_flag {
    /// Durable before the reply.
    pub const FUA: u16 = 1 << 0;
    /// Keep the range allocated.
    pub const NO_HOLE: u16 = 1 << 1;
    /// One content chunk only.
    pub const DF: u16 = 1 << 2;
    /// One extent only.
    pub const REQ_ONE: u16 = 1 << 3;
}

/// Types of chunks of a structured reply.
pub mod chunk_type {
    /// Nothing but the end.
    pub const NONE: u16 = 0;
    /// Offset and data.
    pub const OFFSET_DATA: u16 = 1;
    /// Extents of a metadata context.
    pub const BLOCK_STATUS: u16 = 5;
    /// Error with a message.
    pub const ERROR: u16 = (1 << 15) + 1;
}

/// Flag of the last chunk of a reply.
pub const CHUNK_DONE: u16 = 1 << 0;

/// State bits of an extent in `base:allocation`.
pub mod extent_state {
    /// Not allocated.
    pub const HOLE: u32 = 1 << 0;
    /// Reads zeroes.
    pub const ZERO: u32 = 1 << 1;
}

/// The only metadata context offered.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// The id under which [`BASE_ALLOCATION`] is selected.
pub const BASE_ALLOCATION_ID: u32 = 1;

/// Error numbers of the protocol.
pub mod error {
    /// Not permitted.
    pub const EPERM: u32 = 1;
    /// Failed.
    pub const EIO: u32 = 5;
    /// No memory.
    pub const ENOMEM: u32 = 12;
    /// Invalid.
    pub const EINVAL: u32 = 22;
    /// No space.
    pub const ENOSPC: u32 = 28;
    /// Too long to answer so.
    pub const EOVERFLOW: u32 = 75;
    /// Not supported.
    pub const ENOTSUP: u32 = 95;
    /// Going down.
    pub const ESHUTDOWN: u32 = 108;
}

/// The protocol's error for an errno of Linux: what it has no number for is `EIO`.
pub fn error_of(errno: Errno) -> u32 {
    match errno.0 {
        libc::EPERM | libc::EACCES | libc::EROFS => error::EPERM,
        libc::ENOMEM => error::ENOMEM,
        libc::EINVAL => error::EINVAL,
        libc::ENOSPC | libc::EDQUOT | libc::EFBIG => error::ENOSPC,
        libc::EOPNOTSUPP => error::ENOTSUP,
        libc::ESHUTDOWN => error::ESHUTDOWN,
        _ => error::EIO,
    }
}

/// First bytes of the server.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Greeting {
    /// [`GREETING_MAGIC`].
    pub magic: U64,
    /// [`OPTION_MAGIC`].
    pub option_magic: U64,
    /// [`handshake_flag`].
    pub flags: U16,
}

/// Head of an option of the client.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct OptionHead {
    /// [`OPTION_MAGIC`].
    pub magic: U64,
    /// [`option`].
    pub option: U32,
    /// Bytes of data that follow.
    pub len_bytes: U32,
}

/// Head of a reply to an option.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct OptionReplyHead {
    /// [`OPTION_REPLY_MAGIC`].
    pub magic: U64,
    /// The option answered.
    pub option: U32,
    /// [`option_reply`].
    pub reply: U32,
    /// Bytes of data that follow.
    pub len_bytes: U32,
}

/// A request of the transmission phase.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RequestHead {
    /// [`REQUEST_MAGIC`].
    pub magic: U32,
    /// [`command_flag`].
    pub flags: U16,
    /// [`command`].
    pub command: U16,
    /// The client's name for the request, given back in the reply.
    pub cookie: U64,
    /// First byte of the range on the disk.
    pub offset_bytes: U64,
    /// Length of the range, in bytes; of the payload too for a write.
    pub len_bytes: U32,
}

/// A simple reply; a read's data follows.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SimpleReply {
    /// [`SIMPLE_REPLY_MAGIC`].
    pub magic: U32,
    /// [`error`], or zero.
    pub error: U32,
    /// [`RequestHead::cookie`].
    pub cookie: U64,
}

/// Head of a chunk of a structured reply.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ChunkHead {
    /// [`CHUNK_MAGIC`].
    pub magic: U32,
    /// [`CHUNK_DONE`], or zero.
    pub flags: U16,
    /// [`chunk_type`].
    pub kind: U16,
    /// [`RequestHead::cookie`].
    pub cookie: U64,
    /// Bytes that follow.
    pub len_bytes: U32,
}

const _: () = {
    assert!(size_of::<Greeting>() == 18);
    assert!(size_of::<OptionHead>() == 16);
    assert!(size_of::<OptionReplyHead>() == 20);
    assert!(size_of::<RequestHead>() == 28);
    assert!(std::mem::offset_of!(RequestHead, cookie) == 8);
    assert!(std::mem::offset_of!(RequestHead, len_bytes) == 24);
    assert!(size_of::<SimpleReply>() == 16);
    assert!(size_of::<ChunkHead>() == 20);
    assert!(std::mem::offset_of!(ChunkHead, len_bytes) == 16);
};
