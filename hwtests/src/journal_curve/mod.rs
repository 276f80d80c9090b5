//! How a journal's file follows its load: the product's receiver over real files, with time as the caller wants it.

mod plot;
mod target;

use anyhow::{Result, ensure};

pub use plot::to_svg;
use target::Target;

/// A stretch of the load.
#[derive(Clone, Copy, Debug)]
pub struct Stretch {
    /// What it is, for people.
    pub name: &'static str,
    /// How long, in seconds.
    pub seconds: u64,
    /// What is written in a second, in bytes.
    pub bytes_per_s: u64,
}

/// What a journal is for.
#[derive(Clone, Copy, Debug)]
pub struct CurveSettings {
    /// How long history is kept, in seconds.
    pub history_s: u64,
    /// Length of a slot, in bytes.
    pub slot_len_bytes: u64,
    /// Most slots that the file may have.
    pub max_slots: u32,
}

impl CurveSettings {
    /// What the file may occupy at most, in bytes: all slots and what is before them.
    pub fn limit_bytes(&self) -> u64 {
        journal::format::slot_offset_bytes(self.max_slots, self.slot_len_bytes)
    }
}

/// The journal after one second.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Seconds since the load's begin.
    pub at_s: u64,
    /// What was written in this second, in bytes.
    pub written_bytes: u64,
    /// What the file occupies on its filesystem, in bytes, as `du` says.
    pub occupied_bytes: u64,
    /// How far back the oldest checkpoint is, in seconds.
    pub history_s: u64,
}

/// Runs a load with a checkpoint every second; a sample after each. Every record is acknowledged in its second, or it is an error.
///
/// # Errors
/// The target refuses, or the files fail.
pub fn run(settings: &CurveSettings, load: &[Stretch]) -> Result<Vec<Sample>> {
    let mut target = Target::create(settings)?;
    let mut samples = Vec::new();
    for stretch in load {
        for _ in 0..stretch.seconds {
            let at_s = samples.len() as u64;
            target.second(stretch.bytes_per_s)?;
            let oldest_s = target.oldest_checkpoint_s().unwrap_or(at_s);
            samples.push(Sample {
                at_s,
                written_bytes: stretch.bytes_per_s,
                occupied_bytes: target.occupied_bytes()?,
                history_s: at_s - oldest_s.min(at_s),
            });
        }
    }
    ensure!(target.is_whole()?, "the newest checkpoint is not what was written");
    Ok(samples)
}
