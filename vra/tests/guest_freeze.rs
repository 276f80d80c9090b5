//! Checkpoints for which guests are frozen; and however freezing ends, the guest is thawed.

mod common;

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use ::vra::api::status::SourceMode;
use ::vra::api::vpg::CheckpointKind;
use ::vra::api::{
    CheckpointInfo, ErrorCode, FreezeGuests, Request, Response, SetGuestAgent, TagCheckpoint, ThawGuests,
    VpgId,
};
use common::TestCa;
use common::guest_agent::FakeAgent;
use common::pair::{checkpoints, streaming_pair, tag, wait_for_checkpoint};
use common::vra::Vra;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Whoever freezes may die: the guest goes on within this time.
const THAWED_WITHIN: Duration = Duration::from_secs(10);

async fn freeze(source: &Vra, vpg: VpgId, limit_ms: u32) {
    match source.ask(Request::FreezeGuests(FreezeGuests { vpg, limit_ms })).await {
        Response::Guests(told) => assert_eq!((told.frozen.len(), told.without_agent.len()), (1, 0)),
        other => panic!("{other:?}"),
    }
}

fn tag_frozen(vpg: VpgId, tag: &str) -> Request {
    Request::TagCheckpoint(TagCheckpoint { vpg, tag: tag.to_owned(), application: true })
}

/// Processes that a process started.
fn children(pid: i32) -> Vec<i32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let all = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten();
    let others = all.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("children")).ok());
    let mut pids: Vec<i32> = std::iter::once(text)
        .chain(others)
        .flat_map(|text| text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>())
        .collect();
    pids.sort_unstable();
    pids.dedup();
    pids
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_is_taken_while_the_guest_is_frozen_and_it_never_stays_so() {
    let ca = TestCa::new();
    let Some((mut source, target, _, definition)) = streaming_pair("freeze", &ca).await else { return };
    let (vpg, vm) = (definition.id, definition.vms[0].id);

    // Without an agent there is nothing to freeze.
    let refused = source.refusal(tag_frozen(vpg, "none")).await;
    assert!(refused.code == ErrorCode::BadRequest && refused.message.contains("no VM of VPG"), "{refused}");
    let socket = source.path("agent.sock");
    let refused =
        source.refusal(Request::SetGuestAgent(SetGuestAgent { vm, socket: Some("agent.sock".into()) })).await;
    assert!(refused.message.contains("not an absolute path"), "{refused}");
    let output = source.run(&["guest-agent", "db", "--agent-socket", &socket.to_string_lossy()]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let refused = source.refusal(tag_frozen(vpg, "nobody")).await;
    assert!(refused.message.contains("the guest of VM db can't be frozen: cannot reach"), "{refused}");

    let agent = FakeAgent::start(&socket);
    let output = source.run(&["--json", "checkpoint", "tag", "shop", "quiet", "--application"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let taken: CheckpointInfo = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!((taken.kind, agent.is_frozen()), (CheckpointKind::Application, false));
    assert_eq!(agent.asked(), ["guest-fsfreeze-freeze", "guest-fsfreeze-thaw"]);
    wait_for_checkpoint(&target, vpg, taken.id).await;
    let plain = tag(&source, vpg, "plain").await;
    assert_eq!((plain.kind, agent.asked().len()), (CheckpointKind::Tagged, 0));
    wait_for_checkpoint(&target, vpg, plain.id).await;
    let kinds = checkpoints(&target, vpg).await.into_iter().filter_map(|info| Some((info.tag?, info.kind)));
    let expected = [("quiet", CheckpointKind::Application), ("plain", CheckpointKind::Tagged)];
    assert_eq!(kinds.collect::<Vec<_>>(), expected.map(|(tag, kind)| (tag.to_owned(), kind)));

    // An agent that says no: no checkpoint.
    agent.refuse(true);
    let refused = source.refusal(tag_frozen(vpg, "refused")).await;
    assert!(refused.message.contains("a hook said no") && refused.remedy.is_some(), "{refused}");
    agent.refuse(false);

    // As the manager does it; a second one waits for nobody.
    freeze(&source, vpg, 8_000).await;
    assert!(agent.is_frozen());
    let busy = source.refusal(Request::FreezeGuests(FreezeGuests { vpg, limit_ms: 8_000 })).await;
    assert_eq!(busy.code, ErrorCode::Busy, "{busy}");
    source.ask(tag_frozen(vpg, "of the manager")).await;
    assert!(agent.is_frozen(), "who has frozen it thaws it");
    source.ask(Request::ThawGuests(ThawGuests { vpg })).await;
    assert!(!agent.is_frozen());

    // The manager dies.
    freeze(&source, vpg, 2_000).await;
    let took = agent.wait_until_thawed(THAWED_WITHIN).await;
    println!("thawed {took:?} after nobody asked for it");
    let bad = source.refusal(Request::FreezeGuests(FreezeGuests { vpg, limit_ms: 60_000 })).await;
    assert!(bad.message.contains("it must be 2000 to 8000"), "{bad}");

    // The VRA dies; its guard sees to it.
    freeze(&source, vpg, 8_000).await;
    source.kill();
    let took = agent.wait_until_thawed(THAWED_WITHIN).await;
    println!("thawed {took:?} after the VRA's death");
    source.serve();
    source.wait_for("streaming", |status| status.source_vms[0].mode == SourceMode::Streaming).await;

    // Both die, as with their host: the next start thaws it.
    freeze(&source, vpg, 8_000).await;
    let guards = children(source.pid());
    assert!(!guards.is_empty(), "a guard runs");
    guards.iter().for_each(|pid| kill(Pid::from_raw(*pid), Signal::SIGKILL).expect("killed"));
    source.kill();
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(agent.is_frozen(), "nobody is left to thaw it");
    source.serve();
    let took = agent.wait_until_thawed(THAWED_WITHIN).await;
    println!("thawed {took:?} after the next start");
    let noted = std::fs::read_to_string(source.path("state/frozen-guests.json")).expect("the list");
    source.wait_for("streaming", |status| status.source_vms[0].mode == SourceMode::Streaming).await;
    assert!(!noted.contains("agent.sock") || !agent.is_frozen(), "{noted}");
    source.ask(tag_frozen(vpg, "again")).await;

    // The VRA ends in good order.
    freeze(&source, vpg, 8_000).await;
    source.stop();
    assert!(!agent.is_frozen(), "it is thawed before the VRA has ended");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_others_use_or_that_is_slow_keeps_nobody_waiting_and_no_guest_frozen() {
    let ca = TestCa::new();
    let Some((source, _target, _, definition)) = streaming_pair("freeze-slow", &ca).await else { return };
    let (vpg, vm) = (definition.id, definition.vms[0].id);
    let socket = source.path("agent.sock");
    let agent = FakeAgent::start(&socket);
    source.ask(Request::SetGuestAgent(SetGuestAgent { vm, socket: Some(socket.clone()) })).await;
    let ask = Request::FreezeGuests(FreezeGuests { vpg, limit_ms: 2_000 });

    // Another client has the channel: at the third try not even a connection can be made.
    let other = UnixStream::connect(&socket).expect("a client");
    for attempt in 1..=4 {
        let began = Instant::now();
        let refused = source.refusal(ask.clone()).await;
        assert_eq!(refused.code, ErrorCode::NotReady, "{attempt}: {refused}");
        assert!(began.elapsed() < Duration::from_secs(4), "{attempt}: {:?}", began.elapsed());
    }
    assert_eq!(agent.asked(), [""; 0], "nothing was asked of the guest");
    drop(other);
    freeze(&source, vpg, 8_000).await;
    source.ask(Request::ThawGuests(ThawGuests { vpg })).await;
    assert_eq!((agent.is_frozen(), agent.asked().len()), (false, 2));

    // Somebody else has frozen it.
    agent.set_frozen(true);
    let refused = source.refusal(ask.clone()).await;
    assert!(refused.message.contains("frozen it already"), "{refused}");
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    assert!(agent.is_frozen() && agent.asked().is_empty(), "it isn't ours to thaw");
    agent.set_frozen(false);

    // It freezes when nobody waits for that any more.
    agent.freeze_after(Duration::from_secs(5));
    let refused = source.refusal(ask.clone()).await;
    assert!(refused.code == ErrorCode::NotReady && !agent.is_frozen(), "{refused}");
    let busy = source.refusal(ask.clone()).await;
    assert_eq!(busy.code, ErrorCode::Busy, "{busy}");
    agent.freeze_after(Duration::ZERO);
    let noted = || std::fs::read_to_string(source.path("state/frozen-guests.json")).expect("the list");
    assert!(noted().contains("agent.sock"));
    let deadline = Instant::now() + Duration::from_secs(10);
    while noted().contains("agent.sock") {
        assert!(Instant::now() < deadline, "never thawed:\n{}", source.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!((agent.is_frozen(), agent.asked()), (false, both()), "it was frozen, and is thawed");

    // The guard alone dies: another one thaws the guest.
    freeze(&source, vpg, 8_000).await;
    children(source.pid()).iter().for_each(|pid| kill(Pid::from_raw(*pid), Signal::SIGKILL).expect("killed"));
    agent.wait_until_thawed(Duration::from_secs(5)).await;
    assert_eq!(agent.asked(), both());
}

fn both() -> Vec<String> {
    ["guest-fsfreeze-freeze", "guest-fsfreeze-thaw"].map(str::to_owned).to_vec()
}
