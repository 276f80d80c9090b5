//! The kernels that machines boot: Debian's `cloud-amd64` flavour, unpacked into the cache.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::apt::{Mirror, PrivateApt};
use crate::cache::Cache;
use crate::error::RigError;

/// A line of kernels that the rig tests on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Series {
    /// The oldest supported kernel: the newest 6.12 of Debian 13.
    V6_12,
    /// The newest 7.x of Debian 13's backports.
    V7,
}

impl Series {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::V6_12, Self::V7];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::V6_12 => "6.12",
            Self::V7 => "7",
        }
    }

    fn suite(self) -> &'static str {
        match self {
            Self::V6_12 => "trixie",
            Self::V7 => "trixie-backports",
        }
    }

    /// How the names of its packages begin; the release follows, from this number on.
    fn package_prefix(self) -> (&'static str, &'static str) {
        match self {
            Self::V6_12 => ("linux-image-", "6.12."),
            Self::V7 => ("linux-binary-", "7."),
        }
    }
}

impl fmt::Display for Series {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A kernel in the cache.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// Its release, as `uname -r` says.
    pub release: String,
    /// The bootable image.
    pub image: PathBuf,
    modules: BTreeMap<String, PathBuf>,
}

impl Kernel {
    /// The kernel of a series: from the cache, else fetched. `refresh` asks the mirror for a newer one.
    pub fn get(cache: &Cache, series: Series, refresh: bool) -> Result<Self, RigError> {
        let _lock = cache.lock()?;
        let folder = cache.folder("kernels")?;
        let link = folder.join(series.name());
        if refresh || !link.exists() {
            let release = fetch(cache, series, &folder)?;
            let temporary = folder.join(format!("{series}.new"));
            let _ = fs::remove_file(&temporary);
            symlink(&release, &temporary).map_err(RigError::io("linking", &temporary))?;
            fs::rename(&temporary, &link).map_err(RigError::io("renaming", &temporary))?;
        }
        let target = fs::read_link(&link).map_err(RigError::io("reading", &link))?;
        Self::unpacked(&folder.join(&target), &target.to_string_lossy())
    }

    /// The file of a module, by its name with or without dashes.
    pub fn module(&self, name: &str) -> Result<&Path, RigError> {
        let key = name.replace('-', "_");
        self.modules
            .get(&key)
            .map(PathBuf::as_path)
            .ok_or_else(|| RigError::NoModule { release: self.release.clone(), module: name.to_owned() })
    }

    fn unpacked(folder: &Path, release: &str) -> Result<Self, RigError> {
        let modules_folder = folder.join("usr/lib/modules").join(release);
        let image = [folder.join("boot").join(format!("vmlinuz-{release}")), modules_folder.join("vmlinuz")]
            .into_iter()
            .find(|file| file.is_file());
        let Some(image) = image else {
            let missing = std::io::Error::from(std::io::ErrorKind::NotFound);
            return Err(RigError::io("finding the kernel's image in", folder)(missing));
        };
        let mut modules = BTreeMap::new();
        collect_modules(&modules_folder.join("kernel"), &mut modules)?;
        Ok(Self { release: release.to_owned(), image, modules })
    }
}

fn fetch(cache: &Cache, series: Series, folder: &Path) -> Result<String, RigError> {
    let mirror = Mirror::of_this_machine()?;
    let suite = series.suite();
    let apt = PrivateApt::new(cache.folder(&format!("apt/{suite}"))?, &mirror, &[suite])?;
    apt.update()?;
    let (prefix, number) = series.package_prefix();
    let names = apt.names(&format!("{prefix}{number}"))?;
    let newest = names
        .iter()
        .filter_map(|name| release_of(name, prefix))
        .max_by_key(|release| (version_key(release), release.to_owned()))
        .ok_or_else(|| RigError::NoKernel {
            series: series.to_string(),
            suite: suite.to_owned(),
            pattern: format!("{prefix}{number}*-cloud-amd64"),
        })?;
    let target = folder.join(newest);
    if !target.exists() {
        let mut packages = vec![format!("{prefix}{newest}")];
        let modules = format!("linux-modules-{newest}");
        if series == Series::V7 {
            packages.push(modules);
        }
        let partial = folder.join(format!("{newest}.partial"));
        if partial.exists() {
            fs::remove_dir_all(&partial).map_err(RigError::io("emptying", &partial))?;
        }
        apt.unpack(&packages, &partial)?;
        fs::rename(&partial, &target).map_err(RigError::io("renaming", &partial))?;
    }
    Ok(newest.to_owned())
}

/// The release in a package's name, if it is a signed cloud kernel.
fn release_of<'a>(package: &'a str, prefix: &str) -> Option<&'a str> {
    let release = package.strip_prefix(prefix)?;
    (release.starts_with(|first: char| first.is_ascii_digit()) && release.ends_with("-cloud-amd64"))
        .then_some(release)
}

/// The numbers of a release, so that 6.12.107 is newer than 6.12.94.
fn version_key(release: &str) -> Vec<u64> {
    release.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
}

fn collect_modules(folder: &Path, modules: &mut BTreeMap<String, PathBuf>) -> Result<(), RigError> {
    for entry in fs::read_dir(folder).map_err(RigError::io("listing", folder))? {
        let path = entry.map_err(RigError::io("listing", folder))?.path();
        if path.is_dir() {
            collect_modules(&path, modules)?;
        } else if let Some(name) = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".ko.xz")) {
            modules.insert(name.replace('-', "_"), path.clone());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_compare_as_numbers_and_unsigned_ones_are_left_out() {
        let names = [
            "linux-image-6.12.94+deb13-cloud-amd64",
            "linux-image-6.12.107+deb13-cloud-amd64",
            "linux-image-6.12.107+deb13-cloud-amd64-dbg",
            "linux-image-6.12.108+deb13-cloud-amd64-unsigned",
            "linux-image-6.12.109+deb13-amd64",
        ];
        let newest =
            names.iter().filter_map(|name| release_of(name, "linux-image-")).max_by_key(|r| version_key(r));
        assert_eq!(newest, Some("6.12.107+deb13-cloud-amd64"));
        assert_eq!(release_of("linux-binary-unsigned-7.3.4+deb13-cloud-amd64", "linux-binary-"), None);
    }
}
