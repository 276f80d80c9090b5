//! The source, and what it was promised: its guest's disks, everything that it published, and what each checkpoint must
//! hold.

use std::collections::HashSet;

use bytes::Bytes;
use journal::batch::{Checkpoint, CheckpointKind, Epoch, Record, RecordKind};
use journal::format::ChainPoint;
use journal::storage::sim::SimRng;
use uuid::Uuid;

/// Sizes of the guest's disks, in bytes.
pub(super) const DISK_BYTES: [usize; 2] = [64 << 10, 32 << 10];
/// How much a sync reads at once, in bytes.
const SYNC_CHUNK_BYTES: usize = 8 << 10;

/// All disks of the VM at one moment.
pub(super) type Image = Vec<Vec<u8>>;

/// A checkpoint that was published, and what a view of it must show.
#[derive(Clone, Debug)]
pub(super) struct Promise {
    pub(super) checkpoint: Checkpoint,
    /// Its record's number.
    pub(super) seq: u64,
    /// The guest's disks at the cut.
    pub(super) image: Image,
    /// No sync was under way at the cut: it counts (B5).
    pub(super) counts: bool,
}

#[derive(Debug)]
pub(super) struct Model {
    rng: SimRng,
    disks: Image,
    /// Every record that the target may have, in order.
    stream: Vec<Record>,
    promises: Vec<Promise>,
    /// A cut that was noted; its record comes later.
    noted: Option<(u64, Image, bool)>,
    sync: Option<Sync>,
    next_seq: u64,
    time_us: u64,
    epoch_counter: u64,
    pub(super) generation: Uuid,
    pub(super) parent: Uuid,
    /// First number of the generation.
    pub(super) first_seq: u64,
    /// Where batches ended that were sent.
    sent: HashSet<ChainPoint>,
    /// All batches have one small record, so that they are equally long and stale ones stand where new ones end.
    uniform: bool,
    /// What the target said is durable: the source has forgotten it.
    pub(super) acked: u64,
}

#[derive(Debug)]
struct Sync {
    id: u64,
    volume: usize,
    offset_bytes: usize,
}

impl Model {
    pub(super) fn new(seed: u64) -> Self {
        let mut model = Self {
            rng: SimRng::new(seed ^ 0x6d0d_e100),
            disks: DISK_BYTES.iter().map(|len_bytes| vec![0; *len_bytes]).collect(),
            stream: Vec::new(),
            promises: Vec::new(),
            noted: None,
            sync: None,
            next_seq: 1,
            time_us: 1_000_000,
            epoch_counter: 0,
            generation: Uuid::nil(),
            parent: Uuid::nil(),
            first_seq: 1,
            sent: HashSet::from([ChainPoint::default()]),
            uniform: false,
            acked: 0,
        };
        model.uniform = model.rng.one_in(4);
        model.fork(0);
        model
    }

    /// The source lost what it retained: a new generation, which goes on after the target's tail, with a full sync.
    pub(super) fn fork(&mut self, tail_seq: u64) -> u64 {
        self.stream.retain(|record| record.seq <= tail_seq);
        self.promises.retain(|promise| promise.seq <= tail_seq);
        self.sent.retain(|point| point.seq <= tail_seq);
        self.noted = None;
        self.parent = self.generation;
        self.generation = Uuid::from_u64_pair(self.rng.next_u64(), self.rng.next_u64());
        // Numbers may go on right after the tail, so that nothing but the chain tells old records from new ones.
        self.first_seq = tail_seq + 1 + if self.rng.one_in(2) { 0 } else { self.rng.below(9) };
        self.next_seq = self.first_seq;
        let id = self.rng.next_u64() | 1;
        self.sync = Some(Sync { id, volume: 0, offset_bytes: 0 });
        for (volume, len_bytes) in (0..).zip(DISK_BYTES) {
            self.publish(|seq, time_us| Record::sync_begin(seq, time_us, volume, len_bytes as u64, id));
        }
        id
    }

    /// One thing that the source does.
    pub(super) fn step(&mut self) {
        match self.rng.below(20) {
            0..=8 => self.write(),
            9 => self.zeroes(),
            10 => self.publish(Record::void),
            11 | 12 => self.checkpoint(),
            _ if self.sync.is_some() => self.sync_step(),
            _ => self.write(),
        }
    }

    /// How many records a batch has at most.
    pub(super) fn most_records(&self) -> u64 {
        if self.uniform { 1 } else { 12 }
    }

    pub(super) fn note_sent(&mut self, point: ChainPoint) {
        self.sent.insert(point);
    }

    /// Whether a batch of this history ended here.
    pub(super) fn was_sent(&self, point: ChainPoint) -> bool {
        self.sent.contains(&point)
    }

    pub(super) fn last_seq(&self) -> u64 {
        self.next_seq - 1
    }

    pub(super) fn records_after(&self, seq: u64) -> &[Record] {
        let first = self.stream.partition_point(|record| record.seq <= seq);
        &self.stream[first..]
    }

    pub(super) fn promises(&self) -> &[Promise] {
        &self.promises
    }

    /// The disks as the stream leaves them at a number, or nothing if a sync was under way.
    pub(super) fn replay(&self, seq: u64) -> Option<Image> {
        let mut image: Image = DISK_BYTES.iter().map(|len_bytes| vec![0; *len_bytes]).collect();
        let mut open_syncs = 0_usize;
        let mut sync_id = 0;
        for record in self.stream.iter().take_while(|record| record.seq <= seq) {
            apply(&mut image, record);
            match record.kind {
                RecordKind::SyncBegin if record.sync_id == sync_id => open_syncs += 1,
                RecordKind::SyncBegin => (sync_id, open_syncs) = (record.sync_id, 1),
                RecordKind::SyncEnd => open_syncs -= 1,
                _ => {}
            }
        }
        (open_syncs == 0).then_some(image)
    }

    /// A number between two.
    pub(super) fn any_seq(&mut self, from: u64, until: u64) -> u64 {
        from + self.rng.below(until - from + 1)
    }

    fn publish(&mut self, make: impl FnOnce(u64, u64) -> Record) {
        self.time_us += 1 + self.rng.below(1000);
        let record = make(self.next_seq, self.time_us);
        self.next_seq += 1;
        if record.kind != RecordKind::SyncData {
            apply(&mut self.disks, &record);
        }
        self.stream.push(record);
    }

    fn place(&mut self) -> (u16, u64, usize) {
        let volume = self.rng.below(2) as usize;
        let sectors = DISK_BYTES[volume] as u64 / 512;
        let count = match (self.uniform, self.rng.below(4)) {
            (true, _) => 1 + self.rng.below(7),
            (false, 0) => 1 + self.rng.below(16),
            (false, _) => 1 + self.rng.below(3),
        };
        // Few places, so that writes overlap.
        let first = self.rng.below(sectors) / 3 * 3 % (sectors - count);
        (volume as u16, first * 512, (count * 512) as usize)
    }

    fn write(&mut self) {
        let (volume, offset_bytes, len_bytes) = self.place();
        let mut data = vec![0; len_bytes];
        for chunk in data.chunks_mut(8) {
            chunk.copy_from_slice(&self.rng.next_u64().to_le_bytes());
        }
        self.publish(|seq, time_us| Record::write(seq, time_us, volume, offset_bytes, data.into()));
    }

    fn zeroes(&mut self) {
        let (volume, offset_bytes, len_bytes) = self.place();
        self.publish(|seq, time_us| Record::zeroes(seq, time_us, volume, offset_bytes, len_bytes as u64));
    }

    /// Notes a cut, or publishes the record of the one noted before.
    fn checkpoint(&mut self) {
        let Some((cut, image, counts)) = self.noted.take() else {
            let counts = self.sync.is_none();
            self.noted = Some((self.last_seq(), self.disks.clone(), counts));
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
        self.publish(|seq, time_us| Record::checkpoint(seq, time_us, &checkpoint));
        let seq = self.last_seq();
        self.promises.push(Promise { checkpoint, seq, image, counts });
    }

    fn sync_step(&mut self) {
        let Some(mut sync) = self.sync.take() else { return };
        let Sync { id, volume, offset_bytes } = sync;
        if volume == DISK_BYTES.len() {
            for (volume, len_bytes) in (0..).zip(DISK_BYTES) {
                self.publish(|seq, time_us| Record::sync_end(seq, time_us, volume, len_bytes as u64, id));
            }
            return;
        }
        let chunk =
            Bytes::copy_from_slice(&self.disks[volume][offset_bytes..offset_bytes + SYNC_CHUNK_BYTES]);
        let is_hole = chunk.iter().all(|byte| *byte == 0);
        self.publish(|seq, time_us| {
            let (volume, offset_bytes) = (volume as u16, offset_bytes as u64);
            if is_hole {
                let len_bytes = SYNC_CHUNK_BYTES as u64;
                return Record {
                    sync_id: id,
                    ..Record::zeroes(seq, time_us, volume, offset_bytes, len_bytes)
                };
            }
            Record::sync_data(seq, time_us, volume, offset_bytes, id, chunk)
        });
        sync.offset_bytes += SYNC_CHUNK_BYTES;
        if sync.offset_bytes == DISK_BYTES[volume] {
            (sync.volume, sync.offset_bytes) = (volume + 1, 0);
        }
        self.sync = Some(sync);
    }
}

/// What a record does to the disks.
pub(super) fn apply(image: &mut Image, record: &Record) {
    let range = record.offset_bytes as usize..(record.offset_bytes + record.len_bytes) as usize;
    match record.kind {
        RecordKind::Write | RecordKind::SyncData => {
            image[usize::from(record.volume)][range].copy_from_slice(&record.payload);
        }
        RecordKind::Zeroes => image[usize::from(record.volume)][range].fill(0),
        _ => {}
    }
}
