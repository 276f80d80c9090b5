//! A guest: what it asked, what it was answered, and what its disks are once all that is under way has landed. It outlives the
//! processes that serve it.

use std::collections::BTreeMap;

use bytes::Bytes;
use journal::batch::{Record, RecordKind};
use ublk::serve::{Completion, FileIo, FileOp, IoBuffer, Op};
use vra::capture::numbering::ByteRange;

use super::door::SLOT_BYTES;
use super::env::Env;
use super::ledger::Image;
use super::local_disk::LocalDisk;

/// Requests that a guest has under way at most, besides those for the chain.
const DEPTH: usize = 12;
/// Length of the place that links of the chain are written to, at the end of the first disk, in bytes.
const LINK_BYTES: u64 = 512;

pub(super) struct Guest {
    pub(super) disks: Vec<LocalDisk>,
    /// The disks with everything numbered, whether it has landed or not.
    truth: Image,
    waiting: BTreeMap<u64, Asked>,
    next_id: u64,
    /// Local errors that the guest has not been told of.
    untold_errors: u64,
    /// The newest link of the chain that this guest knows to be written: its write completed, or a read showed it.
    known_link: u64,
}

/// A request that was not answered.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    pub(super) op: Op,
    pub(super) volume: u16,
    pub(super) range: ByteRange,
    pub(super) data: Bytes,
    /// The link of the chain that it writes or looks for; 0 for none.
    link: u64,
    /// Its number, once it was captured.
    seq: Option<u64>,
    landed: bool,
}

impl Guest {
    pub(super) fn new(volume_bytes: &[usize]) -> Self {
        Self {
            disks: volume_bytes.iter().map(|len_bytes| LocalDisk::new(*len_bytes)).collect(),
            truth: volume_bytes.iter().map(|len_bytes| vec![0; *len_bytes]).collect(),
            waiting: BTreeMap::new(),
            next_id: 1,
            untold_errors: 0,
            known_link: 0,
        }
    }

    pub(super) fn truth(&self) -> &Image {
        &self.truth
    }

    pub(super) fn known_link(&self) -> u64 {
        self.known_link
    }

    pub(super) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// All requests that were not answered, to be asked again (in the order in which they were asked).
    pub(super) fn waiting(&self) -> Vec<(u64, Asked)> {
        self.waiting.iter().map(|(id, asked)| (*id, asked.clone())).collect()
    }

    /// How many requests of this kind for the chain were not answered: for one link, or for any.
    pub(super) fn links_waiting(&self, op: Op, link: Option<u64>) -> usize {
        let same =
            |asked: &&Asked| asked.op == op && asked.link > 0 && link.is_none_or(|link| asked.link == link);
        self.waiting.values().filter(same).count()
    }

    /// Where links of the chain are written.
    pub(super) fn link_place(&self) -> ByteRange {
        let end = self.disks[0].bytes().len() as u64;
        ByteRange { start: end - LINK_BYTES, end }
    }

    /// The link that an image holds.
    pub(super) fn link_in(&self, image: &Image) -> u64 {
        let place = self.link_place();
        link_of(&image[0][place.start as usize..place.end as usize])
    }

    /// A request, or nothing if there are enough of them.
    pub(super) fn ask(&mut self, env: &mut Env) -> Option<(u64, Asked)> {
        if self.waiting.values().filter(|asked| asked.link == 0).count() >= DEPTH {
            return None;
        }
        let volume = env.any_index(self.disks.len()) as u16;
        let op = match env.rng.below(20) {
            0..13 => Op::Write,
            13..16 => Op::Read,
            16 => Op::Discard,
            17 => Op::WriteZeroes { unmap: env.rng.one_in(2) },
            _ => Op::Flush,
        };
        let sectors = match (op, env.rng.below(4)) {
            (Op::Flush, _) => 0,
            (Op::Discard, _) => 1 + env.rng.below(24),
            (_, 0) => 1 + env.rng.below(16),
            _ => 1 + env.rng.below(4),
        };
        let len_bytes = sectors * 512;
        // A hot region, so that much overlaps, and the rest.
        let room_bytes = self.disks[usize::from(volume)].bytes().len() as u64 - LINK_BYTES - len_bytes;
        let region_bytes = if env.rng.one_in(3) { room_bytes } else { room_bytes.min(8 << 10) };
        let start = if sectors == 0 { 0 } else { 512 * env.rng.below(region_bytes / 512) };
        let range = ByteRange { start, end: start + len_bytes };
        let zeroes = |op| matches!(op, Op::Discard | Op::WriteZeroes { .. });
        // Which of two equal ones has landed could not be told.
        let twice = self
            .waiting
            .values()
            .any(|asked| zeroes(asked.op) && asked.volume == volume && asked.range == range);
        (!zeroes(op) || !twice).then(|| self.remember(op, volume, range, 0))
    }

    /// Asks for the write of a link of the chain, or a read that may show it.
    pub(super) fn ask_link(&mut self, op: Op, link: u64) -> (u64, Asked) {
        self.remember(op, 0, self.link_place(), link)
    }

    fn remember(&mut self, op: Op, volume: u16, range: ByteRange, link: u64) -> (u64, Asked) {
        let id = self.next_id;
        self.next_id += 1;
        let mut data = vec![id as u8; if op == Op::Write { range.len_bytes() as usize } else { 0 }];
        for (at, sector) in (0_u64..).zip(data.chunks_mut(512)) {
            sector[..8].copy_from_slice(&id.to_le_bytes());
            sector[8..16].copy_from_slice(&link.to_le_bytes());
            sector[16..24].copy_from_slice(&at.to_le_bytes());
        }
        let asked = Asked { op, volume, range, data: data.into(), link, seq: None, landed: false };
        self.waiting.insert(id, asked.clone());
        (id, asked)
    }

    /// A request of this guest was published: it has its number now.
    pub(super) fn numbered(&mut self, record: &Record) -> Result<(), String> {
        let (seq, volume) = (record.seq, record.volume);
        let range = ByteRange::new(record.offset_bytes, record.len_bytes);
        let asked = match record.kind {
            RecordKind::Write => self.waiting.get_mut(&id_of(&record.payload)),
            _ => self.waiting.values_mut().find(|asked| {
                matches!(asked.op, Op::Discard | Op::WriteZeroes { .. })
                    && (asked.volume, asked.range, asked.seq) == (volume, range, None)
            }),
        };
        let Some(asked) = asked else { return Err(format!("record {seq} is no request of the guest")) };
        if (asked.volume, asked.range) != (volume, range)
            || asked.seq.is_some()
            || record.kind == RecordKind::Write && asked.data != record.payload
        {
            return Err(format!("record {seq} differs from what the guest asked: {asked:?}"));
        }
        asked.seq = Some(seq);
        let bytes = &mut self.truth[usize::from(volume)][range.start as usize..range.end as usize];
        match record.kind {
            RecordKind::Write => bytes.copy_from_slice(&record.payload),
            _ => bytes.fill(0),
        }
        Ok(())
    }

    /// Lets the local disk do an operation, or fail at it; links of the chain never fail.
    pub(super) fn perform(&mut self, volume: u16, io: &mut FileIo, fails: bool, env: &mut Env) -> bool {
        let range = ByteRange::new(io.offset_bytes, io.len_bytes);
        let fails = fails && io.len_bytes > 0 && !(volume == 0 && range.overlaps(&self.link_place()));
        let keep_bytes = if fails { 512 * env.any_index(io.len_bytes as usize / 512) } else { usize::MAX };
        let done = self.disks[usize::from(volume)].perform(io, keep_bytes).is_ok();
        self.untold_errors += u64::from(!done);
        let id = match (io.op, &io.buffer) {
            (FileOp::Write { .. }, IoBuffer::Owned(slot)) => Some(id_of(&slot[..8])),
            (FileOp::Write { .. }, IoBuffer::Shared(slot)) => Some(id_of(&slot[..8])),
            (FileOp::PunchHole | FileOp::ZeroRange, _) => {
                let same = |asked: &Asked| {
                    matches!(asked.op, Op::Discard | Op::WriteZeroes { .. })
                        && (asked.volume, asked.range) == (volume, range)
                };
                self.waiting.iter().find(|(_, asked)| same(asked)).map(|(id, _)| *id)
            }
            _ => None,
        };
        if let Some(id) = id {
            self.landed(id, done);
        }
        done
    }

    fn landed(&mut self, id: u64, done: bool) {
        let Some(asked) = self.waiting.get_mut(&id) else { return };
        asked.landed = true;
        let (volume, range, captured) = (asked.volume, asked.range, asked.seq.is_some());
        if captured && done {
            return;
        }
        // What has no number counts from its landing; and so does whatever a failed write has left. Numbered writes that overlap
        // and have not landed were received later.
        let later: Vec<ByteRange> = self
            .waiting
            .values()
            .filter(|asked| asked.volume == volume && asked.seq.is_some() && !asked.landed)
            .map(|asked| asked.range)
            .collect();
        let local = self.disks[usize::from(volume)].bytes();
        for start in (range.start..range.end).step_by(512) {
            let sector = ByteRange::new(start, 512);
            if !later.iter().any(|range| range.overlaps(&sector)) {
                let sector = start as usize..start as usize + 512;
                self.truth[usize::from(volume)][sector.clone()].copy_from_slice(&local[sector]);
            }
        }
    }

    /// The guest is answered.
    pub(super) fn answered(&mut self, completion: &Completion) -> Result<(), String> {
        let Some(asked) = self.waiting.remove(&completion.tag) else {
            return Err(format!("request {} was answered twice", completion.tag));
        };
        if completion.slot.is_some() != matches!(asked.op, Op::Read | Op::Write) {
            return Err(format!("a slot for a slot: {asked:?}"));
        }
        if completion.result.is_err() {
            let Some(rest) = self.untold_errors.checked_sub(1) else {
                return Err(format!("a request failed that the local disk did not fail: {asked:?}"));
            };
            self.untold_errors = rest;
        } else if asked.op == Op::Write {
            self.known_link = self.known_link.max(asked.link);
        } else if let (Op::Read, Some(slot), true) = (asked.op, &completion.slot, asked.link > 0) {
            self.known_link = self.known_link.max(link_of(&slot[..LINK_BYTES as usize]));
        }
        Ok(())
    }

    /// The process that served the guest is gone, and with it what it had under way. The guest asks again, or has ended too.
    pub(super) fn process_died(&mut self, guest_dies: bool) {
        if guest_dies {
            self.waiting.clear();
        }
        for asked in self.waiting.values_mut() {
            (asked.seq, asked.landed) = (None, false);
        }
        self.untold_errors = 0;
        self.truth = self.disks.iter().map(|disk| disk.bytes().to_vec()).collect();
    }

    /// With nothing under way the local disks are what was numbered, in order.
    pub(super) fn check_settled(&self) -> Result<(), String> {
        for (volume, (disk, truth)) in self.disks.iter().zip(&self.truth).enumerate() {
            // Equal as a whole, mostly: what compares memory is much faster than what looks for the place.
            if disk.bytes() != &truth[..]
                && let Some(at) = disk.bytes().iter().zip(truth).position(|(local, truth)| local != truth)
            {
                return Err(format!(
                    "the local disk {volume} differs at {at} from the writes in their order"
                ));
            }
        }
        Ok(())
    }
}

/// Whether a request of this kind comes with a buffer.
pub(super) fn has_buffer(op: Op) -> bool {
    matches!(op, Op::Read | Op::Write)
}

fn id_of(data: &[u8]) -> u64 {
    data.first_chunk().map_or(0, |id| u64::from_le_bytes(*id))
}

fn link_of(sector: &[u8]) -> u64 {
    sector[8..].first_chunk().map_or(0, |link| u64::from_le_bytes(*link))
}

const _: () = assert!(24 * 512 <= SLOT_BYTES, "every request fits into a slot");
