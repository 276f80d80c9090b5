//! Journals and scratch under encryption at rest: with the keys everything goes as without it, and without them nothing is told.

mod common;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use ::vra::api::site_keys::SiteKey;
use ::vra::api::{
    CloseView, ErrorCode, PointInTime, Request, Response, SetSiteKeys, SiteKeyLine, ViewMode, VpgDefinition,
};
use common::TestCa;
use common::pair::{apply, door, open, open_view, pattern, streaming_pair, tag, wait_for_checkpoint};
use common::vra::{Vra, nbdcopy, qemu_io};

async fn give(target: &Vra, keys: &[&SiteKey]) {
    let keys = keys.iter().map(|key| SiteKeyLine(key.to_line().to_string())).collect();
    assert_eq!(target.ask(Request::SetSiteKeys(SetSiteKeys { keys })).await, Response::Done);
}

async fn redefine(target: &Vra, source: &Vra, definition: &mut VpgDefinition, encrypt: bool) {
    definition.revision += 1;
    definition.encrypt = encrypt;
    apply(target, definition).await;
    apply(source, definition).await;
}

/// Whether a run of this byte, half a page long, is in the file.
fn shows(path: &Path, byte: u8) -> bool {
    std::fs::read(path).expect("file").chunks(2048).any(|chunk| chunk.iter().all(|b| *b == byte))
}

#[tokio::test]
async fn an_encrypted_journal_needs_its_key_and_nothing_else_changes() {
    let ca = TestCa::new();
    let Some((source, mut target, volumes, mut definition)) = streaming_pair("encrypted", &ca).await else {
        return;
    };
    let vpg = definition.id;
    let (first, second) = (SiteKey::random().expect("random"), SiteKey::random().expect("random"));
    let uses = |key: &SiteKey| {
        let id = Some(key.id().to_string());
        move |status: &::vra::api::VraStatus| status.target_vms.iter().all(|vm| vm.site_key == id)
    };

    // Without a key there is no encryption, and what is there goes on.
    let wanted = VpgDefinition { revision: 2, encrypt: true, ..definition.clone() };
    let refused = target.refusal(Request::ApplyVpg(wanted)).await;
    assert!(refused.code == ErrorCode::NotReady && refused.message.contains("site key"), "{refused}");
    let refused = target
        .refusal(Request::SetSiteKeys(SetSiteKeys { keys: vec![SiteKeyLine("my dog's name".to_owned())] }))
        .await;
    assert!(refused.code == ErrorCode::BadRequest && !refused.message.contains("dog"), "{refused}");

    give(&target, &[&first]).await;
    redefine(&target, &source, &mut definition, true).await;
    let status = target.wait_for("encrypting", uses(&first)).await;
    let journal = status.target_vms[0].folder.join("journal.hfj");
    qemu_io(&door(&volumes[0]), &pattern(0xC7, 512, 1024));
    let tagged = tag(&source, vpg, "kept").await;
    let as_tagged = std::fs::read(&volumes[0].path).expect("disk");
    wait_for_checkpoint(&target, vpg, tagged.id).await;
    assert!(!shows(&journal, 0xC7), "the journal has the guest's data as it is");

    // A view with scratch reads what was written to the disk and to itself, over a restart for which the key comes late.
    let at = PointInTime::Checkpoint { checkpoint: tagged.id };
    let view = open_view(&target, &open(vpg, at, ViewMode::Scratch)).await;
    qemu_io(&view.disks[0].door, &pattern(0xB3, 8 << 10, 256));
    let mut expected = as_tagged.clone();
    expected[8 << 20..(8 << 20) + (256 << 10)].fill(0xB3);
    let scratch: Vec<_> = std::fs::read_dir(journal.parent().expect("folder"))
        .expect("folder")
        .map(|entry| entry.expect("entry").path())
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("scratch-")))
        .collect();
    assert_eq!(scratch.len(), 2, "one for each disk");
    assert!(!scratch.iter().any(|path| shows(path, 0xB3)), "the scratch has the guest's data as it is");
    target.kill();
    target.serve();
    let waits = |status: &::vra::api::VraStatus| {
        let id = first.id().to_string();
        status.alerts.iter().any(|alert| alert.code == "journal-not-open" && alert.message.contains(&id))
    };
    target.wait_for("waiting for the key", waits).await;
    give(&target, &[&first]).await;
    target.wait_for("open", |status| status.target_vms.iter().any(|vm| vm.connected)).await;
    target.wait_for("served again", |status| status.views.iter().all(|view| view.problem.is_none())).await;
    if let Some(found) = nbdcopy(&view.disks[0].door, &target.path("copy.raw")) {
        assert!(found == expected, "the view differs after the restart");
    }
    target.ask(Request::CloseView(CloseView { view: view.view })).await;

    // Keys without the one that the history needs are not taken: after a restart nothing could be read.
    let keys = vec![SiteKeyLine(second.to_line().to_string())];
    let refused = target.refusal(Request::SetSiteKeys(SetSiteKeys { keys })).await;
    let names = refused.message.contains(&first.id().to_string());
    assert!(refused.code == ErrorCode::Conflict && names, "{refused}");
    assert_eq!(target.status().await.site_keys, [first.id().to_string()]);

    // Another site key: new segments have a new key, and the older ones are read with the older key.
    give(&target, &[&second, &first]).await;
    target.wait_for("turned", uses(&second)).await;
    qemu_io(&door(&volumes[0]), &pattern(0xC8, 512, 1024));
    let newer = tag(&source, vpg, "turned").await;
    wait_for_checkpoint(&target, vpg, newer.id).await;
    let view = open_view(&target, &open(vpg, at, ViewMode::ReadOnly)).await;
    if let Some(found) = nbdcopy(&view.disks[0].door, &target.path("copy.raw")) {
        assert!(found == as_tagged, "the older checkpoint differs");
    }
    target.ask(Request::CloseView(CloseView { view: view.view })).await;

    // And off again.
    redefine(&target, &source, &mut definition, false).await;
    target.wait_for("plain", |status| status.target_vms.iter().all(|vm| vm.site_key.is_none())).await;
    qemu_io(&door(&volumes[0]), &pattern(0xC9, 512, 1024));
    let last = tag(&source, vpg, "plain").await;
    wait_for_checkpoint(&target, vpg, last.id).await;
    assert!(shows(&journal, 0xC9) && !shows(&journal, 0xC8));

    // From the datastore's files alone: with all keys, and not without one of them.
    let extract = |keys: Option<&[&SiteKey]>| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vra-journal"));
        command.arg("extract").arg(&journal).args(["--at", "kept", "--force", "--quiet", "--out"]);
        command.arg(target.path("extracted.raw"));
        if let Some(keys) = keys {
            let lines: Vec<String> = keys.iter().map(|key| key.to_line().to_string()).collect();
            std::fs::write(target.path("keys"), lines.join("\n")).expect("keys");
            let mode = std::fs::Permissions::from_mode(0o600);
            std::fs::set_permissions(target.path("keys"), mode).expect("keys");
            command.arg("--key-file").arg(target.path("keys"));
        }
        command.output().expect("vra-journal")
    };
    let extracted = extract(Some(&[&first, &second]));
    assert!(extracted.status.success(), "{}", String::from_utf8_lossy(&extracted.stderr));
    assert!(std::fs::read(target.path("extracted.raw")).expect("image") == as_tagged);
    for (keys, lacking) in [(None, &first), (Some(&[&second][..]), &first)] {
        let refused = extract(keys);
        let told = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && told.contains(&lacking.id().to_string()), "{told}");
    }
    // A key file that others can read is refused.
    std::fs::set_permissions(target.path("keys"), std::fs::Permissions::from_mode(0o644)).expect("keys");
    let mut command = Command::new(env!("CARGO_BIN_EXE_vra-journal"));
    let refused =
        command.arg("checkpoints").arg(&journal).arg("--key-file").arg(target.path("keys")).output();
    let refused = refused.expect("vra-journal");
    let told = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && told.contains("chmod 600"), "{told}");
}
