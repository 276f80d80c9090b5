//! The machine's root: an archive of busybox, the tools of this machine with their libraries, kernel modules, the
//! project's binaries and the job. The first part is kept in the cache; the second is made for each run.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cache::Cache;
use crate::cpio::CpioWriter;
use crate::error::RigError;
use crate::kernel::Kernel;
use crate::tool;

/// Tools that every machine has.
pub const TOOLS: &[&str] = &[
    "bash",
    "fio",
    "mkfs.ext4",
    "e2fsck",
    "debugfs",
    "tune2fs",
    "mkfs.xfs",
    "xfs_repair",
    "xfs_io",
    "sqlite3",
    "ip",
    "tc",
    "blockdev",
    "losetup",
    "blkdiscard",
    "lsblk",
    "wipefs",
    "unshare",
    "nsenter",
];

/// Tools that a machine has when this one has them; a test that needs one says so.
pub const OPTIONAL_TOOLS: &[&str] = &[
    "strace",
    "gdb",
    "qemu-nbd",
    "qemu-io",
    "qemu-img",
    "nbdkit",
    "nbdinfo",
    "nbdcopy",
    "nbd-client",
    "drbdadm",
    "drbdsetup",
    "drbdmeta",
    "dmsetup",
    "perf",
    "jq",
];

/// Kernel modules that every machine has unpacked, ready for `modprobe`, besides those they depend on.
pub const MODULES: &[&str] = &[
    "ublk_drv",
    "virtio_blk",
    "virtio_net",
    "xfs",
    "overlay",
    "drbd",
    "null_blk",
    "brd",
    "nbd",
    "loop",
    "dm_mod",
    "dm_log_writes",
    "dm_flakey",
    "dm_delay",
    "sch_netem",
    "scsi_debug",
    "sd_mod",
    "veth",
];

/// Raised when the content of a base archive changes for the same inputs.
const BASE_VERSION: u32 = 3;

/// Root, and whom Debian's libvirtd doesn't start without.
const PASSWD: &[u8] =
    b"root:x:0:0:root:/root:/bin/sh\nlibvirt-qemu:x:64055:64055::/var/lib/libvirt:/bin/false\n";
const GROUP: &[u8] = b"root:x:0:\nlibvirt-qemu:x:64055:\n";

const INIT: &str = include_str!("../guest/init");

/// What a machine does after its start.
#[derive(Clone, Debug, Default)]
pub struct Job {
    /// Program and arguments; none makes an interactive shell on the console.
    pub argv: Vec<String>,
    /// Environment besides the machine's own.
    pub env: Vec<(String, String)>,
    /// Programs of this machine, brought into the machine's `PATH` under their own names, with their libraries.
    pub programs: Vec<PathBuf>,
    /// Shared objects that programs load by themselves, and their places; with the libraries that they are linked with.
    pub plugins: Vec<(PathBuf, String)>,
    /// The root of unpacked packages whose libraries programs may need.
    pub packages: Option<PathBuf>,
    /// Files and their places inside the machine. Permissions are kept.
    pub files: Vec<(PathBuf, String)>,
    /// Kernel modules loaded before the job starts.
    pub modules: Vec<String>,
}

/// Writes the archive for one run to `target`.
pub fn build(cache: &Cache, kernel: &Kernel, job: &Job, target: &Path) -> Result<(), RigError> {
    let base = base(cache, kernel)?;
    fs::copy(&base, target).map_err(RigError::io("copying the base archive to", target))?;
    let file = File::options().append(true).open(target).map_err(RigError::io("opening", target))?;
    let mut archive = Root::new(CpioWriter::new(BufWriter::new(file)));
    archive.packages.clone_from(&job.packages);
    job_part(cache, job, &mut archive)?;
    archive.finish().map_err(RigError::io("writing", target))
}

fn job_part(cache: &Cache, job: &Job, root: &mut Root<BufWriter<File>>) -> Result<(), RigError> {
    let wrap = |result: io::Result<()>| {
        result.map_err(RigError::io("writing the job's part of", Path::new("initramfs")))
    };
    wrap(root.cpio.file("init", 0o755, INIT.as_bytes()))?;
    wrap(root.cpio.file("rig/modules", 0o644, job.modules.join("\n").as_bytes()))?;
    if job.argv.is_empty() {
        wrap(root.cpio.file("rig/interactive", 0o644, b""))?;
    }
    wrap(root.cpio.file("rig/job", 0o755, script(job).as_bytes()))?;
    for program in &job.programs {
        let name = program.file_name().unwrap_or_default().to_string_lossy();
        root.program(&stripped(cache, program)?, &format!("bin/{name}"))?;
    }
    for (plugin, place) in &job.plugins {
        root.program(plugin, place)?;
    }
    for (source, place) in &job.files {
        root.copy(source, place)?;
    }
    Ok(())
}

/// The job as a script of the machine's shell.
pub(crate) fn script(job: &Job) -> String {
    let mut script = String::new();
    for (name, value) in &job.env {
        script.push_str(&format!("export {name}={}\n", quoted(value)));
    }
    script.push_str("exec");
    for word in &job.argv {
        script.push(' ');
        script.push_str(&quoted(word));
    }
    script.push('\n');
    script
}

fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// The part that changes only with the kernel and this machine's tools.
fn base(cache: &Cache, kernel: &Kernel) -> Result<PathBuf, RigError> {
    let busybox = tool::require("busybox")?;
    let mut tools: Vec<(String, PathBuf)> = Vec::new();
    for name in TOOLS {
        tools.push(((*name).to_owned(), tool::require(name)?));
    }
    tools.extend(OPTIONAL_TOOLS.iter().filter_map(|name| Some(((*name).to_owned(), tool::find(name)?))));

    let mut hasher = DefaultHasher::new();
    (BASE_VERSION, &kernel.release, MODULES, fingerprint(&busybox)?).hash(&mut hasher);
    for (name, path) in &tools {
        (name, fingerprint(path)?).hash(&mut hasher);
    }
    let folder = cache.folder("initramfs")?;
    let path = folder.join(format!("{}-{:016x}.cpio", kernel.release, hasher.finish()));
    if path.exists() {
        return Ok(path);
    }
    let temporary = folder.join(format!("{}.{}.partial", kernel.release, std::process::id()));
    let file = File::create(&temporary).map_err(RigError::io("creating", &temporary))?;
    let mut root = Root::new(CpioWriter::new(BufWriter::new(file)));
    base_part(kernel, &busybox, &tools, &mut root)?;
    root.finish().map_err(RigError::io("writing", &temporary))?;
    fs::rename(&temporary, &path).map_err(RigError::io("renaming", &temporary))?;
    Ok(path)
}

fn base_part(
    kernel: &Kernel,
    busybox: &Path,
    tools: &[(String, PathBuf)],
    root: &mut Root<BufWriter<File>>,
) -> Result<(), RigError> {
    let applets = tool::run(Command::new(busybox).arg("--list"))?;
    let wrap = |result: io::Result<()>| result.map_err(RigError::io("writing", Path::new("initramfs")));
    for folder in
        ["proc", "sys", "dev", "tmp", "run", "mnt", "root", "var/lib", "var/tmp", "usr/share", "etc"]
    {
        wrap(root.cpio.folder(folder))?;
    }
    for (link, target) in
        [("sbin", "bin"), ("usr/bin", "../bin"), ("usr/sbin", "../bin"), ("usr/lib", "../lib")]
    {
        wrap(root.cpio.link(link, target))?;
    }
    wrap(root.cpio.character_device("dev/console", 5, 1))?;
    wrap(root.cpio.character_device("dev/null", 1, 3))?;
    wrap(root.cpio.file("etc/hosts", 0o644, b"127.0.0.1 localhost rig\n::1 localhost rig\n"))?;
    wrap(root.cpio.file("etc/passwd", 0o644, PASSWD))?;
    wrap(root.cpio.file("etc/group", 0o644, GROUP))?;
    let mke2fs = Path::new("/etc/mke2fs.conf");
    if mke2fs.exists() {
        root.copy(mke2fs, "etc/mke2fs.conf")?;
    }
    root.program(busybox, "bin/busybox")?;
    let taken: BTreeSet<&str> = tools.iter().map(|(name, _)| name.as_str()).collect();
    for applet in applets.lines().filter(|applet| *applet != "busybox" && !taken.contains(applet)) {
        wrap(root.cpio.link(&format!("bin/{applet}"), "busybox"))?;
    }
    for (name, path) in tools {
        root.program(path, &format!("bin/{name}"))?;
    }
    modules(kernel, busybox, root)
}

/// Unpacks the modules with what they depend on and writes the lists that `modprobe` reads.
fn modules(kernel: &Kernel, busybox: &Path, root: &mut Root<BufWriter<File>>) -> Result<(), RigError> {
    let mut depends: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut open: Vec<String> = MODULES.iter().map(|&name| name.to_owned()).collect();
    let folder = format!("lib/modules/{}", kernel.release);
    let mut aliases = String::new();
    while let Some(name) = open.pop() {
        if depends.contains_key(&name) {
            continue;
        }
        let path = kernel.module(&name)?;
        let output = Command::new(busybox).args(["xzcat"]).arg(path).output();
        let content = output.map_err(RigError::io("unpacking", path))?.stdout;
        root.cpio
            .file(&format!("{folder}/{name}.ko"), 0o644, &content)
            .map_err(RigError::io("writing", Path::new("initramfs")))?;
        for alias in module_info(&content, "alias") {
            aliases.push_str(&format!("alias {alias} {name}\n"));
        }
        let needs = module_depends(&content);
        open.extend(needs.iter().cloned());
        depends.insert(name, needs);
    }
    let mut list = String::new();
    for name in depends.keys() {
        list.push_str(&format!("{name}.ko:"));
        for need in all_depends(name, &depends) {
            list.push_str(&format!(" {need}.ko"));
        }
        list.push('\n');
    }
    for (name, text) in [("modules.dep", list), ("modules.alias", aliases)] {
        root.cpio
            .file(&format!("{folder}/{name}"), 0o644, text.as_bytes())
            .map_err(RigError::io("writing", Path::new("initramfs")))?;
    }
    Ok(())
}

/// The modules that a module says it needs.
fn module_depends(content: &[u8]) -> Vec<String> {
    module_info(content, "depends")
        .iter()
        .flat_map(|value| value.split(','))
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

/// The values of a key in a module's `.modinfo` section: NUL-terminated `key=value` strings.
fn module_info(content: &[u8], key: &str) -> Vec<String> {
    let key = [b"\0", key.as_bytes(), b"="].concat();
    let mut values = Vec::new();
    let mut rest = content;
    while let Some(start) = rest.windows(key.len()).position(|window| window == key) {
        let value = &rest[start + key.len()..];
        let len = value.iter().position(|&byte| byte == 0).unwrap_or(value.len());
        values.push(String::from_utf8_lossy(&value[..len]).into_owned());
        rest = &value[len..];
    }
    values
}

/// Nearest first, as modprobe loads them from the last to the first.
fn all_depends(name: &str, depends: &BTreeMap<String, Vec<String>>) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    let mut next: Vec<String> = depends[name].clone();
    while !next.is_empty() {
        found.retain(|one| !next.contains(one));
        found.extend(next.iter().cloned());
        next = next.iter().flat_map(|one| depends[one].iter().cloned()).collect();
    }
    let mut seen = BTreeSet::new();
    found.reverse();
    found.retain(|one| seen.insert(one.clone()));
    found.reverse();
    found
}

/// An archive that knows which libraries it has.
struct Root<W: Write> {
    cpio: CpioWriter<W>,
    libraries: BTreeSet<String>,
    packages: Option<PathBuf>,
}

impl<W: Write> Root<W> {
    fn new(cpio: CpioWriter<W>) -> Self {
        Self { cpio, libraries: BTreeSet::new(), packages: None }
    }

    /// Adds a program and the libraries that it is linked with.
    fn program(&mut self, source: &Path, place: &str) -> Result<(), RigError> {
        self.copy(source, place)?;
        for library in libraries_of(source, self.packages.as_deref())? {
            let unpacked = self.packages.as_ref().and_then(|root| library.strip_prefix(root).ok());
            let installed = unpacked.unwrap_or(&library).to_string_lossy();
            let place = installed.trim_start_matches('/').replacen("usr/lib", "lib", 1);
            if self.libraries.insert(place.clone()) {
                self.copy(&library, &place)?;
            }
        }
        Ok(())
    }

    fn copy(&mut self, source: &Path, place: &str) -> Result<(), RigError> {
        use std::os::unix::fs::PermissionsExt;
        let content = fs::read(source).map_err(RigError::io("reading", source))?;
        let mode = source.metadata().map_err(RigError::io("reading", source))?.permissions().mode() & 0o777;
        self.cpio
            .file(place.trim_start_matches('/'), mode, &content)
            .map_err(RigError::io("archiving", source))
    }

    fn finish(self) -> io::Result<()> {
        self.cpio.finish().map(drop)
    }
}

/// What the loader would load for a program, as `ldd` says, from unpacked packages too; nothing for a static one or a script.
fn libraries_of(program: &Path, packages: Option<&Path>) -> Result<Vec<PathBuf>, RigError> {
    let mut ldd = Command::new(tool::require("ldd")?);
    ldd.arg(program).env("LC_ALL", "C");
    if let Some(root) = packages {
        let folders = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"].map(|folder| root.join(folder));
        ldd.env("LD_LIBRARY_PATH", format!("{}:{}", folders[0].display(), folders[1].display()));
    }
    let output = ldd.output().map_err(RigError::io("running ldd on", program))?;
    let listing = String::from_utf8_lossy(&output.stdout);
    if let Some(line) = listing.lines().find(|line| line.contains("not found")) {
        return Err(RigError::Command {
            command: format!("ldd {}", program.display()),
            status: "a library is missing".into(),
            stderr: line.trim().to_owned(),
        });
    }
    Ok(listing.lines().filter_map(library_in).collect())
}

/// `name => /path (address)` or `/path (address)`.
fn library_in(line: &str) -> Option<PathBuf> {
    let place = line.split("=>").last()?.trim();
    let path = place.split(" (0x").next()?;
    path.starts_with('/').then(|| PathBuf::from(path))
}

/// A copy of a program without its debug information, which would fill the machine's memory.
fn stripped(cache: &Cache, program: &Path) -> Result<PathBuf, RigError> {
    let mut magic = [0; 4];
    File::open(program)
        .and_then(|mut file| io::Read::read_exact(&mut file, &mut magic))
        .map_err(RigError::io("reading", program))?;
    if magic != *b"\x7fELF" {
        return Ok(program.to_path_buf());
    }
    let mut hasher = DefaultHasher::new();
    program.hash(&mut hasher);
    let name =
        format!("{}-{:016x}", program.file_name().unwrap_or_default().to_string_lossy(), hasher.finish());
    let folder = cache.folder("stripped")?;
    let (copy, stamp) = (folder.join(&name), folder.join(format!("{name}.stamp")));
    let wanted = format!("{:?}", fingerprint(program)?);
    if fs::read_to_string(&stamp).is_ok_and(|found| found == wanted) && copy.exists() {
        return Ok(copy);
    }
    let temporary = folder.join(format!("{name}.{}.partial", std::process::id()));
    tool::run(
        Command::new(tool::require("strip")?).arg("--strip-debug").arg("-o").arg(&temporary).arg(program),
    )?;
    fs::rename(&temporary, &copy).map_err(RigError::io("renaming", &temporary))?;
    fs::write(&stamp, wanted).map_err(RigError::io("writing", &stamp))?;
    Ok(copy)
}

/// Changes whenever a file's content does, for all that matters here: path, length, time of change.
fn fingerprint(path: &Path) -> Result<(PathBuf, u64, i64, i64), RigError> {
    use std::os::unix::fs::MetadataExt;
    let meta = path.metadata().map_err(RigError::io("reading", path))?;
    Ok((path.to_path_buf(), meta.len(), meta.mtime(), meta.mtime_nsec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_read_from_both_forms_of_ldds_lines() {
        assert_eq!(
            library_in("\tlibc.so.6 => /lib/x/libc.so.6 (0x00007f)"),
            Some(PathBuf::from("/lib/x/libc.so.6"))
        );
        assert_eq!(
            library_in("\t/lib64/ld-linux.so.2 (0x00007f)"),
            Some(PathBuf::from("/lib64/ld-linux.so.2"))
        );
        assert_eq!(library_in("\tlinux-vdso.so.1 (0x00007f)"), None);
        assert_eq!(library_in("\tnot a dynamic executable"), None);
    }

    #[test]
    fn a_dependency_stands_behind_all_that_need_it() {
        let depends: BTreeMap<String, Vec<String>> =
            [("xfs", vec!["a", "b"]), ("a", vec!["c"]), ("b", vec!["a"]), ("c", vec![])]
                .into_iter()
                .map(|(name, needs)| (name.to_owned(), needs.into_iter().map(str::to_owned).collect()))
                .collect();
        assert_eq!(all_depends("xfs", &depends), ["b", "a", "c"]);
        assert_eq!(module_depends(b"x\0license=GPL\0depends=dm-mod,b\0name=y\0"), ["dm_mod", "b"]);
        assert_eq!(module_depends(b"x\0depends=\0"), Vec::<String>::new());
    }

    #[test]
    fn a_job_keeps_its_words_whole() {
        let job = Job {
            argv: vec!["echo".into(), "it's \"$HOME\"".into()],
            env: vec![("A".into(), "b c".into())],
            ..Job::default()
        };
        assert_eq!(script(&job), "export A='b c'\nexec 'echo' 'it'\\''s \"$HOME\"'\n");
    }
}
