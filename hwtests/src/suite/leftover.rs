//! What a case left behind: processes, ublk devices, mounts, loop devices, and trouble in the kernel's log.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;

/// Kernel messages with one of these parts mean trouble.
const TROUBLE: &[&str] = &[
    "BUG:",
    "WARNING:",
    "Oops",
    "INFO: task",
    "rcu:",
    "I/O error",
    "general protection",
    "refcount_t",
    "use-after-free",
];

/// The variable that marks all processes of a case.
pub(crate) const MARK: &str = "RIG_CASE";

/// The state of a machine that must be the same before and after a case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Surroundings(BTreeSet<String>);

impl Surroundings {
    pub(crate) fn now() -> Self {
        let mut all = BTreeSet::new();
        for name in names_in("/sys/class/ublk-char") {
            all.insert(format!("ublk device {name}"));
        }
        for name in names_in("/sys/block").into_iter().filter(|name| name.starts_with("loop")) {
            if let Ok(file) = fs::read_to_string(format!("/sys/block/{name}/loop/backing_file")) {
                all.insert(format!("loop device {name} over {}", file.trim()));
            }
        }
        for line in fs::read_to_string("/proc/self/mounts").unwrap_or_default().lines() {
            let mut words = line.split(' ');
            if let (Some(what), Some(place)) = (words.next(), words.next()) {
                all.insert(format!("mount of {what} at {place}"));
            }
        }
        for namespace in names_in("/run/netns") {
            all.insert(format!("network namespace {namespace}"));
        }
        Self(all)
    }

    /// What is there now and was not then.
    pub(crate) fn added_since(&self, before: &Self) -> Vec<String> {
        self.0.difference(&before.0).cloned().collect()
    }
}

/// Processes that carry the mark of a case, with their names.
pub(crate) fn marked_processes(case: &str) -> Vec<(i32, String)> {
    let mark = format!("{MARK}={case}");
    let own = std::process::id().cast_signed();
    names_in("/proc")
        .into_iter()
        .filter_map(|name| name.parse::<i32>().ok())
        .filter(|&pid| pid != own)
        .filter(|pid| {
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment.split(|&byte| byte == 0).any(|variable| variable == mark.as_bytes())
        })
        .map(|pid| {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            (pid, name.trim().to_owned())
        })
        .collect()
}

/// Follows the kernel's log.
#[derive(Debug)]
pub(crate) struct KernelLog(Option<fs::File>);

impl KernelLog {
    /// From here on.
    pub(crate) fn follow() -> Self {
        let file = fs::File::options().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg").ok();
        let mut log = Self(file);
        log.new_lines();
        log
    }

    /// New messages that mean trouble and hold none of the `allowed` parts.
    pub(crate) fn trouble(&mut self, allowed: &[&str]) -> Vec<String> {
        let has = |line: &str, parts: &[&str]| parts.iter().any(|part| line.contains(part));
        self.new_lines().into_iter().filter(|line| has(line, TROUBLE) && !has(line, allowed)).collect()
    }

    fn new_lines(&mut self) -> Vec<String> {
        let Some(file) = &mut self.0 else { return Vec::new() };
        let mut lines = Vec::new();
        let mut record = [0; 8192];
        // Each read gives one record: "priority,number,time,flags;text".
        loop {
            match file.read(&mut record) {
                Ok(len) if len > 0 => {
                    let text = String::from_utf8_lossy(&record[..len]).into_owned();
                    lines.extend(
                        text.split_once(';').map(|(_, text)| text.lines().next().unwrap_or("").to_owned()),
                    );
                }
                Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
                _ => return lines,
            }
        }
    }
}

fn names_in(folder: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    entries.filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned())).collect()
}
