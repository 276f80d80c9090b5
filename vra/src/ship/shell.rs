//! Drives a [`Sender`] over a QUIC stream: one tokio task for each VM.
//!
//! Checksums are computed in this task, so never on a reactor's thread. The task sleeps until the machine's deadline, a frame, room on
//! the stream, a command, or, when the machine asks for it, the capturing side's [`Doorbell`].

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use quinn::{RecvStream, SendStream, VarInt};
use tokio::sync::{mpsc, watch};

use super::{Doorbell, GenerationStart, Output, Retained, Sender, SenderEvent, SenderStatus};
use crate::clock::Clock;
use crate::wire::{Frame, FrameReader, VolumeShape};

/// Makes streams to a VM's target.
pub trait DataConnector: Send + Sync + 'static {
    /// Connects, proves both ends' identity and opens a bidirectional stream.
    ///
    /// # Errors
    /// Why it can't, for people; the sender tries again later.
    fn open(&self) -> impl Future<Output = Result<(SendStream, RecvStream), ConnectError>> + Send;
}

/// Why a stream to the target could not be made, for people.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub struct ConnectError(pub String);

/// What a shipper needs.
pub struct ShipperParts<C> {
    /// The machine.
    pub sender: Sender,
    /// Where captured writes wait.
    pub retained: Box<dyn Retained + Send>,
    /// Rung by the capturing side after each publication.
    pub doorbell: Arc<Doorbell>,
    /// Makes streams.
    pub connector: C,
    /// It begins paused; see [`Shipper::set_paused`].
    pub paused: bool,
    /// Told each event, on the shipper's task: it must not block.
    pub on_event: Box<dyn FnMut(SenderEvent) + Send>,
}

/// A running shipper. Dropping it ends the task and the stream.
#[derive(Debug)]
pub struct Shipper {
    commands: mpsc::Sender<Command>,
    paused: watch::Sender<bool>,
    priority: watch::Sender<i32>,
    volumes: watch::Sender<Option<Vec<VolumeShape>>>,
    status: Arc<Mutex<SenderStatus>>,
    task: tokio::task::JoinHandle<()>,
}

impl Shipper {
    /// Starts the task on the current tokio runtime.
    pub fn start<C: DataConnector>(parts: ShipperParts<C>) -> Self {
        let (commands, receiver) = mpsc::channel(COMMAND_QUEUE);
        let (paused, is_paused) = watch::channel(parts.paused);
        let (priority, its_priority) = watch::channel(0);
        let (volumes, its_volumes) = watch::channel(None);
        let status = Arc::new(Mutex::new(parts.sender.status()));
        let shell = Shell {
            sender: parts.sender,
            retained: parts.retained,
            doorbell: parts.doorbell,
            connector: Arc::new(parts.connector),
            on_event: parts.on_event,
            clock: Clock::start(),
            commands: receiver,
            paused: is_paused,
            priority: its_priority,
            volumes: its_volumes,
            status: status.clone(),
            link: None,
            dialing: None,
        };
        Self { commands, paused, priority, volumes, status, task: tokio::spawn(shell.run()) }
    }

    /// The sender's state, as of its last step.
    pub fn status(&self) -> SenderStatus {
        self.status.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Goes on with another generation, whose records wait in `retained`.
    pub async fn begin_generation(&self, start: GenerationStart, retained: Box<dyn Retained + Send>) {
        // The task ends only with this handle, so the command always has a reader.
        let _ = self.commands.send(Command::BeginGeneration(start, retained)).await;
    }

    /// Goes on with volumes that have grown; see [`Sender::set_volumes`]. Whatever is published after this call is sent with them.
    pub fn set_volumes(&self, volumes: Vec<VolumeShape>) {
        self.volumes.send_replace(Some(volumes));
    }

    /// Ends the stream and makes no other one, or goes on at once where it was. What is retained stays retained meanwhile.
    pub fn set_paused(&self, paused: bool) {
        self.paused.send_if_modified(|current| std::mem::replace(current, paused) != paused);
    }

    /// Of streams that share a connection those of a higher priority send first, and lower ones what room is left; 0 until it is set. Gives
    /// whether it was another one.
    pub fn set_priority(&self, priority: i32) -> bool {
        self.priority.send_if_modified(|current| std::mem::replace(current, priority) != priority)
    }

    /// Tries again now; see [`Sender::resume`].
    pub async fn resume(&self) {
        let _ = self.commands.send(Command::Resume).await;
    }
}

impl Drop for Shipper {
    fn drop(&mut self) {
        self.task.abort();
    }
}

enum Command {
    BeginGeneration(GenerationStart, Box<dyn Retained + Send>),
    Resume,
}

/// Why there is no stream while the shipper is paused.
const PAUSED: &str = "replication is paused";

/// Commands that may wait for the task.
const COMMAND_QUEUE: usize = 8;

/// While this much waits for room on the stream no further batch is sealed, in bytes: enough to keep the stream busy, so little that
/// batches fill up while they wait.
const QUEUED_BYTES_MAX: usize = 2 << 20;

type Dialing = Pin<Box<dyn Future<Output = Result<(SendStream, RecvStream), ConnectError>> + Send>>;

struct Shell<C> {
    sender: Sender,
    retained: Box<dyn Retained + Send>,
    doorbell: Arc<Doorbell>,
    connector: Arc<C>,
    on_event: Box<dyn FnMut(SenderEvent) + Send>,
    clock: Clock,
    commands: mpsc::Receiver<Command>,
    paused: watch::Receiver<bool>,
    priority: watch::Receiver<i32>,
    volumes: watch::Receiver<Option<Vec<VolumeShape>>>,
    status: Arc<Mutex<SenderStatus>>,
    link: Option<Link>,
    dialing: Option<Dialing>,
}

/// A stream and what waits for room on it.
struct Link {
    send: SendStream,
    recv: RecvStream,
    frames: FrameReader,
    queue: VecDeque<Bytes>,
    queued_bytes: usize,
}

enum Woken {
    Dialed(Result<(SendStream, RecvStream), ConnectError>),
    Link(Result<Option<Frame>, String>),
    Command(Option<Command>),
    Paused(bool),
    Priority,
    Time,
    Bell,
}

impl<C: DataConnector> Shell<C> {
    async fn run(mut self) {
        while self.turn().await {}
    }

    /// Does what can be done now, then waits for what comes next; false when the handle is gone.
    async fn turn(&mut self) -> bool {
        self.step();
        *self.status.lock().unwrap_or_else(PoisonError::into_inner) = self.sender.status();
        let wake = self.sender.wake();
        let deadline = wake.at_us.map(|at_us| self.clock.instant(at_us).into());
        let woken = tokio::select! {
            dialed = dialed(&mut self.dialing) => Woken::Dialed(dialed),
            progress = progress(&mut self.link) => Woken::Link(progress),
            command = self.commands.recv() => Woken::Command(command),
            // An error is the end of the handle, as no command is.
            Ok(()) = self.paused.changed() => Woken::Paused(*self.paused.borrow_and_update()),
            Ok(()) = self.priority.changed() => Woken::Priority,
            // Looked at in the next step.
            Ok(()) = self.volumes.changed() => {
                self.volumes.mark_changed();
                Woken::Time
            }
            () = sleep_until(deadline) => Woken::Time,
            () = self.doorbell.rung(), if wake.on_publish => Woken::Bell,
        };
        self.doorbell.disarm();
        let now = self.clock.now();
        match woken {
            Woken::Dialed(Ok((send, recv))) => {
                self.dialing = None;
                self.link = Some(Link {
                    send,
                    recv,
                    frames: FrameReader::new(),
                    queue: VecDeque::new(),
                    queued_bytes: 0,
                });
                self.set_stream_priority();
                self.sender.dialed(now);
            }
            Woken::Dialed(Err(error)) => {
                self.dialing = None;
                self.sender.dial_failed(now, &error.0);
            }
            Woken::Link(Ok(Some(frame))) => self.sender.frame(frame, now, &*self.retained),
            Woken::Link(Err(reason)) => {
                self.hang_up();
                self.sender.stream_lost(now, &reason);
            }
            Woken::Command(Some(Command::BeginGeneration(start, retained))) => {
                self.retained = retained;
                self.sender.begin_generation(start, now);
            }
            Woken::Command(Some(Command::Resume)) | Woken::Paused(false) => self.sender.resume(now),
            Woken::Paused(true) => {
                let was_dialing = self.dialing.is_some();
                self.hang_up();
                match was_dialing {
                    true => self.sender.dial_failed(now, PAUSED),
                    false => self.sender.stream_lost(now, PAUSED),
                }
            }
            Woken::Priority => self.set_stream_priority(),
            Woken::Command(None) => return false,
            Woken::Link(Ok(None)) | Woken::Time | Woken::Bell => {}
        }
        true
    }

    fn set_stream_priority(&mut self) {
        let priority = *self.priority.borrow_and_update();
        if let Some(link) = &self.link {
            // It fails only when the stream has ended already: the next one gets it.
            let _ = link.send.set_priority(priority);
        }
    }

    /// Does all that the machine wants now.
    fn step(&mut self) {
        let mut armed = false;
        loop {
            // Before each batch, so that none has records of volumes that its stream doesn't know.
            if self.volumes.has_changed().unwrap_or(false)
                && let Some(volumes) = self.volumes.borrow_and_update().clone()
            {
                self.sender.set_volumes(volumes, self.clock.now());
            }
            let may_send = self.link.as_ref().is_some_and(|link| link.queued_bytes < QUEUED_BYTES_MAX);
            match self.sender.poll(self.clock.now(), &mut *self.retained, may_send) {
                Some(Output::Dial) if *self.paused.borrow() => {
                    self.sender.dial_failed(self.clock.now(), PAUSED);
                }
                Some(Output::Dial) => {
                    let connector = self.connector.clone();
                    self.dialing = Some(Box::pin(async move { connector.open().await }));
                }
                Some(Output::Open(open)) => self.enqueue([open.encode().into()]),
                Some(Output::Batch(batch)) => self.enqueue(batch.chunks),
                Some(Output::Hangup) => self.hang_up(),
                Some(Output::Free { through_seq }) => self.retained.free_through(through_seq),
                Some(Output::Event(event)) => (self.on_event)(event),
                None if !armed && self.sender.wake().on_publish => {
                    self.doorbell.arm();
                    armed = true;
                }
                None => return,
            }
        }
    }

    fn enqueue(&mut self, chunks: impl IntoIterator<Item = Bytes>) {
        let Some(link) = &mut self.link else { return };
        for chunk in chunks {
            link.queued_bytes += chunk.len();
            link.queue.push_back(chunk);
        }
    }

    fn hang_up(&mut self) {
        self.dialing = None;
        if let Some(mut link) = self.link.take() {
            // Both fail only when the stream has ended already, which is what is wanted.
            let _ = link.send.reset(VarInt::from_u32(0));
            let _ = link.recv.stop(VarInt::from_u32(0));
        }
    }
}

async fn dialed(dialing: &mut Option<Dialing>) -> Result<(SendStream, RecvStream), ConnectError> {
    match dialing {
        Some(dialing) => dialing.await,
        None => std::future::pending().await,
    }
}

async fn sleep_until(deadline: Option<tokio::time::Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// The next frame, or nothing when some of the queue went onto the stream. Cancel-safe.
async fn progress(link: &mut Option<Link>) -> Result<Option<Frame>, String> {
    let Some(Link { send, recv, frames, queue, queued_bytes }) = link else {
        return std::future::pending().await;
    };
    let write = async {
        if queue.is_empty() {
            return std::future::pending().await;
        }
        let written = send.write_chunks(queue.make_contiguous()).await.map_err(|error| error.to_string())?;
        queue.drain(..written.chunks);
        *queued_bytes -= written.bytes;
        Ok(None)
    };
    let read = async {
        match frames.next(recv).await {
            Ok(Some(frame)) => Ok(Some(frame)),
            Ok(None) => Err("the target closed the stream".to_owned()),
            Err(error) => Err(error.to_string()),
        }
    };
    tokio::select! {
        written = write => written,
        frame = read => frame,
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use quinn::Endpoint;

    use super::*;
    use crate::api::{GenerationId, JournalId, VmId, VpgId};
    use crate::receive::test_pair::{client_config, server_config};
    use crate::ship::{PlainRing, SenderLimits, StreamIdentity};

    struct Opened(Endpoint, std::net::SocketAddr);

    impl DataConnector for Opened {
        async fn open(&self) -> Result<(SendStream, RecvStream), ConnectError> {
            let connection = self.0.connect(self.1, "localhost").expect("a target").await.expect("connected");
            connection.open_bi().await.map_err(|error| ConnectError(error.to_string()))
        }
    }

    #[tokio::test]
    async fn a_stream_has_the_priority_that_was_set_and_the_next_one_too() {
        let server = Endpoint::server(server_config(), (Ipv4Addr::LOCALHOST, 0).into());
        let server = server.expect("bound");
        let address = server.local_addr().expect("bound");
        let mut client = Endpoint::client((Ipv4Addr::LOCALHOST, 0).into()).expect("bound");
        client.set_default_client_config(client_config());
        let target = tokio::spawn(async move {
            let mut connections = Vec::new();
            while let Some(incoming) = server.accept().await {
                connections.push(incoming.await.expect("connected"));
            }
        });
        let identity = StreamIdentity {
            vm: VmId::random(),
            vpg: VpgId::random(),
            journal: JournalId::random(),
            volumes: Vec::new(),
        };
        let start =
            GenerationStart { generation: GenerationId::random(), ancestors: Vec::new(), first_seq: 1 };
        let sender = Sender::new(identity, start, SenderLimits::STANDARD, 1);
        let (_commands, commands) = mpsc::channel(1);
        let (_paused, paused) = watch::channel(false);
        let (set, priority) = watch::channel(1);
        let mut shell = Shell {
            status: Arc::new(Mutex::new(sender.status())),
            sender,
            retained: Box::new(PlainRing::new(1)),
            doorbell: Arc::new(Doorbell::new()),
            connector: Arc::new(Opened(client, address)),
            on_event: Box::new(|_| {}),
            clock: Clock::start(),
            commands,
            paused,
            priority,
            volumes: watch::channel(None).1,
            link: None,
            dialing: None,
        };
        while shell.link.is_none() {
            assert!(shell.turn().await);
        }
        let of = |shell: &Shell<Opened>| shell.link.as_ref().map(|link| link.send.priority().expect("open"));
        assert_eq!(of(&shell), Some(1));
        set.send(-1).expect("it listens");
        while of(&shell) == Some(1) {
            assert!(shell.turn().await);
        }
        assert_eq!(of(&shell), Some(-1));
        shell.hang_up();
        shell.sender.stream_lost(shell.clock.now(), "cut");
        while shell.link.is_none() {
            assert!(shell.turn().await);
        }
        assert_eq!(of(&shell), Some(-1), "the next stream has it too");
        target.abort();
    }
}
