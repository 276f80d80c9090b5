//! What goes into a receiver and comes out of it.

use std::path::PathBuf;

use journal::bad_ranges::BadRanges;
use journal::crypt::{Encryption, SiteKeyId};
use journal::format::JournalState;
use journal::promotion::{PromotionAction, PromotionError, TransferSizes};
use journal::storage::StorageError;
use journal::writer::{Action, Limits, Writer};

use super::base_apply::{DiskAction, DiskError};
use super::forecast::Forecast;
use crate::api::{GenerationId, JournalId, VmId, status::TargetState};
use crate::wire::{Frame, VolumeShape};

/// Names a stream within the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StreamId(pub u64);

/// Which VM a receiver is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmIdentity {
    /// The VM.
    pub vm: VmId,
    /// Its journal.
    pub journal: JournalId,
    /// Its volumes, numbered from 0.
    pub volumes: Vec<VolumeShape>,
}

impl VmIdentity {
    /// The volumes that `wanted` has and this doesn't, if that is all that differs.
    pub(super) fn volumes_added_in<'a>(&self, wanted: &'a Self) -> &'a [VolumeShape] {
        match wanted.volumes.split_at_checked(self.volumes.len()) {
            Some((known, added)) if self.journal == wanted.journal && self.may_become(known) => added,
            _ => &[],
        }
    }

    /// Those of `wanted` that this has, and smaller.
    pub(super) fn volumes_grown_in<'a>(
        &self,
        wanted: &'a [VolumeShape],
    ) -> impl Iterator<Item = &'a VolumeShape> {
        let both = self.volumes.iter().zip(wanted);
        both.filter(|(known, wanted)| known.size_bytes < wanted.size_bytes).map(|(_, wanted)| wanted)
    }

    /// Whether a stream may be about these volumes: the same ones, of which some may be smaller, since their source doesn't know yet that they
    /// are to grow.
    pub(super) fn may_stream(&self, volumes: &[VolumeShape]) -> bool {
        let may_stream = |(known, streamed): (&VolumeShape, &VolumeShape)| {
            streamed.may_become(known) && streamed.left == known.left
        };
        self.volumes.len() == volumes.len() && self.volumes.iter().zip(volumes).all(may_stream)
    }

    /// Whether these are the same volumes, of which some may have left or grown.
    pub(super) fn may_become(&self, volumes: &[VolumeShape]) -> bool {
        let may_become = |(known, wanted): (&VolumeShape, &VolumeShape)| known.may_become(wanted);
        self.volumes.len() == volumes.len() && self.volumes.iter().zip(volumes).all(may_become)
    }
}

/// What the VM's definition lets a receiver do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReceiverPolicy {
    /// How far the journal may grow.
    pub limits: Limits,
    /// How long history is kept, by receive time, in microseconds (C6).
    pub history_us: u64,
    /// How promotions divide what they do.
    pub promotion: TransferSizes,
    /// What is kept gives way to replication (C5): the history when a full sync doesn't fit into the journal, and locked checkpoints when
    /// nothing else can be promoted.
    pub give_up_history: bool,
    /// Told to the source: how much is kept in memory before the stream is no longer read, in bytes.
    pub window_bytes: u32,
}

/// What a receiver wants done.
#[derive(Debug)]
pub enum ReceiverOutput {
    /// Run this on the journal's file; answer with [`super::Receiver::journal_done`].
    Journal(Action),
    /// Run this on a recovery disk; answer with [`super::Receiver::disk_done`].
    Disk(DiskAction),
    /// Run this on the journal's file or a recovery disk; answer with [`super::Receiver::promotion_done`].
    Promotion(PromotionAction),
    /// Send this.
    Send {
        /// On which stream.
        stream: StreamId,
        /// What.
        frame: Frame,
    },
    /// End a stream, after what was sent on it.
    Close {
        /// Which.
        stream: StreamId,
    },
    /// A manifest is durable.
    ManifestWritten {
        /// What [`super::Receiver::set_manifest`] gave.
        ticket: u64,
    },
    /// Something that the owner of the VM must know.
    Event(ReceiverEvent),
}

/// What the owner of a target VM must know.
#[derive(Debug)]
pub enum ReceiverEvent {
    /// A stream runs.
    Granted {
        /// Nothing of its generation is here yet.
        new_generation: bool,
    },
    /// A base sync is complete: checkpoints count from now on.
    SyncEnded,
    /// All checkpoints are given up so that a full sync can go on; nothing can be recovered until its end (C5).
    HistoryGivenUp {
        /// How many.
        checkpoints: usize,
    },
    /// The journal, or its datastore, is full: nothing more is taken (C5).
    Full {
        /// It is the datastore.
        no_space: bool,
    },
    /// It takes batches again.
    Room,
    /// The recovery disks hold everything up to here, durably. Whoever reads the history is to know before anything else is done for this VM.
    Promoted {
        /// The number.
        through_seq: u64,
        /// How much was written to the recovery disks, in bytes.
        written_bytes: u64,
        /// What of the recovery disks can't be trusted now (C5).
        bad_ranges: BadRanges,
    },
    /// Checkpoints are given up before they are as old as the history should be: the journal has no more room (C5).
    HistoryShortened {
        /// The newest receive time that is given up, in microseconds since the Unix epoch.
        through_us: u64,
    },
    /// After [`Self::HistoryShortened`] history grows as old as it should be again.
    HistoryFits,
    /// Nothing can be promoted now; it is tried again. The journal fills up meanwhile.
    PromotionStuck {
        /// Why.
        error: PromotionError,
    },
    /// A locked checkpoint is in the way of a journal that has no more room: nothing is promoted until it is unlocked (C5). If history may be
    /// given up, that is expected of whoever is told.
    LockInTheWay {
        /// Its cut.
        cut: u64,
    },
    /// After [`Self::LockInTheWay`]: it is not any more, or it will be told again.
    LockOutOfTheWay,
    /// The journal needs promotion through this number for room, and an open view shows what is before; none: not any more.
    ViewInTheWay {
        /// Where the promotion would end.
        through_seq: Option<u64>,
    },
    /// The storage failed. The receiver does nothing any more: its files are to be opened again, trusting the journal only as far as it was
    /// known to be durable (C1), and it is to be replaced.
    Failed {
        /// What failed.
        failure: Failure,
        /// Everything up to here was durable.
        durable_through: u64,
    },
}

/// What of a VM's storage failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The journal's file.
    #[error("the journal failed")]
    Journal(#[source] StorageError),
    /// A recovery disk.
    #[error(transparent)]
    Disk(DiskError),
    /// A file isn't where it was opened any more.
    #[error("{} was moved, removed or replaced while it is in use", path.display())]
    Moved {
        /// Where it was.
        path: PathBuf,
    },
}

/// A receiver's state, for status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReceiverStatus {
    /// What it is doing.
    pub state: TargetState,
    /// A stream runs.
    pub connected: bool,
    /// The generation at the journal's tail; none while it is empty.
    pub generation: Option<GenerationId>,
    /// Everything up to here is durable.
    pub durable_through: u64,
    /// The checkpoints, if there are any.
    pub history: Option<HistorySpan>,
    /// Length of a slot of the journal, in bytes.
    pub slot_bytes: u64,
    /// Bytes of the journal in use.
    pub journal_used_bytes: u64,
    /// Most that it may use.
    pub journal_limit_bytes: u64,
    /// The site key that wraps the key of what is written now; none if it isn't encrypted.
    pub site_key: Option<SiteKeyId>,
    /// Bytes received since the receiver was made.
    pub received_bytes: u64,
    /// When the last batch came, by the system's clock, in microseconds since the Unix epoch.
    pub last_receive_wall_us: Option<u64>,
    /// How far the journal reaches at today's rate.
    pub forecast: Forecast,
}

/// From when to when there are checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HistorySpan {
    /// How many.
    pub count: u64,
    /// The oldest one's time, by the coordinator's clock, in microseconds since the Unix epoch.
    pub from_us: u64,
    /// The newest one's.
    pub to_us: u64,
}

/// The lowest numbers that are still needed: nothing above is promoted, nor given up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pins {
    /// By open views and locked checkpoints with overlays, which make way: of what was copied for them, only what comes after (C5).
    pub view: Option<u64>,
    /// By locked checkpoints without overlays, which may be unlocked for want of room.
    pub lock: Option<u64>,
    /// Views are open: the history can't be given up.
    pub has_views: bool,
}

impl Pins {
    /// The lowest of all.
    pub fn lowest(self) -> Option<u64> {
        self.view.into_iter().chain(self.lock).min()
    }
}

/// What a receiver knows beside its writer.
pub(super) struct Observed {
    pub(super) connected: bool,
    pub(super) full: bool,
    pub(super) failed: bool,
    pub(super) in_sync: bool,
    pub(super) history: Option<HistorySpan>,
    pub(super) limits: Limits,
    pub(super) received_bytes: u64,
    pub(super) last_receive_wall_us: Option<u64>,
}

impl ReceiverStatus {
    pub(super) fn of(writer: &Writer, observed: &Observed) -> Self {
        let superblock = writer.superblock();
        let state = match superblock.state {
            _ if observed.failed => TargetState::Poisoned,
            _ if observed.full => TargetState::PausedFull,
            JournalState::FirstSync { .. } if superblock.tail_generation.is_nil() => TargetState::Empty,
            JournalState::FirstSync { .. } | JournalState::HistoryGivenUp { .. } => TargetState::InitialSync,
            JournalState::Consistent if observed.in_sync => TargetState::JournalSync,
            JournalState::Consistent => TargetState::Journaling,
        };
        let used_slots =
            superblock.slot_count as usize - writer.free_slot_count().min(superblock.slot_count as usize);
        let max_slots = observed.limits.max_slots;
        Self {
            state,
            connected: observed.connected,
            generation: (!superblock.tail_generation.is_nil())
                .then_some(GenerationId(superblock.tail_generation)),
            durable_through: writer.durable().seq,
            history: observed.history,
            slot_bytes: superblock.slot_len_bytes,
            journal_used_bytes: used_slots as u64 * superblock.slot_len_bytes,
            journal_limit_bytes: u64::from(max_slots) * superblock.slot_len_bytes,
            site_key: match &superblock.encryption {
                Encryption::On(key) => Some(key.site_key_id()),
                Encryption::Never | Encryption::Off => None,
            },
            received_bytes: observed.received_bytes,
            last_receive_wall_us: observed.last_receive_wall_us,
            forecast: Forecast::default(),
        }
    }
}
