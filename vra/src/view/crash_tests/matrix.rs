//! The crash matrix of the scratch: a crash at each write and sync of commits, and of making, opening and closing the file, in every way;
//! each time the file is opened again, crashed in that too, and compared with the model.

use super::super::scratch::error::ScratchError;
use super::super::scratch::noted::{Change, Note, noting};
use super::*;

/// So few chunks that a file is quickly copied, and enough for two pages of the map.
const SMALL_DISK_BYTES: u64 = 1 << 20;
/// Requests and operations of a run.
const STEPS: usize = 120;

/// How everything ends at an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Strike {
    /// The process is killed before it has done anything.
    KillBefore,
    /// The process is killed when it is done.
    KillAfter,
    /// The power goes before it; nothing that was not synced is left.
    PowerBefore,
    /// The power goes when it is done; nothing else that was not synced is left.
    PowerAfter,
    /// The power goes meanwhile: it is torn, and so is what else was not synced.
    PowerDuring,
}

impl Strike {
    const ALL: [Self; 5] =
        [Self::KillBefore, Self::KillAfter, Self::PowerBefore, Self::PowerAfter, Self::PowerDuring];

    fn is_before(self) -> bool {
        matches!(self, Self::KillBefore | Self::PowerBefore)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum During {
    Making,
    Committing,
    /// An opening after a crash.
    Opening,
    Closing,
}

type Kind = (During, &'static str);

const KINDS: [Kind; 10] = [
    (During::Making, "reserve"),
    (During::Making, "write"),
    (During::Making, "sync"),
    (During::Committing, "write"),
    (During::Committing, "durable write"),
    (During::Committing, "sync"),
    (During::Opening, "write"),
    (During::Opening, "sync"),
    (During::Closing, "write"),
    (During::Closing, "sync"),
];

/// Which operation met which crash, how often.
#[derive(Default)]
pub(super) struct Matrix {
    cells: BTreeMap<(Kind, Strike), u64>,
    /// Every crash in every opening after a crash; else one at each operation of every fourth.
    is_deep: bool,
    /// How many crashes that were not in an opening.
    firsts: usize,
    failure: Option<String>,
}

/// What a crash leaves.
struct Remains {
    file: SimFile,
    live: Option<Vec<u8>>,
    boot: u128,
    end: End,
}

fn kind_of(change: &Change) -> &'static str {
    match change {
        Change::Reserve { .. } => "reserve",
        Change::Write { dsync: false, .. } => "write",
        Change::Write { dsync: true, .. } => "durable write",
        Change::Sync => "sync",
    }
}

impl SimFile {
    fn change(&mut self, now: u64, submitted: u64, change: &Change) {
        match change {
            Change::Reserve { len_bytes } => self.image.resize(*len_bytes as usize, 0),
            Change::Write { offset_bytes, bytes, dsync } => self.write(now, *offset_bytes, bytes, *dsync),
            Change::Sync => self.sync(submitted),
        }
    }

    /// A power cut after which nothing is left that isn't durable.
    fn lose_all(&mut self) {
        for (sector, versions) in std::mem::take(&mut self.volatile) {
            self.image[sector as usize * 512..][..512].copy_from_slice(&versions[0].1);
        }
    }
}

impl World {
    /// Before an operation of a lane, all its crashes are tried.
    pub(super) fn strike_at(&mut self, process: &Process, io: &FileIo, submitted: u64) {
        if self.strikes.as_ref().is_none_or(|matrix| matrix.failure.is_some()) {
            return;
        }
        let written = |io: &FileIo| match (io.file, io.op, &io.buffer) {
            (plan::SCRATCH_FILE, FileOp::Write { dsync }, IoBuffer::Shared(slot)) => {
                let from = io.buffer_offset_bytes as usize;
                let bytes = slot[from..from + io.len_bytes as usize].to_vec();
                Some(Change::Write { offset_bytes: io.offset_bytes, bytes, dsync })
            }
            _ => None,
        };
        let change = match (io.file, io.op) {
            (plan::SCRATCH_FILE, FileOp::Sync) => Some(Change::Sync),
            _ => written(io),
        };
        let Some(change) = change else { return };
        let others: Vec<Change> = process.port.io.iter().filter_map(|(_, _, io)| written(io)).collect();
        let live = std::fs::read(&self.live).ok();
        let note = Note { change, live: [live.clone(), live] };
        // A sync must cover what is written now if it is submitted when that has ended.
        let now = self.now;
        self.strike_all(During::Committing, &process.file, submitted, &note, &others);
        self.now = now;
    }

    /// Tries all crashes at an operation; the first promise that is broken is kept.
    fn strike_all(&mut self, during: During, file: &SimFile, submitted: u64, note: &Note, others: &[Change]) {
        let Some(mut matrix) = self.strikes.take() else { return };
        for strike in Strike::ALL {
            let kind = (during, kind_of(&note.change));
            let remains = self.remains(file, submitted, note, others, strike);
            *matrix.cells.entry((kind, strike)).or_default() += 1;
            let survived = match during {
                During::Making => self.is_whole_or_none(&remains),
                _ => self.survives_twice(&remains, &mut matrix),
            };
            if let Err(what) = survived {
                matrix.failure.get_or_insert(format!("{strike:?} at a {} while {during:?}: {what}", kind.1));
            }
        }
        self.strikes = Some(matrix);
    }

    fn remains(
        &mut self,
        file: &SimFile,
        submitted: u64,
        note: &Note,
        others: &[Change],
        strike: Strike,
    ) -> Remains {
        let mut file = file.clone();
        self.now += 1;
        let now = self.now;
        match strike {
            Strike::KillBefore | Strike::KillAfter => {
                if strike == Strike::KillAfter {
                    file.change(now, submitted, &note.change);
                }
                others.iter().for_each(|other| self.tear(&mut file, other));
                let live = note.live[usize::from(!strike.is_before())].clone();
                return Remains { file, live, boot: self.boot, end: End::Kill };
            }
            Strike::PowerBefore => file.lose_all(),
            Strike::PowerAfter => {
                if let Change::Sync = note.change {
                    file.sync(submitted);
                }
                file.lose_all();
                file.change(now, submitted, &note.change);
            }
            Strike::PowerDuring => {
                self.tear(&mut file, &note.change);
                others.iter().for_each(|other| self.tear(&mut file, other));
                file = SimFile::new(file.cut(&mut self.rng), self.is_honest);
            }
        }
        file.volatile.clear();
        Remains { file, live: None, boot: self.boot + 1, end: End::Power }
    }

    /// Some sectors of a write land.
    fn tear(&mut self, file: &mut SimFile, change: &Change) {
        let Change::Write { offset_bytes, bytes, .. } = change else { return };
        for (number, sector) in bytes.chunks_exact(512).enumerate() {
            if self.rng.random() {
                file.write(self.now, offset_bytes + number as u64 * 512, sector, false);
            }
        }
    }

    /// What was promised is there, also if the opening meets a crash.
    fn survives_twice(&mut self, remains: &Remains, matrix: &mut Matrix) -> Result<(), String> {
        let notes = self.survives(remains)?;
        let turn = matrix.firsts;
        matrix.firsts += 1;
        if !matrix.is_deep && !turn.is_multiple_of(4) {
            return Ok(());
        }
        let mut file = remains.file.clone();
        let boot = std::mem::replace(&mut self.boot, remains.boot);
        let mut done = Ok(());
        for (index, note) in notes.iter().enumerate() {
            for strike in Strike::ALL {
                let is_wanted = matrix.is_deep || strike as usize == (turn / 4 + index) % Strike::ALL.len();
                if !is_wanted || done.is_err() {
                    continue;
                }
                let mut again = self.remains(&file, self.now, note, &[], strike);
                if remains.end == End::Power {
                    again.end = End::Power;
                }
                let kind = (During::Opening, kind_of(&note.change));
                *matrix.cells.entry((kind, strike)).or_default() += 1;
                done = self.survives(&again).map(drop);
                done = done.map_err(|what| format!("then {strike:?} at a {} of the opening: {what}", kind.1));
            }
            self.now += 1;
            file.change(self.now, self.now, &note.change);
        }
        self.boot = boot;
        done
    }

    /// Opens what is left beside the living file, and compares; gives what the opening did.
    fn survives(&mut self, remains: &Remains) -> Result<Vec<Note>, String> {
        let model = self.model.clone();
        let rng = std::mem::replace(&mut self.rng, StdRng::seed_from_u64(self.now));
        let [path, live] = self.aside();
        let path = std::mem::replace(&mut self.path, path);
        let live = std::mem::replace(&mut self.live, live);
        let result = self.open_aside(remains);
        (self.path, self.live, self.model, self.rng) = (path, live, model, rng);
        result
    }

    /// Where the files lie that a crash left: in memory if possible, since they are many and synced often.
    fn aside(&self) -> [PathBuf; 2] {
        let memory = PathBuf::from("/dev/shm");
        let folder = if memory.is_dir() { memory } else { std::env::temp_dir() };
        let name = self.journal.folder.file_name().unwrap_or_default().to_string_lossy();
        [folder.join(format!("{name}-aside.raw")), folder.join(format!("{name}-aside.map"))]
    }

    fn open_aside(&mut self, remains: &Remains) -> Result<Vec<Note>, String> {
        self.lay(remains);
        let boot = Uuid::from_u128(remains.boot);
        let (opened, notes) = noting(&self.live, || {
            ScratchFile::open_in(
                boot,
                &self.path,
                Some(&self.live),
                &self.owner,
                &self.keys(),
                std::time::Instant::now(),
            )
        });
        let mut process = self.process(opened.map_err(|error| format!("{error}"))?);
        self.compare(&mut process, remains.end)?;
        Ok(notes)
    }

    /// The files become what is left.
    fn lay(&self, remains: &Remains) {
        std::fs::write(&self.path, &remains.file.image).expect("image");
        match &remains.live {
            Some(live) => std::fs::write(&self.live, live).expect("map"),
            None => _ = std::fs::remove_file(&self.live),
        }
    }

    /// A file that was being made is empty, or is none.
    fn is_whole_or_none(&mut self, remains: &Remains) -> Result<(), String> {
        match self.survives(remains) {
            Ok(_) => Ok(()),
            Err(what) => {
                let [path, _] = self.aside();
                match ScratchFile::owner(&path) {
                    Ok(None) => Ok(()),
                    owner => Err(format!("{what}, and its owner is {owner:?}")),
                }
            }
        }
    }

    /// One run: the file is made, written to and closed.
    fn through(seed: u64, is_honest: bool, is_deep: bool) -> Result<Matrix, String> {
        let mut world = Self::sized(seed, is_honest, SMALL_DISK_BYTES);
        world.strikes = Some(Matrix { is_deep, ..Matrix::default() });
        let boot = Uuid::from_u128(world.boot);
        let (made, notes) = noting(&world.live, || {
            ScratchFile::make_in(
                boot,
                &world.path,
                Some(&world.live),
                &world.owner,
                &world.keys(),
                SMALL_DISK_BYTES,
            )
        });
        world.strike_each(During::Making, SimFile::new(Vec::new(), is_honest), &notes);
        let mut process = world.process(made.map_err(|error: ScratchError| error.to_string())?);
        world.load(&mut process, STEPS);
        while world.step(&mut process) {}
        let Process { disk, lanes, file, .. } = process;
        drop(lanes);
        std::fs::write(&world.path, &file.image).expect("image");
        let (closed, notes) = noting(&world.live, || disk.close_scratch());
        assert!(closed.map_err(|error| error.to_string())?, "a lane is left");
        let mut file = world.strike_each(During::Closing, file, &notes);
        // What was closed needs nothing but the file.
        file.lose_all();
        let remains = Remains { file, live: None, boot: world.boot + 1, end: End::Kill };
        world.survives(&remains).map_err(|what| format!("after it was closed: {what}"))?;
        let matrix = world.strikes.take().unwrap_or_default();
        match matrix.failure {
            Some(what) => Err(what),
            None => Ok(matrix),
        }
    }

    /// All crashes at each of these; gives the file as it is after the last.
    fn strike_each(&mut self, during: During, mut file: SimFile, notes: &[Note]) -> SimFile {
        for note in notes {
            self.strike_all(during, &file, self.now, note, &[]);
            self.now += 1;
            file.change(self.now, self.now, &note.change);
        }
        file
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for path in self.aside() {
            let _ = std::fs::remove_file(path);
        }
    }
}

#[test]
fn each_write_and_sync_survives_every_crash() {
    let is_long = std::env::var_os("HOLDFAST_LONG").is_some();
    let mut cells: BTreeMap<(Kind, Strike), u64> = BTreeMap::new();
    // The odd ones are encrypted.
    for seed in 0..if is_long { 4 } else { 2 } {
        match World::through(seed, true, is_long) {
            Ok(matrix) => {
                matrix.cells.into_iter().for_each(|(key, count)| *cells.entry(key).or_default() += count);
            }
            Err(what) => panic!("seed {seed}: {what}"),
        }
    }
    for kind in KINDS {
        let counts = Strike::ALL.map(|strike| cells.get(&(kind, strike)).copied().unwrap_or_default());
        println!("{:<28}{counts:?}", format!("{:?} {}", kind.0, kind.1));
        assert!(counts.iter().all(|count| *count > 0), "{kind:?} did not meet every crash: {counts:?}");
    }
    assert!(cells.keys().all(|(kind, _)| KINDS.contains(kind)), "{cells:?}");
    println!("{} crashes", cells.values().sum::<u64>());
}

/// The model would notice: a disk whose flush does nothing loses what was flushed.
#[test]
fn a_disk_that_lies_about_its_flush_is_found_out_by_the_matrix() {
    assert!((0..2).all(|seed| World::through(seed, false, false).is_err()));
}
