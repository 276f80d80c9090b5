//! Walks the batches of an unsealed segment, as far as they can be believed.

use uuid::Uuid;

use crate::batch::{BatchError, BatchHeader, BatchView};
use crate::format::{ChainPoint, Footer, FooterBuilder, Gap, PAGE_BYTES, SegmentHeader, Superblock};
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
    /// Of the last batch.
    last_open_count: u64,
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
    let mut found = Scan::begin(header);
    found.go_on(parse, slot, header, ownership, trusted_through);
    found
}

/// What is known of a segment that takes no more batches before they are read.
#[derive(Clone, Copy, Debug)]
pub struct Sealed {
    /// The stream's place after it.
    pub last: ChainPoint,
    /// Where its batches end, in bytes from the slot's start.
    pub data_end_bytes: u64,
    /// How many volumes the VM has.
    pub volume_count: u16,
}

/// The same for a segment whose end is known: damaged payloads don't end the walk, for what they are of stands in their batches' heads.
/// Whoever reads a payload checks it; checkpoints whose payload is damaged are left out. Where heads can't be read the walk goes on behind
/// them: what is missed there is in [`Footer::gaps`], unless the chain proves that nothing is.
pub fn scan_heads(slot: &[u8], header: &SegmentHeader, ownership: Ownership, sealed: &Sealed) -> Scan {
    let mut found = Scan::begin(header);
    loop {
        found.go_on(BatchView::parse_damaged, slot, header, ownership, Some(sealed.last.seq));
        if !found.pass_over(slot, header, sealed) {
            return found;
        }
    }
}

impl Scan {
    fn begin(header: &SegmentHeader) -> Self {
        Self {
            end_bytes: PAGE_BYTES as u64,
            last: header.after,
            footer: FooterBuilder::new(header.after.seq),
            stop: ScanStop::End,
            last_open_count: 0,
        }
    }

    /// Takes batches as far as they follow one another.
    fn go_on<'a>(
        &mut self,
        parse: impl Fn(&'a [u8]) -> Result<(BatchView<'a>, Vec<BatchError>), BatchError>,
        slot: &'a [u8],
        header: &SegmentHeader,
        ownership: Ownership,
        trusted_through: Option<u64>,
    ) {
        // The last page of a slot is never a batch's.
        let data = &slot[..slot.len().saturating_sub(PAGE_BYTES)];
        self.stop = loop {
            let rest = data.get(self.end_bytes as usize..).unwrap_or_default();
            if rest.len() < BatchHeader::LEN {
                break ScanStop::End;
            }
            let (batch, damage) = match parse(rest) {
                Ok(parsed) => parsed,
                Err(BatchError::Magic) => break ScanStop::End,
                Err(error) => break ScanStop::Damaged(error),
            };
            let link = batch.link();
            let is_carried = self.end_bytes < header.carried_end_bytes;
            let open_count_fits = if is_carried {
                link.open_count <= header.open_count && link.open_count >= self.last_open_count
            } else {
                link.open_count == header.open_count
            };
            let same_place = batch.first_seq() == self.last.seq;
            let follows = if batch.is_local() { same_place } else { batch.first_seq() > self.last.seq };
            let chained =
                link.prev_batch_crc == self.last.batch_crc && open_count_fits && ownership.allows(&batch);
            let chained = chained || (planted(Bug::ChainNotChecked) && !same_place);
            if link.journal_id != header.journal_id || !follows || !chained {
                break ScanStop::Stale;
            }
            if trusted_through.is_some_and(|seq| batch.last_seq() > seq) {
                break ScanStop::Untrusted;
            }
            if !has_footer(&self.footer, &batch, slot) {
                break ScanStop::Stale;
            }
            self.footer.add_damaged(&batch, self.end_bytes, &damage);
            self.end_bytes += batch.len_bytes() as u64;
            self.last_open_count = link.open_count;
            if !batch.is_local() {
                self.last = ChainPoint { seq: batch.last_seq(), batch_crc: batch.crc() };
            }
        };
    }

    /// Notes what can't be read where the walk stopped. False if no batch of the segment follows behind it.
    fn pass_over(&mut self, slot: &[u8], header: &SegmentHeader, sealed: &Sealed) -> bool {
        let data_end = sealed.data_end_bytes.min(slot.len().saturating_sub(PAGE_BYTES) as u64);
        let first_seq = self.last.seq.saturating_add(1);
        let mut at_bytes = self.end_bytes;
        while let Some((offset_bytes, _)) = resume(slot, at_bytes, data_end, header, self.last.seq) {
            at_bytes = offset_bytes;
            let rest = &slot[offset_bytes as usize..data_end as usize];
            let Ok((batch, _)) = BatchView::parse_damaged(rest) else { continue };
            if batch.last_seq() > sealed.last.seq {
                continue;
            }
            // Two proofs, since a stretch that is passed over is never missed again: the numbers go on, and it names the last one's CRC.
            let is_next =
                batch.first_seq() == first_seq && batch.link().prev_batch_crc == self.last.batch_crc;
            let last_seq = match (is_next, batch.is_local()) {
                (true, false) => self.last.seq,
                // It stands behind the stream's record with its number.
                (_, true) => batch.first_seq(),
                (false, false) => batch.first_seq() - 1,
            };
            self.footer.add_gap(Gap { first_seq, last_seq }, sealed.volume_count);
            self.last = ChainPoint { seq: last_seq, batch_crc: batch.link().prev_batch_crc };
            self.end_bytes = offset_bytes;
            return true;
        }
        if self.end_bytes < data_end || self.last.seq < sealed.last.seq {
            let last_seq = sealed.last.seq.max(self.last.seq);
            self.footer.add_gap(Gap { first_seq, last_seq }, sealed.volume_count);
            if self.last.seq < last_seq {
                self.last = sealed.last;
            }
        }
        false
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
        // A local batch has the number of the stream's record before it.
        let is_behind = batch.first_seq() > last_seq || batch.is_local() && batch.first_seq() == last_seq;
        let belongs = link.journal_id == header.journal_id && opening_fits && is_behind;
        belongs.then(|| (offset_bytes, batch.first_seq()))
    })
}
