//! Takes the checkpoints of the groups whose members are all on this host: by the clock, and when asked.
//!
//! Two small threads: one takes checkpoints, the other lets holds expire, so that a guest never waits longer than the
//! deadline even if the first is stuck.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use journal::batch::{Checkpoint, CheckpointKind, Epoch};
use uuid::Uuid;

use super::held_epoch::HeldEpoch;
use super::hold_log::HoldLog;
use super::local_hold::{CheckpointRefusal, LocalHold, Member, TakenCheckpoint};
use crate::api::VpgId;
use crate::api::status::HoldTimes;
use crate::clock::Clock;

/// Longest time that a hold may last, in µs, unless a group says otherwise.
pub const HOLD_DEADLINE_US: u64 = 100_000;

/// A group as the checkpointer needs it.
#[derive(Clone)]
pub struct GroupSettings {
    /// Its members, all on this host.
    pub members: Vec<Member>,
    /// Time between checkpoints, in µs.
    pub interval_us: u64,
    /// Longest time of a hold, in µs.
    pub deadline_us: u64,
    /// Version of the set of members.
    pub member_set_version: u64,
}

/// What became of a group's checkpoints.
#[derive(Clone, Debug, Default)]
pub struct GroupStatus {
    /// The newest one.
    pub last: Option<TakenCheckpoint>,
    /// Epochs that ended without one.
    pub aborted_epochs: u64,
    /// Why the newest of them did.
    pub last_refusal: Option<CheckpointRefusal>,
    /// How long the guests' completions were held.
    pub hold: HoldTimes,
}

/// The host's checkpointer. Dropping it ends its threads.
pub struct Checkpointer {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Checkpointer {
    /// Starts its threads. `incarnation` is random, new for each start (D1).
    ///
    /// # Errors
    /// No thread could be started.
    pub fn start(incarnation: Uuid) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            clock: Clock::start(),
            incarnation,
            groups: Mutex::new(Groups { counter: 0, stop: false, by_vpg: HashMap::new() }),
            groups_changed: Condvar::new(),
            holds: Mutex::new(Holds { stop: false, watched: Vec::new() }),
            holds_changed: Condvar::new(),
        });
        let mut checkpointer = Self { shared: shared.clone(), threads: Vec::new() };
        let of_thread = shared.clone();
        let taking = std::thread::Builder::new().name("checkpoints".into());
        checkpointer.threads.push(taking.spawn(move || of_thread.take_by_the_clock())?);
        let expiring = std::thread::Builder::new().name("hold-deadlines".into());
        checkpointer.threads.push(expiring.spawn(move || shared.let_holds_expire())?);
        Ok(checkpointer)
    }

    /// Adds a group or changes it. Its next checkpoint comes one interval from now.
    pub fn set_group(&self, vpg: VpgId, settings: GroupSettings) {
        let due_mono_us = self.shared.clock.now().mono_us + settings.interval_us;
        let mut groups = self.shared.groups();
        let former = groups.by_vpg.remove(&vpg).map(|group| (group.status, group.holds));
        let (status, holds) = former.unwrap_or_default();
        groups.by_vpg.insert(vpg, Group { settings, due_mono_us, status, holds });
        self.shared.groups_changed.notify_all();
    }

    /// Takes no more checkpoints of a group.
    pub fn remove_group(&self, vpg: VpgId) {
        self.shared.groups().by_vpg.remove(&vpg);
    }

    /// Takes a checkpoint now.
    ///
    /// # Errors
    /// A member can't take part, or the group is unknown.
    pub fn take(
        &self,
        vpg: VpgId,
        kind: CheckpointKind,
        tag: &str,
    ) -> Result<TakenCheckpoint, CheckpointRefusal> {
        self.shared.take(&mut self.shared.groups(), vpg, kind, tag)
    }

    /// Holds members on the word of a coordinator elsewhere, which then says [`LocalHold::release`] or [`LocalHold::abort`]. The
    /// hold expires by itself after `deadline_us`.
    ///
    /// # Errors
    /// A member can't take part: then none is held.
    pub fn hold(&self, members: &[Member], deadline_us: u64) -> Result<LocalHold, CheckpointRefusal> {
        self.shared.hold(members, deadline_us)
    }

    /// The clock of the holds' deadlines.
    pub fn clock(&self) -> Clock {
        self.shared.clock
    }

    /// What became of a group's checkpoints; none for an unknown group.
    pub fn status(&self, vpg: VpgId) -> Option<GroupStatus> {
        let groups = self.shared.groups();
        let group = groups.by_vpg.get(&vpg)?;
        Some(GroupStatus { hold: group.holds.times(), ..group.status.clone() })
    }
}

impl Drop for Checkpointer {
    fn drop(&mut self) {
        self.shared.groups().stop = true;
        self.shared.groups_changed.notify_all();
        self.shared.holds().stop = true;
        self.shared.holds_changed.notify_all();
        for thread in self.threads.drain(..) {
            // A panic of the thread was reported by its hook; there is nothing left to do for it.
            let _ = thread.join();
        }
    }
}

/// Shared by both threads and the callers. Lock order: groups, then holds.
struct Shared {
    clock: Clock,
    incarnation: Uuid,
    groups: Mutex<Groups>,
    groups_changed: Condvar,
    holds: Mutex<Holds>,
    holds_changed: Condvar,
}

struct Groups {
    /// The last epoch's count.
    counter: u64,
    stop: bool,
    by_vpg: HashMap<VpgId, Group>,
}

struct Group {
    settings: GroupSettings,
    due_mono_us: u64,
    status: GroupStatus,
    holds: HoldLog,
}

struct Holds {
    stop: bool,
    watched: Vec<Arc<HeldEpoch>>,
}

impl Shared {
    fn hold(&self, members: &[Member], deadline_us: u64) -> Result<LocalHold, CheckpointRefusal> {
        let mut watch = |held: &Arc<HeldEpoch>| {
            self.holds().watched.push(held.clone());
            self.holds_changed.notify_one();
        };
        LocalHold::begin(members, self.clock.now(), deadline_us, &mut watch)
    }

    fn take(
        &self,
        groups: &mut Groups,
        vpg: VpgId,
        kind: CheckpointKind,
        tag: &str,
    ) -> Result<TakenCheckpoint, CheckpointRefusal> {
        groups.counter += 1;
        let epoch = Epoch { nonce: self.incarnation, counter: groups.counter };
        let group = groups.by_vpg.get_mut(&vpg).ok_or(CheckpointRefusal::NoMembers)?;
        let settings = &group.settings;
        let taken = self.hold(&settings.members, settings.deadline_us).and_then(|hold| {
            let now = self.clock.now();
            let checkpoint = Checkpoint {
                epoch,
                cut: 0,
                member_set_version: settings.member_set_version,
                time_us: now.wall_us,
                kind,
                tag: tag.to_owned(),
            };
            hold.release(&checkpoint, now)
        });
        match &taken {
            Ok(taken) => {
                group.holds.note(taken.held_us);
                group.status.last = Some(taken.clone());
            }
            Err(refusal) => {
                group.status.aborted_epochs += 1;
                group.status.last_refusal = Some(refusal.clone());
            }
        }
        taken
    }

    fn take_by_the_clock(&self) {
        let mut groups = self.groups();
        while !groups.stop {
            let now_us = self.clock.now().mono_us;
            let due: Vec<VpgId> = groups
                .by_vpg
                .iter()
                .filter(|(_, group)| group.due_mono_us <= now_us)
                .map(|(vpg, _)| *vpg)
                .collect();
            for vpg in due {
                // A refusal stays in the group's status, where its owner reports it.
                let _ = self.take(&mut groups, vpg, CheckpointKind::Automatic, "");
                if let Some(group) = groups.by_vpg.get_mut(&vpg) {
                    group.due_mono_us = now_us + group.settings.interval_us;
                }
            }
            let next_us = groups.by_vpg.values().map(|group| group.due_mono_us).min();
            groups = wait(&self.groups_changed, groups, next_us, &self.clock);
        }
    }

    fn let_holds_expire(&self) {
        let mut holds = self.holds();
        while !holds.stop {
            let now = self.clock.now();
            holds.watched.retain(|held| {
                held.expire_if_due(now);
                !held.is_over()
            });
            let next_us = holds.watched.iter().map(|held| held.deadline_mono_us()).min();
            holds = wait(&self.holds_changed, holds, next_us, &self.clock);
        }
    }

    fn groups(&self) -> MutexGuard<'_, Groups> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn holds(&self) -> MutexGuard<'_, Holds> {
        self.holds.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits for a change, and until a monotonic time at the latest.
fn wait<'a, T>(
    changed: &Condvar,
    guard: MutexGuard<'a, T>,
    until_us: Option<u64>,
    clock: &Clock,
) -> MutexGuard<'a, T> {
    match until_us {
        Some(until_us) => {
            let wait_us = until_us.saturating_sub(clock.now().mono_us);
            let waited = changed.wait_timeout(guard, Duration::from_micros(wait_us));
            waited.unwrap_or_else(PoisonError::into_inner).0
        }
        None => changed.wait(guard).unwrap_or_else(PoisonError::into_inner),
    }
}
