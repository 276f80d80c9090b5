//! Disks that several hosts can reach, of which one at a time writes (E4): a guest that is migrated live finds its disk served at the host
//! that it comes to, before the host that it leaves has let go.
//!
//! Each VRA has the file open. Reads go through at all of them; writes wait behind a gate ([`crate::capture::WriteGate`]) but at the owner,
//! which has the file's lock. A VRA asks for the lock when writes wait at it, by locking the mark beside the file ([`Mark`]). The owner gives
//! it up when somebody asks and no client of its own has written ([`Ownership`] decides).

mod mark;
mod ownership;

pub use mark::{Mark, MarkError};
pub use ownership::{Facts, Ownership, Standing, Step};
