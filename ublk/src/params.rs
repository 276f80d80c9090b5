//! What the guest sees of a disk, as the driver's parameters.

use crate::serve::Geometry;
use crate::uapi::{self, ParamBasic, ParamDiscard, Params};

pub(crate) const SECTOR_BYTES: u64 = 512;

/// Why a disk's geometry cannot be a ublk device's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GeometryError {
    /// A block size is not a power of two from 512 to 4096, or the physical one is smaller than the logical one.
    #[error(
        "block sizes {logical_bytes}/{physical_bytes} (logical/physical) are not powers of two that ublk takes \
         (logical 512 to 4096, physical no smaller)"
    )]
    BlockSize {
        /// Logical block size.
        logical_bytes: u32,
        /// Physical block size.
        physical_bytes: u32,
    },
    /// The size is zero or no multiple of the logical block size.
    #[error("size {size_bytes} is not a positive multiple of the block size {block_bytes}")]
    Size {
        /// Size of the disk.
        size_bytes: u64,
        /// Logical block size.
        block_bytes: u32,
    },
}

/// The parameters of a device for a disk with this geometry and requests of at most `io_bytes_max`.
///
/// # Errors
/// [`GeometryError`].
pub fn params_of(geometry: &Geometry, io_bytes_max: u32) -> Result<Params, GeometryError> {
    let (logical_bytes, physical_bytes) = (geometry.logical_block_bytes, geometry.physical_block_bytes);
    let sizes_fit = logical_bytes.is_power_of_two()
        && (512..=4096).contains(&logical_bytes)
        && physical_bytes.is_power_of_two()
        && physical_bytes >= logical_bytes;
    if !sizes_fit {
        return Err(GeometryError::BlockSize { logical_bytes, physical_bytes });
    }
    let size_bytes = geometry.size_bytes;
    if size_bytes == 0 || !size_bytes.is_multiple_of(u64::from(logical_bytes)) {
        return Err(GeometryError::Size { size_bytes, block_bytes: logical_bytes });
    }
    let mut attrs = 0;
    if geometry.read_only {
        attrs |= uapi::ATTR_READ_ONLY;
    }
    if geometry.volatile_cache {
        attrs |= uapi::ATTR_VOLATILE_CACHE;
        // The driver passes FUA on only beside a volatile cache: without one every write is durable anyway.
        if geometry.fua {
            attrs |= uapi::ATTR_FUA;
        }
    }
    let physical_bs_shift = physical_bytes.ilog2() as u8;
    let basic = ParamBasic {
        attrs,
        logical_bs_shift: logical_bytes.ilog2() as u8,
        physical_bs_shift,
        io_opt_shift: physical_bs_shift,
        io_min_shift: physical_bs_shift,
        max_sectors: io_bytes_max / SECTOR_BYTES as u32,
        chunk_sectors: 0,
        dev_sectors: size_bytes / SECTOR_BYTES,
        virt_boundary_mask: 0,
    };
    let mut params = Params { len: Params::LEN_BYTES, types: uapi::PARAM_BASIC, basic, ..Params::default() };
    if geometry.discard.is_some() || geometry.write_zeroes.is_some() {
        let sectors = |limit_bytes: u32| (limit_bytes - limit_bytes % logical_bytes) / SECTOR_BYTES as u32;
        params.types |= uapi::PARAM_DISCARD;
        params.discard = ParamDiscard {
            discard_alignment: 0,
            discard_granularity: geometry
                .discard
                .or(geometry.write_zeroes)
                .map_or(logical_bytes, |limits| limits.granularity_bytes.max(logical_bytes)),
            max_discard_sectors: geometry.discard.map_or(0, |limits| sectors(limits.max_bytes)),
            max_write_zeroes_sectors: geometry.write_zeroes.map_or(0, |limits| sectors(limits.max_bytes)),
            max_discard_segments: u16::from(geometry.discard.is_some()),
            reserved0: 0,
        };
    }
    Ok(params)
}

/// What a recovered device was made with and its disk no longer has, in words, or none if all of it is there. The disk may be larger.
pub fn difference(made_with: &Params, now: &Params) -> Option<String> {
    let bytes = |params: &Params| params.basic.dev_sectors * SECTOR_BYTES;
    if bytes(made_with) > bytes(now) {
        return Some(format!("its size was {} bytes and is {} bytes", bytes(made_with), bytes(now)));
    }
    let basic = (made_with.basic, now.basic);
    if basic.0.logical_bs_shift != basic.1.logical_bs_shift {
        let sizes = (1_u32 << basic.0.logical_bs_shift, 1_u32 << basic.1.logical_bs_shift);
        return Some(format!("its logical block size was {} and is {}", sizes.0, sizes.1));
    }
    if basic.0.attrs != basic.1.attrs {
        let attrs = (basic.0.attrs, basic.1.attrs);
        return Some(format!("its attributes were {:#x} and are {:#x}", attrs.0, attrs.1));
    }
    let offered = |params: &Params| {
        (params.discard.max_discard_sectors > 0, params.discard.max_write_zeroes_sectors > 0)
    };
    let (before, after) = (offered(made_with), offered(now));
    if (before.0 && !after.0) || (before.1 && !after.1) {
        return Some("it offered discard or write-zeroes and no longer can".to_owned());
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::ZeroLimits;

    fn geometry() -> Geometry {
        Geometry {
            size_bytes: 1 << 30,
            logical_block_bytes: 512,
            physical_block_bytes: 4096,
            volatile_cache: true,
            fua: true,
            read_only: false,
            discard: Some(ZeroLimits { granularity_bytes: 4096, max_bytes: 1 << 27 }),
            write_zeroes: None,
        }
    }

    #[test]
    fn geometry_is_passed_on_truthfully() {
        let params = params_of(&geometry(), 1 << 16).expect("params");
        assert_eq!(params.types, uapi::PARAM_BASIC | uapi::PARAM_DISCARD);
        assert_eq!(params.basic.attrs, uapi::ATTR_VOLATILE_CACHE | uapi::ATTR_FUA);
        assert_eq!((params.basic.logical_bs_shift, params.basic.physical_bs_shift), (9, 12));
        assert_eq!((params.basic.dev_sectors, params.basic.max_sectors), (1 << 21, 128));
        assert_eq!(params.discard.max_discard_sectors, 1 << 18);
        assert_eq!(params.discard.max_write_zeroes_sectors, 0);
        assert_eq!((params.discard.discard_granularity, params.discard.max_discard_segments), (4096, 1));
    }

    #[test]
    fn what_is_not_there_is_not_claimed() {
        let plain = Geometry {
            volatile_cache: false,
            read_only: true,
            discard: None,
            write_zeroes: None,
            ..geometry()
        };
        let params = params_of(&plain, 1 << 16).expect("params");
        assert_eq!(params.types, uapi::PARAM_BASIC);
        assert_eq!(params.basic.attrs, uapi::ATTR_READ_ONLY);
        let zeroes = Geometry { write_zeroes: geometry().discard, ..plain };
        let params = params_of(&zeroes, 1 << 16).expect("params");
        assert_eq!((params.discard.max_discard_sectors, params.discard.max_discard_segments), (0, 0));
        assert_eq!(params.discard.max_write_zeroes_sectors, 1 << 18);
    }

    #[test]
    fn odd_sizes_are_refused() {
        let odd = Geometry { size_bytes: 1000, ..geometry() };
        let error = params_of(&odd, 4096).expect_err("no multiple");
        assert_eq!(error.to_string(), "size 1000 is not a positive multiple of the block size 512");
        for (logical, physical) in [(1024, 512), (256, 4096), (8192, 8192), (512, 3000)] {
            let bad = Geometry { logical_block_bytes: logical, physical_block_bytes: physical, ..geometry() };
            assert!(matches!(params_of(&bad, 4096), Err(GeometryError::BlockSize { .. })), "{bad:?}");
        }
    }

    #[test]
    fn a_disk_that_changed_under_its_device_is_noticed() {
        let made_with = params_of(&geometry(), 1 << 16).expect("params");
        assert_eq!(difference(&made_with, &made_with), None);
        let grown = params_of(&Geometry { size_bytes: 2 << 30, ..geometry() }, 1 << 16).expect("params");
        assert_eq!(difference(&made_with, &grown), None, "the device can grow, too");
        assert!(difference(&grown, &made_with).is_some_and(|text| text.contains("2147483648")));
        let plain = params_of(&Geometry { discard: None, ..geometry() }, 1 << 16).expect("params");
        assert!(difference(&made_with, &plain).is_some());
        assert_eq!(difference(&plain, &made_with), None);
    }
}
