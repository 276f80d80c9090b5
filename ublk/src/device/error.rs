//! What can go wrong in a device's life.

use std::io;
use std::path::PathBuf;

use crate::control::ControlError;
use crate::params::GeometryError;
use crate::reactor::ReactorError;

/// Why a device's life took no good turn.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A command failed.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// No reactor thread took a queue.
    #[error("cannot serve ublk device {device}")]
    Reactor {
        /// The device.
        device: u32,
        /// Why.
        source: ReactorError,
    },
    /// The disk's shape does not fit.
    #[error("cannot make a ublk device of this disk")]
    Geometry {
        /// Why.
        source: GeometryError,
    },
    /// Settings that the driver cannot take.
    #[error("{queues} queues of depth {depth} cannot be: both must be positive, the depth at most 4096")]
    Settings {
        /// Queues asked for.
        queues: u16,
        /// Depth asked for.
        depth: u16,
    },
    /// Not enough slots.
    #[error(
        "ublk device {device} needs {needed} buffers of {needed_bytes} bytes, the arena has {free} free ones of \
         {slot_bytes} bytes: make the arena larger, or the device's queues or depth smaller"
    )]
    Arena {
        /// The device.
        device: u32,
        /// Queues times depth.
        needed: usize,
        /// Longest request of the device.
        needed_bytes: u32,
        /// What the arena has.
        free: usize,
        /// Length of its slots.
        slot_bytes: usize,
    },
    /// `/dev/ublkcN` could not be opened.
    #[error("cannot open {}: is devtmpfs mounted at /dev, and does no other process serve the device?", path.display())]
    Open {
        /// The path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// There is no such device.
    #[error("there is no ublk device {device}: see `vra-ublk list`")]
    Missing {
        /// Its number.
        device: u32,
    },
    /// Recovery of a device whose daemon lives.
    #[error("ublk device {device} is served by process {pid}: end that process first")]
    Served {
        /// The device.
        device: u32,
        /// Its daemon.
        pid: i32,
    },
    /// Requests that don't end while a device is let go.
    #[error(
        "requests of ublk device {device} have not ended within {waited_ms} ms: does its disk answer? A successor gets \
         them again"
    )]
    Busy {
        /// The device.
        device: u32,
        /// How long was waited, in milliseconds.
        waited_ms: u64,
    },
    /// A device that can't be made larger.
    #[error(
        "ublk device {device} can't be made larger while it is there (it was made on a kernel before 6.16, or by an older release): it stays \
         at {former_bytes} bytes of {size_bytes} until its volume is attached anew"
    )]
    CannotGrow {
        /// The device.
        device: u32,
        /// What it has, in bytes.
        former_bytes: u64,
        /// What its disk has, in bytes.
        size_bytes: u64,
    },
    /// Recovery with a disk that is not what the device was made for.
    #[error("ublk device {device} cannot be recovered with this disk: {difference}")]
    Changed {
        /// The device.
        device: u32,
        /// What changed, with both values.
        difference: String,
    },
    /// A mounted or otherwise claimed device is not taken away.
    #[error("{} is in use (mounted, or part of another device): unmount it first, or force", path.display())]
    InUse {
        /// `/dev/ublkbN`.
        path: PathBuf,
    },
    /// The driver refused to hand out requests.
    #[error("the ublk driver refused the queues of device {device}: see dmesg")]
    Fault {
        /// The device.
        device: u32,
        /// What the driver said.
        source: io::Error,
    },
    /// Queues did not end.
    #[error("the queues of ublk device {device} have not ended within {waited_s} s of being told: see dmesg")]
    QueuesRemain {
        /// The device.
        device: u32,
        /// How long was waited.
        waited_s: u64,
    },
    /// Deleted, but somebody holds it open.
    #[error(
        "ublk device {device} is deleted but still held open: close /dev/ublkb{device} and /dev/ublkc{device} \
         (`fuser -v` names the holders); its number is free after that"
    )]
    HeldOpen {
        /// The device.
        device: u32,
    },
}
