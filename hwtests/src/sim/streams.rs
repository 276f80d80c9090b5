//! Streams between a source and a target as the network has them: bytes that arrive in parts, late, or not at all; ends that
//! learn of each other's end at different times; an old stream that still delivers when a newer one is open.

use std::collections::BTreeMap;

use bytes::Bytes;
use journal::batch::{BatchHeader, BatchView};
use journal::storage::AlignedBuf;
use vra::wire::{FRAME_HEADER_BYTES, Frame, Open, frame_len_bytes};

use super::coverage::Happening;
use super::env::Env;

/// Names a stream; later ones have higher keys.
pub(super) type StreamKey = u64;

/// Above this many bytes on the way, a stream takes no batch.
const QUEUED_BYTES_MAX: usize = 96 << 10;

/// What has arrived at the target.
#[derive(Debug)]
pub(super) enum Arrival {
    Open(Open),
    Batch(Bytes),
    /// The source's side has ended.
    Closed,
}

impl std::fmt::Display for Arrival {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Open(open) => write!(f, "{open:?}"),
            Self::Batch(bytes) => match BatchView::parse(bytes) {
                Ok(view) => write!(f, "batch {} to {}", view.first_seq(), view.last_seq()),
                Err(error) => write!(f, "bad batch: {error}"),
            },
            Self::Closed => write!(f, "closed"),
        }
    }
}

/// What has arrived at the source.
#[derive(Debug)]
pub(super) enum Answer {
    Frame(Frame),
    /// The target's side has ended.
    Lost,
}

#[derive(Debug, Default)]
pub(super) struct Streams {
    streams: BTreeMap<StreamKey, Stream>,
    next_key: StreamKey,
}

#[derive(Debug, Default)]
struct Stream {
    /// On the way to the target.
    up: Vec<u8>,
    /// On the way to the source.
    down: Vec<u8>,
    /// Arrived at the target, and not yet a whole frame or batch.
    at_target: Vec<u8>,
    at_source: Vec<u8>,
    opened: bool,
    /// The source sends nothing more; the target learns of it behind what is on the way.
    up_ended: bool,
    down_ended: bool,
    /// The target doesn't listen any more.
    target_gone: bool,
    source_gone: bool,
}

impl Streams {
    pub(super) fn dial(&mut self) -> StreamKey {
        self.next_key += 1;
        self.streams.insert(self.next_key, Stream::default());
        self.next_key
    }

    pub(super) fn keys(&self) -> Vec<StreamKey> {
        self.streams.keys().copied().collect()
    }

    pub(super) fn may_send(&self, key: StreamKey) -> bool {
        self.streams.get(&key).is_some_and(|stream| stream.up.len() < QUEUED_BYTES_MAX)
    }

    /// The source sends.
    pub(super) fn send_up(&mut self, key: StreamKey, bytes: &[u8]) {
        if let Some(stream) = self.streams.get_mut(&key).filter(|stream| !stream.up_ended) {
            stream.up.extend_from_slice(bytes);
        }
    }

    /// The target sends.
    pub(super) fn send_down(&mut self, key: StreamKey, frame: &Frame) {
        if let Some(stream) = self.streams.get_mut(&key).filter(|stream| !stream.down_ended) {
            stream.down.extend_from_slice(&frame.encode());
        }
    }

    /// The source drops its end. What is on the way may still arrive, or a part of it.
    pub(super) fn hang_up(&mut self, key: StreamKey, env: &mut Env) {
        if let Some(stream) = self.streams.get_mut(&key) {
            (stream.up_ended, stream.source_gone) = (true, true);
            lose_some(&mut stream.up, env);
        }
        self.forget_ended();
    }

    /// The target ends its side, behind what it has sent.
    pub(super) fn close(&mut self, key: StreamKey) {
        if let Some(stream) = self.streams.get_mut(&key) {
            (stream.down_ended, stream.target_gone) = (true, true);
        }
        self.forget_ended();
    }

    /// The network loses the stream: what is on the way may arrive in part.
    pub(super) fn cut(&mut self, key: StreamKey, env: &mut Env) {
        let Some(stream) = self.streams.get_mut(&key) else { return };
        (stream.up_ended, stream.down_ended) = (true, true);
        lose_some(&mut stream.up, env);
        lose_some(&mut stream.down, env);
    }

    /// The target's process is gone, and with it its end of every stream.
    pub(super) fn target_died(&mut self, env: &mut Env) {
        for stream in self.streams.values_mut() {
            (stream.down_ended, stream.target_gone) = (true, true);
            lose_some(&mut stream.down, env);
        }
        self.forget_ended();
    }

    /// Some of what is on the way to the target arrives.
    pub(super) fn deliver_up(&mut self, key: StreamKey, env: &mut Env) -> Result<Vec<Arrival>, String> {
        let Some(stream) = self.streams.get_mut(&key) else { return Ok(Vec::new()) };
        move_some(&mut stream.up, &mut stream.at_target, env);
        let mut arrivals = Vec::new();
        if stream.target_gone {
            stream.at_target.clear();
        }
        while let Some(arrival) = stream.next_arrival()? {
            arrivals.push(arrival);
        }
        if stream.up_ended && stream.up.is_empty() && !stream.target_gone {
            stream.target_gone = true;
            arrivals.push(Arrival::Closed);
            if !stream.at_target.is_empty() {
                env.happened(Happening::CutInsideBatch);
            }
        }
        if key < self.next_key && arrivals.iter().any(|arrival| !matches!(arrival, Arrival::Closed)) {
            env.happened(Happening::LateOldStream);
        }
        self.forget_ended();
        Ok(arrivals)
    }

    /// Some of what is on the way to the source arrives.
    pub(super) fn deliver_down(&mut self, key: StreamKey, env: &mut Env) -> Result<Vec<Answer>, String> {
        let Some(stream) = self.streams.get_mut(&key) else { return Ok(Vec::new()) };
        move_some(&mut stream.down, &mut stream.at_source, env);
        let mut answers = Vec::new();
        if stream.source_gone {
            stream.at_source.clear();
        }
        while let Some(frame) = take_frame(&mut stream.at_source)? {
            answers.push(Answer::Frame(frame));
        }
        if stream.down_ended && stream.down.is_empty() && !stream.source_gone {
            (stream.source_gone, stream.up_ended) = (true, true);
            answers.push(Answer::Lost);
        }
        self.forget_ended();
        Ok(answers)
    }

    fn forget_ended(&mut self) {
        self.streams.retain(|_, stream| !(stream.source_gone && stream.target_gone));
    }
}

impl Stream {
    fn next_arrival(&mut self) -> Result<Option<Arrival>, String> {
        if !self.opened {
            let Some(frame) = take_frame(&mut self.at_target)? else { return Ok(None) };
            self.opened = true;
            return match frame {
                Frame::Open(open) => Ok(Some(Arrival::Open(open))),
                other => Err(format!("a stream begins with a {} frame", other.name())),
            };
        }
        if self.at_target.len() < BatchHeader::LEN {
            return Ok(None);
        }
        let len_bytes = BatchHeader::needed(&self.at_target)
            .map_err(|error| format!("what was sent is no batch: {error}"))?;
        if self.at_target.len() < len_bytes {
            return Ok(None);
        }
        let mut batch = AlignedBuf::zeroed(len_bytes);
        batch.copy_from_slice(&self.at_target[..len_bytes]);
        self.at_target.drain(..len_bytes);
        Ok(Some(Arrival::Batch(batch.into_bytes())))
    }
}

fn take_frame(bytes: &mut Vec<u8>) -> Result<Option<Frame>, String> {
    let Some(header) = bytes.first_chunk::<FRAME_HEADER_BYTES>() else { return Ok(None) };
    let len_bytes = frame_len_bytes(header).map_err(|error| format!("a bad frame: {error}"))?;
    if bytes.len() < len_bytes {
        return Ok(None);
    }
    let frame = Frame::parse(&bytes[..len_bytes]).map_err(|error| format!("a bad frame: {error}"))?;
    bytes.drain(..len_bytes);
    Ok(Some(frame))
}

fn move_some(from: &mut Vec<u8>, to: &mut Vec<u8>, env: &mut Env) {
    let count = if env.rng.one_in(3) { env.any_index(from.len() + 1) } else { from.len() };
    to.extend(from.drain(..count));
}

fn lose_some(bytes: &mut Vec<u8>, env: &mut Env) {
    let count = match env.rng.below(3) {
        0 => 0,
        1 => env.any_index(bytes.len() + 1),
        _ => bytes.len(),
    };
    bytes.truncate(count);
}
