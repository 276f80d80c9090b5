//! Full syncs of real files by the thread, beside a writer.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use journal::batch::RecordKind;
use ublk::arena::Arena;
use ublk::serve::{Disk, Geometry, Wake};

use super::*;
use crate::capture::ProtectedDisk;
use crate::capture::numbering::{
    ByteRange, Consumer, CoreLimits, NewWrite, Offer, Received, VmCore, Wakeups, ring,
};
use crate::capture::payload::{DENSE_CHUNK_BYTES, DenseWriter};

const SIZE_BYTES: u64 = 6 << 20;

struct NoBell;

impl Wake for NoBell {
    fn wake(&self) {}
}

/// A file with data, written zeroes and holes, opened for direct I/O where the filesystem has it.
fn disk(name: &str) -> Arc<ProtectedDisk> {
    let path = std::env::temp_dir().join(format!("capture-sync-{name}-{}", std::process::id()));
    let make = |flags| {
        File::options().read(true).write(true).create(true).truncate(true).custom_flags(flags).open(&path)
    };
    let file = make(libc::O_DIRECT).or_else(|_| make(0)).expect("a file");
    std::fs::remove_file(&path).expect("removed");
    file.set_len(SIZE_BYTES).expect("sized");
    let arena = Arena::new(1 << 20, 1).expect("arena");
    let mut data = arena.take().expect("a slot");
    data.fill(0x5a);
    file.write_all_at(&data, 1 << 20).expect("written");
    data.fill(0);
    file.write_all_at(&data, 3 << 20).expect("written");
    data[..4096].fill(0x77);
    file.write_all_at(&data[..4096], SIZE_BYTES - 4096).expect("written");
    let geometry = Geometry {
        size_bytes: SIZE_BYTES,
        logical_block_bytes: 4096,
        physical_block_bytes: 4096,
        volatile_cache: true,
        fua: true,
        read_only: false,
        discard: None,
        write_zeroes: None,
    };
    Arc::new(ProtectedDisk::new(file, geometry, Arc::new(|| 1)))
}

fn begin(disk: &Arc<ProtectedDisk>, fresh_image: bool) -> (Arc<VmCore>, Consumer, SyncThread) {
    let (producer, consumer) = ring(1024, 1);
    let limits = CoreLimits { writes_in_flight: 16, retained_bytes: 8 << 20 };
    let core = Arc::new(VmCore::new(producer, limits, 1, 1 << 20));
    core.with(|core, wakeups| {
        core.add_volume();
        core.start_streaming().expect("an empty ring");
        core.begin_sync(3, &[(0, SIZE_BYTES)], 0, wakeups).expect("streaming");
    });
    let volume = SyncVolume { volume: 0, size_bytes: SIZE_BYTES, block_bytes: 4096 };
    let job = SyncJob {
        name: "test".into(),
        core: core.clone(),
        disks: vec![disk.clone()],
        sync: FullSync::new(3, vec![volume], fresh_image, SyncLimits::STANDARD),
    };
    let thread = SyncThread::start(job).expect("memory and a thread");
    (core, consumer, thread)
}

/// Takes what is published into `image`, and frees it. Says whether the sync's end was among it.
fn ship(consumer: &mut Consumer, image: &mut [u8]) -> bool {
    let mut ended = false;
    let next_seq = consumer.walk(0, |entry| {
        let range = entry.offset_bytes as usize..(entry.offset_bytes + entry.len_bytes) as usize;
        match entry.kind {
            RecordKind::SyncData | RecordKind::Write => {
                image[range].copy_from_slice(&entry.to_record().payload);
            }
            RecordKind::Zeroes => image[range].fill(0),
            RecordKind::SyncEnd => ended = true,
            _ => {}
        }
        true
    });
    consumer.free_through(next_seq - 1);
    ended
}

fn ship_all(consumer: &mut Consumer, image: &mut [u8]) {
    let patience = Instant::now() + Duration::from_secs(60);
    while !ship(consumer, image) {
        assert!(Instant::now() < patience, "the sync ends");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn content(disk: &ProtectedDisk) -> Vec<u8> {
    let arena = Arena::new(SIZE_BYTES as usize, 1).expect("arena");
    let mut data = arena.take().expect("a slot");
    disk.files()[0].read_exact_at(&mut data, 0).expect("read");
    data.to_vec()
}

#[test]
fn everything_comes_over_and_holes_only_where_they_matter() {
    let disk = disk("whole");
    let mut used_image = vec![0xff; SIZE_BYTES as usize];
    let (_core, mut consumer, thread) = begin(&disk, false);
    ship_all(&mut consumer, &mut used_image);
    assert!(used_image == content(&disk));
    let counts = thread.counts();
    assert_eq!((counts.done_bytes, counts.total_bytes), (SIZE_BYTES, SIZE_BYTES));
    assert!((1 << 20..3 << 20).contains(&counts.data_bytes), "written zeroes are not sent: {counts:?}");

    let mut fresh_image = vec![0; SIZE_BYTES as usize];
    let (_core, mut consumer, _thread) = begin(&disk, true);
    ship_all(&mut consumer, &mut fresh_image);
    assert!(fresh_image == content(&disk));
}

#[test]
fn a_writer_beside_it_loses_nothing() {
    let disk = disk("beside");
    let (core, mut consumer, thread) = begin(&disk, false);
    let mut image = vec![0xff; SIZE_BYTES as usize];
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let lane = core.add_lane(Arc::new(NoBell));
            let mut dense = DenseWriter::new(Arena::new(DENSE_CHUNK_BYTES, 64).expect("arena"));
            let slot = Arena::new(4096, 1).expect("arena").take();
            let (mut slot, wakeups) = (slot.expect("a slot"), &mut Wakeups::default());
            for n in 0_u64.. {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let at = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) % (SIZE_BYTES / 4096) * 4096;
                slot.fill(n as u8);
                let range = ByteRange::new(at, 4096);
                let Some(piece) = dense.copy(&slot) else { continue };
                let new = NewWrite { lane, token: n, volume: 0, range };
                match core.receive(&new, &mut Offer::Data(piece), 0, wakeups) {
                    Received::Issue(ticket) => {
                        disk.files()[0].write_all_at(&slot, at).expect("written");
                        core.landed(ticket, true, wakeups);
                    }
                    Received::Deferred => {}
                    other => panic!("{other:?}"),
                }
            }
        });
        ship_all(&mut consumer, &mut image);
        stop.store(true, Ordering::Relaxed);
    });
    ship(&mut consumer, &mut image);
    assert!(image == content(&disk));
    assert_eq!(thread.counts().done_bytes, SIZE_BYTES);
}

#[test]
fn a_sync_that_is_dropped_or_overtaken_by_an_overflow_ends() {
    let disk = disk("dropped");
    let (core, _consumer, thread) = begin(&disk, false);
    drop(thread);
    assert_eq!(core.with(|core, _| core.sync_id()), Some(3), "its end was never published");

    let (core, _consumer, thread) = begin(&disk, false);
    let reason = crate::capture::modes::OverflowReason::Requested;
    core.with(|core, wakeups| core.overflow(reason, wakeups));
    let patience = Instant::now() + Duration::from_secs(20);
    while !thread.is_over() {
        assert!(Instant::now() < patience, "it is aborted");
        std::thread::sleep(Duration::from_millis(1));
    }
}
