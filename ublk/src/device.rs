//! The life of a ublk device: add, serve, stop, delete, quiesce, recover, list.

mod error;
mod info;

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::arena::Arena;
use crate::control::{Control, ControlError};
use crate::cookie::Cookie;
use crate::device::info::device_ids;
use crate::features::Features;
use crate::params;
use crate::queue::QueueConfig;
use crate::reactor::{Reactors, SourceHandle};
use crate::serve::Disk;
use crate::uapi::{self, CtrlDevInfo};

pub use error::DeviceError;
pub use info::{DeviceInfo, DeviceState, list};

/// How long to wait for a dead daemon's I/O, for queues to end and for a deleted device to go.
const PATIENCE: Duration = Duration::from_secs(30);
/// Pause between two looks at a device's state.
const POLL: Duration = Duration::from_millis(20);

/// How a device is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceSettings {
    /// Number wished for, or the driver's choice.
    pub id: Option<u32>,
    /// Hardware queues; the driver gives no more than there are CPUs.
    pub queues: u16,
    /// Requests of a queue that can be with us at once; each holds one slot of the arena all the time.
    pub depth: u16,
    /// Marks the device as ours.
    pub cookie: Cookie,
}

impl DeviceSettings {
    /// One queue of 64 requests: small, since every tag holds a resident slot.
    pub fn new(cookie: Cookie) -> Self {
        Self { id: None, queues: 1, depth: 64, cookie }
    }
}

/// The ublk driver and the threads that serve its devices. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Driver {
    control: Control,
    reactors: Arc<Reactors>,
}

impl Driver {
    /// Opens the driver; devices are served by `reactors`.
    ///
    /// # Errors
    /// [`ControlError::Host`] or [`ControlError::Open`].
    pub fn open(reactors: Arc<Reactors>) -> Result<Self, ControlError> {
        Ok(Self { control: Control::open()?, reactors })
    }

    /// What the driver offers.
    pub fn features(&self) -> Features {
        self.control.features()
    }

    /// Makes a device for `disk` and serves it. Its longest request is one slot of `arena`, which must have a free slot for
    /// each tag of each queue, and some more if the disk's lanes keep slots.
    ///
    /// # Errors
    /// [`DeviceError`]; nothing is left behind then.
    pub fn add(
        &self,
        disk: Arc<dyn Disk>,
        arena: &Arena,
        settings: DeviceSettings,
    ) -> Result<Device, DeviceError> {
        let DeviceSettings { id, queues, depth, cookie } = settings;
        if queues == 0 || depth == 0 || depth > uapi::QUEUE_DEPTH_MAX {
            return Err(DeviceError::Settings { queues, depth });
        }
        let io_bytes_max = u32::try_from(arena.slot_len_bytes()).unwrap_or(1 << 25).min(1 << 25);
        let params = params::params_of(&disk.geometry(), io_bytes_max)
            .map_err(|source| DeviceError::Geometry { source })?;
        self.warn_near_limit();
        let info = self.control.add(&CtrlDevInfo {
            nr_hw_queues: queues,
            queue_depth: depth,
            max_io_buf_bytes: io_bytes_max,
            dev_id: id.unwrap_or(uapi::DEV_ID_ANY),
            ublksrv_pid: -1,
            flags: self.control.features().for_new_device(),
            ublksrv_flags: cookie.to_flags(),
            ..CtrlDevInfo::default()
        })?;
        let mut device = Device::new(info, self.control.clone(), disk.geometry().size_bytes);
        let started = self
            .control
            .set_params(info.dev_id, &params)
            .map_err(DeviceError::from)
            .and_then(|()| self.serve(&mut device, &disk, arena))
            .and_then(|()| self.control.start(info.dev_id).map_err(|error| device.fault_or(error)));
        match started {
            Ok(()) => Ok(device),
            Err(error) => {
                if let Err(left) = device.remove() {
                    tracing::warn!(device = info.dev_id, error = %left, "a device that failed to start remains");
                }
                Err(error)
            }
        }
    }

    /// Takes over a device whose daemon is gone; requests that it had come again as new ones. Waits for the dead daemon's
    /// I/O to end.
    ///
    /// # Errors
    /// [`DeviceError`]; the device stays as it was, unless the driver failed half-way (then delete it or restart).
    pub fn recover(&self, id: u32, disk: Arc<dyn Disk>, arena: &Arena) -> Result<Device, DeviceError> {
        let info = self.control.info(id)?.ok_or(DeviceError::Missing { device: id })?;
        let now = params::params_of(&disk.geometry(), info.max_io_buf_bytes)
            .map_err(|source| DeviceError::Geometry { source })?;
        let made_with = self.control.params(id)?;
        if let Some(difference) = params::difference(&made_with, &now) {
            return Err(DeviceError::Changed { device: id, difference });
        }
        self.start_recovery(&info)?;
        let device_bytes = made_with.basic.dev_sectors * params::SECTOR_BYTES;
        let mut device = Device::new(info, self.control.clone(), device_bytes);
        self.serve(&mut device, &disk, arena)?;
        self.control.end_recovery(id).map_err(|error| device.fault_or(error))?;
        // The former daemon may have died before it gave the device what its disk has grown by.
        let size = device.size();
        if let Err(error) = size.grow(disk.geometry().size_bytes) {
            tracing::warn!(device = id, error = %error, "a recovered device is smaller than its disk");
        }
        Ok(device)
    }

    /// All ublk devices of this host, ours and strangers'.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn list(&self) -> Result<Vec<DeviceInfo>, ControlError> {
        list(&self.control)
    }

    /// Deletes a device, whoever served it. Unless forced, one that is mounted or part of another device stays.
    ///
    /// # Errors
    /// [`DeviceError::InUse`], [`DeviceError::HeldOpen`] or a failed command.
    pub fn delete(&self, id: u32, force: bool) -> Result<(), DeviceError> {
        delete(&self.control, id, force)
    }

    /// The commands of this driver.
    pub fn control(&self) -> &Control {
        &self.control
    }

    fn start_recovery(&self, info: &CtrlDevInfo) -> Result<(), DeviceError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.control.start_recovery(info.dev_id) {
                Ok(()) => return Ok(()),
                // 6.12 refuses to start what a process has started that died before it had fetched from a queue. The device still waits, and
                // its character device can be opened by one process only: going on is safe.
                Err(error)
                    if error.errno() == Some(libc::EINVAL) && self.waits_for_recovery(info.dev_id)? =>
                {
                    return Ok(());
                }
                Err(error) if error.errno() != Some(libc::EBUSY) => return Err(error.into()),
                Err(error) if Instant::now() >= deadline => {
                    return Err(if process_lives(info.ublksrv_pid) {
                        DeviceError::Served { device: info.dev_id, pid: info.ublksrv_pid }
                    } else {
                        error.into()
                    });
                }
                Err(_) => std::thread::sleep(POLL),
            }
        }
    }

    /// Whether a device was made with recovery, was started, and nobody serves it.
    fn waits_for_recovery(&self, id: u32) -> Result<bool, DeviceError> {
        let info = self.control.info(id)?;
        Ok(info.is_some_and(|info| {
            info.state == uapi::DEV_STATE_QUIESCED && info.flags & uapi::F_USER_RECOVERY != 0
        }))
    }

    /// Attaches all queues to reactor threads.
    fn serve(&self, device: &mut Device, disk: &Arc<dyn Disk>, arena: &Arena) -> Result<(), DeviceError> {
        let CtrlDevInfo { dev_id, nr_hw_queues, queue_depth, max_io_buf_bytes, .. } = device.info;
        let needed = usize::from(nr_hw_queues) * usize::from(queue_depth);
        let (free, slot_bytes) = (arena.free_count(), arena.slot_len_bytes());
        if free < needed || slot_bytes < max_io_buf_bytes as usize {
            let needed_bytes = max_io_buf_bytes;
            return Err(DeviceError::Arena { device: dev_id, needed, needed_bytes, free, slot_bytes });
        }
        let char_file = Arc::new(open_char_device(dev_id)?);
        for queue in 0..nr_hw_queues {
            let at_rest = Arc::new(AtomicBool::new(false));
            let config = QueueConfig {
                char_file: Arc::clone(&char_file),
                queue,
                depth: queue_depth,
                arena: arena.clone(),
                disk: Arc::clone(disk),
                size_bytes: Arc::clone(&device.size_bytes),
                fault: Arc::clone(&device.fault),
                at_rest: Arc::clone(&at_rest),
            };
            let attached = self.reactors.attach(config.builder());
            let source = attached.map_err(|source| DeviceError::Reactor { device: dev_id, source })?;
            device.queues.push(Queue { source, at_rest });
        }
        Ok(())
    }

    fn warn_near_limit(&self) {
        let Some(limit) = crate::host::device_count_max() else {
            return;
        };
        let count = device_ids().len();
        if count + 1 >= limit as usize {
            tracing::warn!(
                count,
                limit,
                "the ublk driver may refuse more devices: raise /sys/module/ublk_drv/parameters/ublks_max"
            );
        }
    }
}

/// A device that this process serves. Dropping it changes nothing: it is served as long as the process lives, and can be
/// recovered after.
#[derive(Debug)]
pub struct Device {
    info: CtrlDevInfo,
    control: Control,
    queues: Vec<Queue>,
    fault: Arc<AtomicI32>,
    /// What the device has, in bytes.
    size_bytes: Arc<AtomicU64>,
}

/// The size of a device that is served. Cheap to clone; outlives the device, whose number may be another's then.
#[derive(Clone, Debug)]
pub struct DeviceSize {
    id: u32,
    flags: u64,
    control: Control,
    size_bytes: Arc<AtomicU64>,
}

impl DeviceSize {
    /// The device's size, in bytes.
    pub fn bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Relaxed)
    }

    /// Gives the device so many bytes, a multiple of 512, which its disk must have; fewer than it has change nothing. Blocks for as long as
    /// the driver takes. Needs its UPDATE_SIZE (6.16).
    ///
    /// # Errors
    /// [`DeviceError::CannotGrow`] on an older kernel, or a failed command: the device is as it was.
    pub fn grow(&self, size_bytes: u64) -> Result<(), DeviceError> {
        let former_bytes = self.bytes();
        if size_bytes <= former_bytes {
            return Ok(());
        }
        if self.flags & uapi::F_UPDATE_SIZE == 0 {
            return Err(DeviceError::CannotGrow { device: self.id, former_bytes, size_bytes });
        }
        // First our own bound: requests come as soon as the driver knows.
        self.size_bytes.fetch_max(size_bytes, Ordering::Relaxed);
        self.control.update_size(self.id, size_bytes / params::SECTOR_BYTES).inspect_err(|_| {
            self.size_bytes.store(former_bytes, Ordering::Relaxed);
        })?;
        Ok(())
    }
}

/// The outside's hold on a queue.
#[derive(Debug)]
struct Queue {
    source: SourceHandle,
    /// See [`QueueConfig::at_rest`].
    at_rest: Arc<AtomicBool>,
}

impl Queue {
    /// Whether no request is with it, and none will be: the driver gives out no more.
    fn is_left(&self) -> bool {
        self.at_rest.load(Ordering::Acquire) || self.source.has_ended()
    }
}

impl Device {
    fn new(info: CtrlDevInfo, control: Control, size_bytes: u64) -> Self {
        let size_bytes = Arc::new(AtomicU64::new(size_bytes));
        Self { info, control, queues: Vec::new(), fault: Arc::default(), size_bytes }
    }

    /// Its size, which can grow.
    pub fn size(&self) -> DeviceSize {
        let (control, size_bytes) = (self.control.clone(), Arc::clone(&self.size_bytes));
        DeviceSize { id: self.id(), flags: self.info.flags, control, size_bytes }
    }

    /// Its number.
    pub fn id(&self) -> u32 {
        self.info.dev_id
    }

    /// Hardware queues that the driver granted.
    pub fn queues(&self) -> u16 {
        self.info.nr_hw_queues
    }

    /// `/dev/ublkbN`.
    pub fn block_path(&self) -> PathBuf {
        block_path(self.id())
    }

    /// Whether all queues have ended, because somebody stopped or deleted the device.
    pub fn has_ended(&self) -> bool {
        self.queues.iter().all(|queue| queue.source.has_ended())
    }

    /// Writes back the page cache of `/dev/ublkbN`, stops the device and deletes it. Whoever has it open gets errors.
    ///
    /// # Errors
    /// A failed command, [`DeviceError::QueuesRemain`], [`DeviceError::HeldOpen`].
    pub fn delete(mut self) -> Result<(), DeviceError> {
        write_back(self.id());
        self.remove()
    }

    /// Lets go of the device, whose new requests wait from now on; those that are under way are answered first. Once this
    /// process has ended, another can [`Driver::recover`] it without reissued requests.
    ///
    /// Before 6.16 the driver has no QUIESCE: this does nothing then, and the successor may get requests again.
    ///
    /// # Errors
    /// A failed command: after EBUSY the device takes no I/O until this is tried again or it is stopped.
    /// [`DeviceError::Busy`] when requests are still under way after another `timeout`; the successor gets them again.
    pub fn leave(&mut self, timeout: Duration) -> Result<(), DeviceError> {
        if self.info.flags & uapi::F_QUIESCE == 0 {
            return Ok(());
        }
        self.control.quiesce(self.id(), timeout)?;
        let deadline = Instant::now() + timeout;
        // Twice: what the driver had given out by then may not have been looked at when a queue first says that it has nothing.
        let mut looks = 0;
        while looks < 2 {
            if Instant::now() >= deadline {
                return Err(DeviceError::Busy { device: self.id(), waited_ms: timeout.as_millis() as u64 });
            }
            self.queues.iter().for_each(|queue| queue.source.stop());
            std::thread::sleep(POLL);
            looks = if self.queues.iter().all(Queue::is_left) { looks + 1 } else { 0 };
        }
        Ok(())
    }

    fn remove(&mut self) -> Result<(), DeviceError> {
        self.control.stop(self.id())?;
        self.wait_ended()?;
        delete_and_wait(&self.control, self.id())
    }

    fn wait_ended(&self) -> Result<(), DeviceError> {
        let deadline = Instant::now() + PATIENCE;
        let ended = |queue: &Queue| queue.source.wait(deadline.saturating_duration_since(Instant::now()));
        if self.queues.iter().all(ended) {
            Ok(())
        } else {
            Err(DeviceError::QueuesRemain { device: self.id(), waited_s: PATIENCE.as_secs() })
        }
    }

    /// A fetch that the driver refused explains a start that never ended.
    fn fault_or(&self, error: ControlError) -> DeviceError {
        match self.fault.load(Ordering::Relaxed) {
            0 => error.into(),
            errno => DeviceError::Fault { device: self.id(), source: io::Error::from_raw_os_error(-errno) },
        }
    }
}

/// Deletes a device, whoever served it.
///
/// # Errors
/// As for [`Driver::delete`].
pub fn delete(control: &Control, id: u32, force: bool) -> Result<(), DeviceError> {
    let info = control.info(id)?.ok_or(DeviceError::Missing { device: id })?;
    if info.state == uapi::DEV_STATE_LIVE {
        if !force && is_in_use(&block_path(id)) {
            return Err(DeviceError::InUse { path: block_path(id) });
        }
        write_back(id);
    }
    control.stop(id)?;
    delete_and_wait(control, id)
}

/// `/dev/ublkbN`.
pub fn block_path(id: u32) -> PathBuf {
    PathBuf::from(format!("/dev/ublkb{id}"))
}

/// The driver keeps the number until everybody has closed the device.
fn delete_and_wait(control: &Control, id: u32) -> Result<(), DeviceError> {
    control.delete(id)?;
    let deadline = Instant::now() + PATIENCE;
    while control.info(id)?.is_some() {
        if Instant::now() >= deadline {
            return Err(DeviceError::HeldOpen { device: id });
        }
        std::thread::sleep(POLL);
    }
    Ok(())
}

/// The node appears a moment after ADD_DEV, and a dead daemon's hold on it may outlast START_USER_RECOVERY's answer.
fn open_char_device(id: u32) -> Result<File, DeviceError> {
    let path = PathBuf::from(format!("/dev/ublkc{id}"));
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        match File::options().read(true).write(true).open(&path) {
            Ok(file) => return Ok(file),
            Err(error) => {
                let passing = matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EBUSY | libc::EACCES));
                if !passing || Instant::now() >= deadline {
                    return Err(DeviceError::Open { path, source: error });
                }
                std::thread::sleep(POLL);
            }
        }
    }
}

/// Before 6.16 the driver fails what its own removal of the disk would write back, so this comes first. Without success
/// nothing is lost that STOP_DEV would keep.
fn write_back(id: u32) {
    let (reply, answer) = mpsc::sync_channel(1);
    let spawned = std::thread::Builder::new().name("ublk-writeback".to_owned()).spawn(move || {
        let synced =
            File::options().read(true).write(true).open(block_path(id)).and_then(|file| file.sync_all());
        let _ = reply.send(synced);
    });
    let synced = match spawned {
        Ok(_) => answer.recv_timeout(PATIENCE).unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())),
        Err(error) => Err(error),
    };
    if let Err(error) = synced
        && error.kind() != io::ErrorKind::NotFound
        && error.raw_os_error() != Some(libc::EROFS)
    {
        tracing::warn!(device = id, %error, "could not write back the device's page cache before stopping it");
    }
}

/// An exclusive open fails where a filesystem or another device has claimed it.
fn is_in_use(path: &Path) -> bool {
    let opened = File::options().read(true).custom_flags(libc::O_EXCL | libc::O_NONBLOCK).open(path);
    opened.is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
}

fn process_lives(pid: i32) -> bool {
    pid > 0 && Path::new(&format!("/proc/{pid}")).exists()
}
