//! The folders of runs: what a machine left behind, for whoever looks into a failure. The newest are kept.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::cache::Cache;
use crate::error::RigError;

/// How many folders of ended runs stay.
const KEPT_RUNS: usize = 12;

/// The folder of one run. What is large in it goes when it is dropped; the logs stay until newer runs push them out.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
}

impl RunFolder {
    /// Makes a new folder and deletes the oldest ones.
    pub fn create(cache: &Cache) -> Result<Self, RigError> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let all = cache.folder("runs")?;
        delete_oldest(&all)?;
        let now_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis());
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = all.join(format!("{now_ms}-{}-{number}", std::process::id()));
        fs::create_dir(&path).map_err(RigError::io("creating", &path))?;
        Ok(Self { path })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        let Ok(entries) = fs::read_dir(&self.path) else { return };
        for entry in entries.flatten() {
            let path = entry.path();
            let is_disk = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("disk"));
            if is_disk || path.extension().is_some_and(|extension| extension == "cpio" || extension == "tar")
            {
                let _ = fs::remove_file(path);
            }
        }
    }
}

fn delete_oldest(all: &Path) -> Result<(), RigError> {
    let mut ended: Vec<PathBuf> = fs::read_dir(all)
        .map_err(RigError::io("listing", all))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| !is_running(path))
        .collect();
    ended.sort();
    for path in ended.iter().rev().skip(KEPT_RUNS) {
        // Another rig may delete the same folder at the same time.
        let _ = fs::remove_dir_all(path);
    }
    Ok(())
}

fn is_running(run: &Path) -> bool {
    let name = run.file_name().unwrap_or_default().to_string_lossy();
    name.split('-').nth(1).is_some_and(|pid| Path::new("/proc").join(pid).exists())
}
