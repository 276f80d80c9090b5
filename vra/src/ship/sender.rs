//! The sender's machine: connection, grant, batches, acknowledgements. No I/O, no clock.

use std::collections::VecDeque;

use journal::batch::BatchLink;

use super::Retained;
use super::backoff::Backoff;
use super::pipeline::{OutgoingBatch, Pipeline};
use crate::api::{GenerationId, JournalId, VmId, VpgId};
use crate::clock::Now;
use crate::planted::{Planted, is_planted};
use crate::wire::{Ack, FEATURES, Frame, Grant, Open, PROTOCOL_VERSION, Refuse, RefuseCode, VolumeShape};

/// Whose stream it is.
#[derive(Clone, Debug)]
pub struct StreamIdentity {
    /// The VM.
    pub vm: VmId,
    /// Its group.
    pub vpg: VpgId,
    /// Its journal at the target.
    pub journal: JournalId,
    /// Its volumes, numbered from 0.
    pub volumes: Vec<VolumeShape>,
}

/// A run of numbers without a gap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GenerationStart {
    /// Its id.
    pub generation: GenerationId,
    /// The generations that it continues, newest first, back to the last one granted: at most [`crate::wire::MAX_ANCESTORS`].
    pub ancestors: Vec<GenerationId>,
    /// Its first number, above all numbers of its ancestors.
    pub first_seq: u64,
}

/// Bounds and delays of a sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SenderLimits {
    /// A batch is sealed when its payloads reach this, in bytes.
    pub batch_bytes: usize,
    /// A batch is sealed when it has this many records.
    pub batch_records: usize,
    /// A batch is sealed this long after its first record, in microseconds.
    pub seal_delay_us: u64,
    /// No batch is sealed while this much is sealed and not durable, in bytes.
    pub window_bytes: u64,
    /// A target that doesn't answer an open within this time is tried again, in microseconds.
    pub grant_timeout_us: u64,
    /// First and shortest wait before trying again, in microseconds.
    pub retry_min_us: u64,
    /// Longest such wait, in microseconds.
    pub retry_max_us: u64,
    /// Wait after a refusal that needs somebody to do something, in microseconds.
    pub retry_slow_us: u64,
}

impl SenderLimits {
    /// What the product uses.
    pub const STANDARD: Self = Self {
        batch_bytes: 1 << 20,
        batch_records: 8192,
        seal_delay_us: 2_000,
        window_bytes: 64 << 20,
        grant_timeout_us: 60_000_000,
        retry_min_us: 100_000,
        retry_max_us: 5_000_000,
        retry_slow_us: 15_000_000,
    };
}

/// What the sender wants done.
#[derive(Clone, Debug)]
pub enum Output {
    /// Open a stream to the target; answer with [`Sender::dialed`] or [`Sender::dial_failed`].
    Dial,
    /// Send this on the new stream.
    Open(Open),
    /// Send this batch.
    Batch(OutgoingBatch),
    /// Drop the stream, and whatever of it is not sent yet.
    Hangup,
    /// Everything up to here is durable at the target: the retained records are to be freed.
    Free {
        /// The last one.
        through_seq: u64,
    },
    /// Something that the owner of the VM must know.
    Event(SenderEvent),
}

/// What the owner of the VM must know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SenderEvent {
    /// The stream runs. From the first grant of a generation on its ancestors need not be remembered.
    Granted {
        /// The generation.
        generation: GenerationId,
        /// The target has nothing of this generation yet.
        new_generation: bool,
        /// The recovery disks are fresh: a sync may skip holes (B6).
        fresh_image: bool,
        /// Everything up to here is durable there.
        durable_through: u64,
    },
    /// The stream is gone; another attempt follows.
    Disconnected {
        /// Why, for people.
        reason: String,
    },
    /// The target refused; another attempt follows.
    Refused(Refuse),
    /// No further attempt until [`Sender::begin_generation`] or [`Sender::resume`].
    Stopped(StopReason),
}

/// Why a sender stopped.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StopReason {
    /// The target lost what it had acknowledged (C1): only a new generation with a full sync helps.
    #[error(
        "the target has everything through {durable_through}, but had acknowledged through {freed_through}: \
         a full sync in a new generation is needed"
    )]
    TargetLostData {
        /// Freed here because it was acknowledged.
        freed_through: u64,
        /// What the target says now.
        durable_through: u64,
    },
    /// The target claims numbers that were never given in this generation.
    #[error(
        "the target claims to have everything through {durable_through}, but only {published_through} was reached: \
         a full sync in a new generation is needed"
    )]
    TargetAhead {
        /// The highest number here.
        published_through: u64,
        /// What the target says.
        durable_through: u64,
    },
    /// The target refused in a way that trying again can't mend.
    #[error("the target refuses: {}", .0.text)]
    Refused(Refuse),
    /// A captured record fits into no batch.
    #[error("a captured record can't be sent: a full sync in a new generation is needed")]
    BadRecord(#[source] std::sync::Arc<journal::batch::PushError>),
}

impl StopReason {
    /// Whether a new generation with a full sync is the remedy. Otherwise a person must choose.
    pub fn needs_new_generation(&self) -> bool {
        match self {
            Self::TargetLostData { .. } | Self::TargetAhead { .. } | Self::BadRecord(_) => true,
            Self::Refused(_) => false,
        }
    }
}

/// When to call [`Sender::poll`] again, if nothing else happens before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wake {
    /// At this monotonic time, in microseconds.
    pub at_us: Option<u64>,
    /// When something is published.
    pub on_publish: bool,
}

/// Where a batch's time went, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StageTimes {
    /// From its first record's capture until it was sealed.
    pub queue_us: u64,
    /// On the wire, both ways, with the waiting before it.
    pub wire_us: u64,
    /// In the target's memory.
    pub memory_us: u64,
    /// Being written and synced there.
    pub disk_us: u64,
}

/// What a sender is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Phase {
    /// No connection; the next attempt is at this monotonic time, in microseconds.
    Waiting {
        /// When.
        retry_at_us: u64,
    },
    /// A connection is being made.
    Dialing,
    /// The target was asked.
    Opening,
    /// The stream runs.
    Streaming,
    /// See [`StopReason`].
    Stopped(StopReason),
}

/// A sender's state, for status.
#[derive(Clone, Debug)]
pub struct SenderStatus {
    /// What it is doing.
    pub phase: Phase,
    /// The generation in which it sends.
    pub generation: GenerationId,
    /// Everything up to here is durable at the target.
    pub durable_through: u64,
    /// Everything up to here has arrived there.
    pub received_through: u64,
    /// Capture time of the oldest record taken and not durable, by the system's clock.
    pub oldest_wall_us: Option<u64>,
    /// Bytes of batches sealed and not durable.
    pub in_flight_bytes: u64,
    /// Bytes of batches given to streams since the start.
    pub sent_bytes: u64,
    /// Where the last durable batch's time went.
    pub stages: StageTimes,
}

/// One VM's sender.
#[derive(Debug)]
pub struct Sender {
    identity: StreamIdentity,
    limits: SenderLimits,
    generation: GenerationStart,
    /// The highest number of this generation that was freed here.
    freed_through: Option<u64>,
    /// What the target last said of this generation.
    durable_through: u64,
    state: State,
    backoff: Backoff,
    outputs: VecDeque<Output>,
    sent_bytes: u64,
    stages: StageTimes,
}

#[derive(Debug)]
enum State {
    Waiting { retry_at_us: u64 },
    Dialing,
    Opening { deadline_us: u64 },
    Streaming { open_count: u64, pipeline: Box<Pipeline> },
    Stopped(StopReason),
}

impl Sender {
    /// A sender that will dial at its first poll. `seed` spreads the attempts of many senders.
    pub fn new(
        identity: StreamIdentity,
        generation: GenerationStart,
        limits: SenderLimits,
        seed: u64,
    ) -> Self {
        Self {
            identity,
            limits,
            durable_through: generation.first_seq - 1,
            generation,
            freed_through: None,
            state: State::Waiting { retry_at_us: 0 },
            backoff: Backoff::new(limits.retry_min_us, limits.retry_max_us, seed),
            outputs: VecDeque::new(),
            sent_bytes: 0,
            stages: StageTimes::default(),
        }
    }

    /// The next thing to do. `may_send` says that the stream can take a batch now: a batch is sealed as late as possible, so that it
    /// is as full as possible.
    pub fn poll(&mut self, now: Now, retained: &mut dyn Retained, may_send: bool) -> Option<Output> {
        if let Some(output) = self.outputs.pop_front() {
            return Some(output);
        }
        match &mut self.state {
            State::Waiting { retry_at_us } if now.mono_us >= *retry_at_us => {
                self.state = State::Dialing;
                Some(Output::Dial)
            }
            State::Opening { deadline_us } if now.mono_us >= *deadline_us => {
                self.outputs.push_back(Output::Hangup);
                self.disconnected(now, "the target did not answer the open in time");
                self.outputs.pop_front()
            }
            State::Streaming { pipeline, .. } if may_send => match pipeline.poll(now, retained) {
                Ok(batch) => {
                    let batch = batch?;
                    self.sent_bytes += batch.len_bytes as u64;
                    Some(Output::Batch(batch))
                }
                Err(error) => {
                    self.stop(StopReason::BadRecord(std::sync::Arc::new(error)));
                    self.outputs.pop_front()
                }
            },
            _ => None,
        }
    }

    /// When to poll again.
    pub fn wake(&self) -> Wake {
        match &self.state {
            State::Waiting { retry_at_us } => Wake { at_us: Some(*retry_at_us), on_publish: false },
            State::Opening { deadline_us } => Wake { at_us: Some(*deadline_us), on_publish: false },
            State::Streaming { pipeline, .. } => {
                Wake { at_us: pipeline.wake_at_us(), on_publish: pipeline.wake_on_publish() }
            }
            State::Dialing | State::Stopped(_) => Wake { at_us: None, on_publish: false },
        }
    }

    /// A stream to the target is there.
    pub fn dialed(&mut self, now: Now) {
        if !matches!(self.state, State::Dialing) {
            self.outputs.push_back(Output::Hangup);
            return;
        }
        self.state = State::Opening { deadline_us: now.mono_us + self.limits.grant_timeout_us };
        self.outputs.push_back(Output::Open(Open {
            features_offered: FEATURES,
            features_required: 0,
            vm: self.identity.vm,
            vpg: self.identity.vpg,
            journal: self.identity.journal,
            generation: self.generation.generation,
            ancestors: self.generation.ancestors.clone(),
            first_seq: self.generation.first_seq,
            volumes: self.identity.volumes.clone(),
        }));
    }

    /// No stream could be made.
    pub fn dial_failed(&mut self, now: Now, reason: &str) {
        if matches!(self.state, State::Dialing) {
            self.disconnected(now, reason);
        }
    }

    /// The stream ended without a refusal.
    pub fn stream_lost(&mut self, now: Now, reason: &str) {
        if matches!(self.state, State::Opening { .. } | State::Streaming { .. }) {
            self.disconnected(now, reason);
        }
    }

    /// A frame came on the stream.
    pub fn frame(&mut self, frame: Frame, now: Now, retained: &dyn Retained) {
        match (frame, &mut self.state) {
            (Frame::Grant(grant), State::Opening { .. }) => self.granted(&grant, now, retained),
            (Frame::Refuse(refuse), State::Opening { .. } | State::Streaming { .. }) => {
                self.refused(refuse, now);
            }
            (Frame::Ack(ack), State::Streaming { open_count, pipeline }) => {
                if ack.open_count != *open_count {
                    return;
                }
                match pipeline.ack(&ack, now) {
                    Ok(stages) => {
                        self.stages = stages.unwrap_or(self.stages);
                        self.acknowledged(&ack);
                    }
                    Err(reason) => self.broken(now, reason),
                }
            }
            (frame, State::Opening { .. } | State::Streaming { .. }) => {
                self.broken(now, &format!("the target sent an unexpected {} frame", frame.name()));
            }
            _ => {}
        }
    }

    /// Goes on with another generation: what was not durable of the last one is no longer sent.
    pub fn begin_generation(&mut self, generation: GenerationStart, now: Now) {
        if matches!(self.state, State::Opening { .. } | State::Streaming { .. } | State::Dialing) {
            self.outputs.push_back(Output::Hangup);
        }
        self.durable_through = generation.first_seq - 1;
        self.generation = generation;
        self.freed_through = None;
        self.state = State::Waiting { retry_at_us: now.mono_us };
    }

    /// Goes on with volumes that have grown (E3): from the next stream on, which is opened now. What is sent on it follows a target that knows
    /// their sizes.
    pub fn set_volumes(&mut self, volumes: Vec<VolumeShape>, now: Now) {
        if std::mem::replace(&mut self.identity.volumes, volumes) == self.identity.volumes {
            return;
        }
        if matches!(self.state, State::Opening { .. } | State::Streaming { .. } | State::Dialing) {
            self.outputs.push_back(Output::Hangup);
        }
        if !matches!(self.state, State::Stopped(_)) {
            self.state = State::Waiting { retry_at_us: now.mono_us };
        }
    }

    /// Tries again now: after a stop that a person has looked into, or because the target is known to be back.
    pub fn resume(&mut self, now: Now) {
        if matches!(self.state, State::Waiting { .. } | State::Stopped(_)) {
            self.backoff.reset();
            self.state = State::Waiting { retry_at_us: now.mono_us };
        }
    }

    /// Its state.
    pub fn status(&self) -> SenderStatus {
        let (phase, pipeline) = match &self.state {
            State::Waiting { retry_at_us } => (Phase::Waiting { retry_at_us: *retry_at_us }, None),
            State::Dialing => (Phase::Dialing, None),
            State::Opening { .. } => (Phase::Opening, None),
            State::Streaming { pipeline, .. } => (Phase::Streaming, Some(pipeline)),
            State::Stopped(reason) => (Phase::Stopped(reason.clone()), None),
        };
        SenderStatus {
            phase,
            generation: self.generation.generation,
            durable_through: self.durable_through,
            received_through: pipeline.map_or(self.durable_through, |pipeline| pipeline.received_through()),
            oldest_wall_us: pipeline.and_then(|pipeline| pipeline.oldest_wall_us()),
            in_flight_bytes: pipeline.map_or(0, |pipeline| pipeline.in_flight_bytes()),
            sent_bytes: self.sent_bytes,
            stages: self.stages,
        }
    }

    fn granted(&mut self, grant: &Grant, now: Now, retained: &dyn Retained) {
        if grant.features & !FEATURES != 0 {
            return self.broken(now, "the target granted features that were not offered");
        }
        let first_seq = self.generation.first_seq;
        let (held_through, published_through) = (grant.durable_through, retained.published_through());
        let durable_through = if grant.new_generation { first_seq - 1 } else { held_through };
        if let Some(freed_through) = self.freed_through.filter(|freed| *freed > durable_through) {
            return self.stop(StopReason::TargetLostData { freed_through, durable_through: held_through });
        }
        let below_generation = !grant.new_generation && held_through + 1 < first_seq;
        if below_generation || grant.new_generation && held_through >= first_seq {
            return self.broken(now, "the target granted a place outside the generation");
        }
        if durable_through > published_through {
            return self.stop(StopReason::TargetAhead { published_through, durable_through });
        }
        let next_seq =
            if is_planted(Planted::ResendSkipped) { published_through + 1 } else { durable_through + 1 };
        let link = BatchLink {
            journal_id: self.identity.journal.0,
            generation: self.generation.generation.0,
            open_count: grant.open_count,
            prev_batch_crc: grant.tail_crc,
        };
        let pipeline = Box::new(Pipeline::new(link, self.limits, next_seq, now));
        self.state = State::Streaming { open_count: grant.open_count, pipeline };
        self.outputs.push_back(Output::Event(SenderEvent::Granted {
            generation: self.generation.generation,
            new_generation: grant.new_generation,
            fresh_image: grant.fresh_image,
            durable_through: held_through,
        }));
        self.durable(durable_through);
    }

    fn acknowledged(&mut self, ack: &Ack) {
        if self.durable(ack.durable_through) {
            self.backoff.reset();
        }
    }

    /// Frees what is durable; says whether that is more than before.
    fn durable(&mut self, through_seq: u64) -> bool {
        self.durable_through = through_seq;
        if through_seq < self.generation.first_seq
            || self.freed_through.is_some_and(|freed| freed >= through_seq)
        {
            return false;
        }
        self.freed_through = Some(through_seq);
        self.outputs.push_back(Output::Free { through_seq });
        true
    }

    fn refused(&mut self, refuse: Refuse, now: Now) {
        self.outputs.push_back(Output::Hangup);
        let wait_us = match refuse.code {
            RefuseCode::NotDescendant | RefuseCode::NotAllowed | RefuseCode::Closed => {
                return self.halt(StopReason::Refused(refuse));
            }
            // Fenced: it may have been an older stream of this very source whose open came late. Another source of a newer generation
            // lets the target refuse this one for good.
            // A full journal makes room by itself; a target that has just started gets its definitions and keys, and one side has a definition
            // with other volumes before the other.
            RefuseCode::Busy
            | RefuseCode::BadBatch
            | RefuseCode::Fenced
            | RefuseCode::JournalFull
            | RefuseCode::VolumesDiffer
            | RefuseCode::UnknownVm => self.backoff.failed(),
            // A target that speaks this version and says otherwise is tried as any other.
            RefuseCode::Version if refuse.detail == u64::from(PROTOCOL_VERSION) => self.backoff.failed(),
            RefuseCode::Version
            | RefuseCode::Feature
            | RefuseCode::JournalDiffers
            | RefuseCode::Storage
            | RefuseCode::Other(_) => self.backoff.spread(self.limits.retry_slow_us),
        };
        self.state = State::Waiting { retry_at_us: now.mono_us + wait_us };
        self.outputs.push_back(Output::Event(SenderEvent::Refused(refuse)));
    }

    fn stop(&mut self, reason: StopReason) {
        self.outputs.push_back(Output::Hangup);
        self.halt(reason);
    }

    fn halt(&mut self, reason: StopReason) {
        self.state = State::Stopped(reason.clone());
        self.outputs.push_back(Output::Event(SenderEvent::Stopped(reason)));
    }

    /// The peer doesn't keep to the protocol.
    fn broken(&mut self, now: Now, reason: &str) {
        self.outputs.push_back(Output::Hangup);
        self.disconnected(now, reason);
    }

    fn disconnected(&mut self, now: Now, reason: &str) {
        self.state = State::Waiting { retry_at_us: now.mono_us + self.backoff.failed() };
        self.outputs.push_back(Output::Event(SenderEvent::Disconnected { reason: reason.to_owned() }));
    }
}
