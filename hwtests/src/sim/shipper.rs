//! The source's end of the wire: the product's sender, driven.

use bytes::BytesMut;
use journal::batch::BatchView;
use journal::format::ChainPoint;
use vra::ship::{
    GenerationStart, Output, Phase, Retained, Sender, SenderEvent, SenderLimits, StreamIdentity,
};

use super::coverage::Happening;
use super::env::Env;
use super::ledger::Ledger;
use super::streams::{Answer, StreamKey, Streams};

/// Longest batch payload, so that a slot takes several.
const BATCH_BYTES: usize = 20 << 10;

pub(super) struct Shipper {
    sender: Sender,
    dialing: bool,
    current: Option<StreamKey>,
    /// The highest number that was ever sent.
    sent_through: u64,
}

impl Shipper {
    /// `most_records` bounds a batch.
    pub(super) fn new(
        identity: StreamIdentity,
        start: GenerationStart,
        most_records: usize,
        env: &mut Env,
    ) -> Self {
        let limits = SenderLimits {
            batch_bytes: BATCH_BYTES,
            batch_records: most_records,
            seal_delay_us: 1 + env.rng.below(100),
            window_bytes: 64 << 10,
            grant_timeout_us: 2_000,
            retry_min_us: 10,
            retry_max_us: 200,
            retry_slow_us: 400,
        };
        let sender = Sender::new(identity, start, limits, env.rng.next_u64());
        Self { sender, dialing: false, current: None, sent_through: 0 }
    }

    pub(super) fn phase(&self) -> Phase {
        self.sender.status().phase
    }

    pub(super) fn current(&self) -> Option<StreamKey> {
        self.current
    }

    pub(super) fn begin_generation(&mut self, start: GenerationStart, env: &Env) {
        self.sender.begin_generation(start, env.now());
    }

    /// The process that has it dies.
    pub(super) fn die(self, streams: &mut Streams, env: &mut Env) {
        if let Some(key) = self.current {
            streams.hang_up(key, env);
        }
    }

    /// Does all that the sender wants now.
    pub(super) fn drive(
        &mut self,
        retained: &mut dyn Retained,
        streams: &mut Streams,
        ledger: &mut Ledger,
        env: &mut Env,
    ) -> Result<Vec<SenderEvent>, String> {
        let mut events = Vec::new();
        loop {
            let may_send = self.current.is_some_and(|key| streams.may_send(key));
            match self.sender.poll(env.now(), retained, may_send) {
                Some(Output::Dial) => self.dialing = true,
                Some(Output::Open(open)) => self.send(&open.encode(), streams),
                Some(Output::Batch(batch)) => {
                    let mut bytes = BytesMut::with_capacity(batch.len_bytes);
                    batch.chunks.iter().for_each(|chunk| bytes.extend_from_slice(chunk));
                    let view = BatchView::parse(&bytes).map_err(|error| format!("sealed badly: {error}"))?;
                    ledger.sent(ChainPoint { seq: view.last_seq(), batch_crc: view.crc() });
                    if batch.first_seq <= self.sent_through {
                        env.happened(Happening::Resent);
                    }
                    self.sent_through = self.sent_through.max(batch.last_seq);
                    self.send(&bytes, streams);
                }
                Some(Output::Hangup) => {
                    self.dialing = false;
                    if let Some(key) = self.current.take() {
                        streams.hang_up(key, env);
                    }
                }
                Some(Output::Free { through_seq }) => {
                    if through_seq > ledger.acked() {
                        return Err(format!(
                            "the source freed {through_seq}, acknowledged was {}",
                            ledger.acked()
                        ));
                    }
                    retained.free_through(through_seq);
                }
                Some(Output::Event(event)) => events.push(event),
                None => return Ok(events),
            }
        }
    }

    /// The network answers a dial, if one waits.
    pub(super) fn answer_dial(&mut self, reachable: bool, streams: &mut Streams, env: &Env) {
        if std::mem::take(&mut self.dialing) {
            if reachable {
                self.current = Some(streams.dial());
                self.sender.dialed(env.now());
            } else {
                self.sender.dial_failed(env.now(), "nobody answers");
            }
        }
    }

    /// Something came on a stream; what comes on any but the current one is nobody's.
    pub(super) fn take(&mut self, key: StreamKey, answers: Vec<Answer>, retained: &dyn Retained, env: &Env) {
        for answer in answers {
            if self.current != Some(key) {
                return;
            }
            match answer {
                Answer::Frame(frame) => self.sender.frame(frame, env.now(), retained),
                Answer::Lost => {
                    self.current = None;
                    self.sender.stream_lost(env.now(), "the stream ended");
                }
            }
        }
    }

    fn send(&self, bytes: &[u8], streams: &mut Streams) {
        if let Some(key) = self.current {
            streams.send_up(key, bytes);
        }
    }
}
