//! The rig: real kernels with ublk anywhere, the tests that need them, foreign peers and the power-cut replayer.
//!
//! See `docs/rig.md` for how it works and how to add a test.

pub mod apt;
pub mod bench;
pub mod cache;
pub mod cases;
pub mod counting_guest;
pub mod cpio;
pub mod demo;
pub mod durability;
pub mod error;
pub mod guest_agent;
pub mod hypervisor;
pub mod initramfs;
pub mod interrupt;
pub mod journal_curve;
pub mod kernel;
pub mod machine;
pub mod mode;
pub mod powercut;
pub mod qemu;
pub mod relay;
pub mod runs;
pub mod sample_journal;
pub mod sim;
pub mod site;
pub mod suite;
pub mod tool;
