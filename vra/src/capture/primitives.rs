//! The locks and atomics of the core, named in one place so that its files also compile against shuttle's for the
//! interleaving tests.

pub(super) use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
pub(super) use std::sync::{Mutex, MutexGuard};
