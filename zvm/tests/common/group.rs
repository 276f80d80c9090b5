//! A group that does well, for tests of what is told of groups. Needs `world.rs` beside it.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::collections::BTreeMap;

use vra::api::status::*;
use vra::api::*;
use zvm::conditions::Look;
use zvm::health;
use zvm::inventory::Inventory;
use zvm::model::alert::Condition;
use zvm::model::status::{VpgReport, VpgStatus as Status, VpgSubstatus as Substatus};

use super::world::{self, World};

pub(crate) const NOW_US: u64 = 1_800_000_000_000_000;
pub(crate) const SECOND_US: u64 = 1_000_000;

/// A group of one VM that does well.
pub(crate) struct Group {
    pub(crate) world: World,
    pub(crate) ended: BTreeMap<VpgId, u64>,
    pub(crate) source: VraId,
    pub(crate) target: VraId,
}

impl Group {
    pub(crate) fn new() -> Self {
        let mut world = World::new();
        world.now_us = NOW_US;
        let (source, target) = (world.add_vra("a"), world.add_vra("b"));
        let vpg = world.add_vpg(source, target);
        world.desired.vpgs[0].applied_revision = 1;
        let member = world.desired.vpgs[0].settings.vms[0].clone();
        let newest = TimeUs(NOW_US - 2 * SECOND_US);
        let mut at_target = world::vpg_status(vpg, 1);
        at_target.checkpoint_count = 100;
        at_target.held_checkpoint =
            Some(LastCheckpoint { id: CheckpointId { nonce: 1, counter: 100 }, time_us: newest, tag: None });
        let source_vm = SourceVmStatus {
            vm: member.vm,
            name: "db".into(),
            vpg,
            target,
            mode: SourceMode::Streaming,
            connected: true,
            generation: GenerationId::random(),
            last_sequence: 10,
            durable_through: 10,
            rpo: Rpo::default(),
            sync: None,
            retained_bytes: 0,
            retained_limit_bytes: 1 << 20,
            sent_bytes: 0,
            hold: HoldTimes::default(),
            local_errors: 0,
        };
        let target_vm = TargetVmStatus {
            vm: member.vm,
            name: "db".into(),
            vpg,
            source,
            state: TargetState::Journaling,
            connected: true,
            journal: member.journal,
            generation: None,
            durable_through: 10,
            history_from_us: Some(TimeUs(NOW_US - 3_600 * SECOND_US)),
            history_to_us: Some(newest),
            checkpoint_count: 100,
            journal_used_bytes: 1 << 20,
            journal_limit_bytes: 1 << 30,
            write_rate_bytes_per_s: 0,
            reachable_history_s: None,
            limit_reached_in_s: None,
            site_key: None,
            scrub: None,
            received_bytes: 0,
            folder: "/srv/db".into(),
        };
        world.see(source, NOW_US, |status| {
            status.now_us = TimeUs(NOW_US);
            status.vpgs.push(world::vpg_status(vpg, 1));
            status.source_vms.push(source_vm);
        });
        world.see(target, NOW_US, |status| {
            status.now_us = TimeUs(NOW_US);
            status.vpgs.push(at_target);
            status.target_vms.push(target_vm);
        });
        Self { world, ended: BTreeMap::new(), source, target }
    }

    pub(crate) fn source(&mut self, change: impl FnOnce(&mut VraStatus)) {
        self.world.see(self.source, NOW_US, change);
    }

    pub(crate) fn target(&mut self, change: impl FnOnce(&mut VraStatus)) {
        self.world.see(self.target, NOW_US, change);
    }

    pub(crate) fn source_vm(&mut self, change: impl FnOnce(&mut SourceVmStatus)) {
        self.source(|status| change(&mut status.source_vms[0]));
    }

    pub(crate) fn target_vm(&mut self, change: impl FnOnce(&mut TargetVmStatus)) {
        self.target(|status| change(&mut status.target_vms[0]));
    }

    pub(crate) fn report(&self) -> VpgReport {
        let desired = &self.world.desired;
        health::report(
            &desired.vpgs[0],
            &desired.vras,
            &self.world.observed,
            &desired.tests,
            self.world.now_us,
        )
    }

    pub(crate) fn judged(&self) -> (Status, Substatus) {
        let report = self.report();
        (report.status, report.substatus)
    }

    pub(crate) fn codes(&self) -> Vec<String> {
        self.conditions().into_iter().map(|condition| condition.code).collect()
    }

    pub(crate) fn conditions(&self) -> Vec<Condition> {
        let look = Look {
            desired: &self.world.desired,
            observed: &self.world.observed,
            reports: &[self.report()],
            failures: &BTreeMap::new(),
            ended: &self.ended,
            inventory: &Inventory::default(),
            now_us: self.world.now_us,
        };
        look.conditions()
    }
}
