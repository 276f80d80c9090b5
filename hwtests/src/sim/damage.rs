//! What a bit that flipped may do: it is noticed, or it does nothing. Nothing wrong is ever shown.

use journal::format::{
    BAD_LIST_OFFSETS, BAD_LIST_SLOT_BYTES, FIRST_SLOT_OFFSET_BYTES, Footer, PAGE_BYTES, SUPERBLOCK_OFFSETS,
    Superblock, slot_offset_bytes,
};
use journal::promotion::{Promoted, Promotion, PromotionFile, TransferSizes};
use journal::recovery::{Content, Segment, open};
use journal::scan::{Ownership, scan};
use journal::storage::sim::{Crash, SimStorage};
use journal::storage::{Completion, Storage};
use journal::view::{ReadPart, Reader, ViewError};
use journal::writer::{Change, Limits, Writer, drive};

use super::coverage::Happening;
use super::env::Env;
use super::ledger::Ledger;
use super::recovered::{compare, read_image};
use super::target::TargetSite;

/// Flips one bit anywhere, or one of a payload that is then promoted.
pub(super) fn flip_a_bit(site: &TargetSite, ledger: &Ledger, env: &mut Env) -> Result<(), String> {
    // Beside it nothing else fails: two faults may take more than either.
    site.disk.disarm();
    if env.rng.one_in(2)
        && let Some(place) = place_of_a_payload(site, env)
    {
        let before = Before::look(site)?;
        site.disk.flip_bit(site.journal, place..place + 1);
        let expected = before.expected(place);
        look(site, ledger, &expected, env)?;
        if promote_all(site, env)? {
            site.disk.crash(Crash::PowerCut);
            site.disk.fence();
            look(site, ledger, &before.expected_without_seal(place), env)?;
            env.happened(Happening::DamagePromoted);
        }
        return Ok(());
    }
    let within =
        if env.rng.one_in(4) { 0..FIRST_SLOT_OFFSET_BYTES } else { FIRST_SLOT_OFFSET_BYTES..u64::MAX };
    let before = Before::look(site)?;
    if let Some(place) = site.disk.flip_bit(site.journal, within) {
        look(site, ledger, &before.expected(place), env)
            .map_err(|what| format!("a bit of byte {place} flipped: {what}"))?;
    }
    Ok(())
}

/// What must be there after a bit flipped.
#[derive(Debug, Default)]
pub(super) struct Expected {
    /// The journal may be refused as a whole. It is if the other copy of the superblock is no good, and if nobody knows any more what of the
    /// recovery disks is lost. No other bit may do that.
    may_be_refused: bool,
    /// Numbers and cuts of checkpoints that are listed, if promotion hasn't taken them away.
    listed: Vec<(u64, u64)>,
}

/// A journal before a bit flips.
struct Before {
    reader: Reader,
    contents: Vec<u8>,
}

impl Before {
    fn look(site: &TargetSite) -> Result<Self, String> {
        let reader = Reader::open(&mut site.disk.storage(), site.journal, &site.survey_options());
        let reader = reader.map_err(|error| format!("before a bit flips: {error:?}"))?;
        Ok(Self { reader, contents: site.disk.contents(site.journal) })
    }

    /// What must be there when a bit of the byte at this place has flipped.
    fn expected(&self, place: u64) -> Expected {
        let superblock = &self.reader.survey.superblock;
        let all = || self.listed_until(u64::MAX);
        let within = |begin: u64, len_bytes: usize| (begin..begin + len_bytes as u64).contains(&place);
        if let Some(copy) = SUPERBLOCK_OFFSETS.iter().position(|begin| within(*begin, PAGE_BYTES)) {
            let other = Superblock::decode(&self.contents[SUPERBLOCK_OFFSETS[1 - copy] as usize..]);
            // An older one is of before a change that had not come to count: it may list other checkpoints.
            let is_same = other.as_ref().is_ok_and(|other| other == superblock);
            let listed = if is_same { all() } else { Vec::new() };
            return Expected { may_be_refused: other.is_err(), listed };
        }
        let bad_list = superblock.bad_list.map(|list| BAD_LIST_OFFSETS[list.slot as usize]);
        if bad_list.is_some_and(|begin| within(begin, BAD_LIST_SLOT_BYTES)) {
            return Expected { may_be_refused: true, listed: all() };
        }
        let slot_len_bytes = superblock.slot_len_bytes as usize;
        let begin = |segment: &Segment| slot_offset_bytes(segment.header.slot, superblock.slot_len_bytes);
        let segments = &self.reader.survey.segments;
        let hit = segments.iter().find(|segment| within(begin(segment), slot_len_bytes));
        let listed = match hit {
            // All that the pages of a sealed one say is there twice.
            Some(segment) if matches!(segment.content, Content::Scanned(_)) => {
                let begin = begin(segment) as usize;
                let mut slot = self.contents[begin..begin + slot_len_bytes].to_vec();
                segment.cipher.decrypt_slot(&mut slot);
                // The batches that end before the page. A scan leaves the last page out.
                let page = (place as usize - begin) / PAGE_BYTES * PAGE_BYTES;
                let found =
                    scan(&slot[..page + PAGE_BYTES], &segment.header, Ownership::of(superblock), None);
                // A copy of an earlier one that isn't whole is taken for one that was never finished.
                let is_whole = found.end_bytes >= segment.header.carried_end_bytes;
                self.listed_until(if is_whole { found.last.seq } else { segment.header.after.seq })
            }
            // A crash took its footer: its batches alone tell what it holds.
            Some(segment) if !self.has_footer(segment) => self.listed_until(segment.header.after.seq),
            _ => all(),
        };
        Expected { may_be_refused: false, listed }
    }

    /// The same after a power cut, which may have taken the seal of the segment: it ends where it is damaged then, and with it the history.
    fn expected_without_seal(&self, place: u64) -> Expected {
        let superblock = &self.reader.survey.superblock;
        let is_hit = |segment: &&Segment| {
            let begin = slot_offset_bytes(segment.header.slot, superblock.slot_len_bytes);
            (begin..begin + superblock.slot_len_bytes).contains(&place)
        };
        let hit = self.reader.survey.segments.iter().find(is_hit);
        let expected = self.expected(place);
        let until_seq = hit.map_or(u64::MAX, |segment| segment.header.after.seq);
        Expected {
            listed: expected.listed.into_iter().filter(|(seq, _)| *seq <= until_seq).collect(),
            ..expected
        }
    }

    fn has_footer(&self, segment: &Segment) -> bool {
        let Content::Sealed(trailer) = &segment.content else { return false };
        let slot = slot_offset_bytes(segment.header.slot, self.reader.survey.superblock.slot_len_bytes);
        let begin = (slot + trailer.data_end_bytes) as usize;
        let mut footer = self.contents[begin..begin + trailer.footer_len_bytes as usize].to_vec();
        segment.cipher.decrypt(trailer.data_end_bytes, &mut footer);
        Footer::decode(&footer, trailer.footer_crc, trailer.data_end_bytes).is_ok()
    }

    fn listed_until(&self, seq: u64) -> Vec<(u64, u64)> {
        let entries = self.reader.catalogue().checkpoints().iter();
        entries.map(|entry| (entry.seq, entry.checkpoint.cut)).filter(|listed| listed.0 <= seq).collect()
    }
}

/// A byte of the journal's file that the newest checkpoint shows.
pub(super) fn place_of_a_payload(site: &TargetSite, env: &mut Env) -> Option<u64> {
    let reader = Reader::open(&mut site.disk.storage(), site.journal, &site.survey_options()).ok()?;
    let cut = reader.catalogue().checkpoints().last()?.checkpoint.cut;
    let view = reader.view(cut).ok()?;
    let mut places = Vec::new();
    for volume in view.volumes() {
        for part in volume.plan_read(0, volume.size_bytes()).ok()? {
            if let ReadPart::Journal(part) = part {
                places.push(part.read_offset_bytes + part.skip_bytes as u64 + env.rng.below(part.len_bytes));
            }
        }
    }
    (!places.is_empty()).then(|| places[env.any_index(places.len())])
}

/// Every checkpoint is right, or says that it can't be read, and those are listed that must be.
pub(super) fn look(
    site: &TargetSite,
    ledger: &Ledger,
    expected: &Expected,
    env: &mut Env,
) -> Result<(), String> {
    let mut storage = site.disk.storage();
    let reader = match Reader::open(&mut storage, site.journal, &site.survey_options()) {
        Ok(reader) => reader,
        Err(_) if expected.may_be_refused => {
            env.happened(Happening::FlipNoticed);
            return Ok(());
        }
        Err(error) => return Err(format!("after a bit flipped nothing can be opened: {error:?}")),
    };
    let oldest_seq = reader.survey.superblock.oldest_seq();
    let is_listed = |seq: u64| reader.catalogue().checkpoints().iter().any(|entry| entry.seq == seq);
    let is_missing = |(seq, cut): &&(u64, u64)| *cut >= oldest_seq && !is_listed(*seq);
    if let Some((seq, cut)) = expected.listed.iter().find(is_missing) {
        return Err(format!("after a bit flipped checkpoint {seq} with cut {cut} is missing"));
    }
    let mut noticed = reader.newest_seq() < ledger.acked() || reader.survey.damage.is_some();
    for entry in reader.catalogue().checkpoints() {
        let cut = entry.checkpoint.cut;
        match reader.view(cut).and_then(|view| read_image(site, &view, ledger)) {
            Ok(found) => {
                compare(ledger, cut, &found).map_err(|what| format!("after a bit flipped: {what}"))?;
            }
            Err(ViewError::Corrupt { .. }) => noticed = true,
            Err(error) => return Err(format!("after a bit flipped: {error:?}")),
        }
    }
    env.happened(if noticed { Happening::FlipNoticed } else { Happening::FlipHarmless });
    Ok(())
}

/// Promotes as far as the newest checkpoint lets it. False if there is nothing to promote.
fn promote_all(site: &TargetSite, env: &mut Env) -> Result<bool, String> {
    let told = |what: &str, error: &dyn std::fmt::Debug| format!("promoting over damage: {what}: {error:?}");
    // Thin recovery disks take space where something was punched before.
    site.disk.set_capacity_bytes(u64::MAX);
    let mut storage = site.disk.storage();
    // One whose footer a crash kept from being written can't be read at all then.
    let Ok(reader) = Reader::open(&mut storage, site.journal, &site.survey_options()) else {
        return Ok(false);
    };
    let Some(newest) = reader.catalogue().checkpoints().last() else { return Ok(false) };
    // The last segment is scanned at an opening: what is damaged in it was never acknowledged, as far as the opener knows.
    let Ok(opened) = open(&mut storage, site.journal, &site.open_options()) else { return Ok(false) };
    if opened.superblock.state.is_base_sync() {
        return Ok(false);
    }
    let limits = Limits { max_slots: 40, min_slots: 0, grow_slots: 1, group_bytes: 1 << 20 };
    let mut writer = Writer::new(opened, limits);
    let segments = writer.closed_segments().take_while(|segment| segment.last.seq <= newest.checkpoint.cut);
    let mut segments: Vec<_> = segments.cloned().collect();
    // Not to a place inside a sync.
    while segments.pop_if(|last| !reader.catalogue().is_consistent(last.last.seq)).is_some() {}
    let Some(through) = segments.last().map(|segment| segment.last) else { return Ok(false) };
    if writer.change(Change::AnnouncePromotion { through }).is_err() {
        // One that was announced before must be ended first.
        return Ok(false);
    }
    drive(&mut writer, &mut storage, site.journal).map_err(|error| told("announcing", &error))?;
    let superblock = writer.superblock().clone();
    if superblock.promotion_intent_seq != through.seq {
        return Ok(false);
    }
    let reserved = vec![false; site.recovery_disks.len()];
    let sizes = TransferSizes {
        run_max_bytes: 4096 << env.rng.below(5),
        punch_min_bytes: 1024 << env.rng.below(5),
        chunk_bytes: 4096 << env.rng.below(6),
    };
    let promotion = Promotion::new(superblock, writer.bad_ranges().clone(), segments, reserved, sizes);
    let promoted = carry(site, promotion, &mut storage).map_err(|error| told("carrying", &error))?;
    let change =
        Change::EndPromotion { through, size_bytes: promoted.size_bytes, bad_ranges: promoted.bad_ranges };
    writer.change(change).map_err(|error| told("ending", &error))?;
    drive(&mut writer, &mut storage, site.journal).map_err(|error| told("ending", &error))?;
    Ok(true)
}

fn carry(site: &TargetSite, mut promotion: Promotion, storage: &mut SimStorage) -> Result<Promoted, String> {
    let mut done = Vec::<Completion>::new();
    loop {
        while let Some(action) = promotion.poll_action(64 << 10) {
            let file = match action.file {
                PromotionFile::Journal => site.journal,
                PromotionFile::Disk(volume) => site.recovery_disks[usize::from(volume)],
            };
            storage.submit(file, action.token, action.purpose, action.op);
        }
        if let Some(promoted) = promotion.promoted() {
            return Ok(promoted);
        }
        storage.collect(true, &mut done).map_err(|error| error.to_string())?;
        for Completion { token, result } in done.drain(..) {
            promotion.done(token, result).map_err(|error| error.to_string())?;
        }
    }
}
