//! The scrub: a thread that reads sealed segments again, at a limited rate, so that damage is known before somebody needs what is
//! damaged.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use journal::format::{PAGE_BYTES, slot_offset_bytes};
use journal::storage::AlignedBuf;
use journal::storage::ring::{Access, DirectFile, OpenFileError};
use journal::walk::{Finding, walk};
use journal::writer::ClosedSegment;

use super::target_vm::TargetVm;
use crate::api::status::ScrubStatus;
use crate::api::{TimeUs, VmId};

/// How the scrub goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScrubSettings {
    /// How fast it reads, all VMs together, in bytes per second; 0: not at all.
    pub bytes_per_s: u64,
    /// How long a segment must have been full.
    pub cold_after: Duration,
    /// From the beginning of one pass over a journal to that of the next.
    pub pass_every: Duration,
}

impl ScrubSettings {
    /// None.
    pub const OFF: Self = Self { bytes_per_s: 0, cold_after: Duration::ZERO, pass_every: Duration::ZERO };
}

/// A sealed segment to look at.
pub(super) struct Sealed {
    pub(super) segment: ClosedSegment,
    /// The number of the oldest segment that there is: those before it were promoted.
    pub(super) oldest_number: u64,
    pub(super) slot_len_bytes: u64,
}

/// What the scrub knows of one journal.
pub(super) struct ScrubReport {
    pub(super) status: ScrubStatus,
    /// What is wrong, by segment. Segments that were promoted since are not here.
    pub(super) damage: BTreeMap<u64, Vec<Finding>>,
}

pub(super) type TargetVms = Arc<Mutex<HashMap<VmId, Arc<TargetVm>>>>;

/// The thread; ends when dropped.
pub(super) struct ScrubThread {
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Stop {
    is_set: Mutex<bool>,
    changed: Condvar,
}

impl Stop {
    /// Waits, or less long if the thread is to end; true if it is.
    fn wait(&self, time: Duration) -> bool {
        let is_set = self.is_set.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_timeout_while(is_set, time, |is_set| !*is_set);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// Between two looks for something to do.
const IDLE_WAIT: Duration = Duration::from_secs(1);
/// What is read at once, in bytes: between pieces it waits.
const PIECE_BYTES: usize = 1 << 20;

impl ScrubThread {
    /// Starts one, unless it is off.
    ///
    /// # Errors
    /// There is no thread.
    pub(super) fn start(settings: ScrubSettings, vms: TargetVms) -> io::Result<Self> {
        let stop = Arc::new(Stop::default());
        if settings.bytes_per_s == 0 {
            return Ok(Self { stop, thread: None });
        }
        let scrub = Scrub { settings, vms, stop: stop.clone(), passes: HashMap::new(), buffer: None };
        let thread = std::thread::Builder::new().name("scrub".to_owned()).spawn(move || scrub.run())?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for ScrubThread {
    fn drop(&mut self) {
        *self.stop.is_set.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.stop.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // It has told what went wrong.
            let _ = thread.join();
        }
    }
}

struct Scrub {
    settings: ScrubSettings,
    vms: TargetVms,
    stop: Arc<Stop>,
    passes: HashMap<VmId, Pass>,
    /// Memory for a slot.
    buffer: Option<AlignedBuf>,
}

struct Pass {
    began: Instant,
    began_us: TimeUs,
    ended_us: Option<TimeUs>,
    /// This pass is over.
    is_over: bool,
    /// Segments up to this number were looked at.
    through_number: u64,
    segments: u64,
    damage: BTreeMap<u64, Vec<Finding>>,
    /// The journal can't be opened, and that was told.
    is_refused: bool,
}

impl Pass {
    fn new() -> Self {
        Self {
            began: Instant::now(),
            began_us: TimeUs::now(),
            ended_us: None,
            is_over: false,
            through_number: 0,
            segments: 0,
            damage: BTreeMap::new(),
            is_refused: false,
        }
    }
}

impl Scrub {
    fn run(mut self) {
        use_idle_priority();
        loop {
            let vms: Vec<_> =
                self.vms.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
            self.passes.retain(|id, _| vms.iter().any(|vm| vm.id() == *id));
            // One segment of each VM in turn.
            let mut did_something = false;
            for vm in vms {
                let mut pass = self.passes.remove(&vm.id()).unwrap_or_else(Pass::new);
                did_something |= self.advance(&vm, &mut pass);
                self.passes.insert(vm.id(), pass);
            }
            let wait = if did_something { Duration::ZERO } else { IDLE_WAIT };
            if self.stop.wait(wait) {
                return;
            }
        }
    }

    /// Looks at the next segment of a VM's journal. False if there is none now.
    fn advance(&mut self, vm: &TargetVm, pass: &mut Pass) -> bool {
        if pass.is_over {
            if pass.began.elapsed() < self.settings.pass_every {
                return false;
            }
            // What was found stays found until the segment is looked at again.
            let damage = std::mem::take(&mut pass.damage);
            *pass = Pass { ended_us: pass.ended_us, damage, ..Pass::new() };
        }
        let cold_us = self.settings.cold_after.as_micros() as u64;
        let Some(sealed) = vm.sealed_segment(pass.through_number, cold_us) else { return false };
        let Some(Sealed { segment, oldest_number, slot_len_bytes }) = sealed else {
            // What isn't cold yet is the next pass's.
            (pass.is_over, pass.ended_us) = (true, Some(TimeUs::now()));
            vm.scrubbed(report(pass));
            return false;
        };
        let number = segment.header.number;
        let findings = match self.look_at(vm, &segment, slot_len_bytes) {
            Ok(Some(findings)) => findings,
            Ok(None) => return false,
            Err(error) => {
                if !std::mem::replace(&mut pass.is_refused, true) {
                    tracing::warn!(vm = %vm.id(), error = %super::error_chain(&error), "the scrub cannot open a journal");
                }
                return false;
            }
        };
        pass.is_refused = false;
        let mut is_there = false;
        if !findings.is_empty() {
            // Beside a promotion, another segment may have been in the slot by then. The journal may be closed meanwhile: then it is looked at
            // once more.
            let Some(again) = vm.sealed_segment(number - 1, 0) else { return false };
            is_there = again.is_some_and(|again| again.segment.header == segment.header);
        }
        pass.damage.retain(|number, _| *number >= oldest_number);
        pass.damage.remove(&number);
        if is_there {
            pass.damage.insert(number, findings);
        }
        pass.through_number = number;
        pass.segments += 1;
        vm.scrubbed(report(pass));
        true
    }

    /// What is wrong with a segment; nothing if the thread is to end.
    ///
    /// # Errors
    /// The file can't be opened.
    fn look_at(
        &mut self,
        vm: &TargetVm,
        segment: &ClosedSegment,
        slot_len_bytes: u64,
    ) -> Result<Option<Vec<Finding>>, OpenFileError> {
        let file = DirectFile::open(&vm.folder().journal(), Access::ReadOnly)?;
        let len_bytes = slot_len_bytes as usize;
        let buffer = self.buffer.take().filter(|buffer| buffer.len() == len_bytes);
        let mut slot = buffer.unwrap_or_else(|| AlignedBuf::zeroed(len_bytes));
        let offset_bytes = slot_offset_bytes(segment.header.slot, slot_len_bytes);
        let Some(mut findings) = self.read(file.file(), offset_bytes, &mut slot) else { return Ok(None) };
        segment.cipher.decrypt_slot(&mut slot);
        let Ok(walked) =
            walk::<Infallible>(&slot, &segment.header, segment.trailer.as_ref(), &mut |_, _, _| Ok(()));
        findings.extend(walked.findings);
        self.buffer = Some(slot);
        Ok(Some(findings))
    }

    /// Reads a slot at the rate that is set; gives what can't be read, or nothing if the thread is to end.
    fn read(&self, file: &File, offset_bytes: u64, slot: &mut [u8]) -> Option<Vec<Finding>> {
        let mut findings = Vec::new();
        let piece_time = Duration::from_secs_f64(PIECE_BYTES as f64 / self.settings.bytes_per_s as f64);
        for (number, piece) in slot.chunks_mut(PIECE_BYTES).enumerate() {
            let begun = Instant::now();
            let slot_offset_bytes = (number * PIECE_BYTES) as u64;
            if file.read_exact_at(piece, offset_bytes + slot_offset_bytes).is_err() {
                // What can be read is checked all the same.
                for (page, bytes) in piece.chunks_mut(PAGE_BYTES).enumerate() {
                    let slot_offset_bytes = slot_offset_bytes + (page * PAGE_BYTES) as u64;
                    if let Err(error) = file.read_exact_at(bytes, offset_bytes + slot_offset_bytes) {
                        bytes.fill(0);
                        let what = format!("{PAGE_BYTES} bytes cannot be read: {error}");
                        findings.push(Finding { seq: None, place: None, slot_offset_bytes, what });
                    }
                }
            }
            if self.stop.wait(piece_time.saturating_sub(begun.elapsed())) {
                return None;
            }
        }
        Some(findings)
    }
}

fn report(pass: &Pass) -> ScrubReport {
    let status = ScrubStatus {
        pass_began_us: pass.began_us,
        last_pass_ended_us: pass.ended_us,
        segments: pass.segments,
        damaged_segments: pass.damage.len() as u64,
    };
    ScrubReport { status, damage: pass.damage.clone() }
}

/// The disk serves this thread when nobody else wants it (where the I/O scheduler knows classes).
fn use_idle_priority() {
    const WHO_PROCESS: libc::c_int = 1;
    const CLASS_IDLE: libc::c_int = 3 << 13;
    // SAFETY: it changes the calling thread's I/O priority and touches no memory (ioprio_set(2)).
    unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, 0, CLASS_IDLE) };
}
