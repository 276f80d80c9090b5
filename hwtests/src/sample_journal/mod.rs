//! Journals in real files with their recovery disks, made through the journal's own writer: for readers that are to be tested.

mod folder;
mod model;
pub mod peer;
mod promote;
mod samples;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use journal::batch::{BatchLink, BatchSealer, BatchView, Checkpoint, CheckpointKind, Epoch, Record};
use journal::crypt::{Encryption, Keys, NewKey, SiteKey, SiteKeys};
use journal::format::VolumeState;
use journal::recovery::{NewJournal, OpenOptions, create, open};
use journal::storage::FileId;
use journal::storage::ring::{Access, DirectFile, RingStorage};
use journal::writer::{Change, Limits, Writer, drive};
use uuid::Uuid;

pub use folder::SampleFolder;
pub use model::{SampleCheckpoint, SampleModel};
pub use promote::Ended;
pub use samples::{
    SLOT_LEN_BYTES, decrypted_segments, encrypted_segments, first_sync, half_promoted, history_given_up,
    promoted_over_damage, three_segments,
};

const PAGE_BYTES: usize = 4096;
const JOURNAL_ID: Uuid = Uuid::from_u128(1);
const SYNC_ID: u64 = 9;
/// Payload in a batch; several batches fit into the smallest slot.
const BATCH_PAYLOAD_BYTES: usize = 12 << 10;
const LIMITS: Limits = Limits { max_slots: 64, min_slots: 0, grow_slots: 2, group_bytes: 1 << 20 };

/// A journal that is being written, with a model of its disks.
pub struct SampleJournal<'a> {
    folder: &'a SampleFolder,
    storage: RingStorage,
    file: FileId,
    keys: Keys,
    writer: Writer,
    sealer: BatchSealer,
    generation: Uuid,
    seq: u64,
    batch_crc: u32,
    pending_bytes: usize,
    newest_batch: Bytes,
    newest_batch_after_seq: u64,
    model: SampleModel,
}

impl<'a> SampleJournal<'a> {
    /// A journal with slots of `slot_len_bytes` in an empty folder, whose first sync has ended. `disks` become the recovery disks.
    pub fn create(folder: &'a SampleFolder, slot_len_bytes: u64, disks: Vec<Vec<u8>>) -> Result<Self> {
        Self::create_of(folder, slot_len_bytes, disks, r#"{"vm":"sample"}"#)
    }

    /// The same, encrypted with a key of its own that this site key wraps. All keys and salts follow from it.
    pub fn create_encrypted(
        folder: &'a SampleFolder,
        slot_len_bytes: u64,
        disks: Vec<Vec<u8>>,
        site_key: &SiteKey,
    ) -> Result<Self> {
        let key = NewKey::seeded(4).wrap(JOURNAL_ID, site_key);
        let keys = Keys::seeded(SiteKeys::new(vec![site_key.clone()]), 5);
        let manifest = r#"{"vm":"sample"}"#;
        Self::create_with(folder, slot_len_bytes, disks, manifest, Encryption::On(key), keys)?.synced()
    }

    /// A journal whose first sync goes on: it has ended for so many of its volumes.
    pub fn create_in_sync(
        folder: &'a SampleFolder,
        slot_len_bytes: u64,
        disks: Vec<Vec<u8>>,
        volumes: u16,
    ) -> Result<Self> {
        let (manifest, keys) = (r#"{"vm":"sample"}"#, Keys::default());
        let mut journal =
            Self::create_with(folder, slot_len_bytes, disks, manifest, Encryption::Never, keys)?;
        journal.sync_to_recovery_disks(volumes)?;
        Ok(journal)
    }

    /// The same, plain, with a manifest that says whose it is.
    pub fn create_of(
        folder: &'a SampleFolder,
        slot_len_bytes: u64,
        disks: Vec<Vec<u8>>,
        manifest: &str,
    ) -> Result<Self> {
        let keys = Keys::default();
        Self::create_with(folder, slot_len_bytes, disks, manifest, Encryption::Never, keys)?.synced()
    }

    fn create_with(
        folder: &'a SampleFolder,
        slot_len_bytes: u64,
        disks: Vec<Vec<u8>>,
        manifest: &str,
        encryption: Encryption,
        keys: Keys,
    ) -> Result<Self> {
        let mut volumes = Vec::new();
        for (number, bytes) in (0..).zip(&disks) {
            std::fs::write(folder.disk(number), bytes).context("recovery disk")?;
            let (id, size_bytes) = (Uuid::from_u128(5 + u128::from(number)), bytes.len() as u64);
            volumes.push(VolumeState { id, base_seq: 0, size_bytes, fresh_image: true });
        }
        let mut storage = RingStorage::new(64).context("io_uring")?;
        let file = storage.add_file(DirectFile::open(&folder.journal(), Access::Create)?);
        let new = NewJournal {
            journal_id: JOURNAL_ID,
            vm_id: Uuid::from_u128(2),
            vpg_id: Uuid::from_u128(3),
            slot_len_bytes,
            slot_count: 3,
            volumes,
            manifest: manifest.to_owned(),
            encryption,
        };
        create(&mut storage, file, &new)?;
        let options = OpenOptions { keys: keys.clone(), ..OpenOptions::default() };
        let writer = Writer::new(open(&mut storage, file, &options)?, LIMITS);
        let generation = Uuid::from_u128(0x6e);
        let mut journal = Self {
            folder,
            storage,
            file,
            keys,
            writer,
            sealer: BatchSealer::new(),
            generation,
            seq: 0,
            batch_crc: 0,
            pending_bytes: 0,
            newest_batch: Bytes::new(),
            newest_batch_after_seq: 0,
            model: SampleModel::new(disks),
        };
        journal.claim(Uuid::nil())?;
        Ok(journal)
    }

    /// After its first sync.
    fn synced(mut self) -> Result<Self> {
        self.sync_to_recovery_disks(self.model.volume_count())?;
        Ok(self)
    }

    /// What its disks were.
    pub fn model(&self) -> &SampleModel {
        &self.model
    }

    /// The last number that was given.
    pub fn seq(&self) -> u64 {
        self.seq
    }

    /// A write.
    pub fn write(&mut self, volume: u16, offset_bytes: u64, data: &[u8]) -> Result<()> {
        self.push(|seq| Record::write(seq, seq, volume, offset_bytes, Bytes::copy_from_slice(data)))?;
        self.model.put(self.seq, volume, offset_bytes, data.to_vec());
        self.flush_if_large(data.len())
    }

    /// Zeroes.
    pub fn zero(&mut self, volume: u16, offset_bytes: u64, len_bytes: u64) -> Result<()> {
        self.push(|seq| Record::zeroes(seq, seq, volume, offset_bytes, len_bytes))?;
        self.model.put(self.seq, volume, offset_bytes, vec![0; len_bytes as usize]);
        Ok(())
    }

    /// A number without a write.
    pub fn void(&mut self) -> Result<()> {
        self.push(|seq| Record::void(seq, seq))
    }

    /// A volume's new size.
    pub fn resize(&mut self, volume: u16, size_bytes: u64) -> Result<()> {
        self.push(|seq| Record::resize(seq, seq, volume, size_bytes))?;
        self.model.resize(self.seq, volume, size_bytes);
        Ok(())
    }

    /// A sync begins.
    pub fn sync_begin(&mut self, volume: u16, sync_id: u64) -> Result<()> {
        let size_bytes = self.size_bytes(volume);
        self.push(|seq| Record::sync_begin(seq, seq, volume, size_bytes, sync_id))
    }

    /// What a sync read.
    pub fn sync_data(&mut self, volume: u16, sync_id: u64, offset_bytes: u64, data: &[u8]) -> Result<()> {
        let payload = Bytes::copy_from_slice(data);
        self.push(|seq| Record::sync_data(seq, seq, volume, offset_bytes, sync_id, payload))?;
        self.model.put(self.seq, volume, offset_bytes, data.to_vec());
        self.flush_if_large(data.len())
    }

    /// A sync ends.
    pub fn sync_end(&mut self, volume: u16, sync_id: u64) -> Result<()> {
        let size_bytes = self.size_bytes(volume);
        self.push(|seq| Record::sync_end(seq, seq, volume, size_bytes, sync_id))?;
        self.flush()
    }

    /// A checkpoint of all so far.
    pub fn checkpoint(&mut self, tag: &str, time_us: u64) -> Result<()> {
        self.checkpoint_of(self.seq, tag, time_us)
    }

    /// A checkpoint after record `cut`.
    pub fn checkpoint_of(&mut self, cut: u64, tag: &str, time_us: u64) -> Result<()> {
        self.checkpoint_at(cut, cut, tag, time_us)
    }

    /// A checkpoint of all so far that is one of a group: all its journals have the same `counter`.
    pub fn group_checkpoint(&mut self, counter: u64, tag: &str, time_us: u64) -> Result<()> {
        self.checkpoint_at(self.seq, counter, tag, time_us)
    }

    fn checkpoint_at(&mut self, cut: u64, counter: u64, tag: &str, time_us: u64) -> Result<()> {
        let kind = if tag.is_empty() { CheckpointKind::Automatic } else { CheckpointKind::Tagged };
        let epoch = Epoch { nonce: Uuid::from_u128(77), counter };
        let checkpoint = Checkpoint { epoch, cut, member_set_version: 1, time_us, kind, tag: tag.to_owned() };
        self.push(|seq| Record::checkpoint(seq, time_us, &checkpoint))?;
        self.model.checkpoints.push(SampleCheckpoint { seq: self.seq, cut, time_us, tag: tag.to_owned() });
        Ok(())
    }

    /// Makes all so far durable.
    pub fn flush(&mut self) -> Result<()> {
        if self.sealer.is_empty() {
            return Ok(());
        }
        self.newest_batch_after_seq = self.writer.durable().seq;
        let batch = self.seal_batch()?;
        let view = BatchView::parse(&batch)?;
        self.writer.offer(batch.clone(), &view, 1000 + self.seq)?;
        drive(&mut self.writer, &mut self.storage, self.file)?;
        ensure!(self.writer.durable().seq == self.seq, "the writer didn't take a batch");
        self.newest_batch = batch;
        Ok(())
    }

    /// Makes all so far durable and seals the segment.
    pub fn seal_segment(&mut self) -> Result<()> {
        self.flush()?;
        self.change(Change::Seal)
    }

    /// Gives up all history, for a sync to the recovery disks.
    pub fn give_up_history(&mut self, sync_id: u64) -> Result<()> {
        self.flush()?;
        self.change(Change::GiveUpHistory { sync_id })
    }

    /// Opens the journal once more, as after the death of its writer.
    pub fn reopen(&mut self) -> Result<()> {
        self.flush()?;
        let options = OpenOptions { keys: self.keys.clone(), ..OpenOptions::default() };
        let opened = open(&mut self.storage, self.file, &options)?;
        self.writer = Writer::new(opened, LIMITS);
        self.claim(self.generation)
    }

    /// Goes on with a generation of its own, which begins `skipped` numbers later.
    pub fn fork(&mut self, skipped: u64) -> Result<()> {
        self.flush()?;
        let parent = self.generation;
        self.generation = Uuid::from_u128(self.generation.as_u128() + 1);
        self.seq += skipped;
        self.claim(parent)
    }

    /// Replaces a volume's recovery disk, as by a sync that wrote straight to it: no earlier record of the volume counts any more.
    pub fn rebase(&mut self, volume: u16, disk: Vec<u8>) -> Result<()> {
        self.flush()?;
        let mut volumes = self.writer.superblock().volumes.clone();
        volumes[usize::from(volume)].base_seq = self.seq;
        self.change(Change::SetVolumes(volumes))?;
        std::fs::write(self.folder.disk(volume), &disk).context("recovery disk")?;
        self.model.rebase(volume, self.seq, disk);
        Ok(())
    }

    /// Ends with all of it durable.
    pub fn close(mut self) -> Result<SampleModel> {
        self.flush()?;
        Ok(self.model)
    }

    /// Ends as with a loss of power: the last page of the newest batch never reached the disk.
    pub fn tear(mut self) -> Result<SampleModel> {
        self.flush()?;
        let end = self.folder.place_of(&self.newest_batch)? + self.newest_batch.len() as u64;
        self.folder.overwrite(end - PAGE_BYTES as u64, &[0; PAGE_BYTES])?;
        self.model.cut_off(self.newest_batch_after_seq);
        Ok(self.model)
    }

    fn size_bytes(&self, volume: u16) -> u64 {
        self.model.image(volume, self.seq).len() as u64
    }

    fn claim(&mut self, parent: Uuid) -> Result<()> {
        let (generation, first_seq) = (self.generation, self.seq + 1);
        self.change(Change::Claim { generation, parent, first_seq })?;
        self.batch_crc = self.writer.durable().batch_crc;
        Ok(())
    }

    /// A sync to the recovery disks, to its end for so many volumes.
    fn sync_to_recovery_disks(&mut self, volumes: u16) -> Result<()> {
        self.change(Change::BeginBaseSync { sync_id: SYNC_ID })?;
        let volume_count = self.model.volume_count();
        for volume in 0..volumes {
            let size_bytes = self.size_bytes(volume);
            self.push(|seq| Record::sync_begin(seq, 1, volume, size_bytes, SYNC_ID))?;
            self.push(|seq| Record::sync_end(seq, 1, volume, size_bytes, SYNC_ID))?;
            let batch = self.seal_batch()?;
            let through = self.writer.accept_for_base(&BatchView::parse(&batch)?, 1)?;
            self.change(Change::AdvanceBase { through, end: volume + 1 == volume_count })?;
        }
        Ok(())
    }

    fn change(&mut self, change: Change) -> Result<()> {
        self.writer.change(change)?;
        drive(&mut self.writer, &mut self.storage, self.file)?;
        Ok(())
    }

    fn push(&mut self, make: impl FnOnce(u64) -> Record) -> Result<()> {
        self.sealer.push(make(self.seq + 1))?;
        self.seq += 1;
        Ok(())
    }

    fn flush_if_large(&mut self, len_bytes: usize) -> Result<()> {
        self.pending_bytes += len_bytes;
        if self.pending_bytes >= BATCH_PAYLOAD_BYTES { self.flush() } else { Ok(()) }
    }

    fn seal_batch(&mut self) -> Result<Bytes> {
        let link = BatchLink {
            journal_id: JOURNAL_ID,
            generation: self.generation,
            open_count: self.writer.superblock().open_count,
            prev_batch_crc: self.batch_crc,
        };
        let batch = self.sealer.seal(&link, 0).context("an empty batch")?;
        (self.batch_crc, self.pending_bytes) = (batch.crc, 0);
        Ok(batch.to_bytes())
    }
}
