use std::collections::{BTreeMap, BTreeSet, VecDeque};

use journal::batch::{CheckpointKind, Epoch};
use uuid::Uuid;

use super::coordinator::Coordinator;
use super::failure::EpochFailure;
use super::group::SpanningGroup;
use super::liveness::Liveness;
use super::participant::Participant;
use super::round_trip::RoundTrips;
use crate::api::status::HoldTimes;
use crate::api::{VpgId, VraId};
use crate::checkpoint::{CheckpointRefusal, LocalHold, Member};
use crate::clock::Now;
use crate::planted::{Planted, is_planted};
use crate::wire::{Decline, DeclineCode, GroupEpoch, GroupMessage, HeldMember, Hold, Recorded, Release};

/// Holds members on this host, and lets the hold expire by itself even if nobody comes back to it.
pub trait Holder {
    /// See [`LocalHold::begin`].
    ///
    /// # Errors
    /// A member can't take part: then none is held.
    fn hold(
        &mut self,
        members: &[Member],
        deadline_us: u64,
        now: Now,
    ) -> Result<LocalHold, CheckpointRefusal>;
}

/// Names a checkpoint that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AskId(pub u64);

/// What the owner of [`SpanningGroups`] has to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SpanningOutput {
    /// Send a message; if it can't be sent at once, it isn't to be sent at all.
    Send {
        /// To which VRA.
        to: VraId,
        /// What.
        message: GroupMessage,
    },
    /// An attempt that this VRA coordinated is over.
    Ended {
        /// Of which group.
        vpg: VpgId,
        /// The one that was asked for; none by the clock.
        asked: Option<AskId>,
        /// The checkpoint, which all members have recorded, or why there is none.
        result: Result<TakenByHosts, EpochFailure>,
    },
}

/// A checkpoint that all hosts of a group have recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TakenByHosts {
    /// The attempt.
    pub epoch: Epoch,
    /// When, in µs since the Unix epoch by the coordinator's clock.
    pub time_us: u64,
    /// Why.
    pub kind: CheckpointKind,
    /// Its name, or empty.
    pub tag: String,
    /// Every member and its cut.
    pub members: Vec<HeldMember>,
}

/// How a group's checkpoints go, as this VRA sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpanningStatus {
    /// Who takes the checkpoints by the clock: the first live VRA in the definition's order.
    pub coordinator: Option<VraId>,
    /// VRAs that don't answer: without them there are no checkpoints (D3).
    pub missing: Vec<VraId>,
    /// Time between attempts by the clock, in µs: longer than the definition's while they come to nothing and only hold guests up.
    pub interval_us: u64,
    /// The newest one that this VRA coordinated.
    pub last: Option<TakenByHosts>,
    /// Attempts that gave a checkpoint, of those that this VRA coordinated.
    pub taken_epochs: u64,
    /// Those that gave none.
    pub aborted_epochs: u64,
    /// How many of them are in a row now.
    pub aborted_in_row: u64,
    /// Why the newest of them did.
    pub last_failure: Option<EpochFailure>,
    /// How long the completions of guests on this host were held.
    pub hold: HoldTimes,
}

/// A source VRA's end of the checkpoints of all groups that span hosts.
pub struct SpanningGroups {
    common: Common,
    groups: BTreeMap<VpgId, State>,
    next_ask: u64,
}

struct State {
    group: SpanningGroup,
    participant: Participant,
    coordinator: Coordinator,
}

/// What the groups share.
pub(super) struct Common {
    pub(super) own: VraId,
    incarnation: Uuid,
    counter: u64,
    next_hold: u64,
    /// Of what is being done.
    pub(super) now_mono_us: u64,
    pub(super) liveness: Liveness,
    pub(super) trips: RoundTrips,
    outputs: VecDeque<SpanningOutput>,
}

impl Common {
    /// A new attempt's epoch (D1).
    pub(super) fn next_epoch(&mut self) -> Epoch {
        self.counter += 1;
        let nonce = if is_planted(Planted::EpochWithoutNonce) { Uuid::nil() } else { self.incarnation };
        Epoch { nonce, counter: self.counter }
    }

    pub(super) fn next_hold(&mut self) -> u64 {
        self.next_hold = self.next_hold.wrapping_add(1);
        self.next_hold
    }

    pub(super) fn send(&mut self, to: VraId, message: GroupMessage) {
        self.liveness.said(to, self.now_mono_us);
        self.outputs.push_back(SpanningOutput::Send { to, message });
    }

    pub(super) fn output(&mut self, output: SpanningOutput) {
        self.outputs.push_back(output);
    }

    /// The first of the group's hosts that is live.
    pub(super) fn coordinator_of(&self, group: &SpanningGroup, now: Now) -> Option<VraId> {
        let mut hosts = group.hosts.iter().map(|host| host.vra);
        hosts.find(|vra| *vra == self.own || self.liveness.is_live(*vra, now.mono_us))
    }

    /// The group's hosts that are not live.
    pub(super) fn missing_of<'a>(
        &'a self,
        group: &'a SpanningGroup,
        now: Now,
    ) -> impl Iterator<Item = VraId> + Clone + use<'a> {
        let hosts = group.hosts.iter().map(|host| host.vra);
        hosts.filter(move |vra| *vra != self.own && !self.liveness.is_live(*vra, now.mono_us))
    }
}

impl SpanningGroups {
    /// One without groups. `incarnation` is random, new for each start (D1).
    pub fn new(own: VraId, incarnation: Uuid) -> Self {
        let common = Common {
            own,
            incarnation,
            counter: 0,
            // Names of holds of another run mean nothing here.
            next_hold: incarnation.as_u64_pair().1,
            now_mono_us: 0,
            liveness: Liveness::default(),
            trips: RoundTrips::default(),
            outputs: VecDeque::new(),
        };
        Self { common, groups: BTreeMap::new(), next_ask: 0 }
    }

    /// Adds a group or changes it. Its next checkpoint comes one interval from now at the latest, unless its attempts back off.
    pub fn set_group(&mut self, group: SpanningGroup, now: Now) {
        self.common.now_mono_us = now.mono_us;
        match self.groups.get_mut(&group.vpg) {
            Some(state) => {
                if !is_same_hold(&state.group, &group) {
                    state.coordinator.end(&mut state.participant, &mut self.common, now);
                    state.participant.end(now);
                }
                state.coordinator.set_interval(group.interval_us, now);
                state.group = group;
            }
            None => {
                let coordinator = Coordinator::new(group.vpg, group.interval_us, now);
                self.groups
                    .insert(group.vpg, State { group, participant: Participant::default(), coordinator });
            }
        }
        self.follow_peers(now);
    }

    /// Takes no more part in a group.
    pub fn remove_group(&mut self, vpg: VpgId, now: Now) {
        self.common.now_mono_us = now.mono_us;
        if let Some(mut state) = self.groups.remove(&vpg) {
            state.coordinator.end(&mut state.participant, &mut self.common, now);
            state.participant.end(now);
        }
        self.follow_peers(now);
    }

    /// The groups that there are.
    pub fn groups(&self) -> impl Iterator<Item = VpgId> {
        self.groups.keys().copied()
    }

    /// The VRAs that have a part in one of the groups, without this one.
    pub fn peers(&self) -> impl Iterator<Item = VraId> {
        self.common.liveness.peers()
    }

    /// Asks for a checkpoint as soon as can be; [`SpanningOutput::Ended`] says what came of it. Any VRA of the group may be asked: if
    /// another one's attempt is in the way, this one is made again until `until_mono_us`.
    pub fn ask(&mut self, vpg: VpgId, kind: CheckpointKind, tag: &str, until_mono_us: u64) -> AskId {
        self.next_ask += 1;
        let ask = AskId(self.next_ask);
        let failure = match self.groups.get_mut(&vpg) {
            Some(state) => state.coordinator.ask(ask, kind, tag, until_mono_us).err(),
            None => Some(EpochFailure::Changed),
        };
        if let Some(failure) = failure {
            self.common.output(SpanningOutput::Ended { vpg, asked: Some(ask), result: Err(failure) });
        }
        ask
    }

    /// Takes a message of another VRA, whose certificate says that it is `from`. One that is no peer isn't heard.
    pub fn receive(&mut self, from: VraId, message: GroupMessage, now: Now, holder: &mut dyn Holder) {
        self.common.now_mono_us = now.mono_us;
        if !self.common.liveness.heard(from, now.mono_us) {
            return;
        }
        match message {
            GroupMessage::Alive => {}
            GroupMessage::Hold(hold) => self.hold(from, &hold, now, holder),
            GroupMessage::Release(release) => self.release(from, &release, now),
            GroupMessage::Abort(at) => {
                if let Some(state) = self.state(from, at) {
                    state.participant.abort(from, at, now);
                }
            }
            GroupMessage::Held(held) => {
                if let Some((state, common)) = self.state_and_common(from, held.at) {
                    let State { group, participant, coordinator } = state;
                    coordinator.held(from, &held, (group, participant, common), now, holder);
                }
            }
            GroupMessage::Decline(decline) => {
                if let Some((state, common)) = self.state_and_common(from, decline.at) {
                    state.coordinator.declined(from, &decline, &mut state.participant, common, now);
                }
            }
            GroupMessage::Recorded(recorded) => {
                if let Some((state, common)) = self.state_and_common(from, recorded.at) {
                    state.coordinator.recorded(from, &recorded, &mut state.participant, common, now);
                }
            }
        }
    }

    /// Does what has become due.
    pub fn tick(&mut self, now: Now, holder: &mut dyn Holder) {
        self.common.now_mono_us = now.mono_us;
        for State { group, participant, coordinator } in self.groups.values_mut() {
            coordinator.tick((group, participant, &mut self.common), now, holder);
        }
        for peer in self.common.liveness.due(now.mono_us) {
            self.common.send(peer, GroupMessage::Alive);
        }
    }

    /// When the next [`tick`](Self::tick) is due, in µs by the monotonic clock; none as long as there is no group.
    pub fn next_wake_us(&self, now: Now) -> Option<u64> {
        let of_groups = self.groups.values().filter_map(|state| {
            let coordinates = self.common.coordinator_of(&state.group, now) == Some(self.common.own);
            state.coordinator.next_wake_us(coordinates)
        });
        of_groups.chain(self.common.liveness.next_wake_us()).min()
    }

    /// The next thing to do.
    pub fn poll_output(&mut self) -> Option<SpanningOutput> {
        self.common.outputs.pop_front()
    }

    /// How a group's checkpoints go; none for an unknown group.
    pub fn status(&self, vpg: VpgId, now: Now) -> Option<SpanningStatus> {
        let state = self.groups.get(&vpg)?;
        Some(SpanningStatus {
            coordinator: self.common.coordinator_of(&state.group, now),
            missing: self.common.missing_of(&state.group, now).collect(),
            hold: state.participant.holds().times(),
            ..state.coordinator.status()
        })
    }

    fn hold(&mut self, from: VraId, hold: &Hold, now: Now, holder: &mut dyn Holder) {
        let name = self.common.next_hold();
        let answer = match self.state(from, hold.at) {
            Some(State { group, participant, .. }) => participant.hold(group, from, hold, name, now, holder),
            None => Err((DeclineCode::UnknownGroup, None)),
        };
        let answer = match answer {
            Ok(held) => GroupMessage::Held(held),
            Err((code, vm)) => GroupMessage::Decline(Decline { at: hold.at, code, vm }),
        };
        self.common.send(from, answer);
    }

    fn release(&mut self, from: VraId, release: &Release, now: Now) {
        let Some(state) = self.state(from, release.at) else { return };
        let ended = state.participant.release(from, release, now);
        if ended.taken.is_ok() {
            let interval_us = state.group.interval_us;
            // Whoever coordinates next goes on in the same rhythm.
            state.coordinator.be_due_at(now.mono_us + interval_us);
        }
        let recorded = Recorded {
            at: release.at,
            held_us: u32::try_from(ended.held_us).unwrap_or(u32::MAX),
            refused: ended.taken.err(),
        };
        self.common.send(from, GroupMessage::Recorded(recorded));
    }

    fn state(&mut self, from: VraId, at: GroupEpoch) -> Option<&mut State> {
        self.groups.get_mut(&at.vpg).filter(|state| state.group.has_host(from))
    }

    fn state_and_common(&mut self, from: VraId, at: GroupEpoch) -> Option<(&mut State, &mut Common)> {
        let state = self.groups.get_mut(&at.vpg).filter(|state| state.group.has_host(from))?;
        Some((state, &mut self.common))
    }

    fn follow_peers(&mut self, now: Now) {
        let own = self.common.own;
        let hosts = self.groups.values().flat_map(|state| state.group.hosts.iter().map(|host| host.vra));
        let peers: BTreeSet<VraId> = hosts.filter(|vra| *vra != own).collect();
        self.common.trips.retain(|vra| peers.contains(&vra));
        self.common.liveness.set_peers(peers.into_iter(), now.mono_us);
    }
}

/// Whether a changed definition lets a hold, and an attempt, go on.
fn is_same_hold(one: &SpanningGroup, other: &SpanningGroup) -> bool {
    let cores = |group: &SpanningGroup| {
        let members = group.members.as_deref();
        members.map(|members| {
            members.iter().map(|member| std::sync::Arc::as_ptr(&member.core).addr()).collect::<Vec<_>>()
        })
    };
    one.member_set_version == other.member_set_version
        && one.hosts == other.hosts
        && cores(one) == cores(other)
}
