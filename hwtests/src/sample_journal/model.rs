//! What the disks of a sample journal were, record by record.

/// One checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SampleCheckpoint {
    /// Its record's number.
    pub seq: u64,
    /// The record that it comes after.
    pub cut: u64,
    /// When it was taken, µs since the Unix epoch.
    pub time_us: u64,
    /// Its tag.
    pub tag: String,
}

/// What one record did to a volume.
#[derive(Clone, Debug)]
enum Effect {
    Bytes { offset_bytes: u64, data: Vec<u8> },
    Size { size_bytes: u64 },
}

/// The recovery disks, and what each record after them did.
#[derive(Clone, Debug)]
pub struct SampleModel {
    bases: Vec<Vec<u8>>,
    effects: Vec<(u64, u16, Effect)>,
    /// All checkpoints, also those inside of a sync.
    pub checkpoints: Vec<SampleCheckpoint>,
}

impl SampleModel {
    pub(super) fn new(bases: Vec<Vec<u8>>) -> Self {
        Self { bases, effects: Vec::new(), checkpoints: Vec::new() }
    }

    pub(super) fn put(&mut self, seq: u64, volume: u16, offset_bytes: u64, data: Vec<u8>) {
        self.effects.push((seq, volume, Effect::Bytes { offset_bytes, data }));
    }

    pub(super) fn resize(&mut self, seq: u64, volume: u16, size_bytes: u64) {
        self.effects.push((seq, volume, Effect::Size { size_bytes }));
    }

    /// A volume's recovery disk is as of record `seq` now: what was written before doesn't count.
    pub(super) fn rebase(&mut self, volume: u16, seq: u64, base: Vec<u8>) {
        self.effects.retain(|(at, of, _)| *of != volume || *at > seq);
        self.bases[usize::from(volume)] = base;
    }

    /// Forgets the records after `seq`, which never became durable.
    pub(super) fn cut_off(&mut self, seq: u64) {
        self.effects.retain(|(at, _, _)| *at <= seq);
        self.checkpoints.retain(|checkpoint| checkpoint.seq <= seq);
    }

    /// How many volumes there are.
    pub fn volume_count(&self) -> u16 {
        self.bases.len() as u16
    }

    /// A volume's bytes after record `seq`.
    pub fn image(&self, volume: u16, seq: u64) -> Vec<u8> {
        let mut bytes = self.bases[usize::from(volume)].clone();
        for (_, _, effect) in self.effects.iter().filter(|(at, of, _)| *at <= seq && *of == volume) {
            match effect {
                Effect::Bytes { offset_bytes, data } => {
                    bytes[*offset_bytes as usize..][..data.len()].copy_from_slice(data);
                }
                Effect::Size { size_bytes } => bytes.resize(*size_bytes as usize, 0),
            }
        }
        bytes
    }
}
