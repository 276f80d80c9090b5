//! A VM's disks as they were: which number a moment stands for, and what a view of it is made of.

use std::sync::Arc;

use journal::crypt::{Encryption, Keyring};
use journal::recovery::SurveyOptions;
use journal::storage::ring::{Access, DirectFile};
use journal::view::{Reader, View, ViewError};
use tokio::sync::oneshot;

use super::TargetVm;
use super::kept_locks::KeptLock;
use super::pins::{Pin, Purpose};
use crate::api::view::PointInTime;
use crate::receive::files;
use crate::receive::target_error::TargetError;
use crate::receive::view_memory::ViewMemoryShare;
use crate::view::{Freshness, ScratchKeys, ViewSource};

/// A VM's disks as they were, and the files to read them from. The history stays as long as this lives.
pub struct OpenedView {
    /// What is where.
    pub view: View,
    /// The journal, to read.
    pub journal: DirectFile,
    /// The recovery disks, to read, by volume number.
    pub disks: Vec<DirectFile>,
    /// The journal's keys.
    pub keyring: Keyring,
    /// Whether it encrypts: then what is written to the view is encrypted too.
    pub encryption: Encryption,
    /// Keeps the history.
    pub pin: Arc<Pin>,
    /// What its index has of the host's memory.
    memory: Arc<ViewMemoryShare>,
    /// What was promoted past it, if it is a locked checkpoint.
    kept: Option<Arc<KeptLock>>,
}

/// Whether a view may be refused for want of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ViewKind {
    /// It is asked for.
    New,
    /// It was there before a restart, or is a locked checkpoint's.
    Former,
}

impl OpenedView {
    /// What a view of one of the volumes is made of, once.
    ///
    /// # Errors
    /// There was no such volume, or the process has too many files open.
    pub fn source(&mut self, volume: u16) -> Result<ViewSource, TargetError> {
        let duplicate = |file: &DirectFile| {
            file.file().try_clone().map_err(|source| files::host("duplicating a file's descriptor", source))
        };
        let disk = self.disks.get(usize::from(volume));
        let disk = disk.ok_or(TargetError::View(ViewError::NoVolume(volume)))?;
        let (journal, recovery_disk) = (duplicate(&self.journal)?, duplicate(disk)?);
        Ok(ViewSource {
            volume: self.view.take_volume(volume).map_err(TargetError::View)?,
            journal,
            recovery_disk,
            seq: self.view.seq(),
            freshness: Freshness::Superblock,
            beneath: self.kept.as_ref().and_then(|kept| kept.disk(volume)),
            keep: Box::new((Arc::clone(&self.pin), self.kept.clone(), Arc::clone(&self.memory))),
        })
    }

    /// How what is written to it is encrypted.
    pub fn scratch_keys(&self) -> ScratchKeys<'_> {
        ScratchKeys { keyring: &self.keyring, encryption: self.encryption }
    }
}

impl TargetVm {
    /// Opens the disks as they were. Replication goes on.
    ///
    /// # Errors
    /// There is no such moment in the history, or a file can't be read.
    pub async fn open_view(self: &Arc<Self>, at: PointInTime) -> Result<OpenedView, TargetError> {
        self.open_as(ViewKind::New, at, 0).await
    }

    /// The same of a view whose scratch has what was promoted up to `kept_seq` (C5).
    ///
    /// # Errors
    /// As for [`TargetVm::open_view`].
    pub async fn open_former_view(
        self: &Arc<Self>,
        at: PointInTime,
        kept_seq: u64,
    ) -> Result<OpenedView, TargetError> {
        self.open_as(ViewKind::Former, at, kept_seq).await
    }

    async fn open_as(
        self: &Arc<Self>,
        kind: ViewKind,
        at: PointInTime,
        kept_seq: u64,
    ) -> Result<OpenedView, TargetError> {
        // The pin comes first (C2): what is looked up now must not be given up, nor promoted past, before it is opened.
        let pin = self.pin();
        let oldest_seq = self.oldest_seq().await?;
        let seq = self.resolve(at).await?;
        let kept = self.kept_at(seq)?;
        self.open_pinned(kind, (pin, oldest_seq), (seq, kept_seq), kept).await
    }

    /// Opens what a pin keeps from before its number was known, with what lies beneath if promotion may have passed it.
    pub(super) async fn open_pinned(
        self: &Arc<Self>,
        kind: ViewKind,
        (pin, oldest_seq): (Pin, u64),
        (seq, mut kept_seq): (u64, u64),
        kept: Option<Arc<KeptLock>>,
    ) -> Result<OpenedView, TargetError> {
        if let Some(kept) = &kept {
            kept_seq = kept_seq.max(kept.kept_seq());
        }
        if seq.max(kept_seq) < oldest_seq {
            let newest_seq = self.status().durable_through;
            return Err(TargetError::View(ViewError::Gone { seq, oldest_seq, newest_seq }));
        }
        pin.needs(seq, kept_seq);
        if kept.is_some() {
            pin.is_for(Purpose::OnLock);
        }
        let options = SurveyOptions { keys: self.keys.site(), ..SurveyOptions::default() };
        let promoted = self.promoted.clone();
        let (journal, disks) = (self.folder.journal(), self.definition().volumes.len() as u16);
        let disks: Vec<_> = (0..disks).map(|volume| self.folder.disk(volume)).collect();
        let (vm, memory) = (self.vm, Arc::clone(&self.view_memory));
        let open = move || {
            let mut storage = files::ring()?;
            let file = storage.add_file(DirectFile::open(&journal, Access::ReadOnly)?);
            let mut share = None;
            let may_take = |bytes| {
                // A look that is repeated asks again.
                share = None;
                let taken = match kind {
                    ViewKind::New => memory.take(bytes),
                    ViewKind::Former => Ok(memory.take_anyway(bytes)),
                };
                share.insert(taken).is_ok()
            };
            let reader = Reader::open_if(&mut storage, file, &options, may_take);
            let mut share = match share {
                Some(Err(source)) => return Err(TargetError::ViewMemory { vm, source }),
                Some(Ok(share)) => share,
                None => memory.take_anyway(0),
            };
            let reader = reader.map_err(TargetError::View)?;
            let mut view = reader.view_kept(seq, kept_seq).map_err(TargetError::View)?;
            view.follow(&promoted);
            share.keep_only(view.volumes().map(|volume| volume.index().memory_bytes() as u64).sum());
            let journal = storage.remove_file(file).expect("added above");
            let disks = disks.iter().map(|path| DirectFile::open(path, Access::ReadOnly));
            let (keyring, encryption) = (reader.survey.keyring.clone(), reader.survey.superblock.encryption);
            Ok(OpenedView {
                view,
                journal,
                disks: disks.collect::<Result<_, _>>()?,
                keyring,
                encryption,
                pin: Arc::new(pin),
                memory: Arc::new(share),
                kept,
            })
        };
        let opened = self.runtime.spawn_blocking(open).await;
        opened.unwrap_or_else(|error| Err(files::host("opening a view", std::io::Error::other(error))))
    }

    /// The lowest number that can be opened, asked after all pins are known to the worker.
    pub(super) async fn oldest_seq(&self) -> Result<u64, TargetError> {
        let (answer, oldest_seq) = oneshot::channel();
        self.tell_pins(&self.lock(), Some(answer));
        let not_open = |_| TargetError::NotOpen { vm: self.vm, reason: self.lock().not_open.clone() };
        oldest_seq.await.map_err(not_open)
    }

    /// The number that a moment stands for.
    ///
    /// # Errors
    /// There is no such checkpoint.
    pub async fn resolve(&self, at: PointInTime) -> Result<u64, TargetError> {
        if let PointInTime::Sequence { sequence } = at {
            return Ok(sequence);
        }
        let checkpoints = self.checkpoints().await?;
        let vm = self.vm;
        let found = match at {
            PointInTime::Checkpoint { checkpoint } => {
                checkpoints.find(checkpoint).ok_or(TargetError::NoSuchCheckpoint { vm, checkpoint })?
            }
            PointInTime::Time { time_us } => checkpoints
                .newest_until(time_us)
                .ok_or(TargetError::NoCheckpoint { vm, which: "as old as that" })?,
            _ => checkpoints
                .newest()
                .ok_or(TargetError::NoCheckpoint { vm, which: "yet: its first sync is not complete" })?,
        };
        Ok(found.cut)
    }
}
