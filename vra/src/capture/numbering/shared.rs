//! The core under the VM's one lock.
//!
//! Lock order: a thread holds at most one core's lock, and takes no other lock, makes no system call, allocates nothing on
//! a guest's path and touches no payload while it holds it. Wakers run after it is gone. A read's completion looks only
//! at [`VmCore::is_holding`]: a write that the read can have seen took its number under the lock before its local issue,
//! so a hold that began before that number was taken is visible to the read, and a later one has the number below its cut.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use ublk::serve::Waker;

use crate::capture::modes::{HoldRefusal, PublishRefusal};
use crate::planted::{Planted, is_planted};

use super::in_flight::{ByteRange, Ticket};
use super::machine::Core;
use super::primitives::{AtomicBool, Mutex, MutexGuard, Ordering};
use super::ring::Producer;
use super::terms::{CoreLimits, Drained, Flags, Landed, NewWrite, Offer, Received, Wakeups};

/// One VM's core, shared by its lanes, its stream, its syncs and its checkpoints.
pub struct VmCore {
    core: Mutex<Core>,
    flags: Arc<Flags>,
    doorbell: OnceLock<Waker>,
}

impl VmCore {
    /// See [`Core::new`].
    pub fn new(producer: Producer, limits: CoreLimits, first_seq: u64, ceiling_seq: u64) -> Self {
        let flags = Arc::new(Flags { holding: AtomicBool::new(false), capturing: AtomicBool::new(false) });
        let core = Core::new(producer, flags.clone(), limits, first_seq, ceiling_seq);
        Self { core: Mutex::new(core), flags, doorbell: OnceLock::new() }
    }

    /// Names who is told, after the lock is gone, that something was published or that the mode changed. It must cost little
    /// while the stream is awake. Only the first call counts.
    pub fn set_doorbell(&self, doorbell: Waker) {
        let _ = self.doorbell.set(doorbell);
    }

    /// Runs one critical section, then gives the wake-ups it asked for. For everything but a guest's I/O.
    pub fn with<T>(&self, section: impl FnOnce(&mut Core, &mut Wakeups) -> T) -> T {
        let mut wakeups = Wakeups::default();
        let value = section(&mut self.lock(), &mut wakeups);
        self.fire(&mut wakeups);
        value
    }

    /// Whether writes are captured now: a hint for lanes, so that they prepare payloads only then.
    pub fn is_capturing(&self) -> bool {
        self.flags.capturing.load(Ordering::Acquire)
    }

    /// Whether a hold is on: then a finished read asks [`read_is_held`](Self::read_is_held).
    pub fn is_holding(&self) -> bool {
        self.flags.holding.load(Ordering::SeqCst)
    }

    /// See [`Core::receive`].
    pub fn receive(&self, new: &NewWrite, offer: &mut Offer, now_us: u64, wakeups: &mut Wakeups) -> Received {
        let received = if is_planted(Planted::NumberOutsideLock) {
            self.receive_in_two_sections(new, offer, now_us, wakeups)
        } else {
            self.lock().receive(new, offer, now_us, wakeups)
        };
        self.fire(wakeups);
        received
    }

    /// See [`Core::landed`].
    pub fn landed(&self, ticket: Ticket, ok: bool, wakeups: &mut Wakeups) -> Landed {
        let landed = self.lock().landed(ticket, ok, wakeups);
        self.fire(wakeups);
        landed
    }

    /// See [`Core::complete_held`].
    pub fn complete_held(&self, ticket: Ticket, wakeups: &mut Wakeups) -> bool {
        let may_complete = self.lock().complete_held(ticket, wakeups);
        self.fire(wakeups);
        may_complete
    }

    /// Whether a finished read must be held (D2). Takes the lock only while a hold is on.
    pub fn read_is_held(&self, lane: u32, volume: u16, range: ByteRange) -> bool {
        self.is_holding() && self.lock().read_is_held(lane, volume, range)
    }

    /// See [`Core::drain`].
    pub fn drain(&self, lane: u32, drained: &mut Drained) {
        self.lock().drain(lane, drained);
    }

    /// See [`Core::add_lane`].
    pub fn add_lane(&self, waker: Waker) -> u32 {
        self.lock().add_lane(waker)
    }

    /// See [`Core::check_hold`].
    pub fn check_hold(&self) -> Result<(), HoldRefusal> {
        self.lock().check_hold()
    }

    /// See [`Core::hold`].
    pub fn hold(&self, epoch: u64) -> Result<u64, HoldRefusal> {
        let cut = self.lock().hold(epoch)?;
        if is_planted(Planted::FlagAfterCut) {
            self.flags.holding.store(true, Ordering::SeqCst);
        }
        Ok(cut)
    }

    /// See [`Core::commit`].
    pub fn commit(&self, epoch: u64, body: Bytes, now_us: u64) -> Result<u64, PublishRefusal> {
        self.with(|core, wakeups| core.commit(epoch, body, now_us, wakeups))
    }

    /// See [`Core::release`].
    pub fn release(&self, epoch: u64) {
        self.with(|core, wakeups| core.release(epoch, wakeups));
    }

    /// The planted bug: another thread's write may come between number and insertion.
    fn receive_in_two_sections(
        &self,
        new: &NewWrite,
        offer: &mut Offer,
        now_us: u64,
        wakeups: &mut Wakeups,
    ) -> Received {
        let first_seq = {
            let mut core = self.lock();
            if let Some(refused) = core.admit(new, offer, wakeups) {
                return refused;
            }
            core.take_number(new, offer)
        };
        self.lock().enter(new, first_seq, offer, now_us, wakeups)
    }

    fn fire(&self, wakeups: &mut Wakeups) {
        wakeups.fire(self.doorbell.get());
    }

    fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(|poisoned| {
            let mut core = poisoned.into_inner();
            let mut wakeups = Wakeups::default();
            core.repair(&mut wakeups);
            self.fire(&mut wakeups);
            core
        })
    }
}
