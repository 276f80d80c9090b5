//! One seed's world: what happens, in which order.

use journal::planted::{Bug, planted};

use super::coverage::Coverage;
use super::env::Env;
use super::group::Group;
use super::vm::Vm;

/// A world of one seed.
pub struct World {
    env: Env,
    vms: Vec<Vm>,
    /// Those that have checkpoints together; scripted sources have theirs alone.
    group: Option<Group>,
}

/// Whether the source of a seed's world is a scripted one: three in eight are. Of the others, three in five have two VMs.
pub fn is_scripted(seed: u64) -> bool {
    seed % 8 < 3
}

/// A hold is short: disturbances come more often while there is one.
const CALM_WHILE_HELD: u64 = 40;

/// Longest time between two things that happen, in microseconds.
const STEP_US: u64 = 50;

impl World {
    /// The world of a seed; `traced` prints what happens in it.
    ///
    /// # Errors
    /// The files can't be made.
    pub fn new(seed: u64, traced: bool) -> Result<Self, String> {
        let mut env = Env::new(seed, traced);
        let scripted = is_scripted(seed);
        let count = if scripted || seed % 8 < 5 { 1 } else { 2 };
        let vms = (0..count)
            .map(|index| Vm::new(seed ^ (index << 40), 0x71 + u128::from(index), scripted, &mut env));
        let vms = vms.collect::<Result<Vec<_>, _>>()?;
        let group = (!scripted).then(|| Group::new(seed));
        Ok(Self { env, vms, group })
    }

    /// Runs it; gives what was reached, or the promise that was broken.
    ///
    /// # Errors
    /// The promise.
    pub fn run(mut self) -> Result<Coverage, String> {
        // What a guest does goes through more steps until it is at the target.
        let (least_steps, calmest) = if self.group.is_some() { (1_000, 5) } else { (500, 4) };
        let steps = least_steps + self.env.rng.below(3 * least_steps) * self.vms.len() as u64;
        // One in so many steps is a disturbance.
        let calm = 10 << self.env.rng.below(calmest);
        for _ in 0..steps {
            let index = self.env.any_index(self.vms.len());
            let holding = self.group.as_ref().is_some_and(Group::is_holding);
            let calm = if holding { calm.min(CALM_WHILE_HELD) } else { calm };
            step(&mut self.vms[index], &mut self.env, calm)?;
            if let Some(group) = &mut self.group {
                group.step(&mut self.vms, &mut self.env)?;
            }
            if self.env.rng.one_in(40 * calm) {
                // All VMs of the group are on one host.
                let guest_dies = self.env.rng.one_in(2);
                self.vms.iter_mut().for_each(|vm| vm.kill_source(guest_dies, &mut self.env));
            }
        }
        self.end()?;
        let mut coverage = self.env.coverage;
        for (key, count) in self.vms.iter().flat_map(Vm::faults) {
            *coverage.faults.entry(key).or_default() += count;
        }
        Ok(coverage)
    }

    fn end(&mut self) -> Result<(), String> {
        if let Some(group) = &mut self.group {
            group.settle(&mut self.vms, &mut self.env)?;
        }
        let mut readers = Vec::new();
        for vm in &mut self.vms {
            readers.push(vm.end(&mut self.env)?);
        }
        if let Some(group) = &self.group {
            group.compare(&mut self.vms, &readers, &mut self.env)?;
        }
        for vm in &self.vms {
            vm.flip_a_bit(&mut self.env)?;
        }
        Ok(())
    }
}

fn step(vm: &mut Vm, env: &mut Env, calm: u64) -> Result<(), String> {
    env.pass(STEP_US);
    vm.keep_target_up(env)?;
    vm.keep_source_up(env)?;
    if planted(Bug::OpenedWithoutFence) && env.rng.one_in(4) {
        vm.land_one();
    }
    if env.rng.one_in(calm) {
        disturb(vm, env)?;
    } else {
        match env.rng.below(16) {
            0..4 => vm.source_step(env)?,
            4..7 => vm.ship(env)?,
            7..11 => vm.deliver(env)?,
            _ => {
                let steps = 1 + env.rng.below(10);
                vm.pump(steps, env)?;
            }
        }
    }
    vm.look_after_target(env)
}

/// Something rare.
fn disturb(vm: &mut Vm, env: &mut Env) -> Result<(), String> {
    match env.rng.below(24) {
        0..5 => vm.arm(env),
        5 | 6 => vm.crash_target(env),
        7..9 => vm.cut_streams(env),
        9..11 => vm.fork(env)?,
        11 | 12 => vm.change_something(env),
        13..17 => vm.compare_beside_writer(env)?,
        17 if env.rng.one_in(2) => vm.limit(env),
        17 | 18 => vm.make_room(),
        19 | 20 => vm.turn_pin(env)?,
        21 => {
            env.jump();
            vm.clock_jumped(env);
        }
        _ => vm.reopen_politely(env),
    }
    Ok(())
}
