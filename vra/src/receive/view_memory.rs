//! The memory that open views have together.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How much memory the indexes of open views may take, and how much they do.
#[derive(Debug)]
pub(super) struct ViewMemory {
    limit_bytes: u64,
    used_bytes: Mutex<u64>,
}

/// A part of it, given back when dropped.
#[derive(Debug)]
pub(super) struct ViewMemoryShare {
    memory: Arc<ViewMemory>,
    bytes: u64,
}

/// There isn't as much.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("opening it takes {wanted_bytes} bytes of memory; views have {used_bytes} of {limit_bytes}")]
pub struct NoViewMemory {
    /// What was asked for, in bytes.
    pub wanted_bytes: u64,
    /// What views have, in bytes.
    pub used_bytes: u64,
    /// What they may have, in bytes.
    pub limit_bytes: u64,
}

impl ViewMemory {
    pub(super) fn new(limit_bytes: u64) -> Arc<Self> {
        Arc::new(Self { limit_bytes, used_bytes: Mutex::new(0) })
    }

    /// Takes some bytes for something new.
    pub(super) fn take(self: &Arc<Self>, wanted_bytes: u64) -> Result<ViewMemoryShare, NoViewMemory> {
        let mut used_bytes = self.lock();
        let (limit_bytes, sum_bytes) = (self.limit_bytes, used_bytes.saturating_add(wanted_bytes));
        if sum_bytes > limit_bytes {
            return Err(NoViewMemory { wanted_bytes, used_bytes: *used_bytes, limit_bytes });
        }
        *used_bytes = sum_bytes;
        Ok(ViewMemoryShare { memory: Arc::clone(self), bytes: wanted_bytes })
    }

    /// Takes them for what was open before a restart or is locked: it may be more than the limit then, and nothing new is opened.
    pub(super) fn take_anyway(self: &Arc<Self>, bytes: u64) -> ViewMemoryShare {
        let mut used_bytes = self.lock();
        *used_bytes = used_bytes.saturating_add(bytes);
        ViewMemoryShare { memory: Arc::clone(self), bytes }
    }

    fn lock(&self) -> MutexGuard<'_, u64> {
        self.used_bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ViewMemoryShare {
    /// Keeps so many bytes of it.
    pub(super) fn keep_only(&mut self, bytes: u64) {
        let surplus_bytes = self.bytes.saturating_sub(bytes);
        self.bytes -= surplus_bytes;
        let mut used_bytes = self.memory.lock();
        *used_bytes = used_bytes.saturating_sub(surplus_bytes);
    }
}

impl Drop for ViewMemoryShare {
    fn drop(&mut self) {
        self.keep_only(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_new_stays_within_the_limit_and_what_was_open_comes_anyway() {
        let memory = ViewMemory::new(100);
        let mut first = memory.take(60).expect("free");
        let error = memory.take(41).expect_err("too much");
        assert_eq!(error, NoViewMemory { wanted_bytes: 41, used_bytes: 60, limit_bytes: 100 });
        first.keep_only(20);
        let second = memory.take(80).expect("free");
        let former = memory.take_anyway(50);
        memory.take(1).expect_err("full");
        drop((second, former));
        memory.take(80).expect("free again");
        drop(first);
        memory.take(100).expect("all of it");
        memory.take(u64::MAX).expect_err("no overflow");
    }
}
