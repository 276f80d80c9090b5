//! Where the parts of a range are: in which layer of the view, and which of them clients can skip.

use std::os::fd::AsRawFd;

use nix::errno::Errno;
use ublk::serve::{Allocation, Extent};

use super::history::History;
use super::scratch::map::{Place, Run};
use super::{ViewDisk, plan};

impl ViewDisk {
    /// Where each part of a range is. To be asked for once [`Reading::begin`] was called, if it is for a read.
    pub(super) fn runs(&self, offset_bytes: u64, len_bytes: u64) -> Vec<Run> {
        let runs = match &self.scratch {
            Some(scratch) => scratch.lock().map.find(offset_bytes, len_bytes),
            None => vec![Run { offset_bytes, len_bytes, place: Place::Below }],
        };
        let Some(kept) = self.beneath.as_ref().and_then(|beneath| beneath.scratch.as_ref()) else {
            return runs;
        };
        let mut refined = Vec::with_capacity(runs.len());
        for run in runs {
            if run.place != Place::Below {
                refined.push(run);
                continue;
            }
            let found = kept.lock().map.find(run.offset_bytes, run.len_bytes);
            refined.extend(found.into_iter().map(|run| match run.place {
                Place::Scratch(from) => Run { place: Place::Kept(from), ..run },
                _ => run,
            }));
        }
        refined
    }

    /// What was never written in the view, from the start of the range on.
    pub(super) fn extent_below(&self, offset_bytes: u64, len_bytes: u64) -> Extent {
        let shown = self.shown();
        match shown.volume.index().overlapping(offset_bytes, len_bytes).next() {
            Some(piece) if piece.offset_bytes <= offset_bytes => {
                let allocation = if piece.is_zeroes() { Allocation::Hole } else { Allocation::Data };
                Extent { len_bytes: len_bytes.min(piece.end_bytes() - offset_bytes), allocation }
            }
            next => {
                let end_bytes = next.map_or(offset_bytes + len_bytes, |piece| piece.offset_bytes);
                match shown.volume.first_bad(offset_bytes..end_bytes) {
                    // A hole would be read as zeroes, without the error that tells that something is lost.
                    Some(bad) if bad.offset_bytes <= offset_bytes => {
                        Extent { len_bytes: bad.len_bytes, allocation: Allocation::Data }
                    }
                    Some(bad) => self.recovery_disk_extent(offset_bytes, bad.offset_bytes - offset_bytes),
                    None => self.recovery_disk_extent(offset_bytes, end_bytes - offset_bytes),
                }
            }
        }
    }

    /// Holes of the recovery disk as the filesystem knows them; data where it doesn't say, and where what should be there is lost: who
    /// skipped a hole there would take it for zeroes.
    fn recovery_disk_extent(&self, offset_bytes: u64, len_bytes: u64) -> Extent {
        let data = |len_bytes| Extent { len_bytes, allocation: Allocation::Data };
        if !self.settings.look_for_holes {
            return data(len_bytes);
        }
        let len_bytes = match self.shown().volume.first_bad(offset_bytes..offset_bytes + len_bytes) {
            Some(bad) if bad.offset_bytes == offset_bytes => return data(bad.len_bytes),
            Some(bad) => bad.offset_bytes - offset_bytes,
            None => len_bytes,
        };
        let data = data(len_bytes);
        let fd = self.files[plan::RECOVERY_DISK_FILE.0 as usize].as_raw_fd();
        let seek = |whence| {
            // SAFETY: no memory is involved; nobody uses the descriptor's position.
            let place = unsafe { libc::lseek(fd, offset_bytes as libc::off_t, whence) };
            u64::try_from(place).ok()
        };
        let next_data = match seek(libc::SEEK_DATA) {
            Some(place) => place,
            None if Errno::last() == Errno::ENXIO => u64::MAX,
            None => return data,
        };
        if next_data > offset_bytes {
            // Promotion may have punched what was data at the view's moment: who skips it reads nothing that would tell.
            match self.history() {
                Some(History::Kept(_)) => {}
                Some(History::Gone) => {
                    self.set_gone();
                    return data;
                }
                None if !self.is_gone() => {}
                None | Some(History::Unknown) => return data,
            }
            return Extent {
                len_bytes: len_bytes.min(next_data - offset_bytes),
                allocation: Allocation::Hole,
            };
        }
        let until = seek(libc::SEEK_HOLE).filter(|place| *place > offset_bytes);
        Extent { len_bytes: until.map_or(len_bytes, |until| len_bytes.min(until - offset_bytes)), ..data }
    }
}
