//! A journal whose slots are shorter than those that a target makes: a small load goes through many of them.

use anyhow::{Context, Result};
use journal::crypt::Encryption;
use journal::recovery::{NewJournal, SurveyOptions, create};
use journal::storage::ring::{Access, DirectFile, RingStorage};
use journal::view::Reader;
use vra::api::vpg::VpgDefinition;
use vra::receive::{TargetHost, TargetSettings};

use super::load::Load;

/// Length of a slot, in bytes: the longest batch fits of the records that [`super::run_on_disk`] has on their way.
const SLOT_BYTES: u64 = 1280 << 10;

/// Slots to begin with, as many as a target makes.
const FIRST_SLOTS: u32 = 4;

/// Makes a VM's files as a target does, and then its journal once more, with short slots.
///
/// # Errors
/// The files can't be made.
pub(super) async fn make(definition: &VpgDefinition) -> Result<()> {
    let host = TargetHost::start(TargetSettings { worker_count: 1, ..TargetSettings::STANDARD })?;
    host.ensure(definition, definition.vms[0].id).await?;
    host.shut_down().await;
    let path = Load::folder(definition).journal();
    let mut storage = RingStorage::new(RING_DEPTH).context("a ring for making the journal")?;
    let file = storage.add_file(DirectFile::open(&path, Access::ReadOnly)?);
    let survey = Reader::open(&mut storage, file, &SurveyOptions::default())?.survey;
    drop(storage.remove_file(file));
    let superblock = survey.superblock;
    let new = NewJournal {
        journal_id: superblock.journal_id,
        vm_id: superblock.vm_id,
        vpg_id: superblock.vpg_id,
        slot_len_bytes: SLOT_BYTES,
        slot_count: FIRST_SLOTS,
        volumes: superblock.volumes,
        manifest: survey.manifest.context("a new journal has a manifest")?.text,
        encryption: Encryption::Never,
    };
    std::fs::File::create(&path).with_context(|| format!("empty {}", path.display()))?;
    let file = storage.add_file(DirectFile::open(&path, Access::Exclusive)?);
    Ok(create(&mut storage, file, &new)?)
}

const RING_DEPTH: u32 = 16;
