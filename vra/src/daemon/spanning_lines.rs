//! Lines between the source VRAs of VPGs that span hosts: each VRA has one to every other for what it says, and takes one from each.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use quinn::VarInt;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinHandle};

use super::linking::SharedLink;
use super::{Daemon, lock};
use crate::api::VraId;
use crate::api::vpg::VraEndpoint;
use crate::link::{Accepted, StreamKind, close_code};
use crate::report::chain;
use crate::wire::{Frame, FrameReader, GroupMessage};

/// Messages that wait for a line at most; more are dropped. The protocol says everything again that matters.
const QUEUE: usize = 128;

/// After a line has ended, or couldn't be opened, the next try comes so much later.
const AGAIN_AFTER: Duration = Duration::from_millis(300);

/// What waits for a line that isn't wanted any more may go for so long: an abort lets guests go on sooner than a deadline does.
const DRAIN_FOR: Duration = Duration::from_millis(200);

/// What these few bytes say is worth more than the data that shares a connection with them.
const PRIORITY: i32 = 10;

/// The lines.
#[derive(Default)]
pub(super) struct Lines {
    to: Mutex<BTreeMap<VraId, Line>>,
    from: Mutex<BTreeMap<VraId, AbortHandle>>,
}

struct Line {
    endpoint: VraEndpoint,
    queue: mpsc::Sender<GroupMessage>,
    task: JoinHandle<()>,
}

impl Lines {
    /// Has lines to these VRAs, and to no other. Must be called inside tokio.
    pub(super) fn follow<'a>(&self, peers: impl Iterator<Item = &'a VraEndpoint>, link: &SharedLink) {
        let mut lines = lock(&self.to);
        let mut former = std::mem::take(&mut *lines);
        for endpoint in peers {
            let same =
                former.extract_if(.., |id, line| *id == endpoint.id && line.endpoint == *endpoint).next();
            let line = same.map_or_else(|| Line::start(endpoint, link), |(_, line)| line);
            lines.insert(endpoint.id, line);
        }
        for line in former.into_values() {
            tokio::spawn(line.end());
        }
        // What comes from a VRA that is no peer any more isn't taken: its line costs nothing until it ends.
        lock(&self.from).retain(|vra, line| lines.contains_key(vra) && !line.is_finished());
    }

    /// Has no line any more; what waits for one may still go, for a moment.
    pub(super) async fn close(&self) {
        lock(&self.from).values().for_each(AbortHandle::abort);
        let lines = std::mem::take(&mut *lock(&self.to));
        let ends: Vec<JoinHandle<()>> = lines.into_values().map(|line| tokio::spawn(line.end())).collect();
        for end in ends {
            let _ = end.await;
        }
    }

    /// Sends a message if its line is up, or drops it.
    pub(super) fn send(&self, to: VraId, message: GroupMessage) {
        if let Some(line) = lock(&self.to).get(&to) {
            let _ = line.queue.try_send(message);
        }
    }

    /// A peer has one line to this VRA: the newest.
    fn taken(&self, from: VraId, line: AbortHandle) {
        if let Some(former) = lock(&self.from).insert(from, line) {
            former.abort();
        }
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        lock(&self.to).values().for_each(|line| line.task.abort());
    }
}

impl Line {
    fn start(endpoint: &VraEndpoint, link: &SharedLink) -> Self {
        let (queue, messages) = mpsc::channel(QUEUE);
        let task = tokio::spawn(keep_line(Arc::clone(link), endpoint.clone(), messages));
        Self { endpoint: endpoint.clone(), queue, task }
    }

    /// Takes no more messages, and ends when those that wait have gone or a moment has.
    async fn end(self) {
        let Self { queue, mut task, .. } = self;
        drop(queue);
        if tokio::time::timeout(DRAIN_FOR, &mut task).await.is_err() {
            task.abort();
        }
    }
}

/// Opens the line again whenever it ends, until nobody has messages for it any more.
async fn keep_line(link: SharedLink, to: VraEndpoint, mut messages: mpsc::Receiver<GroupMessage>) {
    loop {
        if let Err(reason) = one_line(&link, &to, &mut messages).await {
            tracing::debug!(peer = %to.id, reason, "no line to a VRA that has checkpoints with this one");
        }
        if messages.is_closed() {
            return;
        }
        tokio::time::sleep(AGAIN_AFTER).await;
    }
}

async fn one_line(
    link: &SharedLink,
    to: &VraEndpoint,
    messages: &mut mpsc::Receiver<GroupMessage>,
) -> Result<(), String> {
    let up = lock(link).link().ok_or("the link is not up")?;
    let peer = up.peer(to);
    let (_, mut send, _recv) = peer.open(&up, StreamKind::Group).await.map_err(|error| chain(&error))?;
    let _ = send.set_priority(PRIORITY);
    // What waited for the line says how it was.
    while messages.try_recv().is_ok() {}
    while let Some(message) = messages.recv().await {
        send.write_all(&message.encode()).await.map_err(|error| error.to_string())?;
    }
    // It isn't wanted any more. What was written is to arrive before the connection may go; its owner waits for a moment at most.
    if send.finish().is_ok() {
        let _ = send.stopped().await;
    }
    Ok(())
}

impl Daemon {
    /// Takes a line that another VRA opened.
    pub(super) fn take_group_stream(self: &Arc<Self>, stream: Accepted) {
        let Some(from) = stream.peer.identity.as_vra() else { return };
        if !self.spanning.is_peer(from) {
            // Its definition may have come before ours: it opens the line again.
            tracing::debug!(peer = %from, "refused a line: no VPG here has checkpoints with that VRA");
            refuse(stream, close_code::FORBIDDEN);
            return;
        }
        let daemon = Arc::clone(self);
        let line = tokio::spawn(async move { daemon.listen(from, stream).await });
        self.spanning.lines().taken(from, line.abort_handle());
    }

    async fn listen(&self, from: VraId, mut stream: Accepted) {
        let mut reader = FrameReader::new();
        loop {
            match reader.next(&mut stream.recv).await {
                Ok(Some(Frame::Group(message))) => {
                    self.spanning.receive(from, message, &self.checkpointer);
                }
                Ok(None) => return,
                Ok(Some(frame)) => {
                    tracing::warn!(peer = %from, frame = frame.name(), "reset a line on which a frame of another stream came");
                    return refuse(stream, close_code::PROTOCOL);
                }
                Err(crate::wire::ReadFrameError::Wire(error)) => {
                    tracing::warn!(peer = %from, error = chain(&error), "reset a line on which a bad frame came");
                    return refuse(stream, close_code::PROTOCOL);
                }
                Err(error) => {
                    tracing::debug!(peer = %from, error = chain(&error), "a line ended");
                    return;
                }
            }
        }
    }
}

fn refuse(mut stream: Accepted, code: u32) {
    let _ = stream.send.reset(VarInt::from_u32(code));
    let _ = stream.recv.stop(VarInt::from_u32(code));
}
