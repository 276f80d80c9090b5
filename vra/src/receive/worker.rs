//! The threads that do the target's I/O: each has one ring and serves many VMs' receivers.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;

use bytes::Bytes;
use journal::crypt::{SiteKeyId, SiteKeys};
use journal::promotion::{PromotionAction, PromotionFile};
use journal::storage::ring::{DirectFile, RingStorage, RingWaker};
use journal::storage::{Completion, FileId, Purpose, Storage};
use journal::writer::ChangeError;
use tokio::sync::oneshot;

use super::checkpoint_list::CheckpointList;
use super::outbox::Outbox;
use super::receiver::Receiver;
use super::receiver_types::{
    Failure, Pins, ReceiverEvent, ReceiverOutput, ReceiverPolicy, ReceiverStatus, StreamId,
};
use super::scrub::Sealed;
use crate::clock::Clock;
use crate::wire::{Frame, Open, Refuse, RefuseCode, VolumeShape};

/// A VM on a worker, by the process's count: a VM that is opened again has another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct VmKey(pub(super) u64);

/// A receiver with its files.
pub(super) struct Attached {
    pub(super) key: VmKey,
    pub(super) receiver: Receiver,
    pub(super) journal: DirectFile,
    pub(super) disks: Vec<DirectFile>,
    /// What is still needed.
    pub(super) pins: Pins,
    /// Told each event, on the worker's thread: it must not block. After a failure the files are closed before it is told.
    pub(super) on_event: Box<dyn FnMut(ReceiverEvent) + Send>,
    /// Where the state is shown.
    pub(super) status: Arc<Mutex<ReceiverStatus>>,
}

/// What a worker is told.
pub(super) enum Input {
    Attach(Box<Attached>),
    Open {
        vm: VmKey,
        stream: StreamId,
        open: Box<Open>,
        outbox: Arc<Outbox>,
    },
    Batch {
        vm: VmKey,
        stream: StreamId,
        bytes: Bytes,
    },
    Closed {
        vm: VmKey,
        stream: StreamId,
    },
    SetManifest {
        vm: VmKey,
        text: String,
        /// Told when it is durable, or why it can't be written; dropped when the storage fails meanwhile.
        answer: Option<oneshot::Sender<Result<(), ChangeError>>>,
    },
    /// Whether the journal is encrypted from now on.
    SetEncryption {
        vm: VmKey,
        wanted: bool,
        site: SiteKeys,
    },
    /// The first sealed segment after a number, if it has been full for so long; for the scrub.
    SealedSegment {
        vm: VmKey,
        after_number: u64,
        cold_us: u64,
        answer: oneshot::Sender<Option<Sealed>>,
    },
    /// Names of the site keys that the journal needs.
    SiteKeys {
        vm: VmKey,
        answer: oneshot::Sender<BTreeSet<SiteKeyId>>,
    },
    SetPolicy {
        vm: VmKey,
        policy: ReceiverPolicy,
    },
    /// The same volumes, of which some may have left or grown.
    SetVolumes {
        vm: VmKey,
        volumes: Vec<VolumeShape>,
    },
    /// What is still needed; answered with the lowest number that can be opened.
    SetPins {
        vm: VmKey,
        pins: Pins,
        /// Checkpoints were locked or unlocked.
        locks_changed: bool,
        answer: Option<oneshot::Sender<u64>>,
    },
    /// Time has passed.
    Tick,
    Checkpoints {
        vm: VmKey,
        answer: oneshot::Sender<CheckpointList>,
    },
    /// Seals the journal and closes the files.
    Detach {
        vm: VmKey,
        answer: oneshot::Sender<()>,
    },
    /// The files can't be trusted any more.
    Fail {
        vm: VmKey,
        failure: Failure,
    },
    /// The storage fails when a manifest is written next.
    #[cfg(test)]
    FailAtManifest {
        vm: VmKey,
    },
}

/// A handle on a worker thread. Cheap to clone.
#[derive(Clone)]
pub(super) struct Worker {
    inputs: mpsc::Sender<Input>,
    waker: RingWaker,
}

/// The thread behind a [`Worker`]; ends when dropped.
pub(super) struct WorkerThread {
    worker: Worker,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// Promotions of one worker at a time, besides those that a journal needs for room: each takes up to 32 MiB of memory.
const PROMOTIONS_MAX: usize = 4;
/// Operations that one worker keeps in the kernel; more wait in the ring's backlog.
const RING_DEPTH: u32 = 256;

impl Worker {
    /// Tells the worker something. False when the worker has ended.
    pub(super) fn tell(&self, input: Input) -> bool {
        let told = self.inputs.send(input).is_ok();
        self.waker.wake();
        told
    }
}

impl WorkerThread {
    /// Starts one.
    ///
    /// # Errors
    /// The kernel has no io_uring or no thread for us.
    pub(super) fn start(number: usize) -> io::Result<Self> {
        let storage = RingStorage::new(RING_DEPTH)?;
        let (inputs, receiver) = mpsc::channel();
        let worker = Worker { inputs, waker: storage.waker() };
        let stop = Arc::new(AtomicBool::new(false));
        let state = WorkerState {
            storage,
            inputs: receiver,
            stop: stop.clone(),
            clock: Clock::start(),
            vms: HashMap::new(),
            routes: HashMap::new(),
            next_route: 0,
            dirty: Vec::new(),
            promoting: HashSet::new(),
            last_append_us: 0,
        };
        let thread =
            std::thread::Builder::new().name(format!("journal-{number}")).spawn(move || state.run())?;
        Ok(Self { worker, stop, thread: Some(thread) })
    }

    pub(super) fn worker(&self) -> &Worker {
        &self.worker
    }
}

impl Drop for WorkerThread {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.worker.waker.wake();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a journal worker thread has panicked");
        }
    }
}

struct WorkerState {
    storage: RingStorage,
    inputs: mpsc::Receiver<Input>,
    stop: Arc<AtomicBool>,
    clock: Clock,
    vms: HashMap<VmKey, Vm>,
    /// Where the end of an operation goes.
    routes: HashMap<u64, Route>,
    next_route: u64,
    /// VMs that something happened to.
    dirty: Vec<VmKey>,
    /// VMs with a promotion under way.
    promoting: HashSet<VmKey>,
    /// When one of the VMs' journals last took a batch, by the monotonic clock.
    last_append_us: u64,
}

struct Vm {
    receiver: Receiver,
    journal: FileId,
    disks: Vec<FileId>,
    outboxes: HashMap<StreamId, Arc<Outbox>>,
    in_flight: usize,
    on_event: Box<dyn FnMut(ReceiverEvent) + Send>,
    status: Arc<Mutex<ReceiverStatus>>,
    /// Who waits for manifests to be durable.
    manifests: HashMap<u64, oneshot::Sender<Result<(), ChangeError>>>,
    detaching: Option<oneshot::Sender<()>>,
    /// The failure to tell once nothing is in flight.
    failed: Option<ReceiverEvent>,
    /// The storage fails when a manifest is written next.
    #[cfg(test)]
    fails_at_manifest: bool,
}

impl Vm {
    fn set_manifest(&mut self, text: String, answer: Option<oneshot::Sender<Result<(), ChangeError>>>) {
        match (self.receiver.set_manifest(text), answer) {
            (Ok(ticket), answer) => self.manifests.extend(answer.map(|answer| (ticket, answer))),
            // Nobody may wait for it any more.
            (Err(error), Some(answer)) => drop(answer.send(Err(error))),
            (Err(error), None) => {
                tracing::warn!(error = %super::error_chain(&error), "the manifest of a journal was not written");
            }
        }
        #[cfg(test)]
        if std::mem::take(&mut self.fails_at_manifest) {
            self.receiver.fail(super::test_pair::write_failure());
        }
    }
}

#[derive(Clone, Copy)]
struct Route {
    vm: VmKey,
    token: u64,
    part: Part,
}

/// Which of a receiver's machines an operation is of.
#[derive(Clone, Copy)]
enum Part {
    Journal,
    Disk,
    Promotion,
}

impl WorkerState {
    fn run(mut self) {
        let mut done = Vec::new();
        while !self.stop.load(Ordering::Acquire) {
            while let Ok(input) = self.inputs.try_recv() {
                self.take(input);
            }
            self.pump();
            if let Err(errno) = self.storage.collect(true, &mut done) {
                tracing::error!(%errno, "a journal worker's ring is broken: its VMs take nothing more");
                return;
            }
            for completion in done.drain(..) {
                self.ended(completion);
            }
        }
    }

    fn take(&mut self, input: Input) {
        let now = self.clock.now();
        let key = match &input {
            Input::Tick => return self.dirty = self.vms.keys().copied().collect(),
            Input::Attach(attached) => attached.key,
            Input::Open { vm, .. }
            | Input::Batch { vm, .. }
            | Input::Closed { vm, .. }
            | Input::SetManifest { vm, .. }
            | Input::SetEncryption { vm, .. }
            | Input::SealedSegment { vm, .. }
            | Input::SiteKeys { vm, .. }
            | Input::SetPolicy { vm, .. }
            | Input::SetVolumes { vm, .. }
            | Input::SetPins { vm, .. }
            | Input::Checkpoints { vm, .. }
            | Input::Detach { vm, .. }
            | Input::Fail { vm, .. } => *vm,
            #[cfg(test)]
            Input::FailAtManifest { vm } => *vm,
        };
        if let Input::Attach(attached) = input {
            self.attach(*attached);
        } else if let Some(vm) = self.vms.get_mut(&key) {
            match input {
                Input::Open { stream, open, outbox, .. } => {
                    vm.outboxes.insert(stream, outbox);
                    vm.receiver.open(stream, *open, now);
                }
                Input::Batch { stream, bytes, .. } => vm.receiver.batch(stream, bytes, now),
                Input::Closed { stream, .. } => {
                    vm.outboxes.remove(&stream);
                    vm.receiver.closed(stream);
                }
                Input::SetManifest { text, answer, .. } => vm.set_manifest(text, answer),
                Input::SetEncryption { wanted, site, .. } => {
                    if let Err(error) = vm.receiver.follow_encryption(wanted, &site) {
                        tracing::warn!(error = %super::error_chain(&error), "the journal's encryption doesn't follow");
                    }
                }
                Input::SealedSegment { after_number, cold_us, answer, .. } => {
                    // Nobody may wait for it any more.
                    let _ = answer.send(vm.receiver.sealed_segment(after_number, cold_us));
                }
                Input::SiteKeys { answer, .. } => {
                    // Nobody may wait for it any more.
                    let _ = answer.send(vm.receiver.site_key_ids());
                }
                Input::SetPolicy { policy, .. } => vm.receiver.set_policy(policy),
                Input::SetVolumes { volumes, .. } => vm.receiver.set_volumes(volumes),
                Input::SetPins { pins, locks_changed, answer, .. } => {
                    vm.receiver.set_pins(pins);
                    if locks_changed {
                        vm.receiver.locks_changed();
                    }
                    if let Some(answer) = answer {
                        // Nobody may wait for it any more.
                        let _ = answer.send(vm.receiver.oldest_seq());
                    }
                }
                Input::Checkpoints { answer, .. } => {
                    // Nobody may wait for it any more.
                    let _ = answer.send(vm.receiver.checkpoints());
                }
                Input::Detach { answer, .. } => {
                    vm.receiver.close();
                    vm.detaching = Some(answer);
                }
                Input::Fail { failure, .. } => vm.receiver.fail(failure),
                #[cfg(test)]
                Input::FailAtManifest { .. } => vm.fails_at_manifest = true,
                Input::Attach(_) | Input::Tick => {}
            }
        } else if let Input::Open { outbox, .. } = input {
            let text = "the VM's journal is being opened".to_owned();
            outbox.send(Frame::Refuse(Refuse { code: RefuseCode::Busy, detail: 0, text }));
            outbox.close();
        }
        self.mark(key);
    }

    fn attach(&mut self, attached: Attached) {
        let Attached { key, mut receiver, journal, disks, pins, on_event, status } = attached;
        receiver.set_pins(pins);
        let journal = self.storage.add_file(journal);
        let disks = disks.into_iter().map(|disk| self.storage.add_file(disk)).collect();
        let vm = Vm {
            receiver,
            journal,
            disks,
            outboxes: HashMap::new(),
            in_flight: 0,
            on_event,
            status,
            manifests: HashMap::new(),
            detaching: None,
            failed: None,
            #[cfg(test)]
            fails_at_manifest: false,
        };
        self.vms.insert(key, vm);
    }

    fn mark(&mut self, key: VmKey) {
        if !self.dirty.contains(&key) {
            self.dirty.push(key);
        }
    }

    fn ended(&mut self, completion: Completion) {
        let Some(route) = self.routes.remove(&completion.token) else { return };
        let now = self.clock.now();
        let Some(vm) = self.vms.get_mut(&route.vm) else { return };
        vm.in_flight -= 1;
        match route.part {
            Part::Journal => vm.receiver.journal_done(route.token, completion.result.map(drop), now),
            Part::Disk => vm.receiver.disk_done(route.token, completion.result, now),
            Part::Promotion => vm.receiver.promotion_done(route.token, completion.result, now),
        }
        self.mark(route.vm);
    }

    /// Does what the receivers want.
    fn pump(&mut self) {
        for key in std::mem::take(&mut self.dirty) {
            let Some(vm) = self.vms.get_mut(&key) else { continue };
            vm.receiver
                .set_may_promote(self.promoting.contains(&key) || self.promoting.len() < PROMOTIONS_MAX);
            vm.receiver.note_neighbours_append(self.last_append_us);
            self.last_append_us = self.last_append_us.max(vm.receiver.last_append_us());
            while let Some(output) = vm.receiver.poll(self.clock.now()) {
                let (file, part, token, purpose, op) = match output {
                    ReceiverOutput::Journal(action) => {
                        (vm.journal, Part::Journal, action.token, action.purpose, action.op)
                    }
                    ReceiverOutput::Disk(action) => {
                        let file = vm.disks[usize::from(action.volume)];
                        (file, Part::Disk, action.token, Purpose::RecoveryDisk, action.op)
                    }
                    ReceiverOutput::Promotion(PromotionAction { token, file, purpose, op }) => {
                        let file = match file {
                            PromotionFile::Journal => vm.journal,
                            PromotionFile::Disk(volume) => vm.disks[usize::from(volume)],
                        };
                        (file, Part::Promotion, token, purpose, op)
                    }
                    ReceiverOutput::Send { stream, frame } => {
                        if let Some(outbox) = vm.outboxes.get(&stream) {
                            outbox.send(frame);
                        }
                        continue;
                    }
                    ReceiverOutput::Close { stream } => {
                        if let Some(outbox) = vm.outboxes.remove(&stream) {
                            outbox.close();
                        }
                        continue;
                    }
                    ReceiverOutput::ManifestWritten { ticket } => {
                        if let Some(answer) = vm.manifests.remove(&ticket) {
                            // Nobody may wait for it any more.
                            let _ = answer.send(Ok(()));
                        }
                        continue;
                    }
                    ReceiverOutput::Event(event @ ReceiverEvent::Failed { .. }) => {
                        vm.failed = Some(event);
                        continue;
                    }
                    ReceiverOutput::Event(event) => {
                        (vm.on_event)(event);
                        continue;
                    }
                };
                let id = self.next_route;
                self.next_route += 1;
                vm.in_flight += 1;
                self.routes.insert(id, Route { vm: key, token, part });
                self.storage.submit(file, id, purpose, op);
            }
            // Those that wait for their turn are looked at with the next tick.
            if vm.receiver.is_promoting() {
                self.promoting.insert(key);
            } else {
                self.promoting.remove(&key);
            }
            *vm.status.lock().unwrap_or_else(PoisonError::into_inner) = vm.receiver.status();
            let ends = vm.failed.is_some() || vm.detaching.is_some() && vm.receiver.is_idle();
            if ends && vm.in_flight == 0 {
                self.release(key);
            }
        }
    }

    /// Closes a VM's files; nothing of it is in flight.
    fn release(&mut self, key: VmKey) {
        let Some(mut vm) = self.vms.remove(&key) else { return };
        self.promoting.remove(&key);
        for file in vm.disks.into_iter().chain([vm.journal]) {
            drop(self.storage.remove_file(file));
        }
        vm.outboxes.values().for_each(|outbox| outbox.close());
        if let Some(event) = vm.failed.take() {
            (vm.on_event)(event);
        }
        if let Some(answer) = vm.detaching.take() {
            // Nobody may wait for it any more.
            let _ = answer.send(());
        }
    }
}
