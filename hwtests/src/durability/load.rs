//! A stream of records that its seed determines.

use std::ops::Range;
use std::path::Path;

use bytes::Bytes;
use journal::batch::{Checkpoint, CheckpointKind, Epoch, Record, RecordKind};
use journal::catalogue::CheckpointEntry;
use uuid::Uuid;
use vra::api::vpg::{VmDefinition, VolumeDefinition, VpgDefinition, VraEndpoint};
use vra::api::{GenerationId, JournalId, MemberSince, VmId, VolumeId, VpgId};
use vra::receive::VmFolder;
use vra::wire::VolumeShape;

/// What is never torn, and written by one record or another as a whole, in bytes.
pub const SECTOR_BYTES: usize = 512;

/// The disks: blocks and sizes in bytes. The last page of the second one is not whole.
const DISKS: [(u32, u64); 2] = [(4096, 8 << 20), (512, (8 << 20) - 512)];

/// What a sync reads at once, in bytes.
const SYNC_PIECE_BYTES: u64 = 256 << 10;

/// One record of so many is a checkpoint.
const CHECKPOINT_EVERY: u64 = 31;

/// Most blocks that one write has.
const MAX_BLOCKS: u64 = 16;

/// A stream of one VM with two disks: a full sync with writes in between, then writes, zeroes and checkpoints without end. Record `n` depends on
/// the seed and on `n` alone.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    seed: u64,
    journal_limit_bytes: u64,
}

/// A record without its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What it says.
    pub kind: RecordKind,
    /// Which disk.
    pub volume: u16,
    /// Where, in bytes.
    pub offset_bytes: u64,
    /// How much, or the disk's size, in bytes.
    pub len_bytes: u64,
}

impl Load {
    /// The load of a seed, for a journal that fits onto a small disk.
    pub fn new(seed: u64) -> Self {
        Self { seed, journal_limit_bytes: JOURNAL_LIMIT_BYTES }
    }

    /// The same for a journal of up to so many bytes.
    pub fn with_journal_limit(self, journal_limit_bytes: u64) -> Self {
        Self { journal_limit_bytes, ..self }
    }

    /// How many disks it has.
    pub fn disk_count() -> u16 {
        DISKS.len() as u16
    }

    /// The size of a disk, in bytes.
    pub fn disk_bytes(volume: u16) -> u64 {
        DISKS[usize::from(volume)].1
    }

    /// Number of the record that ends the full sync.
    pub fn sync_end() -> u64 {
        let pieces: u64 = DISKS.iter().map(|(_, size_bytes)| size_bytes.div_ceil(SYNC_PIECE_BYTES)).sum();
        2 * DISKS.len() as u64 + 2 * pieces
    }

    /// What record `seq` says.
    pub fn entry(&self, seq: u64) -> Entry {
        let disks = DISKS.len() as u64;
        let whole = |kind, volume: u64| {
            let (volume, len_bytes) = (volume as u16, DISKS[volume as usize].1);
            Entry { kind, volume, offset_bytes: 0, len_bytes }
        };
        if seq <= disks {
            return whole(RecordKind::SyncBegin, seq - 1);
        }
        if seq > Self::sync_end() {
            return if seq.is_multiple_of(CHECKPOINT_EVERY) {
                Entry { kind: RecordKind::Checkpoint, volume: 0, offset_bytes: 0, len_bytes: 0 }
            } else {
                self.change(seq)
            };
        }
        if seq > Self::sync_end() - disks {
            return whole(RecordKind::SyncEnd, seq - (Self::sync_end() - disks) - 1);
        }
        let step = seq - disks - 1;
        if step % 2 == 1 {
            return self.change(seq);
        }
        let mut piece = step / 2;
        for (volume, (_, size_bytes)) in (0_u16..).zip(DISKS) {
            let pieces = size_bytes.div_ceil(SYNC_PIECE_BYTES);
            if piece < pieces {
                let offset_bytes = piece * SYNC_PIECE_BYTES;
                let len_bytes = SYNC_PIECE_BYTES.min(size_bytes - offset_bytes);
                return Entry { kind: RecordKind::SyncData, volume, offset_bytes, len_bytes };
            }
            piece -= pieces;
        }
        unreachable!("sync_end counts the pieces of all disks")
    }

    /// Record `seq`, whole.
    pub fn record(&self, seq: u64) -> Record {
        let Entry { kind, volume, offset_bytes, len_bytes } = self.entry(seq);
        let payload = || self.payload(seq, volume, offset_bytes, len_bytes);
        match kind {
            RecordKind::SyncBegin => Record::sync_begin(seq, seq, volume, len_bytes, SYNC_ID),
            RecordKind::SyncEnd => Record::sync_end(seq, seq, volume, len_bytes, SYNC_ID),
            RecordKind::SyncData => Record::sync_data(seq, seq, volume, offset_bytes, SYNC_ID, payload()),
            RecordKind::Zeroes => Record::zeroes(seq, seq, volume, offset_bytes, len_bytes),
            RecordKind::Checkpoint => Record::checkpoint(seq, seq, &checkpoint(seq)),
            _ => Record::write(seq, seq, volume, offset_bytes, payload()),
        }
    }

    /// The checkpoints that a journal must list which can be opened from `oldest_seq` on and whose last record is `through`, by their numbers.
    pub fn checkpoints(oldest_seq: u64, through: u64) -> Vec<CheckpointEntry> {
        let all = (1..=through / CHECKPOINT_EVERY).map(|count| count * CHECKPOINT_EVERY);
        // A cut is one below its record.
        let listed = all.filter(|seq| *seq > Self::sync_end().max(oldest_seq));
        listed.map(|seq| CheckpointEntry { seq, checkpoint: checkpoint(seq) }).collect()
    }

    /// What record `seq` puts into a sector of a disk: its number first, so that a sector tells who wrote it.
    pub fn sector(&self, seq: u64, volume: u16, sector: u64) -> [u8; SECTOR_BYTES] {
        let mut words = Words::new(&[self.seed, seq, volume.into(), sector]);
        let mut content = [0; SECTOR_BYTES];
        for word in content.chunks_exact_mut(8) {
            word.copy_from_slice(&words.next().to_le_bytes());
        }
        content[..8].copy_from_slice(&seq.to_le_bytes());
        content
    }

    fn payload(&self, seq: u64, volume: u16, offset_bytes: u64, len_bytes: u64) -> Bytes {
        let mut payload = Vec::with_capacity(len_bytes as usize);
        for sector in sectors(offset_bytes, len_bytes) {
            payload.extend_from_slice(&self.sector(seq, volume, sector));
        }
        payload.into()
    }

    /// A write, or one time in eight zeroes, anywhere.
    fn change(&self, seq: u64) -> Entry {
        let mut words = Words::new(&[self.seed, seq]);
        let volume = words.next() % DISKS.len() as u64;
        let (block_bytes, size_bytes) = DISKS[volume as usize];
        let block_bytes = u64::from(block_bytes);
        let blocks = 1 + words.next() % MAX_BLOCKS;
        let first = words.next() % (size_bytes / block_bytes - blocks + 1);
        let kind = if words.next().is_multiple_of(8) { RecordKind::Zeroes } else { RecordKind::Write };
        let (offset_bytes, len_bytes) = (first * block_bytes, blocks * block_bytes);
        Entry { kind, volume: volume as u16, offset_bytes, len_bytes }
    }

    /// The generation that it is.
    pub fn generation(&self) -> GenerationId {
        GenerationId(self.id("generation"))
    }

    /// The group that the VM is, as a target is told of it.
    pub fn definition(&self, source: VraEndpoint, target: VraEndpoint, datastore: &Path) -> VpgDefinition {
        let volume = |(number, (logical_block_bytes, size_bytes)): (u16, (u32, u64))| VolumeDefinition {
            id: VolumeId(self.id(&format!("volume {number}"))),
            number,
            size_bytes,
            logical_block_bytes,
            source_path: "/dev/null".into(),
            left: false,
            swap: false,
        };
        let vm = VmDefinition {
            id: VmId(self.id("vm")),
            name: "machine".to_owned(),
            journal: JournalId(self.id("journal")),
            member_since: MemberSince::default(),
            volumes: (0_u16..).zip(DISKS).map(volume).collect(),
            source,
            takeover: None,
            target,
            datastore: datastore.to_owned(),
            journal_limit_bytes: self.journal_limit_bytes,
            journal_limit_percent: None,
            journal_warning: None,
            journal_minimum_bytes: 0,
            // What is sealed is promoted at once, beneath the load.
            history_s: 0,
            give_up_history: true,
        };
        VpgDefinition {
            id: VpgId(self.id("group")),
            name: "group".to_owned(),
            revision: 1,
            member_set_version: 1,
            checkpoint_interval_ms: 1000,
            hold_deadline_ms: 100,
            encrypt: false,
            paused: false,
            notes: None,
            coordinators: Vec::new(),
            vms: vec![vm],
            former: Vec::new(),
        }
    }

    /// Its disks as a stream's opening names them.
    pub fn shapes(definition: &VmDefinition) -> Vec<VolumeShape> {
        let shape = |volume: &VolumeDefinition| VolumeShape {
            volume: volume.number,
            id: volume.id,
            logical_block_bytes: volume.logical_block_bytes,
            size_bytes: volume.size_bytes,
            left: false,
        };
        definition.volumes.iter().map(shape).collect()
    }

    /// Where a target keeps the VM's files.
    pub fn folder(definition: &VpgDefinition) -> VmFolder {
        let vm = &definition.vms[0];
        VmFolder::of(&vm.datastore, (&definition.name, definition.id), (&vm.name, vm.id))
    }

    fn id(&self, what: &str) -> Uuid {
        let mut words = Words::new(&[self.seed, crc32c::crc32c(what.as_bytes()).into()]);
        Uuid::from_u64_pair(words.next(), words.next())
    }
}

const SYNC_ID: u64 = 1;

/// Space for the journal, in bytes: little enough for a small disk, too much for one segment.
const JOURNAL_LIMIT_BYTES: u64 = 192 << 20;

fn checkpoint(seq: u64) -> Checkpoint {
    Checkpoint {
        epoch: Epoch { nonce: Uuid::from_u64_pair(1, 1), counter: seq },
        cut: seq - 1,
        member_set_version: 1,
        time_us: seq,
        kind: CheckpointKind::Automatic,
        tag: String::new(),
    }
}

fn sectors(offset_bytes: u64, len_bytes: u64) -> Range<u64> {
    offset_bytes / SECTOR_BYTES as u64..(offset_bytes + len_bytes) / SECTOR_BYTES as u64
}

/// SplitMix64: the emulated machine makes every payload with it, and a cryptographic generator would take most of its time.
struct Words(u64);

impl Words {
    fn new(seeds: &[u64]) -> Self {
        Self(seeds.iter().fold(0, |state, seed| Self(state ^ seed).next()))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ word >> 31
    }
}

/// The load's disks after some record: for each sector who wrote it last.
#[derive(Clone, Debug)]
pub struct Disks {
    load: Load,
    seq: u64,
    /// By disk and sector; 0 where it reads zeroes.
    writers: Vec<Vec<u64>>,
}

impl Disks {
    /// Before the first record.
    pub fn new(load: Load) -> Self {
        let writers = DISKS.iter().map(|(_, size_bytes)| vec![0; *size_bytes as usize / SECTOR_BYTES]);
        Self { load, seq: 0, writers: writers.collect() }
    }

    /// Goes on to the state after record `seq`.
    pub fn advance(&mut self, seq: u64) {
        while self.seq < seq {
            self.seq += 1;
            let entry = self.load.entry(self.seq);
            let writer = match entry.kind {
                RecordKind::Write | RecordKind::SyncData => self.seq,
                RecordKind::Zeroes => 0,
                _ => continue,
            };
            let range = sectors(entry.offset_bytes, entry.len_bytes);
            self.writers[usize::from(entry.volume)][range.start as usize..range.end as usize].fill(writer);
        }
    }

    /// The sectors of a piece of a disk that are not as they must be, by number. The piece begins at a sector's start.
    pub fn differing(&self, volume: u16, offset_bytes: u64, found: &[u8]) -> Vec<u64> {
        let writers = &self.writers[usize::from(volume)];
        let numbered = sectors(offset_bytes, found.len() as u64).zip(found.chunks_exact(SECTOR_BYTES));
        let differs = |(sector, found): &(u64, &[u8])| match writers[*sector as usize] {
            0 => found.iter().any(|byte| *byte != 0),
            writer => *found != self.load.sector(writer, volume, *sector),
        };
        numbered.filter(differs).map(|(sector, _)| sector).collect()
    }

    /// Whether a sector may have been changed to `found` by a record after this state, up to `last_seq`.
    pub fn may_become(&self, volume: u16, sector: u64, found: &[u8], last_seq: u64) -> bool {
        (self.seq + 1..=last_seq).any(|seq| {
            let entry = self.load.entry(seq);
            let here =
                entry.volume == volume && sectors(entry.offset_bytes, entry.len_bytes).contains(&sector);
            here && match entry.kind {
                RecordKind::Write | RecordKind::SyncData => found == self.load.sector(seq, volume, sector),
                RecordKind::Zeroes => found.iter().all(|byte| *byte == 0),
                _ => false,
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_load_is_a_full_sync_and_then_changes_that_stay_on_their_disks() {
        let load = Load::new(7);
        let mut covered = DISKS.map(|_| 0);
        for seq in 1..=Load::sync_end() {
            let entry = load.entry(seq);
            if entry.kind == RecordKind::SyncData {
                assert_eq!(entry.offset_bytes, covered[usize::from(entry.volume)], "record {seq}");
                covered[usize::from(entry.volume)] += entry.len_bytes;
            }
        }
        assert_eq!(covered, DISKS.map(|(_, size_bytes)| size_bytes));
        assert_eq!(load.entry(Load::sync_end()).kind, RecordKind::SyncEnd);
        for seq in Load::sync_end() + 1..Load::sync_end() + 5000 {
            let entry = load.entry(seq);
            assert!(entry.offset_bytes + entry.len_bytes <= Load::disk_bytes(entry.volume), "record {seq}");
            assert_eq!(load.record(seq), Load::new(7).record(seq));
        }
    }

    #[test]
    fn the_checkpoints_of_a_history_are_those_whose_cut_is_in_it() {
        let load = Load::new(7);
        let last = Load::sync_end() + 5 * CHECKPOINT_EVERY;
        let is_checkpoint = |seq: &u64| load.entry(*seq).kind == RecordKind::Checkpoint;
        let all: Vec<u64> = (1..=last).filter(is_checkpoint).collect();
        let listed = |oldest_seq, through| -> Vec<u64> {
            Load::checkpoints(oldest_seq, through).iter().map(|entry| entry.seq).collect()
        };
        assert_eq!(listed(Load::sync_end(), last), all);
        assert!(all.len() >= 5);
        let (second, fourth) = (all[1], all[3]);
        assert_eq!(listed(second - 1, fourth), all[1..4], "a cut is one below its record");
        assert_eq!(listed(second, fourth - 1), all[2..3]);
        for entry in Load::checkpoints(0, last) {
            assert_eq!(Record::checkpoint(entry.seq, entry.seq, &entry.checkpoint), load.record(entry.seq));
        }
    }

    #[test]
    fn a_wrong_sector_is_found_and_a_later_one_is_told_apart() {
        let load = Load::new(3);
        let mut disks = Disks::new(load);
        let mut image = vec![0; Load::disk_bytes(0) as usize];
        let last = Load::sync_end() + 200;
        for seq in 1..=last {
            let record = load.record(seq);
            let range = record.offset_bytes as usize..(record.offset_bytes + record.len_bytes) as usize;
            match record.kind {
                RecordKind::Write | RecordKind::SyncData if record.volume == 0 => {
                    image[range].copy_from_slice(&record.payload);
                }
                RecordKind::Zeroes if record.volume == 0 => image[range].fill(0),
                _ => {}
            }
        }
        disks.advance(last);
        assert_eq!(disks.differing(0, 0, &image), Vec::<u64>::new());
        image[5 * SECTOR_BYTES + 100] ^= 1;
        assert_eq!(disks.differing(0, 0, &image), [5]);
        assert!(!disks.may_become(0, 5, &image[5 * SECTOR_BYTES..6 * SECTOR_BYTES], last + 1000));

        let next = (last + 1..)
            .find(|seq| load.entry(*seq).kind == RecordKind::Write && load.entry(*seq).volume == 0)
            .expect("there is always another write");
        let (sector, payload) = (load.entry(next).offset_bytes / 512, load.record(next).payload);
        assert!(disks.may_become(0, sector, &payload[..SECTOR_BYTES], next));
        assert!(!disks.may_become(0, sector, &payload[..SECTOR_BYTES], next - 1));
    }
}
