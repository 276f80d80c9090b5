//! A disk after a power cut, made from the log of its writes.
//!
//! [`log::Log`] reads the log that QEMU's `blklogwrites` filter or the kernel's `dm-log-writes` target kept of a disk.
//! [`replay::Replayer`] rebuilds the disk as it may have been when power went at any moment of the log: what a flush
//! or FUA made durable is there, of the writes after the last flush any subset, each whole or torn.
//!
//! `blklogwrites` logs a request when it is submitted, so a flush in the log counts as covering every write logged
//! before it, also one that had not completed yet. A program that issues a flush too early is therefore not caught
//! by this alone.

pub mod log;
pub mod replay;
