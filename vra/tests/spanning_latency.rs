//! What checkpoints of a group on three hosts cost its guests: writes at a fixed load with a checkpoint every second, beside the same without.

mod common;

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ::vra::api::DoorAddress;
use common::TestCa;
use common::nbd::NbdClient;
use common::pair::apply;
use common::spanning::Site;
use common::vra::Vra;

/// Between two writes of a VM. They come by the clock, whether those before have been answered or not.
const EVERY: Duration = Duration::from_millis(5);

/// Length of a write, in bytes.
const WRITE_BYTES: u64 = 4096;

/// Of the disk that is written over and over, in writes.
const PLACES: u64 = 1024;

/// A 99th percentile with checkpoints is at most so many times that without.
const MOST_TIMES: f64 = 1.2;

/// No checkpoint comes within a phase.
const OFF_MS: u32 = 3_600_000;

struct Effort {
    pairs: usize,
    phase: Duration,
}

#[tokio::test(flavor = "multi_thread")]
async fn guests_hardly_notice_a_checkpoint_every_second() {
    let is_long = std::env::var_os("HOLDFAST_LONG").is_some();
    let effort = if is_long {
        Effort { pairs: 7, phase: Duration::from_secs(15) }
    } else {
        Effort { pairs: 1, phase: Duration::from_secs(3) }
    };
    let ca = TestCa::new();
    let mut site = site(&ca).await;
    let mut ratios = Vec::new();
    for pair in 0..effort.pairs {
        let (off, _) = phase(&mut site, OFF_MS, effort.phase).await;
        let (on, checkpoints) = phase(&mut site, 1_000, effort.phase).await;
        let ratio = on.p99_us as f64 / off.p99_us as f64;
        println!("pair {pair}: without {off:?}; with {checkpoints} checkpoints {on:?}; {ratio:.2} times");
        assert!(checkpoints + 2 >= effort.phase.as_secs() as usize, "{checkpoints} checkpoints");
        ratios.push(ratio);
    }
    for source in &site.sources {
        println!("{} held: {:?}", source.id, source.status().await.source_vms[0].hold);
    }
    ratios.sort_by(f64::total_cmp);
    let median = ratios[ratios.len() / 2];
    println!("99th percentile of writes: {median:.2} times that without checkpoints (median of the pairs)");
    assert!(!is_long || median <= MOST_TIMES, "{ratios:?}");
}

/// Disks and datastores are in memory: what a checkpoint costs is asked, and a disk that stalls for as long as a hundred holds hides it.
async fn site(ca: &TestCa) -> Site {
    let start =
        |name: String| Vra::start_in_memory(&format!("latency-{name}"), ca, Ipv4Addr::LOCALHOST.into());
    let sources = (0..3).map(|number| start(format!("s{number}"))).collect();
    let targets = (0..2).map(|number| start(format!("t{number}"))).collect();
    Site::of(sources, targets, |_, _| {}).await
}

/// How long writes took.
#[derive(Debug)]
#[allow(dead_code, reason = "printed")]
struct Times {
    writes: usize,
    median_us: u64,
    p99_us: u64,
    max_us: u64,
}

/// All VMs write, with a checkpoint each so many milliseconds. Says how many checkpoints came.
async fn phase(site: &mut Site, interval_ms: u32, lasts: Duration) -> (Times, usize) {
    site.definition.revision += 1;
    site.definition.checkpoint_interval_ms = interval_ms;
    for vra in site.targets.iter().chain(&site.sources) {
        apply(vra, &site.definition).await;
    }
    if interval_ms != OFF_MS {
        let newest = site.offered().await.pop().map_or(0, |info| info.time_us.0);
        site.wait_for_newer(newest).await;
    }
    let before = site.offered().await.len();
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = site.doors.iter().map(|door| write(door.clone(), Arc::clone(&stop))).collect();
    tokio::time::sleep(lasts).await;
    stop.store(true, Ordering::Release);
    let mut times_us: Vec<u64> =
        writers.into_iter().flat_map(|writer| writer.join().expect("all were written")).collect();
    times_us.sort_unstable();
    let at = |percent: usize| times_us[(times_us.len() - 1) * percent / 100];
    let times = Times { writes: times_us.len(), median_us: at(50), p99_us: at(99), max_us: at(100) };
    (times, site.offered().await.len() - before)
}

/// Writes until it is told to stop. Gives how long each write took from when it was due, in µs.
fn write(door: DoorAddress, stop: Arc<AtomicBool>) -> JoinHandle<Vec<u64>> {
    std::thread::spawn(move || {
        let mut disk = NbdClient::connect(&door).expect("a disk");
        let data = [7; WRITE_BYTES as usize];
        let (began, mut times_us) = (Instant::now(), Vec::new());
        for number in 0_u32.. {
            let due = began + EVERY * number;
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            if stop.load(Ordering::Acquire) {
                break;
            }
            disk.write(u64::from(number) % PLACES * WRITE_BYTES, &data).expect("a write");
            times_us.push(u64::try_from(due.elapsed().as_micros()).expect("µs"));
        }
        times_us
    })
}
