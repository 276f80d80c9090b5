//! What the worlds of a run came to.

use std::collections::BTreeMap;

/// Something that must be reached now and then, else the simulation proves nothing of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reached {
    /// A checkpoint that all journals hold.
    Offered,
    /// Some journals hold it, others don't.
    RecordedBySome,
    /// A checkpoint that was asked for was made.
    Tagged,
    /// The first VRA wasn't live, and another one coordinated: without a member all that it can do is say which one is missing.
    NextSaidMissing,
    /// Two VRAs had attempts under way at once, and one was in the other's way.
    Collided,
    /// A hold let go at its deadline.
    Expired,
    /// An answer came when its coordinator had given up.
    Late,
    /// Attempts that only held guests up came later and later.
    BackedOff,
    /// A VRA had given up the hold that it was released from.
    NoSuchHold,
    /// A VM wasn't streaming or was in a sync.
    NotReady,
    /// A member's VRA was known to be gone.
    Missing,
    /// VRAs had definitions with other sets of members.
    OtherMemberSet,
    /// A coordinator died with an attempt under way.
    CoordinatorDied,
    /// A VRA died while its VMs were held.
    HeldDied,
    /// A record was lost with the VRA that had it and hadn't sent it.
    RecordLost,
    /// The capture of a VM stopped while it was held.
    Overflowed,
    /// A guest's write was held for a while.
    WriteHeld,
    /// A VRA was too busy to answer.
    Stalled,
    /// VRAs couldn't reach each other.
    Partitioned,
    /// A message came twice.
    Repeated,
}

/// All of them.
const ALL: [Reached; 20] = [
    Reached::Offered,
    Reached::RecordedBySome,
    Reached::Tagged,
    Reached::NextSaidMissing,
    Reached::Collided,
    Reached::Expired,
    Reached::Late,
    Reached::BackedOff,
    Reached::NoSuchHold,
    Reached::NotReady,
    Reached::Missing,
    Reached::OtherMemberSet,
    Reached::CoordinatorDied,
    Reached::HeldDied,
    Reached::RecordLost,
    Reached::Overflowed,
    Reached::WriteHeld,
    Reached::Stalled,
    Reached::Partitioned,
    Reached::Repeated,
];

/// How often what was reached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReachedCount {
    /// By what it is.
    pub counts: BTreeMap<Reached, u64>,
    /// Links of the chain.
    pub links: u64,
    /// Attempts by the clock.
    pub epochs: u64,
}

impl ReachedCount {
    /// Adds another run's.
    pub fn add(&mut self, other: &Self) {
        for (reached, count) in &other.counts {
            *self.counts.entry(*reached).or_default() += count;
        }
        self.links += other.links;
        self.epochs += other.epochs;
    }

    /// What was never reached.
    pub fn missing(&self) -> Vec<Reached> {
        ALL.into_iter().filter(|reached| !self.counts.contains_key(reached)).collect()
    }

    pub(super) fn note(&mut self, reached: Reached) {
        *self.counts.entry(reached).or_default() += 1;
    }
}
