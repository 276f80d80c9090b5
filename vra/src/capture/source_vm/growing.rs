//! Disks of a VM that grow (E3). The stream says a volume's new size, then brings what is new of it, and only then its guest can reach that: at
//! every checkpoint between, the target has what the source has.

use std::collections::BTreeMap;
use std::sync::{MutexGuard, PoisonError};

use super::{Numbering, SourceAction, SourceVm};
use crate::api::GenerationId;
use crate::capture::modes::{Mode, PublishRefusal};
use crate::capture::numbering::ByteRange;
use crate::capture::payload::Piece;
use crate::clock::Now;

/// What is new of a volume, whose size the stream has said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewRange {
    /// The generation that said it. In another one it means nothing.
    generation: GenerationId,
    /// The volume's number.
    pub volume: u16,
    /// Its end is the volume's new size.
    pub range: ByteRange,
}

/// What became of a part of what is new.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Brought {
    /// It has a number.
    Done,
    /// There is no room now: the same again, later.
    Later,
    /// The generation is over, and with it this way of bringing it: the next one's sync does.
    Ended,
}

/// How large disks are to be.
#[derive(Debug, Default)]
pub(super) struct Growth {
    /// In bytes, by volume number; as many as were told.
    wanted_bytes: Vec<u64>,
    /// Volumes whose new size, in bytes, the stream has said, and which are not given to their guests yet.
    said: BTreeMap<u16, u64>,
}

impl Growth {
    /// The generation in which they were said is over.
    pub(super) fn forget_said(&mut self) {
        self.said.clear();
    }
}

impl SourceVm {
    /// The disks are to be so large, in bytes, by volume number; smaller than they are changes nothing. Their files must be as large. Only notes
    /// it: the next ticks act, and not while a sync is under way.
    pub fn grow(&self, sizes: Vec<u64>) {
        self.growth().wanted_bytes = sizes;
    }

    /// Gives a part of what is new of a volume its place in the stream.
    pub fn bring(&self, new: &NewRange, range: ByteRange, piece: Piece, now: Now) -> Brought {
        let numbering = self.numbering();
        if numbering.state.generation != new.generation {
            return Brought::Ended;
        }
        let published =
            self.core.with(|core, wakeups| core.publish_new(new.volume, range, piece, now.wall_us, wakeups));
        match published {
            Ok(_) => Brought::Done,
            Err(PublishRefusal::NoRoom) => Brought::Later,
            Err(_) => Brought::Ended,
        }
    }

    /// Whether bringing what is new of a volume is of no use any more: the next generation's sync does it.
    pub fn is_over(&self, new: &NewRange) -> bool {
        let is_streaming = self.core.with(|core, _| matches!(core.mode(), Mode::Streaming { .. }));
        !is_streaming || self.numbering().state.generation != new.generation
    }

    /// All that is new of a volume was brought: its disk has it from now on. Whether that is so; if not, the next generation does it.
    pub fn give(&self, new: &NewRange) -> bool {
        // With the lock: no generation begins meanwhile.
        let numbering = self.numbering();
        let is_streaming = self.core.with(|core, _| matches!(core.mode(), Mode::Streaming { .. }));
        if numbering.state.generation != new.generation || !is_streaming {
            return false;
        }
        self.growth().said.remove(&new.volume);
        self.disks[usize::from(new.volume)].grow(new.range.end);
        true
    }

    /// Says sizes of disks that are to be larger. Called with the lock on `numbering`, before a generation can begin.
    pub(super) fn follow_sizes(&self, numbering: &Numbering, now: Now, actions: &mut Vec<SourceAction>) {
        let mut growth = self.growth();
        let mut grown = Vec::new();
        for ((volume, disk), wanted_bytes) in (0_u16..).zip(&self.disks).zip(&growth.wanted_bytes) {
            let size_bytes = disk.size_bytes();
            if size_bytes < *wanted_bytes {
                grown.push((volume, size_bytes, *wanted_bytes));
            }
        }
        if grown.is_empty() {
            return;
        }
        // What is being brought comes to its end before the volume grows again.
        let unsaid = grown.iter().filter(|(volume, ..)| !growth.said.contains_key(volume));
        let unsaid: Vec<(u16, u64)> =
            unsaid.map(|(volume, _, wanted_bytes)| (*volume, *wanted_bytes)).collect();
        let streaming = self.core.with(|core, wakeups| match core.mode() {
            Mode::Streaming { .. } if unsaid.is_empty() => Some(false),
            Mode::Streaming { .. } => Some(core.publish_sizes(&unsaid, now.wall_us, wakeups).is_ok()),
            Mode::Stopped | Mode::Overflow { .. } | Mode::Lost => None,
        });
        for (volume, former_bytes, size_bytes) in grown {
            match streaming {
                Some(true) if !growth.said.contains_key(&volume) => {
                    growth.said.insert(volume, size_bytes);
                    let range = ByteRange::new(former_bytes, size_bytes - former_bytes);
                    let generation = numbering.state.generation;
                    actions.push(SourceAction::Bring(NewRange { generation, volume, range }));
                }
                Some(_) => {}
                // Nothing is captured, and the next generation begins with all sizes and a sync.
                None => {
                    growth.said.remove(&volume);
                    self.disks[usize::from(volume)].grow(size_bytes);
                    actions.push(SourceAction::Grown { volume, size_bytes });
                }
            }
        }
    }

    pub(super) fn growth(&self) -> MutexGuard<'_, Growth> {
        self.growth.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
