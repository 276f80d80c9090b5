use journal::batch::{BatchError, BatchLink, BatchView, RecordKind, RecordView};

use crate::wire::VolumeShape;

/// Checks that the batches of a granted stream continue each other and are what this VM can have.
#[derive(Clone, Debug)]
pub struct Intake {
    /// What the next batch must carry.
    link: BatchLink,
    next_seq: u64,
    volumes: Vec<VolumeShape>,
}

/// What is wrong with a batch that came on a stream. Nothing of such a batch is kept.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IntakeError {
    /// It is no valid batch.
    #[error("the batch that should begin with record {expected_seq} is damaged")]
    Batch {
        /// The number that its first record should have.
        expected_seq: u64,
        /// What is damaged.
        #[source]
        source: BatchError,
    },
    /// It is of another journal, generation or opening.
    #[error("the batch that begins with record {first_seq} is of another {what}")]
    Link {
        /// Its first record.
        first_seq: u64,
        /// Which of them.
        what: &'static str,
    },
    /// Its predecessor is not the last batch that came.
    #[error("the batch that begins with record {first_seq} follows another batch than the last one")]
    Chain {
        /// Its first record.
        first_seq: u64,
    },
    /// Its first record isn't the next one.
    #[error("record {found_seq} came where record {expected_seq} belongs")]
    Gap {
        /// The number that belongs there.
        expected_seq: u64,
        /// What came.
        found_seq: u64,
    },
    /// A record that this VM can't have.
    #[error("record {seq}: {what}")]
    Record {
        /// The record.
        seq: u64,
        /// What is wrong with it.
        what: &'static str,
    },
}

impl Intake {
    /// For a stream that was granted with `link` and goes on with `next_seq`.
    pub fn new(link: BatchLink, next_seq: u64, volumes: Vec<VolumeShape>) -> Self {
        Self { link, next_seq, volumes }
    }

    /// The number that the next record must have.
    pub fn next_seq(&self) -> u64 {
        self.next_seq
    }

    /// What the next batch must carry.
    pub fn link(&self) -> &BatchLink {
        &self.link
    }

    /// Checks the batch in `bytes`, checksums and all, and takes it as the last one.
    ///
    /// # Errors
    /// What is wrong with it, naming the record.
    pub fn check<'a>(&mut self, bytes: &'a [u8]) -> Result<BatchView<'a>, IntakeError> {
        let view = BatchView::parse(bytes)
            .map_err(|source| IntakeError::Batch { expected_seq: self.next_seq, source })?;
        let (first_seq, link) = (view.first_seq(), view.link());
        let other = |what| Err(IntakeError::Link { first_seq, what });
        if view.len_bytes() != bytes.len() {
            let source = BatchError::Length(bytes.len());
            return Err(IntakeError::Batch { expected_seq: self.next_seq, source });
        }
        if view.is_local() {
            return Err(IntakeError::Record { seq: first_seq, what: "only the target makes such a batch" });
        }
        if link.journal_id != self.link.journal_id {
            return other("journal");
        }
        if link.generation != self.link.generation {
            return other("generation");
        }
        if link.open_count != self.link.open_count {
            return other("opening of the journal");
        }
        if first_seq != self.next_seq {
            return Err(IntakeError::Gap { expected_seq: self.next_seq, found_seq: first_seq });
        }
        if link.prev_batch_crc != self.link.prev_batch_crc {
            return Err(IntakeError::Chain { first_seq });
        }
        for record in view.records() {
            self.check_record(&record).map_err(|what| IntakeError::Record { seq: record.seq(), what })?;
        }
        self.next_seq = view.last_seq() + 1;
        self.link.prev_batch_crc = view.crc();
        Ok(view)
    }

    fn check_record(&self, record: &RecordView<'_>) -> Result<(), &'static str> {
        let volume = || self.volumes.get(usize::from(record.volume())).ok_or("the VM has no such volume");
        match record.kind() {
            RecordKind::Write | RecordKind::Zeroes | RecordKind::SyncData => {
                let volume = volume()?;
                let block_bytes = u64::from(volume.logical_block_bytes);
                let end = record.offset_bytes().checked_add(record.len_bytes());
                if end.is_none_or(|end| end > volume.size_bytes) {
                    return Err("its range ends beyond the volume");
                }
                if !record.offset_bytes().is_multiple_of(block_bytes)
                    || !record.len_bytes().is_multiple_of(block_bytes)
                {
                    return Err("its range is not in whole logical blocks");
                }
            }
            RecordKind::SyncBegin | RecordKind::SyncEnd => {
                // One that was under way while the volume grew is about its former size.
                if record.len_bytes() > volume()?.size_bytes {
                    return Err("its size is above the volume's");
                }
            }
            RecordKind::Resize => {
                let volume = volume()?;
                if record.len_bytes() > volume.size_bytes
                    || !record.len_bytes().is_multiple_of(volume.logical_block_bytes.into())
                {
                    return Err("its size is above the volume's, or not in whole logical blocks");
                }
            }
            RecordKind::Void | RecordKind::Checkpoint | RecordKind::EndOfGeneration => {}
            RecordKind::VerifyDigest | RecordKind::PromotionIntent => {
                return Err("its kind is not part of version 1 of the stream");
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use journal::batch::{BatchSealer, Record};
    use uuid::Uuid;

    use super::*;
    use crate::api::VolumeId;

    fn link() -> BatchLink {
        BatchLink {
            journal_id: Uuid::from_u128(1),
            generation: Uuid::from_u128(2),
            open_count: 3,
            prev_batch_crc: 4,
        }
    }

    fn intake() -> Intake {
        let volume = VolumeShape {
            volume: 0,
            id: VolumeId(Uuid::from_u128(9)),
            logical_block_bytes: 4096,
            size_bytes: 1 << 20,
            left: false,
        };
        Intake::new(link(), 10, vec![volume])
    }

    fn sealed(link: &BatchLink, records: impl IntoIterator<Item = Record>) -> Vec<u8> {
        let mut sealer = BatchSealer::new();
        records.into_iter().for_each(|record| sealer.push(record).expect("room"));
        sealer.seal(link, 0).expect("records").to_bytes().to_vec()
    }

    fn write(seq: u64, offset_bytes: u64) -> Record {
        Record::write(seq, 1, 0, offset_bytes, Bytes::from(vec![seq as u8; 4096]))
    }

    #[test]
    fn batches_that_continue_each_other_pass() {
        let mut intake = intake();
        let first = sealed(&link(), [write(10, 0), write(11, 4096)]);
        let crc = intake.check(&first).expect("the first").crc();
        let second = sealed(&BatchLink { prev_batch_crc: crc, ..link() }, [write(12, 0)]);
        intake.check(&second).expect("the second");
        assert_eq!(intake.next_seq(), 13);
        assert_eq!(intake.check(&second).err(), Some(IntakeError::Gap { expected_seq: 13, found_seq: 12 }));
    }

    #[test]
    fn a_batch_of_elsewhere_is_named() {
        let of = |link: BatchLink| intake().check(&sealed(&link, [write(10, 0)])).err();
        let what = |what| Some(IntakeError::Link { first_seq: 10, what });
        assert_eq!(of(BatchLink { journal_id: Uuid::from_u128(7), ..link() }), what("journal"));
        assert_eq!(of(BatchLink { generation: Uuid::from_u128(7), ..link() }), what("generation"));
        assert_eq!(of(BatchLink { open_count: 2, ..link() }), what("opening of the journal"));
        assert_eq!(of(BatchLink { prev_batch_crc: 0, ..link() }), Some(IntakeError::Chain { first_seq: 10 }));
    }

    #[test]
    fn records_outside_the_volume_are_refused() {
        let check = |record| intake().check(&sealed(&link(), [record])).err();
        let refused = |what| Some(IntakeError::Record { seq: 10, what });
        assert_eq!(check(write(10, 1 << 20)), refused("its range ends beyond the volume"));
        assert_eq!(check(write(10, 512)), refused("its range is not in whole logical blocks"));
        let other_volume = Record { volume: 1, ..write(10, 0) };
        assert_eq!(check(other_volume), refused("the VM has no such volume"));
        let end = |size_bytes| Record::sync_end(10, 1, 0, size_bytes, 5);
        assert_eq!(check(end((1 << 20) + 4096)), refused("its size is above the volume's"));
        assert_eq!(check(end(1 << 19)), None, "the volume has grown since the sync began");
    }

    #[test]
    fn a_volume_grows_in_whole_blocks_and_no_further_than_its_definition_says() {
        let check =
            |size_bytes| intake().check(&sealed(&link(), [Record::resize(10, 1, 0, size_bytes)])).err();
        assert_eq!(check(1 << 20), None);
        for size_bytes in [(1 << 20) + 4096, (1 << 19) + 512, 1 << 40] {
            let what = "its size is above the volume's, or not in whole logical blocks";
            assert_eq!(check(size_bytes), Some(IntakeError::Record { seq: 10, what }), "{size_bytes}");
        }
    }

    #[test]
    fn every_flipped_bit_of_a_batch_is_found() {
        let batch = sealed(&link(), [write(10, 0), Record::zeroes(11, 1, 0, 0, 4096)]);
        let payload_end = batch.len();
        for byte in (0..400).chain((400..payload_end).step_by(97)) {
            let mut flipped = batch.clone();
            flipped[byte] ^= 1 << (byte % 8);
            let padding = (512 - (512 - 128 - 2 * 64 - 4)..512).contains(&byte) || byte >= 512 + 4096;
            assert_eq!(intake().check(&flipped).is_err(), !padding, "byte {byte}");
        }
    }
}
