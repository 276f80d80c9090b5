//! A data stream's task at the target: moves bytes between QUIC and a worker, and decides nothing but who the peer is.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use journal::batch::{BatchError, BatchHeader};
use quinn::{ReadExactError, RecvStream, SendStream, VarInt};

use super::memory::StreamMemory;
use super::outbox::Outbox;
use crate::wire::{
    Frame, FrameReader, Open, PROTOCOL_VERSION, ReadFrameError, Refuse, RefuseCode, WireError,
};

/// A source that opened a stream must say what for within this time.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum StreamError {
    /// It failed.
    #[error("the stream failed: {0}")]
    Stream(String),
    /// It ended inside a batch.
    #[error("the stream ended inside a batch")]
    Truncated,
    /// What came can't begin a batch.
    #[error("what came is no batch")]
    Batch(#[source] BatchError),
}

/// Reads what a new stream is for. One that says nothing sensible is told why, and ended.
pub(super) async fn read_open(send: &mut SendStream, recv: &mut RecvStream) -> Option<Open> {
    let mut frames = FrameReader::new();
    let refuse = match tokio::time::timeout(OPEN_TIMEOUT, frames.next(recv)).await {
        Ok(Ok(Some(Frame::Open(open)))) => return Some(open),
        Ok(Err(ReadFrameError::Wire(error @ WireError::Version { .. }))) => {
            Refuse { code: RefuseCode::Version, detail: PROTOCOL_VERSION.into(), text: error.to_string() }
        }
        Ok(Err(ReadFrameError::Wire(error))) => {
            Refuse { code: RefuseCode::BadBatch, detail: 0, text: error.to_string() }
        }
        Ok(Ok(Some(frame))) => {
            let text = format!("a stream begins with an open, not with a {} frame", frame.name());
            Refuse { code: RefuseCode::BadBatch, detail: 0, text }
        }
        Ok(Ok(None) | Err(ReadFrameError::Stream(_) | ReadFrameError::Truncated)) | Err(_) => return None,
    };
    send_refusal(send, refuse).await;
    None
}

/// Ends a stream with a refusal.
pub(super) async fn send_refusal(send: &mut SendStream, refuse: Refuse) {
    // A peer that has gone needs no refusal.
    if send.write_all(&refuse.encode()).await.is_ok() {
        let _ = send.finish();
    }
}

/// Moves batches to `take` and frames from `outbox` until either side ends.
pub(super) async fn run(
    mut send: SendStream,
    mut recv: RecvStream,
    memory: &StreamMemory,
    outbox: Arc<Outbox>,
    take: impl Fn(Bytes),
) -> Result<(), StreamError> {
    let read = async {
        while let Some(batch) = read_batch(&mut recv, memory).await? {
            take(batch);
        }
        Ok(())
    };
    let write = async {
        while let Some(frame) = outbox.next().await {
            send.write_all(&frame.encode()).await.map_err(|error| StreamError::Stream(error.to_string()))?;
        }
        Ok(())
    };
    let ended = tokio::select! {
        ended = read => ended,
        ended = write => ended,
    };
    if let Err(StreamError::Batch(error)) = &ended {
        send_refusal(&mut send, Refuse { code: RefuseCode::BadBatch, detail: 0, text: error.to_string() })
            .await;
    }
    // Both fail only on a stream that has ended already.
    let _ = send.finish();
    let _ = recv.stop(VarInt::from_u32(0));
    ended
}

/// The next whole batch in aligned memory, or none at the stream's end. One copy: from QUIC's packets to that memory.
async fn read_batch(recv: &mut RecvStream, memory: &StreamMemory) -> Result<Option<Bytes>, StreamError> {
    let mut header = [0; BatchHeader::LEN];
    match recv.read_exact(&mut header).await {
        Ok(()) => {}
        Err(ReadExactError::FinishedEarly(0)) => return Ok(None),
        Err(ReadExactError::FinishedEarly(_)) => return Err(StreamError::Truncated),
        Err(ReadExactError::ReadError(error)) => return Err(StreamError::Stream(error.to_string())),
    }
    let len_bytes = BatchHeader::needed(&header).map_err(StreamError::Batch)?;
    let mut buffer = memory.take(len_bytes).await;
    let bytes = buffer.bytes_mut();
    bytes[..BatchHeader::LEN].copy_from_slice(&header);
    recv.read_exact(&mut bytes[BatchHeader::LEN..]).await.map_err(|error| match error {
        ReadExactError::FinishedEarly(_) => StreamError::Truncated,
        ReadExactError::ReadError(error) => StreamError::Stream(error.to_string()),
    })?;
    Ok(Some(buffer.into_bytes()))
}
