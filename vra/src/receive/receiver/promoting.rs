//! The receiver's part that promotes: what has grown older than the history goes to the recovery disks (C2).

mod shrinking;

use journal::format::{ChainPoint, Gap};
use journal::promotion::{Promotion, PromotionAction, PromotionError};
use journal::storage::{AlignedBuf, StorageError};
use journal::writer::{Change, ClosedSegment, RESERVED_SLOTS};

use super::Receiver;
use crate::clock::Now;
use crate::planted::{Planted, is_planted};
use crate::receive::receiver_types::{ReceiverEvent, ReceiverOutput};

/// Where promotion stands.
#[derive(Debug, Default)]
pub(super) struct Promoting {
    stage: Stage,
    /// After a failure: not before then, by the monotonic clock.
    not_before_us: u64,
    /// How often in a row it couldn't go on.
    failures: u32,
    /// How often in a row something couldn't be read that counts as lost then.
    lost_failures: u32,
    /// The history is shorter than it should be, and that was told.
    told_shortened: bool,
    /// The locked checkpoint that was told to be in the way.
    told_lock: Option<u64>,
    /// The number through which views were told to make way.
    told_view: Option<u64>,
    /// Since when the full journal waits for views to make way, by the monotonic clock.
    waits_for_view_since_us: Option<u64>,
    /// That it is stuck was told.
    told_blocked: bool,
    recovery_disks_reserved: Vec<bool>,
    /// The files are being closed: nothing begins any more.
    closing: bool,
}

#[derive(Debug, Default)]
enum Stage {
    #[default]
    Idle,
    /// What the segments hold is being found out: nothing is announced that can't be done.
    Looking {
        promotion: Box<Promotion>,
        due: Due,
    },
    /// The intent is not durable yet.
    Announcing {
        ticket: u64,
        promotion: Box<Promotion>,
        due: Due,
    },
    Carrying(Box<Promotion>),
    /// It can't go on; what is under way ends first.
    Draining(Box<Promotion>),
    /// What the recovery disks have lost is not noted durably yet.
    Noting {
        ticket: u64,
    },
    /// The low-water mark is not durable yet.
    Ending {
        ticket: u64,
        segments: usize,
    },
    Shrinking {
        ticket: u64,
    },
}

/// What is to be promoted.
#[derive(Clone, Copy, Debug, Default)]
struct Due {
    /// How many of the oldest segments.
    count: usize,
    /// They are not all as old as the history should be.
    shortens: bool,
    /// The journal has no room, and this locked checkpoint keeps it from making some.
    lock_in_the_way: Option<u64>,
    /// The journal has no room, and an open view keeps it from promoting through here.
    view_in_the_way: Option<u64>,
}

/// Segments that are promoted together: blocks that are written again and again are carried once.
const MAX_SEGMENTS: usize = 8;
/// For so many segments an open view makes way at once: what it is kept by must be copied first.
const VIEW_SEGMENTS: usize = 4;
/// What their footers may have together, in bytes: the worker that puts them in order does nothing else meanwhile, for some 20 ms.
const MAX_FOOTERS_BYTES: u64 = 8 << 20;
/// Disk content under way while journals take writes, in bytes: they go first.
const BUSY_WINDOW_BYTES: u64 = 1 << 20;
/// The same while none does, and when this one waits for room.
const IDLE_WINDOW_BYTES: u64 = 8 << 20;
/// Without a batch for so long, in microseconds, a journal isn't taking writes: between two batches of a busy VM nothing is under way either.
const BUSY_US: u64 = 100_000;
/// How long a full journal waits for views to make way before the sender is told, in microseconds: copying what the next promotion changes
/// takes less, and the sender keeps what it has meanwhile.
const VIEW_PATIENCE_US: u64 = 10_000_000;
/// Wait after a promotion that couldn't go on, in microseconds.
const HOLD_OFF_US: u64 = 5_000_000;
/// What can't be read then counts as lost: after so many failures in a row, which take some five minutes.
const LOST_AFTER: u32 = 6;

impl Promoting {
    pub(super) fn new(recovery_disks_reserved: &[bool]) -> Self {
        Self { recovery_disks_reserved: recovery_disks_reserved.to_vec(), ..Self::default() }
    }

    /// The space of a recovery disk is given back from the next promotion on where it reads zeroes.
    pub(super) fn keep_no_space(&mut self, volume: u16) {
        self.recovery_disks_reserved[usize::from(volume)] = false;
    }

    pub(super) fn is_idle(&self) -> bool {
        matches!(self.stage, Stage::Idle)
    }

    /// Whether it looks at what it is going to promote.
    pub(super) fn is_looking(&self) -> bool {
        matches!(self.stage, Stage::Looking { .. })
    }

    /// Whether recovery disks may be changing.
    pub(super) fn is_carrying(&self) -> bool {
        matches!(self.stage, Stage::Announcing { .. } | Stage::Carrying(_) | Stage::Draining(_))
    }
}

impl Receiver {
    /// Begins a promotion if one is due.
    pub(super) fn promote(&mut self, now: Now) {
        let other_generation =
            |open: &crate::wire::Open| open.generation.0 != self.writer.superblock().tail_generation;
        if now.mono_us < self.promoting.not_before_us && self.promoting.is_idle() {
            return self.tell_full();
        }
        if !self.promoting.is_idle()
            || self.failed
            || self.promoting.closing
            || !self.may_promote && !self.is_pressed()
            || self.candidate.as_ref().is_some_and(|candidate| other_generation(&candidate.open))
        {
            return;
        }
        let stamp_us = self.stamp_us(now);
        let due = self.due(stamp_us);
        self.tell_lock(due.lock_in_the_way);
        self.tell_view(due.view_in_the_way);
        if due.count == 0 {
            if due.lock_in_the_way.is_some() && self.policy.give_up_history {
                // It is given up before anybody is told that the journal is full.
                return;
            }
            if self.waits_for_view(due, now) {
                return;
            }
            self.tell_full();
            return self.shrink(usize::MAX, now);
        }
        let Some(through) = self.writer.closed_segments().nth(due.count - 1) else { return };
        if self.writer.durable().seq <= through.last.seq && !self.writer.is_idle() {
            // Its footer may not be written yet.
            return;
        }
        let promotion = self.promotion(through.last);
        if is_planted(Planted::PromotionNotAnnounced) {
            let through = promotion.through();
            if self.writer.change(Change::AnnouncePromotion { through }).is_ok() {
                self.carry(Box::new(promotion), due);
            }
            return;
        }
        let promotion = Box::new(promotion.before_announcing());
        self.promoting.stage = Stage::Looking { promotion, due };
    }

    /// It is known what the segments hold: the promotion is announced, if it may still be.
    fn announce(&mut self) {
        let Stage::Looking { promotion, due } = std::mem::take(&mut self.promoting.stage) else { return };
        let through = promotion.through();
        if !self.promoting.closing
            && self.may_promote_through(through.seq)
            && let Ok(ticket) = self.writer.change(Change::AnnouncePromotion { through })
        {
            self.promoting.stage = Stage::Announcing { ticket, promotion, due };
        }
    }

    /// Whether nothing has come in the way since it was decided: a view was opened, or a history given up.
    fn may_promote_through(&self, through_seq: u64) -> bool {
        let superblock = self.writer.superblock();
        let announced = superblock.promotion_intent_seq;
        if announced > superblock.low_water.seq {
            return through_seq == announced;
        }
        let pin = if is_planted(Planted::PromotionPastPin) { None } else { self.pins.lowest() };
        self.history.newest_cut().is_some_and(|cut| through_seq <= cut.min(pin.unwrap_or(u64::MAX)))
            && (is_planted(Planted::PromotionEndsInSync) || !self.history.is_inside_sync(through_seq))
    }

    /// Ends what is under way, as soon as that can be: it was announced, and the next opening does it again.
    pub(super) fn stop_promoting(&mut self) {
        self.promoting.closing = true;
        match std::mem::take(&mut self.promoting.stage) {
            Stage::Carrying(promotion) | Stage::Looking { promotion, .. } if promotion.is_busy() => {
                self.promoting.stage = Stage::Draining(promotion);
            }
            Stage::Carrying(_) | Stage::Looking { .. } => {}
            other => self.promoting.stage = other,
        }
    }

    /// The lowest number that a view may be opened at, counting what is only about to be announced.
    pub fn oldest_seq(&self) -> u64 {
        let announced = match &self.promoting.stage {
            Stage::Announcing { promotion, .. } => promotion.through().seq,
            _ => 0,
        };
        self.writer.superblock().oldest_seq().max(announced)
    }

    /// What is to be promoted now.
    fn due(&self, stamp_us: u64) -> Due {
        let superblock = self.writer.superblock();
        if superblock.state.is_base_sync() {
            return Due::default();
        }
        let through =
            |seq: u64| self.writer.closed_segments().take_while(|segment| segment.last.seq <= seq).count();
        let announced = superblock.promotion_intent_seq;
        if announced > superblock.low_water.seq {
            // An earlier opening has announced it: nothing below can be opened, and the recovery disks hold a part of it.
            return Due { count: through(announced), ..Due::default() };
        }
        let is_old = |end_us: u64| end_us.saturating_add(self.policy.history_us) <= stamp_us;
        let old = self.writer.closed_segments().take_while(|segment| is_old(segment.end_time_us())).count();
        let is_pressed = self.is_pressed();
        let wanted = old.min(self.segments_together()).max(usize::from(is_pressed));
        // One checkpoint stays, whatever happens; before a sync that goes through the journal it is the last one before that (B5).
        let Some(newest_cut) = self.history.newest_cut() else { return Due::default() };
        let pin = if is_planted(Planted::PromotionPastPin) { None } else { self.pins.lowest() };
        let allowed = through(newest_cut.min(pin.unwrap_or(u64::MAX)));
        let reach = if is_pressed { allowed } else { old.min(allowed) };
        let count = self.outside_syncs(wanted.min(reach), reach);
        let lock_in_the_way = self.pins.lock.filter(|lock| {
            is_pressed
                && count == 0
                && self.pins.view.is_none_or(|view| *lock <= view)
                && through(newest_cut) > 0
        });
        let blocking_view = self
            .pins
            .view
            .filter(|view| is_pressed && count == 0 && lock_in_the_way.is_none() && *view < newest_cut);
        let view_in_the_way = blocking_view.and_then(|_| {
            let reach = through(newest_cut);
            let count = self.outside_syncs(reach.min(VIEW_SEGMENTS), reach);
            self.writer.closed_segments().nth(count.checked_sub(1)?).map(|segment| segment.last.seq)
        });
        Due { count, shortens: count > old, lock_in_the_way, view_in_the_way }
    }

    /// Whether the journal is full and it can still be hoped that views make way.
    fn waits_for_view(&mut self, due: Due, now: Now) -> bool {
        if due.view_in_the_way.is_none() || self.full_told.is_none() {
            self.promoting.waits_for_view_since_us = None;
            return false;
        }
        let since_us = *self.promoting.waits_for_view_since_us.get_or_insert(now.mono_us);
        now.mono_us.saturating_sub(since_us) < VIEW_PATIENCE_US
    }

    /// Tells through which number views are in the way, or that none is any more.
    fn tell_view(&mut self, through_seq: Option<u64>) {
        if std::mem::replace(&mut self.promoting.told_view, through_seq) != through_seq {
            self.outputs.push_back(ReceiverOutput::Event(ReceiverEvent::ViewInTheWay { through_seq }));
        }
    }

    /// Tells which locked checkpoint is in the way, or that none is any more.
    pub(super) fn tell_lock(&mut self, cut: Option<u64>) {
        if std::mem::replace(&mut self.promoting.told_lock, cut) != cut {
            let event = cut.map_or(ReceiverEvent::LockOutOfTheWay, |cut| ReceiverEvent::LockInTheWay { cut });
            self.outputs.push_back(ReceiverOutput::Event(event));
        }
    }

    /// How many of the oldest segments are promoted together at most.
    fn segments_together(&self) -> usize {
        let mut footers_bytes = 0;
        let fits = |segment: &&ClosedSegment| {
            footers_bytes += segment.trailer.as_ref().map_or(0, |trailer| trailer.footer_len_bytes);
            footers_bytes <= MAX_FOOTERS_BYTES
        };
        self.writer.closed_segments().take(MAX_SEGMENTS).take_while(fits).count().max(1)
    }

    /// How many of the oldest segments can be promoted if need be.
    pub(super) fn promotable_count(&self) -> usize {
        let Some(newest_cut) = self.history.newest_cut() else { return 0 };
        let most = newest_cut.min(self.pins.lowest().unwrap_or(u64::MAX));
        self.writer.closed_segments().take_while(|segment| segment.last.seq <= most).count()
    }

    /// The number of segments next to `wanted`, up to `reach`, whose end lies in no sync: the border that begins it would be lost with its
    /// segment, and with it the word that nothing inside counts (B5).
    fn outside_syncs(&self, wanted: usize, reach: usize) -> usize {
        let is_inside = |count: &usize| {
            let last = count.checked_sub(1).and_then(|last| self.writer.closed_segments().nth(last));
            last.is_some_and(|segment| self.history.is_inside_sync(segment.last.seq))
        };
        if wanted == 0 || is_planted(Planted::PromotionEndsInSync) {
            return wanted;
        }
        let later = (wanted..=reach).find(|count| !is_inside(count));
        later.or_else(|| (1..wanted).rev().find(|count| !is_inside(count))).unwrap_or(0)
    }

    /// Whether the journal has hardly any room left and can't grow: then history is shortened.
    fn is_pressed(&self) -> bool {
        let limits = self.policy.limits;
        let spare_slots = limits.max_slots as usize / 16;
        let can_grow = self.writer.superblock().slot_count < limits.max_slots && !self.writer.lacks_space();
        let is_filling = self.full
            || spare_slots > 0
            || self.writer.open_fill_bytes() > self.writer.superblock().slot_len_bytes / 2;
        self.full
            || self.is_over_limit()
            || !can_grow && is_filling && self.writer.free_slot_count() <= RESERVED_SLOTS + spare_slots
    }

    /// Whether more slots hold history than a limit that was lowered allows.
    fn is_over_limit(&self) -> bool {
        let in_use = self.writer.superblock().slot_count as usize - self.writer.free_slot_count();
        in_use + RESERVED_SLOTS > self.policy.limits.max_slots as usize
    }

    /// One that carries all that is closed through a place.
    fn promotion(&self, through: ChainPoint) -> Promotion {
        let segments = self.writer.closed_segments().take_while(|segment| segment.last.seq <= through.seq);
        let segments: Vec<_> = segments.cloned().collect();
        let reserved = self.promoting.recovery_disks_reserved.clone();
        let superblock = self.writer.superblock().clone();
        let bad_ranges = self.writer.bad_ranges().clone();
        let promotion = Promotion::new(superblock, bad_ranges, segments, reserved, self.policy.promotion);
        if self.is_lost_for_good() { promotion } else { promotion.patient() }
    }

    /// It is announced, durably.
    fn carry(&mut self, mut promotion: Box<Promotion>, due: Due) {
        let through = promotion.through();
        let ending = self.writer.closed_segments().find(|segment| segment.last == through);
        let end_time_us = ending.map_or(0, ClosedSegment::end_time_us);
        self.tell_shortened(due.shortens, end_time_us);
        promotion.announced();
        self.promoting.stage = Stage::Carrying(promotion);
    }

    /// The next operation of a promotion.
    pub(super) fn promotion_action(&mut self, now: Now) -> Option<PromotionAction> {
        let newest_append_us = self.last_append_us.max(self.neighbours_append_us);
        let is_pressed = self.is_pressed();
        let (Stage::Carrying(promotion) | Stage::Looking { promotion, .. }) = &mut self.promoting.stage
        else {
            return None;
        };
        let is_quiet = now.mono_us.saturating_sub(newest_append_us) > BUSY_US && self.writer.is_idle();
        let window_bytes = if is_quiet || is_pressed { IDLE_WINDOW_BYTES } else { BUSY_WINDOW_BYTES };
        let action = promotion.poll_action(window_bytes);
        if action.is_none() && promotion.promoted().is_some() {
            self.carried();
        }
        action
    }

    /// An operation of a promotion has ended.
    pub fn promotion_done(&mut self, token: u64, result: Result<Option<AlignedBuf>, StorageError>, now: Now) {
        let is_lost_for_good = self.is_lost_for_good();
        let (Stage::Carrying(promotion) | Stage::Draining(promotion) | Stage::Looking { promotion, .. }) =
            &mut self.promoting.stage
        else {
            return;
        };
        let ended = promotion.done(token, result);
        match (&mut self.promoting.stage, ended) {
            (Stage::Carrying(_), Ok(true)) => self.carried(),
            (Stage::Carrying(_), Err(PromotionError::DiskLost { .. })) if is_lost_for_good => {
                self.note_lost(now);
            }
            (Stage::Carrying(_) | Stage::Looking { .. }, Err(error)) => self.stuck(error, now),
            (Stage::Looking { promotion, .. }, Ok(_)) if promotion.waits_for_announcement() => {
                self.announce();
            }
            (Stage::Draining(promotion), _) if !promotion.is_busy() => self.promoting.stage = Stage::Idle,
            _ => {}
        }
        self.take_events(now);
        self.advance(now);
    }

    fn carried(&mut self) {
        let Stage::Carrying(promotion) = std::mem::take(&mut self.promoting.stage) else { return };
        let Some(done) = promotion.promoted() else { return };
        (self.promoting.told_blocked, self.promoting.failures) = (false, 0);
        self.promoting.lost_failures = 0;
        // Open views read from the recovery disk before the slots are free (C3).
        self.outputs.push_back(ReceiverOutput::Event(ReceiverEvent::Promoted {
            through_seq: done.through.seq,
            written_bytes: done.written_bytes,
            bad_ranges: done.bad_ranges.clone(),
        }));
        let change = Change::EndPromotion {
            through: done.through,
            size_bytes: done.size_bytes,
            bad_ranges: done.bad_ranges,
        };
        let segments =
            self.writer.closed_segments().take_while(|segment| segment.last.seq <= done.through.seq);
        let segments = segments.count();
        if let Ok(ticket) = self.writer.change(change) {
            self.promoting.stage = Stage::Ending { ticket, segments };
        }
    }

    /// The recovery disks have lost what is to be written in part: it is noted, then the promotion is done again. Open views know before the
    /// file does, and nothing was written there yet.
    fn note_lost(&mut self, now: Now) {
        let Stage::Carrying(promotion) = std::mem::take(&mut self.promoting.stage) else { return };
        let bad_ranges = promotion.bad_ranges_with_lost();
        (self.promoting.told_blocked, self.promoting.lost_failures) = (false, 0);
        self.outputs.push_back(ReceiverOutput::Event(ReceiverEvent::Promoted {
            through_seq: self.writer.superblock().low_water.seq,
            written_bytes: 0,
            bad_ranges: bad_ranges.clone(),
        }));
        match self.writer.change(Change::NoteBadRanges(bad_ranges)) {
            Ok(ticket) => self.promoting.stage = Stage::Noting { ticket },
            Err(_) => self.hold_off(now),
        }
    }

    fn stuck(&mut self, error: PromotionError, now: Now) {
        let stage = std::mem::take(&mut self.promoting.stage);
        let (Stage::Carrying(promotion) | Stage::Looking { promotion, .. }) = stage else { return };
        if promotion.is_busy() {
            self.promoting.stage = Stage::Draining(promotion);
        }
        let superblock = self.writer.superblock();
        if superblock.state.is_base_sync() {
            // The history was given up meanwhile, and its segments with it.
            return;
        }
        match &error {
            PromotionError::Gap { .. } | PromotionError::DiskLost { .. } => self.promoting.lost_failures += 1,
            PromotionError::Journal(error) if error.is_medium() => self.promoting.lost_failures += 1,
            _ => self.promoting.lost_failures = 0,
        }
        if let PromotionError::Gap { first_seq, last_seq, .. } = error
            && self.promoting.lost_failures == LOST_AFTER
        {
            let volume_count = superblock.volumes.len() as u16;
            self.history.gap(Gap { first_seq, last_seq }, volume_count);
        }
        self.hold_off(now);
        // It is done again from the start, with every write of it: nothing that failed is trusted. The journal itself is whole.
        if !std::mem::replace(&mut self.promoting.told_blocked, true) {
            self.outputs.push_back(ReceiverOutput::Event(ReceiverEvent::PromotionStuck { error }));
        }
        self.tell_full();
    }

    /// Whether what can't be read counts as lost: it couldn't be in several tries over some minutes. A disk that fails for a while loses nothing.
    fn is_lost_for_good(&self) -> bool {
        self.promoting.lost_failures >= LOST_AFTER
    }

    /// Not again before a while, which grows with each failure.
    fn hold_off(&mut self, now: Now) {
        let wait_us = HOLD_OFF_US << self.promoting.failures.min(6);
        self.promoting.failures += 1;
        self.promoting.not_before_us = now.mono_us + wait_us;
    }

    /// A change of the journal is durable: whether it was one of promotion's.
    pub(super) fn promotion_changed(&mut self, changed: u64, now: Now) -> bool {
        match self.promoting.stage {
            Stage::Announcing { ticket, .. } if ticket == changed => {
                let Stage::Announcing { promotion, due, .. } = std::mem::take(&mut self.promoting.stage)
                else {
                    return true;
                };
                let superblock = self.writer.superblock();
                let is_announced = superblock.promotion_intent_seq == promotion.through().seq;
                if self.promoting.closing {
                    // Announced is enough: the next opening goes on from there.
                } else if is_announced && !superblock.state.is_base_sync() {
                    self.carry(promotion, due);
                } else {
                    self.hold_off(now);
                    self.tell_full();
                }
            }
            Stage::Ending { ticket, segments } if ticket == changed => {
                self.history.forget_below(self.writer.superblock().oldest_seq());
                self.writer.retry(self.policy.limits);
                self.promoting.stage = Stage::Idle;
                self.shrink(segments + 1, now);
            }
            Stage::Shrinking { ticket } | Stage::Noting { ticket } if ticket == changed => {
                self.promoting.stage = Stage::Idle;
            }
            _ => return false,
        }
        true
    }

    /// When something that comes now was received, in microseconds (C6): goes on from the newest time in the journal by the monotonic clock,
    /// so that no jump of the system's clock, and no time in which the target didn't run, makes history older.
    pub(super) fn stamp_us(&mut self, now: Now) -> u64 {
        if is_planted(Planted::WallClockAges) {
            return now.wall_us;
        }
        let newest_us = self.writer.receive_time_us();
        let first_us = if newest_us == 0 { now.wall_us } else { newest_us };
        let (stamp_us, mono_us) = *self.stamp_base.get_or_insert((first_us, now.mono_us));
        stamp_us.saturating_add(now.mono_us.saturating_sub(mono_us))
    }

    /// Tells when history begins to be given up for room before it is as old as it should be, and when that ends.
    fn tell_shortened(&mut self, is_shortened: bool, through_us: u64) {
        if std::mem::replace(&mut self.promoting.told_shortened, is_shortened) != is_shortened {
            let event = if is_shortened {
                ReceiverEvent::HistoryShortened { through_us }
            } else {
                ReceiverEvent::HistoryFits
            };
            self.outputs.push_back(ReceiverOutput::Event(event));
        }
    }
}

#[cfg(test)]
mod tests;
