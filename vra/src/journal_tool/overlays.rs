//! Locked checkpoints older than the history: overlays beside the journal have what was promoted past them.

use std::path::PathBuf;

use journal::batch::{Checkpoint, Epoch};
use uuid::Uuid;

use super::place::Journal;
use crate::receive::{LockedCheckpoint, VmFolder};
use crate::view::{ScratchError, ScratchFile, ScratchKeys, ScratchOwner};

impl Journal {
    /// Lists the locked checkpoints that can be opened with their overlays alone.
    pub(super) fn find_overlays(&mut self) {
        let oldest_seq = self.reader.survey.superblock.oldest_seq();
        let locked = self.manifest.as_ref().map(|manifest| manifest.locked.clone()).unwrap_or_default();
        for locked in locked.into_iter().filter(|locked| locked.cut < oldest_seq) {
            let why = match self.overlays_kept_seq(locked.cut) {
                Ok(kept_seq) if self.reader.add_kept(checkpoint_of(&locked), kept_seq) => continue,
                Ok(_) => "its overlays lack what was promoted".to_owned(),
                Err(error) => crate::report::chain(&error),
            };
            let lost = format!("the locked checkpoint of {} is lost: {why}", locked.time_us);
            told!("warning: {}: {lost}", self.vm_name());
            self.lost_locks.push(lost);
        }
    }

    /// Through where the overlays keep everything: nothing without any.
    fn overlays_kept_seq(&self, cut: u64) -> Result<u64, ScratchError> {
        let mut kept_seq = u64::MAX;
        for number in 0..self.reader.survey.superblock.volumes.len() as u16 {
            if self.overlay_path(cut, number).exists() {
                kept_seq = kept_seq.min(self.overlay(cut, number)?.kept_seq());
            }
        }
        Ok(if kept_seq == u64::MAX { 0 } else { kept_seq })
    }

    /// Opens an overlay to read.
    pub(super) fn overlay(&self, cut: u64, number: u16) -> Result<ScratchFile, ScratchError> {
        let path = self.overlay_path(cut, number);
        let survey = &self.reader.survey;
        let keys = ScratchKeys { keyring: &survey.keyring, encryption: survey.superblock.encryption };
        let (file, owner) = ScratchFile::look_at_overlay(&path, &keys)?;
        let ScratchOwner { view, journal, number: owners, seq, .. } = owner;
        if (view, journal, owners, seq) != (Uuid::nil(), survey.superblock.journal_id, number, cut) {
            return Err(ScratchError::Other { path });
        }
        Ok(file)
    }

    fn overlay_path(&self, cut: u64, number: u16) -> PathBuf {
        VmFolder::at(self.path.with_file_name("")).overlay(cut, number)
    }
}

fn checkpoint_of(locked: &LockedCheckpoint) -> Checkpoint {
    Checkpoint {
        epoch: Epoch { nonce: Uuid::from_u128(locked.checkpoint.nonce), counter: locked.checkpoint.counter },
        cut: locked.cut,
        member_set_version: locked.member_set_version.into(),
        time_us: locked.time_us.0,
        kind: locked.kind.into(),
        tag: locked.tag.as_deref().unwrap_or_default().to_owned(),
    }
}
