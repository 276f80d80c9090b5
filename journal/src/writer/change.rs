//! Changes of the superblock: who owns the tail, where the base is, how long the file is, what the manifest says.

use std::collections::BTreeSet;

use uuid::Uuid;

use crate::bad_ranges::BadRanges;
use crate::crypt::{Encryption, KeyError, NoRandom};
use crate::format::bad_list::{BadList, MAX_BAD_RANGES};
use crate::format::manifest::{Manifest, ManifestError};
use crate::format::superblock::PairPlace;
use crate::format::{
    BAD_LIST_OFFSETS, ChainPoint, JournalState, MANIFEST_OFFSETS, PAGE_BYTES, SUPERBLOCK_OFFSETS, Superblock,
    VolumeState, edge_pages, slot_offset_bytes,
};
use crate::planted::{Bug, planted};
use crate::storage::{Op, Purpose};

use super::step::{Effect, Step};
use super::{Event, Writer, segment};

/// Something that must be durable in the superblock before it counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A stream wants to own the tail (A5). Batches that wait from an older stream are dropped; answered by
    /// [`Event::Granted`] or [`Event::Refused`].
    Claim {
        /// The stream's generation.
        generation: Uuid,
        /// The generation before it; nil if none.
        parent: Uuid,
        /// Its first number. Means nothing when the generation owns the tail already.
        first_seq: u64,
    },
    /// A sync of the whole VM begins that goes straight to the recovery disks (B6), the first one or after
    /// [`Change::GiveUpHistory`].
    BeginBaseSync {
        /// The sync.
        sync_id: u64,
    },
    /// All records up to here are durable in the recovery disks, which the caller has synced (B6). Answered by
    /// [`Event::Durable`].
    AdvanceBase {
        /// Where.
        through: ChainPoint,
        /// The sync is complete: from now on batches are journaled.
        end: bool,
    },
    /// Give up all history (C5): all segments are freed, and nothing can be recovered until the sync's end.
    GiveUpHistory {
        /// The sync that is to follow.
        sync_id: u64,
    },
    /// Promotion through the end of a closed segment begins (C2): from now on nothing below can be opened. Durable in the superblock and as a
    /// record in the stream before it is answered.
    AnnouncePromotion {
        /// The end of the newest segment that is promoted.
        through: ChainPoint,
    },
    /// The recovery disks hold everything up to an announced place, durably: its segments' slots are free.
    EndPromotion {
        /// The place that was announced.
        through: ChainPoint,
        /// The volumes' sizes at that place, by number, in bytes.
        size_bytes: Vec<u64>,
        /// What of the recovery disks can't be trusted then (C5).
        bad_ranges: BadRanges,
    },
    /// The list of what of the recovery disks can't be trusted (C5), while nothing is promoted. Before a page is written in part of which the
    /// disk has lost the rest: afterwards nothing tells.
    NoteBadRanges(BadRanges),
    /// Give back the space of free slots above those that are kept and these.
    Shrink {
        /// How many more are kept.
        spare_slots: u32,
    },
    /// The VM's volumes. Bases given are kept as they are given.
    SetVolumes(Vec<VolumeState>),
    /// Disks that the VM has from now on, with the manifest that names them: both are durable together. Their recovery disks are there and
    /// read zeroes. What was recovered before doesn't have them.
    AddVolumes {
        /// Id and size in bytes of each, in the order of their numbers, which go on from those that there are.
        volumes: Vec<(Uuid, u64)>,
        /// The manifest's text.
        manifest: String,
    },
    /// The manifest's text.
    SetManifest(String),
    /// Whether segments are encrypted from now on, and with which key. The open one is sealed; those that are there stay as they are.
    SetEncryption(Encryption),
    /// Seal the open segment, so that the next opening has nothing to copy.
    Seal,
}

/// What a stream that owns the tail goes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// To be carried by its batches.
    pub open_count: u64,
    /// Where it goes on.
    pub durable: ChainPoint,
    /// Whether records go to the recovery disks, or to the journal.
    pub state: JournalState,
}

/// Why a stream can't own the tail (A5): both sides stop, and a human chooses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClaimError {
    /// The journal's tail was written by a generation that is not the stream's ancestor.
    #[error(
        "the journal's tail, record {tail_seq}, was written by generation {tail_generation}, of which the stream's generation is no child"
    )]
    NoAncestor {
        /// Who wrote the tail.
        tail_generation: Uuid,
        /// The last durable number.
        tail_seq: u64,
    },
    /// The new generation would use numbers that are in the journal already.
    #[error(
        "the new generation begins with record {first_seq}, but the journal holds record {tail_seq} already"
    )]
    NumberUsed {
        /// Its first number.
        first_seq: u64,
        /// The last durable number.
        tail_seq: u64,
    },
}

/// Why a change is refused at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    /// The journal is poisoned.
    #[error("the journal failed and must be opened again")]
    Poisoned,
    /// Nobody may own the tail like this.
    #[error("the stream cannot own the journal")]
    Claim(#[source] ClaimError),
    /// The journal is not in the state that the change needs.
    #[error("the journal's state doesn't allow this change")]
    State,
    /// More volumes than the superblock has room for.
    #[error("{0} volumes are more than a journal has room for")]
    Volumes(usize),
    /// The manifest doesn't fit.
    #[error("the manifest cannot be written")]
    Manifest(#[source] ManifestError),
    /// Nothing could be encrypted with that key.
    #[error("the journal cannot be encrypted so")]
    Key(#[source] KeyError),
    /// There is no key to be had.
    #[error(transparent)]
    NoRandom(#[from] NoRandom),
}

/// What follows when a change is durable.
#[derive(Debug)]
pub(super) enum AfterChange {
    Grown,
    Change { ticket: u64, change: Box<Change> },
}

impl Writer {
    /// Asks for a change; gives its ticket for [`Event::Changed`]. Changes go before waiting batches.
    ///
    /// # Errors
    /// The change is refused.
    pub fn change(&mut self, change: Change) -> Result<u64, ChangeError> {
        if self.poisoned {
            return Err(ChangeError::Poisoned);
        }
        self.check_change(&change)?;
        if matches!(change, Change::Claim { .. }) {
            self.claims_pending += 1;
        }
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.changes.push_back((ticket, change));
        Ok(ticket)
    }

    fn check_change(&self, change: &Change) -> Result<(), ChangeError> {
        let allowed = |good: bool| if good { Ok(()) } else { Err(ChangeError::State) };
        match change {
            &Change::Claim { generation, parent, first_seq } => {
                self.check_claim(generation, parent, first_seq).map_err(ChangeError::Claim)
            }
            Change::BeginBaseSync { .. } => allowed(self.superblock.state.is_base_sync()),
            Change::AdvanceBase { through, .. } => allowed(
                self.superblock.state.is_base_sync()
                    && through.seq >= self.durable.seq
                    && through.seq <= self.accepted.seq,
            ),
            Change::GiveUpHistory { .. } | Change::Shrink { .. } => Ok(()),
            Change::AnnouncePromotion { through } => allowed(self.can_promote(*through)),
            Change::EndPromotion { through, size_bytes, bad_ranges } => allowed(
                self.can_promote(*through)
                    && self.superblock.promotion_intent_seq == through.seq
                    && size_bytes.len() == self.superblock.volumes.len()
                    && bad_ranges.len() <= MAX_BAD_RANGES,
            ),
            Change::NoteBadRanges(bad_ranges) => {
                allowed(!self.superblock.state.is_base_sync() && bad_ranges.len() <= MAX_BAD_RANGES)
            }
            Change::SetVolumes(volumes) => {
                if volumes.len() > crate::batch::MAX_VOLUMES {
                    return Err(ChangeError::Volumes(volumes.len()));
                }
                Ok(())
            }
            Change::AddVolumes { volumes, manifest } => {
                let count = self.superblock.volumes.len() + volumes.len();
                if count > crate::batch::MAX_VOLUMES {
                    return Err(ChangeError::Volumes(count));
                }
                self.manifest(manifest).encode().map(drop).map_err(ChangeError::Manifest)
            }
            Change::SetManifest(text) => {
                self.manifest(text).encode().map(drop).map_err(ChangeError::Manifest)
            }
            Change::SetEncryption(Encryption::On(key)) => self.keyring.check(key).map_err(ChangeError::Key),
            Change::SetEncryption(Encryption::Never) => {
                allowed(self.superblock.encryption == Encryption::Never)
            }
            Change::SetEncryption(Encryption::Off) | Change::Seal => Ok(()),
        }
    }

    /// Whether a stream may own the tail as it is now. It is asked once more when the claim's turn has come, because a
    /// group under way still moves the tail.
    ///
    /// # Errors
    /// Why not.
    pub fn check_claim(&self, generation: Uuid, parent: Uuid, first_seq: u64) -> Result<(), ClaimError> {
        let (tail_generation, tail_seq) = (self.superblock.tail_generation, self.durable.seq);
        if tail_generation == generation {
            return Ok(());
        }
        if !tail_generation.is_nil() && tail_generation != parent {
            return Err(ClaimError::NoAncestor { tail_generation, tail_seq });
        }
        if first_seq <= tail_seq {
            return Err(ClaimError::NumberUsed { first_seq, tail_seq });
        }
        Ok(())
    }

    pub(super) fn begin_change(&mut self) -> Option<Step> {
        while let Some((ticket, change)) = self.changes.pop_front() {
            if let Some(step) = self.begin_one_change(ticket, change) {
                return Some(step);
            }
        }
        None
    }

    /// The step of a change, or nothing if it needed none and is done.
    fn begin_one_change(&mut self, ticket: u64, change: Change) -> Option<Step> {
        let mut next = self.superblock.clone();
        let (mut before, mut after) = (Vec::new(), Vec::new());
        match &change {
            &Change::Claim { generation, parent, first_seq } => {
                self.drop_waiting();
                if let Err(reason) = self.check_claim(generation, parent, first_seq) {
                    self.claims_pending -= 1;
                    self.events.push_back(Event::Refused { ticket, reason });
                    return None;
                }
                if next.tail_generation == generation {
                    self.after_change(AfterChange::Change { ticket, change: Box::new(change) });
                    return None;
                }
                next.parent_generation = next.tail_generation;
                if next.parent_generation.is_nil() {
                    next.parent_generation = parent;
                }
                next.tail_generation = generation;
                next.generation_first_seq = first_seq;
                next.generation_fork_seq = self.durable.seq;
            }
            &Change::BeginBaseSync { sync_id } => {
                next.state = match next.state {
                    JournalState::HistoryGivenUp { .. } => JournalState::HistoryGivenUp { sync_id },
                    _ => JournalState::FirstSync { sync_id },
                };
            }
            &Change::AdvanceBase { through, end } => {
                next.low_water = through;
                next.volumes.iter_mut().for_each(|volume| volume.base_seq = through.seq);
                if end {
                    // A sync has written all of the disks.
                    self.note_bad_ranges(&BadRanges::default(), &mut next, &mut before);
                    next.state = JournalState::Consistent;
                }
            }
            &Change::GiveUpHistory { sync_id } => {
                self.drop_waiting();
                next.state = JournalState::HistoryGivenUp { sync_id };
                next.low_water = self.durable;
                next.low_water_segment = self.next_number;
                after = self.segments_erased();
            }
            Change::AnnouncePromotion { through } => return self.announce_promotion(ticket, *through),
            Change::EndPromotion { through, size_bytes, bad_ranges } => {
                self.note_bad_ranges(bad_ranges, &mut next, &mut before);
                next.low_water = *through;
                next.low_water_segment = self.segment_after(*through);
                for (volume, size_bytes) in next.volumes.iter_mut().zip(size_bytes) {
                    volume.size_bytes = *size_bytes;
                }
            }
            Change::NoteBadRanges(bad_ranges) => self.note_bad_ranges(bad_ranges, &mut next, &mut before),
            &Change::Shrink { spare_slots } => return self.shrink(ticket, spare_slots),
            Change::SetVolumes(volumes) => next.volumes.clone_from(volumes),
            Change::AddVolumes { volumes, manifest } => {
                // What is at the stream's end now can be recovered, without them; nothing that is written later is before their first record.
                let base_seq = self.durable.seq + 1;
                let added = volumes.iter().map(|&(id, size_bytes)| VolumeState {
                    id,
                    base_seq,
                    size_bytes,
                    fresh_image: false,
                });
                next.volumes.extend(added);
                self.note_manifest(manifest, &mut next, &mut before);
            }
            Change::SetManifest(text) => self.note_manifest(text, &mut next, &mut before),
            Change::SetEncryption(encryption) => {
                // Even one that only an intent has begun: nothing more is to be written with the former key.
                if let Some(open) = self.open.take() {
                    self.seal(open);
                }
                before.push(std::mem::take(&mut self.riders));
                next.encryption = *encryption;
            }
            Change::Seal => before.push(self.seal_open()),
        }
        let then = AfterChange::Change { ticket, change: Box::new(change) };
        let mut step = self.superblock_step(before, next, then);
        after.into_iter().for_each(|phase| step.push_phase(phase));
        Some(step)
    }

    /// Seals the open segment and gives what is to be written. One without batches of the stream, begun for an intent, would take up a
    /// slot for nothing.
    fn seal_open(&mut self) -> Vec<(Purpose, Op)> {
        if let Some(open) = self.open.take_if(|open| !open.is_empty()) {
            self.seal(open);
        }
        std::mem::take(&mut self.riders)
    }

    /// Puts a list of bad ranges beside the one that counts, if it is another one.
    fn note_bad_ranges(
        &self,
        ranges: &BadRanges,
        next: &mut Superblock,
        before: &mut Vec<Vec<(Purpose, Op)>>,
    ) {
        if *ranges == self.bad_ranges || planted(Bug::BadRangesForgotten) {
            return;
        }
        let (journal_id, sequence) = (next.journal_id, next.sequence + 1);
        let list = BadList { journal_id, sequence, ranges: ranges.clone() };
        let (bytes, crc) = list.encode().expect("checked when it was asked for");
        let slot = PairPlace::other_slot(next.bad_list);
        next.bad_list = (!ranges.is_empty()).then_some(PairPlace { slot, crc });
        let offset_bytes = BAD_LIST_OFFSETS[slot as usize];
        let write = Op::Write { offset_bytes, pieces: vec![bytes.into()] };
        before.push(vec![(Purpose::BadList, write)]);
        before.push(vec![(Purpose::BadList, Op::Sync)]);
    }

    /// The pages by which slots are recognised, all zero: while a sync writes to the recovery disks, a rebuild without superblocks must not
    /// take what was given up, or promoted before, for a history. Nothing takes space that a full datastore doesn't have: what was given
    /// back is punched, and gets its space again before it is used (C3).
    fn segments_erased(&self) -> Vec<Vec<(Purpose, Op)>> {
        let slot_len_bytes = self.superblock.slot_len_bytes;
        let given_back: BTreeSet<u32> = self.free_slots.unreserved().collect();
        let erase = |slot: u32| {
            edge_pages(slot, slot_len_bytes).map(|offset_bytes| {
                let op = if given_back.contains(&slot) {
                    Op::Punch { offset_bytes, len_bytes: PAGE_BYTES as u64 }
                } else {
                    Op::Write { offset_bytes, pieces: vec![segment::page(&[0; PAGE_BYTES])] }
                };
                (Purpose::Seal, op)
            })
        };
        let pages = (0..self.superblock.slot_count).flat_map(erase).collect();
        vec![pages, vec![(Purpose::Seal, Op::Sync)]]
    }

    /// Grows the file: the new slots count when the superblock says so.
    pub(super) fn grow(&mut self) -> Step {
        let mut next = self.superblock.clone();
        let first_slot = next.slot_count;
        next.slot_count = first_slot.saturating_add(self.limits.grow_slots.max(1)).min(self.limits.max_slots);
        let allocate = Op::Allocate {
            offset_bytes: slot_offset_bytes(first_slot, next.slot_len_bytes),
            len_bytes: u64::from(next.slot_count - first_slot) * next.slot_len_bytes,
        };
        let before = vec![vec![(Purpose::Grow, allocate)], vec![(Purpose::Grow, Op::Sync)]];
        self.superblock_step(before, next, AfterChange::Grown).growing()
    }

    /// One copy is written and synced, then the other, and only then the change counts. So a copy that can't be read never hides anything
    /// that was relied upon: either the other one says the same, or the change had not come to count. A crash finds one of them in doubt at
    /// most.
    pub(super) fn superblock_step(
        &mut self,
        before: Vec<Vec<(Purpose, Op)>>,
        mut next: Superblock,
        then: AfterChange,
    ) -> Step {
        next.sequence += 1;
        next.receive_time_us = self.receive_time_us;
        let page = segment::page(&next.encode());
        let first = (next.sequence % 2) as usize;
        let write =
            |copy: usize| Op::Write { offset_bytes: SUPERBLOCK_OFFSETS[copy], pieces: vec![page.clone()] };
        let mut phases = before;
        let is_claim =
            matches!(&then, AfterChange::Change { change, .. } if matches!(**change, Change::Claim { .. }));
        let ends_promotion = matches!(&then, AfterChange::Change { change, .. } if matches!(**change, Change::EndPromotion { .. }));
        let is_synced = !(planted(Bug::GrantBeforeGenerationDurable) && is_claim
            || planted(Bug::LowWaterNotSynced) && ends_promotion);
        for (purpose, copy) in [(Purpose::Superblock, first), (Purpose::SuperblockMirror, 1 - first)] {
            phases.push(vec![(purpose, write(copy))]);
            if is_synced {
                phases.push(vec![(purpose, Op::Sync)]);
            }
        }
        Step::new(phases, Effect::Superblock { superblock: Box::new(next), then })
    }

    pub(super) fn after_change(&mut self, then: AfterChange) {
        let (ticket, change) = match then {
            AfterChange::Grown => return,
            AfterChange::Change { ticket, change } => (ticket, *change),
        };
        match change {
            Change::Claim { .. } => {
                self.claims_pending -= 1;
                let (open_count, state) = (self.superblock.open_count, self.superblock.state);
                let grant = Grant { open_count, durable: self.durable, state };
                self.events.push_back(Event::Granted { ticket, grant });
                return;
            }
            Change::AdvanceBase { through, end } => {
                if end {
                    self.bad_ranges = BadRanges::default();
                }
                self.durable = through;
                self.events.push_back(Event::Durable(through));
            }
            Change::GiveUpHistory { .. } => {
                let open = self.open.take().map(|open| open.header().slot);
                let closed = self.closed.drain(..).map(|segment| segment.header.slot);
                self.free_slots.add_reserved(closed.chain(open));
                self.riders.retain(|(purpose, _)| *purpose != Purpose::Seal);
            }
            Change::NoteBadRanges(bad_ranges) => self.bad_ranges = bad_ranges,
            Change::EndPromotion { bad_ranges, .. } => {
                self.bad_ranges = bad_ranges;
                self.free_promoted(self.superblock.low_water_segment);
            }
            Change::BeginBaseSync { .. }
            | Change::AnnouncePromotion { .. }
            | Change::Shrink { .. }
            | Change::SetVolumes(_)
            | Change::AddVolumes { .. }
            | Change::SetManifest(_)
            | Change::SetEncryption(_)
            | Change::Seal => {}
        }
        self.events.push_back(Event::Changed { ticket });
    }

    /// Forgets batches that wait: nobody was told that they are durable, and their sender sends them again.
    fn drop_waiting(&mut self) {
        self.queue.clear();
        self.queued_bytes = 0;
        self.accepted = self.durable;
        if std::mem::take(&mut self.full) {
            self.events.push_back(Event::Room);
        }
    }

    /// Writes a manifest, which must fit, to the slot that isn't in use; the superblock then says that it counts.
    fn note_manifest(&self, text: &str, next: &mut Superblock, before: &mut Vec<Vec<(Purpose, Op)>>) {
        let (bytes, crc) = self.manifest(text).encode().expect("checked when it was asked for");
        let slot = PairPlace::other_slot(next.manifest);
        next.manifest = Some(PairPlace { slot, crc });
        let offset_bytes = MANIFEST_OFFSETS[slot as usize];
        let write = Op::Write { offset_bytes, pieces: vec![bytes.into()] };
        before.push(vec![(Purpose::Manifest, write)]);
        before.push(vec![(Purpose::Manifest, Op::Sync)]);
    }

    fn manifest(&self, text: &str) -> Manifest {
        Manifest {
            journal_id: self.superblock.journal_id,
            sequence: self.superblock.sequence + 1,
            text: text.to_owned(),
        }
    }
}
