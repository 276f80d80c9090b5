//! QEMU's guest agent for machines that are guests: Debian's package, unpacked into the cache.

use std::fs;
use std::path::PathBuf;

use crate::apt::{Mirror, PrivateApt};
use crate::cache::Cache;
use crate::error::RigError;

/// The unpacked package.
#[derive(Clone, Debug)]
pub struct GuestAgent {
    root: PathBuf,
}

impl GuestAgent {
    /// Takes it from the cache, else fetches it.
    ///
    /// # Errors
    /// When the package can't be had.
    pub fn get(cache: &Cache) -> Result<Self, RigError> {
        let _lock = cache.lock()?;
        let root = cache.root().join("guest-agent");
        if !root.exists() {
            let mirror = Mirror::of_this_machine()?;
            let suite = &mirror.codename;
            let apt = PrivateApt::new(cache.folder(&format!("apt/{suite}"))?, &mirror, &[suite])?;
            apt.update()?;
            let partial = cache.root().join("guest-agent.partial");
            if partial.exists() {
                fs::remove_dir_all(&partial).map_err(RigError::io("emptying", &partial))?;
            }
            apt.unpack_closure("qemu-guest-agent", suite, &partial)?;
            fs::rename(&partial, &root).map_err(RigError::io("renaming", &partial))?;
        }
        Ok(Self { root })
    }

    /// The agent.
    pub fn program(&self) -> PathBuf {
        self.root.join("usr/sbin/qemu-ga")
    }

    /// The root of what was unpacked, where its libraries are.
    pub fn packages(&self) -> PathBuf {
        self.root.clone()
    }
}
