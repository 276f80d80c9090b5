//! A disk in memory.

use anyhow::Result;

use crate::suite::context::Context;

/// A RAM disk, `/dev/ram0`, that goes with its owner.
pub(crate) struct RamDisk<'a> {
    context: &'a Context,
}

impl<'a> RamDisk<'a> {
    pub(crate) fn new(context: &'a Context, size_mib: u64) -> Result<Self> {
        if context.is_native() && std::path::Path::new("/sys/module/brd").exists() {
            return Err(context.skip("this host uses RAM disks already: unload brd first"));
        }
        // Of a RAM disk that somebody left: no harm if there is none.
        context.try_run(&["modprobe", "-r", "brd"])?;
        context.run(&["modprobe", "brd", "rd_nr=1", &format!("rd_size={}", size_mib << 10)])?;
        Ok(Self { context })
    }

    pub(crate) fn device(&self) -> &'static str {
        "/dev/ram0"
    }
}

impl Drop for RamDisk<'_> {
    fn drop(&mut self) {
        let _ = self.context.run(&["modprobe", "-r", "brd"]);
    }
}
