//! What keeps a VM's history: open views, and locked checkpoints.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use tokio::sync::oneshot;

use super::preserving::{EXPIRED, InTheWay};
use super::{Inner, TargetVm};
use crate::receive::manifest::LockedCheckpoint;
use crate::receive::receiver_types::Pins;
use crate::receive::target_error::TargetError;
use crate::receive::worker::Input;
use crate::view::ViewDisk;

/// Keeps a VM's history, from a number on, from being given up or promoted.
pub struct Pin {
    vm: Arc<TargetVm>,
    id: u64,
    /// The VM's, when this was made.
    reopenings: u64,
}

/// The pins that there are, by their own count.
#[derive(Default)]
pub(super) struct PinBook {
    pins: BTreeMap<u64, Pinned>,
    next: u64,
    /// Of views that are to be open again: number of the pin and what it keeps.
    awaited: Vec<(u64, u64)>,
}

/// What one pin keeps, and for whom.
#[derive(Default)]
struct Pinned {
    /// Everything from here on.
    seq: u64,
    /// But for what was copied to the view's scratch, up to here (C5).
    kept_seq: u64,
    disks: Vec<Weak<ViewDisk>>,
    purpose: Purpose,
}

/// What a pin is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Purpose {
    /// A view, or the opening of something.
    #[default]
    View,
    /// A locked checkpoint that has overlays.
    Lock,
    /// A view on top of these: their own pin stands for it.
    OnLock,
    /// A view that was given up: it reads errors, and keeps nothing.
    Ended,
}

impl Pinned {
    /// What it keeps from being promoted begins here.
    fn needed_seq(&self) -> Option<u64> {
        matches!(self.purpose, Purpose::View | Purpose::Lock).then(|| self.seq.max(self.kept_seq))
    }
}

impl PinBook {
    /// With pins for views that are to be open again.
    pub(super) fn awaiting(seqs: Vec<u64>) -> Self {
        let awaited: Vec<(u64, u64)> = (0..).zip(seqs).collect();
        let pinned = |&(id, seq): &(u64, u64)| (id, Pinned { seq, ..Pinned::default() });
        Self { pins: awaited.iter().map(pinned).collect(), next: awaited.len() as u64, awaited }
    }

    /// How many are of views.
    pub(super) fn count(&self) -> usize {
        let is_view = |pinned: &&Pinned| matches!(pinned.purpose, Purpose::View | Purpose::OnLock);
        self.pins.values().filter(is_view).count()
    }

    /// One for overlays that are to be opened again: they keep what was promoted, and no more is meanwhile.
    pub(super) fn await_overlays(&mut self, cut: u64, kept_seq: u64) -> u64 {
        self.add(Pinned { seq: cut, kept_seq, purpose: Purpose::Lock, ..Pinned::default() })
    }

    fn add(&mut self, pinned: Pinned) -> u64 {
        let id = self.next;
        self.next += 1;
        self.pins.insert(id, pinned);
        id
    }

    /// Through where the overlays of a locked checkpoint keep everything, as far as is known.
    pub(super) fn kept_of_lock(&self, cut: u64) -> u64 {
        let locks = self.pins.values().filter(|pinned| pinned.purpose == Purpose::Lock && pinned.seq == cut);
        locks.map(|pinned| pinned.kept_seq).max().unwrap_or_default()
    }

    /// What views show that are to be open again.
    pub(super) fn awaited_seqs(&self) -> impl Iterator<Item = u64> {
        self.awaited.iter().map(|(_, seq)| *seq)
    }

    /// What is still needed, with these locks.
    pub(super) fn needed<'a>(&self, locks: impl IntoIterator<Item = &'a LockedCheckpoint>) -> Pins {
        Pins {
            view: self.pins.values().filter_map(Pinned::needed_seq).min(),
            lock: locks.into_iter().map(|locked| locked.cut).min(),
            has_views: self.count() > 0,
        }
    }

    /// The views that keep a promotion from ending at this number.
    pub(super) fn in_the_way(&self, through_seq: u64) -> Vec<InTheWay> {
        let is_blocking = |pinned: &Pinned| pinned.needed_seq().is_some_and(|needed| needed < through_seq);
        let blocking = self.pins.iter().filter(|(_, pinned)| is_blocking(pinned));
        let view = |(pin, pinned): (&u64, &Pinned)| InTheWay {
            pin: *pin,
            seq: pinned.seq,
            kept_seq: pinned.seq.max(pinned.kept_seq),
            is_lock: pinned.purpose == Purpose::Lock,
            is_awaited: pinned.purpose == Purpose::Lock || self.awaited.iter().any(|(id, _)| id == pin),
            disks: pinned.disks.iter().filter_map(Weak::upgrade).collect(),
        };
        blocking.map(view).collect()
    }

    /// Everything up to here was copied to the view's scratch.
    pub(super) fn keep(&mut self, pin: u64, through_seq: u64) {
        if let Some(pinned) = self.pins.get_mut(&pin) {
            pinned.kept_seq = pinned.kept_seq.max(through_seq);
        }
    }

    /// The view keeps nothing any more, nor do those on top of it.
    pub(super) fn end(&mut self, pin: u64) {
        let Some(ended) = self.pins.get_mut(&pin) else { return };
        let (seq, is_lock) = (ended.seq, ended.purpose == Purpose::Lock);
        ended.purpose = Purpose::Ended;
        let on_it = |pinned: &&mut Pinned| is_lock && pinned.purpose == Purpose::OnLock && pinned.seq == seq;
        self.pins.values_mut().filter(on_it).for_each(|pinned| pinned.purpose = Purpose::Ended);
    }

    /// Whether a view that was given up is not closed yet.
    pub(super) fn has_ended(&self) -> bool {
        self.pins.values().any(|pinned| pinned.purpose == Purpose::Ended)
    }

    /// The disks of each open view, with the number that it shows.
    pub(super) fn views(&self) -> Vec<(u64, Vec<Arc<ViewDisk>>)> {
        let disks = |pinned: &Pinned| pinned.disks.iter().filter_map(Weak::upgrade).collect();
        let views = self.pins.values().map(|pinned| (pinned.seq, disks(pinned)));
        views.filter(|(_, disks): &(u64, Vec<_>)| !disks.is_empty()).collect()
    }
}

impl TargetVm {
    /// Keeps all of the history until the pin is dropped, or told what it needs.
    pub fn pin(self: &Arc<Self>) -> Pin {
        self.pin_for(0, 0, Purpose::View)
    }

    /// Keeps what is needed to read at this number, but for what was copied.
    pub(super) fn pin_for(self: &Arc<Self>, seq: u64, kept_seq: u64, purpose: Purpose) -> Pin {
        let mut inner = self.lock();
        let id = inner.pins.add(Pinned { seq, kept_seq, purpose, ..Pinned::default() });
        self.tell_pins(&inner, None);
        Pin { vm: self.clone(), id, reopenings: inner.reopenings }
    }

    /// What was kept for a view before the files were open is kept no longer: the view has a pin of its own, or is closed.
    pub fn stop_awaiting(self: &Arc<Self>, seq: u64) {
        let mut inner = self.lock();
        let awaited = &mut inner.pins.awaited;
        let Some(index) = awaited.iter().position(|(_, awaited)| *awaited == seq) else { return };
        let (id, _) = awaited.swap_remove(index);
        let reopenings = inner.reopenings;
        drop(inner);
        drop(Pin { vm: self.clone(), id, reopenings });
        self.drop_overlays();
    }

    /// The pin of that number.
    pub(super) fn pin_of(self: &Arc<Self>, id: u64) -> Pin {
        Pin { vm: self.clone(), id, reopenings: self.lock().reopenings }
    }

    pub(super) fn tell_pins(&self, inner: &Inner, answer: Option<oneshot::Sender<u64>>) {
        if let Some(vm) = inner.key {
            self.worker.tell(Input::SetPins { vm, pins: inner.needed(), locks_changed: false, answer });
        }
    }

    /// The same, after checkpoints were locked or unlocked.
    pub(super) fn tell_locks(&self, inner: &Inner) {
        if let Some(vm) = inner.key {
            self.worker.tell(Input::SetPins { vm, pins: inner.needed(), locks_changed: true, answer: None });
        }
    }
}

impl Inner {
    /// What is still needed.
    pub(super) fn needed(&self) -> Pins {
        let kept = &self.kept_locks;
        let locks = self.manifest.locked.iter().chain(&self.releasing);
        // Overlays have a pin of their own.
        self.pins.needed(locks.filter(|locked| !kept.contains_key(&locked.cut)))
    }
}

impl Pin {
    /// Only what is needed to read at this number is kept.
    pub(super) fn needs(&self, seq: u64, kept_seq: u64) {
        let mut inner = self.vm.lock();
        let pinned = inner.pins.pins.entry(self.id).or_default();
        (pinned.seq, pinned.kept_seq) = (seq, kept_seq);
        self.vm.tell_pins(&inner, None);
    }

    /// What it is for.
    pub(super) fn is_for(&self, purpose: Purpose) {
        let mut inner = self.vm.lock();
        inner.pins.pins.entry(self.id).or_default().purpose = purpose;
        self.vm.tell_pins(&inner, None);
    }

    /// A disk of the view that this pin is for is served: should the journal's segments be moved, it is told.
    ///
    /// # Errors
    /// The files failed since the view was opened: where its bytes are is not known for certain.
    pub fn shows(&self, disk: &Arc<ViewDisk>) -> Result<(), TargetError> {
        let mut inner = self.vm.lock();
        if inner.key.is_none() || inner.reopenings != self.reopenings {
            return Err(TargetError::NotOpen { vm: self.vm.vm, reason: inner.not_open.clone() });
        }
        inner.pins.pins.entry(self.id).or_default().disks.push(Arc::downgrade(disk));
        Ok(())
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut inner = self.vm.lock();
        inner.pins.pins.remove(&self.id);
        if !inner.pins.has_ended() {
            inner.alerts.remove(EXPIRED);
        }
        self.vm.tell_pins(&inner, None);
    }
}
