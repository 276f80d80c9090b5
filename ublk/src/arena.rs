//! Resident memory for guest data, cut in slots, with typed ownership: a slot cannot be freed or written while
//! the kernel or a shipper still uses it.

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};

use nix::errno::Errno;

/// Alignment of every slot, in bytes: what O_DIRECT needs on any device.
pub const SLOT_ALIGN_BYTES: usize = 4096;

/// A fixed pool of equal slots in one memory mapping, faulted in at creation and never given back to the kernel while
/// it lives: the ublk driver retries for ever when a buffer is not resident.
///
/// Free slots form a stack of indices: lock-free, without allocation, safe to return to from any thread.
#[derive(Clone)]
pub struct Arena {
    inner: Arc<Inner>,
}

impl Arena {
    /// Maps and faults in `slot_count` slots of `slot_len_bytes` each.
    ///
    /// # Errors
    /// The kernel's errno when the memory cannot be mapped, or `EINVAL` when `slot_len_bytes` is not a positive multiple
    /// of [`SLOT_ALIGN_BYTES`] or the count is zero or above 2^31.
    pub fn new(slot_len_bytes: usize, slot_count: u32) -> Result<Self, Errno> {
        Self::map(slot_len_bytes, slot_count, libc::MAP_POPULATE)
    }

    /// The same with memory that is faulted in when it is first used: for tests that make many arenas and have no driver.
    ///
    /// # Errors
    /// As for [`Self::new`].
    pub fn faulted_in_later(slot_len_bytes: usize, slot_count: u32) -> Result<Self, Errno> {
        Self::map(slot_len_bytes, slot_count, 0)
    }

    fn map(slot_len_bytes: usize, slot_count: u32, flags: libc::c_int) -> Result<Self, Errno> {
        if slot_len_bytes == 0
            || !slot_len_bytes.is_multiple_of(SLOT_ALIGN_BYTES)
            || slot_count == 0
            || slot_count > 1 << 31
        {
            return Err(Errno::EINVAL);
        }
        let len_bytes = slot_len_bytes.checked_mul(slot_count as usize).ok_or(Errno::EINVAL)?;
        // SAFETY: an anonymous private mapping with no address wish touches no existing memory.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | flags,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        let base = NonNull::new(base.cast::<u8>()).ok_or(Errno::ENOMEM)?;
        let next = (0..slot_count)
            .map(|index| AtomicU32::new(if index + 1 == slot_count { EMPTY } else { index + 1 }))
            .collect();
        let holders = (0..slot_count).map(|_| AtomicU32::new(0)).collect();
        Ok(Self {
            inner: Arc::new(Inner {
                base,
                slot_len_bytes,
                head: AtomicU64::new(0),
                next,
                holders,
                free: AtomicUsize::new(slot_count as usize),
            }),
        })
    }

    /// Takes a free slot, or none. Its bytes are whatever its last user left.
    pub fn take(&self) -> Option<Slot> {
        let index = self.inner.pop()?;
        self.inner.holders[index as usize].store(1, Ordering::Relaxed);
        Some(Slot { arena: self.clone(), index })
    }

    /// Length of each slot, in bytes.
    pub fn slot_len_bytes(&self) -> usize {
        self.inner.slot_len_bytes
    }

    /// How many slots there are.
    pub fn slot_count(&self) -> usize {
        self.inner.next.len()
    }

    /// How many slots are free now: a snapshot, for watermarks and status.
    pub fn free_count(&self) -> usize {
        self.inner.free.load(Ordering::Relaxed)
    }

    /// The whole mapping, for registration with a ring.
    pub fn region(&self) -> (NonNull<u8>, usize) {
        (self.inner.base, self.inner.slot_len_bytes * self.inner.next.len())
    }

    /// Whether both handles name one arena.
    pub fn same(&self, other: &Arena) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }
}

impl std::fmt::Debug for Arena {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Arena")
            .field("slot_len_bytes", &self.slot_len_bytes())
            .field("slot_count", &self.slot_count())
            .field("free_count", &self.free_count())
            .finish()
    }
}

/// A slot with one owner, who may write it. Goes back to its arena when dropped.
pub struct Slot {
    arena: Arena,
    index: u32,
}

impl Slot {
    /// Gives up the right to write in exchange for the right to share.
    pub fn share(self) -> SlotRef {
        let slot = std::mem::ManuallyDrop::new(self);
        // SAFETY: `slot` is never dropped, so its arena handle moves out exactly once and the holder count stays 1.
        let arena = unsafe { std::ptr::read(&slot.arena) };
        SlotRef { arena, index: slot.index }
    }

    /// The slot's address, stable for as long as the slot is held.
    pub fn as_ptr(&self) -> *mut u8 {
        self.arena.inner.slot_ptr(self.index)
    }

    /// The arena it belongs to.
    pub fn arena(&self) -> &Arena {
        &self.arena
    }

    /// The slot's number in its arena.
    pub fn index(&self) -> u32 {
        self.index
    }
}

impl Deref for Slot {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the slot is inside the mapping, which lives as long as `arena`, and this is its only owner.
        unsafe { std::slice::from_raw_parts(self.as_ptr(), self.arena.inner.slot_len_bytes) }
    }
}

impl DerefMut for Slot {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `deref`, and `&mut self` excludes every other reference.
        unsafe { std::slice::from_raw_parts_mut(self.as_ptr(), self.arena.inner.slot_len_bytes) }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.arena.inner.release(self.index);
    }
}

impl std::fmt::Debug for Slot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Slot").field("index", &self.index).finish()
    }
}

/// A slot with several holders, read-only to all. Goes back to its arena when the last one drops it.
pub struct SlotRef {
    arena: Arena,
    index: u32,
}

impl SlotRef {
    /// The slot again as its only owner's, or this holder back when there are others.
    pub fn try_unshare(self) -> Result<Slot, SlotRef> {
        if self.arena.inner.holders[self.index as usize].load(Ordering::Acquire) != 1 {
            return Err(self);
        }
        let shared = std::mem::ManuallyDrop::new(self);
        // SAFETY: `shared` is never dropped, so its arena handle moves out exactly once; the count is 1 and only its
        // holder could raise it.
        let arena = unsafe { std::ptr::read(&shared.arena) };
        Ok(Slot { arena, index: shared.index })
    }

    /// The slot's address, stable for as long as any holder remains.
    pub fn as_ptr(&self) -> *const u8 {
        self.arena.inner.slot_ptr(self.index)
    }
}

impl Clone for SlotRef {
    fn clone(&self) -> Self {
        self.arena.inner.holders[self.index as usize].fetch_add(1, Ordering::Relaxed);
        Self { arena: self.arena.clone(), index: self.index }
    }
}

impl Drop for SlotRef {
    fn drop(&mut self) {
        self.arena.inner.release(self.index);
    }
}

impl Deref for SlotRef {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: inside the mapping, which lives as long as `arena`; shared slots are never written.
        unsafe { std::slice::from_raw_parts(self.as_ptr(), self.arena.inner.slot_len_bytes) }
    }
}

impl AsRef<[u8]> for SlotRef {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl std::fmt::Debug for SlotRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SlotRef").field("index", &self.index).finish()
    }
}

/// End mark of the free stack.
const EMPTY: u32 = u32::MAX;

struct Inner {
    base: NonNull<u8>,
    slot_len_bytes: usize,
    /// Top of the free stack: index in the low half, a change counter in the high half against ABA.
    head: AtomicU64,
    /// For a free slot, the one below it on the stack.
    next: Box<[AtomicU32]>,
    /// For a taken slot, how many hold it.
    holders: Box<[AtomicU32]>,
    free: AtomicUsize,
}

// SAFETY: the mapping is plain memory; who may touch which slot is decided by `Slot` and `SlotRef`, all else is atomic.
unsafe impl Send for Inner {}
// SAFETY: as for `Send`.
unsafe impl Sync for Inner {}

impl Inner {
    fn slot_ptr(&self, index: u32) -> *mut u8 {
        debug_assert!((index as usize) < self.next.len());
        // SAFETY: `index` is below the slot count, so the result stays inside the mapping.
        unsafe { self.base.as_ptr().add(index as usize * self.slot_len_bytes) }
    }

    fn pop(&self) -> Option<u32> {
        let mut head = self.head.load(Ordering::Acquire);
        loop {
            let index = head as u32;
            if index == EMPTY {
                return None;
            }
            let below = self.next[index as usize].load(Ordering::Relaxed);
            let new = (((head >> 32) + 1) << 32) | u64::from(below);
            match self.head.compare_exchange_weak(head, new, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => {
                    self.free.fetch_sub(1, Ordering::Relaxed);
                    return Some(index);
                }
                Err(now) => head = now,
            }
        }
    }

    fn release(&self, index: u32) {
        if self.holders[index as usize].fetch_sub(1, Ordering::Release) != 1 {
            return;
        }
        fence(Ordering::Acquire);
        let mut head = self.head.load(Ordering::Relaxed);
        loop {
            self.next[index as usize].store(head as u32, Ordering::Relaxed);
            let new = (((head >> 32) + 1) << 32) | u64::from(index);
            match self.head.compare_exchange_weak(head, new, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => {
                    self.free.fetch_add(1, Ordering::Relaxed);
                    return;
                }
                Err(now) => head = now,
            }
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `new` with this length, and no slot outlives its arena handle.
        let unmapped =
            unsafe { libc::munmap(self.base.as_ptr().cast(), self.slot_len_bytes * self.next.len()) };
        debug_assert_eq!(unmapped, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_slot_is_given_once_and_comes_back() {
        let arena = Arena::new(8192, 3).expect("arena");
        let taken: Vec<Slot> = std::iter::from_fn(|| arena.take()).collect();
        let mut indices: Vec<u32> = taken.iter().map(Slot::index).collect();
        indices.sort_unstable();
        assert_eq!(indices, [0, 1, 2]);
        assert_eq!(arena.free_count(), 0);
        drop(taken);
        assert_eq!(arena.free_count(), 3);
    }

    #[test]
    fn a_shared_slot_returns_with_its_last_holder() {
        let arena = Arena::new(4096, 1).expect("arena");
        let mut slot = arena.take().expect("free slot");
        slot[..4].copy_from_slice(b"data");
        let first = slot.share();
        let second = first.clone();
        let first = first.try_unshare().expect_err("two holders");
        drop(first);
        assert!(arena.take().is_none());
        assert_eq!(&second[..4], b"data");
        let slot = second.try_unshare().expect("one holder");
        drop(slot);
        assert!(arena.take().is_some());
    }

    #[test]
    fn threads_never_share_a_taken_slot() {
        let arena = Arena::new(4096, 8).expect("arena");
        std::thread::scope(|scope| {
            for thread in 0..4_u8 {
                let arena = arena.clone();
                scope.spawn(move || {
                    for _ in 0..20_000 {
                        if let Some(mut slot) = arena.take() {
                            slot[0] = thread;
                            std::hint::spin_loop();
                            assert_eq!(slot[0], thread);
                        }
                    }
                });
            }
        });
        assert_eq!(arena.free_count(), 8);
    }
}
