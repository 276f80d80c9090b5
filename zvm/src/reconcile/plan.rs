//! What the reconciler answers: requests to VRAs, and changes of the manager's own state.

use uuid::Uuid;
use vra::api::{ApiError, OpenView, SetSiteKeys, SetTrust, ViewId, VpgDefinition, VpgId, VraId};

use super::world::Leftover;
use crate::model::task::TaskKind;

/// A request to a VRA.
#[derive(Debug, Clone, PartialEq)]
pub struct Action {
    /// To whom.
    pub vra: VraId,
    /// What.
    pub kind: ActionKind,
}

/// What a VRA is asked to do.
#[derive(Debug, Clone, PartialEq)]
pub enum ActionKind {
    /// Take the list of revoked certificates.
    SetTrust {
        /// The list.
        trust: SetTrust,
        /// The run of the VRA that takes it (its start time).
        run_us: u64,
    },
    /// Take the keys for encrypted journals.
    SetSiteKeys(SetSiteKeys),
    /// Say whether it would take a group's definition.
    CheckVpg(VpgDefinition),
    /// Take a group's definition.
    ApplyVpg(VpgDefinition),
    /// End a group.
    RemoveVpg {
        /// Which one.
        vpg: VpgId,
        /// Leave its files.
        keep_files: bool,
    },
    /// Open a test's view.
    OpenView {
        /// The test.
        test: Uuid,
        /// The view; its id is set.
        open: OpenView,
    },
    /// Close a view.
    CloseView {
        /// Which one.
        view: ViewId,
    },
}

/// How an action ended.
#[derive(Debug, Clone, PartialEq)]
pub enum ActionOutcome {
    /// It was done.
    Done,
    /// The VRA answered that it won't.
    Refused(ApiError),
    /// No answer.
    Unreachable(String),
}

/// A change of the manager's own state that follows from what was seen or done.
#[derive(Debug, Clone, PartialEq)]
pub enum Transition {
    /// All VRAs of a group have a revision.
    VpgApplied {
        /// The group.
        vpg: VpgId,
        /// The revision.
        revision: u64,
    },
    /// A VRA refused a group's definition.
    VpgRefused {
        /// The group.
        vpg: VpgId,
        /// The revision that was refused.
        revision: u64,
        /// Who refused.
        vra: VraId,
        /// Why.
        error: ApiError,
    },
    /// No VRA has a part in a deleted group any more.
    VpgRemoved {
        /// The group.
        vpg: VpgId,
        /// What could not be reached.
        leftovers: Vec<Leftover>,
    },
    /// A VRA that came back has let go of a group that was deleted by force.
    LeftoverGone {
        /// The group.
        vpg: VpgId,
        /// The VRA.
        vra: VraId,
    },
    /// All views of a test are open.
    TestRunning {
        /// The test.
        test: Uuid,
    },
    /// A view of a starting test cannot be opened: it must be rolled back.
    TestFailed {
        /// The test.
        test: Uuid,
        /// Where.
        vra: VraId,
        /// Why.
        error: ApiError,
    },
    /// All views of a stopping test are closed.
    TestStopped {
        /// The test.
        test: Uuid,
    },
}

/// How far a group's open task is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// The group.
    pub vpg: VpgId,
    /// Which of its tasks.
    pub kind: TaskKind,
    /// 0 to 100.
    pub percent: u8,
    /// What it waits for.
    pub step: String,
}

/// What follows from one look at the world.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Plan {
    /// To be sent now, each on its own.
    pub actions: Vec<Action>,
    /// To be noted now.
    pub transitions: Vec<Transition>,
    /// To be shown.
    pub progress: Vec<Progress>,
}

/// What an action is about: there is one of each at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Subject {
    /// The list of revoked certificates.
    Trust,
    /// The keys for encrypted journals.
    SiteKeys,
    /// Whether a group's definition would be taken.
    Check(VpgId),
    /// A group's definition.
    Apply(VpgId),
    /// A group's end.
    Remove(VpgId),
    /// A view's opening.
    Open(ViewId),
    /// A view's closing.
    Close(ViewId),
}

/// An action that failed and will be tried again.
#[derive(Debug, Clone, PartialEq)]
pub struct Failure {
    /// How often in a row.
    pub count: u32,
    /// The last reason.
    pub outcome: ActionOutcome,
    /// Not before this time, microseconds.
    pub(super) next_us: u64,
}

impl ActionKind {
    /// What the action is about.
    pub fn subject(&self) -> Subject {
        match self {
            Self::SetTrust { .. } => Subject::Trust,
            Self::SetSiteKeys(_) => Subject::SiteKeys,
            Self::CheckVpg(definition) => Subject::Check(definition.id),
            Self::ApplyVpg(definition) => Subject::Apply(definition.id),
            Self::RemoveVpg { vpg, .. } => Subject::Remove(*vpg),
            Self::OpenView { open, .. } => Subject::Open(open.view.unwrap_or(ViewId(Uuid::nil()))),
            Self::CloseView { view } => Subject::Close(*view),
        }
    }
}
