//! A VM of the group: the product's numbering core, a guest with a disk, and a journal that has what was sent.

use std::collections::BTreeMap;
use std::sync::Arc;

use journal::batch::{Checkpoint, RecordKind};
use ublk::serve::Wake;
use vra::api::VmId;
use vra::capture::modes::OverflowReason;
use vra::capture::numbering::{
    ByteRange, Consumer, CoreLimits, NewWrite, Offer, Received, Ticket, VmCore, Wakeups, ring,
};
use vra::checkpoint::{Freeze, Member};
use vra::receive::{CheckpointList, ListedCheckpoint};

use super::super::env::Env;
use super::reached::{Reached, ReachedCount};

/// Entries that are retained at most.
const RING_ENTRIES: usize = 1 << 13;
/// Numbers are reserved in blocks of so many.
const NUMBERS: u64 = 1 << 20;
const DISK_BYTES: u64 = 1 << 30;
/// A write lands within so many µs.
const LANDS_US: u64 = 400;

struct NoBell;

impl Wake for NoBell {
    fn wake(&self) {}
}

pub(super) struct GroupVm {
    pub(super) vm: VmId,
    capture: Option<Capture>,
    waiting: Vec<Waiting>,
    /// The number of each link that was written here; one that was asked again keeps its first.
    link_seqs: BTreeMap<u64, u64>,
    /// Links that were written while nothing was captured: the next sync takes them.
    uncaptured: Vec<u64>,
    first_seq: u64,
    written: u64,
    journal: CheckpointList,
}

/// What a VRA's process has of a VM.
struct Capture {
    core: Arc<VmCore>,
    consumer: Consumer,
    lane: u32,
    shipped_seq: u64,
    sync: Option<(u64, u64)>,
    /// It has overflowed: when a new generation begins.
    renewed_us: Option<u64>,
}

/// A write that the guest waits for.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    /// 0 for one that isn't of the chain.
    link: u64,
    ticket: Option<Ticket>,
    lands_us: u64,
    landed_us: Option<u64>,
}

impl GroupVm {
    pub(super) fn new(vm: VmId) -> Self {
        Self {
            vm,
            capture: None,
            waiting: Vec::new(),
            link_seqs: BTreeMap::new(),
            uncaptured: Vec::new(),
            first_seq: 1,
            written: 0,
            journal: CheckpointList::default(),
        }
    }

    /// Its VRA has started: a new generation with a full sync. What the guest waits for is asked again.
    pub(super) fn start(&mut self, sync_us: u64, env: &mut Env) -> Result<(), String> {
        let (producer, consumer) = ring(RING_ENTRIES, self.first_seq);
        let limits = CoreLimits { writes_in_flight: 64, retained_bytes: 1 << 30 };
        let core = Arc::new(VmCore::new(producer, limits, self.first_seq, self.first_seq + NUMBERS));
        self.first_seq += NUMBERS;
        let shipped_seq = core.with(|core, _| {
            core.add_volume();
            core.start_streaming()
        });
        let shipped_seq = shipped_seq.map_err(|refusal| refusal.to_string())? - 1;
        let lane = core.add_lane(Arc::new(NoBell));
        let sync = if sync_us > 0 {
            let now_us = env.now().mono_us;
            let id = 1 + env.rng.below(u64::MAX - 1);
            let begun = core.with(|core, wakeups| core.begin_sync(id, &[(0, DISK_BYTES)], now_us, wakeups));
            begun.map_err(|refusal| refusal.to_string())?;
            Some((id, now_us + sync_us))
        } else {
            None
        };
        let seq = core.with(|core, _| core.numbers().0);
        for link in self.uncaptured.drain(..) {
            self.link_seqs.entry(link).or_insert(seq);
        }
        self.capture = Some(Capture { core, consumer, lane, shipped_seq, sync, renewed_us: None });
        for write in std::mem::take(&mut self.waiting) {
            self.write(write.link, env)?;
        }
        Ok(())
    }

    /// Its VRA has died, with what it hadn't sent.
    pub(super) fn stop(&mut self, reached: &mut ReachedCount) {
        let Some(mut capture) = self.capture.take() else { return };
        capture.consumer.walk(capture.shipped_seq + 1, |entry| {
            if entry.kind == RecordKind::Checkpoint {
                reached.note(Reached::RecordLost);
            }
            true
        });
    }

    /// As a member of its group; none while its VRA is down.
    pub(super) fn member(&self) -> Option<Member> {
        let member = |core| Member { vm: self.vm, core, freeze: Freeze::default() };
        self.capture.as_ref().map(|capture| member(Arc::clone(&capture.core)))
    }

    pub(super) fn is_holding(&self) -> bool {
        self.capture.as_ref().is_some_and(|capture| capture.core.is_holding())
    }

    /// The guest writes; 0 is a write that isn't of the chain.
    pub(super) fn write(&mut self, link: u64, env: &mut Env) -> Result<(), String> {
        let now_us = env.now().mono_us;
        let Some(capture) = &self.capture else {
            self.waiting.push(Waiting { link, ticket: None, lands_us: 0, landed_us: None });
            return Ok(());
        };
        self.written += 1;
        let range = ByteRange::new(self.written % (DISK_BYTES / 512) * 512, 512);
        let new = NewWrite { lane: capture.lane, token: 0, volume: 0, range };
        let seq = capture.core.with(|core, _| core.numbers().0);
        let received = capture.core.receive(&new, &mut Offer::Zeroes, now_us, &mut Wakeups::default());
        let Received::Issue(ticket) = received else { return Err(format!("a write was {received:?}")) };
        let is_captured = capture.core.with(|core, _| core.numbers().0) > seq;
        if link > 0 && is_captured {
            self.link_seqs.entry(link).or_insert(seq);
        } else if link > 0 {
            self.uncaptured.push(link);
        }
        let lands_us = now_us + env.rng.below(LANDS_US);
        self.waiting.push(Waiting { link, ticket: Some(ticket), lands_us, landed_us: None });
        Ok(())
    }

    pub(super) fn waiting_count(&self) -> usize {
        self.waiting.len()
    }

    /// Writes land and complete; gives the links that the guest was told of.
    ///
    /// # Errors
    /// A completion was held longer than the group allows.
    pub(super) fn complete(
        &mut self,
        longest_us: u64,
        env: &Env,
        reached: &mut ReachedCount,
    ) -> Result<Vec<u64>, String> {
        let Some(capture) = &self.capture else { return Ok(Vec::new()) };
        let now_us = env.now().mono_us;
        let mut told = Vec::new();
        let mut too_long = None;
        self.waiting.retain_mut(|write| {
            let Some(ticket) = write.ticket else { return true };
            let may_complete = match write.landed_us {
                None if write.lands_us <= now_us => {
                    write.landed_us = Some(now_us);
                    let held = capture.core.landed(ticket, true, &mut Wakeups::default()).held;
                    if held {
                        reached.note(Reached::WriteHeld);
                    }
                    !held
                }
                None => false,
                Some(landed_us) => {
                    if now_us > landed_us + longest_us {
                        too_long = Some(now_us - landed_us);
                    }
                    capture.core.complete_held(ticket, &mut Wakeups::default())
                }
            };
            if may_complete && write.link > 0 {
                told.push(write.link);
            }
            !may_complete
        });
        match too_long {
            Some(us) => Err(format!("a write of VM {} is held for {us} µs, not {longest_us}", self.vm)),
            None => Ok(told),
        }
    }

    /// The sync goes on, and a capture that has overflowed is renewed: then its VRA is to be told of the new core.
    pub(super) fn go_on(&mut self, env: &mut Env) -> Result<bool, String> {
        let now_us = env.now().mono_us;
        let Some(capture) = &mut self.capture else { return Ok(false) };
        if let Some((id, _)) = capture.sync.take_if(|(_, ends_us)| *ends_us <= now_us) {
            let core = &capture.core;
            // It has ended with the capture, if that has overflowed.
            let _ = core.with(|core, wakeups| core.end_sync(id, &[(0, DISK_BYTES)], now_us, wakeups));
        }
        if capture.renewed_us.is_some_and(|at_us| at_us <= now_us) && self.waiting.is_empty() {
            self.ship(env)?;
            self.start(20_000, env)?;
            return Ok(true);
        }
        Ok(false)
    }

    /// Capture stops. Says whether it was on.
    pub(super) fn overflow(&mut self, env: &mut Env) -> bool {
        let Some(capture) = self.capture.as_mut().filter(|capture| capture.renewed_us.is_none()) else {
            return false;
        };
        capture.renewed_us = Some(env.now().mono_us + env.rng.below(100_000));
        capture.core.with(|core, wakeups| core.overflow(OverflowReason::Requested, wakeups));
        true
    }

    /// Sends what was published.
    pub(super) fn ship(&mut self, env: &Env) -> Result<(), String> {
        let Some(capture) = &mut self.capture else { return Ok(()) };
        let (mut shipped_seq, mut bad) = (capture.shipped_seq, None);
        let journal = &mut self.journal;
        capture.consumer.walk(shipped_seq + 1, |entry| {
            if entry.kind == RecordKind::Checkpoint {
                match Checkpoint::decode(&entry.payload.to_bytes()) {
                    Ok(checkpoint) => {
                        env.note(|| format!("VM {}: {checkpoint:?} is in the journal", self.vm));
                        journal.push(ListedCheckpoint::of(&checkpoint));
                    }
                    Err(error) => bad = Some(error.to_string()),
                }
            }
            shipped_seq = entry.seq;
            true
        });
        capture.shipped_seq = shipped_seq;
        capture.consumer.free_through(shipped_seq);
        bad.map_or(Ok(()), Err)
    }

    /// Its checkpoints, as its target lists them.
    pub(super) fn journal(&self) -> &CheckpointList {
        &self.journal
    }

    /// Whether a view at `cut` shows a link of this VM.
    pub(super) fn shows(&self, link: u64, cut: u64) -> bool {
        self.link_seqs.get(&link).is_some_and(|seq| *seq <= cut)
    }
}
