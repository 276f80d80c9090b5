//! From a guest's write to the durable acknowledgement, on this host: capture, checksums, TLS, QUIC, O_DIRECT and fdatasync.

mod guest;
mod raw_quinn;
mod replication;

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use bytes::Bytes;

use super::site_ca::SiteCa;
use super::{BenchPlace, Benchmark, Better, Pair, in_turn};
use crate::relay::Relay;
use crate::suite::context::Context;
use replication::Replication;

pub(super) const BENCHMARKS: &[Benchmark] = &[
    Benchmark {
        name: "ship",
        what: "64 KiB writes of a guest, depth 32, from the first one until the last is durable in the target's journal",
        peer: "raw quinn",
        unit: "MiB/s",
        better: Better::Higher,
        gate: Some(0.6),
        place: BenchPlace::Host,
        programs: &[],
        pair: beside_quinn,
    },
    Benchmark {
        name: "ship-disk",
        what: "the same run beside the journal's own disk",
        peer: "fio, O_DIRECT",
        unit: "MiB/s",
        better: Better::Higher,
        gate: None,
        place: BenchPlace::Host,
        programs: &["fio"],
        pair: beside_fio,
    },
    Benchmark {
        name: "link-late",
        what: "a stream over a line that delays each datagram by up to 50 ms and loses 1 %, with the product's QUIC parameters",
        peer: "quinn's defaults",
        unit: "MiB/s",
        better: Better::Higher,
        gate: None,
        place: BenchPlace::Host,
        programs: &[],
        pair: over_a_late_line,
    },
];

/// What one run writes.
const RUN_BYTES: u64 = 1 << 30;

/// What one run over a late line sends.
const LATE_RUN_BYTES: u64 = 1 << 20;

/// How late a datagram may be there.
const LATE: Duration = Duration::from_millis(50);

/// Length of one write of the guest.
const WRITE_BYTES: usize = 64 << 10;

/// Random bytes that the guest's writes are taken from: many times the processor's cache, so that they come from memory as a guest's do.
const PAYLOAD_BYTES: usize = 128 << 20;

/// fio syncs after each four of its 1 MiB writes: the journal gathers between one batch (about 1 MiB) and 8 MiB for one sync.
const FIO_SYNC_EVERY: &str = "--fdatasync=4";

fn beside_quinn(context: &mut Context, number: u32) -> Result<Pair> {
    let payload = Payload::random();
    let ca = SiteCa::create(&context.path(&format!("pki-{number}")))?;
    in_turn(
        number,
        || replicate(context, &ca, &payload),
        || {
            let transport = raw_quinn::best_on_loopback();
            let run = raw_quinn::Run { ca: &ca, payload: &payload, len_bytes: RUN_BYTES, transport };
            Ok(rate(run.send(Ok)?))
        },
    )
}

fn over_a_late_line(context: &mut Context, number: u32) -> Result<Pair> {
    let payload = Payload::random();
    let ca = SiteCa::create(&context.path(&format!("pki-{number}")))?;
    let late = |transport| {
        let run = raw_quinn::Run { ca: &ca, payload: &payload, len_bytes: LATE_RUN_BYTES, transport };
        let mut relay = None;
        let elapsed = run.send(|server| {
            let line = relay.insert(Relay::start(server, number.into())?);
            line.delay_up_to(LATE);
            line.lose_permille(10);
            Ok(line.address())
        })?;
        Ok((LATE_RUN_BYTES as f64 / f64::from(1 << 20)) / elapsed.as_secs_f64())
    };
    in_turn(number, || late(vra::link::transport_config()), || late(Arc::default()))
}

fn beside_fio(context: &mut Context, number: u32) -> Result<Pair> {
    let payload = Payload::random();
    let ca = SiteCa::create(&context.path(&format!("pki-{number}")))?;
    in_turn(number, || replicate(context, &ca, &payload), || fio(context))
}

fn replicate(context: &Context, ca: &SiteCa, payload: &Payload) -> Result<f64> {
    let folder = context.path("ship");
    std::fs::create_dir(&folder)?;
    let replication = Replication::start(ca, &folder)?;
    let elapsed = guest::write_all(&replication, payload)?;
    replication.stop()?;
    std::fs::remove_dir_all(&folder)?;
    Ok(rate(elapsed))
}

fn fio(context: &Context) -> Result<f64> {
    let file = context.path("fio.raw");
    let report = context.fio(&[
        &format!("--filename={}", file.display()),
        &format!("--size={RUN_BYTES}"),
        "--rw=write",
        "--bs=1M",
        "--ioengine=io_uring",
        "--iodepth=8",
        "--direct=1",
        "--fallocate=native",
        "--refill_buffers",
        FIO_SYNC_EVERY,
        "--end_fsync=1",
    ])?;
    std::fs::remove_file(file)?;
    Ok(report.bytes_per_s / f64::from(1 << 20))
}

fn rate(elapsed: Duration) -> f64 {
    (RUN_BYTES >> 20) as f64 / elapsed.as_secs_f64()
}

/// What is written, by both sides of a comparison.
struct Payload(Bytes);

impl Payload {
    fn random() -> Self {
        let mut bytes = vec![0; PAYLOAD_BYTES];
        rand::fill(&mut bytes[..]);
        Self(bytes.into())
    }

    /// The bytes of a run from `offset_bytes` on, which with `len_bytes` must not cross a multiple of [`PAYLOAD_BYTES`].
    fn part(&self, offset_bytes: u64, len_bytes: usize) -> Bytes {
        let start = (offset_bytes % PAYLOAD_BYTES as u64) as usize;
        self.0.slice(start..start + len_bytes)
    }
}

/// A runtime as the daemon has one: each end of a link is a process of its own in real life.
fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().context("starting a runtime")
}
