//! Walks the batches of an unsealed segment, as far as they can be believed.

use uuid::Uuid;

use crate::batch::{BatchError, BatchHeader, BatchView};
use crate::format::{ChainPoint, Footer, FooterBuilder, PAGE_BYTES, SegmentHeader, Superblock};
use crate::planted::{Bug, planted};

/// What a scan found.
#[derive(Clone, Debug)]
pub struct Scan {
    /// Where the believable batches end, in bytes from the slot's start.
    pub end_bytes: u64,
    /// The stream's place after them.
    pub last: ChainPoint,
    /// What they hold.
    pub footer: FooterBuilder,
    /// Why it ended.
    pub stop: ScanStop,
}

impl Scan {
    /// The footer that the segment would have if it were sealed here.
    pub fn footer(&self) -> Footer {
        self.footer.clone().finish()
    }

    /// Whether no batch was found.
    pub fn is_empty(&self) -> bool {
        self.end_bytes == PAGE_BYTES as u64
    }
}

/// Why a scan ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScanStop {
    /// Nothing, or nothing of this journal, follows.
    #[error("no further batch follows")]
    End,
    /// What follows is damaged or was never written to its end.
    #[error("the next batch is damaged")]
    Damaged(#[source] BatchError),
    /// A batch follows that belongs to an earlier time: the chain, the open count or the generation doesn't fit.
    #[error("the next batch belongs to an earlier time of the journal")]
    Stale,
    /// What follows was not to be trusted.
    #[error("the next batch is after the last successful sync")]
    Untrusted,
}

/// Which generation owns which numbers, from the superblock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ownership {
    /// The generation that owns the tail.
    pub tail_generation: Uuid,
    /// Its first number.
    pub first_seq: u64,
    /// The last number of all generations before it.
    pub fork_seq: u64,
}

impl Ownership {
    /// As a superblock says.
    pub fn of(superblock: &Superblock) -> Self {
        Self {
            tail_generation: superblock.tail_generation,
            first_seq: superblock.generation_first_seq,
            fork_seq: superblock.generation_fork_seq,
        }
    }

    fn allows(self, batch: &BatchView<'_>) -> bool {
        let is_tail = batch.link().generation == self.tail_generation;
        if batch.is_local() {
            return true;
        }
        if is_tail { batch.first_seq() >= self.first_seq } else { batch.last_seq() <= self.fork_seq }
    }
}

/// Scans a slot's bytes, which begin with its header. Nothing after `trusted_through`, if given, is believed.
pub fn scan(slot: &[u8], header: &SegmentHeader, ownership: Ownership, trusted_through: Option<u64>) -> Scan {
    let parse = |bytes| BatchView::parse(bytes).map(|batch| (batch, Vec::new()));
    scan_by(parse, slot, header, ownership, trusted_through)
}

/// The same for a segment that is known to end with record `last_seq`: damaged payloads don't end the walk, for what they are of stands in
/// their batches' heads. Whoever reads a payload checks it; checkpoints whose payload is damaged are left out.
pub fn scan_heads(slot: &[u8], header: &SegmentHeader, ownership: Ownership, last_seq: u64) -> Scan {
    scan_by(BatchView::parse_damaged, slot, header, ownership, Some(last_seq))
}

fn scan_by<'a>(
    parse: impl Fn(&'a [u8]) -> Result<(BatchView<'a>, Vec<BatchError>), BatchError>,
    slot: &'a [u8],
    header: &SegmentHeader,
    ownership: Ownership,
    trusted_through: Option<u64>,
) -> Scan {
    let mut found = Scan {
        end_bytes: PAGE_BYTES as u64,
        last: header.after,
        footer: FooterBuilder::new(header.after.seq),
        stop: ScanStop::End,
    };
    let mut last_open_count = 0;
    // The last page of a slot is never a batch's.
    let data = &slot[..slot.len().saturating_sub(PAGE_BYTES)];
    loop {
        let rest = data.get(found.end_bytes as usize..).unwrap_or_default();
        if rest.len() < BatchHeader::LEN {
            return found;
        }
        let (batch, damage) = match parse(rest) {
            Ok(parsed) => parsed,
            Err(BatchError::Magic) => return found,
            Err(error) => {
                found.stop = ScanStop::Damaged(error);
                return found;
            }
        };
        let link = batch.link();
        let is_carried = found.end_bytes < header.carried_end_bytes;
        let open_count_fits = if is_carried {
            link.open_count <= header.open_count && link.open_count >= last_open_count
        } else {
            link.open_count == header.open_count
        };
        let same_place = batch.first_seq() == found.last.seq;
        let follows = if batch.is_local() { same_place } else { batch.first_seq() > found.last.seq };
        let chained =
            link.prev_batch_crc == found.last.batch_crc && open_count_fits && ownership.allows(&batch);
        let chained = chained || (planted(Bug::ChainNotChecked) && !same_place);
        if link.journal_id != header.journal_id || !follows || !chained {
            found.stop = ScanStop::Stale;
            return found;
        }
        if trusted_through.is_some_and(|seq| batch.last_seq() > seq) {
            found.stop = ScanStop::Untrusted;
            return found;
        }
        if !has_footer(&found.footer, &batch, slot) {
            found.stop = ScanStop::Stale;
            return found;
        }
        found.footer.add_damaged(&batch, found.end_bytes, &damage);
        found.end_bytes += batch.len_bytes() as u64;
        last_open_count = link.open_count;
        if !batch.is_local() {
            found.last = ChainPoint { seq: batch.last_seq(), batch_crc: batch.crc() };
        }
    }
}

/// Whether a segment that has its batches in these bytes of a slot can have the footer that this one would give it: nobody wrote a batch for
/// which it can't, and to build it anyway could take any amount of memory.
pub(crate) fn has_footer(footer: &FooterBuilder, batch: &BatchView<'_>, slot: &[u8]) -> bool {
    // What a record adds to a footer is hardly longer than the record, but for zeroes of many TiB.
    footer.len_bytes_with(batch).is_some_and(|len_bytes| len_bytes <= 2 * slot.len() as u64)
}

/// The first place behind an unreadable batch where a batch of the same segment and opening begins, in bytes from the slot's start,
/// and that batch's first number: a sign that more was written than a scan could read. `at_bytes` is where the scan stopped.
pub fn resume(
    slot: &[u8],
    at_bytes: u64,
    end_bytes: u64,
    header: &SegmentHeader,
    last_seq: u64,
) -> Option<(u64, u64)> {
    let page = PAGE_BYTES as u64;
    (at_bytes + page..end_bytes).step_by(PAGE_BYTES).find_map(|offset_bytes| {
        let rest = slot.get(offset_bytes as usize..end_bytes as usize)?;
        let (batch, _) = BatchView::parse_damaged(rest).ok()?;
        let link = batch.link();
        // What an earlier opening left behind in the slot doesn't count.
        let is_carried = offset_bytes < header.carried_end_bytes;
        let opening_fits =
            link.open_count == header.open_count || is_carried && link.open_count < header.open_count;
        let belongs = link.journal_id == header.journal_id && opening_fits && batch.first_seq() > last_seq;
        belongs.then(|| (offset_bytes, batch.first_seq()))
    })
}
