//! The streams between VRAs: frames and their bytes. `docs/protocol.md` draws them.
//!
//! One QUIC bidirectional stream carries one VM. The source sends an [`Open`] and, once granted, sealed batches
//! (`journal::batch`, which delimit themselves). The target answers with a [`Grant`] or a [`Refuse`] and then with an [`Ack`]
//! for each advance; a [`Refuse`] may end the stream at any time. The source VRAs of a VPG say [`GroupMessage`]s to each other, on
//! streams of their own.
//!
//! All integers are little-endian. Parsing is strict: reserved bytes must be zero and every length must be exact, so that each
//! accepted frame has one encoding. Nothing here allocates more than the frame's own bounded length.

mod ack;
mod answer;
mod decline;
mod frame;
mod group;
mod open;
mod reader;

pub use ack::{ACK_FRAME_BYTES, Ack};
pub use answer::{GRANT_FRAME_BYTES, Grant, Refuse, RefuseCode, SENDABLE_REFUSE_TEXT_BYTES};
pub use decline::DeclineCode;
pub use frame::{
    FRAME_HEADER_BYTES, FRAME_MAGIC, Frame, FrameKind, MAX_FRAME_BYTES, WireError, frame_len_bytes,
};
pub use group::{Decline, GroupEpoch, GroupMessage, Held, HeldMember, Hold, Recorded, Release};
pub use open::{Open, VolumeShape};
pub use reader::{FrameReader, ReadFrameError};

/// Version of the protocol that this build speaks. A target that doesn't speak an [`Open`]'s version answers
/// [`RefuseCode::Version`] with its own newest version in [`Refuse::detail`].
pub const PROTOCOL_VERSION: u16 = 1;

/// Features that this build can use; see [`Open::features_offered`]. None are defined in version 1.
pub const FEATURES: u64 = 0;

/// Most volumes of one VM.
pub const MAX_VOLUMES: usize = 64;

/// Most ancestors that an [`Open`] names.
pub const MAX_ANCESTORS: usize = 64;
