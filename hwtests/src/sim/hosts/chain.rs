//! An application over VMs of several hosts: each write is submitted after the acknowledgement of the one before.

use super::super::env::Env;

/// Longest time between an acknowledgement and the write that depends on it, in µs.
const THINK_US: u64 = 3_000;

#[derive(Default)]
pub(super) struct Chain {
    /// On which VM each link is; links are numbered from 1.
    links: Vec<usize>,
    /// When the next link is submitted; none while the last isn't acknowledged.
    next_us: Option<u64>,
}

impl Chain {
    pub(super) fn new() -> Self {
        Self { links: Vec::new(), next_us: Some(0) }
    }

    /// The next link, if it is submitted now: its number and its VM.
    pub(super) fn next(&mut self, vm_count: usize, env: &mut Env) -> Option<(u64, usize)> {
        self.next_us.take_if(|at_us| *at_us <= env.now().mono_us)?;
        let vm = env.any_index(vm_count);
        self.links.push(vm);
        Some((self.links.len() as u64, vm))
    }

    /// A link was acknowledged. One that was asked again may be so twice.
    pub(super) fn acknowledged(&mut self, link: u64, env: &mut Env) {
        if link == self.links.len() as u64 && self.next_us.is_none() {
            self.next_us = Some(env.now().mono_us + env.rng.below(THINK_US));
        }
    }

    pub(super) fn len(&self) -> u64 {
        self.links.len() as u64
    }

    /// Whether what VMs show is a beginning of the chain; `has` says whether a VM shows one of its links. Gives the newest link.
    pub(super) fn check(&self, has: impl Fn(usize, u64) -> bool) -> Result<u64, String> {
        let shown = |(link, vm): (u64, &usize)| has(*vm, link);
        let numbered = || (1..).zip(&self.links);
        let newest = numbered().filter(|at| shown(*at)).map(|(link, _)| link).last().unwrap_or_default();
        match numbered().take(newest as usize).find(|at| !shown(*at)) {
            Some((link, vm)) => Err(format!("link {newest} is there, link {link} of VM {vm} isn't")),
            None => Ok(newest),
        }
    }
}
