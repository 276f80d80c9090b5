//! A full sync of a VM's volumes as one transaction, sans-I/O: which range to look at next, and what to do with what was
//! found. Data takes its place in the order of the guest's writes under B3; see `capture::numbering`.

use crate::capture::modes::PublishRefusal;
use crate::capture::numbering::{ByteRange, Confirmed, SyncContent, VmCore, WatchId};
use crate::capture::payload::Piece;
use crate::clock::Now;

/// Longest range that is read at once, and so the longest that is ever held, in bytes.
pub const CHUNK_BYTES: u64 = 256 << 10;

/// Longest range that is asked for holes at once, in bytes.
pub const HOLE_SPAN_BYTES: u64 = 1 << 30;

/// Tries after which the range of a read is held.
const TRIES_BEFORE_HOLD: u32 = 3;

/// A volume to be synced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SyncVolume {
    /// Its number within the VM.
    pub volume: u16,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Its logical block size in bytes: no range ends inside a block.
    pub block_bytes: u32,
}

/// Bounds of a sync.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SyncLimits {
    /// Above this share of the VM's retained memory, in percent, the sync waits, so that the rest is the guest's.
    pub fill_percent_max: u64,
    /// Bytes of local disk that it reads in a second at most.
    pub bytes_per_second: u64,
    /// How long it waits before it looks again, where it waits, in µs.
    pub pause_us: u64,
    /// How long it waits after a failed read before it tries again, in µs.
    pub retry_us: u64,
}

impl SyncLimits {
    /// What the product uses.
    pub const STANDARD: Self =
        Self { fill_percent_max: 50, bytes_per_second: 512 << 20, pause_us: 2_000, retry_us: 1_000_000 };
}

/// What the sync wants done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyncStep {
    /// Find out whether the volume has data or a hole at the range's start and where that ends; answer with
    /// [`FullSync::probed`].
    Probe {
        /// The volume.
        volume: u16,
        /// Where to look.
        range: ByteRange,
    },
    /// Read the range; answer with [`FullSync::read`] or [`FullSync::read_failed`].
    Read {
        /// The volume.
        volume: u16,
        /// What to read.
        range: ByteRange,
    },
    /// Ask again when the core wakes the syncer, and at this time at the latest.
    Wait {
        /// In µs, by the monotonic clock.
        until_us: u64,
    },
    /// The sync is complete: its end is published.
    Done,
    /// The stretch of numbers that it belonged to is over.
    Aborted,
}

/// What lies at the start of a probed range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Data, or a hole.
    pub is_data: bool,
    /// The first byte after it; may lie beyond the probed range.
    pub end: u64,
}

/// How far a sync is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SyncCounts {
    /// Bytes of all volumes.
    pub total_bytes: u64,
    /// Bytes that are done: sent, or found to be holes.
    pub done_bytes: u64,
    /// Bytes that were sent as data.
    pub data_bytes: u64,
    /// Reads that a write of the guest made useless.
    pub reads_repeated: u64,
    /// Ranges that had to be held.
    pub ranges_held: u64,
    /// Reads that the local disk failed.
    pub reads_failed: u64,
}

/// One sync transaction.
#[derive(Debug)]
pub struct FullSync {
    sync_id: u64,
    volumes: Vec<SyncVolume>,
    /// The target's images are fresh: holes need not be sent (B6).
    fresh_image: bool,
    limits: SyncLimits,
    at: usize,
    offset: u64,
    /// Data is known to reach up to here.
    data_until: u64,
    /// How long a range is asked for holes now.
    span_bytes: u64,
    tries: u32,
    state: State,
    counts: SyncCounts,
    /// Before this time nothing is read.
    earliest_us: u64,
}

#[derive(Clone, Copy, Debug)]
enum State {
    /// Nothing is under way.
    Idle,
    /// The range is held and drains.
    Draining {
        range: ByteRange,
    },
    /// A probe is under way.
    Probing {
        watch: WatchId,
        range: ByteRange,
    },
    /// A read is under way.
    Reading {
        watch: WatchId,
        range: ByteRange,
        held: bool,
    },
    Done,
    Aborted,
}

impl FullSync {
    /// A sync whose begin is published already.
    pub fn new(sync_id: u64, volumes: Vec<SyncVolume>, fresh_image: bool, limits: SyncLimits) -> Self {
        let total_bytes = volumes.iter().map(|volume| volume.size_bytes).sum();
        Self {
            sync_id,
            volumes,
            fresh_image,
            limits,
            at: 0,
            offset: 0,
            data_until: 0,
            span_bytes: HOLE_SPAN_BYTES,
            tries: 0,
            state: State::Idle,
            counts: SyncCounts { total_bytes, ..SyncCounts::default() },
            earliest_us: 0,
        }
    }

    /// What to do next. Called again only after the last step was answered or its time has come. `has_buffer` says whether
    /// there is memory for a read of [`CHUNK_BYTES`].
    pub fn next(&mut self, core: &VmCore, now: Now, has_buffer: bool) -> SyncStep {
        match self.state {
            State::Done => SyncStep::Done,
            State::Aborted => SyncStep::Aborted,
            State::Draining { range } => self.read_when_drained(core, range, now),
            // Its answer never came: the range is looked at again.
            State::Probing { watch, .. } | State::Reading { watch, .. } => {
                self.forget(core, watch);
                self.next(core, now, has_buffer)
            }
            State::Idle => self.begin(core, now, has_buffer),
        }
    }

    /// Answers [`SyncStep::Probe`].
    pub fn probed(&mut self, core: &VmCore, extent: Extent, now: Now) {
        let State::Probing { watch, range } = self.state else { return };
        self.state = State::Idle;
        let block_bytes = u64::from(self.volumes[self.at].block_bytes);
        let hole_end = extent.end.min(range.end) / block_bytes * block_bytes;
        if extent.is_data || hole_end <= range.start {
            core.with(|core, _| core.end_watch(watch));
            let data_end = extent.end.next_multiple_of(block_bytes).max(range.start + block_bytes);
            self.data_until = if extent.is_data { data_end } else { range.start + block_bytes };
            return;
        }
        let hole = ByteRange { start: range.start, end: hole_end };
        let content = if self.fresh_image { SyncContent::Skip } else { SyncContent::Zeroes };
        self.confirm(core, watch, hole, &content, false, now);
    }

    /// Answers [`SyncStep::Read`]: the data, or none if it was all zeroes.
    pub fn read(&mut self, core: &VmCore, data: Option<Piece>, now: Now) {
        let State::Reading { watch, range, held } = self.state else { return };
        let bytes_per_second = self.limits.bytes_per_second.max(1);
        self.earliest_us =
            self.earliest_us.max(now.mono_us) + range.len_bytes() * 1_000_000 / bytes_per_second;
        let data_bytes = if data.is_some() { range.len_bytes() } else { 0 };
        let content = data.map_or(SyncContent::Zeroes, SyncContent::Data);
        if self.confirm(core, watch, range, &content, held, now) {
            self.counts.data_bytes += data_bytes;
        }
    }

    /// Answers [`SyncStep::Read`] or [`SyncStep::Probe`]: the local disk failed. It is tried again later: a sync that left
    /// a range out would be no sync.
    pub fn read_failed(&mut self, core: &VmCore, now: Now) {
        if let State::Probing { watch, .. } | State::Reading { watch, .. } = self.state {
            self.forget(core, watch);
        }
        self.counts.reads_failed += 1;
        self.tries = 0;
        self.earliest_us = now.mono_us + self.limits.retry_us;
    }

    /// Gives up: nothing stays held or watched. The sync's end will never be published.
    pub fn cancel(&mut self, core: &VmCore) {
        let Some(SyncVolume { volume, .. }) = self.volumes.get(self.at) else { return };
        if let State::Probing { watch, .. } | State::Reading { watch, .. } = self.state {
            core.with(|core, _| core.end_watch(watch));
        }
        core.with(|core, wakeups| core.release_range(*volume, wakeups));
        self.state = State::Aborted;
    }

    /// How far it is.
    pub fn counts(&self) -> SyncCounts {
        self.counts
    }

    fn forget(&mut self, core: &VmCore, watch: WatchId) {
        core.with(|core, wakeups| {
            core.end_watch(watch);
            core.release_range(self.volumes[self.at].volume, wakeups);
        });
        self.state = State::Idle;
    }

    fn begin(&mut self, core: &VmCore, now: Now, has_buffer: bool) -> SyncStep {
        if core.with(|core, _| core.sync_id()) != Some(self.sync_id) {
            self.state = State::Aborted;
            return SyncStep::Aborted;
        }
        while self.at < self.volumes.len() && self.offset == self.volumes[self.at].size_bytes {
            (self.at, self.offset, self.data_until) = (self.at + 1, 0, 0);
        }
        if self.at == self.volumes.len() {
            return self.end(core, now);
        }
        let paused = core.with(|core, _| core.fill_percent()) >= self.limits.fill_percent_max;
        if self.earliest_us > now.mono_us || paused || !has_buffer {
            let until_us = self.earliest_us.max(now.mono_us + self.limits.pause_us);
            return SyncStep::Wait { until_us };
        }
        let SyncVolume { volume, size_bytes, .. } = self.volumes[self.at];
        if self.offset >= self.data_until {
            let range = ByteRange::new(self.offset, self.span_bytes.min(size_bytes - self.offset));
            return match core.with(|core, _| core.watch(volume, range)) {
                Some(watch) => {
                    self.state = State::Probing { watch, range };
                    SyncStep::Probe { volume, range }
                }
                None => self.wait(now),
            };
        }
        let range = ByteRange {
            start: self.offset,
            end: self.data_until.min(size_bytes).min(self.offset + CHUNK_BYTES),
        };
        if self.tries < TRIES_BEFORE_HOLD {
            return self.watch_and_read(core, range, false, now);
        }
        match core.with(|core, _| core.hold_range(volume, range)) {
            Ok(()) => {
                self.counts.ranges_held += 1;
                self.read_when_drained(core, range, now)
            }
            Err(_) => {
                self.state = State::Aborted;
                SyncStep::Aborted
            }
        }
    }

    fn read_when_drained(&mut self, core: &VmCore, range: ByteRange, now: Now) -> SyncStep {
        if core.with(|core, _| core.sync_id()) != Some(self.sync_id) {
            self.state = State::Aborted;
            return SyncStep::Aborted;
        }
        let volume = self.volumes[self.at].volume;
        if core.with(|core, _| core.is_range_drained(volume, range)) {
            return self.watch_and_read(core, range, true, now);
        }
        self.state = State::Draining { range };
        self.wait(now)
    }

    fn watch_and_read(&mut self, core: &VmCore, range: ByteRange, held: bool, now: Now) -> SyncStep {
        let volume = self.volumes[self.at].volume;
        match core.with(|core, _| core.watch(volume, range)) {
            Some(watch) => {
                self.state = State::Reading { watch, range, held };
                SyncStep::Read { volume, range }
            }
            None => {
                core.with(|core, wakeups| core.release_range(volume, wakeups));
                self.state = State::Idle;
                self.wait(now)
            }
        }
    }

    /// Gives a range its place in the order if nothing came between. Says whether it is done.
    fn confirm(
        &mut self,
        core: &VmCore,
        watch: WatchId,
        range: ByteRange,
        content: &SyncContent,
        held: bool,
        now: Now,
    ) -> bool {
        let volume = self.volumes[self.at].volume;
        let confirmed = core.with(|core, wakeups| {
            let confirmed = core.confirm(watch, range, content, now.wall_us, wakeups);
            if held {
                core.release_range(volume, wakeups);
            }
            confirmed
        });
        self.state = State::Idle;
        match confirmed {
            Ok(Confirmed::Done) => {
                self.counts.done_bytes += range.len_bytes();
                self.offset = range.end;
                self.tries = 0;
                self.span_bytes = (self.span_bytes * 2).min(HOLE_SPAN_BYTES);
                return true;
            }
            Ok(Confirmed::ReadAgain) => {
                self.counts.reads_repeated += 1;
                if self.offset >= self.data_until {
                    self.shrink_span();
                } else {
                    self.tries += 1;
                }
            }
            Err(PublishRefusal::NoRoom) => self.earliest_us = now.mono_us + self.limits.pause_us,
            Err(_) => self.state = State::Aborted,
        }
        false
    }

    /// Guests write into the hole that was asked for: ask for less, at last treat it as data, which can be held.
    fn shrink_span(&mut self) {
        if self.span_bytes > CHUNK_BYTES {
            self.span_bytes = (self.span_bytes / 16).max(CHUNK_BYTES);
        } else {
            self.data_until = self.offset + CHUNK_BYTES;
        }
    }

    fn end(&mut self, core: &VmCore, now: Now) -> SyncStep {
        let volumes: Vec<(u16, u64)> =
            self.volumes.iter().map(|volume| (volume.volume, volume.size_bytes)).collect();
        match core.with(|core, wakeups| core.end_sync(self.sync_id, &volumes, now.wall_us, wakeups)) {
            Ok(_) => {
                self.state = State::Done;
                SyncStep::Done
            }
            Err(PublishRefusal::NoRoom) => self.wait(now),
            Err(_) => {
                self.state = State::Aborted;
                SyncStep::Aborted
            }
        }
    }

    fn wait(&self, now: Now) -> SyncStep {
        SyncStep::Wait { until_us: now.mono_us + self.limits.pause_us }
    }
}
