//! Rebuilds a disk as a power cut may have left it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::log::{Entry, Log, LogError, Step};

const COPY_BYTES: u64 = 1 << 20;

/// Why a disk can't be rebuilt.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// The log can't be read.
    #[error(transparent)]
    Log(#[from] LogError),
    /// An image can't be read or written.
    #[error("{doing} {path}")]
    Image {
        /// What was being done.
        doing: &'static str,
        /// To which image.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// Cuts must come in order.
    #[error("a cut after {asked} entries was asked for when {reached} entries had already been made durable")]
    Backwards {
        /// The cut asked for.
        asked: usize,
        /// How far the durable part had come.
        reached: usize,
    },
}

/// What becomes of the writes that no flush covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// All of them reached the disk.
    AllLanded,
    /// None did.
    AllLost,
    /// Each by chance: whole, lost, or torn at a sector's edge.
    Random {
        /// What chance depends on.
        seed: u64,
    },
}

/// Rebuilds one disk at many moments of one log, each at or after the one before.
#[derive(Debug)]
pub struct Replayer<'a> {
    log: &'a Log,
    durable: PathBuf,
    file: File,
    durable_entries: usize,
}

impl<'a> Replayer<'a> {
    /// Begins with the disk's first image, which is copied to `work`, a file of the replayer's own.
    pub fn new(log: &'a Log, base_image: &Path, work: &Path) -> Result<Self, ReplayError> {
        copy_image(base_image, work)?;
        let file = open_image(work)?;
        Ok(Self { log, durable: work.to_path_buf(), file, durable_entries: 0 })
    }

    /// Writes the disk as it may have been when power went after the first `cut` entries to `target`.
    pub fn cut(&mut self, cut: usize, fate: Fate, target: &Path) -> Result<(), ReplayError> {
        let entries = &self.log.entries()[..cut.min(self.log.entries().len())];
        let covered = entries.iter().rposition(|entry| entry.flush).unwrap_or(0);
        if covered < self.durable_entries {
            return Err(ReplayError::Backwards { asked: cut, reached: self.durable_entries });
        }
        for entry in &entries[self.durable_entries..covered] {
            self.apply(&self.file, &self.durable, entry, entry_bytes(entry))?;
        }
        self.durable_entries = covered;
        copy_image(&self.durable, target)?;
        let image = open_image(target)?;
        let mut rng = StdRng::seed_from_u64(match fate {
            Fate::Random { seed } => seed ^ (cut as u64).rotate_left(32),
            Fate::AllLanded | Fate::AllLost => 0,
        });
        for entry in &entries[covered..] {
            let all_bytes = entry_bytes(entry);
            let landed_bytes = match fate {
                _ if entry.fua => all_bytes,
                Fate::AllLanded => all_bytes,
                Fate::AllLost => 0,
                Fate::Random { .. } => self.landed_bytes(&mut rng, all_bytes),
            };
            self.apply(&image, target, entry, landed_bytes)?;
        }
        Ok(())
    }

    /// Half of the writes land, a quarter is lost, a quarter is torn.
    fn landed_bytes(&self, rng: &mut StdRng, all_bytes: u64) -> u64 {
        let sector_bytes = u64::from(self.log.sector_bytes());
        match rng.random_range(0..4) {
            0 | 1 => all_bytes,
            2 => 0,
            _ => rng.random_range(0..=all_bytes / sector_bytes) * sector_bytes,
        }
    }

    /// Puts the first `landed_bytes` of an entry onto an image.
    fn apply(&self, image: &File, path: &Path, entry: &Entry, landed_bytes: u64) -> Result<(), ReplayError> {
        let (offset_bytes, log_offset_bytes) = match entry.step {
            Step::Nothing => return Ok(()),
            Step::Write { offset_bytes, log_offset_bytes, .. } => (offset_bytes, Some(log_offset_bytes)),
            Step::Discard { offset_bytes, .. } => (offset_bytes, None),
        };
        let mut buffer = vec![0; landed_bytes.min(COPY_BYTES) as usize];
        let mut done_bytes = 0;
        while done_bytes < landed_bytes {
            let len = (landed_bytes - done_bytes).min(COPY_BYTES) as usize;
            if let Some(log_offset_bytes) = log_offset_bytes {
                self.log.read_data(&mut buffer[..len], log_offset_bytes + done_bytes)?;
            }
            image.write_all_at(&buffer[..len], offset_bytes + done_bytes).map_err(|source| {
                ReplayError::Image { doing: "writing", path: path.to_path_buf(), source }
            })?;
            done_bytes += len as u64;
        }
        Ok(())
    }
}

impl Log {
    /// Rebuilds the disk at one moment only: [`Replayer`] is quicker for many.
    pub fn replay(
        &self,
        base_image: &Path,
        cut: usize,
        fate: Fate,
        target: &Path,
    ) -> Result<(), ReplayError> {
        let work = target.with_extension("durable");
        let result =
            Replayer::new(self, base_image, &work).and_then(|mut replayer| replayer.cut(cut, fate, target));
        let _ = fs::remove_file(&work);
        result
    }
}

fn entry_bytes(entry: &Entry) -> u64 {
    match entry.step {
        Step::Nothing => 0,
        Step::Write { len_bytes, .. } | Step::Discard { len_bytes, .. } => len_bytes,
    }
}

/// Copies an image and leaves its holes, sharing blocks where the file system can.
fn copy_image(from: &Path, to: &Path) -> Result<(), ReplayError> {
    let _ = fs::remove_file(to);
    let status = std::process::Command::new("cp")
        .args(["--sparse=always", "--reflink=auto", "--no-preserve=mode", "--"])
        .args([from, to])
        .stderr(std::process::Stdio::null())
        .status()
        .and_then(
            |status| if status.success() { Ok(()) } else { Err(std::io::Error::other(status.to_string())) },
        );
    status.map_err(|source| ReplayError::Image { doing: "copying to", path: to.to_path_buf(), source })
}

fn open_image(path: &Path) -> Result<File, ReplayError> {
    File::options().read(true).write(true).open(path).map_err(|source| ReplayError::Image {
        doing: "opening",
        path: path.to_path_buf(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::log::tests::{HandmadeLog, Scratch};
    use super::*;

    const SECTOR: usize = 512;

    struct Rig {
        scratch: Scratch,
        log: Log,
        base: PathBuf,
    }

    impl Rig {
        fn new(name: &str, log: HandmadeLog) -> Self {
            let scratch = Scratch::new(name);
            let log = Log::open(&scratch.file("log", &log.bytes())).expect("the log is good");
            let base = scratch.file("base", &[0x11; 16 * SECTOR]);
            Self { scratch, log, base }
        }

        /// The first byte of each sector, after checking that no sector is mixed.
        fn sectors(&self, cut: usize, fate: Fate) -> Vec<u8> {
            let target = self.scratch.file("image", &[]);
            self.log.replay(&self.base, cut, fate, &target).expect("replay works");
            let image = fs::read(&target).expect("the image is there");
            assert_eq!(image.len(), 16 * SECTOR);
            image
                .chunks(SECTOR)
                .map(|sector| {
                    assert!(sector.iter().all(|byte| *byte == sector[0]), "a sector is torn");
                    sector[0]
                })
                .collect()
        }
    }

    fn random(seed: u64) -> Fate {
        Fate::Random { seed }
    }

    #[test]
    fn what_a_flush_covers_is_there_whatever_the_seed() {
        let rig = Rig::new("flush", HandmadeLog::new().write(0, 2, 1).write(1, 3, 1).flush().write(2, 4, 1));
        for seed in 0..50 {
            assert_eq!(rig.sectors(4, random(seed))[..2], [2, 3]);
        }
        assert_eq!(rig.sectors(4, Fate::AllLost)[..4], [2, 3, 0x11, 0x11]);
        assert_eq!(rig.sectors(4, Fate::AllLanded)[..4], [2, 3, 4, 0x11]);
    }

    #[test]
    fn a_flush_that_came_after_the_cut_covers_nothing() {
        let rig = Rig::new("later", HandmadeLog::new().write(0, 2, 1).write(1, 3, 1).flush());
        assert_eq!(rig.sectors(2, Fate::AllLost)[..2], [0x11, 0x11]);
        assert_eq!(rig.sectors(0, Fate::AllLanded)[..2], [0x11, 0x11]);
        let seen: BTreeSet<Vec<u8>> =
            (0..64).map(|seed| rig.sectors(2, random(seed))[..2].to_vec()).collect();
        assert_eq!(seen.len(), 4, "every subset of two writes comes up: {seen:?}");
    }

    #[test]
    fn fua_is_durable_by_itself_and_covers_no_other_write() {
        let rig = Rig::new("fua", HandmadeLog::new().write(0, 2, 1).fua(1, 3));
        assert_eq!(rig.sectors(2, Fate::AllLost)[..2], [0x11, 3]);
    }

    #[test]
    fn later_writes_and_discards_win_over_earlier_ones() {
        let log = HandmadeLog::new().write(0, 2, 4).discard(1, 2).write(2, 5, 1).flush();
        let rig = Rig::new("order", log);
        assert_eq!(rig.sectors(4, Fate::AllLost)[..5], [2, 0, 5, 2, 0x11]);
    }

    #[test]
    fn writes_tear_at_sectors_and_a_seed_always_tears_alike() {
        let rig = Rig::new("tear", HandmadeLog::new().write(0, 9, 8));
        let landed = |seed| rig.sectors(1, random(seed)).iter().filter(|fill| **fill == 9).count();
        let lengths: BTreeSet<usize> = (0..200).map(landed).collect();
        assert_eq!(lengths, (0..=8).collect());
        assert_eq!(landed(5), landed(5));
    }

    #[test]
    fn a_replayer_goes_on_from_cut_to_cut_and_refuses_to_go_back() {
        let log = HandmadeLog::new().write(0, 2, 1).flush().write(1, 3, 1).flush().write(2, 4, 1);
        let rig = Rig::new("many", log);
        let (work, target) = (rig.scratch.file("work", &[]), rig.scratch.file("cut", &[]));
        let mut replayer = Replayer::new(&rig.log, &rig.base, &work).expect("the base is there");
        for (cut, expected) in [(1, [0x11, 0x11]), (2, [2, 0x11]), (3, [2, 0x11]), (5, [2, 3])] {
            replayer.cut(cut, Fate::AllLost, &target).expect("replay works");
            let image = fs::read(&target).expect("the image is there");
            assert_eq!([image[0], image[SECTOR]], expected, "cut {cut}");
        }
        assert!(matches!(replayer.cut(1, Fate::AllLost, &target), Err(ReplayError::Backwards { .. })));
    }
}
