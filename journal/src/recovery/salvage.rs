//! Reading over what the disk can't give back.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::format::PAGE_BYTES;
use crate::storage::{AlignedBuf, Blocking, Op, Storage, StorageError};

/// Reads a file. Pages that the disk can't give back count as zeroes and are remembered, or they end the reading.
#[derive(Clone, Debug, Default)]
pub struct Salvage {
    skip_unreadable: bool,
    unreadable: BTreeMap<u64, StorageError>,
}

/// How often a page is read again that the disk couldn't give back.
const READ_AGAIN: usize = 2;

/// Pages that are read together.
const PAGES_AT_ONCE: usize = 256;

impl Salvage {
    /// `skip_unreadable`: for tools that save what can be saved.
    pub fn new(skip_unreadable: bool) -> Self {
        Self { skip_unreadable, unreadable: BTreeMap::new() }
    }

    /// The pages that the disk couldn't give back, in bytes from the file's start.
    pub fn into_unreadable(self) -> Vec<u64> {
        self.unreadable.into_keys().collect()
    }

    /// Why the first page within a range couldn't be read.
    pub(super) fn first_error_in(&self, range: Range<u64>) -> Option<StorageError> {
        self.unreadable.range(range).next().map(|(_, error)| *error)
    }

    /// What another reading of the file met counts here too.
    pub(super) fn take(&mut self, other: Self) {
        self.unreadable.extend(other.unreadable);
    }

    /// Reads a range of whole pages.
    ///
    /// # Errors
    /// The read's.
    pub fn read<S: Storage>(
        &mut self,
        io: &mut Blocking<'_, S>,
        offset_bytes: u64,
        len_bytes: usize,
    ) -> Result<AlignedBuf, StorageError> {
        match io.read(offset_bytes, len_bytes) {
            Err(error) if self.skips(&error) => self.read_pages(io, offset_bytes, len_bytes),
            read => read,
        }
    }

    fn read_pages<S: Storage>(
        &mut self,
        io: &mut Blocking<'_, S>,
        offset_bytes: u64,
        len_bytes: usize,
    ) -> Result<AlignedBuf, StorageError> {
        let mut bytes = AlignedBuf::zeroed(len_bytes);
        let places: Vec<usize> = (0..len_bytes).step_by(PAGE_BYTES).collect();
        for chunk in places.chunks(PAGES_AT_ONCE) {
            let read = |at: &usize| Op::Read {
                offset_bytes: offset_bytes + *at as u64,
                buffer: AlignedBuf::zeroed(PAGE_BYTES.min(len_bytes - at)),
            };
            for (at, page) in chunk.iter().zip(io.run_all(chunk.iter().map(read).collect())) {
                if let Some(page) = self.page(offset_bytes + *at as u64, page)? {
                    bytes[*at..*at + page.len()].copy_from_slice(&page);
                }
            }
        }
        Ok(bytes)
    }

    /// A page that was read at a place of the file; nothing where the disk can't give it back and that is to be passed over.
    pub(super) fn page(
        &mut self,
        offset_bytes: u64,
        page: Result<Option<AlignedBuf>, StorageError>,
    ) -> Result<Option<AlignedBuf>, StorageError> {
        match page {
            Err(error) if self.skips(&error) => {
                self.unreadable.insert(offset_bytes, error);
                Ok(None)
            }
            page => page,
        }
    }

    /// The same, after it was read again if need be: what fails for a moment must not count as lost.
    pub(super) fn page_again<S: Storage>(
        &mut self,
        io: &mut Blocking<'_, S>,
        offset_bytes: u64,
        mut page: Result<Option<AlignedBuf>, StorageError>,
    ) -> Result<Option<AlignedBuf>, StorageError> {
        for _ in 0..READ_AGAIN {
            match page {
                Err(error) if self.skips(&error) => page = io.read(offset_bytes, PAGE_BYTES).map(Some),
                _ => break,
            }
        }
        self.page(offset_bytes, page)
    }

    fn skips(&self, error: &StorageError) -> bool {
        self.skip_unreadable && error.is_medium()
    }
}
