//! What can go wrong around a machine: each error names the thing and, where there is one, the remedy.

use std::path::{Path, PathBuf};

/// An error of the rig itself, as opposed to a failed test inside a machine.
#[derive(Debug, thiserror::Error)]
pub enum RigError {
    /// A file or folder could not be used.
    #[error("{doing} {path}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To which file or folder.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// A tool of the machine is missing.
    #[error("{tool} is missing; install it: apt-get install {package}")]
    MissingTool {
        /// The command.
        tool: String,
        /// The Debian package that brings it.
        package: String,
    },
    /// A command ended badly.
    #[error("`{command}` failed ({status}): {stderr}")]
    Command {
        /// The command line.
        command: String,
        /// How it ended.
        status: String,
        /// The end of what it said.
        stderr: String,
    },
    /// Nothing of this machine says where Debian's packages come from.
    #[error("{what}; the rig takes its kernels from the Debian mirror that this machine's apt uses")]
    Mirror {
        /// What was looked for.
        what: String,
    },
    /// A kernel that the mirror doesn't have.
    #[error("no kernel {series} in {suite} ({pattern}); `rig kernels --refresh` reads the suite again")]
    NoKernel {
        /// The series asked for.
        series: String,
        /// Where it was looked for.
        suite: String,
        /// The name that no package has.
        pattern: String,
    },
    /// A kernel module that the kernel's package doesn't have.
    #[error("kernel {release} has no module {module}")]
    NoModule {
        /// The kernel.
        release: String,
        /// The module.
        module: String,
    },
    /// The machine ended without saying how its job ended.
    #[error("the machine died before its job ended ({status}); end of its console:\n{console}")]
    Died {
        /// How the emulator ended.
        status: String,
        /// The last lines of the console.
        console: String,
    },
    /// The machine's first process did not begin in time.
    #[error("the machine was not up after {limit_s} s; end of its console:\n{console}")]
    NotUp {
        /// How long it was given, in seconds.
        limit_s: u64,
        /// What its kernel and the emulator said last.
        console: String,
    },
    /// The machine was stopped at its deadline.
    #[error("the machine was stopped after {limit_s} s; end of its console:\n{console}")]
    Deadline {
        /// The deadline, seconds.
        limit_s: u64,
        /// The last lines of the console.
        console: String,
    },
    /// Native mode can't do what was asked.
    #[error("on this host itself (native mode) {what}; use --mode tcg")]
    Native {
        /// What can't be done.
        what: String,
    },
}

impl RigError {
    /// An [`RigError::Io`] maker for `map_err`.
    pub fn io<'a>(doing: &'static str, path: &'a Path) -> impl FnOnce(std::io::Error) -> Self + 'a {
        move |source| Self::Io { doing, path: path.to_path_buf(), source }
    }
}
