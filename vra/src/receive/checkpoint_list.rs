//! A VM's checkpoints that can be opened. The worker changes the list, whoever answers a question takes a copy of it: both are cheap, as the
//! list is in chunks that copies share.

use std::collections::VecDeque;
use std::sync::Arc;

use journal::batch::Checkpoint;

use super::manifest::LockedCheckpoint;
use crate::api::vpg::CheckpointKind;
use crate::api::{CheckpointId, TimeUs};

/// One checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedCheckpoint {
    /// When it was taken, by the coordinator's clock.
    pub time_us: TimeUs,
    /// Its id.
    pub id: CheckpointId,
    /// A view of it is a view at this number.
    pub cut: u64,
    /// The members it was taken over.
    pub member_set_version: u32,
    /// Why it was taken.
    pub kind: CheckpointKind,
    /// Its name, if it has one.
    pub tag: Option<Box<str>>,
}

/// Checkpoints in the order of their times, then of their ids.
#[derive(Clone, Debug, Default)]
pub struct CheckpointList {
    /// None is empty.
    chunks: VecDeque<Arc<Vec<ListedCheckpoint>>>,
    len: usize,
    /// The coordinator's clock went back once: cuts are not in the order of times.
    is_disordered: bool,
    /// Nothing below this cut is in it.
    oldest_seq: u64,
}

/// The order of the list. The same checkpoint has the same key in all journals of its group.
pub type CheckpointKey = (TimeUs, CheckpointId);

/// Longest chunk: what is copied at most when one checkpoint comes while somebody reads.
const CHUNK_LEN: usize = 512;

impl ListedCheckpoint {
    /// As a journal's record has it.
    pub fn of(checkpoint: &Checkpoint) -> Self {
        let nonce = checkpoint.epoch.nonce.as_u128();
        Self {
            time_us: TimeUs(checkpoint.time_us),
            id: CheckpointId { nonce, counter: checkpoint.epoch.counter },
            cut: checkpoint.cut,
            member_set_version: u32::try_from(checkpoint.member_set_version).unwrap_or(u32::MAX),
            kind: checkpoint.kind.into(),
            tag: (!checkpoint.tag.is_empty()).then(|| checkpoint.tag.as_str().into()),
        }
    }

    /// Where it is in the order.
    pub fn key(&self) -> CheckpointKey {
        (self.time_us, self.id)
    }
}

impl From<&LockedCheckpoint> for ListedCheckpoint {
    fn from(locked: &LockedCheckpoint) -> Self {
        let LockedCheckpoint { checkpoint, cut, time_us, member_set_version, kind, ref tag } = *locked;
        Self { time_us, id: checkpoint, cut, member_set_version, kind, tag: tag.clone() }
    }
}

impl CheckpointList {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The oldest one.
    pub fn first(&self) -> Option<&ListedCheckpoint> {
        self.chunks.front()?.first()
    }

    /// The one with the latest time.
    pub fn last(&self) -> Option<&ListedCheckpoint> {
        self.chunks.back()?.last()
    }

    /// The newest one: that with the largest cut. Its time may be earlier than another one's, whose coordinator had a wrong clock.
    pub fn newest(&self) -> Option<&ListedCheckpoint> {
        match self.is_disordered {
            true => self.iter_from(0).max_by_key(|entry| (entry.cut, entry.key())),
            false => self.last(),
        }
    }

    /// Whether cuts may not be in the order of times.
    pub fn is_disordered(&self) -> bool {
        self.is_disordered
    }

    /// How many are before a key: where it is, or would be.
    pub fn count_before(&self, key: CheckpointKey) -> usize {
        let chunk = self.chunk_of(key);
        let before: usize = self.chunks.iter().take(chunk).map(|chunk| chunk.len()).sum();
        before + self.chunks.get(chunk).map_or(0, |chunk| chunk.partition_point(|entry| entry.key() < key))
    }

    /// From a place in the order on.
    pub fn iter_from(&self, place: usize) -> impl Iterator<Item = &ListedCheckpoint> {
        let (chunk, within) = self.locate(place);
        self.chunks.iter().skip(chunk).flat_map(|chunk| chunk.iter()).skip(within)
    }

    /// From before a place in the order on, the newest first.
    pub fn iter_back_from(&self, place: usize) -> impl Iterator<Item = &ListedCheckpoint> {
        let (chunk, within) = self.locate(place);
        let part = self.chunks.get(chunk).map_or(&[][..], |chunk| &chunk[..within]);
        let before = self.chunks.iter().take(chunk).rev().flat_map(|chunk| chunk.iter().rev());
        part.iter().rev().chain(before)
    }

    /// The one with this key.
    pub fn get(&self, key: CheckpointKey) -> Option<&ListedCheckpoint> {
        let chunk = self.chunks.get(self.chunk_of(key))?;
        chunk.get(chunk.partition_point(|entry| entry.key() < key)).filter(|entry| entry.key() == key)
    }

    /// The one with this id, found by looking at all: newer ones are found sooner.
    pub fn find(&self, id: CheckpointId) -> Option<&ListedCheckpoint> {
        self.iter_back_from(self.len).find(|entry| entry.id == id)
    }

    /// The newest one at or before a time by the coordinator's clock (D4).
    pub fn newest_until(&self, time_us: TimeUs) -> Option<&ListedCheckpoint> {
        let first_later = |end| (TimeUs(end), CheckpointId { nonce: 0, counter: 0 });
        let end = time_us.0.checked_add(1).map_or(self.len, |end| self.count_before(first_later(end)));
        self.iter_back_from(end).next()
    }

    /// Puts one into its place.
    pub fn push(&mut self, entry: ListedCheckpoint) {
        self.oldest_seq = self.oldest_seq.min(entry.cut);
        let newest = self.last();
        if newest.is_none_or(|newest| newest.key() < entry.key()) {
            self.is_disordered |= newest.is_some_and(|newest| newest.cut > entry.cut);
            match self.chunks.back_mut().filter(|chunk| chunk.len() < CHUNK_LEN) {
                Some(chunk) => Arc::make_mut(chunk).push(entry),
                None => self.chunks.push_back(Arc::new(vec![entry])),
            }
            self.len += 1;
            return;
        }
        let (key, cut) = (entry.key(), entry.cut);
        let at = self.chunk_of(key);
        let chunk = Arc::make_mut(&mut self.chunks[at]);
        match chunk.binary_search_by_key(&entry.key(), ListedCheckpoint::key) {
            // A source that sends a checkpoint again means the later place.
            Ok(place) => chunk[place] = entry,
            Err(place) => {
                chunk.insert(place, entry);
                self.len += 1;
                if chunk.len() > CHUNK_LEN {
                    let rest = chunk.split_off(CHUNK_LEN / 2);
                    self.chunks.insert(at + 1, Arc::new(rest));
                }
            }
        }
        // An older one that was locked, or one that a source which has lost its stream sends again, mostly is where its cut says.
        let place = self.count_before(key);
        let is_before = self.iter_back_from(place).next().is_none_or(|former| former.cut <= cut);
        self.is_disordered |=
            !is_before || self.iter_from(place + 1).next().is_some_and(|next| next.cut < cut);
    }

    /// Nothing below this number can be opened any more.
    pub(super) fn forget_below(&mut self, oldest_seq: u64) {
        if oldest_seq <= self.oldest_seq {
            return;
        }
        if self.is_disordered {
            let kept: Vec<_> = self.iter_from(0).filter(|entry| entry.cut >= oldest_seq).cloned().collect();
            self.clear();
            self.oldest_seq = oldest_seq;
            kept.into_iter().for_each(|entry| self.push(entry));
            return;
        }
        self.oldest_seq = oldest_seq;
        while let Some(chunk) = self.chunks.front_mut() {
            let gone = chunk.partition_point(|entry| entry.cut < oldest_seq);
            self.len -= gone;
            if gone < chunk.len() {
                if gone > 0 {
                    Arc::make_mut(chunk).drain(..gone);
                }
                return;
            }
            self.chunks.pop_front();
        }
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// The first chunk that doesn't end before a key.
    fn chunk_of(&self, key: CheckpointKey) -> usize {
        self.chunks.partition_point(|chunk| chunk.last().is_some_and(|last| last.key() < key))
    }

    fn locate(&self, place: usize) -> (usize, usize) {
        let mut before = 0;
        for (number, chunk) in self.chunks.iter().enumerate() {
            if place < before + chunk.len() {
                return (number, place - before);
            }
            before += chunk.len();
        }
        (self.chunks.len(), 0)
    }
}

#[cfg(test)]
mod tests;
