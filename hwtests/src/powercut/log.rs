//! The log of a disk's writes, in the format of dm-log-writes
//! (kernel: drivers/md/dm-log-writes.c and Documentation/admin-guide/device-mapper/log-writes.rst; QEMU: block/blklogwrites.c).
//!
//! Everything is counted in the log's own sectors. Sector 0 is the superblock; then each entry takes one sector, and the
//! data of a write follows it.

use std::fs::File;
use std::ops::RangeInclusive;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// "jsfwshr" (`WRITE_LOG_MAGIC`).
const MAGIC: u64 = 0x006a_7366_7773_6872;
/// `WRITE_LOG_VERSION`.
const VERSION: u64 = 1;

const FLAG_FLUSH: u64 = 1;
const FLAG_FUA: u64 = 1 << 1;
const FLAG_DISCARD: u64 = 1 << 2;
const FLAG_MARK: u64 = 1 << 3;
const FLAG_METADATA: u64 = 1 << 4;
const FLAGS_KNOWN: u64 = FLAG_FLUSH | FLAG_FUA | FLAG_DISCARD | FLAG_MARK | FLAG_METADATA;

/// `struct log_write_super`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct RawSuper {
    /// [`MAGIC`].
    pub(crate) magic: U64,
    /// [`VERSION`].
    pub(crate) version: U64,
    /// Entries in the log.
    pub(crate) entries: U64,
    /// Bytes of a sector of this log, a power of two.
    pub(crate) sector_bytes: U32,
}

/// `struct log_write_entry`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct RawEntry {
    /// First sector on the disk.
    pub(crate) sector: U64,
    /// How many sectors.
    pub(crate) sectors: U64,
    /// `LOG_FLUSH_FLAG` and its like.
    pub(crate) flags: U64,
    /// Bytes of a mark's text, which lies behind this entry in the same sector.
    pub(crate) mark_bytes: U64,
}

const _: () = assert!(size_of::<RawSuper>() == 28 && size_of::<RawEntry>() == 32);

/// Why a log can't be read.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The file can't be read.
    #[error("reading {path} at byte {offset_bytes}")]
    Io {
        /// The log.
        path: PathBuf,
        /// Where.
        offset_bytes: u64,
        /// Why.
        source: std::io::Error,
    },
    /// It is something else.
    #[error("{path} is not a log of writes: {what}")]
    NotALog {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// An entry makes no sense.
    #[error("{path}: entry {entry} {what}")]
    BadEntry {
        /// The log.
        path: PathBuf,
        /// Which entry, from 0.
        entry: u64,
        /// What is wrong with it.
        what: String,
    },
}

/// What one entry of the log did to the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Data was written.
    Write {
        /// Where on the disk, bytes.
        offset_bytes: u64,
        /// How much, bytes.
        len_bytes: u64,
        /// Where the data lies in the log, bytes.
        log_offset_bytes: u64,
    },
    /// A range was deallocated and reads zeroes.
    Discard {
        /// Where on the disk, bytes.
        offset_bytes: u64,
        /// How much, bytes.
        len_bytes: u64,
    },
    /// Nothing but its flags: a flush, or a mark.
    Nothing,
}

/// One entry of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What it did.
    pub step: Step,
    /// All writes before it are durable (a flush comes before its own data).
    pub flush: bool,
    /// Its own data is durable.
    pub fua: bool,
    /// The text of a mark (dm-log-writes only).
    pub mark: Option<String>,
}

/// A log of writes, open for replay.
#[derive(Debug)]
pub struct Log {
    path: PathBuf,
    file: File,
    sector_bytes: u32,
    entries: Vec<Entry>,
}

impl Log {
    /// Reads the superblock and all entries; data stays in the file.
    pub fn open(path: &Path) -> Result<Self, LogError> {
        let failed = |source| LogError::Io { path: path.to_path_buf(), offset_bytes: 0, source };
        let file = File::open(path).map_err(failed)?;
        let log_bytes = file.metadata().map_err(failed)?.len();
        let mut raw = [0; size_of::<RawSuper>()];
        file.read_exact_at(&mut raw, 0).map_err(failed)?;
        let head = RawSuper::read_from_bytes(&raw).expect("the buffer has the struct's size");
        let sector_bytes = check_super(path, &head, log_bytes)?;
        let mut log = Self { path: path.to_path_buf(), file, sector_bytes, entries: Vec::new() };
        log.read_entries(head.entries.get(), log_bytes)?;
        Ok(log)
    }

    /// Its entries in order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Bytes of a sector of this log: what is never torn.
    pub fn sector_bytes(&self) -> u32 {
        self.sector_bytes
    }

    /// `count` moments at which power may go, sorted, all different: a moment `n` is after the first `n` entries. All there are
    /// if that is fewer.
    pub fn cut_points(&self, count: usize, seed: u64) -> Vec<usize> {
        self.cut_points_in(0..=self.entries.len(), count, seed)
    }

    /// The same among the moments of `span`.
    pub fn cut_points_in(&self, span: RangeInclusive<usize>, count: usize, seed: u64) -> Vec<usize> {
        use rand::SeedableRng;
        use rand::seq::IndexedRandom;
        let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
        let all: Vec<usize> = span.take_while(|moment| *moment <= self.entries.len()).collect();
        let mut points: Vec<usize> = all.sample(&mut rng, count).copied().collect();
        points.sort_unstable();
        points
    }

    /// The data of a [`Step::Write`], from `log_offset_bytes` on.
    pub(crate) fn read_data(&self, buffer: &mut [u8], log_offset_bytes: u64) -> Result<(), LogError> {
        self.file.read_exact_at(buffer, log_offset_bytes).map_err(|source| LogError::Io {
            path: self.path.clone(),
            offset_bytes: log_offset_bytes,
            source,
        })
    }

    fn read_entries(&mut self, count: u64, log_bytes: u64) -> Result<(), LogError> {
        let sector_bytes = u64::from(self.sector_bytes);
        let mut at = sector_bytes;
        for number in 0..count {
            let bad = |what: &str| LogError::BadEntry {
                path: self.path.clone(),
                entry: number,
                what: what.to_owned(),
            };
            let mut sector = vec![0; self.sector_bytes as usize];
            self.read_data(&mut sector, at)?;
            let (raw, rest) = RawEntry::read_from_prefix(&sector).expect("a sector holds more than an entry");
            at += sector_bytes;
            let flags = raw.flags.get();
            if flags & !FLAGS_KNOWN != 0 {
                return Err(bad(&format!("has unknown flags {flags:#x}")));
            }
            let len_bytes = raw.sectors.get().checked_mul(sector_bytes).ok_or_else(|| bad("is too long"))?;
            let offset_bytes =
                raw.sector.get().checked_mul(sector_bytes).ok_or_else(|| bad("lies too far out"))?;
            offset_bytes.checked_add(len_bytes).ok_or_else(|| bad("ends too far out"))?;
            let mark = if flags & FLAG_MARK == 0 {
                None
            } else {
                let text = usize::try_from(raw.mark_bytes.get()).ok().and_then(|len| rest.get(..len));
                let text = text.ok_or_else(|| bad("has a mark longer than its sector"))?;
                Some(String::from_utf8_lossy(text).trim_end_matches('\0').to_owned())
            };
            let step = if len_bytes == 0 || mark.is_some() {
                Step::Nothing
            } else if flags & FLAG_DISCARD != 0 {
                Step::Discard { offset_bytes, len_bytes }
            } else {
                let log_offset_bytes = at;
                at = at
                    .checked_add(len_bytes)
                    .filter(|&end| end <= log_bytes)
                    .ok_or_else(|| bad("has data beyond the end of the log"))?;
                Step::Write { offset_bytes, len_bytes, log_offset_bytes }
            };
            self.entries.push(Entry {
                step,
                flush: flags & FLAG_FLUSH != 0,
                fua: flags & FLAG_FUA != 0,
                mark,
            });
        }
        Ok(())
    }
}

fn check_super(path: &Path, head: &RawSuper, log_bytes: u64) -> Result<u32, LogError> {
    let not = |what: String| LogError::NotALog { path: path.to_path_buf(), what };
    if head.magic.get() != MAGIC {
        return Err(not(format!("it begins with {:#x}", head.magic.get())));
    }
    if head.version.get() != VERSION {
        return Err(not(format!("its version is {}, not {VERSION}", head.version.get())));
    }
    let sector_bytes = head.sector_bytes.get();
    if !sector_bytes.is_power_of_two() || !(512..=65536).contains(&sector_bytes) {
        return Err(not(format!("its sectors have {sector_bytes} bytes")));
    }
    if head.entries.get() > log_bytes / u64::from(sector_bytes) {
        return Err(not(format!("it counts {} entries in {log_bytes} bytes", head.entries.get())));
    }
    Ok(sector_bytes)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A log made by hand.
    pub(crate) struct HandmadeLog {
        bytes: Vec<u8>,
        entries: u64,
    }

    impl HandmadeLog {
        pub(crate) fn new() -> Self {
            Self { bytes: vec![0; 512], entries: 0 }
        }

        pub(crate) fn write(self, sector: u64, fill: u8, sectors: u64) -> Self {
            self.entry(sector, sectors, 0, &vec![fill; sectors as usize * 512])
        }

        pub(crate) fn fua(self, sector: u64, fill: u8) -> Self {
            self.entry(sector, 1, FLAG_FUA, &[fill; 512])
        }

        pub(crate) fn flush(self) -> Self {
            self.entry(0, 0, FLAG_FLUSH, &[])
        }

        pub(crate) fn discard(self, sector: u64, sectors: u64) -> Self {
            self.entry(sector, sectors, FLAG_DISCARD, &[])
        }

        pub(crate) fn entry(mut self, sector: u64, sectors: u64, flags: u64, data: &[u8]) -> Self {
            let raw = RawEntry {
                sector: sector.into(),
                sectors: sectors.into(),
                flags: flags.into(),
                mark_bytes: 0.into(),
            };
            let start = self.bytes.len();
            self.bytes.extend_from_slice(raw.as_bytes());
            self.bytes.resize(start + 512, 0);
            self.bytes.extend_from_slice(data);
            self.entries += 1;
            self
        }

        pub(crate) fn mark(mut self, text: &str) -> Self {
            let start = self.bytes.len();
            self = self.entry(0, 0, FLAG_MARK, &[]);
            self.bytes[start + 24..start + 32].copy_from_slice(&(text.len() as u64).to_le_bytes());
            self.bytes[start + 32..start + 32 + text.len()].copy_from_slice(text.as_bytes());
            self
        }

        pub(crate) fn bytes(mut self) -> Vec<u8> {
            let head = RawSuper {
                magic: MAGIC.into(),
                version: VERSION.into(),
                entries: self.entries.into(),
                sector_bytes: 512.into(),
            };
            self.bytes[..size_of::<RawSuper>()].copy_from_slice(head.as_bytes());
            self.bytes
        }
    }

    /// A folder that goes when the test ends.
    pub(crate) struct Scratch(PathBuf);

    impl Scratch {
        pub(crate) fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("hwtests-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&path).expect("the temporary folder is writable");
            Self(path)
        }

        pub(crate) fn file(&self, name: &str, content: &[u8]) -> PathBuf {
            let path = self.0.join(name);
            std::fs::write(&path, content).expect("the temporary folder is writable");
            path
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn entries_come_back_as_they_were_logged() {
        let scratch = Scratch::new("entries");
        let log =
            HandmadeLog::new().write(8, 0xaa, 2).mark("here").flush().discard(4, 3).fua(9, 0xbb).bytes();
        let log = Log::open(&scratch.file("log", &log)).expect("the log is good");
        let steps: Vec<&Step> = log.entries().iter().map(|entry| &entry.step).collect();
        assert_eq!(*steps[0], Step::Write { offset_bytes: 4096, len_bytes: 1024, log_offset_bytes: 1024 });
        assert_eq!((steps[1], log.entries()[1].mark.as_deref()), (&Step::Nothing, Some("here")));
        assert!(log.entries()[2].flush && !log.entries()[2].fua);
        assert_eq!(*steps[3], Step::Discard { offset_bytes: 2048, len_bytes: 1536 });
        assert!(log.entries()[4].fua);
        let mut data = [0; 512];
        let Step::Write { log_offset_bytes, .. } = *steps[4] else { panic!("a FUA write is a write") };
        log.read_data(&mut data, log_offset_bytes).expect("the data is there");
        assert_eq!(data, [0xbb; 512]);
    }

    #[test]
    fn what_is_no_log_is_refused_with_its_reason() {
        let scratch = Scratch::new("refused");
        let good = HandmadeLog::new().write(0, 1, 1).bytes();
        let refused = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = good.clone();
            change(&mut bytes);
            Log::open(&scratch.file("log", &bytes)).expect_err("must be refused").to_string()
        };
        assert!(refused(&|bytes| bytes[0] ^= 1).contains("not a log of writes"));
        assert!(refused(&|bytes| bytes[8] = 2).contains("version is 2"));
        assert!(refused(&|bytes| bytes[24] = 1).contains("sectors have"));
        assert!(refused(&|bytes| bytes[16] = 200).contains("counts 200 entries"));
        assert!(refused(&|bytes| bytes.truncate(1100)).contains("entry 0 has data beyond"));
        assert!(refused(&|bytes| bytes[512 + 16] = 0x20).contains("unknown flags 0x20"));
        assert!(refused(&|bytes| bytes[512 + 15] = 0xff).contains("entry 0 is too long"));
    }

    #[test]
    fn cut_points_are_sorted_distinct_and_repeat_with_their_seed() {
        let scratch = Scratch::new("cuts");
        let mut log = HandmadeLog::new();
        for sector in 0..20 {
            log = log.write(sector, 1, 1);
        }
        let log = Log::open(&scratch.file("log", &log.bytes())).expect("the log is good");
        let points = log.cut_points(8, 7);
        assert_eq!((points.len(), &points), (8, &log.cut_points(8, 7)));
        assert!(points.windows(2).all(|pair| pair[0] < pair[1]) && points[7] <= 20);
        assert_eq!(log.cut_points(99, 1), (0..=20).collect::<Vec<_>>());
        assert_eq!(log.cut_points_in(18..=99, 99, 1), [18, 19, 20]);
    }
}
