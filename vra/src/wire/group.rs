use journal::batch::{CheckpointKind, Epoch};
use uuid::Uuid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::WireError;
use super::decline::DeclineCode;
use super::frame::{FRAME_HEADER_BYTES, FrameKind, Header, fixed_body};
use crate::api::volume::{MAX_NAME_BYTES, is_text};
use crate::api::vpg::MAX_VMS_PER_VPG;
use crate::api::{VmId, VpgId};

/// What the source VRAs of a VPG say to each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GroupMessage {
    /// The sender lives.
    Alive,
    /// Coordinator: hold the group's VMs.
    Hold(Hold),
    /// They are held.
    Held(Held),
    /// They can't be.
    Decline(Decline),
    /// Coordinator: all are held, write the records and let completions go.
    Release(Release),
    /// Coordinator: let completions go, without records.
    Abort(GroupEpoch),
    /// What became of the records.
    Recorded(Recorded),
}

/// An attempt at a checkpoint of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GroupEpoch {
    /// Which group.
    pub vpg: VpgId,
    /// Which attempt (D1).
    pub epoch: Epoch,
}

/// Asks a VRA to hold its VMs of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hold {
    /// Which attempt.
    pub at: GroupEpoch,
    /// The coordinator's set of members: a VRA that has another one declines.
    pub member_set_version: u64,
    /// How long the hold lasts at most from its begin, in microseconds, above zero.
    pub deadline_us: u32,
}

/// A VRA holds its VMs of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// Which attempt.
    pub at: GroupEpoch,
    /// The sender's name for this hold. A release names it, so that it can't mean another hold of the same attempt.
    pub hold: u64,
    /// The VMs, 1 to [`MAX_VMS_PER_VPG`].
    pub members: Vec<HeldMember>,
}

/// A VM that is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeldMember {
    /// Which VM.
    pub vm: VmId,
    /// The last number that belongs to the checkpoint.
    pub cut: u64,
}

/// A VRA doesn't hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decline {
    /// Which attempt.
    pub at: GroupEpoch,
    /// Why not.
    pub code: DeclineCode,
    /// The VM that is in the way, if it is one.
    pub vm: Option<VmId>,
}

/// All members are held.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Release {
    /// Which attempt.
    pub at: GroupEpoch,
    /// [`Held::hold`].
    pub hold: u64,
    /// When the checkpoint was taken, by the coordinator's clock, in microseconds since the Unix epoch (D4).
    pub time_us: u64,
    /// Why it was.
    pub kind: CheckpointKind,
    /// Its name, or empty; at most [`MAX_NAME_BYTES`] without control characters, as the API takes it.
    pub tag: String,
}

/// What became of a VRA's records of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recorded {
    /// Which attempt.
    pub at: GroupEpoch,
    /// How long completions were held, in microseconds (at most `u32::MAX`).
    pub held_us: u32,
    /// Why not every VM of it has a record, if so.
    pub refused: Option<DeclineCode>,
}

impl GroupMessage {
    /// The frame's bytes. The lists must be within their bounds.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Alive => frame(FrameKind::Alive, &[], &[]),
            Self::Hold(hold) => {
                let layout = HoldLayout {
                    at: AtLayout::of(hold.at),
                    member_set_version: hold.member_set_version.into(),
                    deadline_us: hold.deadline_us.into(),
                    reserved: 0.into(),
                };
                frame(FrameKind::Hold, layout.as_bytes(), &[])
            }
            Self::Held(held) => {
                debug_assert!((1..=MAX_VMS_PER_VPG).contains(&held.members.len()));
                let layout = HeldLayout {
                    at: AtLayout::of(held.at),
                    hold: held.hold.into(),
                    member_count: (held.members.len() as u16).into(),
                    reserved: [0; 6],
                };
                let member = |member: &HeldMember| MemberLayout {
                    vm: *member.vm.0.as_bytes(),
                    cut: member.cut.into(),
                };
                let members: Vec<MemberLayout> = held.members.iter().map(member).collect();
                frame(FrameKind::Held, layout.as_bytes(), members.as_bytes())
            }
            Self::Decline(decline) => {
                let layout = DeclineLayout {
                    at: AtLayout::of(decline.at),
                    vm: *decline.vm.map_or(Uuid::nil(), |vm| vm.0).as_bytes(),
                    code: decline.code.code().into(),
                    reserved: [0; 6],
                };
                frame(FrameKind::Decline, layout.as_bytes(), &[])
            }
            Self::Release(release) => {
                let tag = &release.tag[..release.tag.floor_char_boundary(MAX_NAME_BYTES)];
                let layout = ReleaseLayout {
                    at: AtLayout::of(release.at),
                    hold: release.hold.into(),
                    time_us: release.time_us.into(),
                    tag_len_bytes: (tag.len() as u16).into(),
                    kind: release.kind as u8,
                    reserved: [0; 5],
                };
                frame(FrameKind::Release, layout.as_bytes(), tag.as_bytes())
            }
            Self::Abort(at) => frame(FrameKind::Abort, AtLayout::of(*at).as_bytes(), &[]),
            Self::Recorded(recorded) => {
                let layout = RecordedLayout {
                    at: AtLayout::of(recorded.at),
                    held_us: recorded.held_us.into(),
                    code: recorded.refused.map_or(0, DeclineCode::code).into(),
                    reserved: 0.into(),
                };
                frame(FrameKind::Recorded, layout.as_bytes(), &[])
            }
        }
    }

    pub(super) fn kind(&self) -> FrameKind {
        match self {
            Self::Alive => FrameKind::Alive,
            Self::Hold(_) => FrameKind::Hold,
            Self::Held(_) => FrameKind::Held,
            Self::Decline(_) => FrameKind::Decline,
            Self::Release(_) => FrameKind::Release,
            Self::Abort(_) => FrameKind::Abort,
            Self::Recorded(_) => FrameKind::Recorded,
        }
    }

    /// Reads what follows the header of a frame of one of these kinds.
    pub(super) fn parse_body(kind: FrameKind, body: &[u8]) -> Result<Self, WireError> {
        match kind {
            FrameKind::Alive => match body {
                [] => Ok(Self::Alive),
                _ => Err(length("alive", body, 0)),
            },
            FrameKind::Hold => parse_hold(body),
            FrameKind::Held => parse_held(body),
            FrameKind::Decline => parse_decline(body),
            FrameKind::Release => parse_release(body),
            FrameKind::Abort => fixed_body::<AtLayout>("abort", body).map(|at| Self::Abort(at.read())),
            FrameKind::Recorded => parse_recorded(body),
            FrameKind::Open | FrameKind::Grant | FrameKind::Refuse | FrameKind::Ack => {
                Err(WireError::Unexpected { found: kind.name() })
            }
        }
    }
}

fn parse_hold(body: &[u8]) -> Result<GroupMessage, WireError> {
    let layout: HoldLayout = fixed_body("hold", body)?;
    zero("hold", &layout.reserved.to_bytes())?;
    if layout.deadline_us.get() == 0 {
        return Err(WireError::Field { frame: "hold", field: "deadline", found: 0 });
    }
    Ok(GroupMessage::Hold(Hold {
        at: layout.at.read(),
        member_set_version: layout.member_set_version.get(),
        deadline_us: layout.deadline_us.get(),
    }))
}

fn parse_held(body: &[u8]) -> Result<GroupMessage, WireError> {
    let fixed_bytes = size_of::<HeldLayout>();
    let (layout, rest) = HeldLayout::ref_from_prefix(body).map_err(|_| length("held", body, fixed_bytes))?;
    zero("held", &layout.reserved)?;
    let count = usize::from(layout.member_count.get());
    if !(1..=MAX_VMS_PER_VPG).contains(&count) {
        return Err(WireError::Field { frame: "held", field: "member count", found: count as u64 });
    }
    let expected = fixed_bytes + count * size_of::<MemberLayout>();
    let members = <[MemberLayout]>::ref_from_bytes_with_elems(rest, count)
        .map_err(|_| length("held", body, expected))?;
    let member =
        |member: &MemberLayout| HeldMember { vm: VmId(Uuid::from_bytes(member.vm)), cut: member.cut.get() };
    Ok(GroupMessage::Held(Held {
        at: layout.at.read(),
        hold: layout.hold.get(),
        members: members.iter().map(member).collect(),
    }))
}

fn parse_decline(body: &[u8]) -> Result<GroupMessage, WireError> {
    let layout: DeclineLayout = fixed_body("decline", body)?;
    zero("decline", &layout.reserved)?;
    let code = layout.code.get();
    if code == 0 {
        return Err(WireError::Field { frame: "decline", field: "code", found: 0 });
    }
    let vm = Uuid::from_bytes(layout.vm);
    Ok(GroupMessage::Decline(Decline {
        at: layout.at.read(),
        code: DeclineCode::from_code(code),
        vm: (!vm.is_nil()).then_some(VmId(vm)),
    }))
}

fn parse_release(body: &[u8]) -> Result<GroupMessage, WireError> {
    let fixed_bytes = size_of::<ReleaseLayout>();
    let (layout, tag) =
        ReleaseLayout::ref_from_prefix(body).map_err(|_| length("release", body, fixed_bytes))?;
    zero("release", &layout.reserved)?;
    let tag_len_bytes = usize::from(layout.tag_len_bytes.get());
    if tag_len_bytes > MAX_NAME_BYTES || tag.len() != tag_len_bytes {
        return Err(length("release", body, fixed_bytes + tag_len_bytes.min(MAX_NAME_BYTES)));
    }
    let field = |field, found| WireError::Field { frame: "release", field, found };
    let kind = match layout.kind {
        1 => CheckpointKind::Automatic,
        2 => CheckpointKind::Tagged,
        3 => CheckpointKind::Application,
        other => return Err(field("kind of checkpoint", other.into())),
    };
    let tag = std::str::from_utf8(tag)
        .map_err(|error| field("first byte of the tag that is not UTF-8", error.valid_up_to() as u64))?;
    // A peer's word goes into journals, lists and terminals: it is checked as a user's is.
    if !is_text(tag) {
        let control = tag.find(char::is_control).unwrap_or(0);
        return Err(field("first byte of the tag that is a control character", control as u64));
    }
    Ok(GroupMessage::Release(Release {
        at: layout.at.read(),
        hold: layout.hold.get(),
        time_us: layout.time_us.get(),
        kind,
        tag: tag.to_owned(),
    }))
}

fn parse_recorded(body: &[u8]) -> Result<GroupMessage, WireError> {
    let layout: RecordedLayout = fixed_body("recorded", body)?;
    zero("recorded", &layout.reserved.to_bytes())?;
    let code = layout.code.get();
    Ok(GroupMessage::Recorded(Recorded {
        at: layout.at.read(),
        held_us: layout.held_us.get(),
        refused: (code != 0).then(|| DeclineCode::from_code(code)),
    }))
}

fn frame(kind: FrameKind, fixed: &[u8], rest: &[u8]) -> Vec<u8> {
    let len_bytes = FRAME_HEADER_BYTES + fixed.len() + rest.len();
    let mut bytes = Vec::with_capacity(len_bytes);
    bytes.extend_from_slice(Header::new(kind, len_bytes).as_bytes());
    bytes.extend_from_slice(fixed);
    bytes.extend_from_slice(rest);
    bytes
}

fn length(frame: &'static str, body: &[u8], expected: usize) -> WireError {
    WireError::Length {
        frame,
        found: body.len() + FRAME_HEADER_BYTES,
        expected: expected + FRAME_HEADER_BYTES,
    }
}

fn zero(frame: &'static str, reserved: &[u8]) -> Result<(), WireError> {
    match reserved.iter().find(|byte| **byte != 0) {
        Some(byte) => Err(WireError::Field { frame, field: "reserved", found: (*byte).into() }),
        None => Ok(()),
    }
}

/// Which attempt, 40 bytes.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct AtLayout {
    /// [`GroupEpoch::vpg`].
    vpg: [u8; 16],
    /// [`Epoch::nonce`].
    nonce: [u8; 16],
    /// [`Epoch::counter`].
    counter: U64,
}

impl AtLayout {
    fn of(at: GroupEpoch) -> Self {
        Self {
            vpg: *at.vpg.0.as_bytes(),
            nonce: *at.epoch.nonce.as_bytes(),
            counter: at.epoch.counter.into(),
        }
    }

    fn read(&self) -> GroupEpoch {
        let epoch = Epoch { nonce: Uuid::from_bytes(self.nonce), counter: self.counter.get() };
        GroupEpoch { vpg: VpgId(Uuid::from_bytes(self.vpg)), epoch }
    }
}

/// A hold frame after the header, 56 bytes.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct HoldLayout {
    /// [`Hold::at`].
    at: AtLayout,
    /// [`Hold::member_set_version`].
    member_set_version: U64,
    /// [`Hold::deadline_us`].
    deadline_us: U32,
    /// Zero.
    reserved: U32,
}

/// The fixed part of a held frame after the header, 56 bytes; then the members.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct HeldLayout {
    /// [`Held::at`].
    at: AtLayout,
    /// [`Held::hold`].
    hold: U64,
    /// How many members follow.
    member_count: U16,
    /// Zero.
    reserved: [u8; 6],
}

/// A member of a held frame, 24 bytes.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct MemberLayout {
    /// [`HeldMember::vm`].
    vm: [u8; 16],
    /// [`HeldMember::cut`].
    cut: U64,
}

/// A decline frame after the header, 64 bytes.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct DeclineLayout {
    /// [`Decline::at`].
    at: AtLayout,
    /// [`Decline::vm`], or zeroes.
    vm: [u8; 16],
    /// [`DeclineCode`].
    code: U16,
    /// Zero.
    reserved: [u8; 6],
}

/// The fixed part of a release frame after the header, 64 bytes; then the tag.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct ReleaseLayout {
    /// [`Release::at`].
    at: AtLayout,
    /// [`Release::hold`].
    hold: U64,
    /// [`Release::time_us`].
    time_us: U64,
    /// Length of the tag that follows, in bytes.
    tag_len_bytes: U16,
    /// [`CheckpointKind`] as a number.
    kind: u8,
    /// Zero.
    reserved: [u8; 5],
}

/// A recorded frame after the header, 48 bytes.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RecordedLayout {
    /// [`Recorded::at`].
    at: AtLayout,
    /// [`Recorded::held_us`].
    held_us: U32,
    /// [`DeclineCode`], or 0.
    code: U16,
    /// Zero.
    reserved: U16,
}

const _: () = assert!(size_of::<AtLayout>() == 40);
const _: () = assert!(size_of::<HoldLayout>() == 56);
const _: () = assert!(size_of::<HeldLayout>() == 56);
const _: () = assert!(size_of::<MemberLayout>() == 24);
const _: () = assert!(size_of::<DeclineLayout>() == 64);
const _: () = assert!(size_of::<ReleaseLayout>() == 64);
const _: () = assert!(size_of::<RecordedLayout>() == 48);
const _: () = assert!(
    FRAME_HEADER_BYTES + size_of::<HeldLayout>() + MAX_VMS_PER_VPG * size_of::<MemberLayout>()
        <= super::MAX_FRAME_BYTES
);
