use std::fmt;

/// Why a source VRA doesn't hold its VMs of a group, or wrote no records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DeclineCode {
    /// 1: it has no such group, or not with the asking VRA.
    UnknownGroup,
    /// 2: its definition has another set of members.
    MemberSet,
    /// 3: a VM isn't protected now: volumes are missing.
    NotProtected,
    /// 4: a VM isn't streaming.
    NotStreaming,
    /// 5: a VM is in a sync.
    InSync,
    /// 6: another attempt holds them.
    Busy,
    /// 7: it has given up or replaced the hold that a release names.
    NoSuchHold,
    /// 8: the hold expired before the release.
    Expired,
    /// 9: a record couldn't be published.
    NotPublished,
    /// 10: a guest isn't frozen, for a checkpoint that says so.
    NotFrozen,
    /// Any other, of a newer version.
    Other(u16),
}

impl DeclineCode {
    /// The number on the wire.
    pub fn code(self) -> u16 {
        match self {
            Self::UnknownGroup => 1,
            Self::MemberSet => 2,
            Self::NotProtected => 3,
            Self::NotStreaming => 4,
            Self::InSync => 5,
            Self::Busy => 6,
            Self::NoSuchHold => 7,
            Self::Expired => 8,
            Self::NotPublished => 9,
            Self::NotFrozen => 10,
            Self::Other(code) => code,
        }
    }

    /// The reason behind a number on the wire.
    pub fn from_code(code: u16) -> Self {
        match code {
            1 => Self::UnknownGroup,
            2 => Self::MemberSet,
            3 => Self::NotProtected,
            4 => Self::NotStreaming,
            5 => Self::InSync,
            6 => Self::Busy,
            7 => Self::NoSuchHold,
            8 => Self::Expired,
            9 => Self::NotPublished,
            10 => Self::NotFrozen,
            other => Self::Other(other),
        }
    }
}

impl fmt::Display for DeclineCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownGroup => f.write_str("it doesn't have the group's definition"),
            Self::MemberSet => f.write_str("its definition has another set of members"),
            Self::NotProtected => f.write_str("volumes are not attached"),
            Self::NotStreaming => f.write_str("not streaming"),
            Self::InSync => f.write_str("in a sync"),
            Self::Busy => f.write_str("another checkpoint holds it"),
            Self::NoSuchHold => f.write_str("it had given up the hold"),
            Self::Expired => f.write_str("the hold expired before the release came"),
            Self::NotPublished => f.write_str("capture stopped during the hold"),
            Self::NotFrozen => f.write_str("a guest isn't frozen"),
            Self::Other(code) => write!(f, "reason {code} of a newer version"),
        }
    }
}
