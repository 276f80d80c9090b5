//! Streams from other VRAs.

use quinn::VarInt;

use super::Daemon;
use crate::link::{Accepted, close_code};

impl Daemon {
    /// Takes a stream that another VRA opened for a VM's data: none is a VM of this target.
    pub(super) fn take_data_stream(&self, mut stream: Accepted) {
        tracing::warn!(vra = %self.vra, peer = %stream.peer.identity, "refused a data stream");
        // Fails only when the stream has ended already.
        let _ = stream.send.reset(VarInt::from_u32(close_code::FORBIDDEN));
    }
}
