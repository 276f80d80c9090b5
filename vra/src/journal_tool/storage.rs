//! What the files are read through. Tests make places of them unreadable.

#[cfg(not(test))]
pub(super) use journal::storage::ring::RingStorage as ToolStorage;

#[cfg(test)]
pub(super) use broken::{ToolStorage, break_disk};

#[cfg(test)]
mod broken {
    use std::cell::RefCell;
    use std::io;

    use journal::storage::ring::{DirectFile, RingStorage};
    use journal::storage::{Completion, FileId, Op, Purpose, Storage, StorageError};
    use nix::errno::Errno;

    /// Where, and how much, in bytes.
    type Place = (u64, u64);

    thread_local! {
        /// Of the journal's file, and of recovery disks.
        static UNREADABLE: RefCell<[Vec<Place>; 2]> = const { RefCell::new([Vec::new(), Vec::new()]) };
    }

    /// From now on these places can't be read by this thread: of the journal's file, and of recovery disks.
    pub(in crate::journal_tool) fn break_disk(journal: &[Place], recovery_disks: &[Place]) {
        UNREADABLE.set([journal.to_vec(), recovery_disks.to_vec()]);
    }

    /// The real storage, but for what [`break_disk`] broke.
    pub(in crate::journal_tool) struct ToolStorage {
        real: RingStorage,
        failed: Vec<Completion>,
    }

    impl ToolStorage {
        pub(in crate::journal_tool) fn new(depth: u32) -> io::Result<Self> {
            Ok(Self { real: RingStorage::new(depth)?, failed: Vec::new() })
        }

        pub(in crate::journal_tool) fn add_file(&mut self, file: DirectFile) -> FileId {
            self.real.add_file(file)
        }
    }

    impl Storage for ToolStorage {
        fn submit(&mut self, file: FileId, token: u64, purpose: Purpose, op: Op) {
            let range = op.offset_bytes()..op.offset_bytes() + op.len_bytes();
            let kind = usize::from(purpose == Purpose::RecoveryDisk);
            let is_broken = UNREADABLE.with_borrow(|unreadable| {
                unreadable[kind].iter().any(|(start, len)| *start < range.end && range.start < start + len)
            });
            if !is_broken {
                return self.real.submit(file, token, purpose, op);
            }
            let error = StorageError { verb: "read", purpose, offset_bytes: range.start, errno: Errno::EIO };
            self.failed.push(Completion { token, result: Err(error) });
        }

        fn collect(&mut self, wait: bool, done: &mut Vec<Completion>) -> Result<(), Errno> {
            let wait = wait && self.failed.is_empty();
            done.append(&mut self.failed);
            self.real.collect(wait, done)
        }

        fn file_len_bytes(&mut self, file: FileId) -> Result<u64, Errno> {
            self.real.file_len_bytes(file)
        }
    }
}
