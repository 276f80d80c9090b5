//! A VPG as the journals of its VMs tell of it.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use journal::catalogue::CheckpointEntry;
use journal::crypt::SiteKeys;

use super::locked::{Locked, LockedJournal, missing_key};
use super::moment::{Moment, distance, id_of};
use super::place::{Journal, Manifest, find_all};
use super::text;
use crate::api::{CheckpointId, MemberSince, VmId, VpgId};
use crate::report::chain;

/// All that a folder holds.
#[derive(Debug, Default)]
pub(super) struct Stock {
    /// By name.
    pub(super) groups: Vec<Group>,
    /// Journals that are encrypted with a key that wasn't given.
    pub(super) locked: Vec<LockedJournal>,
    /// Journals that cannot be opened, and why.
    pub(super) unreadable: Vec<(PathBuf, String)>,
}

/// A VPG.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) id: VpgId,
    /// None if no manifest can be read.
    pub(super) name: Option<String>,
    /// Its VMs by the newest definition.
    pub(super) members: Vec<Member>,
    /// Journals of VMs that are no members any more.
    pub(super) former: Vec<Told>,
}

/// A VM of a VPG.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) vm: VmId,
    pub(super) name: String,
    /// Which checkpoints its journal has to hold.
    pub(super) since: MemberSince,
    /// Where its journal should be.
    pub(super) datastore: Option<PathBuf>,
    /// Its journal; more than one if copies of it lie about.
    pub(super) journals: Vec<Told>,
}

/// What a journal told when it was open.
#[derive(Clone, Debug)]
pub(super) struct Told {
    /// The journal's file.
    pub(super) path: PathBuf,
    pub(super) vm: VmId,
    /// The VM's name, or its id.
    pub(super) name: String,
    pub(super) manifest: Option<Manifest>,
    /// Sizes of its disks by number, in bytes.
    pub(super) disk_bytes: Vec<u64>,
    pub(super) checkpoints: Vec<CheckpointEntry>,
    pub(super) newest_seq: u64,
    /// What is unusual about it.
    pub(super) warning: Option<String>,
}

/// A checkpoint that the journals of all VMs hold that were in the group when it was taken.
#[derive(Clone, Debug)]
pub(super) struct GroupCheckpoint {
    pub(super) id: CheckpointId,
    /// As one of the journals has it.
    pub(super) entry: CheckpointEntry,
    /// Those VMs, and the last record of each that belongs to it.
    pub(super) cuts: Vec<(VmId, u64)>,
}

/// Why there is no such moment of a group.
#[derive(Debug, thiserror::Error)]
pub(super) enum GroupError {
    #[error("there is no VPG {wanted:?} here; {known}")]
    NoVpg { wanted: String, known: String },
    #[error("{0}")]
    Locked(Locked),
    #[error("several VPGs are called {wanted:?}: name one by its id: {ids}")]
    Ambiguous { wanted: String, ids: String },
    #[error(
        "record {seq}: sequence numbers count within one VM and say nothing of a group; give a time, a tag or a checkpoint's id, or name \
         one VM with --vm"
    )]
    Seq { seq: u64 },
    #[error(
        "VPG {vpg} cannot be extracted as a whole: the journal of VM {vm} is not here{place}; give the datastore that holds it as \
         well, or extract single VMs with --vm"
    )]
    NoJournal { vpg: String, vm: String, place: String },
    #[error("VM {vm} has several journals here: {paths}; move the copies away, or give a single VM's folder")]
    SeveralJournals { vm: String, paths: String },
    #[error("VPG {vpg} has no checkpoint {wanted} that all its VMs hold: {lacking}; {newest}")]
    Incomplete { vpg: String, wanted: String, lacking: String, newest: String },
    #[error("VPG {vpg} has no checkpoint {wanted}; {newest}")]
    NotThere { vpg: String, wanted: String, newest: String },
}

impl Stock {
    /// What lies in these folders.
    pub(super) fn of(folders: &[PathBuf], keys: &SiteKeys) -> anyhow::Result<Self> {
        let mut paths = Vec::new();
        for folder in folders {
            paths.extend(find_all(folder)?);
        }
        paths.sort();
        paths.dedup();
        let (mut by_vpg, mut unreadable) = (BTreeMap::<VpgId, Vec<Told>>::new(), Vec::new());
        let mut locked = Vec::new();
        for path in paths {
            let error = match Journal::open(&path, keys) {
                Ok(journal) => {
                    by_vpg.entry(journal.vpg_id()).or_default().push(Told::by(&journal));
                    continue;
                }
                Err(error) => error,
            };
            let site_key = missing_key(&error).map(|site_key| Locked::new(&path, site_key, keys));
            match site_key.map(LockedJournal::read) {
                Some(Ok(journal)) => locked.push(journal),
                _ => unreadable.push((path, chain(error.as_ref()))),
            }
        }
        let mut groups: Vec<Group> = by_vpg.into_iter().map(|(id, told)| Group::of(id, told)).collect();
        groups.sort_by(|one, other| (&one.name, one.id).cmp(&(&other.name, other.id)));
        Ok(Self { groups, locked, unreadable })
    }

    /// The VPG with this name or id.
    pub(super) fn take(mut self, wanted: &str) -> Result<Group, GroupError> {
        // One locked member is enough to have no checkpoint of the whole.
        let is_locked = |journal: &&LockedJournal| journal.vpg_name == wanted || is_id(journal.vpg.0, wanted);
        if let Some(journal) = self.locked.iter().find(is_locked) {
            return Err(GroupError::Locked(journal.locked.clone()));
        }
        let is_it = |group: &Group| group.name.as_deref() == Some(wanted) || is_id(group.id.0, wanted);
        let found: Vec<usize> = (0..self.groups.len()).filter(|at| is_it(&self.groups[*at])).collect();
        match found[..] {
            [at] => Ok(self.groups.swap_remove(at)),
            [] => {
                let known: Vec<String> = self.groups.iter().map(Group::label).collect();
                let mut known = match known.is_empty() {
                    true => "there is none that can be read".to_owned(),
                    false => format!("there are: {}", known.join(", ")),
                };
                if let Some((path, error)) = self.unreadable.first() {
                    known += &format!("; {} cannot be opened: {error}", path.display());
                }
                Err(GroupError::NoVpg { wanted: wanted.to_owned(), known })
            }
            _ => {
                let ids: Vec<String> = found.iter().map(|at| self.groups[*at].id.to_string()).collect();
                Err(GroupError::Ambiguous { wanted: wanted.to_owned(), ids: ids.join(", ") })
            }
        }
    }

    /// The journals of the VM with this name or id.
    pub(super) fn journals_of_vm(&self, wanted: &str) -> Vec<&Told> {
        let all = self.groups.iter().flat_map(Group::journals);
        all.filter(|told| told.name == wanted || is_id(told.vm.0, wanted)).collect()
    }

    /// The journal of the VM with this name or id, if it can't be read without a key.
    pub(super) fn locked_of_vm(&self, wanted: &str) -> Option<&LockedJournal> {
        self.locked.iter().find(|journal| journal.vm_name == wanted || is_id(journal.vm.0, wanted))
    }

    /// The names of all VMs.
    pub(super) fn vm_names(&self) -> Vec<&str> {
        let locked = self.locked.iter().map(|journal| journal.vm_name.as_str());
        self.groups.iter().flat_map(Group::journals).map(|told| told.name.as_str()).chain(locked).collect()
    }
}

fn is_id(id: uuid::Uuid, text: &str) -> bool {
    uuid::Uuid::parse_str(text).is_ok_and(|wanted| wanted == id)
}

impl Told {
    fn by(journal: &Journal) -> Self {
        let (survey, warnings) = (&journal.reader.survey, journal.warnings());
        Self {
            path: journal.path.clone(),
            vm: journal.vm_id(),
            name: journal.vm_name(),
            manifest: journal.manifest.clone(),
            disk_bytes: survey.superblock.volumes.iter().map(|volume| volume.size_bytes).collect(),
            checkpoints: journal.reader.catalogue().checkpoints().to_vec(),
            newest_seq: journal.reader.newest_seq(),
            warning: (!warnings.is_empty()).then(|| warnings.join("; ")),
        }
    }

    /// The VM's folder.
    pub(super) fn folder(&self) -> &Path {
        self.path.parent().unwrap_or(&self.path)
    }
}

impl Group {
    /// Of all journals that name this VPG.
    fn of(id: VpgId, journals: Vec<Told>) -> Self {
        let manifests = journals.iter().filter_map(|told| told.manifest.as_ref());
        let newest =
            manifests.max_by_key(|manifest| manifest.vpg.revision).map(|manifest| manifest.vpg.clone());
        let mut group = Self {
            id,
            name: newest.as_ref().map(|vpg| vpg.name.clone()),
            members: Vec::new(),
            former: Vec::new(),
        };
        let defined = newest.iter().flat_map(|vpg| &vpg.vms);
        group.members.extend(defined.map(|vm| Member {
            vm: vm.id,
            name: vm.name.clone(),
            since: vm.member_since,
            datastore: Some(vm.datastore.clone()),
            journals: Vec::new(),
        }));
        let is_former = |told: &Told| {
            let own = told
                .manifest
                .as_ref()
                .and_then(|manifest| manifest.vpg.vms.iter().find(|vm| vm.id == told.vm));
            let now = newest.iter().flat_map(|vpg| &vpg.vms).find(|vm| vm.id == told.vm);
            // It was taken out and came back with another journal.
            own.zip(now).is_some_and(|(own, now)| own.journal != now.journal)
        };
        for told in journals {
            match group.members.iter_mut().find(|member| member.vm == told.vm) {
                Some(_) if is_former(&told) => group.former.push(told),
                Some(member) => member.journals.push(told),
                // No definition says who belongs to it.
                None if newest.is_none() => {
                    let (vm, name) = (told.vm, told.name.clone());
                    let since = MemberSince::default();
                    group.members.push(Member { vm, name, since, datastore: None, journals: vec![told] });
                }
                None => group.former.push(told),
            }
        }
        group
    }

    /// What people call it.
    pub(super) fn label(&self) -> String {
        self.name.clone().unwrap_or_else(|| self.id.to_string())
    }

    /// All its journals.
    pub(super) fn journals(&self) -> impl Iterator<Item = &Told> {
        self.members.iter().flat_map(|member| &member.journals).chain(&self.former)
    }

    /// The one journal of each member.
    pub(super) fn whole(&self) -> Result<Vec<&Told>, GroupError> {
        let one = |member: &Member| match &member.journals[..] {
            [_] => Ok(()),
            [] => {
                let place = member.datastore.as_ref();
                let place = place.map(|path| format!(" (its VRA has it in {})", path.display()));
                let (vpg, vm) = (self.label(), member.name.clone());
                Err(GroupError::NoJournal { vpg, vm, place: place.unwrap_or_default() })
            }
            several => {
                let paths: Vec<String> =
                    several.iter().map(|told| told.folder().display().to_string()).collect();
                Err(GroupError::SeveralJournals { vm: member.name.clone(), paths: paths.join(", ") })
            }
        };
        for member in &self.members {
            one(member)?;
        }
        Ok(self.members.iter().flat_map(|member| &member.journals).collect())
    }

    /// The checkpoints that the journals of all its members hold, in the order in which they were taken (D3).
    pub(super) fn checkpoints(&self) -> Vec<GroupCheckpoint> {
        let Ok(journals) = self.whole() else { return Vec::new() };
        let cuts_of = |told: &&Told| -> HashMap<CheckpointId, u64> {
            told.checkpoints.iter().map(|entry| (id_of(entry), entry.checkpoint.cut)).collect()
        };
        let cuts: Vec<_> = journals.iter().map(cuts_of).collect();
        let members = || self.members.iter().zip(&cuts);
        let complete = |entry: &CheckpointEntry| {
            let id = id_of(entry);
            let of = members().filter(|(member, _)| member.was_in(entry));
            let cuts = of.map(|(member, cuts)| Some((member.vm, *cuts.get(&id)?)));
            let cuts = cuts.collect::<Option<Vec<_>>>().filter(|cuts| !cuts.is_empty())?;
            Some(GroupCheckpoint { id, entry: entry.clone(), cuts })
        };
        // One that came first has to hold them all.
        let first = self.members.iter().zip(journals).min_by_key(|(member, _)| member.since);
        first.iter().flat_map(|(_, told)| &told.checkpoints).filter_map(complete).collect()
    }

    /// The VMs that came to the group after a checkpoint.
    pub(super) fn later_than<'a>(
        &'a self,
        checkpoint: &'a GroupCheckpoint,
    ) -> impl Iterator<Item = &'a Member> {
        self.members.iter().filter(|member| !member.was_in(&checkpoint.entry))
    }

    /// The checkpoint that a moment means (D4); and a newer one that some VMs lack, in words, if there is one.
    pub(super) fn find(&self, at: &Moment) -> Result<(GroupCheckpoint, Option<String>), GroupError> {
        if let Moment::Seq(seq) = *at {
            return Err(GroupError::Seq { seq });
        }
        self.whole()?;
        let complete = self.checkpoints();
        let fits = |entry: &CheckpointEntry| match at {
            Moment::Latest => true,
            Moment::Tag(tag) => entry.checkpoint.tag == *tag,
            Moment::Id(id) => id_of(entry) == *id,
            Moment::Time(time_us) => entry.checkpoint.time_us <= *time_us,
            Moment::Seq(_) => false,
        };
        // By the coordinator's clock: of an incomplete one nothing else tells how it lies to the others.
        let partial = self.journals_of_members().flat_map(|told| &told.checkpoints);
        let partial = partial
            .filter(|entry| fits(entry) && !complete.iter().any(|whole| whole.id == id_of(entry)))
            .max_by_key(|entry| entry.checkpoint.time_us);
        match complete.iter().rev().find(|whole| fits(&whole.entry)) {
            Some(found) => {
                let newer =
                    partial.filter(|partial| partial.checkpoint.time_us > found.entry.checkpoint.time_us);
                let newer =
                    newer.map(|entry| format!("checkpoint {}: {}", words(entry), self.lacking(entry)));
                Ok((found.clone(), newer))
            }
            None => {
                let vpg = self.label();
                let nearest = match at {
                    Moment::Tag(tag) => complete
                        .iter()
                        .rev()
                        .filter(|whole| !whole.entry.checkpoint.tag.is_empty())
                        .min_by_key(|whole| distance(&whole.entry.checkpoint.tag, tag)),
                    Moment::Time(_) => complete.first(),
                    _ => None,
                };
                let nearest = nearest.map(|near| format!("the nearest is {}, ", words(&near.entry)));
                let newest = match complete.last() {
                    Some(whole) => format!(
                        "{}the newest that all hold is {}",
                        nearest.unwrap_or_default(),
                        words(&whole.entry)
                    ),
                    None => "there is none that all hold: extract single VMs with --vm".to_owned(),
                };
                let wanted = in_words(at);
                Err(match partial {
                    Some(entry) => {
                        GroupError::Incomplete { vpg, wanted, lacking: self.lacking(entry), newest }
                    }
                    None => GroupError::NotThere { vpg, wanted, newest },
                })
            }
        }
    }

    fn journals_of_members(&self) -> impl Iterator<Item = &Told> {
        self.members.iter().flat_map(|member| &member.journals)
    }

    /// Who hasn't got a checkpoint.
    fn lacking(&self, entry: &CheckpointEntry) -> String {
        let has = |told: &Told| told.checkpoints.iter().any(|other| id_of(other) == id_of(entry));
        let names: Vec<&str> = self
            .members
            .iter()
            .filter(|member| member.was_in(entry) && !member.journals.iter().any(has))
            .map(|member| member.name.as_str())
            .collect();
        match names[..] {
            [one] => format!("VM {one} lacks it"),
            _ => format!("VMs {} lack it", names.join(", ")),
        }
    }
}

impl Member {
    fn was_in(&self, entry: &CheckpointEntry) -> bool {
        self.since.is_in(entry.checkpoint.member_set_version)
    }
}

/// A checkpoint of a group in words: without numbers, which are of single VMs.
pub(super) fn words(entry: &CheckpointEntry) -> String {
    let checkpoint = &entry.checkpoint;
    let time = text::time(checkpoint.time_us);
    match checkpoint.tag.is_empty() {
        true => format!("{} ({time})", id_of(entry)),
        false => format!("{} ({time}, {:?})", id_of(entry), checkpoint.tag),
    }
}

fn in_words(at: &Moment) -> String {
    match at {
        Moment::Latest => "at all".to_owned(),
        Moment::Tag(tag) => format!("with the tag {tag:?}"),
        Moment::Id(id) => id.to_string(),
        Moment::Seq(seq) => format!("at record {seq}"),
        Moment::Time(time_us) => format!("as old as {}", text::time(*time_us)),
    }
}
