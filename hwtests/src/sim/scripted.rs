//! A source that does what the protocol allows and the product's own source never does: it takes checkpoints inside syncs, uses
//! numbers again that no target holds, leaves numbers out as void, and begins a sync before it was granted anything. What it
//! publishes is shipped by the product's sender.

use bytes::Bytes;
use journal::batch::{Checkpoint, CheckpointKind, Epoch, Record};
use uuid::Uuid;
use vra::api::GenerationId;
use vra::ship::{GenerationStart, PlainRing, SenderEvent, StreamIdentity};

use super::env::Env;
use super::ledger::{Image, Ledger, Promise, apply};
use super::shipper::Shipper;
use super::streams::{Answer, StreamKey, Streams};

/// How much a sync reads at once, in bytes.
const SYNC_CHUNK_BYTES: usize = 8 << 10;
/// Generations that a stream names at most.
const MOST_ANCESTORS: usize = 60;

pub(super) struct Script {
    disks: Image,
    /// A cut that was noted; its record comes later.
    noted: Option<(u64, Image, bool)>,
    sync: Option<Sync>,
    next_seq: u64,
    time_us: u64,
    epoch_counter: u64,
    start: GenerationStart,
    ring: PlainRing,
    shipper: Shipper,
    /// All batches have one small record, so that they are equally long and stale ones stand where new ones end.
    uniform: bool,
}

#[derive(Debug)]
struct Sync {
    id: u64,
    volume: usize,
    offset_bytes: usize,
}

impl Script {
    pub(super) fn new(identity: StreamIdentity, ledger: &mut Ledger, env: &mut Env) -> Self {
        let uniform = env.rng.one_in(4);
        let most_records = if uniform { 1 } else { 12 };
        let start = GenerationStart { generation: any_generation(env), ancestors: Vec::new(), first_seq: 1 };
        let mut script = Self {
            disks: ledger.volume_bytes().iter().map(|len_bytes| vec![0; *len_bytes]).collect(),
            noted: None,
            sync: None,
            next_seq: 1,
            time_us: 1_000_000,
            epoch_counter: 0,
            ring: PlainRing::new(1),
            shipper: Shipper::new(identity, start.clone(), most_records, env),
            start,
            uniform,
        };
        script.begin_sync(ledger, env);
        script
    }

    /// The newest number.
    pub(super) fn last_seq(&self) -> u64 {
        self.next_seq - 1
    }

    pub(super) fn is_syncing(&self) -> bool {
        self.sync.is_some()
    }

    pub(super) fn shipper(&self) -> &Shipper {
        &self.shipper
    }

    /// The source lost what it retained: a new generation, which goes on after the target's tail, with a full sync.
    pub(super) fn fork(&mut self, tail_seq: u64, ledger: &mut Ledger, env: &mut Env) {
        ledger.forked(tail_seq, u64::MAX);
        self.noted = None;
        self.start.ancestors.insert(0, self.start.generation);
        self.start.ancestors.truncate(MOST_ANCESTORS);
        self.start.generation = any_generation(env);
        // Numbers may go on right after the tail, so that nothing but the chain tells old records from new ones.
        self.start.first_seq = tail_seq + 1 + if env.rng.one_in(2) { 0 } else { env.rng.below(9) };
        self.next_seq = self.start.first_seq;
        self.ring = PlainRing::new(self.next_seq);
        self.shipper.begin_generation(self.start.clone(), env);
        self.begin_sync(ledger, env);
    }

    /// One thing that the source does.
    pub(super) fn step(&mut self, ledger: &mut Ledger, env: &mut Env) {
        match env.rng.below(20) {
            0..=8 => self.write(ledger, env),
            9 => self.zeroes(ledger, env),
            10 => self.publish(ledger, env, Record::void),
            11 | 12 => self.checkpoint(ledger, env),
            _ if self.sync.is_some() => self.sync_step(ledger, env),
            _ => self.write(ledger, env),
        }
    }

    pub(super) fn drive(
        &mut self,
        streams: &mut Streams,
        ledger: &mut Ledger,
        env: &mut Env,
    ) -> Result<(), String> {
        for event in self.shipper.drive(&mut self.ring, streams, ledger, env)? {
            if let SenderEvent::Stopped(reason) = event {
                return Err(format!("the sender stopped: {reason}"));
            }
        }
        Ok(())
    }

    pub(super) fn answer_dial(&mut self, reachable: bool, streams: &mut Streams, env: &Env) {
        self.shipper.answer_dial(reachable, streams, env);
    }

    pub(super) fn take(&mut self, key: StreamKey, answers: Vec<Answer>, env: &Env) {
        self.shipper.take(key, answers, &self.ring, env);
    }

    fn publish(&mut self, ledger: &mut Ledger, env: &mut Env, make: impl FnOnce(u64, u64) -> Record) {
        self.time_us += 1 + env.rng.below(1000);
        let record = make(self.next_seq, self.time_us);
        self.next_seq += 1;
        if record.kind != journal::batch::RecordKind::SyncData {
            apply(&mut self.disks, &record);
        }
        ledger.published(record.clone());
        self.ring.publish(record);
    }

    fn place(&self, env: &mut Env) -> (u16, u64, usize) {
        let volume = env.any_index(self.disks.len());
        let sectors = self.disks[volume].len() as u64 / 512;
        let count = match (self.uniform, env.rng.below(4)) {
            (true, _) => 1 + env.rng.below(7),
            (false, 0) => 1 + env.rng.below(16),
            (false, _) => 1 + env.rng.below(3),
        };
        // Few places, so that writes overlap.
        let first = env.rng.below(sectors) / 3 * 3 % (sectors - count);
        (volume as u16, first * 512, (count * 512) as usize)
    }

    pub(super) fn write(&mut self, ledger: &mut Ledger, env: &mut Env) {
        let (volume, offset_bytes, len_bytes) = self.place(env);
        let mut data = vec![0; len_bytes];
        for chunk in data.chunks_mut(8) {
            chunk.copy_from_slice(&env.rng.next_u64().to_le_bytes());
        }
        self.publish(ledger, env, |seq, time_us| {
            Record::write(seq, time_us, volume, offset_bytes, data.into())
        });
    }

    pub(super) fn zeroes(&mut self, ledger: &mut Ledger, env: &mut Env) {
        let (volume, offset_bytes, len_bytes) = self.place(env);
        self.publish(ledger, env, |seq, time_us| {
            Record::zeroes(seq, time_us, volume, offset_bytes, len_bytes as u64)
        });
    }

    /// Notes a cut, or publishes the record of the one noted before.
    pub(super) fn checkpoint(&mut self, ledger: &mut Ledger, env: &mut Env) {
        let Some((cut, image, counts)) = self.noted.take() else {
            self.noted = Some((self.next_seq - 1, self.disks.clone(), self.sync.is_none()));
            return;
        };
        self.epoch_counter += 1;
        let checkpoint = Checkpoint {
            epoch: Epoch { nonce: Uuid::from_u128(0xc00d), counter: self.epoch_counter },
            cut,
            member_set_version: 1,
            time_us: self.time_us,
            kind: CheckpointKind::Automatic,
            tag: String::new(),
        };
        self.publish(ledger, env, |seq, time_us| Record::checkpoint(seq, time_us, &checkpoint));
        ledger.promised(Promise { checkpoint, seq: self.next_seq - 1, image, counts });
    }

    fn begin_sync(&mut self, ledger: &mut Ledger, env: &mut Env) {
        let id = env.rng.next_u64() | 1;
        self.sync = Some(Sync { id, volume: 0, offset_bytes: 0 });
        for (volume, len_bytes) in self.volumes() {
            self.publish(ledger, env, |seq, time_us| Record::sync_begin(seq, time_us, volume, len_bytes, id));
        }
    }

    pub(super) fn sync_step(&mut self, ledger: &mut Ledger, env: &mut Env) {
        let Some(mut sync) = self.sync.take() else { return };
        let Sync { id, volume, offset_bytes } = sync;
        if volume == self.disks.len() {
            for (volume, len_bytes) in self.volumes() {
                self.publish(ledger, env, |seq, time_us| {
                    Record::sync_end(seq, time_us, volume, len_bytes, id)
                });
            }
            return;
        }
        let chunk =
            Bytes::copy_from_slice(&self.disks[volume][offset_bytes..offset_bytes + SYNC_CHUNK_BYTES]);
        let is_hole = chunk.iter().all(|byte| *byte == 0);
        self.publish(ledger, env, |seq, time_us| {
            let (volume, offset_bytes) = (volume as u16, offset_bytes as u64);
            if is_hole {
                let len_bytes = SYNC_CHUNK_BYTES as u64;
                let zeroes = Record::zeroes(seq, time_us, volume, offset_bytes, len_bytes);
                return Record { sync_id: id, ..zeroes };
            }
            Record::sync_data(seq, time_us, volume, offset_bytes, id, chunk)
        });
        sync.offset_bytes += SYNC_CHUNK_BYTES;
        if sync.offset_bytes == self.disks[volume].len() {
            (sync.volume, sync.offset_bytes) = (volume + 1, 0);
        }
        self.sync = Some(sync);
    }

    fn volumes(&self) -> Vec<(u16, u64)> {
        (0_u16..).zip(self.disks.iter().map(|disk| disk.len() as u64)).collect()
    }
}

fn any_generation(env: &mut Env) -> GenerationId {
    GenerationId(Uuid::from_u64_pair(env.rng.next_u64(), env.rng.next_u64() | 1))
}
