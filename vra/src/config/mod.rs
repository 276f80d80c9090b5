//! Configuration and persistent state.

mod store;

pub use store::{Store, StoreError, write_atomic};
