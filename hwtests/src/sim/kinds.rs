//! All kinds of operations that a target's storage meets, besides readers', and which faults can meet each.

use journal::storage::Purpose;
use journal::storage::sim::{Fault, OpKind};

use super::env::Env;

/// All of them.
pub(super) static OP_KINDS: [OpKind; 38] = [
    (Purpose::Survey, "read"),
    (Purpose::Create, "allocate"),
    (Purpose::Create, "fdatasync"),
    (Purpose::Create, "write"),
    (Purpose::Carry, "fdatasync"),
    (Purpose::Carry, "read"),
    (Purpose::Carry, "write"),
    (Purpose::Append, "fdatasync"),
    (Purpose::Append, "write"),
    (Purpose::Seal, "fdatasync"),
    (Purpose::Seal, "punch"),
    (Purpose::Seal, "write"),
    (Purpose::Superblock, "fdatasync"),
    (Purpose::Superblock, "write"),
    (Purpose::SuperblockMirror, "fdatasync"),
    (Purpose::SuperblockMirror, "write"),
    (Purpose::Manifest, "fdatasync"),
    (Purpose::Manifest, "write"),
    (Purpose::BadList, "fdatasync"),
    (Purpose::BadList, "write"),
    (Purpose::Grow, "allocate"),
    (Purpose::Grow, "fdatasync"),
    (Purpose::Shrink, "punch"),
    (Purpose::Shrink, "truncate"),
    (Purpose::Reserve, "allocate"),
    (Purpose::Reserve, "fdatasync"),
    (Purpose::Intent, "write"),
    (Purpose::PromotionRead, "read"),
    (Purpose::Promotion, "allocate"),
    (Purpose::Promotion, "fdatasync"),
    (Purpose::Promotion, "punch"),
    (Purpose::Promotion, "read"),
    (Purpose::Promotion, "write"),
    (Purpose::RecoveryDisk, "allocate"),
    (Purpose::RecoveryDisk, "fdatasync"),
    (Purpose::RecoveryDisk, "punch"),
    (Purpose::RecoveryDisk, "read"),
    (Purpose::RecoveryDisk, "write"),
];

/// Which faults can meet operations of a kind.
pub(super) fn possible_faults(kind: OpKind) -> Vec<Fault> {
    let (purpose, verb) = kind;
    let mut faults = vec![Fault::Kill, Fault::PowerCut];
    faults.push(if verb == "fdatasync" { Fault::FailedSync } else { Fault::Error });
    if ["write", "punch"].contains(&verb) {
        faults.extend([Fault::TornWrite, Fault::LostWrite, Fault::KeptWrite]);
    }
    if verb == "write" {
        faults.push(Fault::LateLanding);
    }
    // What is written to a journal has its space.
    let takes_space = ["write", "allocate"].contains(&verb);
    if verb == "allocate" || takes_space && [Purpose::RecoveryDisk, Purpose::Promotion].contains(&purpose) {
        faults.push(Fault::NoSpace);
    }
    faults
}

/// Those that hardly come about, the rarest first.
pub(super) static RARE_KINDS: [OpKind; 8] = [
    (Purpose::Shrink, "punch"),
    (Purpose::Promotion, "allocate"),
    (Purpose::Shrink, "truncate"),
    (Purpose::Promotion, "punch"),
    (Purpose::Seal, "fdatasync"),
    (Purpose::Seal, "punch"),
    (Purpose::RecoveryDisk, "allocate"),
    (Purpose::Grow, "allocate"),
];

/// How many of them are rarer still.
pub(super) const RAREST: usize = 2;

/// What an opening does.
static OPENING_KINDS: [OpKind; 6] = [
    (Purpose::Survey, "read"),
    (Purpose::Carry, "read"),
    (Purpose::Carry, "write"),
    (Purpose::Carry, "fdatasync"),
    (Purpose::Superblock, "write"),
    (Purpose::Superblock, "fdatasync"),
];

/// What a promotion does.
static PROMOTION_KINDS: [OpKind; 5] = [
    (Purpose::Intent, "write"),
    (Purpose::PromotionRead, "read"),
    (Purpose::Promotion, "read"),
    (Purpose::Promotion, "write"),
    (Purpose::Promotion, "fdatasync"),
];

/// A kind of operation, those of promotions more often than others.
pub(super) fn any_kind(env: &mut Env) -> &'static [OpKind] {
    let all = if env.rng.one_in(3) { &PROMOTION_KINDS[..] } else { &OP_KINDS[..] };
    std::slice::from_ref(&all[env.any_index(all.len())])
}

/// A kind of operation that an opening does.
pub(super) fn any_kind_of_openings(env: &mut Env) -> &'static [OpKind] {
    std::slice::from_ref(&OPENING_KINDS[env.any_index(OPENING_KINDS.len())])
}
