use std::process::ExitCode;

use journal::writer::Change;
use serde_json::{Value, json};

use super::EXIT_DAMAGED;
use super::tests::{CleanUp, START_US, call, datastore, protected};
use crate::view::test_journal::TestJournal;

fn dump(arguments: &[&str]) -> (Vec<Value>, ExitCode) {
    let (text, code) = call(arguments).expect("dumped");
    (text.lines().map(|line| serde_json::from_str(line).expect("one object a line")).collect(), code)
}

fn of<'a>(lines: &'a [Value], kind: &str) -> Vec<&'a Value> {
    lines.iter().filter(|line| line["type"] == kind).collect()
}

#[test]
fn a_dump_tells_all_parts_in_order_and_no_payload() {
    let (mut journal, cuts) = protected("dump");
    let store = datastore(&journal).to_path_buf();
    let _clean_up = CleanUp(&store);
    journal.change(Change::Seal);
    journal.write(4096, vec![0x77; 8192]);
    let last_seq = journal.seq;
    journal.checkpoint("last", START_US + 600_000_000);
    journal.flush();
    let store = store.to_string_lossy().into_owned();
    let (lines, code) = dump(&["dump", &store, "--records"]);
    assert_eq!(format!("{code:?}"), format!("{:?}", ExitCode::SUCCESS));
    let order = ["superblock", "manifest", "segment", "end"];
    let firsts = order.map(|kind| lines.iter().position(|line| line["type"] == kind).expect(kind));
    assert!(firsts.is_sorted(), "{firsts:?}");
    let superblocks = of(&lines, "superblock");
    assert_eq!(superblocks.len(), 2);
    assert_eq!(superblocks.iter().filter(|copy| copy["counts"] == true).count(), 1);
    assert_eq!(superblocks[0]["volumes"][0]["size_bytes"], super::tests::SIZE_BYTES);
    let manifest = of(&lines, "manifest").into_iter().find(|manifest| manifest["counts"] == true);
    assert_eq!(manifest.expect("one counts")["content"]["vpg"]["name"], "shop");
    let sealed: Vec<&Value> = of(&lines, "segment").into_iter().map(|segment| &segment["sealed"]).collect();
    assert_eq!((sealed.first(), sealed.last()), (Some(&&json!(true)), Some(&&json!(false))));
    let seqs: Vec<u64> = of(&lines, "record")
        .iter()
        .filter_map(|record| record["seq"].as_u64().filter(|seq| *seq > 0))
        .collect();
    assert_eq!(seqs.last(), Some(&journal.seq));
    assert!(seqs.windows(2).all(|pair| pair[0] + 1 == pair[1]), "{seqs:?}");
    let last = of(&lines, "record").into_iter().find(|record| record["seq"] == last_seq).expect("it is told");
    assert_eq!(
        (&last["kind"], &last["offset_bytes"], &last["len_bytes"]),
        (&json!("write"), &json!(4096), &json!(8192))
    );
    let crc = crc32c::crc32c(&[0x77; 4096]);
    assert_eq!((&last["payload_len_bytes"], &last["payload_crcs"]), (&json!(8192), &json!([crc, crc])));
    let place = last["payload_file_offset_bytes"].as_u64().expect("a place") as usize;
    assert_eq!(std::fs::read(journal.path()).expect("journal")[place..place + 8192], [0x77; 8192]);
    let checkpoints = of(&lines, "checkpoint");
    let told: Vec<&Value> = checkpoints.iter().map(|checkpoint| &checkpoint["cut"]).collect();
    assert_eq!(told[..3], cuts.iter().map(|cut| json!(cut)).collect::<Vec<_>>().iter().collect::<Vec<_>>());
    assert!(checkpoints.iter().all(|checkpoint| checkpoint["can_be_opened"] == true));
    assert_eq!((&checkpoints[3]["tag"], &checkpoints[3]["kind"]), (&json!("last"), &json!("tagged")));
    assert!(
        checkpoints[3]["id"].as_str().is_some_and(|id| id.starts_with("0000000000000000000000000000004d-"))
    );
    let end = lines.last().expect("an end");
    assert_eq!((&end["checkpoints"], &end["damage"]), (&json!(4), &json!(0)));
    assert_eq!(end["records"].as_u64(), Some(of(&lines, "record").len() as u64));
    let (brief, _) = dump(&["dump", &store]);
    assert_eq!(of(&brief, "record").len(), 0);
    assert_eq!(of(&brief, "batch"), of(&lines, "batch"));
    assert_eq!(brief.last(), Some(end));
}

#[test]
fn damage_is_an_object_and_what_is_behind_it_is_told() {
    let (mut journal, _) = protected("dump-damage");
    let store = datastore(&journal).to_path_buf();
    let _clean_up = CleanUp(&store);
    journal.write(0, vec![0x5c; 16384]);
    let damaged_seq = journal.seq;
    journal.flush();
    journal.write(65536, vec![0x5d; 4096]);
    let behind_seq = journal.seq;
    journal.flush();
    journal.change(Change::Seal);
    let path = journal.path();
    TestJournal::flip_bit(&path, &[0x5c; 16384], 5000);
    let mut bytes = std::fs::read(&path).expect("journal");
    bytes[100] ^= 1;
    std::fs::write(&path, &bytes).expect("journal");
    let store = store.to_string_lossy().into_owned();
    let (lines, code) = dump(&["dump", &store, "--records"]);
    assert_eq!(format!("{code:?}"), format!("{:?}", ExitCode::from(EXIT_DAMAGED)));
    let damage = of(&lines, "damage");
    assert_eq!(damage.len(), 2, "{damage:?}");
    assert_eq!((&damage[0]["file_offset_bytes"], &damage[0]["seq"]), (&json!(0), &Value::Null));
    assert_eq!(damage[1]["seq"], damaged_seq);
    let record = |seq: u64| of(&lines, "record").into_iter().find(|record| record["seq"] == seq).cloned();
    assert_eq!(record(damaged_seq).expect("told")["damaged"], true);
    assert_eq!(record(behind_seq).expect("told")["damaged"], false);
    assert_eq!(lines.last().expect("an end")["damage"], 2);

    // Both superblocks gone.
    bytes[(64 << 10) + 100] ^= 1;
    std::fs::write(&path, &bytes).expect("journal");
    let (lines, code) = dump(&["dump", &store, "--records"]);
    assert_eq!(format!("{code:?}"), format!("{:?}", ExitCode::from(EXIT_DAMAGED)));
    assert!(of(&lines, "record").iter().any(|record| record["seq"] == behind_seq));
    assert_eq!(of(&lines, "checkpoint").len(), 3);
}
