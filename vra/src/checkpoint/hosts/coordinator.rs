use std::collections::VecDeque;

use journal::batch::CheckpointKind;

use super::attempt::Attempt;
use super::back_off::BackOff;
use super::failure::EpochFailure;
use super::group::SpanningGroup;
use super::machine::{AskId, Common, Holder, SpanningOutput, SpanningStatus, TakenByHosts};
use super::participant::Participant;
use crate::api::{VpgId, VraId};
use crate::clock::Now;
use crate::planted::{Planted, is_planted};
use crate::wire::{Decline, GroupEpoch, GroupMessage, Held, Hold, Recorded, Release};

/// Checkpoints of a group that wait to be taken at most.
const MAX_WAITING: usize = 16;

/// After a collision with another coordinator's attempt it is tried again in so many µs.
const AGAIN_AFTER_US: u64 = 30_000;

/// So far the wall clock may be behind the last checkpoint's time, in µs, for the next one to be stamped right after it: the order of times is
/// kept over a clock that is set a little. Over more than that a wrong clock would be followed for as long as it was wrong by.
const MOST_CLOCK_STEP_US: u64 = 1_000_000;

/// A group, this host's part in it, and what all groups share.
pub(super) type Around<'a> = (&'a SpanningGroup, &'a mut Participant, &'a mut Common);

/// A host's attempts at a group's checkpoints, one at a time: by the clock if it is the first live host, and when asked.
pub(super) struct Coordinator {
    vpg: VpgId,
    attempt: Option<Attempt>,
    /// The last attempt's epoch and when its holds were asked for: answers are measured even if they come too late.
    asked_hosts: Option<(GroupEpoch, u64)>,
    due_mono_us: u64,
    back_off: BackOff,
    waiting: VecDeque<Waiting>,
    last_time_us: u64,
    status: SpanningStatus,
}

/// A checkpoint that was asked for.
struct Waiting {
    ask: AskId,
    kind: CheckpointKind,
    tag: String,
    until_mono_us: u64,
    not_before_mono_us: u64,
}

impl Coordinator {
    pub(super) fn new(vpg: VpgId, interval_us: u64, now: Now) -> Self {
        Self {
            vpg,
            attempt: None,
            asked_hosts: None,
            due_mono_us: now.mono_us + interval_us,
            back_off: BackOff::new(interval_us),
            waiting: VecDeque::new(),
            last_time_us: 0,
            status: SpanningStatus::default(),
        }
    }

    pub(super) fn status(&self) -> SpanningStatus {
        SpanningStatus { interval_us: self.back_off.interval_us(), ..self.status.clone() }
    }

    /// The group's interval is this one.
    pub(super) fn set_interval(&mut self, interval_us: u64, now: Now) {
        self.back_off.set_interval(interval_us);
        self.be_due_within_interval(now.mono_us);
    }

    fn be_due_within_interval(&mut self, now_us: u64) {
        self.due_mono_us = self.due_mono_us.min(now_us + self.back_off.interval_us());
    }

    pub(super) fn be_due_at(&mut self, due_mono_us: u64) {
        self.due_mono_us = due_mono_us;
    }

    pub(super) fn ask(
        &mut self,
        ask: AskId,
        kind: CheckpointKind,
        tag: &str,
        until_mono_us: u64,
    ) -> Result<(), EpochFailure> {
        if self.waiting.len() >= MAX_WAITING {
            return Err(EpochFailure::TooMany);
        }
        self.waiting.push_back(Waiting {
            ask,
            kind,
            tag: tag.to_owned(),
            until_mono_us,
            not_before_mono_us: 0,
        });
        Ok(())
    }

    pub(super) fn next_wake_us(&self, coordinates: bool) -> Option<u64> {
        match &self.attempt {
            Some(attempt) => Some(attempt.due_mono_us()),
            None => {
                let by_the_clock = coordinates.then_some(self.due_mono_us);
                let asked = self.waiting.front().map(|waiting| waiting.not_before_mono_us);
                by_the_clock.into_iter().chain(asked).min()
            }
        }
    }

    pub(super) fn tick(&mut self, around: Around<'_>, now: Now, holder: &mut dyn Holder) {
        let (group, participant, common) = around;
        let own = common.own;
        if let Some(failure) = self.attempt.as_ref().and_then(|attempt| attempt.overdue(own, now.mono_us)) {
            self.fail(failure, participant, common, now);
        }
        if self.back_off.look(common.missing_of(group, now)) {
            self.be_due_within_interval(now.mono_us);
        }
        if self.attempt.is_some() {
            return;
        }
        let is_ready = |waiting: &mut Waiting| waiting.not_before_mono_us <= now.mono_us;
        if let Some(waiting) = self.waiting.pop_front_if(is_ready) {
            let asked = Some((waiting.ask, waiting.until_mono_us));
            self.begin((waiting.kind, waiting.tag), asked, (group, participant, common), now, holder);
        } else if self.due_mono_us <= now.mono_us && common.coordinator_of(group, now) == Some(common.own) {
            // In the rhythm of the interval, unless it was missed.
            let half_us = group.interval_us / 2;
            self.due_mono_us = (self.due_mono_us + group.interval_us).max(now.mono_us + half_us);
            let what = (CheckpointKind::Automatic, String::new());
            self.begin(what, None, (group, participant, common), now, holder);
        }
    }

    fn begin(
        &mut self,
        what: (CheckpointKind, String),
        asked: Option<(AskId, u64)>,
        around: Around<'_>,
        now: Now,
        holder: &mut dyn Holder,
    ) {
        let (group, participant, common) = around;
        let own = common.own;
        let others = || group.hosts.iter().map(|host| host.vra).filter(|vra| *vra != own);
        let deadline_us = common.trips.deadline_us(others(), group.deadline_us);
        let epoch = common.next_epoch();
        let missing = common.missing_of(group, now).next();
        self.attempt = Some(Attempt::new(epoch, what, asked, &group.hosts, (now.mono_us, deadline_us)));
        let missing = missing.map_or(Ok(()), |vra| Err(EpochFailure::Missing { vra }));
        // Before anybody is asked: guests elsewhere needn't be held for an attempt that this host spoils.
        let own_can =
            || Participant::check(group).map_err(|(code, vm)| EpochFailure::Declined { vra: own, vm, code });
        if let Err(failure) = missing.and_then(|()| own_can()) {
            return self.fail(failure, participant, common, now);
        }
        let at = GroupEpoch { vpg: self.vpg, epoch };
        self.asked_hosts = Some((at, now.mono_us));
        let hold = Hold {
            at,
            member_set_version: group.member_set_version,
            deadline_us: u32::try_from(deadline_us).unwrap_or(u32::MAX).max(1),
        };
        others().for_each(|vra| common.send(vra, GroupMessage::Hold(hold)));
        self.go_on((group, participant, common), now, holder);
    }

    pub(super) fn held(
        &mut self,
        from: VraId,
        held: &Held,
        around: Around<'_>,
        now: Now,
        holder: &mut dyn Holder,
    ) {
        let (group, participant, common) = around;
        if let Some((_, asked_mono_us)) = self.asked_hosts.filter(|(at, _)| *at == held.at) {
            common.trips.note(from, now.mono_us.saturating_sub(asked_mono_us));
        }
        let attempt = self.attempt.as_mut().filter(|attempt| attempt.epoch == held.at.epoch);
        let Some(attempt) = attempt else {
            // Nobody will release it: its guests needn't wait for the deadline.
            return common.send(from, GroupMessage::Abort(held.at));
        };
        match attempt.held(from, held) {
            Ok(()) => self.go_on((group, participant, common), now, holder),
            Err(failure) => self.fail(failure, participant, common, now),
        }
    }

    pub(super) fn declined(
        &mut self,
        from: VraId,
        decline: &Decline,
        participant: &mut Participant,
        common: &mut Common,
        now: Now,
    ) {
        let is_waited_for = self.attempt.as_ref().is_some_and(|attempt| {
            attempt.epoch == decline.at.epoch && attempt.unheld().any(|vra| vra == from)
        });
        if is_waited_for {
            let failure = EpochFailure::Declined { vra: from, vm: decline.vm, code: decline.code };
            self.fail(failure, participant, common, now);
        }
    }

    pub(super) fn recorded(
        &mut self,
        from: VraId,
        recorded: &Recorded,
        participant: &mut Participant,
        common: &mut Common,
        now: Now,
    ) {
        let attempt = self.attempt.as_mut().filter(|attempt| attempt.epoch == recorded.at.epoch);
        let Some(attempt) = attempt else { return };
        match attempt.recorded(from, recorded.refused) {
            Ok(true) => self.succeed(common),
            Ok(false) => {}
            Err(failure) => self.fail(failure, participant, common, now),
        }
    }

    /// Gives up what is under way and what waits: the group has changed.
    pub(super) fn end(&mut self, participant: &mut Participant, common: &mut Common, now: Now) {
        if self.attempt.is_some() {
            self.fail(EpochFailure::Changed, participant, common, now);
        }
        if self.back_off.reset() {
            self.be_due_within_interval(now.mono_us);
        }
        for waiting in std::mem::take(&mut self.waiting) {
            let result = Err(EpochFailure::Changed);
            common.output(SpanningOutput::Ended { vpg: self.vpg, asked: Some(waiting.ask), result });
        }
    }

    /// When the other hosts are held, this one is; then all are released.
    fn go_on(&mut self, around: Around<'_>, now: Now, holder: &mut dyn Holder) {
        let (group, participant, common) = around;
        let Some(attempt) = &mut self.attempt else { return };
        let own = common.own;
        if attempt.released.is_some() && !is_planted(Planted::ReleasedBeforeAllHold) {
            return;
        }
        let at = GroupEpoch { vpg: self.vpg, epoch: attempt.epoch };
        // The planted bug: each host is released as soon as it is held.
        let only_own_is_missing =
            attempt.unheld().all(|vra| vra == own) || is_planted(Planted::ReleasedBeforeAllHold);
        if !only_own_is_missing {
            return;
        }
        // Last: its guests wait for no message.
        if attempt.unheld().any(|vra| vra == own) {
            let hold = Hold {
                at,
                member_set_version: group.member_set_version,
                deadline_us: u32::try_from(attempt.deadline_us).unwrap_or(u32::MAX),
            };
            let held = participant.hold(group, own, &hold, common.next_hold(), now, holder);
            let held = held.map_err(|(code, vm)| EpochFailure::Declined { vra: own, vm, code });
            if let Err(failure) = held.and_then(|held| attempt.held(own, &held)) {
                return self.fail(failure, participant, common, now);
            }
        }
        let time_us = match attempt.released {
            Some((_, time_us)) => time_us,
            None => time_of(self.vpg, self.last_time_us, now.wall_us),
        };
        self.last_time_us = time_us;
        attempt.released = Some((now.mono_us, time_us));
        let (kind, tag) = (attempt.kind, attempt.tag.clone());
        let holds: Vec<(VraId, u64)> = attempt.holds().collect();
        let release = |hold| Release { at, hold, time_us, kind, tag: tag.clone() };
        let mut own_hold = None;
        for (vra, hold) in holds {
            if vra == own {
                own_hold = Some(hold);
            } else {
                common.send(vra, GroupMessage::Release(release(hold)));
            }
        }
        let Some(hold) = own_hold else { return };
        let ended = participant.release(own, &release(hold), now);
        match attempt.recorded(own, ended.taken.err()) {
            Ok(true) => self.succeed(common),
            Ok(false) => {}
            Err(failure) => self.fail(failure, participant, common, now),
        }
    }

    fn succeed(&mut self, common: &mut Common) {
        let Some(attempt) = self.attempt.take() else { return };
        let taken = TakenByHosts {
            epoch: attempt.epoch,
            time_us: attempt.released.map_or(0, |(_, time_us)| time_us),
            kind: attempt.kind,
            members: attempt.cuts(),
            tag: attempt.tag,
        };
        if self.back_off.reset() {
            self.be_due_within_interval(common.now_mono_us);
        }
        self.status.taken_epochs += 1;
        self.status.aborted_in_row = 0;
        self.status.last = Some(taken.clone());
        let asked = attempt.asked.map(|(ask, _)| ask);
        common.output(SpanningOutput::Ended { vpg: self.vpg, asked, result: Ok(taken) });
    }

    fn fail(&mut self, failure: EpochFailure, participant: &mut Participant, common: &mut Common, now: Now) {
        let Some(attempt) = self.attempt.take() else { return };
        let at = GroupEpoch { vpg: self.vpg, epoch: attempt.epoch };
        let was_asked = self.asked_hosts.is_some_and(|(asked, _)| asked == at);
        if attempt.released.is_none() && was_asked {
            let own = common.own;
            attempt
                .hosts()
                .filter(|vra| *vra != own)
                .for_each(|vra| common.send(vra, GroupMessage::Abort(at)));
            participant.abort(common.own, at, now);
        }
        if let Some((ask, until_mono_us)) = attempt.asked
            && failure.is_collision()
            && now.mono_us < until_mono_us
        {
            self.waiting.push_front(Waiting {
                ask,
                kind: attempt.kind,
                tag: attempt.tag,
                until_mono_us,
                not_before_mono_us: now.mono_us + AGAIN_AFTER_US,
            });
            return;
        }
        self.back_off.failed(&failure, common.own);
        self.due_mono_us = self.due_mono_us.max(self.back_off.due_after(attempt.began_mono_us));
        self.status.aborted_epochs += 1;
        self.status.aborted_in_row += 1;
        self.status.last_failure = Some(failure.clone());
        let asked = attempt.asked.map(|(ask, _)| ask);
        common.output(SpanningOutput::Ended { vpg: self.vpg, asked, result: Err(failure) });
    }
}

/// The time of a checkpoint that comes after one of `last_us`.
fn time_of(vpg: VpgId, last_us: u64, wall_us: u64) -> u64 {
    if wall_us.saturating_add(MOST_CLOCK_STEP_US) < last_us {
        // Said once for each time that it happens: the next checkpoint comes after this one.
        tracing::warn!(
            %vpg,
            behind_us = last_us - wall_us,
            "this host's clock was set back: checkpoints from now on have earlier times than those before; keep it synchronised"
        );
        return wall_us;
    }
    wall_us.max(last_us + 1)
}
