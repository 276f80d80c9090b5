//! What is between VRAs.

use std::collections::BTreeMap;

use vra::wire::{Frame, GroupMessage};

use super::super::env::Env;
use super::reached::{Reached, ReachedCount};
use super::shape::Shape;

/// How long a stale message takes at most, in µs.
const STALE_US: u64 = 600_000;

#[derive(Default)]
pub(super) struct Network {
    /// By when they arrive and a count: sender, receiver, bytes.
    on_the_way: BTreeMap<(u64, u64), (usize, usize, Vec<u8>)>,
    sent: u64,
    /// Pairs that can't reach each other, until when.
    cut: BTreeMap<(usize, usize), u64>,
}

impl Network {
    pub(super) fn send(
        &mut self,
        (from, to): (usize, usize),
        message: &GroupMessage,
        shape: &Shape,
        env: &mut Env,
        reached: &mut ReachedCount,
    ) {
        let now_us = env.now().mono_us;
        let is_cut = self.cut.get(&(from, to)).is_some_and(|until_us| now_us < *until_us);
        let mut happens = |one_in: u64| one_in > 0 && env.rng.one_in(one_in);
        if is_cut || happens(shape.lost_one_in) {
            return;
        }
        let bytes = message.encode();
        let mut copies = 1;
        if happens(shape.repeated_one_in) {
            reached.note(Reached::Repeated);
            copies = 2;
        }
        for _ in 0..copies {
            let is_stale = shape.stale_one_in > 0 && env.rng.one_in(shape.stale_one_in);
            let most_us = if is_stale { STALE_US } else { shape.delay_us };
            self.sent += 1;
            let due = (now_us + env.rng.below(most_us), self.sent);
            self.on_the_way.insert(due, (from, to, bytes.clone()));
        }
    }

    /// What arrives now.
    pub(super) fn arrived(&mut self, env: &Env) -> Result<Option<(usize, usize, GroupMessage)>, String> {
        let now_us = env.now().mono_us;
        let Some(first) = self.on_the_way.first_entry().filter(|first| first.key().0 <= now_us) else {
            return Ok(None);
        };
        let (from, to, bytes) = first.remove();
        match Frame::parse(&bytes) {
            Ok(Frame::Group(message)) => Ok(Some((from, to, message))),
            other => Err(format!("a message was read as {other:?}")),
        }
    }

    /// Its receiver is busy until then.
    pub(super) fn put_off(&mut self, (from, to): (usize, usize), message: &GroupMessage, until_us: u64) {
        self.sent += 1;
        self.on_the_way.insert((until_us, self.sent), (from, to, message.encode()));
    }

    /// Two VRAs don't reach each other for a while, in both directions or in one.
    pub(super) fn cut(&mut self, (one, other): (usize, usize), for_us: u64, both: bool, env: &Env) {
        let until_us = env.now().mono_us + for_us;
        self.cut.insert((one, other), until_us);
        if both {
            self.cut.insert((other, one), until_us);
        }
    }
}
