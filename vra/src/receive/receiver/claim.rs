//! The receiver's part that decides who may write (A5).

use journal::batch::BatchLink;
use journal::writer::{Change, ChangeError, Grant as Granted};
use uuid::Uuid;

use super::base_sync::BaseSync;
use super::{Candidate, Receiver, Stream};
use crate::clock::Now;
use crate::receive::admission::{self, Admission};
use crate::receive::error_chain;
use crate::receive::intake::Intake;
use crate::receive::receiver_types::{ReceiverEvent, ReceiverOutput};
use crate::wire::{FEATURES, Frame, Grant, Open, Refuse, RefuseCode};

impl Receiver {
    pub(super) fn check_open(&self, open: &Open) -> Result<(), Refuse> {
        let refuse = |code, detail, text: &str| Err(Refuse { code, detail, text: text.to_owned() });
        let missing = open.features_required & !FEATURES;
        if missing != 0 {
            return refuse(RefuseCode::Feature, missing, "the target lacks a feature: upgrade its VRA");
        }
        if self.failed {
            return refuse(
                RefuseCode::Busy,
                0,
                "the journal or a recovery disk failed and is being opened again",
            );
        }
        if open.journal != self.identity.journal {
            let text = format!("the VM's journal here is {}, not {}", self.identity.journal, open.journal);
            return refuse(RefuseCode::JournalDiffers, 0, &text);
        }
        if !self.identity.may_stream(&open.volumes) {
            return refuse(RefuseCode::VolumesDiffer, 0, "the VM's volumes are not those of its journal");
        }
        // Who can't own the journal must not end the stream of who does.
        self.writer
            .check_claim(open.generation.0, self.parent_of(open), open.first_seq)
            .map_err(|error| Refuse { code: RefuseCode::NotDescendant, detail: 0, text: error.to_string() })
    }

    /// The ancestor that a stream continues. Any of them may own the tail: generations that never reached the target lie between it and the
    /// stream's own.
    pub(super) fn parent_of(&self, open: &Open) -> Uuid {
        let tail = self.writer.superblock().tail_generation;
        let newest = open.ancestors.first().map_or(Uuid::nil(), |ancestor| ancestor.0);
        if open.ancestors.iter().any(|ancestor| ancestor.0 == tail) { tail } else { newest }
    }

    /// Asks the journal for the candidate's ownership (A5).
    pub(super) fn claim(&mut self) {
        let Some(mut candidate) = self.candidate.take() else { return };
        let (generation, first_seq) = (candidate.open.generation.0, candidate.open.first_seq);
        let parent = self.parent_of(&candidate.open);
        if self.full {
            self.writer.retry(self.policy.limits);
        }
        if self.writer.superblock().tail_generation != generation
            && let Err(refuse) = self.admit_full_sync()
        {
            return self.refuse(candidate.id, refuse);
        }
        match self.writer.change(Change::Claim { generation, parent, first_seq }) {
            Ok(ticket) => {
                candidate.claim = Some(ticket);
                self.candidate = Some(candidate);
            }
            Err(error) => {
                let code = match &error {
                    ChangeError::Claim(_) => RefuseCode::NotDescendant,
                    _ => RefuseCode::Storage,
                };
                let text = error_chain(&error);
                self.refuse(candidate.id, Refuse { code, detail: 0, text });
            }
        }
    }

    /// The journal's tail was another one when the claim's turn had come. An earlier candidate's claim may have become durable before it:
    /// if that one's generation is an ancestor too, the claim is made again from there.
    pub(super) fn claim_refused(&mut self, ticket: u64) {
        let refused = self.candidate.take_if(|candidate| candidate.claim == Some(ticket));
        let Some(candidate) = refused else { return };
        match self.check_open(&candidate.open) {
            Ok(()) => self.candidate = Some(Candidate { claim: None, ..candidate }),
            Err(refuse) => self.refuse(candidate.id, refuse),
        }
    }

    /// Whether a claim that was refused is made again now.
    pub(super) fn claims_again(&mut self, now: Now) -> bool {
        let is_claimed =
            |receiver: &Self| receiver.candidate.as_ref().map(|candidate| candidate.claim.is_some());
        if is_claimed(self) != Some(false) {
            return false;
        }
        self.advance(now);
        is_claimed(self) == Some(true)
    }

    /// A new generation begins with a full sync: decides where that goes (C5).
    pub(super) fn admit_full_sync(&mut self) -> Result<(), Refuse> {
        let checkpoints = self.history.checkpoints().len();
        match admission::of_full_sync(
            &self.writer,
            &self.policy,
            &self.identity.volumes,
            checkpoints,
            self.promotable_count(),
            self.pins,
        ) {
            Admission::AsIs => Ok(()),
            Admission::GiveUpHistory => {
                let event = ReceiverEvent::HistoryGivenUp { checkpoints };
                self.outputs.push_back(ReceiverOutput::Event(event));
                self.history.clear();
                self.base_sync = BaseSync::default();
                // The sync's own id comes with its begin.
                self.writer.change(Change::GiveUpHistory { sync_id: 0 }).map(drop).map_err(|error| Refuse {
                    code: RefuseCode::Storage,
                    detail: 0,
                    text: error_chain(&error),
                })
            }
            Admission::Refuse(text) => Err(Refuse { code: RefuseCode::JournalFull, detail: 0, text }),
        }
    }

    pub(super) fn granted(&mut self, ticket: u64, grant: &Granted) {
        // Another claim's answer is for a candidate that has gone.
        let Some(candidate) = self.candidate.take_if(|candidate| candidate.claim == Some(ticket)) else {
            return;
        };
        let superblock = self.writer.superblock();
        let first_seq = superblock.generation_first_seq;
        let new_generation = grant.durable.seq < first_seq;
        let link = BatchLink {
            journal_id: superblock.journal_id,
            generation: superblock.tail_generation,
            open_count: grant.open_count,
            prev_batch_crc: grant.durable.batch_crc,
        };
        self.arrivals.clear();
        self.base_sync.after_end.clear();
        self.base_sync.ended.clear();
        self.history.forget_pending();
        let next_seq = (grant.durable.seq + 1).max(first_seq);
        let intake = Intake::new(link, next_seq, candidate.open.volumes.clone());
        let frame = Frame::Grant(Grant {
            features: candidate.open.features_offered & FEATURES,
            open_count: grant.open_count,
            durable_through: grant.durable.seq,
            tail_crc: grant.durable.batch_crc,
            fresh_image: grant.state.is_base_sync()
                && superblock.volumes.iter().all(|volume| volume.fresh_image),
            new_generation,
            window_bytes: self.policy.window_bytes,
        });
        self.stream = Some(Stream { id: candidate.id, intake, open_count: grant.open_count });
        self.outputs.push_back(ReceiverOutput::Send { stream: candidate.id, frame });
        self.outputs.push_back(ReceiverOutput::Event(ReceiverEvent::Granted { new_generation }));
    }
}
