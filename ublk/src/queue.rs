//! A hardware queue of a ublk device: the source that fetches its requests, hands them to a lane and commits the answers.
//!
//! Copy mode with a new buffer address on each commit: a tag waiting in the driver lends it a slot; a write's data
//! arrives there and the slot moves on to the lane; the answer brings the slot that the tag lends next.

mod descriptors;
mod tags;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};

use io_uring::{opcode, types};
use zerocopy::IntoBytes;

use crate::arena::Arena;
use crate::queue::descriptors::Descriptors;
use crate::queue::tags::{Arrival, Commit, Tags};
use crate::reactor::lane_host::LaneHost;
use crate::reactor::ring::{FixedFile, SourceRing, Token};
use crate::reactor::{Source, SourceBuilder};
use crate::serve::Disk;
use crate::uapi::{self, IoCmd};

/// [`Token::kind`] of fetches and commits; the key is the tag.
const KIND_TAG: u8 = 0;

/// What a queue needs to know of its device.
#[derive(Clone)]
pub(crate) struct QueueConfig {
    /// `/dev/ublkcN`, open: it stays so until the last queue has ended.
    pub(crate) char_file: Arc<File>,
    /// Which queue.
    pub(crate) queue: u16,
    /// How many tags it has.
    pub(crate) depth: u16,
    /// Where the slots come from.
    pub(crate) arena: Arena,
    /// What is served.
    pub(crate) disk: Arc<dyn Disk>,
    /// How much of the disk the device has, in bytes. Grows.
    pub(crate) size_bytes: Arc<AtomicU64>,
    /// First unexpected errno of any queue of the device, or zero.
    pub(crate) fault: Arc<AtomicI32>,
    /// Whether every request that the queue has had is answered; told once it has been stopped.
    pub(crate) at_rest: Arc<AtomicBool>,
}

impl QueueConfig {
    /// Makes the source on its thread and fetches with every tag.
    pub(crate) fn builder(self) -> SourceBuilder {
        Box::new(move |ring| Ok(Box::new(QueueSource::start(self, ring)?) as Box<dyn Source>))
    }
}

struct QueueSource {
    // Fields are dropped in order: the mapping goes before the file that it maps.
    descriptors: Descriptors,
    tags: Tags,
    host: LaneHost,
    commands: CommandFile,
    queue: u16,
    fault: Arc<AtomicI32>,
    stopped: bool,
    at_rest: Arc<AtomicBool>,
    _char_file: Arc<File>,
}

impl QueueSource {
    fn start(config: QueueConfig, ring: &mut SourceRing<'_>) -> io::Result<Self> {
        let QueueConfig { char_file, queue, depth, arena, disk, size_bytes, fault, at_rest } = config;
        let tags = Tags::new(depth, size_bytes, disk.geometry().logical_block_bytes, &arena)
            .ok_or_else(|| io::Error::other("the arena has fewer free slots than the queue has tags"))?;
        // In the table even where commands do not use that place: the ring then holds the device open until its last backing
        // I/O is done, and no successor can take the device over before (A4).
        let place = ring.install(char_file.as_fd())?;
        let commands = if ring.fixed_files_may_wait() {
            CommandFile::Fixed(place)
        } else {
            CommandFile::Descriptor(char_file.as_raw_fd())
        };
        let descriptors = Descriptors::map(&char_file, queue, depth)?;
        let host = LaneHost::open(disk, arena, ring)?;
        let stopped = false;
        let source =
            Self { descriptors, tags, host, commands, queue, fault, stopped, at_rest, _char_file: char_file };
        for tag in 0..depth {
            let fetch = source.tags.fetch(tag);
            source.push(uapi::IO_FETCH_REQ, fetch, ring);
        }
        Ok(source)
    }

    fn push(&self, op: u32, commit: Commit, ring: &mut SourceRing<'_>) {
        push(self.commands, self.queue, op, commit, ring);
    }

    fn tag_completed(&mut self, tag: u16, result: i32, ring: &mut SourceRing<'_>) {
        if result != uapi::IO_RES_OK {
            if result != uapi::IO_RES_ABORT
                && self.fault.compare_exchange(0, result, Ordering::Relaxed, Ordering::Relaxed).is_ok()
            {
                tracing::error!(queue = self.queue, tag, errno = -result, "the ublk driver refused a fetch");
            }
            self.tags.end(tag);
            return;
        }
        match self.tags.arrived(tag, self.descriptors.read(tag)) {
            Arrival::Serve(request) => {
                self.host.request(request, ring);
                self.commit_answers(ring);
            }
            Arrival::Answer(commit) => self.push(uapi::IO_COMMIT_AND_FETCH_REQ, commit, ring),
        }
    }

    fn commit_answers(&mut self, ring: &mut SourceRing<'_>) {
        let (commands, queue, tags) = (self.commands, self.queue, &mut self.tags);
        for commit in self.host.completions().filter_map(|completion| tags.complete(completion)) {
            push(commands, queue, uapi::IO_COMMIT_AND_FETCH_REQ, commit, ring);
        }
    }

    fn look_for_rest(&self) {
        if self.stopped {
            let at_rest = self.tags.none_with_lane() && self.host.transfer_count() == 0;
            self.at_rest.store(at_rest, Ordering::Release);
        }
    }
}

impl Source for QueueSource {
    fn completed(&mut self, token: Token, result: i32, _flags: u32, ring: &mut SourceRing<'_>) {
        if token.kind == KIND_TAG {
            self.tag_completed(token.key as u16, result, ring);
        } else {
            self.host.file_completed(token.key, result, ring);
            self.commit_answers(ring);
        }
        self.look_for_rest();
    }

    fn woken(&mut self, ring: &mut SourceRing<'_>) {
        self.host.wake(ring);
        self.commit_answers(ring);
        self.look_for_rest();
    }

    /// Only the driver can end a queue, by giving back every tag. STOP_DEV does; QUIESCE_DEV gives back those that were
    /// idle when it came, and the others stay armed after their commit until the process ends (seen up to 7.0; a
    /// fix was sent to linux-block in October 2026). So a stopped queue says when it has no request any more.
    fn stopping(&mut self, _ring: &mut SourceRing<'_>) {
        self.stopped = true;
        self.look_for_rest();
    }

    fn finished(&self) -> bool {
        self.tags.all_ended() && self.host.transfer_count() == 0
    }
}

/// How commands name `/dev/ublkcN`.
#[derive(Clone, Copy)]
enum CommandFile {
    Fixed(FixedFile),
    Descriptor(RawFd),
}

fn push(commands: CommandFile, queue: u16, op: u32, commit: Commit, ring: &mut SourceRing<'_>) {
    let Commit { tag, result, address } = commit;
    let command = IoCmd { q_id: queue, tag, result, addr: address };
    let mut payload = [0; 16];
    payload.copy_from_slice(command.as_bytes());
    let entry = match commands {
        CommandFile::Fixed(place) => opcode::UringCmd16::new(place.target(), op).cmd(payload).build(),
        CommandFile::Descriptor(fd) => opcode::UringCmd16::new(types::Fd(fd), op).cmd(payload).build(),
    };
    // SAFETY: the address is that of a slot which the tag owns until this command's completion; the file stays open as
    // long as the source.
    unsafe { ring.push(Token { kind: KIND_TAG, key: u32::from(tag) }, entry) };
}
