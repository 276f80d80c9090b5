//! The folder that keeps what the rig fetched and built: kernels, emulator, base images, logs of runs.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use crate::error::RigError;

/// The cache folder. All of it can be deleted at any time when no rig runs.
#[derive(Clone, Debug)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// Opens the cache in `chosen`, else in `$HOLDFAST_RIG_CACHE`, else in `.cache/rig` of the repository.
    pub fn open(chosen: Option<&Path>) -> Result<Self, RigError> {
        let root = chosen
            .map(Path::to_path_buf)
            .or_else(|| std::env::var_os("HOLDFAST_RIG_CACHE").map(PathBuf::from))
            .unwrap_or_else(|| repository_root().join(".cache/rig"));
        fs::create_dir_all(&root).map_err(RigError::io("creating", &root))?;
        let root = root.canonicalize().map_err(RigError::io("resolving", &root))?;
        Ok(Self { root })
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A folder of the cache, created when missing.
    pub fn folder(&self, name: &str) -> Result<PathBuf, RigError> {
        let folder = self.root.join(name);
        fs::create_dir_all(&folder).map_err(RigError::io("creating", &folder))?;
        Ok(folder)
    }

    /// Keeps other rigs from changing the cache until the lock is dropped.
    pub fn lock(&self) -> Result<Flock<File>, RigError> {
        let path = self.root.join("lock");
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(RigError::io("opening", &path))?;
        Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, errno)| RigError::io("locking", &path)(errno.into()))
    }
}

/// The repository that the caller stands in, else the one that this program was built from.
pub fn repository_root() -> PathBuf {
    let is_root = |folder: &Path| folder.join("hwtests/Cargo.toml").is_file();
    let here = std::env::current_dir().ok();
    here.iter()
        .flat_map(|here| here.ancestors())
        .find(|folder| is_root(folder))
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join(".."), Path::to_path_buf)
}
