//! Disks that join a VM while its journal has history.
#![cfg(feature = "sim")]

mod sim_target;

use std::collections::BTreeSet;

use bytes::Bytes;
use journal::batch::Record;
use journal::storage::sim::Crash;
use journal::view::Reader;
use journal::writer::Change;
use uuid::Uuid;

use sim_target::{Site, Target, VOLUME_BYTES};

const WITH_TWO: &str = "{\"disks\":2}";

fn adding() -> Change {
    Change::AddVolumes {
        volumes: vec![(Uuid::from_u128(6), 2 * VOLUME_BYTES)],
        manifest: WITH_TWO.to_owned(),
    }
}

/// History of one disk; gives the cut of its checkpoint.
fn with_history(target: &mut Target<'_>) -> u64 {
    target.base_sync();
    target.write(0, &[1]);
    target.checkpoint("before");
    target.append();
    target.seq - 1
}

fn disks_at(site: &Site, seq: u64) -> usize {
    let reader = Reader::open(&mut site.disk.storage(), site.journal, &Default::default()).expect("readable");
    reader.view(seq).expect("in the history").volumes().count()
}

#[test]
fn what_was_recovered_before_a_disk_joined_does_not_have_it() {
    let site = Site::new(6);
    let mut target = site.target();
    let cut = with_history(&mut target);
    let end = target.seq;
    target.change(adding());
    assert_eq!([disks_at(&site, cut), disks_at(&site, end)], [1, 1]);
    let bytes: Bytes = vec![7; 4096].into();
    target.push(|seq| Record::write(seq, seq, 1, 4096, bytes));
    target.append();
    assert_eq!([disks_at(&site, cut), disks_at(&site, end), disks_at(&site, end + 1)], [1, 1, 2]);
    drop(target);
    let superblock = site.open().expect("open").superblock;
    let bases: Vec<u64> = superblock.volumes.iter().map(|volume| volume.base_seq).collect();
    assert_eq!(bases[1], end + 1, "{bases:?}");
}

/// Journal and manifest know of it at one moment, wherever the process ends.
#[test]
fn a_disk_joins_as_a_whole_or_not_at_all() {
    let mut seen = BTreeSet::new();
    for seed in 0..20 {
        for (crash, after_ops) in
            [Crash::Kill, Crash::PowerCut].into_iter().flat_map(|crash| (0..9).map(move |ops| (crash, ops)))
        {
            let site = Site::seeded(6, seed);
            let mut target = site.target();
            let cut = with_history(&mut target);
            let durable = target.writer.durable();
            site.disk.arm_crash(after_ops, crash);
            target.writer.change(adding()).expect("allowed");
            let lives = target.drive_or_die();
            drop(target);
            site.disk.disarm();
            site.disk.crash(crash);
            site.disk.fence();
            let opened = site.open().expect("open");
            let text = opened.manifest.expect("there was one").text;
            let at = format!("seed {seed}, {crash:?} after {after_ops}");
            match opened.superblock.volumes.len() {
                1 => assert!(text == "{}" && !lives, "{at}: {text}"),
                count => assert_eq!((count, text.as_str()), (2, WITH_TWO), "{at}"),
            }
            assert_eq!((opened.tail, disks_at(&site, cut)), (durable, 1), "{at}");
            seen.insert((opened.superblock.volumes.len(), lives));
        }
    }
    assert_eq!(seen, BTreeSet::from([(1, false), (2, false), (2, true)]));
}
