//! One step of the writer: operations in phases, each begun when the one before has ended.

use std::collections::VecDeque;

use crate::format::{ChainPoint, Superblock};
use crate::storage::{Op, Purpose};

use super::change::AfterChange;

/// What a step brings about when all its phases have ended well.
#[derive(Debug)]
pub(super) enum Effect {
    None,
    /// A slot has its space.
    Reserved(u32),
    Durable(ChainPoint),
    Superblock {
        superblock: Box<Superblock>,
        then: AfterChange,
    },
}

#[derive(Debug)]
pub(super) struct Step {
    phases: VecDeque<VecDeque<(Purpose, Op)>>,
    under_way: usize,
    effect: Effect,
    growing: bool,
    /// The operation given out last is a sync.
    syncing: bool,
}

impl Step {
    pub(super) fn new(phases: Vec<Vec<(Purpose, Op)>>, effect: Effect) -> Self {
        let phases: VecDeque<VecDeque<_>> =
            phases.into_iter().filter(|phase| !phase.is_empty()).map(VecDeque::from).collect();
        Self { phases, under_way: 0, effect, growing: false, syncing: false }
    }

    /// Adds operations after all others.
    pub(super) fn push_phase(&mut self, ops: Vec<(Purpose, Op)>) {
        if !ops.is_empty() {
            self.phases.push_back(ops.into());
        }
    }

    /// Begins with an allocation, whose failing for lack of space is no failure of the file.
    pub(super) fn growing(mut self) -> Self {
        self.growing = true;
        self
    }

    /// Whether the operation under way may fail for lack of space.
    pub(super) fn is_growing(&self) -> bool {
        self.growing
    }

    pub(super) fn next_op(&mut self) -> Option<(Purpose, Op)> {
        let op = self.phases.front_mut()?.pop_front()?;
        self.under_way += 1;
        self.syncing = matches!(op.1, Op::Sync);
        Some(op)
    }

    /// Whether nothing is left of a group of batches but the sync under way.
    pub(super) fn is_last_sync_of_group(&self) -> bool {
        let is_group = matches!(self.effect, Effect::Durable(_));
        is_group && self.syncing && self.phases.iter().all(VecDeque::is_empty)
    }

    /// The next operation of the first phase only: the others wait for [`Self::next_op`].
    pub(super) fn next_op_of_writes(&mut self) -> Option<(Purpose, Op)> {
        let first_is_writes = self.phases.front()?.iter().all(|(_, op)| !matches!(op, Op::Sync));
        if first_is_writes { self.next_op() } else { None }
    }

    /// Counts the end of an operation; says whether the whole step has ended.
    pub(super) fn op_done(&mut self) -> bool {
        self.under_way -= 1;
        if self.under_way > 0 || self.phases.front().is_some_and(|phase| !phase.is_empty()) {
            return false;
        }
        self.phases.pop_front();
        self.growing = false;
        self.phases.is_empty()
    }

    pub(super) fn into_effect(self) -> Effect {
        self.effect
    }
}
