//! Frames there and back.

use journal::batch::{CheckpointKind, Epoch};
use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use crate::api::vpg::MAX_VMS_PER_VPG;
use crate::api::{GenerationId, JournalId, VmId, VolumeId, VpgId};
use crate::wire::{
    Decline, DeclineCode, GroupEpoch, Held, HeldMember, Hold, MAX_ANCESTORS, MAX_VOLUMES, Recorded,
    RefuseCode, Release, VolumeShape,
};

fn uuid() -> impl Strategy<Value = Uuid> {
    any::<u128>().prop_map(Uuid::from_u128)
}

fn volumes() -> impl Strategy<Value = Vec<VolumeShape>> {
    prop::collection::vec((uuid(), any::<bool>(), 1..1_u64 << 40), 1..=MAX_VOLUMES).prop_map(|shapes| {
        let shape = |(index, (id, small, blocks)): (usize, (Uuid, bool, u64))| {
            let logical_block_bytes = if small { 512 } else { 4096 };
            VolumeShape {
                volume: index as u16,
                id: VolumeId(id),
                logical_block_bytes,
                size_bytes: blocks * u64::from(logical_block_bytes),
                left: false,
            }
        };
        shapes.into_iter().enumerate().map(shape).collect()
    })
}

fn open() -> impl Strategy<Value = Frame> {
    let ids = (uuid(), uuid(), uuid(), uuid());
    let ancestors = prop::collection::vec(uuid(), 0..=MAX_ANCESTORS);
    (ids, any::<(u64, u64)>(), 1..u64::MAX, ancestors, volumes()).prop_map(
        |((vm, vpg, journal, generation), (offered, required), first_seq, ancestors, volumes)| {
            Frame::Open(Open {
                features_offered: offered | required,
                features_required: required,
                vm: VmId(vm),
                vpg: VpgId(vpg),
                journal: JournalId(journal),
                generation: GenerationId(generation),
                ancestors: ancestors.into_iter().map(GenerationId).collect(),
                first_seq,
                volumes,
            })
        },
    )
}

fn grant() -> impl Strategy<Value = Frame> {
    let numbers = any::<(u64, u64, u64, u32, u32)>();
    (numbers, any::<bool>(), any::<bool>()).prop_map(
        |((features, open_count, durable_through, tail_crc, window_bytes), fresh, new)| {
            Frame::Grant(Grant {
                features,
                open_count,
                durable_through,
                tail_crc,
                fresh_image: fresh,
                new_generation: new,
                window_bytes,
            })
        },
    )
}

fn refuse() -> impl Strategy<Value = Frame> {
    (any::<u16>(), any::<u64>(), ".{0,200}").prop_map(|(code, detail, text)| {
        Frame::Refuse(Refuse { code: RefuseCode::from_code(code), detail, text })
    })
}

fn ack() -> impl Strategy<Value = Frame> {
    any::<(u64, u64, u64, u32, u32)>().prop_map(|(open_count, a, b, memory_us, disk_us)| {
        let (received_through, durable_through) = (a.max(b), a.min(b));
        Frame::Ack(Ack { open_count, received_through, durable_through, memory_us, disk_us })
    })
}

fn group_epoch() -> impl Strategy<Value = GroupEpoch> {
    (uuid(), uuid(), any::<u64>())
        .prop_map(|(vpg, nonce, counter)| GroupEpoch { vpg: VpgId(vpg), epoch: Epoch { nonce, counter } })
}

fn decline_code() -> impl Strategy<Value = DeclineCode> {
    (1..=u16::MAX).prop_map(DeclineCode::from_code)
}

fn group_question() -> impl Strategy<Value = GroupMessage> {
    let hold =
        (group_epoch(), any::<u64>(), 1..=u32::MAX).prop_map(|(at, member_set_version, deadline_us)| {
            GroupMessage::Hold(Hold { at, member_set_version, deadline_us })
        });
    let kinds = vec![CheckpointKind::Automatic, CheckpointKind::Tagged, CheckpointKind::Application];
    let release = (group_epoch(), any::<(u64, u64)>(), prop::sample::select(kinds), "\\PC{0,32}").prop_map(
        |(at, (hold, time_us), kind, tag)| GroupMessage::Release(Release { at, hold, time_us, kind, tag }),
    );
    prop_oneof![Just(GroupMessage::Alive), hold, release, group_epoch().prop_map(GroupMessage::Abort)]
}

fn group_answer() -> impl Strategy<Value = GroupMessage> {
    let member = (uuid(), any::<u64>()).prop_map(|(vm, cut)| HeldMember { vm: VmId(vm), cut });
    let members = prop::collection::vec(member, 1..=MAX_VMS_PER_VPG);
    let held = (group_epoch(), any::<u64>(), members)
        .prop_map(|(at, hold, members)| GroupMessage::Held(Held { at, hold, members }));
    let vm = prop::option::of((1..=u128::MAX).prop_map(|vm| VmId(Uuid::from_u128(vm))));
    let decline = (group_epoch(), decline_code(), vm)
        .prop_map(|(at, code, vm)| GroupMessage::Decline(Decline { at, code, vm }));
    let recorded = (group_epoch(), any::<u32>(), prop::option::of(decline_code()))
        .prop_map(|(at, held_us, refused)| GroupMessage::Recorded(Recorded { at, held_us, refused }));
    prop_oneof![held, decline, recorded]
}

fn any_frame() -> impl Strategy<Value = Frame> {
    let group = prop_oneof![group_question(), group_answer()].prop_map(Frame::Group);
    prop_oneof![open(), grant(), refuse(), ack(), group]
}

proptest! {
    #[test]
    fn every_frame_comes_back_equal_and_bounded(frame in any_frame()) {
        let bytes = frame.encode();
        prop_assert!(bytes.len() <= MAX_FRAME_BYTES);
        let header = bytes.first_chunk().expect("a frame has a header");
        prop_assert_eq!(frame_len_bytes(header), Ok(bytes.len()));
        prop_assert_eq!(Frame::parse(&bytes), Ok(frame));
    }

    #[test]
    fn what_parses_has_one_encoding(frame in any_frame(), at in any::<prop::sample::Index>(), bit in 0..8_u32) {
        let mut bytes = frame.encode();
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        // The version in a refusal's header is the only thing that may vary.
        if let Ok(parsed) = Frame::parse(&bytes) && !(matches!(parsed, Frame::Refuse(_)) && (6..8).contains(&at)) {
            prop_assert_eq!(parsed.encode(), bytes);
        }
    }

    #[test]
    fn a_cut_frame_is_refused(frame in any_frame(), cut in any::<prop::sample::Index>()) {
        let bytes = frame.encode();
        prop_assert!(Frame::parse(&bytes[..cut.index(bytes.len())]).is_err());
    }

    #[test]
    fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = Frame::parse(&bytes);
    }
}

#[test]
fn a_newer_peer_is_named_but_its_refusal_is_read() {
    let mut open =
        Frame::Ack(Ack { open_count: 1, received_through: 2, durable_through: 2, memory_us: 0, disk_us: 0 })
            .encode();
    open[6] = 9;
    assert_eq!(Frame::parse(&open), Err(WireError::Version { found: 9 }));
    let refuse = Refuse { code: RefuseCode::Version, detail: 9, text: "too old".into() };
    let mut bytes = refuse.encode();
    bytes[6] = 9;
    assert_eq!(Frame::parse(&bytes), Ok(Frame::Refuse(refuse)));
}

#[test]
fn a_releases_tag_is_checked_as_a_users_is() {
    let parsed = |tag: &str| {
        let mut bytes = release_with_tag_of(tag.len());
        let at = bytes.len() - tag.len();
        bytes[at..].copy_from_slice(tag.as_bytes());
        Frame::parse(&bytes)
    };
    for good in ["", "vor dem Umbau ä", &"x".repeat(128)] {
        parsed(good).expect(good);
    }
    for bad in ["a\nb", "\u{1b}[2J", "\0", "\u{85}"] {
        let error = parsed(bad).expect_err("a control character").to_string();
        assert!(error.contains("control character"), "{error}");
    }
    let mut long = release_with_tag_of(128);
    long.push(b'x');
    // Where the tag's length is, and where the frame's.
    long[72] = 129;
    let len_bytes = u32::try_from(long.len()).expect("short");
    let at = long.windows(4).take(16).position(|four| four == (len_bytes - 1).to_le_bytes());
    let at = at.expect("the header has the frame's length");
    long[at..at + 4].copy_from_slice(&len_bytes.to_le_bytes());
    assert!(matches!(Frame::parse(&long), Err(WireError::Length { frame: "release", .. })));
}

fn release_with_tag_of(len_bytes: usize) -> Vec<u8> {
    let release = Release {
        at: GroupEpoch { vpg: VpgId::random(), epoch: Epoch { nonce: Uuid::nil(), counter: 1 } },
        hold: 1,
        time_us: 1,
        kind: CheckpointKind::Tagged,
        tag: "x".repeat(len_bytes),
    };
    Frame::Group(GroupMessage::Release(release)).encode()
}

#[test]
fn a_long_refusal_is_cut_at_a_character() {
    let refuse = Refuse { code: RefuseCode::Storage, detail: 0, text: "é".repeat(5000) };
    let Ok(Frame::Refuse(parsed)) = Frame::parse(&refuse.encode()) else { panic!("a refusal") };
    assert!(parsed.text.len() <= crate::wire::SENDABLE_REFUSE_TEXT_BYTES);
    assert!(parsed.text.len() > 1000);
    assert!(parsed.text.chars().all(|c| c == 'é'));
}
