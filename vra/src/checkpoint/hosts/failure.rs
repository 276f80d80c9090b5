use thiserror::Error;

use crate::api::{VmId, VraId};
use crate::wire::DeclineCode;

/// Why an attempt at a checkpoint of several hosts gave none.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum EpochFailure {
    /// A member's VRA isn't live: nothing is even tried (D3).
    #[error("VRA {vra} doesn't answer")]
    Missing {
        /// Which VRA.
        vra: VraId,
    },
    /// A VRA hadn't answered when the first holds expired.
    #[error("VRA {vra} didn't answer within {} ms", deadline_us / 1000)]
    Late {
        /// Which VRA.
        vra: VraId,
        /// How long it was waited for, in µs.
        deadline_us: u64,
    },
    /// A VRA said no.
    #[error("VRA {vra} can't take part{}: {code}", of_vm(*vm))]
    Declined {
        /// Which VRA.
        vra: VraId,
        /// The VM that is in the way, if it is one.
        vm: Option<VmId>,
        /// Why.
        code: DeclineCode,
    },
    /// A VRA holds other VMs than the coordinator's definition gives it.
    #[error("VRA {vra} holds other VMs than the definition gives it")]
    OtherVms {
        /// Which VRA.
        vra: VraId,
    },
    /// A VRA was held and wrote no record.
    #[error("VRA {vra} wrote no record: {code}")]
    NotRecorded {
        /// Which VRA.
        vra: VraId,
        /// Why.
        code: DeclineCode,
    },
    /// A VRA was released and hasn't said what became of its records. They may be there all the same.
    #[error("VRA {vra} hasn't said whether its records are written")]
    Unconfirmed {
        /// Which VRA.
        vra: VraId,
    },
    /// The group isn't here, or its definition changed meanwhile.
    #[error("the group's definition is gone or has changed")]
    Changed,
    /// Too many checkpoints wait to be taken.
    #[error("too many checkpoints of the group wait to be taken")]
    TooMany,
}

impl EpochFailure {
    /// Whether another attempt was in the way: trying again soon may do.
    pub(super) fn is_collision(&self) -> bool {
        matches!(self, Self::Declined { code: DeclineCode::Busy, .. })
    }
}

fn of_vm(vm: Option<VmId>) -> String {
    vm.map_or_else(String::new, |vm| format!(" with VM {vm}"))
}
