//! One VM: its source, its streams, its target, and what is known to be promised.

use journal::storage::sim::{Crash, Fault, OpKind};
use journal::view::Reader;
use uuid::Uuid;
use vra::api::{JournalId, VmId, VolumeId, VpgId};
use vra::receive::{Receiver, ReceiverEvent, VmIdentity};
use vra::ship::{Phase, StreamIdentity};
use vra::wire::{Frame, Grant, Refuse, RefuseCode, VolumeShape};

use super::coverage::{Disturbance, Happening, Moment};
use super::damage;
use super::env::Env;
use super::kinds::{any_kind, any_kind_of_openings};
use super::ledger::{Image, Ledger};
use super::protected::Protected;
use super::rebuilt;
use super::recovered;
use super::scripted::Script;
use super::shape::SiteShape;
use super::shipper::Shipper;
use super::streams::{StreamKey, Streams};
use super::target::{Life, TargetSite, Told};

/// Sizes of a guest's disks, in bytes.
pub(super) const DISK_BYTES: [usize; 2] = [32 << 10, 16 << 10];

pub(super) struct Vm {
    pub(super) ledger: Ledger,
    pub(super) streams: Streams,
    pub(super) site: TargetSite,
    pub(super) source: Source,
}

pub(super) enum Source {
    Scripted(Box<Script>),
    Protected(Box<Protected>),
}

impl Vm {
    /// With a source of the product's own, or a scripted one.
    pub(super) fn new(seed: u64, number: u128, scripted: bool, env: &mut Env) -> Result<Self, String> {
        let stream = identity(number);
        let mut ledger = Ledger::new(DISK_BYTES.to_vec());
        let vm = VmIdentity { vm: stream.vm, journal: stream.journal, volumes: stream.volumes.clone() };
        let shape = SiteShape::any(&vm, env);
        let encryption = shape.encryption;
        let mut site = TargetSite::unmade(seed, vm, shape);
        site.create_somehow(encryption, env)?;
        let source = if scripted {
            Source::Scripted(Box::new(Script::new(stream, &mut ledger, env)))
        } else {
            Source::Protected(Box::new(Protected::new(stream, &DISK_BYTES, env)))
        };
        Ok(Self { ledger, streams: Streams::default(), site, source })
    }

    /// With a scripted source, and files in which nothing is yet.
    pub(super) fn unmade(seed: u64, shape: SiteShape, env: &mut Env) -> Self {
        let stream = identity(0x71);
        let mut ledger = Ledger::new(DISK_BYTES.to_vec());
        let vm = VmIdentity { vm: stream.vm, journal: stream.journal, volumes: stream.volumes.clone() };
        let site = TargetSite::unmade(seed, vm, shape);
        let source = Source::Scripted(Box::new(Script::new(stream, &mut ledger, env)));
        Self { ledger, streams: Streams::default(), site, source }
    }

    pub(super) fn faults(&self) -> impl Iterator<Item = ((Fault, OpKind), u64)> {
        self.site.disk.coverage().into_iter()
    }

    /// What the disks of a view were.
    pub(super) fn image(&self, reader: &Reader, cut: u64) -> Result<Image, String> {
        let view = reader.view(cut).map_err(|error| format!("view at {cut}: {error:?}"))?;
        recovered::read_image(&self.site, &view, &self.ledger)
            .map_err(|error| format!("read at {cut}: {error:?}"))
    }

    /// What its replication is doing.
    pub(super) fn moment(&self) -> Moment {
        if let Source::Protected(source) = &self.source {
            if source.is_held() {
                return Moment::Held;
            }
            if source.is_overflowed() {
                return Moment::Overflowed;
            }
        }
        self.streaming_moment()
    }

    /// The same, apart from what capture is doing.
    fn streaming_moment(&self) -> Moment {
        let Some(shipper) = self.shipper() else { return Moment::SourceDown };
        match shipper.phase() {
            Phase::Waiting { .. } | Phase::Dialing | Phase::Stopped(_) => Moment::Apart,
            Phase::Opening => Moment::Asking,
            Phase::Streaming => match self.site.receiver() {
                None => Moment::Apart,
                Some(receiver) if receiver.writer().superblock().state.is_base_sync() => Moment::BaseSync,
                Some(receiver) if receiver.history().is_in_sync() => Moment::JournalSync,
                Some(_) => Moment::Journaling,
            },
        }
    }

    /// The target's process runs, or is started.
    pub(super) fn keep_target_up(&mut self, env: &mut Env) -> Result<(), String> {
        if self.site.is_up() { Ok(()) } else { self.site.open(&self.ledger, env) }
    }

    pub(super) fn land_one(&self) {
        self.site.disk.land_one();
    }

    /// The source's process runs, or is started after a while.
    pub(super) fn keep_source_up(&mut self, env: &mut Env) -> Result<(), String> {
        match &mut self.source {
            Source::Protected(source) if !source.is_up() && env.rng.one_in(8) => source.start(env),
            _ => Ok(()),
        }
    }

    pub(super) fn source_step(&mut self, env: &mut Env) -> Result<(), String> {
        match &mut self.source {
            Source::Scripted(source) => source.step(&mut self.ledger, env),
            Source::Protected(source) => {
                let overflowed = source.is_overflowed();
                source.step(&mut self.ledger, env)?;
                if !overflowed && source.is_overflowed() {
                    env.met(Disturbance::Overflowed, self.streaming_moment());
                }
            }
        }
        Ok(())
    }

    /// The source's process dies, and with its host sometimes the guest.
    pub(super) fn kill_source(&mut self, guest_dies: bool, env: &mut Env) {
        let moment = self.moment();
        if let Source::Protected(source) = &mut self.source {
            env.met(Disturbance::SourceDied, moment);
            source.die(guest_dies, &mut self.streams, env);
        }
    }

    /// The product's own source, to hold it and to ask it for links of the chain.
    pub(super) fn protected(&mut self) -> Option<(&mut Protected, &mut Ledger)> {
        match &mut self.source {
            Source::Protected(source) => Some((source, &mut self.ledger)),
            Source::Scripted(_) => None,
        }
    }

    fn shipper(&self) -> Option<&Shipper> {
        match &self.source {
            Source::Scripted(source) => Some(source.shipper()),
            Source::Protected(source) => source.shipper(),
        }
    }

    fn drive(&mut self, env: &mut Env) -> Result<(), String> {
        match &mut self.source {
            Source::Scripted(source) => source.drive(&mut self.streams, &mut self.ledger, env),
            Source::Protected(source) => source.drive(&mut self.streams, &mut self.ledger, env),
        }
    }

    pub(super) fn ship(&mut self, env: &mut Env) -> Result<(), String> {
        self.drive(env)?;
        if !env.rng.one_in(4) {
            let reachable = self.site.is_up() && !env.rng.one_in(8);
            match &mut self.source {
                Source::Scripted(source) => source.answer_dial(reachable, &mut self.streams, env),
                Source::Protected(source) => source.answer_dial(reachable, &mut self.streams, env),
            }
            self.drive(env)?;
        }
        Ok(())
    }

    /// The network moves some of what is on the way.
    pub(super) fn deliver(&mut self, env: &mut Env) -> Result<(), String> {
        for key in self.streams.keys() {
            if !env.rng.one_in(3) {
                for arrival in self.streams.deliver_up(key, env)? {
                    env.note(|| format!("at target on {key}: {arrival}"));
                    self.site.arrived(key, arrival, env);
                    self.listen(env)?;
                }
            }
            if !env.rng.one_in(3) {
                let answers = self.streams.deliver_down(key, env)?;
                match &mut self.source {
                    Source::Scripted(source) => source.take(key, answers, env),
                    Source::Protected(source) => source.take(key, answers, env),
                }
                self.drive(env)?;
            }
        }
        Ok(())
    }

    /// The target's storage runs at most `steps` operations.
    pub(super) fn pump(&mut self, steps: u64, env: &mut Env) -> Result<(), String> {
        for _ in 0..steps {
            self.listen(env)?;
            if !self.site.is_busy() {
                break;
            }
            let moment = self.moment();
            if self.site.run_one(env) == Life::Dead {
                env.met(Disturbance::TargetDied, moment);
                self.streams.target_died(env);
                return Ok(());
            }
        }
        self.listen(env)
    }

    /// Draws the consequences of storage that failed, and of a death that nobody has noticed yet.
    pub(super) fn look_after_target(&mut self, env: &mut Env) -> Result<(), String> {
        let moment = self.moment();
        if self.site.notice_death(env) == Life::Dead {
            env.met(Disturbance::TargetDied, moment);
            self.streams.target_died(env);
        }
        if self.site.has_failed() {
            // What is still under way must end before anything else happens to the files.
            while self.site.is_busy() {
                if self.site.run_one(env) == Life::Dead {
                    self.streams.target_died(env);
                    return Ok(());
                }
            }
            self.listen(env)?;
            self.site.end_failed(env);
            if !self.site.is_up() && env.rng.one_in(2) {
                self.streams.target_died(env);
            }
        }
        Ok(())
    }

    pub(super) fn cut_streams(&mut self, env: &mut Env) {
        let moment = self.moment();
        for key in self.streams.keys() {
            if env.rng.one_in(2) {
                if self.shipper().and_then(Shipper::current) == Some(key) {
                    env.met(Disturbance::StreamCut, moment);
                }
                self.streams.cut(key, env);
            }
        }
    }

    pub(super) fn clock_jumped(&self, env: &mut Env) {
        env.met(Disturbance::ClockJumped, self.moment());
    }

    /// The source loses what it retained. A sync follows.
    pub(super) fn fork(&mut self, env: &mut Env) -> Result<(), String> {
        let moment = self.moment();
        if let Source::Protected(source) = &mut self.source {
            source.tap(&mut self.ledger, env)?;
            source.renew();
            env.met(Disturbance::NewGeneration, moment);
            return Ok(());
        }
        // Numbers go on after what the target has, so nothing may be on the way.
        for key in self.streams.keys() {
            self.streams.cut(key, env);
        }
        for _ in 0..200 {
            self.deliver(env)?;
            self.pump(20, env)?;
            self.look_after_target(env)?;
            if self.site.is_trusting() && !self.site.is_busy() {
                self.reopen_politely(env);
            }
            self.keep_target_up(env)?;
            if self.streams.keys().is_empty() && !self.site.is_busy() {
                break;
            }
        }
        let Some(receiver) = self.site.receiver() else { return Ok(()) };
        let tail_seq = receiver.writer().durable().seq;
        // Batches that wait for room become durable later.
        if receiver.writer().queued_bytes() > 0
            || !self.streams.keys().is_empty()
            || self.site.is_busy()
            || self.site.has_failed()
            || self.site.is_trusting()
        {
            return Ok(());
        }
        if let Source::Scripted(source) = &mut self.source {
            source.fork(tail_seq, &mut self.ledger, env);
        }
        env.met(Disturbance::NewGeneration, moment);
        Ok(())
    }

    /// Arms a fault of the target's storage.
    pub(super) fn arm(&mut self, env: &mut Env) {
        let after_ops = env.rng.below(12);
        match env.rng.below(10) {
            0 | 1 => self.site.disk.arm_crash(after_ops, Crash::Kill),
            2 | 3 => self.site.disk.arm_crash(after_ops, Crash::PowerCut),
            8 | 9 => {
                let (kinds, crash) = (any_kind(env), env.any_crash());
                self.site.disk.arm_crash_at_kinds(kinds, after_ops / 4, crash);
            }
            4 => {
                // A change of the superblock, or a group of batches.
                if env.rng.one_in(2) {
                    self.site.change_something(env);
                }
                self.site.disk.arm_error(after_ops / 2, "fdatasync");
            }
            5 => self.site.disk.arm_error(after_ops / 2, "write"),
            6 => {
                // The fault meets the next opening.
                self.crash_target(env);
                self.site.disk.arm_error_at(any_kind_of_openings(env), env.rng.below(4));
            }
            _ => {
                self.crash_target(env);
                let (after_ops, crash) = (env.rng.below(24), env.any_crash());
                self.site.disk.arm_crash(after_ops, crash);
            }
        }
        if env.rng.one_in(3) {
            self.site.disk.arm_error_at(any_kind(env), env.rng.below(3));
        }
        if env.rng.one_in(6) {
            // Whoever reads next: a promotion, an opening, a view.
            self.site.disk.arm_error(env.rng.below(8), "read");
        }
        if env.rng.one_in(10) {
            self.site.fill_datastore();
        }
    }

    pub(super) fn crash_target(&mut self, env: &mut Env) {
        env.met(Disturbance::TargetDied, self.moment());
        let crash = env.any_crash();
        self.site.crash(crash, env);
        self.site.disk.disarm();
        self.streams.target_died(env);
    }

    /// The target's process ends with nothing under way.
    pub(super) fn reopen_politely(&mut self, env: &mut Env) {
        if self.site.is_idle() {
            self.site.crash(Crash::Kill, env);
            self.streams.target_died(env);
        }
    }

    pub(super) fn change_something(&mut self, env: &mut Env) {
        self.site.change_something(env);
    }

    pub(super) fn make_room(&mut self) {
        self.site.make_room();
    }

    /// The journal may have less, or more: what is over it is promoted and given back.
    pub(super) fn limit(&mut self, env: &mut Env) {
        self.site.limit_slots(3 + env.rng.below(6) as u32);
    }

    /// Opens a view that stays open, or closes the one that is.
    pub(super) fn turn_pin(&mut self, env: &mut Env) -> Result<(), String> {
        recovered::check_pinned(&self.site, &self.ledger, env)?;
        if self.site.pinned().is_some() {
            self.site.pin(None, env);
            return Ok(());
        }
        let cut = recovered::any_cut(&self.site, env);
        if self.site.pin(cut, env)
            && let Some(cut) = cut
        {
            recovered::open_pinned(&mut self.site, cut)?;
        }
        Ok(())
    }

    pub(super) fn compare_beside_writer(&self, env: &mut Env) -> Result<(), String> {
        recovered::compare_beside_writer(&self.site, &self.ledger, env)
    }

    /// The disaster, and what must be there afterwards.
    pub(super) fn end(&mut self, env: &mut Env) -> Result<Reader, String> {
        let crash = env.any_crash();
        self.site.crash(crash, env);
        if env.rng.one_in(2) {
            rebuilt::compare_without_superblocks(&mut self.site, &self.ledger, env)?;
        }
        self.site.open(&self.ledger, env)?;
        self.site.crash(Crash::PowerCut, env);
        self.site.disk.disarm();
        self.site.disk.fence();
        let reader = recovered::compare_all(&self.site, &self.ledger, env)?;
        if env.rng.one_in(2) {
            rebuilt::compare_without_superblocks(&mut self.site, &self.ledger, env)?;
        }
        Ok(reader)
    }

    pub(super) fn flip_a_bit(&self, env: &mut Env) -> Result<(), String> {
        damage::flip_a_bit(&self.site, &self.ledger, env)
    }

    /// Hears what the target says.
    fn listen(&mut self, env: &mut Env) -> Result<(), String> {
        loop {
            let told = self.site.outputs(env)?;
            if told.is_empty() {
                return Ok(());
            }
            for told in told {
                match told {
                    Told::Frame(key, frame) => {
                        env.note(|| format!("to source on {key}: {frame:?}"));
                        match &frame {
                            Frame::Grant(grant) => self.granted(grant, env)?,
                            Frame::Ack(ack) => self.ledger.acknowledged(ack.durable_through)?,
                            Frame::Refuse(refuse) => self.refused(key, refuse, env)?,
                            frame => return Err(format!("the target sent a frame: {}", frame.name())),
                        }
                        self.streams.send_down(key, &frame);
                    }
                    Told::Close(key) => self.streams.close(key),
                    Told::Event(event) => {
                        env.note(|| format!("the target: {event:?}"));
                        self.event(&event, env);
                    }
                }
            }
        }
    }

    fn granted(&mut self, grant: &Grant, env: &mut Env) -> Result<(), String> {
        self.ledger.acknowledged(grant.durable_through)?;
        let Some(receiver) = self.site.receiver() else { return Ok(()) };
        let superblock = receiver.writer().superblock();
        if !grant.new_generation {
            env.happened(Happening::Reconnected);
            return Ok(());
        }
        if !superblock.state.is_base_sync() {
            env.happened(Happening::ForkJournaled);
        }
        self.ledger.forked(grant.durable_through, superblock.generation_first_seq);
        Ok(())
    }

    fn refused(&self, key: StreamKey, refuse: &Refuse, env: &mut Env) -> Result<(), String> {
        match refuse.code {
            RefuseCode::Fenced => env.happened(Happening::Fenced),
            RefuseCode::Busy | RefuseCode::Storage => {}
            RefuseCode::JournalFull if self.site.receiver().is_some_and(Receiver::is_idle) => {
                env.happened(Happening::SyncNotAdmitted);
            }
            RefuseCode::JournalFull => {}
            // What an older generation still asks for is refused rightly.
            RefuseCode::NotDescendant if self.shipper().and_then(Shipper::current) != Some(key) => {}
            _ => return Err(format!("the target refused: {:?}: {}", refuse.code, refuse.text)),
        }
        Ok(())
    }

    fn event(&self, event: &ReceiverEvent, env: &mut Env) {
        match event {
            ReceiverEvent::SyncEnded => env.happened(Happening::BaseSyncEnded),
            ReceiverEvent::HistoryGivenUp { .. } => env.happened(Happening::HistoryGivenUp),
            ReceiverEvent::Full { no_space } => {
                env.met(Disturbance::JournalFull, self.moment());
                env.happened(if *no_space { Happening::NoSpace } else { Happening::Full });
            }
            ReceiverEvent::Failed { .. } => env.met(Disturbance::StorageFailed, self.moment()),
            ReceiverEvent::Promoted { .. } => env.happened(Happening::Promoted),
            ReceiverEvent::HistoryShortened { .. } => env.happened(Happening::HistoryShortened),
            ReceiverEvent::PromotionStuck { .. } => env.happened(Happening::PromotionStuck),
            ReceiverEvent::LockInTheWay { .. } => env.happened(Happening::LockGivenUp),
            ReceiverEvent::Granted { .. }
            | ReceiverEvent::Room
            | ReceiverEvent::HistoryFits
            | ReceiverEvent::LockOutOfTheWay
            | ReceiverEvent::ViewInTheWay { .. } => {}
        }
    }
}

pub(super) fn identity(number: u128) -> StreamIdentity {
    let volumes = (0_u16..).zip(DISK_BYTES).map(|(volume, len_bytes)| VolumeShape {
        volume,
        id: VolumeId(Uuid::from_u128(len_bytes as u128)),
        logical_block_bytes: 512,
        size_bytes: len_bytes as u64,
        left: false,
    });
    StreamIdentity {
        vm: VmId(Uuid::from_u128(number)),
        vpg: VpgId(Uuid::from_u128(0x72)),
        journal: JournalId(Uuid::from_u128(number << 32)),
        volumes: volumes.collect(),
    }
}
