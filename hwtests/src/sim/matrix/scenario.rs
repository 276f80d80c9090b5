//! Short scripted runs, each through some of the journal's operations: together through all of them.

use journal::crypt::Encryption;
use journal::promotion::TransferSizes;
use journal::writer::Limits;
use vra::receive::ReceiverPolicy;

use super::super::shape::SiteShape;

pub(super) struct Scenario {
    pub(super) name: &'static str,
    /// Slots that the journal may have.
    max_slots: u32,
    /// The recovery disks' space stays reserved.
    reserved: bool,
    /// A sync that has no room takes the place of the history.
    gives_up_history: bool,
    pub(super) steps: &'static [Step],
}

/// One thing that happens.
#[derive(Clone, Copy, Debug)]
pub(super) enum Step {
    /// The journal and the recovery disks are made.
    Create,
    /// From here on there are crashes; before, the other scenarios have them.
    Watch,
    /// So many writes of the guest.
    Write(usize),
    /// So many ranges are zeroed.
    Zeroes(usize),
    /// A cut, and its record right behind it.
    Checkpoint,
    /// The sync that is under way goes to its end.
    Sync,
    /// All that was published is durable, and the target has nothing to do.
    Settle,
    Seal,
    Manifest,
    /// Segments from now on have a new key.
    NewKey,
    /// Segments from now on are plain.
    NoKey,
    /// What is in closed segments becomes older than the history.
    Age,
    /// Nothing comes for so long that space is given back.
    Quiet,
    /// The source lost what it retained, and syncs its disks again.
    NewGeneration,
    /// The process ends, and the next one opens the journal.
    Restart,
    /// A bit of a payload flips.
    Damage,
    /// The limit is another one.
    MaxSlots(u32),
}

/// How old history becomes, in microseconds: longer than a scenario takes but for [`Step::Age`].
pub(super) const HISTORY_US: u64 = 1_000_000;

impl Scenario {
    pub(super) fn shape(&self) -> SiteShape {
        let policy = ReceiverPolicy {
            // Groups so short that one is written while the one before is synced.
            limits: Limits { max_slots: self.max_slots, min_slots: 0, grow_slots: 1, group_bytes: 8 << 10 },
            history_us: HISTORY_US,
            promotion: TransferSizes { run_max_bytes: 8 << 10, punch_min_bytes: 1024, chunk_bytes: 16 << 10 },
            give_up_history: self.gives_up_history,
            window_bytes: 1 << 20,
        };
        SiteShape { policy, encryption: Encryption::Never, reserved: self.reserved }
    }
}

use Step::*;

const DEFAULT: Scenario =
    Scenario { name: "", max_slots: 12, reserved: false, gives_up_history: false, steps: &[] };

pub(super) const ALL: [Scenario; 10] = [
    Scenario {
        name: "first-sync",
        steps: &[Watch, Create, Write(2), Settle, Sync, Checkpoint, Settle, Write(2), Settle],
        ..DEFAULT
    },
    Scenario {
        name: "append",
        steps: &[
            Create,
            Sync,
            Settle,
            Watch,
            Write(4),
            Checkpoint,
            Settle,
            Seal,
            Settle,
            Manifest,
            Write(12),
            Checkpoint,
            Settle,
            Manifest,
            Settle,
        ],
        ..DEFAULT
    },
    Scenario {
        name: "restart",
        steps: &[
            Create,
            Sync,
            Write(4),
            Checkpoint,
            Settle,
            Watch,
            Restart,
            Write(2),
            Settle,
            Restart,
            Restart,
            Write(3),
            Checkpoint,
            Settle,
            Seal,
            Settle,
            Restart,
            Settle,
        ],
        ..DEFAULT
    },
    Scenario {
        name: "promotion",
        reserved: true,
        steps: &[
            Create,
            Sync,
            Write(6),
            Zeroes(40),
            Write(3),
            Settle,
            Seal,
            Settle,
            Write(3),
            Zeroes(20),
            Settle,
            Seal,
            Write(2),
            Checkpoint,
            Settle,
            Watch,
            Age,
            Settle,
            Write(2),
            Checkpoint,
            Settle,
            Seal,
            Write(2),
            Checkpoint,
            Settle,
            Age,
            Settle,
        ],
        ..DEFAULT
    },
    Scenario {
        name: "bad-list",
        steps: &[
            Create,
            Sync,
            Write(8),
            Checkpoint,
            Settle,
            Seal,
            Settle,
            Damage,
            Write(2),
            Checkpoint,
            Settle,
            Watch,
            Age,
            Settle,
            Write(8),
            Checkpoint,
            Settle,
            Seal,
            Write(2),
            Checkpoint,
            Settle,
            Age,
            Settle,
        ],
        ..DEFAULT
    },
    Scenario {
        name: "grow-and-shrink",
        steps: &[
            Create,
            Sync,
            Settle,
            Watch,
            Write(2),
            Settle,
            Seal,
            Settle,
            Write(2),
            Settle,
            Seal,
            Settle,
            Write(2),
            Settle,
            Seal,
            Settle,
            Write(2),
            Settle,
            Seal,
            Settle,
            Write(2),
            Checkpoint,
            Settle,
            Age,
            Settle,
            Quiet,
            Settle,
            Write(2),
            Settle,
            Seal,
            Settle,
            Write(2),
            Settle,
            Seal,
            Settle,
            Write(2),
            Settle,
            Seal,
            Settle,
            Write(2),
            Checkpoint,
            Settle,
            Seal,
            Settle,
            Write(1),
            Settle,
        ],
        ..DEFAULT
    },
    Scenario {
        // What is promoted makes room for what waits.
        name: "full",
        max_slots: 5,
        steps: &[
            Create,
            Sync,
            Checkpoint,
            Settle,
            Watch,
            Write(8),
            Checkpoint,
            Write(8),
            Checkpoint,
            Write(8),
            Checkpoint,
            Write(8),
            Checkpoint,
            Write(8),
            Checkpoint,
            Write(8),
            Checkpoint,
            Write(8),
            Checkpoint,
            Write(8),
            Checkpoint,
            Write(8),
            Checkpoint,
            Write(8),
            Checkpoint,
            Write(8),
            Checkpoint,
            Write(8),
            Checkpoint,
            Write(8),
            Settle,
        ],
        ..DEFAULT
    },
    Scenario {
        name: "give-up",
        max_slots: 4,
        gives_up_history: true,
        steps: &[
            Create,
            Sync,
            Write(2),
            Checkpoint,
            Settle,
            Seal,
            Settle,
            Write(1),
            Settle,
            // Nobody knows then which free slots have their space.
            Restart,
            Settle,
            Watch,
            MaxSlots(3),
            NewGeneration,
            Settle,
            Sync,
            Checkpoint,
            Settle,
            Restart,
            Settle,
        ],
        ..DEFAULT
    },
    Scenario {
        name: "keys",
        reserved: true,
        steps: &[
            Create,
            Sync,
            Settle,
            Watch,
            NewKey,
            Write(2),
            Checkpoint,
            Settle,
            NewKey,
            Seal,
            Settle,
            Write(2),
            Settle,
            Restart,
            Write(2),
            Checkpoint,
            Settle,
            Seal,
            Settle,
            NoKey,
            Write(2),
            Checkpoint,
            Settle,
            Age,
            Settle,
        ],
        ..DEFAULT
    },
    Scenario {
        name: "new-generation",
        steps: &[
            Create,
            Sync,
            Write(3),
            Checkpoint,
            Settle,
            Watch,
            NewGeneration,
            Settle,
            Checkpoint,
            Sync,
            Settle,
            Write(1),
            Checkpoint,
            Settle,
        ],
        ..DEFAULT
    },
];
