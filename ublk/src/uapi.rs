//! The kernel's interface of ublk, written by hand after include/uapi/linux/ublk_cmd.h (Linux 7.3; what is used here has
//! been the same since 6.12). All integers are in the host's byte order, which the kernel shares.

use std::mem::{offset_of, size_of};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `struct ublksrv_ctrl_cmd`: a control command, carried in the second half of a 128 byte submission.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CtrlCmd {
    /// Which device; [`DEV_ID_ANY`] lets ADD_DEV choose.
    pub dev_id: u32,
    /// Which queue; [`QUEUE_ID_NONE`] if the command is not for a queue.
    pub queue_id: u16,
    /// Length of the buffer at `addr`, in bytes.
    pub len: u16,
    /// Address of the command's buffer.
    pub addr: u64,
    /// The command's inline argument.
    pub data: u64,
    /// Length of the path in front of the buffer; zero for privileged devices.
    pub dev_path_len: u16,
    /// Zero.
    pub pad: u16,
    /// Zero.
    pub reserved: u32,
}

const _: () = assert!(size_of::<CtrlCmd>() == 32);
const _: () = assert!(offset_of!(CtrlCmd, addr) == 8);
const _: () = assert!(offset_of!(CtrlCmd, data) == 16);
const _: () = assert!(offset_of!(CtrlCmd, dev_path_len) == 24);

/// `struct ublksrv_ctrl_dev_info`: what the driver knows of a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CtrlDevInfo {
    /// Number of hardware queues; the driver lowers it to the number of CPUs.
    pub nr_hw_queues: u16,
    /// Requests of a queue that can be with the server at once, at most [`QUEUE_DEPTH_MAX`].
    pub queue_depth: u16,
    /// One of `DEV_STATE_*`.
    pub state: u16,
    /// Zero.
    pub pad0: u16,
    /// Longest data of a request, in bytes; the driver rounds it down to pages.
    pub max_io_buf_bytes: u32,
    /// The device's number: N of `/dev/ublkbN`.
    pub dev_id: u32,
    /// Process that serves it, or -1.
    pub ublksrv_pid: i32,
    /// Zero.
    pub pad1: u32,
    /// `F_*`, fixed for the device's life.
    pub flags: u64,
    /// The server's own: stored, and ignored by the driver.
    pub ublksrv_flags: u64,
    /// Owner, stored by the kernel.
    pub owner_uid: u32,
    /// Owner's group, stored by the kernel.
    pub owner_gid: u32,
    /// Zero.
    pub reserved1: u64,
    /// Zero.
    pub reserved2: u64,
}

const _: () = assert!(size_of::<CtrlDevInfo>() == 64);
const _: () = assert!(offset_of!(CtrlDevInfo, max_io_buf_bytes) == 8);
const _: () = assert!(offset_of!(CtrlDevInfo, ublksrv_pid) == 16);
const _: () = assert!(offset_of!(CtrlDevInfo, flags) == 24);
const _: () = assert!(offset_of!(CtrlDevInfo, ublksrv_flags) == 32);
const _: () = assert!(offset_of!(CtrlDevInfo, owner_uid) == 40);

/// `struct ublksrv_io_desc`: a request of the guest, in memory that the driver shares with the server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IoDesc {
    /// `IO_OP_*` in the lowest byte, `IO_F_*` above.
    pub op_flags: u32,
    /// Length, in sectors of 512 bytes.
    pub nr_sectors: u32,
    /// Place on the disk, in sectors of 512 bytes.
    pub start_sector: u64,
    /// The buffer that the driver was given for the request.
    pub addr: u64,
}

const _: () = assert!(size_of::<IoDesc>() == 24);
const _: () = assert!(offset_of!(IoDesc, nr_sectors) == 4);
const _: () = assert!(offset_of!(IoDesc, start_sector) == 8);

/// `struct ublksrv_io_cmd`: fetches a request, and commits the answer to the one before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IoCmd {
    /// Which queue.
    pub q_id: u16,
    /// Which of its requests.
    pub tag: u16,
    /// Commit: bytes done, or a negative errno.
    pub result: i32,
    /// Buffer: a read's data is copied from it during the commit, the next write's data into it.
    pub addr: u64,
}

const _: () = assert!(size_of::<IoCmd>() == 16);
const _: () = assert!(offset_of!(IoCmd, addr) == 8);

/// `struct ublk_param_basic`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ParamBasic {
    /// `ATTR_*`.
    pub attrs: u32,
    /// Logical block size, as a power of two.
    pub logical_bs_shift: u8,
    /// Physical block size, as a power of two.
    pub physical_bs_shift: u8,
    /// Best I/O size, as a power of two.
    pub io_opt_shift: u8,
    /// Smallest I/O without penalty, as a power of two.
    pub io_min_shift: u8,
    /// Longest request, in sectors of 512 bytes.
    pub max_sectors: u32,
    /// Requests never cross a multiple of it; zero for no such limit.
    pub chunk_sectors: u32,
    /// Size of the disk, in sectors of 512 bytes.
    pub dev_sectors: u64,
    /// Zero for no such limit.
    pub virt_boundary_mask: u64,
}

const _: () = assert!(size_of::<ParamBasic>() == 32);
const _: () = assert!(offset_of!(ParamBasic, max_sectors) == 8);
const _: () = assert!(offset_of!(ParamBasic, dev_sectors) == 16);

/// `struct ublk_param_discard`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ParamDiscard {
    /// Offset of the first granule, in bytes.
    pub discard_alignment: u32,
    /// Granule, in bytes; not zero.
    pub discard_granularity: u32,
    /// Longest discard, in sectors of 512 bytes; zero if not offered.
    pub max_discard_sectors: u32,
    /// Longest write-zeroes, in sectors of 512 bytes; zero if not offered.
    pub max_write_zeroes_sectors: u32,
    /// Must be one where discard is offered.
    pub max_discard_segments: u16,
    /// Zero.
    pub reserved0: u16,
}

const _: () = assert!(size_of::<ParamDiscard>() == 20);

/// `struct ublk_param_devt`: read-only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ParamDevt {
    /// Major number of `/dev/ublkcN`.
    pub char_major: u32,
    /// Minor number of `/dev/ublkcN`.
    pub char_minor: u32,
    /// Major number of `/dev/ublkbN`.
    pub disk_major: u32,
    /// Minor number of `/dev/ublkbN`.
    pub disk_minor: u32,
}

const _: () = assert!(size_of::<ParamDevt>() == 16);

/// The beginning of `struct ublk_params`: its `len` tells the driver how much of it there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Params {
    /// [`Params::LEN_BYTES`].
    pub len: u32,
    /// Which of the parts are meant: `PARAM_*`.
    pub types: u32,
    /// Part [`PARAM_BASIC`].
    pub basic: ParamBasic,
    /// Part [`PARAM_DISCARD`].
    pub discard: ParamDiscard,
    /// Part [`PARAM_DEVT`].
    pub devt: ParamDevt,
    /// Not sent: fills the structure to a multiple of eight bytes.
    pub unsent: u32,
}

impl Params {
    /// How many bytes of it are exchanged with the driver.
    pub const LEN_BYTES: u32 = 76;
}

const _: () = assert!(size_of::<Params>() == 80);
const _: () = assert!(offset_of!(Params, basic) == 8);
const _: () = assert!(offset_of!(Params, discard) == 40);
const _: () = assert!(offset_of!(Params, devt) == 60);
const _: () = assert!(offset_of!(Params, unsent) == Params::LEN_BYTES as usize);

/// [`CtrlCmd::dev_id`]: the driver chooses.
pub const DEV_ID_ANY: u32 = u32::MAX;
/// [`CtrlCmd::queue_id`]: not for a queue.
pub const QUEUE_ID_NONE: u16 = u16::MAX;
/// Most requests of a queue (`UBLK_MAX_QUEUE_DEPTH`); also sets how far apart the queues' descriptors are.
pub const QUEUE_DEPTH_MAX: u16 = 4096;

/// Reads what the driver knows of a device.
pub const CMD_GET_DEV_INFO: u32 = ioctl_r(0x02);
/// Makes a device and `/dev/ublkcN`.
pub const CMD_ADD_DEV: u32 = ioctl_rw(0x04);
/// Makes `/dev/ublkbN`; waits until all tags have been fetched.
pub const CMD_START_DEV: u32 = ioctl_rw(0x06);
/// Takes `/dev/ublkbN` away.
pub const CMD_STOP_DEV: u32 = ioctl_rw(0x07);
/// Sets [`Params`] before the start.
pub const CMD_SET_PARAMS: u32 = ioctl_rw(0x08);
/// Reads [`Params`].
pub const CMD_GET_PARAMS: u32 = ioctl_r(0x09);
/// Begins to take over a device whose server is gone.
pub const CMD_START_USER_RECOVERY: u32 = ioctl_rw(0x10);
/// Ends it; waits until all tags have been fetched.
pub const CMD_END_USER_RECOVERY: u32 = ioctl_rw(0x11);
/// Reads the driver's features, a `u64` of `F_*`.
pub const CMD_GET_FEATURES: u32 = ioctl_r(0x13);
/// Deletes a device without waiting for those who hold it open.
pub const CMD_DEL_DEV_ASYNC: u32 = ioctl_r(0x14);
/// Gives a device another size (6.16): `data[0]`, in sectors.
pub const CMD_UPDATE_SIZE: u32 = ioctl_rw(0x15);
/// Has the server let go of a device that stays (6.16).
pub const CMD_QUIESCE_DEV: u32 = ioctl_rw(0x16);

/// Fetches the first request of a tag.
pub const IO_FETCH_REQ: u32 = ioctl_rw_io(0x20);
/// Answers a request and fetches the tag's next.
pub const IO_COMMIT_AND_FETCH_REQ: u32 = ioctl_rw_io(0x21);

/// Completion of a fetch: a request is there.
pub const IO_RES_OK: i32 = 0;
/// Completion of a fetch: there will be no more.
pub const IO_RES_ABORT: i32 = -libc::ENODEV;

/// [`IoDesc::op_flags`]: read.
pub const IO_OP_READ: u32 = 0;
/// [`IoDesc::op_flags`]: write.
pub const IO_OP_WRITE: u32 = 1;
/// [`IoDesc::op_flags`]: flush.
pub const IO_OP_FLUSH: u32 = 2;
/// [`IoDesc::op_flags`]: discard.
pub const IO_OP_DISCARD: u32 = 3;
/// [`IoDesc::op_flags`]: write zeroes.
pub const IO_OP_WRITE_ZEROES: u32 = 5;
/// [`IoDesc::op_flags`]: durable before it completes.
pub const IO_F_FUA: u32 = 1 << 13;
/// [`IoDesc::op_flags`]: the zeroes must stay allocated.
pub const IO_F_NOUNMAP: u32 = 1 << 15;

/// [`CtrlDevInfo::state`]: not started, or stopped.
pub const DEV_STATE_DEAD: u16 = 0;
/// [`CtrlDevInfo::state`]: served.
pub const DEV_STATE_LIVE: u16 = 1;
/// [`CtrlDevInfo::state`]: without a server, requests wait.
pub const DEV_STATE_QUIESCED: u16 = 2;
/// [`CtrlDevInfo::state`]: without a server, requests fail.
pub const DEV_STATE_FAIL_IO: u16 = 3;

/// The device outlives its server.
pub const F_USER_RECOVERY: u64 = 1 << 3;
/// Requests that the dead server had are given to its successor.
pub const F_USER_RECOVERY_REISSUE: u64 = 1 << 4;
/// Commands are numbered as ioctls are.
pub const F_CMD_IOCTL_ENCODE: u64 = 1 << 6;
/// [`CMD_UPDATE_SIZE`] is offered.
pub const F_UPDATE_SIZE: u64 = 1 << 10;
/// [`CMD_QUIESCE_DEV`] is offered.
pub const F_QUIESCE: u64 = 1 << 12;
/// The driver does not look for partitions when the device starts.
pub const F_NO_AUTO_PART_SCAN: u64 = 1 << 18;

/// [`ParamBasic::attrs`]: the disk refuses writes.
pub const ATTR_READ_ONLY: u32 = 1 << 0;
/// [`ParamBasic::attrs`]: completed writes need a flush to be durable.
pub const ATTR_VOLATILE_CACHE: u32 = 1 << 2;
/// [`ParamBasic::attrs`]: FUA is taken.
pub const ATTR_FUA: u32 = 1 << 3;

/// [`Params::types`]: [`ParamBasic`].
pub const PARAM_BASIC: u32 = 1 << 0;
/// [`Params::types`]: [`ParamDiscard`].
pub const PARAM_DISCARD: u32 = 1 << 1;
/// [`Params::types`]: [`ParamDevt`].
pub const PARAM_DEVT: u32 = 1 << 2;

/// Place of a queue's descriptors in `/dev/ublkcN`, for mmap.
pub const fn descriptors_offset_bytes(queue: u16, page_bytes: usize) -> usize {
    queue as usize * descriptors_len_bytes(QUEUE_DEPTH_MAX, page_bytes)
}

/// Length of the mapping of the descriptors of a queue of `depth`.
pub const fn descriptors_len_bytes(depth: u16, page_bytes: usize) -> usize {
    (depth as usize * size_of::<IoDesc>()).next_multiple_of(page_bytes)
}

/// `_IOR('u', nr, struct ublksrv_ctrl_cmd)` of include/uapi/asm-generic/ioctl.h.
const fn ioctl_r(nr: u32) -> u32 {
    2 << 30 | (size_of::<CtrlCmd>() as u32) << 16 | (b'u' as u32) << 8 | nr
}

/// `_IOWR('u', nr, struct ublksrv_ctrl_cmd)`.
const fn ioctl_rw(nr: u32) -> u32 {
    3 << 30 | (size_of::<CtrlCmd>() as u32) << 16 | (b'u' as u32) << 8 | nr
}

/// `_IOWR('u', nr, struct ublksrv_io_cmd)`.
const fn ioctl_rw_io(nr: u32) -> u32 {
    3 << 30 | (size_of::<IoCmd>() as u32) << 16 | (b'u' as u32) << 8 | nr
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers that the C macros give.
    #[test]
    fn commands_are_encoded_as_the_kernel_does() {
        assert_eq!(CMD_GET_DEV_INFO, 0x8020_7502);
        assert_eq!(CMD_ADD_DEV, 0xc020_7504);
        assert_eq!(CMD_GET_FEATURES, 0x8020_7513);
        assert_eq!(CMD_DEL_DEV_ASYNC, 0x8020_7514);
        assert_eq!(CMD_UPDATE_SIZE, 0xc020_7515);
        assert_eq!(CMD_QUIESCE_DEV, 0xc020_7516);
        assert_eq!(IO_FETCH_REQ, 0xc010_7520);
        assert_eq!(IO_COMMIT_AND_FETCH_REQ, 0xc010_7521);
    }

    #[test]
    fn descriptors_lie_where_the_driver_maps_them() {
        assert_eq!(descriptors_len_bytes(64, 4096), 4096);
        assert_eq!(descriptors_len_bytes(171, 4096), 8192);
        assert_eq!(descriptors_offset_bytes(2, 4096), 2 * 98_304);
    }
}
