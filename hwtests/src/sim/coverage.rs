//! What a run reached: which fault met which operation, which disturbance met which state of the stream, and what else happened.

use std::collections::BTreeMap;

use journal::storage::Purpose;
use journal::storage::sim::{Fault, OpKind};

use super::kinds::{OP_KINDS, RARE_KINDS, possible_faults};

/// What runs reached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Coverage {
    /// Which fault met an operation of which kind, how often.
    pub faults: BTreeMap<(Fault, OpKind), u64>,
    /// Which disturbance met which state of a VM's replication, how often.
    pub meetings: BTreeMap<(Disturbance, Moment), u64>,
    /// What else happened, how often.
    pub happenings: BTreeMap<Happening, u64>,
}

/// What disturbs the replication of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Disturbance {
    /// The target's process was killed, or its host lost power.
    TargetDied,
    /// The target's storage failed an operation.
    StorageFailed,
    /// The network lost a stream.
    StreamCut,
    /// The journal or its datastore was full.
    JournalFull,
    /// The system's clock jumped.
    ClockJumped,
    /// A new generation was asked of the source.
    NewGeneration,
    /// The source's process, or its host, died.
    SourceDied,
    /// Capture stopped: what the source retains is full, or its disk failed.
    Overflowed,
}

/// What a VM's replication is doing when something meets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Moment {
    /// The source has no process.
    SourceDown,
    /// A checkpoint holds the VM.
    Held,
    /// Capture has stopped, and what was retained is not all at the target.
    Overflowed,
    /// There is no stream.
    Apart,
    /// The target was asked and has not answered.
    Asking,
    /// A sync goes to the recovery disks.
    BaseSync,
    /// A sync goes through the journal.
    JournalSync,
    /// The journal takes the guest's writes.
    Journaling,
}

/// Something that a run can reach, besides faults and disturbances.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Happening {
    /// A sync to the recovery disks ended.
    BaseSyncEnded,
    /// History was given up.
    HistoryGivenUp,
    /// A new generation took over a journal with history, which was kept.
    ForkJournaled,
    /// A stream of the same generation came back.
    Reconnected,
    /// An old stream delivered although a newer one was open.
    LateOldStream,
    /// A stream ended inside a frame or batch.
    CutInsideBatch,
    /// A batch was sent that was sent before.
    Resent,
    /// A newer stream ended an older one.
    Fenced,
    /// A full sync was refused for lack of room.
    SyncNotAdmitted,
    /// The journal was full.
    Full,
    /// Growth met the end of the datastore.
    NoSpace,
    /// The storage failed and the same process opened the files again.
    ReopenedAfterPoison,
    /// The target died, or its power went, while a group was written ahead.
    DiedWithGroupAhead,
    /// The storage failed while a group was written ahead.
    FailedWithGroupAhead,
    /// An opening copied an unsealed segment.
    Carried,
    /// The copied segment is encrypted.
    CarriedEncrypted,
    /// An opening sealed a segment whose seal a crash had lost.
    SealedLate,
    /// An encrypted journal got another key.
    KeyRotated,
    /// An opening failed and the next one went on.
    OpenedAgain,
    /// Segments were promoted to the recovery disks.
    Promoted,
    /// A promotion that another process had announced was done.
    PromotionResumed,
    /// History was given up before its time, for lack of room.
    HistoryShortened,
    /// A promotion couldn't go on.
    PromotionStuck,
    /// A locked checkpoint was given up for want of room.
    LockGivenUp,
    /// A view was read that promotion had gone on beneath.
    ViewRepointed,
    /// The file got shorter.
    Shrunk,
    /// A view that was pinned before was still there and right.
    PinnedViewCompared,
    /// A checkpoint was opened and compared while the target was writing.
    CheckpointComparedBesideWriter,
    /// A checkpoint was opened and compared.
    CheckpointCompared,
    /// A checkpoint was opened and compared that needed the recovery disk and the journal.
    CheckpointAfterBase,
    /// A point that is no checkpoint was opened and compared.
    PointCompared,
    /// A checkpoint inside a sync was not listed.
    CheckpointInsideSync,
    /// A checkpoint was opened and compared without superblocks.
    RebuiltCompared,
    /// The same, and it needed the recovery disk.
    RebuiltAfterBase,
    /// A flipped bit was noticed.
    FlipNoticed,
    /// A promotion went over a flipped bit.
    DamagePromoted,
    /// A flipped bit hit nothing that counts.
    FlipHarmless,
    /// A guest's request was asked again after its source had died.
    Reissued,
    /// The local disk failed a write.
    LocalWriteFailed,
    /// Capture stopped because the ring was full.
    OverflowRing,
    /// Capture stopped because retained memory was full.
    OverflowMemory,
    /// Capture stopped because the local disk failed a captured write (A6).
    OverflowLocalError,
    /// Capture stopped because a new sync was asked for.
    OverflowRequested,
    /// A generation began after all of the one before was durable, or given up.
    GenerationAfterOverflow,
    /// The numbering state could not be saved.
    NumbersNotSaved,
    /// The target granted a fresh image, so that holes need not be sent.
    FreshImage,
    /// A full sync was published to its end.
    SyncPublished,
    /// A full sync ended before its end.
    SyncAborted,
    /// A write made a sync's read useless (B3).
    SyncReadRepeated,
    /// A sync held a range (B3).
    SyncRangeHeld,
    /// A checkpoint record was published.
    CheckpointTaken,
    /// A VM could not be held.
    HoldRefused,
    /// A hold expired.
    HoldExpired,
    /// Capture stopped during a hold.
    HoldOverflowed,
    /// Only some VMs of the group wrote the record of an epoch.
    CheckpointOfSome,
    /// A checkpoint of two VMs was compared with the chain of writes that spans them.
    GroupCompared,
    /// All of a guest's requests were answered without help of the target.
    GuestSettled,
}

impl Happening {
    /// All of them.
    pub const ALL: &[Self] = &[
        Self::BaseSyncEnded,
        Self::HistoryGivenUp,
        Self::ForkJournaled,
        Self::Reconnected,
        Self::LateOldStream,
        Self::CutInsideBatch,
        Self::Resent,
        Self::Fenced,
        Self::SyncNotAdmitted,
        Self::Full,
        Self::NoSpace,
        Self::ReopenedAfterPoison,
        Self::DiedWithGroupAhead,
        Self::FailedWithGroupAhead,
        Self::Carried,
        Self::CarriedEncrypted,
        Self::SealedLate,
        Self::KeyRotated,
        Self::OpenedAgain,
        Self::Promoted,
        Self::PromotionResumed,
        Self::HistoryShortened,
        Self::PromotionStuck,
        Self::LockGivenUp,
        Self::DamagePromoted,
        Self::ViewRepointed,
        Self::Shrunk,
        Self::PinnedViewCompared,
        Self::CheckpointComparedBesideWriter,
        Self::CheckpointCompared,
        Self::CheckpointAfterBase,
        Self::PointCompared,
        Self::CheckpointInsideSync,
        Self::RebuiltCompared,
        Self::RebuiltAfterBase,
        Self::FlipNoticed,
        Self::FlipHarmless,
        Self::Reissued,
        Self::LocalWriteFailed,
        Self::OverflowRing,
        Self::OverflowMemory,
        Self::OverflowLocalError,
        Self::OverflowRequested,
        Self::GenerationAfterOverflow,
        Self::NumbersNotSaved,
        Self::FreshImage,
        Self::SyncPublished,
        Self::SyncAborted,
        Self::SyncReadRepeated,
        Self::SyncRangeHeld,
        Self::CheckpointTaken,
        Self::HoldRefused,
        Self::HoldExpired,
        Self::HoldOverflowed,
        Self::CheckpointOfSome,
        Self::GroupCompared,
        Self::GuestSettled,
    ];
}

impl Coverage {
    /// Adds another run's.
    pub fn add(&mut self, other: &Coverage) {
        add(&mut self.faults, &other.faults);
        add(&mut self.meetings, &other.meetings);
        add(&mut self.happenings, &other.happenings);
    }

    /// What had to be reached and wasn't.
    pub fn missing(&self) -> Vec<String> {
        let faults = required_faults().filter(|key| !self.faults.contains_key(key));
        let meetings = REQUIRED_MEETINGS.iter().filter(|key| !self.meetings.contains_key(key));
        let happenings = Happening::ALL.iter().filter(|key| !self.happenings.contains_key(key));
        let faults = faults.map(|(fault, (purpose, verb))| format!("{fault:?} at {purpose:?} {verb}"));
        let meetings = meetings.map(|(disturbance, moment)| format!("{disturbance:?} while {moment:?}"));
        let happenings = happenings.map(|happening| format!("{happening:?}"));
        faults.chain(meetings).chain(happenings).collect()
    }
}

fn add<K: Copy + Ord>(sum: &mut BTreeMap<K, u64>, other: &BTreeMap<K, u64>) {
    for (key, count) in other {
        *sum.entry(*key).or_default() += count;
    }
}

/// Every disturbance in each state that it can meet.
const REQUIRED_MEETINGS: &[(Disturbance, Moment)] = &[
    (Disturbance::TargetDied, Moment::Apart),
    (Disturbance::TargetDied, Moment::Asking),
    (Disturbance::TargetDied, Moment::BaseSync),
    (Disturbance::TargetDied, Moment::JournalSync),
    (Disturbance::TargetDied, Moment::Journaling),
    (Disturbance::StorageFailed, Moment::Apart),
    (Disturbance::StorageFailed, Moment::Asking),
    (Disturbance::StorageFailed, Moment::BaseSync),
    (Disturbance::StorageFailed, Moment::JournalSync),
    (Disturbance::StorageFailed, Moment::Journaling),
    (Disturbance::StreamCut, Moment::Asking),
    (Disturbance::StreamCut, Moment::BaseSync),
    (Disturbance::StreamCut, Moment::JournalSync),
    (Disturbance::StreamCut, Moment::Journaling),
    (Disturbance::ClockJumped, Moment::Apart),
    (Disturbance::ClockJumped, Moment::Asking),
    (Disturbance::ClockJumped, Moment::BaseSync),
    (Disturbance::ClockJumped, Moment::JournalSync),
    (Disturbance::ClockJumped, Moment::Journaling),
    (Disturbance::JournalFull, Moment::JournalSync),
    (Disturbance::JournalFull, Moment::Journaling),
    (Disturbance::NewGeneration, Moment::BaseSync),
    (Disturbance::NewGeneration, Moment::JournalSync),
    (Disturbance::NewGeneration, Moment::Journaling),
    (Disturbance::NewGeneration, Moment::Apart),
    (Disturbance::TargetDied, Moment::Held),
    (Disturbance::TargetDied, Moment::Overflowed),
    (Disturbance::StorageFailed, Moment::Held),
    (Disturbance::StorageFailed, Moment::Overflowed),
    (Disturbance::StreamCut, Moment::Held),
    (Disturbance::StreamCut, Moment::Overflowed),
    (Disturbance::ClockJumped, Moment::Held),
    (Disturbance::ClockJumped, Moment::Overflowed),
    (Disturbance::SourceDied, Moment::Apart),
    (Disturbance::SourceDied, Moment::Asking),
    (Disturbance::SourceDied, Moment::BaseSync),
    (Disturbance::SourceDied, Moment::JournalSync),
    (Disturbance::SourceDied, Moment::Journaling),
    (Disturbance::SourceDied, Moment::Held),
    (Disturbance::SourceDied, Moment::Overflowed),
    (Disturbance::Overflowed, Moment::Apart),
    (Disturbance::Overflowed, Moment::Asking),
    (Disturbance::Overflowed, Moment::BaseSync),
    (Disturbance::Overflowed, Moment::JournalSync),
    (Disturbance::Overflowed, Moment::Journaling),
];

/// Every fault at each kind of operation that can meet it, but for what only the matrix has: the list of bad ranges, which nothing but a damaged
/// record brings about, while the seeds' promises are those of a journal that nothing damages before its end; and what becomes of rare writes
/// that were not synced.
fn required_faults() -> impl Iterator<Item = (Fault, OpKind)> {
    let kinds = OP_KINDS.iter().copied().filter(|(purpose, _)| *purpose != Purpose::BadList);
    let met = kinds.flat_map(|kind| possible_faults(kind).into_iter().map(move |fault| (fault, kind)));
    let is_fate = |fault| matches!(fault, Fault::TornWrite | Fault::LostWrite | Fault::KeptWrite);
    let met = met.filter(move |(fault, kind)| !(is_fate(*fault) && RARE_KINDS.contains(kind)));
    met.chain([(Fault::Error, (Purpose::View, "read"))])
}
