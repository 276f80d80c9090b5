//! The folder of a sample journal, and ways to damage what is in it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};
use journal::batch::{BatchHeader, RecordHeader};
use journal::crypt::SiteKeys;
use journal::format::{PAGE_BYTES, SUPERBLOCK_OFFSETS, Superblock, VolumeState};
use journal::recovery::{SurveyOptions, rebuild, survey_as};
use journal::storage::ring::{Access, DirectFile, RingStorage};
use journal::view::Reader;
use zerocopy::{FromBytes, IntoBytes};

/// A temporary folder with a journal and its recovery disks. It goes when this is dropped.
#[derive(Debug)]
pub struct SampleFolder {
    path: PathBuf,
}

impl SampleFolder {
    /// An empty one.
    pub fn new() -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("holdfast-sample-{}-{number}", std::process::id()));
        fs::create_dir_all(&path).context("a temporary folder")?;
        Ok(Self { path })
    }

    /// An empty one at a path of a datastore.
    pub fn at(path: PathBuf) -> Result<Self> {
        fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self { path })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The journal's file.
    pub fn journal(&self) -> PathBuf {
        self.path.join("journal.hfj")
    }

    /// The recovery disk of a volume.
    pub fn disk(&self, volume: u16) -> PathBuf {
        self.path.join(format!("disk-{volume}.raw"))
    }

    /// The file of the site's keys, if the journal is encrypted.
    pub fn site_key(&self) -> PathBuf {
        self.path.join("site.key")
    }

    /// The journal's bytes.
    pub fn bytes(&self) -> Result<Vec<u8>> {
        Ok(fs::read(self.journal())?)
    }

    /// Writes over a part of the journal's file.
    pub fn overwrite(&self, place: u64, bytes: &[u8]) -> Result<()> {
        let file = File::options().write(true).open(self.journal())?;
        Ok(file.write_all_at(bytes, place)?)
    }

    /// Flips the lowest bit of a byte of the journal's file.
    pub fn flip_bit(&self, place: u64) -> Result<()> {
        let byte = self.bytes()?[place as usize];
        self.overwrite(place, &[byte ^ 1])
    }

    /// Where in the journal's file these bytes first are.
    ///
    /// # Errors
    /// They are nowhere in it.
    pub fn place_of(&self, needle: &[u8]) -> Result<u64> {
        self.places_of(needle)?.first().copied().context("the journal doesn't have these bytes")
    }

    /// All places of the journal's file where these bytes are.
    pub fn places_of(&self, needle: &[u8]) -> Result<Vec<u64>> {
        let bytes = self.bytes()?;
        let found = bytes.windows(needle.len()).enumerate().filter(|(_, window)| *window == needle);
        Ok(found.map(|(place, _)| place as u64).collect())
    }

    /// Changes the header of the batch at a place of the file and makes its CRC right again.
    pub fn forge_batch(&self, place: u64, edit: impl FnOnce(&mut BatchHeader)) -> Result<()> {
        let bytes = self.bytes()?;
        let (header, rest) = BatchHeader::read_from_prefix(&bytes[place as usize..])
            .ok()
            .context("the file ends in the batch")?;
        let (records, crcs) = (header.record_count.get() as usize, header.crc_count.get() as usize);
        let mut forged = BatchHeader { crc: 0.into(), ..header };
        edit(&mut forged);
        let head = crc32c::crc32c(forged.as_bytes());
        forged.crc = crc32c::crc32c_append(head, &rest[..records * RecordHeader::LEN + crcs * 4]).into();
        self.overwrite(place, forged.as_bytes())
    }

    /// The journal as the product's own reader sees it.
    ///
    /// # Errors
    /// What it says if it refuses the journal.
    pub fn reader(&self) -> Result<Reader> {
        let mut storage = RingStorage::new(64).context("io_uring")?;
        let file = storage.add_file(DirectFile::open(&self.journal(), Access::ReadOnly)?);
        Ok(Reader::open(&mut storage, file, &SurveyOptions::default())?)
    }

    /// The same after both superblocks were lost: made up from the segments.
    ///
    /// # Errors
    /// What it says if it refuses the journal.
    pub fn rebuilt_reader(&self) -> Result<Reader> {
        let mut storage = RingStorage::new(64).context("io_uring")?;
        let file = storage.add_file(DirectFile::open(&self.journal(), Access::ReadOnly)?);
        let volume = |number| -> Option<VolumeState> {
            let size_bytes = fs::metadata(self.disk(number)).ok()?.len();
            Some(VolumeState { id: uuid::Uuid::nil(), base_seq: 0, size_bytes, fresh_image: false })
        };
        let rebuilt =
            rebuild(&mut storage, file, None, (0..).map_while(volume).collect(), &SiteKeys::default())?;
        let survey = survey_as(&mut storage, file, rebuilt.superblock, &SurveyOptions::default())?;
        Ok(Reader::of(&mut storage, file, survey)?)
    }

    /// Destroys both superblocks; gives what they were.
    pub fn take_superblocks(&self) -> Result<[Vec<u8>; 2]> {
        let bytes = self.bytes()?;
        SUPERBLOCK_OFFSETS.iter().try_for_each(|place| self.overwrite(*place, &[0; PAGE_BYTES]))?;
        Ok(SUPERBLOCK_OFFSETS.map(|place| bytes[place as usize..][..PAGE_BYTES].to_vec()))
    }

    /// Puts back what [`Self::take_superblocks`] gave.
    pub fn put_superblocks(&self, superblocks: &[Vec<u8>; 2]) -> Result<()> {
        let mut places = SUPERBLOCK_OFFSETS.iter().zip(superblocks);
        places.try_for_each(|(place, bytes)| self.overwrite(*place, bytes))
    }

    /// Changes both copies of the superblock.
    pub fn edit_superblock(&self, edit: impl FnOnce(&mut Superblock)) -> Result<()> {
        let bytes = self.bytes()?;
        let copies = SUPERBLOCK_OFFSETS.map(|place| Superblock::decode(&bytes[place as usize..]));
        let newest = copies.into_iter().flatten().max_by_key(|copy| copy.sequence);
        let mut superblock = newest.context("no valid superblock")?;
        edit(&mut superblock);
        SUPERBLOCK_OFFSETS.iter().try_for_each(|place| self.overwrite(*place, &superblock.encode()))
    }
}

impl Drop for SampleFolder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}
