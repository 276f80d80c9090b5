//! Acknowledged numbers on the very disk whose writes are logged, so that the log has both in order.

use std::fs::File;
use std::ops::RangeInclusive;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use journal::storage::AlignedBuf;

use crate::powercut::log::{Log, Step};

/// Length of the reserved place, in bytes.
pub const REGION_BYTES: u64 = 4096;

/// Writes acknowledged numbers to a reserved place of a disk.
pub struct AckWriter {
    disk: File,
    offset_bytes: u64,
}

impl AckWriter {
    /// For the place at `offset_bytes` of a block device.
    ///
    /// # Errors
    /// The device can't be opened.
    pub fn open(device: &Path, offset_bytes: u64) -> Result<Self> {
        let disk = File::options()
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(device)
            .with_context(|| format!("open {}", device.display()))?;
        Ok(Self { disk, offset_bytes })
    }

    /// Everything up to `seq` is acknowledged. When this returns, the disk's log says so.
    ///
    /// # Errors
    /// The disk failed.
    pub fn write(&self, seq: u64) -> Result<()> {
        let mut page = AlignedBuf::zeroed(REGION_BYTES as usize);
        page[..8].copy_from_slice(&seq.to_le_bytes());
        page[8..16].copy_from_slice(&(!seq).to_le_bytes());
        self.disk.write_all_at(&page, self.offset_bytes).context("write an acknowledged number")
    }
}

/// What was acknowledged when, from a disk's log.
#[derive(Debug)]
pub struct Acknowledged {
    /// Entry of the log and number, both rising.
    acks: Vec<(usize, u64)>,
}

impl Acknowledged {
    /// Reads them from a log.
    ///
    /// # Errors
    /// The log can't be read, has none, or has one that is none.
    pub fn read(log: &Log, offset_bytes: u64) -> Result<Self> {
        let mut acks: Vec<(usize, u64)> = Vec::new();
        for (index, entry) in log.entries().iter().enumerate() {
            let Step::Write { offset_bytes: at, log_offset_bytes, .. } = entry.step else { continue };
            if at != offset_bytes {
                continue;
            }
            let (mut seq, mut inverse) = ([0; 8], [0; 8]);
            log.read_data(&mut seq, log_offset_bytes)?;
            log.read_data(&mut inverse, log_offset_bytes + 8)?;
            let (seq, inverse) = (u64::from_le_bytes(seq), u64::from_le_bytes(inverse));
            ensure!(
                seq == !inverse,
                "entry {index} of the log wrote something else over the acknowledgements"
            );
            ensure!(
                acks.last().is_none_or(|last| last.1 <= seq),
                "an acknowledgement was taken back at entry {index}"
            );
            acks.push((index, seq));
        }
        ensure!(!acks.is_empty(), "the log has no acknowledgement");
        Ok(Self { acks })
    }

    /// The moments of the log from the acknowledgement of `first_seq` or a later one until the last acknowledgement.
    pub fn span(&self, first_seq: u64) -> RangeInclusive<usize> {
        let first = self.acks.iter().find(|(_, seq)| *seq >= first_seq);
        let place = |ack: Option<&(usize, u64)>| ack.map_or(0, |(index, _)| index + 1);
        place(first)..=place(self.acks.last())
    }

    /// What had been acknowledged when power went after the first `cut` entries.
    pub fn at(&self, cut: usize) -> u64 {
        let before = self.acks.partition_point(|(index, _)| *index < cut);
        self.acks[..before].last().map_or(0, |(_, seq)| *seq)
    }

    /// How many different numbers were acknowledged.
    pub fn count(&self) -> usize {
        self.acks.chunk_by(|one, other| one.1 == other.1).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::powercut::log::tests::{HandmadeLog, Scratch};

    const SECTOR: u64 = 8;

    fn ack(log: HandmadeLog, seq: u64) -> HandmadeLog {
        let mut page = [0; REGION_BYTES as usize];
        page[..8].copy_from_slice(&seq.to_le_bytes());
        page[8..16].copy_from_slice(&(!seq).to_le_bytes());
        log.entry(SECTOR, REGION_BYTES / 512, 0, &page)
    }

    fn read(name: &str, log: HandmadeLog) -> Result<Acknowledged> {
        let scratch = Scratch::new(name);
        let log = Log::open(&scratch.file("log", &log.bytes())).expect("the log is good");
        Acknowledged::read(&log, SECTOR * 512)
    }

    #[test]
    fn a_number_counts_from_the_entry_after_its_own() {
        let log = ack(HandmadeLog::new().write(1, 1, 1), 0).flush();
        let acknowledged = read("acks", ack(ack(log.write(2, 2, 1), 7), 7).flush()).expect("good");
        assert_eq!((0..=7).map(|cut| acknowledged.at(cut)).collect::<Vec<_>>(), [0, 0, 0, 0, 0, 7, 7, 7]);
        assert_eq!((acknowledged.span(0), acknowledged.span(5)), (2..=6, 5..=6));
        assert_eq!(acknowledged.count(), 2);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        assert!(read("none", HandmadeLog::new().write(1, 1, 1)).is_err());
        assert!(read("back", ack(ack(HandmadeLog::new(), 7), 6)).is_err());
        assert!(read("other", HandmadeLog::new().write(SECTOR, 1, 8)).is_err());
    }
}
