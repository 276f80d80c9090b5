//! Commands to the ublk driver over `/dev/ublk-control`.
//!
//! Each command runs on a helper thread of its own, with a ring of its own and a deadline: a driver that hangs or has
//! oopsed must not take its caller with it. A command that misses its deadline keeps its thread and its buffer.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::features::Features;
use crate::host::{self, HostError};
use crate::uapi::{self, CtrlCmd, CtrlDevInfo, Params};

/// Time that a command gets. All take the driver's mutexes, which the driver of 6.12 was seen to hold for up to half a
/// minute after a server was killed under load; a guest waits for the recovery that such a command is part of, so giving
/// up just before the driver would have answered makes its pause longer.
const DEADLINE: Duration = Duration::from_secs(60);

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The host has no usable ublk.
    #[error(transparent)]
    Host(#[from] HostError),
    /// `/dev/ublk-control` could not be opened.
    #[error("cannot open /dev/ublk-control: run as root (CAP_SYS_ADMIN is needed)")]
    Open {
        /// What the system said.
        source: io::Error,
    },
    /// The helper thread or its ring could not be made.
    #[error("cannot run {command}: no thread or io_uring for it")]
    Helper {
        /// The command.
        command: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The driver refused.
    #[error("{command} of ublk device {device}: {remedy}")]
    Refused {
        /// The command.
        command: &'static str,
        /// The device.
        device: DeviceName,
        /// What it means and what to do.
        remedy: &'static str,
        /// What the driver said.
        source: io::Error,
    },
    /// No answer in time.
    #[error(
        "{command} of ublk device {device} has not ended within {deadline_s} s: see dmesg; the driver may need a reboot"
    )]
    Deadline {
        /// The command.
        command: &'static str,
        /// The device.
        device: DeviceName,
        /// How long was waited.
        deadline_s: u64,
    },
}

impl ControlError {
    /// The driver's errno, if it was the driver that refused.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Refused { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}

/// A device in messages: its number, or that none has been chosen yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceName(
    /// The number, or [`uapi::DEV_ID_ANY`].
    pub u32,
);

impl std::fmt::Display for DeviceName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0 == uapi::DEV_ID_ANY { f.write_str("(new)") } else { write!(f, "{}", self.0) }
    }
}

/// The driver's control device. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Control {
    file: Arc<File>,
    features: Features,
}

impl Control {
    /// Opens the control device and asks for the driver's features.
    ///
    /// # Errors
    /// [`ControlError::Host`] without ublk or with a kernel before 6.12, [`ControlError::Open`] without permission.
    pub fn open() -> Result<Self, ControlError> {
        host::require_ublk()?;
        let file = File::options()
            .read(true)
            .write(true)
            .open(host::CONTROL_PATH)
            .map_err(|source| ControlError::Open { source })?;
        let mut control = Self { file: Arc::new(file), features: Features(0) };
        let features = Command::new("GET_FEATURES", uapi::CMD_GET_FEATURES, uapi::DEV_ID_ANY);
        control.features = Features(control.run_for::<u64>(features, &0)?);
        Ok(control)
    }

    /// What the driver offers.
    pub fn features(&self) -> Features {
        self.features
    }

    /// Makes a device; the answer has its number and what the driver made of the wishes.
    pub(crate) fn add(&self, wish: &CtrlDevInfo) -> Result<CtrlDevInfo, ControlError> {
        self.run_for(Command::new("ADD_DEV", uapi::CMD_ADD_DEV, wish.dev_id), wish)
    }

    pub(crate) fn set_params(&self, device: u32, params: &Params) -> Result<(), ControlError> {
        self.run_for(Command::new("SET_PARAMS", uapi::CMD_SET_PARAMS, device), params).map(drop)
    }

    pub(crate) fn params(&self, device: u32) -> Result<Params, ControlError> {
        let empty = Params { len: Params::LEN_BYTES, ..Params::default() };
        self.run_for(Command::new("GET_PARAMS", uapi::CMD_GET_PARAMS, device), &empty)
    }

    /// What the driver knows of a device, or none if there is no such device.
    pub fn info(&self, device: u32) -> Result<Option<CtrlDevInfo>, ControlError> {
        let command = Command::new("GET_DEV_INFO", uapi::CMD_GET_DEV_INFO, device);
        match self.run_for(command, &CtrlDevInfo::default()) {
            Ok(info) => Ok(Some(info)),
            Err(error) if error.errno() == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(crate) fn start(&self, device: u32) -> Result<(), ControlError> {
        let command = Command::new("START_DEV", uapi::CMD_START_DEV, device);
        self.run(command.data(u64::from(std::process::id())))
    }

    pub(crate) fn stop(&self, device: u32) -> Result<(), ControlError> {
        self.run(Command::new("STOP_DEV", uapi::CMD_STOP_DEV, device))
    }

    pub(crate) fn delete(&self, device: u32) -> Result<(), ControlError> {
        self.run(Command::new("DEL_DEV", uapi::CMD_DEL_DEV_ASYNC, device))
    }

    pub(crate) fn start_recovery(&self, device: u32) -> Result<(), ControlError> {
        self.run(Command::new("START_USER_RECOVERY", uapi::CMD_START_USER_RECOVERY, device))
    }

    pub(crate) fn end_recovery(&self, device: u32) -> Result<(), ControlError> {
        let command = Command::new("END_USER_RECOVERY", uapi::CMD_END_USER_RECOVERY, device);
        self.run(command.data(u64::from(std::process::id())))
    }

    /// Gives a device another size, in sectors.
    pub(crate) fn update_size(&self, device: u32, sectors: u64) -> Result<(), ControlError> {
        let command = Command::new("UPDATE_SIZE", uapi::CMD_UPDATE_SIZE, device);
        self.run(command.data(sectors))
    }

    /// The driver waits up to `timeout` for an idle tag in each queue.
    pub(crate) fn quiesce(&self, device: u32, timeout: Duration) -> Result<(), ControlError> {
        // Zero would mean for ever, and the driver keeps 32 bits.
        let timeout_ms = timeout.as_millis().clamp(1, u128::from(u32::MAX)) as u64;
        let command = Command::new("QUIESCE_DEV", uapi::CMD_QUIESCE_DEV, device);
        self.run(command.data(timeout_ms).deadline(timeout + DEADLINE))
    }

    fn run(&self, command: Command) -> Result<(), ControlError> {
        self.run_with(command, Box::default()).map(drop)
    }

    /// Runs a command whose buffer is a `T`, and gives it back as the driver left it.
    fn run_for<T>(&self, command: Command, value: &T) -> Result<T, ControlError>
    where
        T: FromBytes + IntoBytes + Immutable + KnownLayout,
    {
        let mut buffer = vec![0_u64; size_of::<T>().div_ceil(8)].into_boxed_slice();
        buffer.as_mut_bytes()[..size_of::<T>()].copy_from_slice(value.as_bytes());
        let buffer = self.run_with(command.len(size_of::<T>()), buffer)?;
        let mut answer = T::new_zeroed();
        answer.as_mut_bytes().copy_from_slice(&buffer.as_bytes()[..size_of::<T>()]);
        Ok(answer)
    }

    fn run_with(&self, command: Command, buffer: Box<[u64]>) -> Result<Box<[u64]>, ControlError> {
        let Command { name, device, deadline, .. } = command;
        let file = Arc::clone(&self.file);
        let (reply, answer) = mpsc::sync_channel(1);
        std::thread::Builder::new()
            .name("ublk-control".to_owned())
            .spawn(move || {
                let _ = reply.send(execute(&file, &command, buffer));
            })
            .map_err(|source| ControlError::Helper { command: name, source })?;
        match answer.recv_timeout(deadline) {
            Ok(Ok((0.., buffer))) => Ok(buffer),
            Ok(Ok((result, _))) => Err(ControlError::Refused {
                command: name,
                device: DeviceName(device),
                remedy: remedy(name, -result),
                source: io::Error::from_raw_os_error(-result),
            }),
            Ok(Err(source)) => Err(ControlError::Helper { command: name, source }),
            Err(_) => Err(ControlError::Deadline {
                command: name,
                device: DeviceName(device),
                deadline_s: deadline.as_secs(),
            }),
        }
    }
}

struct Command {
    name: &'static str,
    op: u32,
    device: u32,
    len_bytes: u16,
    data: u64,
    deadline: Duration,
}

impl Command {
    fn new(name: &'static str, op: u32, device: u32) -> Self {
        Self { name, op, device, len_bytes: 0, data: 0, deadline: DEADLINE }
    }

    fn len(self, len_bytes: usize) -> Self {
        Self { len_bytes: len_bytes as u16, ..self }
    }

    fn data(self, data: u64) -> Self {
        Self { data, ..self }
    }

    fn deadline(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    fn payload(&self, buffer_address: u64) -> [u8; 80] {
        let header = CtrlCmd {
            dev_id: self.device,
            queue_id: uapi::QUEUE_ID_NONE,
            len: self.len_bytes,
            addr: if self.len_bytes == 0 { 0 } else { buffer_address },
            data: self.data,
            ..CtrlCmd::default()
        };
        let mut payload = [0; 80];
        payload[..size_of::<CtrlCmd>()].copy_from_slice(header.as_bytes());
        payload
    }
}

/// Runs the command to its end, however long that takes.
fn execute(file: &File, command: &Command, mut buffer: Box<[u64]>) -> io::Result<(i32, Box<[u64]>)> {
    let mut ring: IoUring<squeue::Entry128, cqueue::Entry> = IoUring::builder().build(2)?;
    let payload = command.payload(buffer.as_mut_ptr() as u64);
    let entry = opcode::UringCmd80::new(types::Fd(file.as_raw_fd()), command.op).cmd(payload).build();
    // SAFETY: the file and the buffer outlive the wait below, which ends only with the completion.
    let pushed = unsafe { ring.submission().push(&entry) };
    pushed.map_err(|_| io::Error::other("a new ring has room for one command"))?;
    loop {
        match ring.submit_and_wait(1) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                // The kernel may still write to the buffer.
                std::mem::forget(buffer);
                return Err(error);
            }
        }
        if let Some(completion) = ring.completion().next() {
            return Ok((completion.result(), buffer));
        }
    }
}

/// What the driver's refusal means and what to do.
fn remedy(command: &str, errno: i32) -> &'static str {
    match (command, errno) {
        (_, libc::EPERM) => "not permitted: run as root (CAP_SYS_ADMIN is needed)",
        ("ADD_DEV", libc::EACCES) => {
            "the driver's limit on devices is reached: delete some (`vra-ublk list`) or raise \
             /sys/module/ublk_drv/parameters/ublks_max"
        }
        ("ADD_DEV", libc::EEXIST) => "the number is taken: choose another, or see `vra-ublk list`",
        ("ADD_DEV", libc::ENOMEM) => "the kernel has no memory for its queues: fewer queues or less depth",
        ("ADD_DEV" | "SET_PARAMS", libc::EINVAL) => "the driver refuses these parameters",
        ("START_USER_RECOVERY" | "END_USER_RECOVERY", libc::EBUSY) => {
            "its old daemon still holds it or has I/O in flight: end that process and try again"
        }
        ("START_USER_RECOVERY" | "END_USER_RECOVERY", libc::EINVAL) => {
            "it was never started, or was made without recovery: delete it and add it again"
        }
        ("START_DEV", libc::EEXIST) => "it is started already",
        ("QUIESCE_DEV", libc::EBUSY | libc::EINTR) => {
            "no request slot became idle in time; the device takes no I/O until this is tried again or it is stopped"
        }
        ("QUIESCE_DEV", libc::EOPNOTSUPP) => "it was made on a kernel before 6.16, without QUIESCE",
        (_, libc::ENODEV) => "there is no such device: see `vra-ublk list`",
        (_, libc::EOPNOTSUPP) => "this kernel's driver does not know the command: upgrade the kernel",
        _ => "the driver refused: see dmesg",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_carries_its_header_and_nothing_else() {
        let command = Command::new("START_DEV", uapi::CMD_START_DEV, 7).data(0x1234);
        let payload = command.payload(0xdead_beef);
        let (header, rest) = CtrlCmd::read_from_prefix(&payload).expect("80 bytes hold 32");
        assert_eq!((header.dev_id, header.queue_id, header.data), (7, u16::MAX, 0x1234));
        assert_eq!((header.len, header.addr), (0, 0), "no buffer, no address");
        assert!(rest.iter().all(|byte| *byte == 0));
        let header = Command::new("GET_PARAMS", uapi::CMD_GET_PARAMS, 7).len(80).payload(0x1000);
        let (header, _) = CtrlCmd::read_from_prefix(&header).expect("80 bytes hold 32");
        assert_eq!((header.len, header.addr), (80, 0x1000));
    }

    #[test]
    fn refusals_name_the_device_and_the_remedy() {
        let refused = |command, errno| {
            let source = io::Error::from_raw_os_error(errno);
            let device = DeviceName(3);
            ControlError::Refused { command, device, remedy: remedy(command, errno), source }.to_string()
        };
        assert!(refused("ADD_DEV", libc::EACCES).contains("ublks_max"));
        assert!(refused("ADD_DEV", libc::EPERM).contains("as root"));
        assert!(refused("STOP_DEV", libc::ENODEV).contains("device 3: there is no such device"));
        assert!(refused("START_DEV", libc::EIO).contains("see dmesg"));
        let late =
            ControlError::Deadline { command: "ADD_DEV", device: DeviceName(u32::MAX), deadline_s: 60 };
        assert!(
            late.to_string().starts_with("ADD_DEV of ublk device (new) has not ended within 60 s: see dmesg")
        );
    }
}
