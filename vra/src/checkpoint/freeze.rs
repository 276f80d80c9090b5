use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Whether a VM's guest is frozen now, as whoever freezes it knows: a checkpoint that says so must have been taken while it was.
#[derive(Clone, Debug, Default)]
pub struct Freeze(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    has_agent: bool,
    /// Counts freezes.
    number: u64,
    /// Until when the guest is frozen for certain.
    until: Option<Instant>,
}

/// What was so at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FreezeMark {
    number: u64,
    is_quiet: bool,
}

impl Freeze {
    /// The guest has an agent that can freeze it, or not: then nothing is asked of it.
    pub fn set_agent(&self, has_agent: bool) {
        self.lock().has_agent = has_agent;
    }

    /// The guest is frozen, and stays so until then.
    pub fn begin(&self, until: Instant) {
        let mut state = self.lock();
        state.number += 1;
        state.until = Some(until);
    }

    /// The guest is going to be thawed.
    pub fn end(&self) {
        self.lock().until = None;
    }

    /// How it is at this moment.
    pub(super) fn mark(&self, now: Instant) -> FreezeMark {
        let state = self.lock();
        let is_frozen = state.until.is_some_and(|until| now < until);
        FreezeMark { number: state.number, is_quiet: is_frozen || !state.has_agent }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl FreezeMark {
    /// Whether the guest was frozen from this moment to that of a later mark, or has no agent.
    pub(super) fn lasts_until(self, later: Self) -> bool {
        self == later && self.is_quiet
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn only_one_freeze_that_lasts_counts() {
        let (freeze, now) = (Freeze::default(), Instant::now());
        let at = |after_ms| now + Duration::from_millis(after_ms);
        assert!(freeze.mark(now).lasts_until(freeze.mark(at(1))), "without an agent nothing is asked");
        freeze.set_agent(true);
        assert!(!freeze.mark(now).lasts_until(freeze.mark(at(1))));
        freeze.begin(at(100));
        let held = freeze.mark(now);
        assert!(held.lasts_until(freeze.mark(at(99))));
        assert!(!held.lasts_until(freeze.mark(at(100))), "its time is over");
        freeze.end();
        assert!(!held.lasts_until(freeze.mark(at(1))), "it was thawed");
        freeze.begin(at(100));
        assert!(!held.lasts_until(freeze.mark(at(1))), "it was thawed in between");
    }
}
