//! What the VRAs told, put together.

use std::collections::{BTreeMap, BTreeSet};

use uuid::Uuid;
use vra::api::volume::MAX_NAME_BYTES;
use vra::api::vpg::VraEndpoint;
use vra::api::{TimeUs, VpgDefinition, VpgId, VraId};

use super::{Found, Unrestored, trust_of, vpg_of};
use crate::authority::Issued;
use crate::model::kept::KeptSettings;
use crate::model::vpg::Vpg;
use crate::model::vra::{Vra, VraState, unknown_serial};
use crate::reconcile::Leftover;

/// All that was told, put together.
pub(super) struct World {
    pub(super) vras: Vec<(Vra, Issued)>,
    pub(super) vpgs: Vec<Vpg>,
    /// Parts of them at VRAs whose last VM was taken out.
    pub(super) leftovers: Vec<Leftover>,
    pub(super) trust_version: u64,
    pub(super) silent: Vec<(VraEndpoint, String)>,
    pub(super) renamed: Vec<(String, String)>,
    pub(super) unrestored: Vec<Unrestored>,
    /// Groups that were restored though VRAs that answered don't know them, and the names of these.
    pub(super) incomplete: Vec<(String, Vec<String>)>,
    /// Groups whose own settings of the manager couldn't be read, with the reason.
    pub(super) unread: Vec<(String, String)>,
}

impl World {
    /// Of these answers, and those that didn't answer. Groups of `restore` are restored whoever doesn't know them.
    pub(super) fn of(
        found: &[Found],
        silent: Vec<(VraEndpoint, String)>,
        now_us: TimeUs,
        restore: &[VpgId],
    ) -> Self {
        let (mut vpgs, mut unrestored, mut leftovers) = (Vec::new(), Vec::new(), Vec::new());
        let (mut unread, mut incomplete) = (Vec::new(), Vec::new());
        for (id, newest) in newest_definitions(found) {
            let (knows, lacks): (Vec<&Found>, Vec<_>) = found
                .iter()
                .filter(|vra| newest.has_member_at(vra.hello.vra))
                .partition(|vra| vra.vpgs.iter().any(|vpg| vpg.id == id));
            if restore.contains(&id) || lacks.iter().all(|vra| is_new_in(newest, vra.hello.vra)) {
                let all = knows.iter().flat_map(|vra| &vra.vpgs).filter(|vpg| vpg.id == id);
                let applied_revision = all.map(|vpg| vpg.revision).min().unwrap_or_default();
                let not_everywhere = newest.revision.saturating_sub(u64::from(!lacks.is_empty()));
                let applied_revision =
                    applied_revision.min(not_everywhere).min(heard_by_former(newest, found));
                if !lacks.is_empty() {
                    let lacking = lacks.iter().map(|vra| vra.hello.name.clone()).collect();
                    incomplete.push((newest.name.clone(), lacking));
                }
                let kept = newest.notes.as_ref().map(|notes| KeptSettings::from_json(&notes.settings));
                let kept = kept.unwrap_or_else(|| Ok(KeptSettings::default())).unwrap_or_else(|error| {
                    unread.push((newest.name.clone(), error.to_string()));
                    KeptSettings::default()
                });
                if let Some(vpg) = vpg_of(newest, kept, applied_revision, now_us) {
                    leftovers.extend(leftovers_of(&vpg, newest, found));
                    vpgs.push(vpg);
                }
            } else {
                let known_at = knows.iter().map(|vra| vra.hello.name.clone()).collect();
                unrestored.push(Unrestored { id, name: newest.name.clone(), known_at });
            }
        }
        let renamed = tell_vpgs_apart(&mut vpgs);
        let trust = trust_of(found);
        // None has that list as it is now: it needs a version of its own.
        let is_known = found.iter().any(|vra| {
            let revoked: BTreeSet<VraId> = vra.trust.revoked_vras.iter().copied().collect();
            vra.trust.version == trust.version && revoked.iter().eq(&trust.revoked_vras)
        });
        let trust_version = (trust.version + u64::from(!is_known)).max(1);
        let vras = vras_of(found, &silent, now_us);
        Self { vras, vpgs, leftovers, trust_version, silent, renamed, unrestored, incomplete, unread }
    }
}

/// The newest revision from before which all targets of former VMs have surely heard that these left.
fn heard_by_former(newest: &VpgDefinition, found: &[Found]) -> u64 {
    let has_answered = |vra: VraId| found.iter().any(|answered| answered.hello.vra == vra);
    let unheard = newest.former.iter().filter(|former| !has_answered(former.target));
    unheard.map(|former| former.revision.saturating_sub(1)).min().unwrap_or(newest.revision)
}

/// Whether all VMs of a VRA came into a group that others were in before: if it doesn't know the group, it was never told of it.
fn is_new_in(newest: &VpgDefinition, vra: VraId) -> bool {
    let first_set = newest.vms.iter().map(|vm| vm.member_since).min();
    let mut here = newest.vms.iter().filter(|vm| vm.source.id == vra || vm.target.id == vra);
    here.all(|vm| Some(vm.member_since) > first_set)
}

/// Each VRA once; one that is revoked is that, whatever else is known of it.
fn vras_of(found: &[Found], silent: &[(VraEndpoint, String)], now_us: TimeUs) -> Vec<(Vra, Issued)> {
    let named: Vec<VraEndpoint> = newest_definitions(found).into_values().flat_map(endpoints).collect();
    let mut vras = BTreeMap::new();
    for vra in found {
        let id = vra.hello.vra;
        let mut addresses = named.iter().filter(|named| named.id == id).map(|named| &named.address);
        let first = addresses.next();
        // Groups may name several: then that where it answered.
        let address = match first {
            Some(first) if *first != vra.address && addresses.any(|other| *other == vra.address) => {
                &vra.address
            }
            Some(first) => first,
            None => &vra.address,
        };
        let (serial, not_after_us) = (vra.certificate.serial.clone(), vra.certificate.ends_us.0);
        let issued = Issued { pem: String::new(), serial, not_after_us };
        let name = &vra.hello.name;
        vras.insert(id, (vra_of(id, address, name, VraState::Enrolled, &issued, now_us), issued));
    }
    for (endpoint, _) in silent {
        let (id, issued) = (endpoint.id, unknown_certificate(endpoint.id));
        let name = format!("vra-{}", short(id));
        vras.insert(id, (vra_of(id, &endpoint.address, &name, VraState::Enrolled, &issued, now_us), issued));
    }
    for id in trust_of(found).revoked_vras {
        let issued = unknown_certificate(id);
        let name = format!("revoked-{}", short(id));
        vras.insert(id, (vra_of(id, "unknown:9710", &name, VraState::Revoked, &issued, now_us), issued));
    }
    let mut vras: Vec<(Vra, Issued)> = vras.into_values().collect();
    tell_apart(&mut vras);
    vras
}

/// The newest definition of each group.
pub(super) fn newest_definitions(found: &[Found]) -> BTreeMap<VpgId, &VpgDefinition> {
    let mut newest: BTreeMap<VpgId, &VpgDefinition> = BTreeMap::new();
    for vpg in found.iter().flat_map(|vra| &vra.vpgs) {
        let known = newest.entry(vpg.id).or_insert(vpg);
        if vpg.revision > known.revision {
            *known = vpg;
        }
    }
    newest
}

/// The VRAs that a definition names.
pub(super) fn endpoints(vpg: &VpgDefinition) -> Vec<VraEndpoint> {
    vpg.vms.iter().flat_map(|vm| [vm.source.clone(), vm.target.clone()]).collect()
}

/// The VRAs that know a group and have no VM in it any more.
fn leftovers_of(vpg: &Vpg, newest: &VpgDefinition, found: &[Found]) -> Vec<Leftover> {
    let knows = |vra: &&Found| vra.vpgs.iter().any(|known| known.id == newest.id);
    let left = found.iter().filter(knows).map(|vra| vra.hello.vra).filter(|vra| !newest.has_member_at(*vra));
    left.map(|vra| {
        // What isn't said stays.
        let keep_files = vpg.keeps_files_at(vra) || vpg.former_revision_at(vra).is_none();
        Leftover { vpg: vpg.id, vra, keep_files }
    })
    .collect()
}

/// Of two groups with one name the older one gets another; says which did.
fn tell_vpgs_apart(vpgs: &mut [Vpg]) -> Vec<(String, String)> {
    vpgs.sort_by_key(|vpg| (std::cmp::Reverse(vpg.created_us), vpg.id));
    let (mut names, mut renamed) = (BTreeSet::new(), Vec::new());
    for vpg in vpgs {
        if !names.insert(vpg.name.clone()) {
            let suffix = format!("-{}", vpg.id.to_string().chars().take(8).collect::<String>());
            let kept = vpg.name.floor_char_boundary(MAX_NAME_BYTES - suffix.len());
            let name = format!("{}{suffix}", vpg.name[..kept].trim_end());
            renamed.push((std::mem::replace(&mut vpg.name, name.clone()), name.clone()));
            // Its VRAs have another definition of that revision.
            vpg.revision += 1;
            vpg.stamp = Some(Uuid::new_v4());
            names.insert(name);
        }
    }
    renamed
}

/// Two VRAs may call themselves the same: here a name means one.
fn tell_apart(vras: &mut [(Vra, Issued)]) {
    let mut names = BTreeSet::new();
    for (vra, _) in vras {
        if !names.insert(vra.name.clone()) {
            vra.name = format!("{}-{}", vra.name, short(vra.id));
            names.insert(vra.name.clone());
        }
    }
}

fn vra_of(id: VraId, address: &str, name: &str, state: VraState, issued: &Issued, now_us: TimeUs) -> Vra {
    Vra {
        id,
        name: name.to_owned(),
        address: address.to_owned(),
        version: "unknown".to_owned(),
        state,
        enrolled_us: now_us,
        revoked_us: (state == VraState::Revoked).then_some(now_us),
        certificate_serial: issued.serial.clone(),
        certificate_ends_us: TimeUs(issued.not_after_us),
    }
}

/// Stands for one that isn't known: its VRA is known by its id.
fn unknown_certificate(id: VraId) -> Issued {
    Issued { pem: String::new(), serial: unknown_serial(id), not_after_us: 0 }
}

fn short(id: VraId) -> String {
    id.to_string().chars().take(8).collect()
}

#[cfg(test)]
mod tests {
    use vra::api::vpg::Priority;
    use vra::api::{FormerVm, HelloReply, MemberSince, PROTOCOL_VERSION, SetTrust};
    use vra::pki::{Identity, PeerCertificate};

    use super::*;
    use crate::model::recovery::GroupRecovery;

    fn id(number: u128) -> VraId {
        VraId(Uuid::from_u128(number << 96))
    }

    /// A group with one VM, from a source at an address to a target.
    fn group(number: u128, name: &str, revision: u64, source: (u128, &str), target: u128) -> VpgDefinition {
        let endpoint = |vra: u128, address: &str| serde_json::json!({ "id": id(vra), "address": address });
        let vm = serde_json::json!({
            "id": Uuid::from_u128(number + 7), "name": "db", "journal": Uuid::from_u128(number + 8),
            "source": endpoint(source.0, source.1), "target": endpoint(target, "b:1"), "datastore": "/ds",
            "journal_limit_bytes": 1_u64 << 30, "history_s": 3600, "give_up_history": false, "volumes": [],
        });
        let vpg = serde_json::json!({
            "id": Uuid::from_u128(number << 96), "name": name, "revision": revision, "member_set_version": 1,
            "checkpoint_interval_ms": 5000, "hold_deadline_ms": 100, "vms": [vm],
            "notes": { "description": "", "priority": "Medium", "rpo_target_s": null, "created_us": number },
        });
        serde_json::from_value(vpg).expect("a definition")
    }

    fn answered(number: u128, address: &str, revoked: &[u128], vpgs: &[VpgDefinition]) -> Found {
        let vra = id(number);
        let hello = HelloReply {
            protocol: PROTOCOL_VERSION,
            vra,
            name: format!("vra-{number}"),
            version: "1".into(),
            features: Vec::new(),
        };
        let certificate =
            PeerCertificate { identity: Identity::vra(vra), serial: number.to_string(), ends_us: TimeUs(9) };
        let revoked_vras = revoked.iter().copied().map(id).collect();
        let trust = SetTrust { version: 3, revoked_serials: Vec::new(), revoked_vras };
        Found { address: address.into(), hello, certificate, vpgs: vpgs.to_vec(), trust }
    }

    #[test]
    fn one_that_is_revoked_and_silent_is_there_once_and_revoked() {
        let shop = group(1, "shop", 2, (1, "a:1"), 2);
        let silent = VraEndpoint { id: id(1), address: "a:1".into() };
        let found = [answered(2, "b:1", &[1], std::slice::from_ref(&shop))];
        let world = World::of(&found, vec![(silent, "no answer".into())], TimeUs(5), &[]);
        let states: Vec<_> = world.vras.iter().map(|(vra, _)| (vra.id, vra.state)).collect();
        assert_eq!(states, [(id(1), VraState::Revoked), (id(2), VraState::Enrolled)]);
        assert_eq!((world.trust_version, world.vpgs.len()), (3, 1));
    }

    #[test]
    fn a_group_that_a_member_lacks_is_listed_and_not_restored() {
        let shop = group(1, "shop", 2, (1, "a:1"), 2);
        let found = [answered(1, "a:1", &[], &[]), answered(2, "b:1", &[], std::slice::from_ref(&shop))];
        let world = World::of(&found, Vec::new(), TimeUs(5), &[]);
        let expected = Unrestored { id: shop.id, name: "shop".into(), known_at: vec!["vra-2".to_owned()] };
        assert_eq!((world.vpgs.len(), world.unrestored), (0, vec![expected]));
    }

    #[test]
    fn a_group_that_a_vm_was_being_added_to_is_restored_and_goes_to_the_new_vms_host() {
        let mut shop = group(1, "shop", 9, (1, "a:1"), 2);
        let mut added = group(9, "shop", 9, (3, "c:1"), 2).vms.remove(0);
        (shop.member_set_version, added.member_since) = (4, MemberSince(4));
        shop.vms.push(added);
        let knows = std::slice::from_ref(&shop);
        let found =
            [answered(1, "a:1", &[], knows), answered(2, "b:1", &[], knows), answered(3, "c:1", &[], &[])];
        let world = World::of(&found, Vec::new(), TimeUs(5), &[]);
        assert_eq!((world.vpgs.len(), world.unrestored.len()), (1, 0));
        let vpg = &world.vpgs[0];
        assert_eq!((vpg.revision, vpg.applied_revision, vpg.settings.vms.len()), (9, 8, 2));
        assert_eq!(world.incomplete, [("shop".to_owned(), vec!["vra-3".to_owned()])]);
    }

    #[test]
    fn a_group_that_a_member_lacks_is_restored_if_it_is_named() {
        let shop = group(1, "shop", 2, (1, "a:1"), 2);
        let found = [answered(1, "a:1", &[], &[]), answered(2, "b:1", &[], std::slice::from_ref(&shop))];
        let world = World::of(&found, Vec::new(), TimeUs(5), &[shop.id]);
        assert_eq!((world.vpgs[0].applied_revision, world.unrestored.len()), (1, 0));
    }

    #[test]
    fn the_older_of_two_groups_with_one_name_gets_another_and_a_new_revision() {
        let (older, newer) = (group(1, "shop", 2, (1, "a:1"), 2), group(2, "shop", 4, (1, "a:1"), 2));
        let found = [answered(2, "b:1", &[], &[older, newer])];
        let world = World::of(&found, Vec::new(), TimeUs(5), &[]);
        let told: Vec<_> = world.vpgs.iter().map(|vpg| (vpg.name.as_str(), vpg.revision)).collect();
        assert_eq!(told, [("shop", 4), ("shop-00000001", 3)]);
        assert_eq!(world.renamed, [("shop".to_owned(), "shop-00000001".to_owned())]);
        // Names have their limit.
        let long = "é".repeat(64);
        let (older, newer) = (group(1, &long, 2, (1, "a:1"), 2), group(2, &long, 4, (1, "a:1"), 2));
        let world = World::of(&[answered(2, "b:1", &[], &[older, newer])], Vec::new(), TimeUs(5), &[]);
        assert_eq!(world.renamed[0].1, format!("{}-00000001", "é".repeat(59)));
    }

    #[test]
    fn what_only_the_manager_uses_comes_back_or_is_told_to_be_lost() {
        let mut shop = group(1, "shop", 2, (1, "a:1"), 2);
        let vm = shop.vms[0].id;
        let settings = serde_json::json!({
            "test_reminder_days": 90,
            "recovery": { "place": { "network": "dr" }, "boot_groups": [{ "name": "databases", "delay_s": 60 }] },
            "vms": { vm.to_string(): {
                "recovery": { "boot_group": "databases" }, "excluded": [{ "name": "vdb", "path": "/swap" }],
            } },
        });
        let restored = |shop: &VpgDefinition| {
            let found = [
                answered(1, "a:1", &[], std::slice::from_ref(shop)),
                answered(2, "b:1", &[], std::slice::from_ref(shop)),
            ];
            let world = World::of(&found, Vec::new(), TimeUs(5), &[]);
            (world.vpgs[0].settings.clone(), world.unread)
        };
        assert_eq!(restored(&shop).0.test_reminder_days, None, "as an older manager wrote it");
        let notes = shop.notes.as_mut().expect("notes");
        (notes.priority, notes.settings) = (Priority::High, settings.clone());
        let (back, unread) = restored(&shop);
        assert_eq!((back.priority, back.test_reminder_days, unread.len()), (Priority::High, Some(90), 0));
        assert_eq!(KeptSettings::of(&back).to_json(), settings);
        assert_eq!(back.vms[0].recovery.boot_group.as_deref(), Some("databases"));
        shop.notes.as_mut().expect("notes").settings["recovery"]["later"] = true.into();
        let (back, unread) = restored(&shop);
        assert_eq!(back.recovery, GroupRecovery::default());
        assert!(unread[0].0 == "shop" && unread[0].1.contains("later"), "{unread:?}");
    }

    #[test]
    fn the_newest_definition_gives_the_addresses() {
        let (old, new) = (group(1, "shop", 2, (1, "old:1"), 2), group(1, "shop", 3, (1, "new:1"), 2));
        let found = [answered(2, "given:1", &[], &[new]), answered(1, "given:2", &[], &[old])];
        let world = World::of(&found, Vec::new(), TimeUs(5), &[]);
        let addresses: Vec<_> = world.vras.iter().map(|(vra, _)| vra.address.as_str()).collect();
        assert_eq!((addresses, world.vpgs[0].applied_revision), (vec!["new:1", "b:1"], 2));
        let world = World::of(&[answered(3, "given:3", &[], &[])], Vec::new(), TimeUs(5), &[]);
        assert_eq!(world.vras[0].0.address, "given:3", "no group names it");
    }

    #[test]
    fn members_are_since_when_they_were_and_who_was_one_is_told() {
        let mut shop = group(1, "shop", 5, (1, "a:1"), 2);
        (shop.member_set_version, shop.vms[0].member_since) = (4, MemberSince(3));
        let old = group(1, "shop", 3, (1, "a:1"), 3);
        let was = &old.vms[0];
        let former = FormerVm {
            id: was.id,
            name: was.name.clone(),
            journal: was.journal,
            target: id(3),
            datastore: was.datastore.clone(),
            keep_files: false,
            revision: 4,
        };
        shop.former.push(former.clone());
        let newest = std::slice::from_ref(&shop);
        let found = [
            answered(1, "a:1", &[], newest),
            answered(2, "b:1", &[], newest),
            answered(3, "c:1", &[], std::slice::from_ref(&old)),
        ];
        let world = World::of(&found, Vec::new(), TimeUs(5), &[]);
        let vpg = &world.vpgs[0];
        assert_eq!(vpg.settings.vms[0].member_since, MemberSince(3));
        assert_eq!((vpg.applied_revision, &vpg.settings.former), (5, &vec![former]));
        assert_eq!(world.leftovers, [Leftover { vpg: shop.id, vra: id(3), keep_files: false }]);
        // One that doesn't answer may not have heard of it.
        let world = World::of(&found[..2], Vec::new(), TimeUs(5), &[]);
        assert_eq!(world.vpgs[0].applied_revision, 3);
        // One that nothing is said of keeps what it has.
        let mut silent = shop.clone();
        silent.former.clear();
        let found = [
            answered(1, "a:1", &[], &[silent.clone()]),
            answered(2, "b:1", &[], &[silent]),
            answered(3, "c:1", &[], &[old]),
        ];
        let world = World::of(&found, Vec::new(), TimeUs(5), &[]);
        assert_eq!(world.leftovers, [Leftover { vpg: shop.id, vra: id(3), keep_files: true }]);
    }
}
