//! Features of a ublk driver or device, by the bits of `UBLK_F_*`.

use crate::uapi;

/// A set of features: what the driver offers (GET_FEATURES), or what a device was made with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Features(
    /// Bits as in `ublksrv_ctrl_dev_info.flags`.
    pub u64,
);

impl Features {
    /// Whether all bits of `flags` are there.
    pub fn has(self, flags: u64) -> bool {
        self.0 & flags == flags
    }

    /// The flags of a device that we make: recovery with reissue always, whatever else helps where it is offered.
    pub fn for_new_device(self) -> u64 {
        let wished = uapi::F_UPDATE_SIZE | uapi::F_QUIESCE | uapi::F_NO_AUTO_PART_SCAN;
        uapi::F_USER_RECOVERY | uapi::F_USER_RECOVERY_REISSUE | uapi::F_CMD_IOCTL_ENCODE | (self.0 & wished)
    }

    /// Name of each bit, lowest first; a bit without a name gives `BIT_n`.
    pub fn names(self) -> Vec<String> {
        (0..u64::BITS)
            .filter(|bit| self.0 & 1 << bit != 0)
            .map(|bit| NAMES.get(bit as usize).map_or_else(|| format!("BIT_{bit}"), ToString::to_string))
            .collect()
    }
}

/// `UBLK_F_*` of include/uapi/linux/ublk_cmd.h (Linux 7.3), by bit.
const NAMES: [&str; 21] = [
    "SUPPORT_ZERO_COPY",
    "URING_CMD_COMP_IN_TASK",
    "NEED_GET_DATA",
    "USER_RECOVERY",
    "USER_RECOVERY_REISSUE",
    "UNPRIVILEGED_DEV",
    "CMD_IOCTL_ENCODE",
    "USER_COPY",
    "ZONED",
    "USER_RECOVERY_FAIL_IO",
    "UPDATE_SIZE",
    "AUTO_BUF_REG",
    "QUIESCE",
    "PER_IO_DAEMON",
    "BUF_REG_OFF_DAEMON",
    "BATCH_IO",
    "INTEGRITY",
    "SAFE_STOP_DEV",
    "NO_AUTO_PART_SCAN",
    "SHMEM_ZC",
    "IO_DESC_SIZE",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_bits() {
        let names = Features(uapi::F_QUIESCE | uapi::F_USER_RECOVERY | uapi::F_NO_AUTO_PART_SCAN | 1 << 40);
        assert_eq!(names.names(), ["USER_RECOVERY", "QUIESCE", "NO_AUTO_PART_SCAN", "BIT_40"]);
    }

    #[test]
    fn a_device_is_always_recoverable_and_asks_only_for_what_is_offered() {
        let debian_6_12 = Features(0x1fe);
        let flags = Features(debian_6_12.for_new_device());
        assert!(flags.has(uapi::F_USER_RECOVERY | uapi::F_USER_RECOVERY_REISSUE));
        assert!(!flags.has(uapi::F_QUIESCE));
        assert!(debian_6_12.has(flags.0));
        assert!(Features(Features(0x1f_ffff).for_new_device()).has(uapi::F_QUIESCE));
    }
}
