//! What a daemon does with the devices that its predecessor left, before it adds any.

use crate::control::Control;
use crate::cookie::Cookie;
use crate::device::{self, DeviceError, DeviceInfo, DeviceState};

/// What to do with one of our devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Its disk is known: to be given back for [`Driver::recover`](crate::device::Driver::recover).
    Recover,
    /// Its disk is gone: delete it, also if it is mounted, since nobody will ever answer it.
    Delete,
    /// Leave it as it is.
    Leave,
}

/// What a sweep did.
#[derive(Debug, Default)]
pub struct Swept {
    /// Devices to recover, with their cookies.
    pub to_recover: Vec<(DeviceInfo, Cookie)>,
    /// Numbers of the devices that were deleted.
    pub deleted: Vec<u32>,
    /// Devices that should have been deleted and could not be.
    pub failed: Vec<(u32, DeviceError)>,
}

/// Looks through all ublk devices for ours that nobody serves, and asks `judge` about each. Strangers' devices and those
/// that a living process serves are never touched. A device that was never started, or was stopped, is deleted: it has
/// nothing to recover.
///
/// # Errors
/// [`ControlError`](crate::control::ControlError), wrapped, if the devices cannot be listed.
pub fn sweep(
    control: &Control,
    mut judge: impl FnMut(&DeviceInfo, Cookie) -> Verdict,
) -> Result<Swept, DeviceError> {
    let mut swept = Swept::default();
    for info in device::list(control)? {
        let Some(cookie) = info.cookie else {
            continue;
        };
        match decide(&info, daemon_lives(&info), || judge(&info, cookie)) {
            Verdict::Leave => {}
            Verdict::Recover => swept.to_recover.push((info, cookie)),
            Verdict::Delete => match device::delete(control, info.id, true) {
                Ok(()) => swept.deleted.push(info.id),
                Err(error) => swept.failed.push((info.id, error)),
            },
        }
    }
    Ok(swept)
}

fn decide(info: &DeviceInfo, daemon_lives: bool, judge: impl FnOnce() -> Verdict) -> Verdict {
    match (info.state, daemon_lives) {
        (DeviceState::Live | DeviceState::Unknown(_), true) => Verdict::Leave,
        // A device that is being set up right now has no daemon in its record yet, but its process is ours or a
        // sibling's: only what nobody holds open is litter.
        (DeviceState::Dead, _) if char_device_is_open(info.id) => Verdict::Leave,
        (DeviceState::Dead, _) => Verdict::Delete,
        _ => judge(),
    }
}

fn daemon_lives(info: &DeviceInfo) -> bool {
    info.daemon_pid.is_some_and(|pid| std::path::Path::new(&format!("/proc/{pid}")).exists())
}

/// `/dev/ublkcN` has a single opener.
fn char_device_is_open(id: u32) -> bool {
    let opened = std::fs::File::options().read(true).write(true).open(format!("/dev/ublkc{id}"));
    opened.is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::features::Features;

    fn info(state: DeviceState) -> DeviceInfo {
        DeviceInfo {
            id: u32::MAX,
            state,
            queues: 1,
            depth: 64,
            io_bytes_max: 65_536,
            daemon_pid: Some(1),
            features: Features(0),
            cookie: Some(Cookie { disk_id: 1 }),
            size_bytes: 4096,
        }
    }

    #[test]
    fn a_served_device_is_left_and_litter_deleted_whatever_the_judge_says() {
        let asked = || panic!("not to be asked");
        assert_eq!(decide(&info(DeviceState::Live), true, asked), Verdict::Leave);
        assert_eq!(decide(&info(DeviceState::Dead), false, asked), Verdict::Delete);
    }

    #[test]
    fn an_orphan_is_the_judges() {
        for state in [DeviceState::Quiesced, DeviceState::FailIo] {
            assert_eq!(decide(&info(state), false, || Verdict::Recover), Verdict::Recover);
        }
        // Its daemon was just killed: the driver has not noticed yet.
        assert_eq!(decide(&info(DeviceState::Live), false, || Verdict::Delete), Verdict::Delete);
    }
}
