//! Puts groups of batches straight onto the recovery disks: the machine of a base sync (B6).
//!
//! A group's records are merged first, the later over the earlier, so that what goes to the disks is disjoint and may go all at once. Then
//! every touched disk is synced. Only after that the group is done, and its last number may become the volumes' durable base.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use journal::batch::{BatchView, RecordKind};
use journal::format::PAGE_BYTES;
use journal::storage::{AlignedBuf, Op, StorageError};

use super::overlay::{BlockOp, Content, Overlay, apply_pieces};
use crate::planted::{Planted, is_planted};

/// Something to do to a recovery disk. The answer comes by [`BaseApply::done`].
#[derive(Debug)]
pub struct DiskAction {
    /// Names it in the answer.
    pub token: u64,
    /// The volume's number.
    pub volume: u16,
    /// What to do.
    pub op: Op,
}

/// A recovery disk failed.
#[derive(Debug, thiserror::Error)]
#[error("recovery disk {volume} failed")]
pub struct DiskError {
    /// The volume's number.
    pub volume: u16,
    /// Why it failed.
    #[source]
    pub source: StorageError,
}

/// The machine. One group is applied at a time, while the next one gathers.
#[derive(Debug)]
pub struct BaseApply {
    disks: Vec<Disk>,
    next_token: u64,
    waiting: VecDeque<(u16, Step)>,
    running: BTreeMap<u64, (u16, Step)>,
    /// Disks to sync when all else is done.
    touched: Vec<u16>,
    busy: bool,
}

#[derive(Debug, Default)]
struct Disk {
    /// What the next group leaves.
    overlay: Overlay,
    /// The image's space stays reserved where it reads zeroes.
    reserved: bool,
}

#[derive(Clone, Debug)]
enum Step {
    Write {
        offset_bytes: u64,
        data: Bytes,
    },
    Punch {
        offset_bytes: u64,
        len_bytes: u64,
    },
    Reserve {
        offset_bytes: u64,
        len_bytes: u64,
    },
    /// Reads a page, then writes it with the pieces.
    Patch {
        offset_bytes: u64,
        pieces: Vec<(usize, Content)>,
    },
    Sync,
}

/// Actions that run at once, of one VM.
const MAX_RUNNING: usize = 32;

/// Longest write, in bytes: larger ranges are cut, so that one doesn't keep the others waiting.
const MAX_WRITE_BYTES: usize = 1 << 20;

impl BaseApply {
    /// For as many disks as `reserved` has: whether each one's space is reserved.
    pub fn new(reserved: &[bool]) -> Self {
        Self {
            disks: reserved.iter().map(|&reserved| Disk { reserved, ..Disk::default() }).collect(),
            next_token: 1,
            waiting: VecDeque::new(),
            running: BTreeMap::new(),
            touched: Vec::new(),
            busy: false,
        }
    }

    /// The space of a disk's image is given back from now on where it reads zeroes.
    pub fn keep_no_space(&mut self, volume: u16) {
        self.disks[usize::from(volume)].reserved = false;
    }

    /// Adds a batch, which the intake has checked, to the next group. `view` is of `bytes`.
    pub fn gather(&mut self, bytes: &Bytes, view: &BatchView<'_>) {
        for record in view.records() {
            let content = match record.kind() {
                RecordKind::Write | RecordKind::SyncData => Content::Data(bytes.slice_ref(record.payload())),
                RecordKind::Zeroes => Content::Zeroes(record.len_bytes()),
                _ => continue,
            };
            let overlay = &mut self.disks[usize::from(record.volume())].overlay;
            if is_planted(Planted::ApplySwapped) {
                overlay.put_under(record.offset_bytes(), content);
            } else {
                overlay.put(record.offset_bytes(), content);
            }
        }
    }

    /// Begins to apply what was gathered, when nothing is being applied. True when there is nothing to do to any disk: then the group is
    /// done at once.
    pub fn begin(&mut self) -> bool {
        debug_assert!(!self.busy, "one group at a time");
        for (volume, disk) in (0_u16..).zip(&mut self.disks) {
            let ops = std::mem::take(&mut disk.overlay).into_ops(PAGE_BYTES as u64);
            if !ops.is_empty() {
                self.touched.push(volume);
            }
            self.waiting.extend(ops.into_iter().flat_map(steps).map(|step| (volume, step)));
        }
        self.busy = !self.waiting.is_empty();
        !self.busy
    }

    /// Forgets what was gathered and is not being applied.
    pub fn forget(&mut self) {
        self.disks.iter_mut().for_each(|disk| disk.overlay = Overlay::default());
    }

    /// Whether a group is being applied.
    pub fn is_busy(&self) -> bool {
        self.busy
    }

    /// The next thing to do, as long as not too much runs.
    pub fn poll_action(&mut self) -> Option<DiskAction> {
        if self.running.len() >= MAX_RUNNING {
            return None;
        }
        let (volume, step) = self.waiting.pop_front()?;
        let token = self.next_token;
        self.next_token += 1;
        let op = match &step {
            &Step::Punch { offset_bytes, len_bytes } => Op::Punch { offset_bytes, len_bytes },
            &Step::Reserve { offset_bytes, len_bytes } => Op::Allocate { offset_bytes, len_bytes },
            Step::Write { offset_bytes, data } => {
                Op::Write { offset_bytes: *offset_bytes, pieces: vec![data.clone()] }
            }
            Step::Patch { offset_bytes, .. } => {
                Op::Read { offset_bytes: *offset_bytes, buffer: AlignedBuf::zeroed(PAGE_BYTES) }
            }
            Step::Sync => Op::Sync,
        };
        self.running.insert(token, (volume, step));
        Some(DiskAction { token, volume, op })
    }

    /// Takes the end of an action. True when the group is done: all of it survives a power cut.
    ///
    /// # Errors
    /// The disk failed. Whoever owns the machine must stop using it.
    pub fn done(
        &mut self,
        token: u64,
        result: Result<Option<AlignedBuf>, StorageError>,
    ) -> Result<bool, DiskError> {
        let Some((volume, step)) = self.running.remove(&token) else { return Ok(false) };
        let buffer = result.map_err(|source| DiskError { volume, source })?;
        match (step, buffer) {
            (Step::Patch { offset_bytes, pieces }, Some(mut page)) => {
                apply_pieces(&mut page, &pieces);
                self.waiting.push_front((volume, Step::Write { offset_bytes, data: page.into_bytes() }));
            }
            (Step::Punch { offset_bytes, len_bytes }, _) if self.disks[usize::from(volume)].reserved => {
                self.waiting.push_front((volume, Step::Reserve { offset_bytes, len_bytes }));
            }
            _ => {}
        }
        self.sync_if_written();
        self.busy = !(self.running.is_empty() && self.waiting.is_empty());
        Ok(!self.busy)
    }

    fn sync_if_written(&mut self) {
        if self.running.is_empty() && self.waiting.is_empty() {
            self.waiting.extend(self.touched.drain(..).map(|volume| (volume, Step::Sync)));
        }
    }
}

fn steps(op: BlockOp) -> Vec<Step> {
    match op {
        BlockOp::Write { offset_bytes, data } => {
            let starts = (0..data.len()).step_by(MAX_WRITE_BYTES);
            let piece = |start: usize| Step::Write {
                offset_bytes: offset_bytes + start as u64,
                data: data.slice(start..data.len().min(start + MAX_WRITE_BYTES)),
            };
            starts.map(piece).collect()
        }
        BlockOp::Zero { offset_bytes, len_bytes } => vec![Step::Punch { offset_bytes, len_bytes }],
        BlockOp::Patch { offset_bytes, pieces, read_first: true } => {
            vec![Step::Patch { offset_bytes, pieces }]
        }
        BlockOp::Patch { offset_bytes, pieces, read_first: false } => {
            let mut page = AlignedBuf::zeroed(PAGE_BYTES);
            apply_pieces(&mut page, &pieces);
            vec![Step::Write { offset_bytes, data: page.into_bytes() }]
        }
    }
}
