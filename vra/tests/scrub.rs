//! The scrub of journals that nobody reads.

mod common;

use std::os::unix::fs::FileExt;

use ::vra::api::VraStatus;
use common::TestCa;
use common::pair::{apply, door, pattern, streaming_pair, tag, wait_for_checkpoint};
use common::vra::qemu_io;

#[tokio::test]
async fn the_scrub_names_what_is_damaged_and_nothing_else() {
    let ca = TestCa::new();
    let Some((source, mut target, volumes, mut definition)) = streaming_pair("scrub", &ca).await else {
        return;
    };
    // Short segments, so that some are full soon.
    target.kill();
    target.add_config("[scrub]\nmib_per_s = 1000\ncold_after_s = 0\npass_every_s = 1\n");
    target.serve();
    target.wait_for("open", |status| status.target_vms.iter().any(|vm| vm.connected)).await;
    definition.revision += 1;
    apply(&target, &definition).await;
    apply(&source, &definition).await;
    for byte in 0x21..0x27 {
        qemu_io(&door(&volumes[0]), &pattern(byte, 0, 8 << 10));
        // Not more than the source's memory holds.
        let tagged = tag(&source, definition.id, &format!("after {byte}")).await;
        wait_for_checkpoint(&target, definition.id, tagged.id).await;
    }
    let passed = |status: &VraStatus| {
        status.target_vms[0]
            .scrub
            .is_some_and(|scrub| scrub.segments > 0 && scrub.last_pass_ended_us.is_some())
    };
    let status = target.wait_for("a pass", passed).await;
    assert_eq!(status.target_vms[0].scrub.map(|scrub| scrub.damaged_segments), Some(0));
    assert!(!status.alerts.iter().any(|alert| alert.code == "journal-damaged"), "{:?}", status.alerts);

    let path = status.target_vms[0].folder.join("journal.hfj");
    let bytes = std::fs::read(&path).expect("journal");
    let place =
        bytes.chunks(4096).position(|page| page.iter().all(|byte| *byte == 0x21)).expect("written") * 4096;
    let file = std::fs::File::options().write(true).open(&path).expect("journal");
    file.write_all_at(&[0x20], place as u64 + 700).expect("damaged");
    let told = |status: &VraStatus| status.alerts.iter().any(|alert| alert.code == "journal-damaged");
    let status = target.wait_for("told", told).await;
    let alert = status.alerts.iter().find(|alert| alert.code == "journal-damaged").expect("told");
    assert!(
        alert.message.contains("1 damaged places in 1 segments") && alert.message.contains("record "),
        "{alert:?}"
    );
    assert!(alert.message.contains("checksum of disk 0"), "{alert:?}");

    file.write_all_at(&[0x21], place as u64 + 700).expect("mended");
    target.wait_for("over", |status| !told(status)).await;
}
