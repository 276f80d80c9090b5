//! One connection to a daemon: a task that moves its bytes, and handles by which many calls are under way at once.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout};

use super::error::LibvirtError;
use super::exchange::{Call, Exchange};
use super::message::MessageError;
use super::message::event::Event;
use super::message::procedure::Procedure;
use super::stream::Stream;

/// Calls under way at once. A daemon works at five of one client (`max_client_requests`, whose exceeding it notes once in its log) and leaves
/// the others in the socket, so that more save the round trips of a slow network.
pub(super) const MAX_CALLS: usize = 32;
/// Events that wait to be taken.
const MAX_EVENTS: usize = 256;
/// What is read at once.
const READ_BYTES: usize = 64 << 10;
/// How long saying goodbye may take.
const FAREWELL: Duration = Duration::from_millis(500);

/// How long is waited for a daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// Until it has let the client in.
    pub connect_ms: u64,
    /// For the reply to a call.
    pub call_ms: u64,
    /// For a sign of life; then it is asked for one.
    pub idle_ms: u64,
    /// For all of the inventory.
    pub inventory_ms: u64,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { connect_ms: 10_000, call_ms: 15_000, idle_ms: 5_000, inventory_ms: 60_000 }
    }
}

/// Why a connection ended.
#[derive(Debug, Clone)]
enum End {
    Lost(String),
    Protocol(MessageError),
    Silent { timeout_ms: u64 },
}

/// A connection. Dropped, it says goodbye by itself.
#[derive(Debug)]
pub(super) struct Connection {
    calls: mpsc::Sender<Call>,
    places: Arc<Semaphore>,
    end: Arc<OnceLock<End>>,
    timeouts: Timeouts,
    task: JoinHandle<()>,
}

impl Connection {
    /// Speaks over `stream`. Events, and the connection's end, come from the channel.
    pub(super) fn new(stream: Box<dyn Stream>, timeouts: Timeouts) -> (Self, mpsc::Receiver<Event>) {
        let (calls, queued) = mpsc::channel(MAX_CALLS);
        let (events_in, events) = mpsc::channel(MAX_EVENTS);
        let end = Arc::new(OnceLock::new());
        let (read, write) = tokio::io::split(stream);
        let wire = Wire {
            read,
            write,
            outgoing: Vec::new(),
            sent: 0,
            unflushed: false,
            exchange: Exchange::new(events_in),
        };
        let task = tokio::spawn(wire.run(queued, end.clone(), timeouts));
        let places = Arc::new(Semaphore::new(MAX_CALLS));
        (Self { calls, places, end, timeouts, task }, events)
    }

    /// Calls, and waits for the reply's body up to [`Timeouts::call_ms`] (and as long again for its turn). What the hypervisor can do may take
    /// [`Timeouts::inventory_ms`].
    pub(super) async fn call(
        &self,
        procedure: Procedure,
        arguments: Vec<u8>,
    ) -> Result<Vec<u8>, LibvirtError> {
        // A daemon that was just installed runs each emulator to find out.
        let timeout_ms = match procedure {
            Procedure::GetCapabilities => self.timeouts.inventory_ms,
            _ => self.timeouts.call_ms,
        };
        let limit = Duration::from_millis(timeout_ms);
        let late = || LibvirtError::Timeout { what: procedure.to_string(), timeout_ms };
        let place = timeout(limit, self.places.clone().acquire_owned()).await.map_err(|_| late())?;
        let place = place.map_err(|_| self.ended())?;
        let asked = async {
            let (reply, answer) = oneshot::channel();
            let call = Call { procedure, arguments, reply, place };
            self.calls.send(call).await.map_err(|_| self.ended())?;
            answer.await.unwrap_or_else(|_| Err(self.ended()))
        };
        timeout(limit, asked).await.unwrap_or_else(|_| Err(late()))
    }

    /// Whether it has ended.
    pub(super) fn has_ended(&self) -> bool {
        self.end.get().is_some()
    }

    /// Why it has ended.
    pub(super) fn ended(&self) -> LibvirtError {
        self.end.get().map_or_else(|| LibvirtError::Lost("it was closed".into()), End::error)
    }

    /// Says goodbye and waits until that is done.
    pub(super) async fn close(self) {
        drop(self.calls);
        let _ = self.task.await;
    }
}

impl End {
    fn error(&self) -> LibvirtError {
        match self {
            Self::Lost(reason) => LibvirtError::Lost(reason.clone()),
            Self::Protocol(error) => LibvirtError::Protocol(error.clone()),
            Self::Silent { timeout_ms } => {
                LibvirtError::Timeout { what: "a sign of life".into(), timeout_ms: *timeout_ms }
            }
        }
    }
}

/// The task's side.
struct Wire {
    read: ReadHalf<Box<dyn Stream>>,
    write: WriteHalf<Box<dyn Stream>>,
    outgoing: Vec<u8>,
    /// How much of `outgoing` is sent.
    sent: usize,
    /// TLS keeps what it was given until it is told to flush.
    unflushed: bool,
    exchange: Exchange,
}

impl Wire {
    async fn run(mut self, mut queued: mpsc::Receiver<Call>, end: Arc<OnceLock<End>>, timeouts: Timeouts) {
        match self.exchange_until_end(&mut queued, timeouts).await {
            Ok(()) => {
                let _ = timeout(FAREWELL, self.say_goodbye()).await;
                let _ = end.set(End::Lost("it was closed".into()));
            }
            Err(reason) => {
                tracing::debug!(reason = %reason.error(), "a connection to libvirt has ended");
                let _ = end.set(reason);
            }
        }
        // Those that come now find the channel closed, and the reason.
        queued.close();
        self.exchange
            .end(|| end.get().map_or_else(|| LibvirtError::Lost("it was closed".into()), End::error));
    }

    /// Moves bytes until nobody holds the connection any more, or it breaks.
    async fn exchange_until_end(
        &mut self,
        queued: &mut mpsc::Receiver<Call>,
        timeouts: Timeouts,
    ) -> Result<(), End> {
        let lost = |error: std::io::Error| End::Lost(error.to_string());
        let idle = Duration::from_millis(timeouts.idle_ms);
        let mut chunk = vec![0; READ_BYTES];
        let mut wake_at = Instant::now() + idle;
        loop {
            let unsent = self.outgoing.get(self.sent..).unwrap_or_default();
            tokio::select! {
                read = self.read.read(&mut chunk) => {
                    let len_bytes = read.map_err(lost)?;
                    if len_bytes == 0 {
                        return Err(End::Lost("the daemon closed it".into()));
                    }
                    self.exchange.received(chunk.get(..len_bytes).unwrap_or_default()).map_err(End::Protocol)?;
                    if !self.exchange.pings() {
                        wake_at = Instant::now() + idle;
                    }
                }
                pushed = push(&mut self.write, unsent), if !unsent.is_empty() || self.unflushed => {
                    let len_bytes = pushed.map_err(lost)?;
                    self.sent += len_bytes;
                    self.unflushed = len_bytes > 0;
                    if self.sent == self.outgoing.len() {
                        self.outgoing.clear();
                        self.sent = 0;
                    }
                }
                call = queued.recv(), if unsent.is_empty() => match call {
                    Some(call) => self.outgoing = self.exchange.call(call),
                    None => return Ok(()),
                },
                () = sleep_until(wake_at) => {
                    if self.exchange.pings() {
                        return Err(End::Silent { timeout_ms: timeouts.call_ms });
                    }
                    let ping = self.exchange.ping();
                    self.outgoing.extend(ping);
                    wake_at = Instant::now() + Duration::from_millis(timeouts.call_ms);
                }
            }
        }
    }

    async fn say_goodbye(&mut self) -> std::io::Result<()> {
        let farewell = self.exchange.farewell();
        self.outgoing.extend(farewell);
        self.write.write_all(self.outgoing.get(self.sent..).unwrap_or_default()).await?;
        self.write.flush().await?;
        let mut chunk = [0; 4096];
        while self.exchange.pings() {
            let len_bytes = self.read.read(&mut chunk).await?;
            if len_bytes == 0 || self.exchange.received(chunk.get(..len_bytes).unwrap_or_default()).is_err() {
                break;
            }
        }
        self.write.shutdown().await
    }
}

/// Sends some of `bytes`, or has sent what was kept back if there are none. Cancel safe: one or the other, and as a whole.
async fn push(write: &mut WriteHalf<Box<dyn Stream>>, bytes: &[u8]) -> std::io::Result<usize> {
    if bytes.is_empty() { write.flush().await.map(|()| 0) } else { write.write(bytes).await }
}
