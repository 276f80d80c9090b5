//! Holding completions for a checkpoint (D2).

use bytes::Bytes;
use journal::batch::RecordKind;

use crate::capture::entry::{Entry, Payload};
use crate::capture::modes::{HoldRefusal, PublishRefusal};
use crate::planted::{Planted, is_planted};

use super::in_flight::{ByteRange, Ticket};
use super::machine::Core;
use super::primitives::Ordering;
use super::terms::Wakeups;

impl Core {
    /// Whether a landed write that was held may complete now; then it leaves the set.
    pub fn complete_held(&mut self, ticket: Ticket, wakeups: &mut Wakeups) -> bool {
        let write = self.in_flight.get(ticket);
        if self.hold.as_ref().is_some_and(|hold| write.last_seq > hold.cut) {
            self.remember_held(write.lane);
            return false;
        }
        self.leave(ticket, wakeups);
        true
    }

    /// Whether a finished read must be held (D2): it may have seen a write above the cut that the guest doesn't know to be
    /// completed.
    pub fn read_is_held(&mut self, lane: u32, volume: u16, range: ByteRange) -> bool {
        let Some(hold) = &self.hold else { return false };
        let held = self.in_flight.has_above(volume, range, hold.cut) && !is_planted(Planted::ReadsNotHeld);
        if held {
            self.remember_held(lane);
        }
        held
    }

    /// Whether a hold could begin now.
    pub fn check_hold(&self) -> Result<(), HoldRefusal> {
        if !self.is_streaming() {
            return Err(HoldRefusal::NotStreaming);
        }
        if self.sync_id.is_some() {
            return Err(HoldRefusal::InSync);
        }
        if self.hold.is_some() {
            return Err(HoldRefusal::AlreadyHolding);
        }
        Ok(())
    }

    /// From now on writes above the returned cut don't complete to the guest (D2).
    pub fn hold(&mut self, epoch: u64) -> Result<u64, HoldRefusal> {
        self.check_hold()?;
        if !is_planted(Planted::FlagAfterCut) {
            self.flags.holding.store(true, Ordering::SeqCst);
        }
        let mut cut = self.numbers().0 - 1;
        if is_planted(Planted::WriteBetweenCutAndFlag) {
            cut = cut.saturating_sub(1);
        }
        self.hold = Some(Hold { epoch, cut });
        Ok(cut)
    }

    /// Publishes the checkpoint record of a hold that still stands. Its caller has won the epoch's state word.
    pub fn commit(
        &mut self,
        epoch: u64,
        body: Bytes,
        now_us: u64,
        wakeups: &mut Wakeups,
    ) -> Result<u64, PublishRefusal> {
        let is_held = self.hold.as_ref().is_some_and(|hold| hold.epoch == epoch)
            || is_planted(Planted::RecordAfterExpiry);
        if !is_held || !self.is_streaming() {
            return Err(PublishRefusal::NotStreaming);
        }
        let entry = Entry { payload: Payload::Body(body), ..Entry::control(RecordKind::Checkpoint) };
        self.publish_own(std::iter::once(entry), 0, now_us, wakeups)
    }

    /// Ends the hold of `epoch` if it is still on: held completions may go.
    pub fn release(&mut self, epoch: u64, wakeups: &mut Wakeups) {
        if self.hold.as_ref().is_some_and(|hold| hold.epoch == epoch) {
            self.end_hold(wakeups);
        }
    }

    pub(super) fn end_hold(&mut self, wakeups: &mut Wakeups) {
        self.hold = None;
        self.flags.holding.store(false, Ordering::SeqCst);
        for lane in self.lanes.iter_mut().flatten().filter(|lane| lane.holds) {
            lane.holds = false;
            lane.recheck_held = true;
            wakeups.add(&lane.waker);
        }
    }
}

/// A hold that is on.
pub(super) struct Hold {
    /// Which checkpoint it is for.
    epoch: u64,
    /// Writes above it don't complete.
    pub(super) cut: u64,
}
