//! `kill -9` of a target under load, again and again.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hwtests::durability::check::{check, verify};
use hwtests::durability::load::Load;
use hwtests::durability::source::Source;
use hwtests::durability::target::{Target, TargetProgram};
use rand::RngExt;

/// How many: ten, or with `HOLDFAST_LONG` two hundred.
fn kill_count() -> u64 {
    if std::env::var_os("HOLDFAST_LONG").is_some() { 200 } else { 10 }
}

/// Records that are sent at once, about a MiB.
const RECORDS_AT_ONCE: u64 = 64;

/// Every so many kills meet the target while it starts.
const STARTING_EVERY: u64 = 4;

/// Space for the journal, in bytes: for all records of two hundred kills.
const JOURNAL_LIMIT_BYTES: u64 = 1 << 30;

const PATIENCE: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_killed_at_any_moment_keeps_what_it_acknowledged() {
    let folder = Folder::new();
    let datastore = folder.0.join("datastore");
    std::fs::create_dir(&datastore).expect("datastore");
    let load = Load::new(rand::random()).with_journal_limit(JOURNAL_LIMIT_BYTES);
    let program = TargetProgram::Product(built("vra"));
    let (mut target, link) = Target::create(load, &folder.0, &datastore, &program).expect("made");
    let started = Instant::now();
    target.start().expect("started");
    target.wait_until_up().expect("up");
    let start_takes = started.elapsed();
    target.define().await.expect("defined");
    let source = Source::start(load, target.definition(), link, |_| ());

    let (mut seen_through, mut interrupted) = (0, 0);
    for kill in 1..=kill_count() {
        if kill.is_multiple_of(STARTING_EVERY) {
            tokio::time::sleep(start_takes.mul_f64(1.2 * rand::random::<f64>())).await;
        } else {
            target.wait_until_up().expect("up again");
            source.target_is_up().await;
            load_until_some_moment(&source).await;
        }
        target.kill().expect("killed while it ran");
        source.target_is_down();
        let (acknowledged, published) = (source.durable_through(), source.published_through());
        match check(target.definition(), load, (acknowledged, published), seen_through) {
            Ok(found) => interrupted += u64::from(found.through < published),
            Err(error) => panic!("kill {kill}: {:#}\n{}", anyhow::Error::from(error), target.log()),
        }
        seen_through = acknowledged;
        target.start().expect("started again");
    }
    // What was sent and isn't there would have been missed, had it been acknowledged too early.
    assert!(interrupted > 0, "no kill met a target that hadn't written all");

    target.wait_until_up().expect("up at the end");
    source.target_is_up().await;
    let last = source.published_through().max(Load::sync_end()) + 1;
    if let Err(error) = source.run_through(last, RECORDS_AT_ONCE, PATIENCE).await {
        panic!("{error:#}\n{}", target.log());
    }
    target.stop().expect("stopped");
    let found = check(target.definition(), load, (last, last), 0).expect("all is there");
    assert!(!found.is_base_sync && found.through == last, "{found:?}");
    verify(&built("vra-journal"), Load::folder(target.definition()).path()).expect("nothing is damaged");
    let story = source.story();
    assert_eq!(story.beginnings, 1, "a full sync began again: {story:?}");
    assert_eq!(story.trouble, Vec::<String>::new());
    let log = target.log();
    let complaints: Vec<&str> =
        log.lines().filter(|line| line.contains(" WARN ") || line.contains("ERROR")).collect();
    assert!(complaints.is_empty(), "{complaints:#?}");
}

/// Sends in small steps until a random one of the next records is acknowledged, then many at once, of which some come through.
async fn load_until_some_moment(source: &Source) {
    let first = source.durable_through();
    let moment = rand::rng().random_range(first..first + RECORDS_AT_ONCE);
    let deadline = Instant::now() + PATIENCE;
    while source.durable_through() < moment {
        assert!(Instant::now() < deadline, "record {moment} is not acknowledged: {:?}", source.story());
        source.publish(source.durable_through() + rand::rng().random_range(1..=8));
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    source.publish(source.durable_through() + RECORDS_AT_ONCE);
    tokio::time::sleep(Duration::from_micros(rand::rng().random_range(0..4000))).await;
}

/// A program that was built together with this test.
fn built(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_durability")).with_file_name(name);
    assert!(path.exists(), "{} is missing: run `cargo build --workspace --bins`", path.display());
    path
}

struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        let path = std::env::temp_dir().join(format!("holdfast-kills-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a scratch folder");
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
