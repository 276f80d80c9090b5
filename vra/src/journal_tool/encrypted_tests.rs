//! Journals that are encrypted, with their key, without it, and with another one.

use std::path::PathBuf;
use std::process::ExitCode;

use journal::crypt::{Encryption, SiteKey, SiteKeys};
use journal::format::{PAGE_BYTES, SUPERBLOCK_OFFSETS};
use journal::writer::Change;
use serde_json::{Value, json};

use super::tests::{CleanUp, START_US, answer, call, datastore, failure, protected_by};
use super::verify;
use crate::view::test_journal::TestJournal;

/// Where something is written that is easy to find.
const PLACE: u64 = 1 << 20;
const PAYLOAD: [u8; 16384] = [0x5a; 16384];

/// A journal whose segments are encrypted but for the newest, with its site key in a file.
struct Sample {
    journal: TestJournal,
    cuts: Vec<u64>,
    site_key: SiteKey,
    key_file: String,
    store: PathBuf,
}

impl Sample {
    fn new(name: &str) -> Self {
        let site_key = SiteKey::random().expect("random");
        let (mut journal, mut cuts) = protected_by(Some(&site_key), name);
        journal.write(PLACE, PAYLOAD.to_vec());
        cuts.push(journal.checkpoint("encrypted", START_US + 600_000_000));
        journal.flush();
        let store = datastore(&journal).to_path_buf();
        let key_file = key_file(&journal, "site.key", &site_key);
        Self { journal, cuts, site_key, key_file, store }
    }

    fn store(&self) -> String {
        self.store.to_string_lossy().into_owned()
    }

    /// Extracts each checkpoint and compares it.
    fn assert_extracted(&self) {
        let out = self.journal.folder.join("out.img");
        for cut in &self.cuts {
            let (at, out_name) = (cut.to_string(), out.to_string_lossy());
            let arguments = ["extract", &self.store(), "--at", &at, "--out", &out_name, "--quiet", "--force"];
            call(&[&arguments[..], &["--key-file", &self.key_file]].concat()).expect("extracted");
            assert!(std::fs::read(&out).expect("image") == self.journal.model(*cut), "wrong bytes at {cut}");
        }
    }
}

fn key_file(journal: &TestJournal, name: &str, key: &SiteKey) -> String {
    let path = journal.folder.join(name);
    let text = format!("# a site's\n{}\n", *key.to_line());
    crate::config::write_atomic(&path, text.as_bytes(), 0o600).expect("written");
    path.to_string_lossy().into_owned()
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).expect("one object a line")).collect()
}

#[test]
fn with_its_key_an_encrypted_journal_is_as_any_other() {
    let mut sample = Sample::new("encrypted");
    let store = sample.store.clone();
    let _clean_up = CleanUp(&store);
    let bytes = std::fs::read(sample.journal.path()).expect("journal");
    assert!(!bytes.windows(64).any(|window| window == &PAYLOAD[..64]), "a payload is plain");
    assert!(!bytes.windows(9).any(|window| window == b"encrypted"), "a tag is plain");
    sample.assert_extracted();
    let key = ["--key-file", &sample.key_file];
    let store = sample.store();
    let list = answer(&[&["ls", &store, "--json"][..], &key].concat());
    assert_eq!(list["vpgs"][0]["checkpoints"], 4);
    assert_eq!(list["encrypted"], json!([]));
    let checkpoints = answer(&[&["checkpoints", &store, "--json"][..], &key].concat());
    assert_eq!(checkpoints["checkpoints"].as_array().map(Vec::len), Some(4));
    let (text, code) = call(&[&["verify", &store][..], &key].concat()).expect("checked");
    assert_eq!((format!("{code:?}"), text.contains("all whole")), (format!("{:?}", ExitCode::SUCCESS), true));

    // From now on nothing is encrypted: what is there stays so.
    sample.journal.change(Change::SetEncryption(Encryption::Off));
    sample.journal.write(0, vec![0x5b; 4096]);
    sample.cuts.push(sample.journal.checkpoint("plain", START_US + 700_000_000));
    sample.journal.flush();
    sample.assert_extracted();
    let site_key_id = sample.site_key.id().to_string();
    let facts = answer(&[&["inspect", &store, "--json"][..], &key].concat());
    assert_eq!(facts["encryption"]["method"], "none, but older segments may be");
    let segments = facts["segments"].as_array().expect("a list");
    let methods: Vec<&Value> = segments.iter().map(|segment| &segment["encryption"]["method"]).collect();
    assert_eq!((methods.first(), methods.last()), (Some(&&json!("AES-256-XTS")), Some(&&json!("none"))));
    assert_eq!(segments[0]["encryption"]["site_key_id"], site_key_id);
    let (text, _) = call(&[&["inspect", &store][..], &key].concat()).expect("described");
    assert!(text.contains(&format!("(site key {site_key_id})")), "{text}");
    let (text, _) = call(&[&["dump", &store][..], &key].concat()).expect("dumped");
    let dumped = lines(&text);
    let segment = dumped.iter().find(|line| line["type"] == "segment").expect("told");
    assert_eq!(
        (&segment["encryption"], &segment["site_key_id"]),
        (&json!("AES-256-XTS"), &json!(site_key_id))
    );
    assert!(segment["encryption_key_id"].is_string());
    assert_eq!(dumped.iter().filter(|line| line["type"] == "checkpoint").count(), 5);
}

#[test]
fn without_its_key_an_encrypted_journal_says_which_one_it_needs() {
    let sample = Sample::new("encrypted-locked");
    let _clean_up = CleanUp(&sample.store);
    let (store, site_key_id) = (sample.store(), sample.site_key.id().to_string());
    let other = key_file(&sample.journal, "other.key", &SiteKey::random().expect("random"));
    for key in [&[][..], &["--key-file", &other]] {
        let with_key = |arguments: &[&str]| -> Vec<String> {
            arguments.iter().chain(key).map(|argument| (*argument).to_owned()).collect()
        };
        let called = |arguments: &[&str]| {
            let arguments = with_key(arguments);
            call(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
        };
        let (text, _) = called(&["ls", &store]).expect("listed");
        assert!(
            text.contains("VM db ") && text.contains("of VPG shop") && text.contains("encrypted:"),
            "{text}"
        );
        assert!(text.contains(&format!("site key {site_key_id}")) && text.contains("--key-file"), "{text}");
        let (text, _) = called(&["ls", &store, "--json"]).expect("listed");
        let list: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(list["encrypted"][0]["site_key_id"], site_key_id);
        assert_eq!(list["unreadable"], json!([]));

        let (text, _) = called(&["inspect", &store]).expect("described");
        assert!(text.contains("encryption    AES-256-XTS, key ") && text.contains("locked "), "{text}");
        let (text, _) = called(&["inspect", &store, "--json"]).expect("described");
        let facts: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!((&facts["vm"], &facts["vpg"]), (&json!("db"), &json!("shop")));
        assert_eq!((&facts["locked_by_site_key"], &facts["newest_seq"]), (&json!(site_key_id), &Value::Null));
        assert_eq!(facts["segments"][0]["encryption"]["site_key_id"], site_key_id);

        let out = sample.journal.folder.join("out.img").to_string_lossy().into_owned();
        for arguments in [
            &["verify", &store][..],
            &["checkpoints", &store],
            &["dump", &store],
            &["extract", &store, "--at", "latest", "--out", &out],
            &["extract", &store, "--at", "latest", "--vm", "db", "--out", &out],
            &["extract", &store, "--at", "latest", "--vpg", "shop", "--out-dir", &out],
        ] {
            let error = called(arguments).expect_err("locked");
            let text = crate::report::chain(error.as_ref());
            assert!(
                text.contains(&format!("needs site key {site_key_id}")) && text.contains("--key-file"),
                "{arguments:?}: {text}"
            );
        }
    }
    assert!(failure(&["verify", &store, "--key-file", &other]).contains("not among the keys"));

    // All that is plain is dumped nevertheless.
    let mut out = Vec::new();
    super::dump::run(&sample.journal.path(), &SiteKeys::default(), false, &mut out)
        .expect_err("not all of it");
    let dumped = lines(&String::from_utf8(out).expect("text"));
    assert_eq!(dumped.iter().filter(|line| line["type"] == "superblock").count(), 2);
    let segment = dumped.iter().find(|line| line["type"] == "segment").expect("told");
    assert_eq!(segment["site_key_id"], site_key_id);
    assert_eq!(dumped.last().expect("an end")["type"], "end");
}

#[test]
fn without_superblocks_an_encrypted_journal_needs_nothing_but_its_key() {
    let mut sample = Sample::new("encrypted-rebuilt");
    let store = sample.store.clone();
    let _clean_up = CleanUp(&store);
    sample.journal.change(Change::Seal);
    sample.journal.write(0, vec![0x5b; 4096]);
    sample.cuts.push(sample.journal.checkpoint("last", START_US + 700_000_000));
    sample.journal.flush();
    let mut bytes = std::fs::read(sample.journal.path()).expect("journal");
    for place in SUPERBLOCK_OFFSETS {
        bytes[place as usize..place as usize + PAGE_BYTES].fill(0x5a);
    }
    std::fs::write(sample.journal.path(), &bytes).expect("journal");
    sample.assert_extracted();
    let keys = SiteKeys::new(vec![sample.site_key.clone()]);
    let report = verify::check(&sample.journal.path(), &keys).expect("readable");
    assert_eq!(report.damage.len(), 2, "{report:?}");

    let (store, site_key_id) = (sample.store(), sample.site_key.id().to_string());
    for command in ["verify", "checkpoints", "dump", "inspect"] {
        let text = failure(&[command, &store]);
        assert!(text.contains(&format!("needs site key {site_key_id}")), "{command}: {text}");
    }
    let list = answer(&["ls", &store, "--json"]);
    assert_eq!(list["encrypted"][0]["site_key_id"], site_key_id);
    assert_eq!(
        (&list["encrypted"][0]["vm_name"], &list["encrypted"][0]["vpg_name"]),
        (&json!("db"), &json!("shop"))
    );
}
