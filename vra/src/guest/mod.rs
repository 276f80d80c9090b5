//! Guests that are frozen for a checkpoint, so that their filesystems are clean in it, and that are thawed again whatever happens (D5).
//!
//! A guest's agent has no time-out of its own. So a guest that is about to be frozen is noted on disk first ([`frozen`]), and another process
//! ([`guard`]) thaws it when this one dies or takes too long; a VRA that starts thaws those that are still noted.

mod agent;
mod frozen;
mod guard;

pub use agent::{AgentError, GuestAgent};
pub use frozen::{FrozenGuest, FrozenGuests};
pub use guard::{Guard, LONGEST_FREEZE, run as run_guard};
