//! What must be durable of a VM's numbering: its generation and the numbers that it may use (A5).

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::api::GenerationId;
use crate::wire::MAX_ANCESTORS;

/// Numbers are reserved in blocks of this many.
pub const SEQUENCE_BLOCK: u64 = 1 << 20;

/// The numbering of a VM, as far as it is durable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SequenceState {
    /// The generation in which numbers are given.
    pub generation: GenerationId,
    /// Generations that it continues, newest first, back to the last one that a target is known to have granted.
    pub ancestors: Vec<GenerationId>,
    /// The generation's first number.
    pub first_seq: u64,
    /// The first number that isn't reserved: a later generation begins there or above.
    pub ceiling_seq: u64,
    /// Another VRA's generation that was continued last, so that a definition is followed in this once.
    #[serde(default)]
    pub taken_over: Option<GenerationId>,
}

impl SequenceState {
    /// A VM's first generation.
    pub fn first(generation: GenerationId) -> Self {
        Self {
            generation,
            ancestors: Vec::new(),
            first_seq: 1,
            ceiling_seq: 1 + SEQUENCE_BLOCK,
            taken_over: None,
        }
    }

    /// The generation after this one, beginning at `first_seq` or above.
    pub fn next(&self, generation: GenerationId, first_seq: u64) -> Self {
        let mut ancestors = self.ancestors.clone();
        if ancestors.len() == MAX_ANCESTORS {
            // The oldest is the last one granted; any newer one may have been granted unnoticed. The least likely goes.
            ancestors.remove(MAX_ANCESTORS - 2);
        }
        ancestors.insert(0, self.generation);
        let ceiling_seq = self.ceiling_seq.max(first_seq + SEQUENCE_BLOCK);
        Self { generation, ancestors, first_seq, ceiling_seq, taken_over: self.taken_over }
    }
}

/// Has a VM's next generation continue another VRA's (A5), whose numbers are below `first_seq`. To be called before the VM is protected;
/// again is harmless.
///
/// # Errors
/// The state can't be read or saved.
pub fn take_over(
    store: &dyn SequenceStore,
    generation: GenerationId,
    first_seq: u64,
) -> Result<(), SequenceStoreError> {
    let taken_over = Some(generation);
    let state = match store.load()? {
        None => {
            SequenceState { generation, ancestors: Vec::new(), first_seq, ceiling_seq: first_seq, taken_over }
        }
        Some(mut state) => {
            // The same definition as at an earlier start. Since then a generation of this VRA's may have been granted, which is what the next
            // ones continue.
            if state.taken_over == taken_over && state.ceiling_seq >= first_seq {
                return Ok(());
            }
            let is_new = state.taken_over != taken_over;
            (state.ceiling_seq, state.taken_over) = (state.ceiling_seq.max(first_seq), taken_over);
            if is_new && state.generation != generation && !state.ancestors.contains(&generation) {
                // The oldest is the last one granted, which this one is now.
                state.ancestors.truncate(MAX_ANCESTORS - 1);
                state.ancestors.push(generation);
            }
            state
        }
    };
    store.save(&state)
}

/// Keeps a VM's [`SequenceState`] across restarts.
pub trait SequenceStore: Send + Sync {
    /// What was saved last, or nothing for a new VM.
    ///
    /// # Errors
    /// It can't be read or isn't whole: without it numbers could be used twice, so capture must not begin.
    fn load(&self) -> Result<Option<SequenceState>, SequenceStoreError>;

    /// Saves durably, whole or not at all.
    ///
    /// # Errors
    /// What was saved before stands, or this does.
    fn save(&self, state: &SequenceState) -> Result<(), SequenceStoreError>;
}

/// Why a [`SequenceStore`] failed.
#[derive(Debug, Error)]
pub enum SequenceStoreError {
    /// The file can't be read or written.
    #[error("can't {action} the numbering state {path}: check the disk and the permissions of the state directory", path = path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The file is no state.
    #[error(
        "the numbering state {path} is damaged: restore it, or remove it and protect the VM anew with a new journal",
        path = path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The file is of a newer version.
    #[error("the numbering state {path} has format version {version}, newer than this build: upgrade the VRA", path = path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
}

/// A file with the state as JSON, replaced as a whole.
#[derive(Clone, Debug)]
pub struct FileSequenceStore {
    path: PathBuf,
}

impl FileSequenceStore {
    /// The state in `path`, whose directory exists.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    fn failed(&self, action: &'static str) -> impl FnOnce(io::Error) -> SequenceStoreError {
        let path = self.path.clone();
        move |source| SequenceStoreError::Io { action, path, source }
    }

    fn replace(&self, bytes: &[u8]) -> io::Result<()> {
        let temporary = self.path.with_extension("new");
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, &self.path)?;
        let directory = self.path.parent().filter(|path| !path.as_os_str().is_empty());
        File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
    }
}

impl SequenceStore for FileSequenceStore {
    fn load(&self) -> Result<Option<SequenceState>, SequenceStoreError> {
        let bytes = match fs::read(&self.path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.failed("read")(error)),
        };
        let damaged = |source| SequenceStoreError::Damaged { path: self.path.clone(), source };
        let Versioned { version } = serde_json::from_slice(&bytes).map_err(damaged)?;
        if version > VERSION {
            return Err(SequenceStoreError::Version { path: self.path.clone(), version });
        }
        serde_json::from_slice(&bytes).map(Some).map_err(damaged)
    }

    fn save(&self, state: &SequenceState) -> Result<(), SequenceStoreError> {
        let document = Document { version: VERSION, state: state.clone() };
        let bytes = serde_json::to_vec_pretty(&document).expect("plain fields always serialize");
        self.replace(&bytes).map_err(self.failed("write"))
    }
}

const VERSION: u32 = 1;

#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

#[derive(Serialize)]
struct Document {
    /// Version of the file's format.
    version: u32,
    #[serde(flatten)]
    state: SequenceState,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(name: &str) -> (FileSequenceStore, PathBuf) {
        let directory = std::env::temp_dir().join(format!("capture-store-{name}-{}", std::process::id()));
        fs::create_dir_all(&directory).expect("temporary directory");
        (FileSequenceStore::new(directory.join("sequence.json")), directory)
    }

    #[test]
    fn what_was_saved_comes_back_and_damage_is_named() {
        let (store, directory) = store("round");
        assert_eq!(store.load().expect("no file"), None);
        let state = SequenceState::first(GenerationId::random()).next(GenerationId::random(), 77);
        store.save(&state).expect("saved");
        assert_eq!(store.load().expect("readable"), Some(state));
        fs::write(directory.join("sequence.json"), b"{\"version\":1,").expect("written");
        assert!(matches!(store.load(), Err(SequenceStoreError::Damaged { .. })));
        fs::write(directory.join("sequence.json"), b"{\"version\":2}").expect("written");
        let error = store.load().expect_err("newer").to_string();
        assert!(error.contains("version 2") && error.contains("upgrade"), "{error}");
        fs::remove_dir_all(directory).expect("removed");
    }

    #[test]
    fn an_unwritable_directory_is_named() {
        let store = FileSequenceStore::new("/nonexistent/holdfast/sequence.json");
        let error = store.save(&SequenceState::first(GenerationId::random())).expect_err("no directory");
        assert!(error.to_string().contains("/nonexistent/holdfast/sequence.json"));
    }

    #[test]
    fn a_source_continues_what_another_one_wrote_and_what_it_wrote_itself() {
        let (store, directory) = store("taken");
        let (others, own, third) = (GenerationId::random(), GenerationId::random(), GenerationId::random());
        take_over(&store, others, 5000).expect("saved");
        let first = store.load().expect("readable").expect("saved").next(own, 5000);
        assert_eq!((first.ancestors.as_slice(), first.first_seq), (&[others][..], 5000));
        store.save(&first).expect("saved");
        // A restart with the same definition.
        take_over(&store, others, 5000).expect("saved");
        assert_eq!(store.load().expect("readable").as_ref(), Some(&first));
        // That generation was granted, and is the last one granted from then on.
        let granted = SequenceState { ancestors: Vec::new(), ..first.clone() };
        store.save(&granted).expect("saved");
        take_over(&store, others, 5000).expect("saved");
        assert_eq!(store.load().expect("readable"), Some(granted));
        // The VM went away and came back.
        take_over(&store, third, 1 << 40).expect("saved");
        let back = store.load().expect("readable").expect("saved");
        let next = back.next(GenerationId::random(), back.ceiling_seq);
        assert_eq!((next.ancestors.as_slice(), next.first_seq), (&[own, third][..], 1 << 40));
        let mut long = first;
        (0..100).for_each(|_| long = long.next(GenerationId::random(), long.ceiling_seq));
        store.save(&long).expect("saved");
        take_over(&store, third, 1 << 41).expect("saved");
        let full = store.load().expect("readable").expect("saved");
        assert_eq!((full.ancestors.len(), full.ancestors.last()), (MAX_ANCESTORS, Some(&third)));
        fs::remove_dir_all(directory).expect("removed");
    }

    #[test]
    fn ancestors_keep_the_newest_and_the_last_one_granted() {
        let granted = GenerationId::random();
        let mut state = SequenceState::first(granted);
        for _ in 0..100 {
            state = state.next(GenerationId::random(), state.ceiling_seq);
        }
        assert_eq!(state.ancestors.len(), MAX_ANCESTORS);
        assert_eq!(state.ancestors.last(), Some(&granted));
        assert_eq!(state.first_seq, 1 + 100 * SEQUENCE_BLOCK);
    }
}
