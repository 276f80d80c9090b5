//! Length-prefixed JSON.

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Why a frame couldn't be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The connection failed or ended inside a frame.
    #[error("the connection failed")]
    Io(#[from] std::io::Error),
    /// A longer message than the limit.
    #[error("a message of {len} bytes is longer than the limit of {limit}")]
    TooLong {
        /// The message's length in bytes.
        len: u64,
        /// The limit in bytes.
        limit: u32,
    },
    /// Not the JSON that is expected here. The frame was read whole: the stream can go on.
    #[error("the message can't be understood")]
    Json(#[source] serde_json::Error),
}

/// Reads one frame: its length in bytes as a little-endian `u32`, then JSON. None when the stream ended before it.
///
/// # Errors
/// [`FrameError`].
///
/// # Cancel safety
/// None: a cancelled read loses what it has read, and the stream with it.
pub async fn read_frame<T: DeserializeOwned>(
    stream: &mut (impl AsyncRead + Unpin),
    limit: u32,
) -> Result<Option<T>, FrameError> {
    let mut prefix = [0; 4];
    let got = stream.read(&mut prefix).await?;
    if got == 0 {
        return Ok(None);
    }
    stream.read_exact(&mut prefix[got..]).await?;
    let len = u32::from_le_bytes(prefix);
    if len > limit {
        return Err(FrameError::TooLong { len: len.into(), limit });
    }
    // Grown as bytes arrive: a length alone allocates nothing.
    let mut body = Vec::new();
    stream.take(len.into()).read_to_end(&mut body).await?;
    if body.len() != len as usize {
        return Err(FrameError::Io(std::io::ErrorKind::UnexpectedEof.into()));
    }
    serde_json::from_slice(&body).map(Some).map_err(FrameError::Json)
}

/// Writes one frame, in one call so that it isn't spread over packets.
///
/// # Errors
/// [`FrameError`].
pub async fn write_frame(
    stream: &mut (impl AsyncWrite + Unpin),
    message: &impl Serialize,
    limit: u32,
) -> Result<(), FrameError> {
    let mut bytes = vec![0; 4];
    serde_json::to_writer(&mut bytes, message).map_err(FrameError::Json)?;
    let len = bytes.len() - 4;
    let prefix = u32::try_from(len)
        .ok()
        .filter(|len| *len <= limit)
        .ok_or(FrameError::TooLong { len: len as u64, limit })?;
    bytes[..4].copy_from_slice(&prefix.to_le_bytes());
    stream.write_all(&bytes).await?;
    stream.flush().await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn frames_read_back_and_bad_ones_are_refused() {
        let mut bytes = Vec::new();
        write_frame(&mut bytes, &"hello", 100).await.expect("write");
        write_frame(&mut bytes, &7_u32, 100).await.expect("write");
        let mut reader = bytes.as_slice();
        assert_eq!(read_frame::<String>(&mut reader, 100).await.expect("read").as_deref(), Some("hello"));
        let error = read_frame::<String>(&mut reader, 100).await.expect_err("a number");
        assert!(matches!(error, FrameError::Json(_)));
        assert!(read_frame::<String>(&mut reader, 100).await.expect("end").is_none());

        let mut cut = &bytes[..6];
        assert!(matches!(read_frame::<String>(&mut cut, 100).await, Err(FrameError::Io(_))));
        let mut long = &[0xff, 0xff, 0xff, 0xff][..];
        let error = read_frame::<String>(&mut long, 100).await.expect_err("too long");
        assert!(matches!(error, FrameError::TooLong { len: 0xffff_ffff, limit: 100 }));
        let error = write_frame(&mut Vec::new(), &"x".repeat(100), 100).await.expect_err("too long");
        assert!(matches!(error, FrameError::TooLong { len: 102, .. }));
    }
}
