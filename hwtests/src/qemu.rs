//! The emulator: QEMU 10 from the release's backports, unpacked into the cache, else the installed one.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::apt::{Mirror, PrivateApt};
use crate::cache::Cache;
use crate::error::RigError;
use crate::tool;

/// QEMU 10's `max` boots both kernels and does AES three times faster than 7.2's usable models.
const GOOD_MAJOR: u32 = 10;

/// A usable QEMU.
#[derive(Clone, Debug)]
pub struct Qemu {
    program: PathBuf,
    /// Where an unpacked QEMU has its files; none for the installed one.
    prefix: Option<PathBuf>,
    /// Its version, as `10.0.2`.
    pub version: String,
}

impl Qemu {
    /// Finds QEMU, or fetches it into the cache.
    pub fn get(cache: &Cache) -> Result<Self, RigError> {
        let _lock = cache.lock()?;
        let prefix = cache.root().join("qemu");
        let installed =
            tool::find("qemu-system-x86_64").map(|program| Self::probe(program, None)).transpose();
        if let Ok(Some(installed)) = &installed
            && installed.major() >= GOOD_MAJOR
        {
            return Ok(installed.clone());
        }
        if !prefix.exists()
            && let Err(error) = fetch(cache, &prefix)
        {
            return match installed {
                Ok(Some(older)) => {
                    tracing::warn!(%error, version = older.version, "QEMU could not be fetched; using the installed one");
                    Ok(older)
                }
                _ => Err(error),
            };
        }
        Self::probe(prefix.join("usr/bin/qemu-system-x86_64"), Some(prefix))
    }

    /// A command that runs it.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        if let Some(prefix) = &self.prefix {
            let libraries = prefix.join("usr/lib/x86_64-linux-gnu");
            command.env("QEMU_MODULE_DIR", libraries.join("qemu"));
            // Unpacked packages of Debian 12 still have some libraries in /lib.
            let older_libraries = prefix.join("lib/x86_64-linux-gnu");
            command.env("LD_LIBRARY_PATH", format!("{}:{}", libraries.display(), older_libraries.display()));
            for data in ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"] {
                command.arg("-L").arg(prefix.join(data));
            }
        }
        command
    }

    /// The processor model that boots both kernels under TCG.
    pub fn tcg_cpu(&self) -> &'static str {
        if self.major() >= GOOD_MAJOR { "max" } else { "Westmere,-cx16" }
    }

    fn major(&self) -> u32 {
        self.version.split('.').next().and_then(|major| major.parse().ok()).unwrap_or(0)
    }

    fn probe(program: PathBuf, prefix: Option<PathBuf>) -> Result<Self, RigError> {
        let mut qemu = Self { program, prefix, version: String::new() };
        let said = tool::run(qemu.command().arg("--version"))?;
        qemu.version = said.split_whitespace().nth(3).unwrap_or("0").to_owned();
        Ok(qemu)
    }
}

fn fetch(cache: &Cache, prefix: &Path) -> Result<(), RigError> {
    let mirror = Mirror::of_this_machine()?;
    let backports = format!("{}-backports", mirror.codename);
    let apt = PrivateApt::new(
        cache.folder(&format!("apt/{backports}"))?,
        &mirror,
        &[&mirror.codename, &backports],
    )?;
    apt.update()?;
    let partial = cache.root().join("qemu.partial");
    if partial.exists() {
        fs::remove_dir_all(&partial).map_err(RigError::io("emptying", &partial))?;
    }
    apt.unpack_closure("qemu-system-x86", &backports, &partial)?;
    fs::rename(&partial, prefix).map_err(RigError::io("renaming", &partial))
}
