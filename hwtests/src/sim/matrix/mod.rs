//! The crash matrix: scripted runs that crash at every operation of their target's storage, in every way, and again in the opening
//! that follows, and in which every operation fails once; each compared with the model.

mod run;
mod scenario;

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Mutex;

use journal::storage::Purpose;
use journal::storage::sim::{OpKind, SimRng, Strike};

use super::kinds::OP_KINDS;
use super::{Happening, PlantedBug};
use run::{Run, Survived};
use scenario::Scenario;

/// How much is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effort {
    /// One seed a scenario; second crashes at all that an opening writes, in one way each and by turns in all, and at one later operation.
    Short,
    /// Several seeds, which differ in the order in which operations end; second crashes at every operation of an opening, in every way, and
    /// at several later ones.
    Long,
}

impl Effort {
    fn seeds(self) -> u64 {
        match self {
            Self::Short => 1,
            Self::Long => 2,
        }
    }

    /// For each crash, how many runs that go on after it and meet another one.
    fn later_crashes(self) -> u64 {
        match self {
            Self::Short => 1,
            Self::Long => 4,
        }
    }

    /// At which operations of the opening there is a second crash, and which.
    fn second_crashes(self, case: &Case, met: OpKind, opening: &[OpKind]) -> Vec<(usize, Strike)> {
        let all = Strike::DEATHS;
        match self {
            _ if case.later.is_some() => Vec::new(),
            // The files are as they were before or after another operation.
            Self::Short if met.1 == "read" => Vec::new(),
            Self::Short => {
                let writes = (0..opening.len()).filter(|at| opening[*at].1 != "read");
                writes.map(|at| (at, all[(case.op + case.strike as usize + at) % all.len()])).collect()
            }
            Self::Long => (0..opening.len()).flat_map(|at| all.map(|strike| (at, strike))).collect(),
        }
    }
}

/// One crash of the matrix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Case {
    scenario: String,
    seed: u64,
    /// The operation's place among all that the target's storage runs.
    op: usize,
    strike: Strike,
    /// Another crash, so many operations after the opening that follows.
    later: Option<(usize, Strike)>,
}

/// Second crashes are among so many operations after an opening.
const LATER_OPS: u64 = 48;
/// The same for every other one: what an opening has failed to make durable is so soon by the next sync.
const SOON_OPS: u64 = 6;

impl Case {
    /// The same crash followed by a later one; which, a number decides.
    fn and_later(&self, number: u64) -> Self {
        let mut rng = SimRng::new(self.salt() << 8 ^ number);
        let strike = Strike::DEATHS[rng.below(Strike::DEATHS.len() as u64) as usize];
        let within = if rng.one_in(2) { SOON_OPS } else { LATER_OPS };
        Self { later: Some((rng.below(within) as usize, strike)), ..self.clone() }
    }

    /// Other bits survive in each case.
    fn salt(&self) -> u64 {
        self.seed << 32 ^ (self.op as u64) << 8 ^ self.strike as u64
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}:{:?}", self.scenario, self.seed, self.op, self.strike)?;
        self.later.map_or(Ok(()), |(op, strike)| write!(f, "+{op}:{strike:?}"))
    }
}

impl FromStr for Case {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let malformed = || format!("{text} is not SCENARIO:SEED:OPERATION:STRIKE[+OPERATION:STRIKE]");
        let number = |text: &str| text.parse().map_err(|_| malformed());
        let strike = |text: &str| {
            let found = Strike::ALL.into_iter().find(|known| format!("{known:?}") == text);
            found.ok_or_else(malformed)
        };
        let (first, later) = text.split_once('+').map_or((text, None), |(first, later)| (first, Some(later)));
        let [scenario, seed, op, first] = first.split(':').collect::<Vec<_>>()[..] else {
            return Err(malformed());
        };
        let later = later.map(|later| later.split_once(':').ok_or_else(malformed)).transpose()?;
        let later = later.map(|(op, later)| Ok::<_, String>((number(op)?, strike(later)?))).transpose()?;
        let seed = seed.parse().map_err(|_| malformed())?;
        Ok(Self { scenario: scenario.into(), seed, op: number(op)?, strike: strike(first)?, later })
    }
}

/// A crash after which a promise was broken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MatrixFailure {
    /// Which crash; none if the scenario failed without.
    pub case: Option<Case>,
    /// Which promise.
    pub what: String,
}

impl fmt::Display for MatrixFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.case {
            Some(case) => write!(f, "case {case}: {}", self.what),
            None => write!(f, "without a crash: {}", self.what),
        }
    }
}

impl std::error::Error for MatrixFailure {}

/// How often a kind of operation met which crash.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Matrix {
    first: BTreeMap<(OpKind, Strike), u64>,
    /// In an opening after a crash.
    second: BTreeMap<(OpKind, Strike), u64>,
    /// While the run went on after a crash.
    later: BTreeMap<(OpKind, Strike), u64>,
    happenings: BTreeMap<Happening, u64>,
}

/// What an opening writes.
const OPENING_OP_KINDS: [OpKind; 8] = [
    (Purpose::Carry, "fdatasync"),
    (Purpose::Carry, "write"),
    (Purpose::Seal, "write"),
    (Purpose::Superblock, "fdatasync"),
    (Purpose::Superblock, "write"),
    (Purpose::SuperblockMirror, "write"),
    (Purpose::Shrink, "truncate"),
    (Purpose::Reserve, "allocate"),
];

/// What must have happened in the scenarios.
const HAPPENINGS: [Happening; 14] = [
    Happening::BaseSyncEnded,
    Happening::HistoryGivenUp,
    Happening::ForkJournaled,
    Happening::Reconnected,
    Happening::DiedWithGroupAhead,
    Happening::Carried,
    Happening::CarriedEncrypted,
    Happening::SealedLate,
    Happening::Promoted,
    Happening::PromotionResumed,
    Happening::Shrunk,
    Happening::CheckpointCompared,
    Happening::CheckpointAfterBase,
    Happening::CheckpointInsideSync,
];

impl Matrix {
    fn add(&mut self, other: &Self) {
        let add = |into: &mut BTreeMap<_, u64>, from: &BTreeMap<_, u64>| {
            from.iter().for_each(|(key, count)| *into.entry(*key).or_default() += count);
        };
        add(&mut self.first, &other.first);
        add(&mut self.second, &other.second);
        add(&mut self.later, &other.later);
        other
            .happenings
            .iter()
            .for_each(|(happening, count)| *self.happenings.entry(*happening).or_default() += count);
    }

    fn note(&mut self, case: &Case, survived: Survived) {
        let Survived { first, second, later, happenings } = survived;
        let count = |cells: &mut BTreeMap<_, u64>, met: Vec<(OpKind, Strike)>| {
            met.into_iter().for_each(|key| *cells.entry(key).or_default() += 1);
        };
        if case.later.is_none() {
            count(&mut self.first, first);
        }
        count(&mut self.second, second);
        count(&mut self.later, later);
        happenings
            .into_iter()
            .for_each(|(happening, count)| *self.happenings.entry(happening).or_default() += count);
    }

    /// How many first crashes there were, second ones in the openings after them, and later ones.
    pub fn counts(&self) -> [u64; 3] {
        [&self.first, &self.second, &self.later].map(|cells| cells.values().sum())
    }

    /// Which kinds of operations met a crash never, and which are not known.
    pub fn missing(&self) -> Vec<String> {
        let lacks = |cells: &BTreeMap<_, u64>, strikes: &[Strike], known: &[OpKind], what: &str| {
            let wanted = known.iter().flat_map(|kind| strikes.iter().map(|strike| (*kind, *strike)));
            let never = wanted.filter(|key| !cells.contains_key(key));
            let mut lacking: Vec<String> =
                never.map(|(kind, strike)| format!("{strike:?} at {kind:?}{what}")).collect();
            // A long run has crashes where an opening only reads, too.
            let is_known = |kind: &OpKind| known.contains(kind) || OP_KINDS.contains(kind);
            let unknown = cells.keys().map(|(kind, _)| kind).filter(|kind| !is_known(kind));
            lacking.extend(unknown.map(|kind| format!("{kind:?}{what} is not known")));
            lacking.dedup();
            lacking
        };
        let mut all = lacks(&self.first, &Strike::ALL, &OP_KINDS, "");
        all.extend(lacks(&self.second, &Strike::DEATHS, &OPENING_OP_KINDS, " of an opening after a crash"));
        let never = HAPPENINGS.iter().filter(|happening| !self.happenings.contains_key(happening));
        all.extend(never.map(|happening| format!("{happening:?}")));
        all
    }
}

impl fmt::Display for Matrix {
    /// A table: a row for each kind of operation, a column for each crash, in it how many first ones, second ones in the openings after
    /// them, and later ones.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = [&self.first, &self.second, &self.later];
        write!(f, "{:<24}", "")?;
        Strike::ALL.iter().try_for_each(|strike| write!(f, "{:>18}", format!("{strike:?}")))?;
        let mut kinds: Vec<OpKind> = all.iter().flat_map(|cells| cells.keys()).map(|key| key.0).collect();
        kinds.sort_unstable();
        kinds.dedup();
        for kind in kinds {
            let (purpose, verb) = kind;
            write!(f, "\n{:<24}", format!("{purpose:?} {verb}"))?;
            for strike in Strike::ALL {
                let counts = all.map(|cells| cells.get(&(kind, strike)).copied().unwrap_or_default());
                write!(f, "{:>18}", counts.map(|count| count.to_string()).join("+"))?;
            }
        }
        Ok(())
    }
}

/// Runs all cases on all cores until one fails.
///
/// # Errors
/// The first case in order that failed, among those that were run.
pub fn run_matrix(effort: Effort, bug: Option<PlantedBug>) -> Result<Matrix, MatrixFailure> {
    super::keep_freed_memory();
    let mut cases = Vec::new();
    for scenario in &scenario::ALL {
        for seed in 0..effort.seeds() {
            let (ops, watched_from) = guarded(bug, || Run::undisturbed(scenario, seed)).map_err(|what| {
                MatrixFailure { case: None, what: format!("{}, seed {seed}: {what}", scenario.name) }
            })?;
            for op in watched_from..ops.len() {
                for strike in Strike::ALL {
                    let case = Case { scenario: scenario.name.into(), seed, op, strike, later: None };
                    // A failure that nothing follows from but another try has no recovery to go on after.
                    let count = if strike == Strike::Fail { 0 } else { effort.later_crashes() };
                    let later = (0..count).map(|number| case.and_later(number));
                    cases.extend(later.collect::<Vec<_>>());
                    cases.push(case);
                }
            }
        }
    }
    let waiting = Mutex::new((cases.into_iter(), Vec::<MatrixFailure>::new()));
    let worker = || {
        let mut matrix = Matrix::default();
        loop {
            let case = {
                let mut waiting = waiting.lock().expect("no thread panics with it");
                if waiting.1.is_empty() { waiting.0.next() } else { None }
            };
            let Some(case) = case else { return matrix };
            match survive(&case, effort, bug, false) {
                Ok(survived) => matrix.note(&case, survived),
                Err(failure) => waiting.lock().expect("no thread panics with it").1.push(failure),
            }
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut matrix = Matrix::default();
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        running.into_iter().for_each(|thread| matrix.add(&thread.join().expect("a case's panic is caught")));
    });
    let failures = waiting.into_inner().expect("no thread panics with it").1;
    failures.into_iter().next().map_or(Ok(matrix), Err)
}

/// Runs one case and prints what happens.
///
/// # Errors
/// The promise that was broken.
pub fn run_case(case: &Case, effort: Effort, bug: Option<PlantedBug>) -> Result<(), MatrixFailure> {
    survive(case, effort, bug, true).map(drop)
}

fn survive(
    case: &Case,
    effort: Effort,
    bug: Option<PlantedBug>,
    traced: bool,
) -> Result<Survived, MatrixFailure> {
    let run = || {
        let scenario: Option<&Scenario> = scenario::ALL.iter().find(|known| known.name == case.scenario);
        Run::struck(scenario.ok_or("there is no such scenario")?, case, effort, traced)
    };
    guarded(bug, run).map_err(|what| MatrixFailure { case: Some(case.clone()), what })
}

fn guarded<T>(bug: Option<PlantedBug>, run: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    PlantedBug::plant(bug);
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
    PlantedBug::plant(None);
    result.unwrap_or_else(|panic| Err(super::told_by(&*panic)))
}
