//! What of a map the file knows: pages in two copies, of which the older is written over.

use std::sync::atomic::{AtomicU64, Ordering};

use uuid::Uuid;

use super::format::{PAGE_WORDS, Shape, encode_page};

/// Pages of a map. Those that changed are written together, after what they point to is durable.
#[derive(Debug)]
pub(in crate::view) struct Pages {
    file_id: Uuid,
    /// The words as the file has them, or as they are being written.
    settled: Vec<u64>,
    /// Of each page the copy that counts.
    copies: Vec<u8>,
    marks: Vec<u8>,
    dirty: Vec<u32>,
    writing: Vec<u32>,
    /// The next commit brings other copies that lag up to date.
    catches_up: bool,
    sequence: u64,
}

/// What a file has of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PageVersion {
    /// The commit that wrote the copy that counts; 0 if none did.
    pub(super) sequence: u64,
    /// Which copy that is.
    pub(super) copy: u8,
    /// The other one is not as new, or damaged.
    pub(super) is_alone: bool,
}

impl PageVersion {
    /// Of a page that was never written.
    pub(super) const NEVER: Self = Self { sequence: 0, copy: 0, is_alone: false };
}

/// The page has changed since it was last settled.
const DIRTY: u8 = 1;
/// The page is being written.
const WRITING: u8 = 2;
/// Its other copy says less than the one that counts.
const LAGGING: u8 = 4;

impl Pages {
    /// Pages with the words that a file has.
    pub(super) fn new(file_id: Uuid, settled: Vec<u64>, versions: &[PageVersion]) -> Self {
        let count = versions.len();
        debug_assert_eq!(settled.len(), count * PAGE_WORDS);
        Self {
            file_id,
            settled,
            copies: versions.iter().map(|version| version.copy).collect(),
            marks: versions.iter().map(|version| if version.is_alone { LAGGING } else { 0 }).collect(),
            dirty: Vec::with_capacity(count),
            writing: Vec::with_capacity(count),
            catches_up: false,
            sequence: versions.iter().map(|version| version.sequence).max().unwrap_or(0),
        }
    }

    /// A word has changed.
    pub(super) fn touch(&mut self, word: usize) {
        let page = word / PAGE_WORDS;
        if self.marks[page] & DIRTY == 0 {
            self.marks[page] |= DIRTY;
            self.dirty.push(page as u32);
        }
    }

    /// Marks all pages in which `words` differ from what the file has.
    pub(super) fn compare(&mut self, words: &[AtomicU64]) {
        for (index, word) in words.iter().enumerate() {
            if word.load(Ordering::Relaxed) != self.settled[index] {
                self.touch(index);
            }
        }
    }

    /// The words as the file has them or will have them next.
    pub(super) fn settled(&self) -> &[u64] {
        &self.settled
    }

    /// Whether what [`Pages::settled`] says of a word is in the file already.
    pub(super) fn is_written(&self, word: usize) -> bool {
        self.marks[word / PAGE_WORDS] & WRITING == 0
    }

    /// All changes up to now are to be written next.
    pub(super) fn begin(&mut self, words: &[AtomicU64]) {
        debug_assert!(self.writing.is_empty(), "one at a time");
        self.sequence += 1;
        for page in self.dirty.drain(..) {
            self.marks[page as usize] &= !DIRTY;
            let first = page as usize * PAGE_WORDS;
            let (settled, words) =
                (&mut self.settled[first..first + PAGE_WORDS], &words[first..first + PAGE_WORDS]);
            let mut is_changed = false;
            for (settled, word) in settled.iter_mut().zip(words) {
                let word = word.load(Ordering::Relaxed);
                is_changed |= *settled != word;
                *settled = word;
            }
            if is_changed {
                self.marks[page as usize] |= WRITING | LAGGING;
                self.writing.push(page);
            }
        }
        if std::mem::take(&mut self.catches_up) {
            for (page, marks) in (0..).zip(&mut self.marks) {
                // One that is written now has changed: its other copy is the next to lag.
                if *marks & (LAGGING | WRITING) == LAGGING {
                    *marks = (*marks & !LAGGING) | WRITING;
                    self.writing.push(page);
                }
            }
        }
        // Neighbours in the file one after the other.
        self.writing.sort_unstable();
    }

    /// The next commit writes the other copies of what former ones have written, too: from then on a single copy that goes bad takes nothing
    /// with it.
    pub(super) fn catch_up(&mut self) {
        self.catches_up = true;
    }

    /// How many pages are to be written.
    pub(in crate::view) fn writing_count(&self) -> u32 {
        self.writing.len() as u32
    }

    /// One of the pages that are to be written, put into `into`; its place in the file, in bytes.
    pub(in crate::view) fn encode(&self, index: u32, into: &mut [u8]) -> u64 {
        let page = self.writing[index as usize];
        let first = page as usize * PAGE_WORDS;
        let words = &self.settled[first..first + PAGE_WORDS];
        encode_page(into, self.file_id, page, self.sequence, words);
        Shape::page_offset_bytes(page, self.copies[page as usize] ^ 1)
    }

    /// They are durable.
    pub(super) fn end(&mut self) {
        for page in self.writing.drain(..) {
            self.marks[page as usize] &= !WRITING;
            self.copies[page as usize] ^= 1;
        }
    }
}
