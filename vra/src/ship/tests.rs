//! The sender against a scripted target.

use bytes::{Bytes, BytesMut};
use journal::batch::{BatchView, Checkpoint, CheckpointKind, Epoch, Record};
use uuid::Uuid;

use super::*;
use crate::api::{GenerationId, JournalId, VmId, VolumeId, VpgId};
use crate::clock::Now;
use crate::wire::{Ack, Frame, Grant, Refuse, RefuseCode, VolumeShape};

struct World {
    now_us: u64,
    ring: PlainRing,
    sender: Sender,
}

fn generation(first_seq: u64) -> GenerationStart {
    GenerationStart { generation: GenerationId::random(), ancestors: Vec::new(), first_seq }
}

impl World {
    fn new() -> Self {
        let volumes = vec![VolumeShape {
            volume: 0,
            id: VolumeId::random(),
            logical_block_bytes: 512,
            size_bytes: 1 << 30,
            left: false,
        }];
        let identity = StreamIdentity {
            vm: VmId::random(),
            vpg: VpgId::random(),
            journal: JournalId(Uuid::from_u128(5)),
            volumes,
        };
        let sender = Sender::new(identity, generation(1), SenderLimits::STANDARD, 1);
        Self { now_us: 1_000_000, ring: PlainRing::new(1), sender }
    }

    fn now(&self) -> Now {
        Now { mono_us: self.now_us, wall_us: self.now_us }
    }

    fn write(&mut self, len_bytes: usize) {
        let seq = self.ring.published_through() + 1;
        let payload = Bytes::from(vec![seq as u8; len_bytes]);
        self.ring.publish(Record::write(seq, self.now_us, 0, 0, payload));
    }

    fn checkpoint(&mut self) {
        let seq = self.ring.published_through() + 1;
        let checkpoint = Checkpoint {
            epoch: Epoch { nonce: Uuid::from_u128(1), counter: 1 },
            cut: seq - 1,
            member_set_version: 1,
            time_us: self.now_us,
            kind: CheckpointKind::Automatic,
            tag: String::new(),
        };
        self.ring.publish(Record::checkpoint(seq, self.now_us, &checkpoint));
    }

    fn poll(&mut self) -> Option<Output> {
        let now = self.now();
        let output = self.sender.poll(now, &mut self.ring, true);
        if let Some(Output::Free { through_seq }) = output {
            self.ring.free_through(through_seq);
        }
        output
    }

    fn drain(&mut self) -> Vec<Output> {
        std::iter::from_fn(|| self.poll()).collect()
    }

    fn batches(&mut self) -> Vec<OutgoingBatch> {
        let batch = |output| match output {
            Output::Batch(batch) => batch,
            other => panic!("only batches are expected here, not {other:?}"),
        };
        self.drain().into_iter().map(batch).collect()
    }

    fn ranges(&mut self) -> Vec<(u64, u64)> {
        self.batches().iter().map(|batch| (batch.first_seq, batch.last_seq)).collect()
    }

    fn frame(&mut self, frame: Frame) {
        self.sender.frame(frame, self.now(), &self.ring);
    }

    fn open(&mut self) {
        self.now_us += 30_000_000;
        assert!(matches!(self.poll(), Some(Output::Dial)));
        self.sender.dialed(self.now());
        assert!(matches!(self.poll(), Some(Output::Open(_))));
    }

    fn grant(&mut self, open_count: u64, durable_through: u64, tail_crc: u32) {
        let new_generation = durable_through == 0;
        self.frame(Frame::Grant(Grant {
            features: 0,
            open_count,
            durable_through,
            tail_crc,
            fresh_image: true,
            new_generation,
            window_bytes: 1 << 20,
        }));
    }

    fn stream(&mut self) {
        self.open();
        self.grant(1, 0, 0);
        assert!(matches!(self.poll(), Some(Output::Event(SenderEvent::Granted { .. }))));
    }

    fn ack(&mut self, received_through: u64, durable_through: u64) {
        let (memory_us, disk_us) = (10, 20);
        self.frame(Frame::Ack(Ack { open_count: 1, received_through, durable_through, memory_us, disk_us }));
    }
}

fn whole(batch: &OutgoingBatch) -> Vec<u8> {
    let mut bytes = BytesMut::new();
    batch.chunks.iter().for_each(|chunk| bytes.extend_from_slice(chunk));
    bytes.to_vec()
}

#[test]
fn the_first_record_goes_at_once_and_the_next_after_the_delay() {
    let mut world = World::new();
    world.stream();
    assert!(world.ranges().is_empty());
    assert_eq!(world.sender.wake(), Wake { at_us: None, on_publish: true });
    world.write(512);
    assert_eq!(world.ranges(), [(1, 1)]);
    let sealed_us = world.now_us;
    assert_eq!(world.sender.wake(), Wake { at_us: Some(sealed_us + 2000), on_publish: false });
    world.now_us += 500;
    world.write(512);
    world.write(512);
    assert!(world.ranges().is_empty(), "a batch is on the wire: the next one waits to fill");
    world.now_us = sealed_us + 2000;
    assert_eq!(world.ranges(), [(2, 3)]);
    world.now_us += 2000;
    assert!(world.ranges().is_empty());
    assert_eq!(world.sender.wake(), Wake { at_us: None, on_publish: true }, "an idle tick ends the ticking");
    world.write(512);
    assert!(world.ranges().is_empty());
    assert_eq!(world.sender.wake(), Wake { at_us: Some(world.now_us + 2000), on_publish: false });
    world.ack(3, 3);
    world.ring.free_through(0);
    let outputs = world.drain();
    assert!(matches!(outputs[0], Output::Free { through_seq: 3 }), "{outputs:?}");
    assert!(
        matches!(&outputs[1], Output::Batch(batch) if batch.first_seq == 4),
        "nothing is on the wire: at once"
    );
}

#[test]
fn a_full_batch_and_a_checkpoint_do_not_wait() {
    let mut world = World::new();
    world.stream();
    world.write(512);
    assert_eq!(world.ranges(), [(1, 1)]);
    for _ in 0..17 {
        world.write(128 << 10);
    }
    assert_eq!(world.ranges(), [(2, 9), (10, 17)], "two full ones, the rest waits");
    world.checkpoint();
    world.write(512);
    assert_eq!(world.ranges(), [(18, 19)], "through the checkpoint, without what follows it");
}

#[test]
fn batches_parse_and_are_chained() {
    let mut world = World::new();
    world.stream();
    for len_bytes in [512, 4096, 64 << 10, 1 << 20, 4096, 512] {
        world.write(len_bytes);
    }
    world.now_us += 10_000;
    let mut batches = world.batches();
    world.now_us += 10_000;
    batches.extend(world.batches());
    let mut expected_crc = 0;
    for batch in &batches {
        let bytes = whole(batch);
        assert_eq!(bytes.len(), batch.len_bytes);
        let view = BatchView::parse(&bytes).expect("a good batch");
        assert_eq!(view.link().prev_batch_crc, expected_crc);
        assert_eq!(view.link().journal_id, Uuid::from_u128(5));
        assert_eq!((view.first_seq(), view.last_seq()), (batch.first_seq, batch.last_seq));
        expected_crc = view.crc();
    }
    assert_eq!(batches.last().map(|batch| batch.last_seq), Some(6));
}

#[test]
fn the_window_stops_sealing_until_something_is_durable() {
    let mut world = World::new();
    world.stream();
    for _ in 0..80 {
        world.write(1 << 20);
    }
    let sent = world.ranges();
    assert!((60..=64).contains(&sent.len()), "64 MiB are out: {}", sent.len());
    assert_eq!(world.sender.wake(), Wake { at_us: None, on_publish: false });
    world.ack(sent.len() as u64, 0);
    assert!(world.ranges().is_empty(), "received is not durable");
    world.ack(sent.len() as u64, 3);
    assert!(matches!(world.poll(), Some(Output::Free { through_seq: 3 })));
    assert_eq!(world.ranges().len(), 3);
}

#[test]
fn after_a_reconnect_it_resends_what_is_not_durable() {
    let mut world = World::new();
    world.stream();
    for _ in 0..3 {
        world.write(512);
        world.now_us += 2000;
        assert_eq!(world.ranges().len(), 1);
    }
    world.ack(3, 1);
    assert!(matches!(world.poll(), Some(Output::Free { through_seq: 1 })));
    world.sender.stream_lost(world.now(), "cut");
    assert!(matches!(world.poll(), Some(Output::Event(SenderEvent::Disconnected { .. }))));
    world.open();
    world.grant(2, 2, 0xabc);
    assert!(matches!(world.poll(), Some(Output::Event(SenderEvent::Granted { durable_through: 2, .. }))));
    assert!(matches!(world.poll(), Some(Output::Free { through_seq: 2 })), "its acknowledgement was lost");
    let batches = world.batches();
    assert_eq!((batches[0].first_seq, batches[0].last_seq), (3, 3));
    let bytes = whole(&batches[0]);
    let link = BatchView::parse(&bytes).expect("a good batch").link();
    assert_eq!((link.open_count, link.prev_batch_crc), (2, 0xabc));
}

#[test]
fn a_target_that_lost_acknowledged_data_stops_it() {
    let mut world = World::new();
    world.stream();
    world.write(512);
    world.write(512);
    assert_eq!(world.ranges(), [(1, 2)]);
    world.ack(2, 2);
    assert!(matches!(world.poll(), Some(Output::Free { through_seq: 2 })));
    world.sender.stream_lost(world.now(), "cut");
    world.drain();
    world.open();
    world.grant(2, 1, 0);
    assert!(matches!(world.poll(), Some(Output::Hangup)));
    let Some(Output::Event(SenderEvent::Stopped(reason))) = world.poll() else { panic!("it stops") };
    assert_eq!(reason, StopReason::TargetLostData { freed_through: 2, durable_through: 1 });
    assert!(reason.needs_new_generation());
    world.now_us += 1_000_000_000;
    assert!(world.poll().is_none(), "it doesn't try again by itself");

    world.ring = PlainRing::new(1 << 20);
    world.sender.begin_generation(generation(1 << 20), world.now());
    world.open();
    world.grant(3, 0, 0);
    world.drain();
    world.write(512);
    assert_eq!(world.ranges(), [(1 << 20, 1 << 20)]);
}

#[test]
fn refusals_are_retried_or_stop_it() {
    let mut world = World::new();
    world.open();
    let refuse = |code| Frame::Refuse(Refuse { code, detail: 0, text: "no".into() });
    // What passes by itself is tried again soon.
    for (code, longest_us) in
        [(RefuseCode::Busy, 100_000), (RefuseCode::JournalFull, 200_000), (RefuseCode::UnknownVm, 400_000)]
    {
        world.frame(refuse(code));
        assert!(matches!(world.poll(), Some(Output::Hangup)));
        assert!(matches!(world.poll(), Some(Output::Event(SenderEvent::Refused(_)))));
        assert!(world.sender.wake().at_us.is_some_and(|at_us| at_us <= world.now_us + longest_us));
        world.open();
    }
    world.frame(refuse(RefuseCode::NotDescendant));
    assert!(matches!(world.poll(), Some(Output::Hangup)));
    let Some(Output::Event(SenderEvent::Stopped(reason))) = world.poll() else { panic!("it stops") };
    assert!(!reason.needs_new_generation(), "a person chooses");
    assert_eq!(world.sender.wake(), Wake { at_us: None, on_publish: false });
    world.sender.resume(world.now());
    assert!(matches!(world.poll(), Some(Output::Dial)));
}

#[test]
fn a_sender_that_was_fenced_by_its_own_late_stream_comes_back() {
    let mut world = World::new();
    world.stream();
    world.frame(Frame::Refuse(Refuse { code: RefuseCode::Fenced, detail: 0, text: "another".into() }));
    assert!(matches!(world.poll(), Some(Output::Hangup)));
    assert!(matches!(world.poll(), Some(Output::Event(SenderEvent::Refused(_)))));
    assert!(world.poll().is_none(), "not at once: it may be another source");
    world.open();
}

#[test]
fn an_impossible_acknowledgement_ends_the_stream() {
    let mut world = World::new();
    world.stream();
    world.write(512);
    assert_eq!(world.ranges(), [(1, 1)]);
    world.ack(2, 1);
    assert!(matches!(world.poll(), Some(Output::Hangup)));
    assert_eq!(world.ring.freed_through(), 0, "nothing was freed on the word of a broken peer");
}
