//! One machine: started under a time limit, its job's output streamed out, its files and exit status brought back.
//!
//! All ways out are plain files of the run's folder, written by the emulator: `console.log` (kernel), `output.log`
//! (the job), `control.log` (how it ended), `files.tar` (what the job put into `$RIG_OUT`).

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::error::RigError;
use crate::initramfs::{self, Job};
use crate::kernel::Kernel;
use crate::mode::Accel;
use crate::qemu::Qemu;
use crate::{cache::Cache, runs, tool};

/// A disk of a machine, a raw file of the run's folder: `/dev/vda` is the first one.
#[derive(Clone, Debug)]
pub struct Disk {
    /// What it holds at the start.
    pub content: DiskContent,
    /// Every write, flush and FUA of it goes into a log in the format of dm-log-writes as well.
    pub log_writes: bool,
}

/// What a [`Disk`] holds at the start.
#[derive(Clone, Debug)]
pub enum DiskContent {
    /// Zeroes, of this many MiB.
    Empty {
        /// Its size, MiB.
        size_mib: u64,
    },
    /// The content of this file, used in place.
    Image(PathBuf),
    /// What an NBD server has. While it is away requests wait for [`RECONNECT_WITHIN_S`].
    Nbd {
        /// The server's unix socket.
        socket: PathBuf,
        /// The export's name.
        export: String,
    },
}

/// How long requests to a disk wait for its NBD server to come back, in seconds.
pub const RECONNECT_WITHIN_S: u32 = 60;

/// Where a machine finds the channel of its guest agent, if it has one.
pub const AGENT_PORT: &str = "/dev/vport0p4";

/// A machine to be run.
#[derive(Clone, Debug)]
pub struct Machine<'a> {
    /// Where it finds what it is made of.
    pub cache: &'a Cache,
    /// The emulator.
    pub qemu: &'a Qemu,
    /// How it runs.
    pub accel: Accel,
    /// What it boots.
    pub kernel: &'a Kernel,
    /// Its memory, MiB.
    pub memory_mib: u64,
    /// Its processors.
    pub cpus: u32,
    /// Its disks.
    pub disks: Vec<Disk>,
    /// The unix socket at which the channel of its guest agent is reached, made by the emulator.
    pub agent: Option<PathBuf>,
    /// When it is stopped, counted from its start.
    pub limit: Duration,
}

/// How a job ended.
#[derive(Debug)]
pub struct Finished {
    /// Its exit status.
    pub exit: i32,
    /// Seconds from the start of the machine to that of the job.
    pub boot_s: f64,
    /// The run's folder: logs, disks (`disk0.raw`, `disk0.log`) and `files/`.
    pub folder: runs::RunFolder,
}

impl Finished {
    /// What the job wrote to its output.
    pub fn output(&self) -> Result<String, RigError> {
        let path = self.folder.path().join("output.log");
        let bytes = fs::read(&path).map_err(RigError::io("reading", &path))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// A file that the job put into `$RIG_OUT`.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join("files").join(name)
    }

    /// The image of a disk after the run.
    pub fn disk_image(&self, index: usize) -> PathBuf {
        disk_file(self.folder.path(), index, "raw")
    }

    /// The log of the writes of a disk.
    pub fn disk_log(&self, index: usize) -> PathBuf {
        disk_file(self.folder.path(), index, "log")
    }
}

impl<'a> Machine<'a> {
    /// A machine of the usual size without disks: two processors, 1500 MiB, stopped after two minutes.
    pub fn new(cache: &'a Cache, qemu: &'a Qemu, accel: Accel, kernel: &'a Kernel) -> Self {
        let limit = Duration::from_secs(120);
        Self { cache, qemu, accel, kernel, memory_mib: 1500, cpus: 2, disks: Vec::new(), agent: None, limit }
    }

    /// Runs a job to its end. `sink` gets the job's output as it comes.
    pub fn run(&self, job: &Job, sink: &mut dyn FnMut(&[u8])) -> Result<Finished, RigError> {
        match self.run_once(job, sink) {
            // The emulator sometimes never gets as far as the kernel: nothing of the job has run.
            Err(RigError::NotUp { .. }) => {
                tracing::warn!("a machine did not come up: once more");
                self.run_once(job, sink)
            }
            other => other,
        }
    }

    fn run_once(&self, job: &Job, sink: &mut dyn FnMut(&[u8])) -> Result<Finished, RigError> {
        let folder = runs::RunFolder::create(self.cache)?;
        let path = folder.path().to_path_buf();
        let mut command = self.prepare(job, &path)?;
        command.args([
            "-serial",
            &format!("file:{}", path.join("console.log").display()),
            "-monitor",
            "none",
        ]);
        let stderr = File::create(path.join("emulator.log")).map_err(RigError::io("creating", &path))?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
        let started = Instant::now();
        let mut guard =
            Emulator { child: command.spawn().map_err(RigError::io("starting", Path::new("qemu")))? };
        let status = self.watch(&mut guard, &path, started, sink)?;
        let control = fs::read_to_string(path.join("control.log")).unwrap_or_default();
        let value =
            |key: &str| control.lines().find_map(|line| line.strip_prefix(key)?.trim().parse::<f64>().ok());
        let Some(exit) = value("exit ") else {
            return Err(RigError::Died { status: status.to_string(), console: last_words(&path) });
        };
        unpack_files(&path)?;
        Ok(Finished { exit: exit as i32, boot_s: value("start ").unwrap_or(0.0), folder })
    }

    /// Runs a shell on this terminal instead of a job.
    pub fn interact(&self, job: &Job) -> Result<(), RigError> {
        let folder = runs::RunFolder::create(self.cache)?;
        let mut command = self.prepare(job, folder.path())?;
        command.args(["-serial", "mon:stdio"]);
        let mut guard =
            Emulator { child: command.spawn().map_err(RigError::io("starting", Path::new("qemu")))? };
        guard.child.wait().map(drop).map_err(RigError::io("waiting for", Path::new("qemu")))
    }

    fn prepare(&self, job: &Job, folder: &Path) -> Result<Command, RigError> {
        let initramfs = folder.join("initramfs.cpio");
        initramfs::build(self.cache, self.kernel, &self.with_modules(job), &initramfs)?;
        let mut command = self.qemu.command();
        match self.accel {
            Accel::Kvm => command.args(["-accel", "kvm", "-cpu", "host"]),
            Accel::Tcg => command.args(["-accel", "tcg,thread=multi", "-cpu", self.qemu.tcg_cpu()]),
        };
        command.args(["-smp", &self.cpus.to_string(), "-m", &self.memory_mib.to_string()]);
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        command.arg("-kernel").arg(&self.kernel.image).arg("-initrd").arg(&initramfs);
        command.args(["-append", "console=ttyS0 quiet panic=-1 oops=panic random.trust_cpu=on"]);
        command.args([
            "-device",
            "virtio-serial-pci,max_ports=5",
            "-object",
            "rng-random,id=r,filename=/dev/urandom",
        ]);
        command.args(["-device", "virtio-rng-pci,rng=r"]);
        for (number, name) in ["output.log", "control.log", "files.tar"].into_iter().enumerate() {
            let file = folder.join(name);
            command.args(["-chardev", &format!("file,id=c{number},path={}", file.display())]);
            command.args(["-device", &format!("virtserialport,chardev=c{number},nr={}", number + 1)]);
        }
        if let Some(socket) = &self.agent {
            command
                .args(["-chardev", &format!("socket,id=agent,path={},server=on,wait=off", socket.display())]);
            command.args(["-device", "virtserialport,chardev=agent,nr=4,name=org.qemu.guest_agent.0"]);
        }
        for (index, disk) in self.disks.iter().enumerate() {
            attach(&mut command, folder, index, disk)?;
        }
        // SAFETY: between fork and exec only prctl(2) is called, which is async-signal-safe and touches no memory.
        unsafe {
            command.pre_exec(|| Ok(nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?));
        }
        Ok(command)
    }

    fn with_modules(&self, job: &Job) -> Job {
        let mut job = job.clone();
        if !self.disks.is_empty() {
            job.modules.insert(0, "virtio_blk".into());
        }
        job.env.insert(0, ("RIG_OUT".into(), "/out".into()));
        job.env.insert(0, ("RIG_MODE".into(), self.accel.name().into()));
        job
    }

    fn watch(
        &self,
        emulator: &mut Emulator,
        folder: &Path,
        started: Instant,
        sink: &mut dyn FnMut(&[u8]),
    ) -> Result<ExitStatus, RigError> {
        let mut tail = Tail::new(folder.join("output.log"));
        loop {
            let ended = emulator.child.try_wait().map_err(RigError::io("waiting for", Path::new("qemu")))?;
            tail.forward(sink)?;
            if let Some(status) = ended {
                return Ok(status);
            }
            if started.elapsed() > BOOT_LIMIT && !is_up(folder) {
                emulator.stop();
                let limit_s = BOOT_LIMIT.as_secs();
                return Err(RigError::NotUp { limit_s, console: last_words(folder) });
            }
            if started.elapsed() > self.limit {
                emulator.stop();
                tail.forward(sink)?;
                return Err(RigError::Deadline {
                    limit_s: self.limit.as_secs(),
                    console: last_words(folder),
                });
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// A machine that has not said that it is up by then never will; most are within ten seconds.
const BOOT_LIMIT: Duration = Duration::from_secs(100);

/// Whether the first process has begun the job.
fn is_up(folder: &Path) -> bool {
    fs::metadata(folder.join("control.log")).is_ok_and(|metadata| metadata.len() > 0)
}

/// The emulator's process, which never outlives its owner.
struct Emulator {
    child: Child,
}

impl Emulator {
    fn stop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Follows a growing file.
struct Tail {
    path: PathBuf,
    file: Option<File>,
}

impl Tail {
    fn new(path: PathBuf) -> Self {
        Self { path, file: None }
    }

    fn forward(&mut self, sink: &mut dyn FnMut(&[u8])) -> Result<(), RigError> {
        if self.file.is_none() {
            self.file = File::open(&self.path).ok();
        }
        let Some(file) = &mut self.file else { return Ok(()) };
        let mut chunk = [0; 16 * 1024];
        loop {
            let len = file.read(&mut chunk).map_err(RigError::io("reading", &self.path))?;
            if len == 0 {
                return Ok(());
            }
            sink(&chunk[..len]);
        }
    }
}

fn attach(command: &mut Command, folder: &Path, index: usize, disk: &Disk) -> Result<(), RigError> {
    // The emulator's own files need not survive a crash of this machine: its flushes stay in the page cache. The
    // log of writes is taken above that, so it has every flush.
    let file = |node: &str, path: &Path| {
        format!("driver=file,node-name={node},filename={},cache.no-flush=on,discard=unmap", path.display())
    };
    let node = match &disk.content {
        DiskContent::Image(path) => file(&format!("file{index}"), path),
        DiskContent::Nbd { socket, export } => format!(
            "driver=nbd,node-name=file{index},server.type=unix,server.path={},export={export},reconnect-delay={RECONNECT_WITHIN_S}",
            socket.display()
        ),
        DiskContent::Empty { size_mib } => {
            let path = disk_file(folder, index, "raw");
            let created = File::create(&path).map_err(RigError::io("creating", &path))?;
            created.set_len(size_mib << 20).map_err(RigError::io("sizing", &path))?;
            file(&format!("file{index}"), &path)
        }
    };
    command.args(["-blockdev", &node]);
    let mut top = format!("file{index}");
    if disk.log_writes {
        let log = disk_file(folder, index, "log");
        File::create(&log).map_err(RigError::io("creating", &log))?;
        command.args(["-blockdev", &file(&format!("log{index}"), &log)]);
        let node = format!("driver=blklogwrites,node-name=top{index},file={top},log=log{index}");
        command.args(["-blockdev", &node]);
        top = format!("top{index}");
    }
    command.args(["-device", &format!("virtio-blk-pci,drive={top},serial=rig{index}")]);
    Ok(())
}

fn disk_file(folder: &Path, index: usize, extension: &str) -> PathBuf {
    folder.join(format!("disk{index}.{extension}"))
}

fn unpack_files(folder: &Path) -> Result<(), RigError> {
    let archive = folder.join("files.tar");
    if archive.metadata().is_ok_and(|meta| meta.len() > 0) {
        let target = folder.join("files");
        fs::create_dir_all(&target).map_err(RigError::io("creating", &target))?;
        tool::run(Command::new("tar").arg("-C").arg(&target).arg("-xf").arg(&archive))?;
        fs::remove_file(&archive).map_err(RigError::io("deleting", &archive))?;
    }
    Ok(())
}

fn last_words(folder: &Path) -> String {
    let text = |name: &str| {
        let bytes = fs::read(folder.join(name)).unwrap_or_default();
        tool::tail(&String::from_utf8_lossy(&bytes), 25)
    };
    [text("console.log"), text("emulator.log")].join("\n")
}
