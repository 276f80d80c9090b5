use quinn::RecvStream;

use super::MAX_FRAME_BYTES;
use super::frame::{FRAME_HEADER_BYTES, Frame, WireError, frame_len_bytes};
use crate::link::LinkError;

/// Collects frames from a QUIC stream.
#[derive(Debug)]
pub struct FrameReader {
    bytes: Box<[u8; MAX_FRAME_BYTES]>,
    filled: usize,
}

/// Why no frame could be read.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ReadFrameError {
    /// The stream failed.
    #[error("the stream failed: {}", cause(_0))]
    Stream(quinn::ReadError),
    /// The stream ended inside a frame.
    #[error("the stream ended inside a frame")]
    Truncated,
    /// The bytes are no frame.
    #[error(transparent)]
    Wire(#[from] WireError),
}

impl FrameReader {
    /// One that has nothing yet.
    pub fn new() -> Self {
        Self { bytes: Box::new([0; MAX_FRAME_BYTES]), filled: 0 }
    }

    /// The next frame, or none when the stream ended after the last one. Reads nothing beyond the frame, so batches may follow it.
    ///
    /// Cancel-safe: what was read is kept for the next call.
    ///
    /// # Errors
    /// The stream or the bytes on it are broken.
    pub async fn next(&mut self, recv: &mut RecvStream) -> Result<Option<Frame>, ReadFrameError> {
        loop {
            let needed = self.needed()?;
            if self.filled == needed {
                let frame = Frame::parse(&self.bytes[..needed])?;
                self.filled = 0;
                return Ok(Some(frame));
            }
            let wanted = &mut self.bytes[self.filled..needed];
            match recv.read(wanted).await.map_err(ReadFrameError::Stream)? {
                Some(count) => self.filled += count,
                None if self.filled == 0 => return Ok(None),
                None => return Err(ReadFrameError::Truncated),
            }
        }
    }

    fn needed(&self) -> Result<usize, WireError> {
        match self.bytes[..self.filled].first_chunk::<FRAME_HEADER_BYTES>() {
            Some(header) => frame_len_bytes(header),
            None => Ok(FRAME_HEADER_BYTES),
        }
    }
}

impl Default for FrameReader {
    fn default() -> Self {
        Self::new()
    }
}

/// Why a stream failed, in words. A peer that refuses this side's certificate says so only after the handshake, so it is often a stream that learns
/// of it: then the certificate, not the stream, is what must be named.
fn cause(error: &quinn::ReadError) -> String {
    match error {
        quinn::ReadError::ConnectionLost(lost) => {
            LinkError::from_connection("the peer", lost.clone()).to_string()
        }
        other => other.to_string(),
    }
}
