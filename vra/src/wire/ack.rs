use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::WireError;
use super::frame::{FRAME_HEADER_BYTES, FrameKind, Header, fixed_body};

/// Length of an ack frame, in bytes.
pub const ACK_FRAME_BYTES: usize = FRAME_HEADER_BYTES + size_of::<AckLayout>();

/// How far the target is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ack {
    /// The open count of the grant: an acknowledgement of another one says nothing about this stream.
    pub open_count: u64,
    /// Everything up to here has arrived and was checked.
    pub received_through: u64,
    /// Everything up to here survives a power cut: the source may free it. At most `received_through`.
    pub durable_through: u64,
    /// How long the last of the durable batches waited in the target's memory, in microseconds (at most `u32::MAX`).
    pub memory_us: u32,
    /// How long writing and syncing it took, in microseconds (at most `u32::MAX`).
    pub disk_us: u32,
}

impl Ack {
    /// The frame's bytes.
    pub fn encode(&self) -> [u8; ACK_FRAME_BYTES] {
        let layout = AckLayout {
            open_count: self.open_count.into(),
            received_through: self.received_through.into(),
            durable_through: self.durable_through.into(),
            memory_us: self.memory_us.into(),
            disk_us: self.disk_us.into(),
            reserved: 0.into(),
        };
        let header = Header::new(FrameKind::Ack, ACK_FRAME_BYTES);
        zerocopy::transmute!(AckFrame { header, layout })
    }

    pub(super) fn parse_body(body: &[u8]) -> Result<Self, WireError> {
        let field = |field, found| WireError::Field { frame: "ack", field, found };
        let layout: AckLayout = fixed_body("ack", body)?;
        if layout.reserved.get() != 0 {
            return Err(field("reserved", layout.reserved.get()));
        }
        if layout.durable_through > layout.received_through {
            return Err(field("durable sequence above the received one", layout.durable_through.get()));
        }
        Ok(Self {
            open_count: layout.open_count.get(),
            received_through: layout.received_through.get(),
            durable_through: layout.durable_through.get(),
            memory_us: layout.memory_us.get(),
            disk_us: layout.disk_us.get(),
        })
    }
}

/// A whole ack frame, 56 bytes.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct AckFrame {
    /// The header.
    header: Header,
    /// What follows it.
    layout: AckLayout,
}

/// An ack frame after the header, 40 bytes.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct AckLayout {
    /// [`Ack::open_count`].
    open_count: U64,
    /// [`Ack::received_through`].
    received_through: U64,
    /// [`Ack::durable_through`].
    durable_through: U64,
    /// [`Ack::memory_us`].
    memory_us: U32,
    /// [`Ack::disk_us`].
    disk_us: U32,
    /// Zero.
    reserved: U64,
}

const _: () = assert!(size_of::<AckLayout>() == 40);
const _: () = assert!(std::mem::offset_of!(AckLayout, memory_us) == 24);
const _: () = assert!(std::mem::offset_of!(AckLayout, reserved) == 32);
