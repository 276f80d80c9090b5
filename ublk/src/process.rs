//! What a process must do before it may serve block devices of its own host: once, first of all, with one thread.

use std::io;
use std::path::PathBuf;

use caps::{CapSet, Capability};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Which of the preparations to make. A process that serves ublk devices needs all of them; one that only serves NBD to other
/// hosts or to test tools needs none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessSettings {
    /// `PR_SET_IO_FLUSHER`: the process's own memory allocations never wait for write-back to its own devices.
    pub io_flusher: bool,
    /// `mlockall`: its pages are never swapped out or dropped, perhaps to its own devices.
    pub lock_memory: bool,
    /// A mount namespace of its own: its exit never has to unmount a filesystem on its own devices.
    pub private_mounts: bool,
}

impl ProcessSettings {
    /// For a process that serves ublk devices.
    pub const FOR_UBLK: Self = Self { io_flusher: true, lock_memory: true, private_mounts: true };
}

/// Why the process may not serve block devices.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// The flag is inherited by threads made later, not by those that exist.
    #[error("the process has {threads} threads already: it must be prepared before it starts any")]
    Threads {
        /// How many.
        threads: usize,
    },
    /// No IO_FLUSHER.
    #[error(
        "cannot set PR_SET_IO_FLUSHER, without which this process can deadlock under memory pressure: run it with \
         CAP_SYS_RESOURCE (as root, or AmbientCapabilities=CAP_SYS_RESOURCE)"
    )]
    IoFlusher {
        /// What the system said.
        source: io::Error,
    },
    /// No locked memory.
    #[error(
        "cannot lock the process's memory (limit {limit_bytes} bytes): run it with CAP_IPC_LOCK, or raise the limit \
         (LimitMEMLOCK=infinity, `ulimit -l unlimited`)"
    )]
    LockMemory {
        /// `RLIMIT_MEMLOCK`.
        limit_bytes: u64,
        /// What the system said.
        source: io::Error,
    },
    /// No private mounts.
    #[error("cannot make a private mount namespace: run it with CAP_SYS_ADMIN, or with PrivateMounts=yes")]
    PrivateMounts {
        /// What the system said.
        source: io::Error,
    },
    /// `/proc` is missing.
    #[error("cannot read {}: mount /proc", path.display())]
    Proc {
        /// The path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Prepares the process. Also raises its limit on open files to what it is allowed.
///
/// # Errors
/// [`ProcessError`], each with its remedy.
pub fn prepare(settings: ProcessSettings) -> Result<(), ProcessError> {
    if settings.io_flusher {
        let threads = thread_count()?;
        if threads != 1 {
            return Err(ProcessError::Threads { threads });
        }
        set_io_flusher().map_err(|source| ProcessError::IoFlusher { source })?;
    }
    if settings.private_mounts {
        make_mounts_private().map_err(|source| ProcessError::PrivateMounts { source })?;
    }
    raise_to_hard_limit(Resource::RLIMIT_NOFILE);
    if settings.lock_memory {
        lock_memory()?;
    }
    Ok(())
}

/// Whether the calling thread is an IO_FLUSHER.
///
/// # Errors
/// The kernel's errno.
pub fn is_io_flusher() -> io::Result<bool> {
    // SAFETY: this prctl takes no pointers; unused arguments must be zero.
    match unsafe { libc::prctl(PR_GET_IO_FLUSHER, 0, 0, 0, 0) } {
        -1 => Err(io::Error::last_os_error()),
        flag => Ok(flag == 1),
    }
}

/// Takes CAP_SYS_ADMIN from the calling thread, and from those that it starts.
///
/// A ublk queue that is fetched without it keeps the driver from looking for partitions when the device starts (`GD_SUPPRESS_PART_SCAN`,
/// drivers/block/ublk_drv.c). Before 7.0 there is no flag for that, and a server that dies during the look leaves the driver waiting for
/// its own I/O with the device's mutex held: the device can then be neither recovered nor deleted.
///
/// # Errors
/// The kernel's refusal.
pub fn give_up_sys_admin() -> io::Result<()> {
    for set in [CapSet::Effective, CapSet::Permitted] {
        caps::drop(None, set, Capability::CAP_SYS_ADMIN).map_err(io::Error::other)?;
    }
    Ok(())
}

/// `PR_SET_IO_FLUSHER` of include/uapi/linux/prctl.h.
const PR_SET_IO_FLUSHER: libc::c_int = 57;
/// `PR_GET_IO_FLUSHER`.
const PR_GET_IO_FLUSHER: libc::c_int = 58;

fn set_io_flusher() -> io::Result<()> {
    // SAFETY: this prctl takes no pointers. One sets the flag; zero would clear it.
    match unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

fn thread_count() -> Result<usize, ProcessError> {
    let path = PathBuf::from("/proc/self/task");
    let entries = std::fs::read_dir(&path).map_err(|source| ProcessError::Proc { path, source })?;
    Ok(entries.count())
}

/// Only what is touched is locked (ONFAULT): the untouched stacks of threads would cost megabytes each.
fn lock_memory() -> Result<(), ProcessError> {
    raise_to_hard_limit(Resource::RLIMIT_MEMLOCK);
    // SAFETY: locks pages, changes no memory.
    if unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT) } == -1 {
        let source = io::Error::last_os_error();
        let limit_bytes = getrlimit(Resource::RLIMIT_MEMLOCK).map_or(0, |(soft, _)| soft);
        return Err(ProcessError::LockMemory { limit_bytes, source });
    }
    Ok(())
}

/// As systemd's PrivateMounts=yes: what the host mounts or unmounts later is followed (datastores come and go), but the last
/// reference to a filesystem is the host's.
fn make_mounts_private() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_SLAVE | MsFlags::MS_REC, None::<&str>)?;
    Ok(())
}

fn raise_to_hard_limit(resource: Resource) {
    if let Ok((soft, hard)) = getrlimit(resource)
        && soft < hard
    {
        // Failing leaves the limit as it was, and what needs more says so itself.
        let _ = setrlimit(resource, hard, hard);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::reactor::{ReactorSettings, Reactors, Source};

    struct Gone;

    impl Source for Gone {
        fn completed(
            &mut self,
            _: crate::reactor::ring::Token,
            _: i32,
            _: u32,
            _: &mut crate::reactor::ring::SourceRing<'_>,
        ) {
        }
        fn woken(&mut self, _: &mut crate::reactor::ring::SourceRing<'_>) {}
        fn stopping(&mut self, _: &mut crate::reactor::ring::SourceRing<'_>) {}
        fn finished(&self) -> bool {
            true
        }
    }

    /// The flag belongs to a thread and is inherited: what counts is that the data threads have it.
    #[test]
    fn reactor_threads_are_io_flushers_if_their_maker_is() {
        if let Err(error) = set_io_flusher() {
            assert_eq!(error.raw_os_error(), Some(libc::EPERM), "only for want of CAP_SYS_RESOURCE");
            return;
        }
        assert!(is_io_flusher().expect("supported"));
        let reactors =
            Reactors::start(ReactorSettings { thread_count: 2, ring_entries: 8 }).expect("reactors");
        let (send, flags) = mpsc::channel();
        for _ in 0..reactors.thread_count() {
            let send = send.clone();
            let build = Box::new(move |_: &mut crate::reactor::ring::SourceRing<'_>| {
                send.send(is_io_flusher()?).map_err(io::Error::other)?;
                Ok(Box::new(Gone) as Box<dyn Source>)
            });
            reactors.attach(build).expect("attach");
        }
        for _ in 0..reactors.thread_count() {
            assert!(flags.recv().expect("each thread answers"));
        }
    }

    /// The capability belongs to a thread: its maker, who sends the driver's commands, keeps it.
    #[test]
    fn a_thread_gives_up_its_capability_for_itself_alone() {
        let has = || caps::has_cap(None, CapSet::Effective, Capability::CAP_SYS_ADMIN).expect("readable");
        let before = has();
        std::thread::spawn(move || {
            give_up_sys_admin().expect("nobody is refused less");
            assert!(!has());
            give_up_sys_admin().expect("and again");
        })
        .join()
        .expect("ends");
        assert_eq!(has(), before);
    }

    #[test]
    fn a_process_with_threads_is_refused() {
        let settings = ProcessSettings { io_flusher: true, lock_memory: false, private_mounts: false };
        let (keep, wait) = mpsc::channel::<()>();
        let other = std::thread::spawn(move || wait.recv().is_err());
        assert!(matches!(prepare(settings), Err(ProcessError::Threads { threads: 2.. })));
        drop(keep);
        assert!(other.join().expect("ends"));
    }
}
