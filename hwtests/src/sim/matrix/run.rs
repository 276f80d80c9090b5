//! One run of a scenario: to its end without a crash, or with one, or a failure, at an exact operation, and what must hold afterwards.

use std::collections::BTreeMap;

use journal::crypt::Encryption;
use journal::storage::sim::{Crash, OpKind, Strike};
use journal::view::Reader;

use super::super::coverage::Happening;
use super::super::damage;
use super::super::env::Env;
use super::super::ledger::Ledger;
use super::super::rebuilt;
use super::super::recovered;
use super::super::scripted::Script;
use super::super::shape::some_key;
use super::super::target::{Life, TargetSite};
use super::super::vm::{Source, Vm, identity};
use super::scenario::{HISTORY_US, Scenario, Step};
use super::{Case, Effort};

/// Rounds in which everything that was published comes to rest at the target.
const PATIENCE: usize = 2_000;
/// Longest time that a round takes, in microseconds.
const ROUND_US: u64 = 50;
/// After so long a promotion that could not go on is tried again, in microseconds.
const HOLD_OFF_US: u64 = 6_000_000;
/// So long nothing comes before space is given back, in microseconds.
const QUIET_US: u64 = 61_000_000;

pub(super) struct Run {
    vm: Vm,
    env: Env,
    watched_from: usize,
    /// What is shown may say that it can't be read.
    is_damaged: bool,
    is_created: bool,
    /// An operation is to fail, or has failed.
    fails: Failing,
}

/// Where a run stands in which an operation fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Failing {
    /// It isn't to.
    Never,
    /// It hasn't yet.
    Ahead,
    /// It has, and nobody has waited yet until it is tried again.
    Happened,
    /// It has, and the time to try again has come.
    Past,
}

/// What crashes met, and what else happened.
#[derive(Debug, Default)]
pub(super) struct Survived {
    pub(super) first: Vec<(OpKind, Strike)>,
    /// In openings after the first.
    pub(super) second: Vec<(OpKind, Strike)>,
    /// After such an opening.
    pub(super) later: Vec<(OpKind, Strike)>,
    pub(super) happenings: BTreeMap<Happening, u64>,
}

impl Run {
    fn new(scenario: &Scenario, seed: u64, traced: bool) -> Self {
        let mut env = Env::smooth(seed, traced);
        let vm = Vm::unmade(seed, scenario.shape(), &mut env);
        vm.site.disk.note_ops();
        Self { vm, env, watched_from: 0, is_damaged: false, is_created: false, fails: Failing::Never }
    }

    /// Without a crash: gives the operations, and from which on they are watched.
    pub(super) fn undisturbed(scenario: &Scenario, seed: u64) -> Result<(Vec<OpKind>, usize), String> {
        let mut run = Self::new(scenario, seed, false);
        for step in scenario.steps {
            if run.step(*step)? == Life::Dead {
                return Err("a process died that nobody killed".into());
            }
        }
        let ops = run.vm.site.disk.run_ops();
        // A reader beside the living process finds all that is promised.
        let Vm { site, ledger, .. } = &mut run.vm;
        if run.is_damaged {
            damage::look(site, ledger, &damage::Expected::default(), &mut run.env)?;
        } else {
            recovered::compare_all(site, ledger, &mut run.env)?;
        }
        Ok((ops, run.watched_from))
    }

    /// With the crash of a case.
    pub(super) fn struck(
        scenario: &Scenario,
        case: &Case,
        effort: Effort,
        traced: bool,
    ) -> Result<Survived, String> {
        let mut run = Self::new(scenario, case.seed, traced);
        run.vm.site.disk.arm_strike(case.op as u64, case.strike, case.salt());
        if case.strike == Strike::Fail {
            run.fails = Failing::Ahead;
        }
        let mut survived = Survived::default();
        for step in scenario.steps {
            run.env.note(|| format!("{step:?}"));
            let mut life = run.step(*step)?;
            while life == Life::Dead {
                run.recover(case, effort, &mut survived)?;
                // What the process was told is told again where it must be.
                life = if matches!(step, Step::Settle) { run.settle()? } else { Life::Alive };
            }
        }
        if run.has_failed() && survived.first.is_empty() {
            survived.first.push((run.vm.site.disk.run_ops()[case.op], case.strike));
        }
        if survived.first.is_empty() {
            return Err("there was no such operation: a run is not like the one before".into());
        }
        survived.happenings = run.env.coverage.happenings.clone();
        run.end()?;
        Ok(survived)
    }

    /// Whether the operation that is to fail has failed.
    fn has_failed(&mut self) -> bool {
        if self.fails == Failing::Ahead && !self.vm.site.disk.is_strike_armed() {
            self.fails = Failing::Happened;
        }
        [Failing::Happened, Failing::Past].contains(&self.fails)
    }

    fn script(&mut self) -> (&mut Script, &mut Ledger, &mut Env) {
        match &mut self.vm.source {
            Source::Scripted(script) => (script, &mut self.vm.ledger, &mut self.env),
            Source::Protected(_) => unreachable!("the source of a scenario is a scripted one"),
        }
    }

    fn step(&mut self, step: Step) -> Result<Life, String> {
        match step {
            Step::Watch => self.watched_from = self.vm.site.disk.run_ops().len(),
            Step::Create => return self.create(),
            Step::Write(count) => {
                let (script, ledger, env) = self.script();
                (0..count).for_each(|_| script.write(ledger, env));
            }
            Step::Zeroes(count) => {
                let (script, ledger, env) = self.script();
                (0..count).for_each(|_| script.zeroes(ledger, env));
            }
            Step::Checkpoint => {
                let (script, ledger, env) = self.script();
                script.checkpoint(ledger, env);
                script.checkpoint(ledger, env);
            }
            Step::Sync => {
                let (script, ledger, env) = self.script();
                while script.is_syncing() {
                    script.sync_step(ledger, env);
                }
            }
            Step::Settle => return self.settle(),
            Step::Age => self.env.wait(2 * HISTORY_US),
            Step::Quiet => self.env.wait(QUIET_US),
            Step::NewGeneration => {
                let life = self.settle()?;
                let tail_seq = self.vm.ledger.acked();
                let (script, ledger, env) = self.script();
                script.fork(tail_seq, ledger, env);
                return Ok(life);
            }
            Step::Restart => {
                self.vm.site.crash(Crash::Kill, &mut self.env);
                self.vm.streams.target_died(&mut self.env);
                let is_open = self.vm.site.try_open(&self.vm.ledger, &mut self.env)?;
                return Ok(if is_open { Life::Alive } else { Life::Dead });
            }
            Step::Damage => {
                let place = damage::place_of_a_payload(&self.vm.site, &mut self.env);
                let place = place.ok_or("there is no payload to damage")?;
                self.vm.site.disk.flip_bit(self.vm.site.journal, place..place + 1);
                self.is_damaged = true;
            }
            Step::MaxSlots(count) => self.vm.site.limit_slots(count),
            Step::Seal | Step::Manifest | Step::NewKey | Step::NoKey => self.command(step)?,
        }
        Ok(Life::Alive)
    }

    fn create(&mut self) -> Result<Life, String> {
        let process = self.vm.site.disk.storage();
        match self.vm.site.create(Encryption::Never) {
            Ok(()) => self.is_created = true,
            Err(_) if self.vm.site.disk.is_dead(&process) || self.has_failed() => return Ok(Life::Dead),
            Err(what) => return Err(what),
        }
        let is_open = self.vm.site.try_open(&self.vm.ledger, &mut self.env)?;
        Ok(if is_open { Life::Alive } else { Life::Dead })
    }

    /// What the process is told from outside, and did not do before.
    fn command(&mut self, step: Step) -> Result<(), String> {
        let random = self.env.rng.next_u64();
        let vm = identity(0x71);
        let vm = vra::receive::VmIdentity { vm: vm.vm, journal: vm.journal, volumes: vm.volumes };
        let Some(receiver) = self.vm.site.command() else { return Err("there is no process".into()) };
        let done = match step {
            Step::Seal => {
                receiver.seal();
                return Ok(());
            }
            Step::Manifest => receiver.set_manifest(format!(r#"{{"made":{random}}}"#)).map(drop),
            Step::NewKey => receiver.set_encryption(some_key(&vm, random)).map(drop),
            _ => receiver.set_encryption(Encryption::Off).map(drop),
        };
        done.map_err(|error| format!("{step:?}: {error}"))
    }

    /// Everything that was published becomes durable, and the target has nothing to do any more.
    fn settle(&mut self) -> Result<Life, String> {
        for _ in 0..PATIENCE {
            self.env.pass(ROUND_US);
            self.vm.ship(&mut self.env)?;
            self.vm.deliver(&mut self.env)?;
            self.vm.pump(40, &mut self.env)?;
            if !self.vm.site.is_up() {
                return Ok(Life::Dead);
            }
            if self.vm.site.has_failed() {
                return self.end_failed();
            }
            if self.has_failed() && self.fails == Failing::Happened {
                // A promotion is tried again after a while.
                self.env.wait(HOLD_OFF_US);
                self.fails = Failing::Past;
            }
            let last_seq = self.script().0.last_seq();
            if self.vm.ledger.acked() == last_seq && self.vm.site.is_idle() {
                return Ok(Life::Alive);
            }
        }
        Err(format!("durable through {} after a long time, not to the end", self.vm.ledger.acked()))
    }

    /// After storage has failed: nothing is under way any more, and the same process or another one opens the files again.
    fn end_failed(&mut self) -> Result<Life, String> {
        if !self.has_failed() {
            return Err("storage failed that nobody let fail".into());
        }
        while self.vm.site.is_busy() {
            if self.vm.site.run_one(&mut self.env) == Life::Dead {
                return Err("a process died that nobody killed".into());
            }
        }
        self.vm.site.outputs(&mut self.env)?;
        self.vm.site.end_failed(&mut self.env);
        self.vm.streams.target_died(&mut self.env);
        Ok(Life::Dead)
    }

    /// After a crash: the journal opens, also if that opening meets another crash; and what it has found is durable.
    fn recover(&mut self, case: &Case, effort: Effort, survived: &mut Survived) -> Result<(), String> {
        let (seed, is_damaged) = (case.salt(), self.is_damaged);
        let ops = self.vm.site.disk.run_ops();
        let is_first = survived.first.is_empty();
        let failed = (is_first && self.has_failed()).then_some(case.op);
        let met = ops.get(failed.unwrap_or(ops.len().wrapping_sub(1))).copied();
        let met = met.ok_or("a process died of nothing")?;
        match (is_first, case.later) {
            (true, _) => survived.first.push((met, case.strike)),
            (false, Some((_, strike))) if survived.later.is_empty() => survived.later.push((met, strike)),
            _ => return Err("a process died that nobody killed".into()),
        }
        self.env.note(|| format!("a crash at {met:?}"));
        if !self.is_created {
            self.vm.site.disk.fence();
            self.vm.site.create(Encryption::Never)?;
            self.is_created = true;
        }
        let Vm { site, ledger, .. } = &mut self.vm;
        let env = &mut self.env;
        if is_first && case.later.is_none() {
            let opening = site.on_copy(seed, |site| {
                site.disk.note_ops();
                site.open(ledger, env)?;
                Ok::<_, String>(site.disk.run_ops())
            })?;
            for (at, strike) in effort.second_crashes(case, met, &opening) {
                site.on_copy(seed, |site| {
                    site.disk.arm_strike(at as u64, strike, seed ^ at as u64);
                    if site.try_open(ledger, env)? {
                        return Err("there was no such operation in the opening".into());
                    }
                    site.open(ledger, env)?;
                    compare_after_power_cut(site, tail_seq(site), ledger, is_damaged, env)
                })
                .map_err(|what| format!("then {strike:?} at operation {at} of the opening: {what}"))?;
                survived.second.push((opening[at], strike));
            }
        }
        if !is_damaged {
            rebuilt::compare_without_superblocks(site, ledger, env)?;
        }
        site.open(ledger, env)?;
        let relied_on_seq = tail_seq(site);
        site.on_copy(seed, |site| compare_after_power_cut(site, relied_on_seq, ledger, is_damaged, env))?;
        if let Some((after_ops, strike)) = case.later.filter(|_| is_first) {
            site.disk.arm_strike(after_ops as u64, strike, seed ^ after_ops as u64);
        }
        Ok(())
    }

    /// The disaster, and what must be there afterwards.
    fn end(mut self) -> Result<(), String> {
        // A later crash may have been too late.
        self.vm.site.disk.disarm();
        let crash = self.env.any_crash();
        let Vm { site, ledger, .. } = &mut self.vm;
        site.crash(crash, &mut self.env);
        site.open(ledger, &mut self.env)?;
        compare_after_power_cut(site, tail_seq(site), ledger, self.is_damaged, &mut self.env)
    }
}

/// What the process takes for durable.
fn tail_seq(site: &TargetSite) -> u64 {
    site.receiver().map_or(0, |receiver| receiver.writer().durable().seq)
}

/// Right after an opening the power goes: what the opening relies on must be durable (C1), and all that is promised there.
fn compare_after_power_cut(
    site: &mut TargetSite,
    relied_on_seq: u64,
    ledger: &Ledger,
    is_damaged: bool,
    env: &mut Env,
) -> Result<(), String> {
    site.crash(Crash::PowerCut, env);
    site.disk.fence();
    let reader = Reader::open(&mut site.disk.storage(), site.journal, &site.survey_options())
        .map_err(|error| format!("the journal cannot be read: {error:?}"))?;
    if reader.newest_seq() < relied_on_seq {
        let found_seq = reader.newest_seq();
        return Err(format!("an opening relied on {relied_on_seq}, and after it only {found_seq} is there"));
    }
    if is_damaged {
        damage::look(site, ledger, &damage::Expected::default(), env)
    } else {
        recovered::compare_all(site, ledger, env).map(drop)
    }
}
