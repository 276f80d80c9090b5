//! The table of rig tests.

mod content;
mod crash;
mod durability;
mod judged;
mod machine;
mod protect_guest;
pub(crate) mod ram_disk;
mod replicate;
mod ublk;
mod ublk_edges;
mod ublk_library;

use crate::suite::Case;

/// All cases, in the order in which they run.
pub fn all() -> Vec<Case> {
    [
        machine::CASES,
        ublk::CASES,
        ublk_edges::CASES,
        ublk_library::CASES,
        crash::CASES,
        replicate::CASES,
        protect_guest::CASES,
        durability::CASES,
        judged::CASES,
    ]
    .concat()
}

/// The case of this name, also one that is not in the table because it goes wrong on purpose.
pub fn named(name: &str) -> Option<Case> {
    all().into_iter().chain(judged::WRONG_CASES.iter().copied()).find(|case| case.name == name)
}
