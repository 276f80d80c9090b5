//! Debian packages without touching the machine: a private apt configuration whose mirror is the one that the
//! machine's own sources name. Signatures are checked by apt as always; packages are only unpacked, never installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::RigError;
use crate::tool;

const DEFAULT_KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Where the machine's own Debian packages come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mirror {
    /// The URI, as the machine's sources write it.
    pub uri: String,
    /// The release of the machine, as `bookworm`.
    pub codename: String,
    /// The keys that sign the mirror's suites.
    pub keyring: PathBuf,
}

impl Mirror {
    /// Reads the mirror from `/etc/apt`.
    pub fn of_this_machine() -> Result<Self, RigError> {
        let path = Path::new("/etc/os-release");
        let release = fs::read_to_string(path).map_err(RigError::io("reading", path))?;
        let codename = field(&release, "VERSION_CODENAME").unwrap_or_default();
        if field(&release, "ID").as_deref() != Some("debian") || codename.is_empty() {
            return Err(RigError::Mirror { what: "this machine is not a Debian release".into() });
        }
        let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
        if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
            files.extend(entries.filter_map(|entry| Some(entry.ok()?.path())));
        }
        files.sort();
        files
            .iter()
            .filter_map(|file| {
                let text = fs::read_to_string(file).ok()?;
                match file.extension()?.to_str()? {
                    "list" => from_one_line(&text, &codename),
                    "sources" => from_deb822(&text, &codename),
                    _ => None,
                }
            })
            .next()
            .ok_or_else(|| RigError::Mirror {
                what: format!("no apt source of this machine offers {codename} main"),
            })
    }
}

/// An apt of its own: sources, lists and downloads lie in one folder.
#[derive(Debug)]
pub struct PrivateApt {
    folder: PathBuf,
}

impl PrivateApt {
    /// Prepares an apt in `folder` that sees `suites` of the mirror.
    pub fn new(folder: PathBuf, mirror: &Mirror, suites: &[&str]) -> Result<Self, RigError> {
        for part in ["lists/partial", "cache/archives/partial"] {
            let path = folder.join(part);
            fs::create_dir_all(&path).map_err(RigError::io("creating", &path))?;
        }
        let sources: String = suites
            .iter()
            .map(|suite| {
                format!(
                    "deb [arch=amd64 signed-by={}] {} {suite} main\n",
                    mirror.keyring.display(),
                    mirror.uri
                )
            })
            .collect();
        let path = folder.join("sources.list");
        fs::write(&path, sources).map_err(RigError::io("writing", &path))?;
        Ok(Self { folder })
    }

    /// Reads the suites' package lists.
    pub fn update(&self) -> Result<(), RigError> {
        tracing::info!("downloading Debian's package lists");
        tool::run(self.command("apt-get").args(["update", "-qq", "--error-on=any"])).map(drop)
    }

    /// Names of all packages that begin with `prefix`.
    pub fn names(&self, prefix: &str) -> Result<Vec<String>, RigError> {
        let names = tool::run(self.command("apt-cache").args(["pkgnames", prefix]))?;
        Ok(names.lines().map(str::to_owned).collect())
    }

    /// Downloads these packages alone and unpacks them into `target`.
    pub fn unpack(&self, packages: &[String], target: &Path) -> Result<(), RigError> {
        tracing::info!("downloading {}", packages.join(", "));
        let downloads = self.empty_folder("downloads")?;
        tool::run(self.command("apt-get").arg("download").args(packages).current_dir(&downloads))?;
        unpack_all(&downloads, target)
    }

    /// Downloads a package of `suite` with all it needs that this machine doesn't have, and unpacks it into `target`.
    pub fn unpack_closure(&self, package: &str, suite: &str, target: &Path) -> Result<(), RigError> {
        tracing::info!("downloading {package} of {suite} with what it needs");
        let downloads = self.empty_folder("cache/archives")?;
        fs::create_dir_all(downloads.join("partial")).map_err(RigError::io("creating", &downloads))?;
        let options = ["install", "--yes", "--download-only", "--no-install-recommends", "--reinstall", "-t"];
        tool::run(self.command("apt-get").args(options).args([suite, package]))?;
        unpack_all(&downloads, target)
    }

    fn empty_folder(&self, name: &str) -> Result<PathBuf, RigError> {
        let path = self.folder.join(name);
        if path.exists() {
            fs::remove_dir_all(&path).map_err(RigError::io("emptying", &path))?;
        }
        fs::create_dir_all(&path).map_err(RigError::io("creating", &path))?;
        Ok(path)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let folder = self.folder.display();
        for option in [
            format!("Dir::Etc::sourcelist={folder}/sources.list"),
            "Dir::Etc::sourceparts=/dev/null".into(),
            format!("Dir::State::lists={folder}/lists"),
            format!("Dir::Cache={folder}/cache"),
            format!("Dir::Cache::archives={folder}/cache/archives"),
            "Acquire::Languages=none".into(),
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".into(),
            "Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled=false".into(),
            "APT::Sandbox::User=root".into(),
            "APT::Keep-Downloaded-Packages=true".into(),
            "Debug::NoLocking=1".into(),
        ] {
            command.args(["-o", &option]);
        }
        command
    }
}

fn unpack_all(downloads: &Path, target: &Path) -> Result<(), RigError> {
    fs::create_dir_all(target).map_err(RigError::io("creating", target))?;
    let entries = fs::read_dir(downloads).map_err(RigError::io("listing", downloads))?;
    for entry in entries {
        let file = entry.map_err(RigError::io("listing", downloads))?.path();
        if file.extension().is_some_and(|extension| extension == "deb") {
            tool::run(Command::new("dpkg").arg("-x").arg(&file).arg(target))?;
            fs::remove_file(&file).map_err(RigError::io("deleting", &file))?;
        }
    }
    Ok(())
}

/// The value of `KEY=value` in a file of shell assignments.
fn field(text: &str, key: &str) -> Option<String> {
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='))?;
    Some(value.trim_matches(['"', '\'']).to_owned())
}

/// sources.list(5), one-line style.
fn from_one_line(text: &str, codename: &str) -> Option<Mirror> {
    text.lines().find_map(|line| {
        let rest = line.split('#').next()?.trim().strip_prefix("deb")?;
        let rest = rest.strip_prefix([' ', '\t'])?.trim_start();
        let (options, rest) = match rest.strip_prefix('[') {
            Some(inner) => inner.split_once(']')?,
            None => ("", rest),
        };
        let mut words = rest.split_whitespace();
        let (uri, suite) = (words.next()?, words.next()?);
        if suite != codename || !words.any(|component| component == "main") {
            return None;
        }
        let keyring = options.split_whitespace().find_map(|option| option.strip_prefix("signed-by="));
        Some(mirror(uri, codename, keyring))
    })
}

/// sources.list(5), deb822 style.
fn from_deb822(text: &str, codename: &str) -> Option<Mirror> {
    text.split("\n\n").find_map(|stanza| {
        let value = |key: &str| {
            stanza.lines().filter(|line| !line.starts_with('#')).find_map(|line| {
                let (name, value) = line.split_once(':')?;
                name.eq_ignore_ascii_case(key).then(|| value.trim())
            })
        };
        let has = |key: &str, word: &str| {
            value(key).is_some_and(|all| all.split_whitespace().any(|one| one == word))
        };
        if value("Enabled") == Some("no")
            || !has("Types", "deb")
            || !has("Suites", codename)
            || !has("Components", "main")
        {
            return None;
        }
        Some(mirror(value("URIs")?.split_whitespace().next()?, codename, value("Signed-By")))
    })
}

fn mirror(uri: &str, codename: &str, keyring: Option<&str>) -> Mirror {
    let keyring = keyring.filter(|path| path.starts_with('/')).unwrap_or(DEFAULT_KEYRING);
    Mirror { uri: uri.to_owned(), codename: codename.to_owned(), keyring: PathBuf::from(keyring) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deb822_takes_the_stanza_of_the_release_and_not_its_security_suite() {
        let text = "Types: deb\nURIs: http://mirror.test/security\nSuites: bookworm-security\nComponents: main\n\n\
                    # comment: x\nTypes: deb deb-src\nURIs: http://mirror.test/debian\n\
                    Suites: bookworm bookworm-updates\nComponents: main contrib\nSigned-By: /k.gpg\n";
        let found = from_deb822(text, "bookworm").expect("the second stanza fits");
        assert_eq!(found.uri, "http://mirror.test/debian");
        assert_eq!(found.keyring, PathBuf::from("/k.gpg"));
        assert_eq!(from_deb822(text, "trixie"), None);
        assert_eq!(from_deb822(&text.replace("deb deb-src", "deb-src"), "bookworm"), None);
    }

    #[test]
    fn one_line_style_with_and_without_options() {
        let text = "# deb http://old.test/ bookworm main\ndeb-src http://m.test/debian bookworm main\n\
                    deb [arch=amd64 signed-by=/a.gpg] http://m.test/debian bookworm main # tail\n";
        let found = from_one_line(text, "bookworm").expect("the third line fits");
        assert_eq!((found.uri.as_str(), found.keyring), ("http://m.test/debian", PathBuf::from("/a.gpg")));
        let plain =
            from_one_line("deb http://m.test/debian/ bookworm contrib main", "bookworm").expect("fits");
        assert_eq!(plain.keyring, PathBuf::from(DEFAULT_KEYRING));
        assert_eq!(from_one_line("deb http://m.test/debian bookworm contrib", "bookworm"), None);
    }
}
