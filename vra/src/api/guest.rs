//! Guests' agents, and freezing guests for a checkpoint.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{VmId, VpgId};

/// Says where the agent of a VM's guest is reached, so that the guest can be frozen for a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetGuestAgent {
    /// Which VM: one that has an attached volume here.
    pub vm: VmId,
    /// The unix socket of the QEMU guest agent's channel, an absolute path; none: the guest isn't frozen any more.
    pub socket: Option<PathBuf>,
}

/// Freezes the guests of a VPG's VMs that run here and have an agent, or none of them. They are thawed by [`ThawGuests`], and by themselves
/// after the limit or when the VRA ends, whatever comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FreezeGuests {
    /// Which VPG.
    pub vpg: VpgId,
    /// How long they stay frozen at most, in milliseconds: 2000 to 8000.
    pub limit_ms: u32,
}

/// Thaws the guests of a VPG that were frozen here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThawGuests {
    /// Which VPG.
    pub vpg: VpgId,
}

/// Which guests of a VPG are frozen here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestsFrozen {
    /// Those that are.
    pub frozen: Vec<VmId>,
    /// VMs whose guests have no agent: a checkpoint has them as a power cut would leave them.
    pub without_agent: Vec<VmId>,
}
