//! A fixed set of threads, one io_uring each, that host the lanes of all doors.
//!
//! What is attached to a thread is a [`Source`]: a ublk queue, or an NBD connection. A source is a state machine: the
//! thread calls it with completions and wake-ups, and it answers by pushing submissions on its [`SourceRing`]. All
//! that one turn of the loop pushes goes to the kernel in one `io_uring_enter`, which also waits for the next
//! completions. Rings are made with SINGLE_ISSUER, COOP_TASKRUN and DEFER_TASKRUN, so the kernel's part of a request
//! (the ublk driver's copy of the data) runs on the same thread.
//!
//! Liveness: no call into a source blocks. A source leaves its thread when it says that it is finished and
//! none of its submissions is in flight, so memory that it lends to the kernel lives long enough if the source owns it.

pub(crate) mod lane_host;
pub(crate) mod ring;
pub(crate) mod wake;

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use io_uring::{cqueue, opcode, types};

use crate::process;
use crate::reactor::ring::{Ring, SourceRing, Token};
use crate::reactor::wake::{SOURCES_MAX, WakeSet};
use crate::serve::{Wake, Waker};

/// Something attached to a reactor thread. Always called on that thread.
///
/// A source owns every buffer that its submissions name, and keeps it until the submission's completion has come.
pub(crate) trait Source: Send {
    /// The end (or with `IORING_CQE_F_MORE` in `flags` one of several results) of a submission.
    fn completed(&mut self, token: Token, result: i32, flags: u32, ring: &mut SourceRing<'_>);
    /// Somebody called the source's [`Wake`].
    fn woken(&mut self, ring: &mut SourceRing<'_>);
    /// [`SourceHandle::stop`] was called: end soon. May come more than once.
    fn stopping(&mut self, ring: &mut SourceRing<'_>);
    /// Nothing more will be pushed. Asked after each call; once it is true and nothing is in flight the source's fixed
    /// files are taken out of the ring and it is dropped.
    fn finished(&self) -> bool;
}

/// Makes a source on its thread, with its ring and its waker at hand.
pub(crate) type SourceBuilder = Box<dyn FnOnce(&mut SourceRing<'_>) -> io::Result<Box<dyn Source>> + Send>;

/// Size of the set of reactor threads and of their rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReactorSettings {
    /// How many threads serve all devices.
    pub thread_count: usize,
    /// Submission queue entries of each ring: a power of two. The completion queue has eight times as many.
    pub ring_entries: u32,
}

impl ReactorSettings {
    /// One thread for each two CPUs, at most eight: guests need the others.
    pub fn for_this_host() -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Self { thread_count: cpus.div_ceil(2).clamp(1, 8), ring_entries: 1024 }
    }
}

/// Why a reactor thread could not be set up or take a source.
#[derive(Debug, thiserror::Error)]
pub enum ReactorError {
    /// The kernel refused the ring.
    #[error(
        "cannot set up an io_uring with {entries} entries (needs kernel 6.1 or newer, sysctl kernel.io_uring_disabled=0, \
         and no seccomp filter against io_uring)"
    )]
    Ring {
        /// Submission entries asked for.
        entries: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// The operating system refused the thread, its event descriptor, or to take a capability from it.
    #[error("cannot start reactor thread {thread}")]
    Thread {
        /// Number of the thread.
        thread: usize,
        /// What the system said.
        source: io::Error,
    },
    /// No place left.
    #[error(
        "reactor thread {thread} serves {SOURCES_MAX} queues and connections already; raise the number of reactor threads"
    )]
    Full {
        /// Number of the thread.
        thread: usize,
    },
    /// The source could not be made, for instance because the ring's file table is full.
    #[error("cannot attach to reactor thread {thread}")]
    Attach {
        /// Number of the thread.
        thread: usize,
        /// What failed.
        source: io::Error,
    },
    /// The thread has ended.
    #[error("reactor thread {thread} has ended")]
    Ended {
        /// Number of the thread.
        thread: usize,
    },
}

/// The reactor threads of a process. Dropping it lets each thread end once its last source has left.
#[derive(Debug)]
pub struct Reactors {
    threads: Vec<Arc<Shared>>,
    next: AtomicUsize,
}

impl Reactors {
    /// Starts the threads. They inherit this thread's flags: call `process::prepare` first.
    ///
    /// # Errors
    /// [`ReactorError::Ring`] or [`ReactorError::Thread`].
    pub fn start(settings: ReactorSettings) -> Result<Self, ReactorError> {
        let mut reactors = Self { threads: Vec::new(), next: AtomicUsize::new(0) };
        for thread in 0..settings.thread_count.max(1) {
            reactors.threads.push(start_thread(thread, settings.ring_entries)?);
        }
        Ok(reactors)
    }

    /// How many threads there are.
    pub fn thread_count(&self) -> usize {
        self.threads.len()
    }

    /// Attaches to the next thread in turn; `build` runs there. Not to be called on a reactor thread.
    pub(crate) fn attach(&self, build: SourceBuilder) -> Result<SourceHandle, ReactorError> {
        let thread = self.next.fetch_add(1, Ordering::Relaxed) % self.threads.len();
        self.attach_to(thread, build)
    }

    fn attach_to(&self, thread: usize, build: SourceBuilder) -> Result<SourceHandle, ReactorError> {
        let shared = &self.threads[thread];
        let (reply, answer) = mpsc::sync_channel(1);
        shared.post(Message::Attach { build, reply });
        match answer.recv() {
            Ok(Ok((index, ended))) => Ok(SourceHandle { shared: Arc::clone(shared), index, ended }),
            Ok(Err(AttachFailure::Full)) => Err(ReactorError::Full { thread }),
            Ok(Err(AttachFailure::Build(source))) => Err(ReactorError::Attach { thread, source }),
            Err(_) => Err(ReactorError::Ended { thread }),
        }
    }
}

impl Drop for Reactors {
    fn drop(&mut self) {
        for shared in &self.threads {
            shared.post(Message::Shutdown);
        }
    }
}

/// The outside's hold on an attached source. Dropping it leaves the source where it is.
#[derive(Clone, Debug)]
pub(crate) struct SourceHandle {
    shared: Arc<Shared>,
    index: u32,
    ended: Arc<Ended>,
}

impl SourceHandle {
    /// Asks the source to end: it gets [`Source::stopping`].
    pub(crate) fn stop(&self) {
        if !self.has_ended() {
            self.shared.post(Message::Stop { index: self.index, ended: Arc::clone(&self.ended) });
        }
    }

    /// Whether the source has left its thread and been dropped.
    pub(crate) fn has_ended(&self) -> bool {
        *lock(&self.ended.flag)
    }

    /// Waits until the source has been dropped, and says whether it has.
    pub(crate) fn wait(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut ended = lock(&self.ended.flag);
        while !*ended {
            let now = Instant::now();
            if now >= deadline {
                return false;
            }
            let waited = self.ended.changed.wait_timeout(ended, deadline - now);
            ended = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

/// What other threads see of a reactor thread.
pub(crate) struct Shared {
    wakes: WakeSet,
    eventfd: OwnedFd,
    messages: Mutex<Vec<Message>>,
}

impl Shared {
    /// Asks for [`Source::woken`] of the source at `index`.
    pub(crate) fn wake_source(&self, index: u32) {
        if self.wakes.mark(index) {
            self.ring_bell();
        }
    }

    fn post(&self, message: Message) {
        lock(&self.messages).push(message);
        if self.wakes.mark_messages() {
            self.ring_bell();
        }
    }

    /// Ends the thread's wait in the kernel.
    fn ring_bell(&self) {
        let one = 1_u64;
        // SAFETY: the descriptor is open for as long as `self`, and eight bytes are read from a local number.
        let written = unsafe { libc::write(self.eventfd.as_raw_fd(), (&raw const one).cast(), 8) };
        debug_assert_eq!(written, 8, "an eventfd takes eight bytes");
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

/// Wakes one source. Waking one that has left is harmless: at worst its successor looks around for nothing.
struct SourceWaker {
    shared: Arc<Shared>,
    index: u32,
}

impl Wake for SourceWaker {
    fn wake(&self) {
        self.shared.wake_source(self.index);
    }
}

pub(crate) fn source_waker(shared: &Arc<Shared>, index: u32) -> Waker {
    Arc::new(SourceWaker { shared: Arc::clone(shared), index })
}

enum Message {
    Attach { build: SourceBuilder, reply: SyncSender<Result<(u32, Arc<Ended>), AttachFailure>> },
    Stop { index: u32, ended: Arc<Ended> },
    Shutdown,
}

enum AttachFailure {
    Full,
    Build(io::Error),
}

#[derive(Debug, Default)]
struct Ended {
    flag: Mutex<bool>,
    changed: Condvar,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn start_thread(thread: usize, entries: u32) -> Result<Arc<Shared>, ReactorError> {
    // SAFETY: no memory is involved. Blocking, because io_uring answers EAGAIN for a non-blocking descriptor.
    let raw = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
    if raw < 0 {
        return Err(ReactorError::Thread { thread, source: io::Error::last_os_error() });
    }
    // SAFETY: the call above made this descriptor and nobody else has it.
    let eventfd = unsafe { OwnedFd::from_raw_fd(raw) };
    let shared = Arc::new(Shared { wakes: WakeSet::new(), eventfd, messages: Mutex::new(Vec::new()) });
    let (ready, started) = mpsc::sync_channel(1);
    let thread_shared = Arc::clone(&shared);
    std::thread::Builder::new()
        .name(format!("reactor-{thread}"))
        .spawn(move || {
            let _guard = AbortOnPanic;
            // The ring first: with sysctl kernel.io_uring_disabled=1 making one takes the capability.
            let ring = Ring::new(entries).map_err(|source| ReactorError::Ring { entries, source });
            let ring = ring.and_then(|ring| {
                process::give_up_sys_admin().map_err(|source| ReactorError::Thread { thread, source })?;
                Ok(ring)
            });
            match ring {
                Ok(ring) => {
                    let _ = ready.send(Ok(()));
                    Reactor::new(ring, thread_shared).run();
                }
                Err(error) => {
                    let _ = ready.send(Err(error));
                }
            }
        })
        .map_err(|source| ReactorError::Thread { thread, source })?;
    started.recv().unwrap_or(Err(ReactorError::Ended { thread })).map(|()| shared)
}

/// A reactor thread that died in a living process would leave its guests waiting for ever; a dead process can be
/// recovered from.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}

/// Completions taken from the ring before they are handed out: bounds how long new submissions wait for their turn.
const BATCH_MAX: usize = 512;

/// Where the counts of all eventfds are read to. Static, because the read outlives a thread that ends.
static BELL_SINK: AtomicU64 = AtomicU64::new(0);

/// The thread's own state.
struct Reactor {
    ring: Ring,
    shared: Arc<Shared>,
    sources: Vec<Option<Attached>>,
    free: Vec<u32>,
    attached: usize,
    shutdown: bool,
}

struct Attached {
    source: Box<dyn Source>,
    in_flight: u32,
    files: Vec<u32>,
    ended: Arc<Ended>,
}

impl Reactor {
    fn new(ring: Ring, shared: Arc<Shared>) -> Self {
        Self { ring, shared, sources: Vec::new(), free: Vec::new(), attached: 0, shutdown: false }
    }

    fn run(&mut self) {
        self.arm_bell();
        let mut batch: Vec<cqueue::Entry> = Vec::with_capacity(BATCH_MAX);
        let mut woken: Vec<u32> = Vec::with_capacity(SOURCES_MAX as usize);
        while !(self.shutdown && self.attached == 0) {
            let may_wait = self.ring.may_wait() && self.shared.wakes.prepare_sleep();
            self.ring.enter(may_wait);
            if self.shared.wakes.collect(&mut woken) {
                self.read_messages();
            }
            self.ring.take_completions(&mut batch, BATCH_MAX);
            for completion in batch.drain(..) {
                self.dispatch(&completion);
            }
            for index in woken.drain(..) {
                self.call(index, |source, ring| source.woken(ring));
            }
        }
    }

    fn dispatch(&mut self, completion: &cqueue::Entry) {
        let Some((index, token)) = ring::split_user_data(completion.user_data()) else {
            self.arm_bell();
            return;
        };
        let more = cqueue::more(completion.flags());
        if let Some(Some(attached)) = self.sources.get_mut(index as usize)
            && !more
        {
            attached.in_flight -= 1;
        }
        self.call(index, |source, ring| {
            source.completed(token, completion.result(), completion.flags(), ring);
        });
    }

    fn call(&mut self, index: u32, act: impl FnOnce(&mut dyn Source, &mut SourceRing<'_>)) {
        let Some(Some(attached)) = self.sources.get_mut(index as usize) else {
            return;
        };
        let mut ring = SourceRing::new(
            &mut self.ring,
            &self.shared,
            index,
            &mut attached.in_flight,
            &mut attached.files,
        );
        act(attached.source.as_mut(), &mut ring);
        if attached.in_flight == 0 && attached.source.finished() {
            self.detach(index);
        }
    }

    fn detach(&mut self, index: u32) {
        let Some(attached) = self.sources.get_mut(index as usize).and_then(Option::take) else {
            return;
        };
        for file in &attached.files {
            self.ring.uninstall(*file);
        }
        drop(attached.source);
        self.free.push(index);
        self.attached -= 1;
        *lock(&attached.ended.flag) = true;
        attached.ended.changed.notify_all();
    }

    fn read_messages(&mut self) {
        let messages = std::mem::take(&mut *lock(&self.shared.messages));
        for message in messages {
            match message {
                Message::Attach { build, reply } => {
                    let _ = reply.send(self.attach(build));
                }
                Message::Stop { index, ended } => {
                    let same = self
                        .sources
                        .get(index as usize)
                        .and_then(Option::as_ref)
                        .is_some_and(|attached| Arc::ptr_eq(&attached.ended, &ended));
                    if same {
                        self.call(index, |source, ring| source.stopping(ring));
                    }
                }
                Message::Shutdown => self.shutdown = true,
            }
        }
    }

    fn attach(&mut self, build: SourceBuilder) -> Result<(u32, Arc<Ended>), AttachFailure> {
        let index = match self.free.pop() {
            Some(index) => index,
            None if self.sources.len() < SOURCES_MAX as usize => {
                self.sources.push(None);
                (self.sources.len() - 1) as u32
            }
            None => return Err(AttachFailure::Full),
        };
        let (mut in_flight, mut files) = (0, Vec::new());
        let mut ring = SourceRing::new(&mut self.ring, &self.shared, index, &mut in_flight, &mut files);
        match build(&mut ring) {
            Ok(source) => {
                let ended = Arc::new(Ended::default());
                let attached = Attached { source, in_flight, files, ended: Arc::clone(&ended) };
                self.sources[index as usize] = Some(attached);
                self.attached += 1;
                // It may have nothing to wait for.
                self.call(index, |_, _| {});
                Ok((index, ended))
            }
            Err(error) => {
                assert_eq!(in_flight, 0, "a source that fails to start has pushed nothing");
                for file in files {
                    self.ring.uninstall(file);
                }
                self.free.push(index);
                Err(AttachFailure::Build(error))
            }
        }
    }

    fn arm_bell(&mut self) {
        let fd = types::Fd(self.shared.eventfd.as_raw_fd());
        let read = opcode::Read::new(fd, BELL_SINK.as_ptr().cast(), 8).build();
        let read = read.user_data(ring::BELL_USER_DATA);
        // SAFETY: the memory is static and nobody reads it, and the eventfd lives as long as `shared`.
        unsafe { self.ring.push(read) };
    }
}

#[cfg(test)]
mod tests;
