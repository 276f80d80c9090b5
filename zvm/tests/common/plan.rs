//! An inventory with VRAs for the tests of what groups are made from.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::collections::BTreeMap;

use uuid::Uuid;
use vra::api::vpg::Priority;
use vra::api::*;
use zvm::api::{VmSpec, VpgSpec, defaults};
use zvm::inventory::{Inventory, static_file};
use zvm::manager::spec::{Context, resolve};
use zvm::model::recovery::GroupRecovery;
use zvm::model::vpg::Vpg;
use zvm::model::vra::{Vra, VraState};

pub(crate) fn spec(vms: &[&str]) -> VpgSpec {
    let vm = |vm: &&str| VmSpec { vm: (*vm).into(), ..VmSpec::default() };
    VpgSpec {
        name: "shop".into(),
        description: String::new(),
        priority: Priority::default(),
        target: "vra-b".into(),
        datastore: "ds1".into(),
        journal_limit_bytes: defaults::journal_limit_bytes(),
        journal_limit_percent: None,
        journal_warning: None,
        journal_minimum_bytes: 0,
        history_s: defaults::history_s(),
        checkpoint_interval_ms: defaults::checkpoint_interval_ms(),
        hold_deadline_ms: defaults::hold_deadline_ms(),
        rpo_target_s: defaults::rpo_target_s(),
        give_up_history: true,
        encrypt: false,
        test_reminder_days: None,
        new_disks: Default::default(),
        recovery: GroupRecovery::default(),
        vms: vms.iter().map(vm).collect(),
    }
}

pub(crate) struct Site {
    pub(crate) inventory: Inventory,
    pub(crate) vras: BTreeMap<VraId, Vra>,
    pub(crate) vpgs: Vec<Vpg>,
}

impl Site {
    pub(crate) fn new() -> Self {
        let vm = |name: &str, host: &str, disks: &[&str]| {
            let disks: String = disks
                .iter()
                .enumerate()
                .map(|(at, path)| {
                    let letter = char::from(b'a' + at as u8);
                    format!("[[vm.disk]]\nname = \"vd{letter}\"\npath = \"{path}\"\nsize = \"1 GiB\"\n")
                })
                .collect();
            let nic = |last| format!("[[vm.nic]]\nmac = \"{}\"\nnetwork = \"prod\"\n", mac(name, last));
            let nics = [1, 2].map(nic).concat();
            format!(
                "[[vm]]\nname = \"{name}\"\nuuid = \"{}\"\nhost = \"{host}\"\n{disks}{nics}",
                Uuid::new_v4()
            )
        };
        let text = [
            "[[site]]\nname = \"s\"\n[[site]]\nname = \"other\"\n".to_owned(),
            [("prod", "s"), ("dr", "s"), ("lab", "s"), ("overseas", "other")]
                .map(|(name, site)| format!("[[network]]\nname = \"{name}\"\nsite = \"{site}\"\n"))
                .concat(),
            ["a", "b", "c"]
                .map(|x| format!("[[host]]\nname = \"kvm-{x}\"\nsite = \"s\"\nvra = \"vra-{x}\"\n"))
                .concat(),
            "[[datastore]]\nname = \"ds1\"\nhosts = [\"kvm-b\"]\npath = \"/srv/ds1\"\n".to_owned(),
            "[[datastore]]\nname = \"ds-a\"\nhosts = [\"kvm-a\"]\npath = \"/srv/ds-a\"\n".to_owned(),
            vm("db", "kvm-a", &["/images/db", "/images/db-log"]),
            vm("web", "kvm-a", &["/images/web"]),
            vm("guarded", "kvm-a", &["/images/guarded"]),
            vm("bare", "kvm-a", &[]),
            vm("far", "kvm-b", &["/images/far"]),
        ]
        .concat();
        let inventory = static_file::parse(&text, "test").unwrap();
        let vras = ["vra-a", "vra-b", "vra-c"]
            .map(|name| {
                let id = VraId::random();
                let vra = Vra {
                    id,
                    name: name.into(),
                    address: format!("{name}:9710"),
                    version: "1".into(),
                    state: VraState::Enrolled,
                    enrolled_us: TimeUs(1),
                    revoked_us: None,
                    certificate_serial: "1".into(),
                    certificate_ends_us: TimeUs(2),
                };
                (id, vra)
            })
            .into();
        let mut site = Self { inventory, vras, vpgs: Vec::new() };
        let mut taken = spec(&["guarded"]);
        taken.name = "taken".into();
        let vpg = site.create(&taken, &[site.volume("guarded", 0, "/images/guarded")]).unwrap();
        site.vpgs.push(vpg);
        site
    }

    pub(crate) fn context(&self) -> Context<'_> {
        Context { inventory: &self.inventory, vras: &self.vras, vpgs: &self.vpgs }
    }

    pub(crate) fn create(&self, spec: &VpgSpec, served: &[VolumeInfo]) -> Result<Vpg, ApiError> {
        let context = self.context();
        let resolved = resolve(spec, &context)?;
        // Each VRA tells of its own VMs alone.
        let of = |vra: &Vra| {
            let hosts: Vec<_> = self.inventory.hosts_of_vra(&vra.name).collect();
            let here = |volume: &&VolumeInfo| {
                let vm = self.inventory.find_vm(&volume.vm_name).unwrap();
                hosts.contains(&vm.host.as_str())
            };
            served.iter().filter(here).cloned().collect()
        };
        let served = resolved.sources().into_iter().map(|(id, vra)| (id, of(vra))).collect();
        resolved.into_vpg(&served, TimeUs(1))
    }

    pub(crate) fn vra(&self, name: &str) -> VraId {
        self.vras.values().find(|vra| vra.name == name).unwrap().id
    }

    pub(crate) fn vm(&self, name: &str) -> VmId {
        VmId(self.inventory.find_vm(name).unwrap().uuid)
    }

    pub(crate) fn db_volumes(&self) -> Vec<VolumeInfo> {
        vec![self.volume("db", 0, "/images/db"), self.volume("db", 1, "/images/db-log")]
    }

    pub(crate) fn volume(&self, vm: &str, number: u16, path: &str) -> VolumeInfo {
        VolumeInfo {
            volume: VolumeId::random(),
            vm: self.vm(vm),
            vm_name: vm.into(),
            number,
            path: path.into(),
            size_bytes: 1 << 30,
            grown_bytes: None,
            logical_block_bytes: 512,
            vpg: None,
            door: None,
            link: None,
            problem: None,
            shared: None,
        }
    }
}

/// The MAC address of a VM's network card.
pub(crate) fn mac(vm: &str, last: u8) -> String {
    let first = vm.as_bytes().first().copied().unwrap_or_default();
    format!("52:54:00:00:{first:02x}:{last:02x}")
}
