//! Memory for batches that have arrived and are not durable: bounded for each stream and for all together.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use journal::storage::AlignedBuf;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// All memory for received batches. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ReceiveMemory {
    total: Arc<Semaphore>,
    pool: Arc<Pool>,
}

/// One stream's share of it.
#[derive(Clone, Debug)]
pub struct StreamMemory {
    all: ReceiveMemory,
    own: Arc<Semaphore>,
}

/// Aligned memory that a batch is read into.
#[derive(Debug)]
pub struct BatchBuffer {
    memory: Option<AlignedBuf>,
    len_bytes: usize,
    pool: Arc<Pool>,
    // Given back after the memory, which is dropped by hand.
    _permits: [OwnedSemaphorePermit; 2],
}

/// Memory is counted in pages: a semaphore's count is 32 bits wide.
const PAGE_BYTES: usize = 4096;

/// Buffers come in powers of two from here on, so that they can be used again.
const SMALLEST_BUFFER_BYTES: usize = 16 << 10;

impl ReceiveMemory {
    /// `total_bytes` for all streams together, at least one longest batch.
    pub fn new(total_bytes: usize) -> Self {
        let total_bytes = total_bytes.max(journal::batch::MAX_BATCH_BYTES);
        let pool = Pool { kept: Mutex::default(), kept_max_bytes: total_bytes / 4 };
        Self { total: Arc::new(Semaphore::new(total_bytes / PAGE_BYTES)), pool: Arc::new(pool) }
    }

    /// A share of at most `window_bytes`, at least one longest batch.
    pub fn stream(&self, window_bytes: usize) -> StreamMemory {
        let window_bytes = window_bytes.max(journal::batch::MAX_BATCH_BYTES);
        StreamMemory { all: self.clone(), own: Arc::new(Semaphore::new(window_bytes / PAGE_BYTES)) }
    }
}

impl StreamMemory {
    /// Memory for a batch of `len_bytes`, at most [`journal::batch::MAX_BATCH_BYTES`], as soon as there is some. Its bytes are whatever its
    /// last user left.
    pub async fn take(&self, len_bytes: usize) -> BatchBuffer {
        let pages = len_bytes.div_ceil(PAGE_BYTES) as u32;
        // The own share first: a stream that has used it up must not take from the others while it waits.
        let own = self.own.clone().acquire_many_owned(pages).await;
        let all = self.all.total.clone().acquire_many_owned(pages).await;
        let permits = [own, all].map(|permit| permit.expect("these semaphores are never closed"));
        let pool = self.all.pool.clone();
        BatchBuffer { memory: Some(pool.take(len_bytes)), len_bytes, pool, _permits: permits }
    }
}

impl BatchBuffer {
    /// The bytes, to be filled.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let memory = self.memory.as_mut().expect("taken only when dropped");
        &mut memory[..self.len_bytes]
    }

    /// As a shared handle, without a copy. The memory comes back when the last part of it is dropped.
    pub fn into_bytes(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for BatchBuffer {
    fn as_ref(&self) -> &[u8] {
        let memory = self.memory.as_ref().expect("taken only when dropped");
        &memory[..self.len_bytes]
    }
}

impl Drop for BatchBuffer {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            self.pool.give_back(memory);
        }
    }
}

#[derive(Debug)]
struct Pool {
    kept: Mutex<Kept>,
    kept_max_bytes: usize,
}

#[derive(Debug, Default)]
struct Kept {
    by_len: BTreeMap<usize, Vec<AlignedBuf>>,
    bytes: usize,
}

impl Pool {
    fn take(&self, len_bytes: usize) -> AlignedBuf {
        let class = len_bytes.next_power_of_two().max(SMALLEST_BUFFER_BYTES);
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(memory) = kept.by_len.get_mut(&class).and_then(Vec::pop) {
            kept.bytes -= class;
            return memory;
        }
        drop(kept);
        AlignedBuf::zeroed(class)
    }

    fn give_back(&self, memory: AlignedBuf) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.bytes + memory.len() <= self.kept_max_bytes {
            kept.bytes += memory.len();
            kept.by_len.entry(memory.len()).or_default().push(memory);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_stream_waits_for_its_own_share_and_all_for_the_whole() {
        let memory = ReceiveMemory::new(12 << 20);
        let (first, second) = (memory.stream(8 << 20), memory.stream(8 << 20));
        let held = [first.take(4 << 20).await, first.take(4 << 20).await];
        let waits = |stream: StreamMemory| async move {
            tokio::time::timeout(Duration::from_millis(20), stream.take(4 << 20)).await.is_err()
        };
        assert!(waits(first.clone()).await, "its share is used up");
        let other = second.take(4 << 20).await;
        assert!(waits(second.clone()).await, "all is used up");
        let part = other.into_bytes().slice(100..200);
        assert!(waits(second.clone()).await, "a part keeps the whole");
        drop(part);
        drop(second.take(4 << 20).await);
        drop(held);
        drop(first.take(4 << 20).await);
    }

    #[tokio::test]
    async fn buffers_are_aligned_and_used_again() {
        let stream = ReceiveMemory::new(16 << 20).stream(16 << 20);
        let mut buffer = stream.take(1_100_000 / 4096 * 4096).await;
        assert_eq!(buffer.bytes_mut().len(), 1_097_728);
        let place = buffer.as_ref().as_ptr();
        assert!((place as usize).is_multiple_of(4096));
        drop(buffer);
        assert_eq!(stream.take(1 << 20 | 4096).await.as_ref().as_ptr(), place);
    }
}
