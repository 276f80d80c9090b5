//! What can be recovered from a target's files, against what the ledger knows.

use journal::batch::{Checkpoint, RecordKind};
use journal::recovery::OpenError;
use journal::storage::{Blocking, Purpose};
use journal::view::{Reader, View, ViewError};
use vra::api::{CheckpointId, TimeUs};
use vra::receive::ListedCheckpoint;

use super::coverage::Happening;
use super::env::Env;
use super::ledger::{Image, Ledger, Promise, difference};
use super::target::{PinnedView, TargetSite};

/// Reads one of the checkpoints while the target goes on.
pub(super) fn compare_beside_writer(site: &TargetSite, ledger: &Ledger, env: &mut Env) -> Result<(), String> {
    let mut storage = site.disk.storage();
    let reader = match Reader::open(&mut storage, site.journal, &site.survey_options()) {
        Ok(reader) => reader,
        Err(_) if site.disk.is_dead(&storage) => return Ok(()),
        // What a dying or failing process leaves is only whole once an opener has put it right, but an armed read error is
        // the reader's own.
        Err(ViewError::Open(OpenError::Storage(_)) | ViewError::Storage(_)) => return Ok(()),
        Err(error) => return Err(format!("a reader beside the writer: {error:?}")),
    };
    if let Some(receiver) = site.receiver() {
        let found = reader.catalogue().checkpoints();
        let is_found = |listed: &&ListedCheckpoint| {
            found.iter().any(|entry| {
                let Checkpoint { epoch, cut, time_us, .. } = entry.checkpoint;
                let id = CheckpointId { nonce: epoch.nonce.as_u128(), counter: epoch.counter };
                (id, cut, TimeUs(time_us)) == (listed.id, listed.cut, listed.time_us)
            })
        };
        if let Some(lost) = receiver.checkpoints().iter_from(0).find(|listed| !is_found(listed)) {
            return Err(format!("the target lists the checkpoint at {}, its journal doesn't", lost.cut));
        }
    }
    let count = reader.catalogue().checkpoints().len();
    if count == 0 {
        return Ok(());
    }
    let cut = reader.catalogue().checkpoints()[env.any_index(count)].checkpoint.cut;
    if compare_cut(site, &reader, cut, ledger)? {
        env.happened(Happening::CheckpointComparedBesideWriter);
    }
    Ok(())
}

/// Compares the view at a cut. False if a fault that was armed for the target met the reader.
pub(super) fn compare_cut(
    site: &TargetSite,
    reader: &Reader,
    cut: u64,
    ledger: &Ledger,
) -> Result<bool, String> {
    let view = reader.view(cut).map_err(|error| format!("the view at {cut}: {error:?}"))?;
    match read_image(site, &view, ledger) {
        Ok(found) => compare(ledger, cut, &found).map(|()| true),
        Err(ViewError::Storage(_)) => Ok(false),
        Err(error) => Err(format!("reading the view at {cut}: {error:?}")),
    }
}

/// A checkpoint that can be opened now, to be pinned.
pub(super) fn any_cut(site: &TargetSite, env: &mut Env) -> Option<u64> {
    let receiver = site.receiver()?;
    let listed = receiver.checkpoints();
    if listed.is_empty() {
        return None;
    }
    listed.iter_from(env.any_index(listed.len())).next().map(|listed| listed.cut)
}

/// Opens a view that stays open. What is armed for the target may meet it: then there is none.
pub(super) fn open_pinned(site: &mut TargetSite, cut: u64) -> Result<(), String> {
    let mut storage = site.disk.storage();
    let mut view = match Reader::open(&mut storage, site.journal, &site.survey_options()) {
        Ok(reader) => reader.view(cut).map_err(|error| format!("the pinned view at {cut}: {error:?}"))?,
        Err(_) if site.disk.is_dead(&storage) => return Ok(()),
        Err(ViewError::Open(OpenError::Storage(_)) | ViewError::Storage(_)) => return Ok(()),
        Err(error) => return Err(format!("a reader for a pinned view: {error:?}")),
    };
    view.follow(site.promoted());
    let promoted_seq = site.promoted().through_seq();
    site.opened(PinnedView { cut, promoted_seq, view });
    Ok(())
}

/// A pinned view is still right, and another one can be opened beside it.
pub(super) fn check_pinned(site: &TargetSite, ledger: &Ledger, env: &mut Env) -> Result<(), String> {
    let Some(PinnedView { cut, promoted_seq, view }) = site.pinned() else { return Ok(()) };
    match read_image(site, view, ledger) {
        Ok(found) => {
            compare(ledger, *cut, &found).map_err(|what| format!("a view that stayed open: {what}"))?;
            if site.promoted().through_seq() > *promoted_seq {
                env.happened(Happening::ViewRepointed);
            }
        }
        Err(ViewError::Storage(_)) => return Ok(()),
        Err(error) => return Err(format!("reading a view at {cut} that stayed open: {error:?}")),
    }
    let mut storage = site.disk.storage();
    match Reader::open(&mut storage, site.journal, &site.survey_options()) {
        Ok(reader) => {
            if compare_cut(site, &reader, *cut, ledger)? {
                env.happened(Happening::PinnedViewCompared);
            }
            Ok(())
        }
        Err(_) if site.disk.is_dead(&storage) => Ok(()),
        Err(ViewError::Open(OpenError::Storage(_)) | ViewError::Storage(_)) => Ok(()),
        Err(error) => Err(format!("a reader of a pinned view: {error:?}")),
    }
}

/// After the disaster: everything that must be there is, and is right. Gives the reader for what concerns the whole group.
pub(super) fn compare_all(site: &TargetSite, ledger: &Ledger, env: &mut Env) -> Result<Reader, String> {
    let mut storage = site.disk.storage();
    let reader = Reader::open(&mut storage, site.journal, &site.survey_options())
        .map_err(|error| format!("the journal cannot be read at the end: {error:?}"))?;
    check_listed(&reader, ledger, env)?;
    for entry in reader.catalogue().checkpoints() {
        let cut = entry.checkpoint.cut;
        let view = reader.view(cut).map_err(|error| format!("view at {cut}: {error:?}"))?;
        let found = read_image(site, &view, ledger).map_err(|error| format!("read at {cut}: {error:?}"))?;
        compare(ledger, cut, &found)?;
        env.happened(Happening::CheckpointCompared);
        let oldest_seq = reader.survey.superblock.oldest_seq();
        if oldest_seq > 0 && cut > oldest_seq {
            env.happened(Happening::CheckpointAfterBase);
        }
    }
    compare_points(site, &reader, ledger, env)?;
    Ok(reader)
}

/// Compares with the checkpoint that was published with this cut.
pub(super) fn compare(ledger: &Ledger, cut: u64, found: &Image) -> Result<(), String> {
    let promise = ledger.promises().iter().find(|promise| promise.checkpoint.cut == cut);
    let Some(promise) = promise else {
        return Err(format!("a checkpoint with cut {cut} is listed, which was never published"));
    };
    if !promise.counts {
        return Err(format!("the checkpoint with cut {cut} is listed, but a sync was under way"));
    }
    difference(&promise.image, found).map_or(Ok(()), |place| {
        Err(format!("the checkpoint with cut {cut} differs from the guest's disk {place}"))
    })
}

/// Every checkpoint that must be listed is, and no other.
fn check_listed(reader: &Reader, ledger: &Ledger, env: &mut Env) -> Result<(), String> {
    let superblock = &reader.survey.superblock;
    let (oldest_seq, newest_seq) = (superblock.oldest_seq(), reader.newest_seq());
    if newest_seq < ledger.acked() {
        return Err(format!("the history ends at {newest_seq}, but {} was acknowledged", ledger.acked()));
    }
    let base_seq = superblock.low_water.seq;
    let is_promoted = base_seq <= superblock.promotion_intent_seq;
    if !superblock.state.is_base_sync() && base_seq > 0 && !is_promoted && !ledger.ends_sync(base_seq) {
        return Err(format!(
            "the base is at {base_seq}, where no sync ends: checkpoints after its end are lost"
        ));
    }
    let there = |promise: &&Promise| promise.counts && promise.seq <= newest_seq;
    if let Some(newest) = ledger.promises().iter().filter(there).map(|promise| promise.checkpoint.cut).max()
        && newest < superblock.promotion_intent_seq
    {
        return Err(format!("promotion went past the newest checkpoint, with cut {newest}"));
    }
    // Without superblocks the stream must tell how new the recovery disks are (C2).
    let told = reader
        .events()
        .map(|event| &event.record)
        .filter(|record| record.kind == RecordKind::PromotionIntent);
    let told_seq = told.map(|record| record.argument).max().unwrap_or_default();
    let promoted_seq = superblock.promotion_intent_seq;
    if !superblock.state.is_base_sync() && base_seq == promoted_seq && told_seq < promoted_seq {
        return Err(format!("promoted through {promoted_seq}, but the stream tells of {told_seq}"));
    }
    let listed: Vec<u64> = reader.catalogue().checkpoints().iter().map(|entry| entry.seq).collect();
    let mut inside_sync = 0;
    for promise in ledger.promises() {
        let there = promise.seq <= newest_seq
            && promise.checkpoint.cut >= oldest_seq
            && promise.seq > oldest_seq
            && !superblock.state.is_base_sync();
        if there && promise.counts != listed.contains(&promise.seq) {
            let (cut, seq, counts) = (promise.checkpoint.cut, promise.seq, promise.counts);
            return Err(format!("checkpoint {seq} with cut {cut}: counts {counts}, listed {}", !counts));
        }
        inside_sync += u64::from(there && !promise.counts);
    }
    if inside_sync > 0 {
        env.happened(Happening::CheckpointInsideSync);
    }
    Ok(())
}

/// Any number of the history opens, not only a checkpoint's.
fn compare_points(site: &TargetSite, reader: &Reader, ledger: &Ledger, env: &mut Env) -> Result<(), String> {
    if reader.survey.superblock.state.is_base_sync() {
        return Ok(());
    }
    for _ in 0..3 {
        let oldest_seq = reader.survey.superblock.oldest_seq();
        let Some(seq) = ledger.any_seq(oldest_seq, reader.newest_seq(), env) else { return Ok(()) };
        let expected = ledger.replay(seq);
        match (reader.view(seq), expected) {
            (Ok(view), Some(expected)) => {
                let found =
                    read_image(site, &view, ledger).map_err(|error| format!("read at {seq}: {error:?}"))?;
                if let Some(place) = difference(&expected, &found) {
                    return Err(format!("the view at {seq} differs from the stream {place}"));
                }
                env.happened(Happening::PointCompared);
            }
            (Err(ViewError::InsideSync { .. }), None) => {}
            (Ok(_), None) => return Err(format!("a view opened at {seq}, inside a sync")),
            (Err(error), _) => return Err(format!("the view at {seq} doesn't open: {error:?}")),
        }
    }
    Ok(())
}

/// Reads all disks of a view whole.
pub(super) fn read_image(site: &TargetSite, view: &View, ledger: &Ledger) -> Result<Image, ViewError> {
    let mut storage = site.disk.storage();
    let mut image = Image::new();
    for (volume, len_bytes) in (0_u16..).zip(ledger.volume_bytes()) {
        let mut bytes = vec![0; *len_bytes];
        let file = site.recovery_disks[usize::from(volume)];
        view.volume(volume)?.read(&mut storage, site.journal, 0, &mut bytes, |storage, at, into| {
            let read = Blocking::new(storage, file, Purpose::View).read(at, into.len())?;
            into.copy_from_slice(&read);
            Ok(())
        })?;
        image.push(bytes);
    }
    Ok(image)
}
