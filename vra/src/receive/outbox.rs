use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use tokio::sync::Notify;

use crate::wire::{Ack, Frame};

/// What a worker has to say on a stream, until the stream's task has sent it. Bounded: a newer acknowledgement replaces an older one.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    state: Mutex<State>,
    filled: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// At most a grant and a refusal.
    frames: VecDeque<Frame>,
    ack: Option<Ack>,
    closed: bool,
}

impl Outbox {
    /// Sends a frame.
    pub(super) fn send(&self, frame: Frame) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match frame {
            Frame::Ack(ack) => state.ack = Some(ack),
            frame => state.frames.push_back(frame),
        }
        drop(state);
        self.filled.notify_one();
    }

    /// Ends the stream after what was sent.
    pub(super) fn close(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).closed = true;
        self.filled.notify_one();
    }

    /// The next frame, or none after the last one. An acknowledgement comes after the frames that were sent before and after it, so a grant
    /// comes first and a refusal takes nothing back.
    pub(super) async fn next(&self) -> Option<Frame> {
        loop {
            {
                let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
                let granted = matches!(state.frames.front(), Some(Frame::Grant(_)));
                if granted {
                    return state.frames.pop_front();
                }
                if let Some(ack) = state.ack.take() {
                    return Some(Frame::Ack(ack));
                }
                if let Some(frame) = state.frames.pop_front() {
                    return Some(frame);
                }
                if state.closed {
                    return None;
                }
            }
            self.filled.notified().await;
        }
    }
}
