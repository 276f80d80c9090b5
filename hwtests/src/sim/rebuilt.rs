//! A journal that has lost both superblocks: what its segments tell is right, and everything that promotion had not begun to take away is there.

use journal::format::{PAGE_BYTES, SUPERBLOCK_OFFSETS, Superblock, SuperblockError, VolumeState};
use journal::recovery::{Damage, OpenError, choose_superblock, newest_manifest, rebuild};
use journal::storage::{AlignedBuf, Blocking, Op, Purpose};
use journal::view::{Reader, ViewError};

use super::coverage::Happening;
use super::env::Env;
use super::ledger::{Ledger, Promise};
use super::recovered::{compare, read_image};
use super::target::TargetSite;

/// Looks at a copy of the files as a crash left them, or an opening since.
pub(super) fn compare_without_superblocks(
    site: &mut TargetSite,
    ledger: &Ledger,
    env: &mut Env,
) -> Result<(), String> {
    let seed = env.rng.next_u64();
    site.on_copy(seed, |site| {
        let superblock = lose_superblocks(site)?;
        look(site, &superblock, ledger, env).map_err(|what| format!("without superblocks: {what}"))
    })
}

/// Zeroes both; gives the one that counted.
fn lose_superblocks(site: &TargetSite) -> Result<Superblock, String> {
    let mut storage = site.disk.storage();
    let mut io = Blocking::new(&mut storage, site.journal, Purpose::Superblock);
    let [first, second] = SUPERBLOCK_OFFSETS.map(|offset_bytes| match io.read(offset_bytes, PAGE_BYTES) {
        Ok(page) => Superblock::decode(&page),
        Err(_) => Err(SuperblockError::Unreadable),
    });
    let superblock = choose_superblock(first, second).map_err(|error| error.to_string())?;
    for offset_bytes in SUPERBLOCK_OFFSETS {
        let pieces = vec![AlignedBuf::zeroed(PAGE_BYTES).into_bytes()];
        io.run(Op::Write { offset_bytes, pieces }).map_err(|error| error.to_string())?;
    }
    Ok(superblock)
}

fn look(site: &TargetSite, lost: &Superblock, ledger: &Ledger, env: &mut Env) -> Result<(), String> {
    let mut storage = site.disk.storage();
    let volumes =
        lost.volumes.iter().map(|volume| VolumeState { base_seq: 0, fresh_image: false, ..*volume });
    let options = site.survey_options();
    let rebuilt = newest_manifest(&mut storage, site.journal)
        .map_err(OpenError::from)
        .and_then(|manifest| rebuild(&mut storage, site.journal, manifest, volumes.collect(), &options.keys));
    // While a sync writes to the recovery disks they are of no moment, and nothing need be found.
    let rebuilt = match rebuilt {
        Ok(rebuilt) => rebuilt,
        Err(_) if lost.state.is_base_sync() => return Ok(()),
        // Nothing came after a sync's end: only the superblocks told that the recovery disks are the disks of then.
        Err(OpenError::NotAJournal) if ledger.acked() <= lost.low_water.seq => return Ok(()),
        Err(error) => return Err(format!("it cannot be read: {error:?}")),
    };
    // What a power cut tore might have been durable, and have told of a promotion, for all that the file tells. It may lie behind the end for
    // a while after an opening: a slot that it copied to had it before. Or a slot that a promotion had freed was used again, or its space given
    // back, in part: that the promotion has ended nothing told yet.
    let is_nothing =
        |gap: Damage| gap.after_seq >= ledger.acked() || gap.resumes_after_seq <= lost.low_water.seq;
    if rebuilt.gap.is_some_and(is_nothing) {
        return Ok(());
    }
    let intent_seq = rebuilt.superblock.promotion_intent_seq;
    let reader = match rebuilt.survey(&mut storage, site.journal, &options) {
        Ok(survey) => survey,
        Err(_) if lost.state.is_base_sync() => return Ok(()),
        Err(error) => return Err(format!("it cannot be surveyed: {error:?}")),
    };
    let reader = Reader::of(&mut storage, site.journal, reader)
        .map_err(|error| format!("its segments cannot be read: {error:?}"))?;
    let newest_seq = reader.newest_seq();
    if newest_seq < ledger.acked() && !lost.state.is_base_sync() {
        return Err(format!("the history ends at {newest_seq}, but {} was acknowledged", ledger.acked()));
    }
    let listed: Vec<_> =
        reader.catalogue().checkpoints().iter().map(|entry| (entry.seq, entry.checkpoint.cut)).collect();
    let is_promised = |promise: &&Promise| {
        promise.counts
            && promise.seq <= newest_seq
            && promise.checkpoint.cut >= intent_seq.max(lost.oldest_seq())
    };
    let missing = ledger.promises().iter().filter(is_promised).find(|promise| {
        promise.seq > lost.oldest_seq() && !listed.iter().any(|(seq, _)| *seq == promise.seq)
    });
    if let Some(promise) = missing
        && !lost.state.is_base_sync()
    {
        let (cut, seq) = (promise.checkpoint.cut, promise.seq);
        return Err(format!("checkpoint {seq} with cut {cut} isn't listed, the intent is {intent_seq}"));
    }
    for (_, cut) in listed {
        let view = reader.view(cut).map_err(|error| format!("view at {cut}: {error:?}"))?;
        let found = match read_image(site, &view, ledger) {
            Ok(found) => found,
            // A power cut tore the first write to a slot that a promotion had freed, and nothing but the superblock told that it was.
            Err(ViewError::Corrupt { seq, .. }) if seq <= intent_seq => continue,
            Err(ViewError::Corrupt { .. }) if lost.state.is_base_sync() => continue,
            Err(error) => return Err(format!("read at {cut}: {error:?}")),
        };
        compare(ledger, cut, &found).map_err(|what| {
            let (oldest_seq, lost_intent_seq) = (lost.low_water.seq, lost.promotion_intent_seq);
            format!("{what}; promoted through {oldest_seq}, announced {lost_intent_seq}, told {intent_seq}")
        })?;
        env.happened(Happening::RebuiltCompared);
        if intent_seq > 0 {
            env.happened(Happening::RebuiltAfterBase);
        }
    }
    Ok(())
}
