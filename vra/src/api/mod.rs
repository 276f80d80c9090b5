//! The control protocol of a VRA: its requests, responses and errors, as JSON.
//!
//! The same messages run over a control stream of the QUIC link (from the ZVM) and over the local unix socket (from the `vra`
//! command). Each message is a frame: its length in bytes as a little-endian `u32`, then that many bytes of JSON. `docs/control-api.md`
//! shows them.
//!
//! Versions: [`Hello`] is the first request of a connection and carries [`PROTOCOL_VERSION`] and feature names. Within a version
//! fields are only added, and a reader ignores fields that it doesn't know; an operation that a VRA doesn't know is answered with
//! [`ErrorCode::UnknownRequest`]. What changes the meaning of a request gets a feature name.

pub mod door;
pub mod enroll;
pub mod error;
pub mod guest;
pub mod ids;
pub mod members;
pub mod site_keys;
pub mod status;
pub mod view;
pub mod volume;
pub mod vpg;

pub use door::{DoorAddress, DoorRequest};
pub use error::{ApiError, ErrorCode};
pub use guest::{FreezeGuests, GuestsFrozen, SetGuestAgent, ThawGuests};
pub use ids::{
    BadId, BadTime, CheckpointId, CheckpointIdError, GenerationId, JournalId, TimeUs, ViewId, VmId, VolumeId,
    VpgId, VraId, ZvmId,
};
pub use members::{FormerVm, MAX_FORMER_VMS, MemberSince};
pub use site_keys::{MAX_SITE_KEYS, SetSiteKeys, SiteKeyLine};
pub use status::{Alert, DoctorReport, Severity, VraStatus};
pub use view::{OpenView, PointInTime, ViewInfo, ViewMode};
pub use volume::{Attach, Detach, VolumeInfo};
pub use vpg::{
    CheckpointInfo, CheckpointPage, DefinitionPage, ListCheckpoints, ListDefinitions, LockCheckpoint,
    TagCheckpoint, VpgDefinition, VpgNotes,
};

use serde::{Deserialize, Serialize};

/// The version of the messages in this module. Raised when an old reader would misunderstand a new writer.
pub const PROTOCOL_VERSION: u32 = 1;

/// Longest JSON message, in bytes. A longer length prefix ends the connection.
pub const MAX_MESSAGE_BYTES: u32 = 4 << 20;

/// Most bytes of JSON that the entries of one page may take, unless a single one takes more.
pub const MAX_PAGE_BYTES: usize = MAX_MESSAGE_BYTES as usize / 2;

/// Most VMs in one page of [`ListDefinitions`], unless a single VPG has more.
pub const MAX_VMS_PER_DEFINITION_PAGE: usize = 512;

/// Most checkpoints in one page of [`ListCheckpoints`]; it has fewer where they don't fit into [`MAX_PAGE_BYTES`].
pub const MAX_CHECKPOINTS_PER_PAGE: u32 = 1000;

/// How many bytes a value takes as JSON in a message.
pub fn message_bytes(value: &impl Serialize) -> usize {
    serde_json::to_vec(value).map_or(0, |bytes| bytes.len())
}

/// What a client sends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RequestFrame {
    /// The client's number for the request, given back in [`ResponseFrame::id`]. Requests of one stream are answered in order.
    pub id: u64,
    /// The request.
    pub request: Request,
}

/// What a VRA answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ResponseFrame {
    /// [`RequestFrame::id`], or 0 when the request could not be read.
    pub id: u64,
    /// The answer.
    pub outcome: Outcome,
}

/// Success or failure of one request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It was done.
    Ok(Response),
    /// It was not done.
    Error(ApiError),
}

/// A request. Each can be repeated: doing again what was done already succeeds and answers the same.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Request {
    /// Says who speaks which version. Answer: [`Response::Hello`].
    Hello(Hello),
    /// The whole VRA. Answer: [`Response::Status`].
    Status,
    /// What the host offers and lacks. Answer: [`Response::Doctor`].
    Doctor,
    /// Serves a local disk as a protected volume. Answer: [`Response::Volume`].
    Attach(Attach),
    /// Stops serving a volume and forgets it. Answer: [`Response::Done`].
    Detach(Detach),
    /// The attached volumes. Answer: [`Response::Volumes`].
    List,
    /// Takes a VPG's definition: source and target parts of it by the VRA's own id. Answer: [`Response::Vpg`].
    ApplyVpg(VpgDefinition),
    /// Whether [`Request::ApplyVpg`] would be refused now; changes nothing. Answer: [`Response::Done`].
    CheckVpg(VpgDefinition),
    /// Ends the protection of a VPG here. Answer: [`Response::Done`].
    RemoveVpg(RemoveVpg),
    /// Begins full syncs; to the source VRA. [`ErrorCode::Busy`] while one runs. Answer: [`Response::Done`].
    ForceSync(ForceSync),
    /// The definitions that this VRA has a part in. Answer: [`Response::Definitions`].
    ListDefinitions(ListDefinitions),
    /// The checkpoints that this VRA's journals hold. Answer: [`Response::Checkpoints`].
    ListCheckpoints(ListCheckpoints),
    /// Makes a checkpoint now and names it; to the source VRA. Answer: [`Response::Checkpoint`].
    TagCheckpoint(TagCheckpoint),
    /// Keeps a checkpoint, or not any more; to the target VRA. Answer: [`Response::Checkpoint`].
    LockCheckpoint(LockCheckpoint),
    /// Opens disks as they were at a moment; to the target VRA. Answer: [`Response::View`].
    OpenView(OpenView),
    /// Closes a view, with its scratch. Answer: [`Response::Done`].
    CloseView(CloseView),
    /// The open views. Answer: [`Response::Views`].
    ListViews,
    /// Says where a guest's agent is; to the source VRA. Answer: [`Response::Done`].
    SetGuestAgent(SetGuestAgent),
    /// Freezes guests for a checkpoint; to the source VRA. Answer: [`Response::Guests`].
    FreezeGuests(FreezeGuests),
    /// Thaws them. Answer: [`Response::Guests`], those that were frozen.
    ThawGuests(ThawGuests),
    /// Replaces the list of revoked certificates. Answer: [`Response::Done`].
    SetTrust(SetTrust),
    /// Replaces the site's keys. Answer: [`Response::Done`].
    SetSiteKeys(SetSiteKeys),
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "is", content = "value", rename_all = "snake_case")]
pub enum Response {
    /// To [`Request::Hello`].
    Hello(HelloReply),
    /// To [`Request::Status`].
    Status(Box<VraStatus>),
    /// To [`Request::Doctor`].
    Doctor(DoctorReport),
    /// To [`Request::Attach`].
    Volume(VolumeInfo),
    /// To [`Request::List`].
    Volumes(Vec<VolumeInfo>),
    /// To [`Request::ApplyVpg`].
    Vpg(vpg::VpgApplied),
    /// To [`Request::ListDefinitions`].
    Definitions(DefinitionPage),
    /// To [`Request::ListCheckpoints`].
    Checkpoints(CheckpointPage),
    /// To [`Request::TagCheckpoint`] and [`Request::LockCheckpoint`].
    Checkpoint(CheckpointInfo),
    /// To [`Request::OpenView`].
    View(ViewInfo),
    /// To [`Request::ListViews`].
    Views(Vec<ViewInfo>),
    /// To [`Request::FreezeGuests`] and [`Request::ThawGuests`].
    Guests(GuestsFrozen),
    /// Done, with nothing to tell.
    Done,
}

/// First request of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Newest [`PROTOCOL_VERSION`] that the client speaks.
    pub protocol: u32,
    /// The client's program and version, for the log: `zvm 0.1.0`.
    pub client: String,
    /// Features that the client uses if the VRA has them.
    #[serde(default)]
    pub features: Vec<String>,
}

/// Answer to [`Hello`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HelloReply {
    /// The version that this connection speaks: the older side's.
    pub protocol: u32,
    /// Who answers.
    pub vra: VraId,
    /// The VRA's name: that under which it was enrolled, else that of its configuration.
    pub name: String,
    /// The VRA's version.
    pub version: String,
    /// Features that both sides have.
    pub features: Vec<String>,
}

/// Ends a VPG.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoveVpg {
    /// Which one.
    pub vpg: VpgId,
    /// Target: leave journals, recovery disks and manifests in the datastore.
    pub keep_files: bool,
}

/// Begins full syncs of VMs of a VPG, as after a crash of their source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForceSync {
    /// Of which VPG.
    pub vpg: VpgId,
    /// Of this VM; without, of all that the VRA is source of.
    #[serde(default)]
    pub vm: Option<VmId>,
}

/// Closes a view.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CloseView {
    /// Which one.
    pub view: ViewId,
}

/// Certificates that are no longer to be trusted, though their dates are good. Replaces the former list; connections of those named
/// are closed. Which VRA may send which VM's data is not said here but by the VPGs' definitions.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetTrust {
    /// Raised by the ZVM at each change; a list older than the one at hand is refused as [`ErrorCode::Stale`].
    pub version: u64,
    /// Serial numbers as lower-case hex without leading zeroes.
    pub revoked_serials: Vec<String>,
    /// VRAs whose every certificate is revoked.
    pub revoked_vras: Vec<VraId>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn same_after_json<T: Serialize + serde::de::DeserializeOwned + PartialEq + std::fmt::Debug>(value: &T) {
        let text = serde_json::to_string(value).expect("to JSON");
        let back: T = serde_json::from_str(&text).expect(&text);
        assert_eq!(&back, value, "{text}");
    }

    #[test]
    fn requests_have_the_documented_shape() {
        let frame = RequestFrame { id: 7, request: Request::Status };
        assert_eq!(serde_json::to_string(&frame).expect("JSON"), r#"{"id":7,"request":{"op":"status"}}"#);
        let text = r#"{"id":8,"request":{"op":"close_view","view":"6d9d3a60-54c0-4ba8-9c6c-3b7a2b1b0e0f","later":1}}"#;
        let frame: RequestFrame = serde_json::from_str(text).expect("unknown fields are ignored");
        assert!(matches!(frame.request, Request::CloseView(_)));
    }

    #[test]
    fn messages_survive_json() {
        let checkpoint = CheckpointId { nonce: u128::MAX - 1, counter: 12 };
        let view = OpenView {
            subject: view::ViewSubject::Vpg { vpg: VpgId::random() },
            at: PointInTime::Checkpoint { checkpoint },
            mode: ViewMode::Scratch,
            door: DoorRequest::Nbd { listen: None },
            view: None,
            label: Some("friday's test".to_owned()),
        };
        same_after_json(&Request::OpenView(view));
        same_after_json(&Request::SetTrust(SetTrust {
            version: 3,
            revoked_serials: vec!["1f".to_owned()],
            revoked_vras: vec![VraId::random()],
        }));
        same_after_json(&Request::SetSiteKeys(SetSiteKeys { keys: vec![SiteKeyLine("k".to_owned())] }));
        same_after_json(&ResponseFrame { id: 1, outcome: Outcome::Ok(Response::Done) });
        same_after_json(&ResponseFrame {
            id: 1,
            outcome: Outcome::Ok(Response::Hello(HelloReply {
                protocol: 1,
                vra: VraId::random(),
                name: "host-a".to_owned(),
                version: "0.1.0".to_owned(),
                features: vec![],
            })),
        });
        same_after_json(&ResponseFrame {
            id: 1,
            outcome: Outcome::Error(
                ApiError::new(ErrorCode::NotFound, "no view with id x").remedy("list the views"),
            ),
        });
    }

    #[test]
    fn an_error_code_of_a_newer_vra_is_understood_as_other() {
        let error: ApiError =
            serde_json::from_str(r#"{"code":"too_heavy","message":"m","remedy":null}"#).expect("JSON");
        assert_eq!(error.code, ErrorCode::Other);
    }
}
