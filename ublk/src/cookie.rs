//! How a restarted daemon tells its own devices from strangers'.

/// What we store in a device's `ublksrv_flags`: a magic number and the disk's own 32 bit id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Cookie {
    /// Chosen by whoever adds the device; names the disk to it after a restart.
    pub disk_id: u32,
}

impl Cookie {
    /// As the driver stores it.
    pub fn to_flags(self) -> u64 {
        u64::from(MAGIC) << 32 | u64::from(self.disk_id)
    }

    /// The cookie in a device's flags, if they are ours.
    pub fn from_flags(flags: u64) -> Option<Self> {
        ((flags >> 32) as u32 == MAGIC).then_some(Self { disk_id: flags as u32 })
    }
}

/// "HFub".
const MAGIC: u32 = 0x4846_7562;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_flags_are_a_cookie() {
        let cookie = Cookie { disk_id: 0xffff_fffe };
        assert_eq!(Cookie::from_flags(cookie.to_flags()), Some(cookie));
        assert_eq!(Cookie::from_flags(0), None);
        assert_eq!(Cookie::from_flags(7), None);
    }
}
