//! The devices of this host, as the driver knows them.

use crate::control::{Control, ControlError};
use crate::cookie::Cookie;
use crate::features::Features;
use crate::uapi;

/// What the driver knows of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its number.
    pub id: u32,
    /// Whether somebody serves it.
    pub state: DeviceState,
    /// Hardware queues.
    pub queues: u16,
    /// Requests of each queue.
    pub depth: u16,
    /// Longest request, in bytes.
    pub io_bytes_max: u32,
    /// Process that serves it or served it last, if any.
    pub daemon_pid: Option<i32>,
    /// What it was made with.
    pub features: Features,
    /// Our mark, if it is ours.
    pub cookie: Option<Cookie>,
    /// Size, in bytes.
    pub size_bytes: u64,
}

/// State of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceState {
    /// Not started, or stopped.
    Dead,
    /// Served.
    Live,
    /// Without a daemon; requests wait for its successor.
    Quiesced,
    /// Without a daemon; requests fail.
    FailIo,
    /// Newer than this program.
    Unknown(u16),
}

impl std::fmt::Display for DeviceState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Dead => f.write_str("dead"),
            Self::Live => f.write_str("live"),
            Self::Quiesced => f.write_str("quiesced"),
            Self::FailIo => f.write_str("fail-io"),
            Self::Unknown(state) => write!(f, "unknown-{state}"),
        }
    }
}

/// All ublk devices of this host.
///
/// # Errors
/// [`ControlError`].
pub fn list(control: &Control) -> Result<Vec<DeviceInfo>, ControlError> {
    let mut devices = Vec::new();
    for id in device_ids() {
        // One that goes away meanwhile is left out.
        let Some(info) = control.info(id)? else {
            continue;
        };
        let size_bytes = match control.params(id) {
            Ok(params) => params.basic.dev_sectors << 9,
            Err(error) if error.errno() == Some(libc::ENODEV) => continue,
            Err(error) => return Err(error),
        };
        devices.push(DeviceInfo {
            id,
            state: match info.state {
                uapi::DEV_STATE_DEAD => DeviceState::Dead,
                uapi::DEV_STATE_LIVE => DeviceState::Live,
                uapi::DEV_STATE_QUIESCED => DeviceState::Quiesced,
                uapi::DEV_STATE_FAIL_IO => DeviceState::FailIo,
                state => DeviceState::Unknown(state),
            },
            queues: info.nr_hw_queues,
            depth: info.queue_depth,
            io_bytes_max: info.max_io_buf_bytes,
            daemon_pid: (info.ublksrv_pid > 0).then_some(info.ublksrv_pid),
            features: Features(info.flags),
            cookie: Cookie::from_flags(info.ublksrv_flags),
            size_bytes,
        });
    }
    Ok(devices)
}

/// Numbers of all devices, lowest first.
pub(super) fn device_ids() -> Vec<u32> {
    let Ok(entries) = std::fs::read_dir("/sys/class/ublk-char") else {
        return Vec::new();
    };
    let id_of = |name: &str| name.strip_prefix("ublkc")?.parse().ok();
    let mut ids: Vec<u32> =
        entries.flatten().filter_map(|entry| id_of(entry.file_name().to_str()?)).collect();
    ids.sort_unstable();
    ids
}
