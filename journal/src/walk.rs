//! Walks a segment's bytes batch by batch, over damage if need be, and says all that is wrong: for tools and the scrub. No I/O.

use crate::batch::{BatchError, BatchView, RecordKind};
use crate::format::{ChainPoint, Footer, FooterBuilder, PAGE_BYTES, SegmentHeader, SegmentTrailer};
use crate::scan::{has_footer, resume};

/// Something that cannot be read any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The record, where one is to blame; of a stretch the first.
    pub seq: Option<u64>,
    /// Where the record wrote what is damaged, if that is known.
    pub place: Option<DiskPlace>,
    /// Place in the slot, in bytes.
    pub slot_offset_bytes: u64,
    /// What is wrong.
    pub what: String,
}

impl Finding {
    /// A page that the disk can't give back.
    pub fn unreadable(slot_offset_bytes: u64) -> Self {
        let what = format!("the disk cannot give {PAGE_BYTES} bytes back");
        Self { seq: None, place: None, slot_offset_bytes, what }
    }
}

/// A part of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskPlace {
    /// The disk's number.
    pub volume: u16,
    /// Where on it, in bytes.
    pub offset_bytes: u64,
    /// How much, in bytes.
    pub len_bytes: u64,
}

/// What a segment holds.
#[derive(Debug, Default)]
pub struct Walked {
    /// Batches that could be read.
    pub batches: u64,
    /// Records in them.
    pub records: u64,
    /// Bytes of payload in them.
    pub payload_bytes: u64,
    /// The stream's place after it.
    pub last: ChainPoint,
    /// What is wrong, in the order of the bytes.
    pub findings: Vec<Finding>,
    /// Set if an unsealed segment ends in something that was never written to its end.
    pub torn_tail: Option<String>,
    /// Where the walk ended, in bytes from the slot's start.
    pub end_bytes: u64,
}

/// Is told of a batch, of what is wrong with its payloads, and of its place in the slot, in bytes.
type OnBatch<'a, E> = &'a mut dyn FnMut(&BatchView<'_>, &[BatchError], u64) -> Result<(), E>;

/// Walks a segment. `slot` is all of its slot.
///
/// # Errors
/// Those of `on_batch`.
pub fn walk<E>(
    slot: &[u8],
    header: &SegmentHeader,
    trailer: Option<&SegmentTrailer>,
    on_batch: OnBatch<'_, E>,
) -> Result<Walked, E> {
    let data_end = trailer.map_or(slot.len() - PAGE_BYTES, |trailer| {
        (trailer.data_end_bytes as usize).min(slot.len() - PAGE_BYTES)
    });
    let mut walked = Walked { last: header.after, ..Walked::default() };
    let mut footer = FooterBuilder::new(header.after.seq);
    let mut at = PAGE_BYTES;
    // After a gap the chain starts anew.
    let mut after_gap = false;
    while at < data_end {
        let rest = &slot[at..data_end];
        let parsed = BatchView::parse_damaged(rest).map_err(Wrong::Batch);
        let fits = parsed.and_then(|(batch, damage)| match misfit(&batch, header, walked.last, after_gap) {
            None if !has_footer(&footer, &batch, slot) => {
                Err(Wrong::Misfit("a batch for which no footer has room"))
            }
            None => Ok((batch, damage)),
            Some(what) => Err(Wrong::Misfit(what)),
        });
        let (batch, damage) = match fits {
            Ok(fits) => fits,
            Err(wrong) => {
                let next = resume(slot, at as u64, data_end as u64, header, walked.last.seq);
                if next.is_none() && trailer.is_none() {
                    if !matches!(wrong, Wrong::Batch(BatchError::Magic) | Wrong::Misfit(_)) {
                        walked.torn_tail = Some(wrong.to_string());
                    }
                    break;
                }
                let first = walked.last.seq + 1;
                let until = match next {
                    Some((_, seq)) => seq.saturating_sub(1),
                    None => trailer.map_or(first, |trailer| trailer.last.seq),
                };
                walked.findings.push(Finding {
                    seq: Some(first),
                    place: None,
                    slot_offset_bytes: at as u64,
                    what: format!("records {first} to {until} cannot be read: {wrong}"),
                });
                after_gap = true;
                let Some((offset, _)) = next else { break };
                at = offset as usize;
                continue;
            }
        };
        if let Some(error) = damage.first()
            && trailer.is_none()
            && resume(slot, at as u64, data_end as u64, header, batch.last_seq()).is_none()
        {
            walked.torn_tail = Some(error.to_string());
            break;
        }
        if damage.is_empty() {
            footer.add(&batch, at as u64);
        }
        on_batch(&batch, &damage, at as u64)?;
        walked.note(&batch, &damage, at as u64);
        at += batch.len_bytes();
        after_gap = false;
        if !batch.is_local() {
            walked.last = ChainPoint { seq: batch.last_seq(), batch_crc: batch.crc() };
        }
    }
    walked.end_bytes = at as u64;
    if let Some(trailer) = trailer {
        walked.check_footer(slot, trailer, footer);
    }
    Ok(walked)
}

enum Wrong {
    Batch(BatchError),
    Misfit(&'static str),
}

impl std::fmt::Display for Wrong {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Batch(error) => error.fmt(f),
            Self::Misfit(what) => f.write_str(what),
        }
    }
}

impl Walked {
    fn note(&mut self, batch: &BatchView<'_>, damage: &[BatchError], batch_offset_bytes: u64) {
        self.batches += 1;
        self.records += batch.record_count() as u64;
        self.payload_bytes += batch.records().map(|record| record.payload().len() as u64).sum::<u64>();
        for error in damage {
            let BatchError::PayloadCrc { seq, unit } = *error else { continue };
            let Some(record) = batch.records().find(|record| record.seq() == seq) else { continue };
            let in_batch = record.payload_offset_bytes() + unit * crate::batch::CRC_UNIT_BYTES;
            let (place, what) = match record.kind() {
                RecordKind::Write | RecordKind::SyncData => {
                    let unit_bytes = crate::batch::CRC_UNIT_BYTES as u64;
                    let from = record.offset_bytes() + unit as u64 * unit_bytes;
                    let end = record.offset_bytes() + record.len_bytes();
                    let len_bytes = unit_bytes.min(end.saturating_sub(from));
                    let place = DiskPlace { volume: record.volume(), offset_bytes: from, len_bytes };
                    let what =
                        format!("record {seq}: checksum of disk {} at {from} is wrong", record.volume());
                    (Some(place), what)
                }
                kind => (None, format!("record {seq}: checksum of its {kind:?} is wrong")),
            };
            let slot_offset_bytes = batch_offset_bytes + in_batch as u64;
            self.findings.push(Finding { seq: Some(seq), place, slot_offset_bytes, what });
        }
    }

    fn check_footer(&mut self, slot: &[u8], trailer: &SegmentTrailer, footer: FooterBuilder) {
        let from = trailer.data_end_bytes as usize;
        let bytes = slot.get(from..from + trailer.footer_len_bytes as usize).unwrap_or_default();
        let what = match Footer::decode(bytes, trailer.footer_crc, trailer.data_end_bytes) {
            Err(error) => format!("footer: {error}"),
            Ok(found) if self.findings.is_empty() && found != footer.finish() => {
                "footer: it does not say what the batches hold".to_owned()
            }
            Ok(_) if self.findings.is_empty() && self.last != trailer.last => {
                format!(
                    "trailer: it ends with record {}, the batches with {}",
                    trailer.last.seq, self.last.seq
                )
            }
            Ok(_) => return,
        };
        let slot_offset_bytes = trailer.data_end_bytes;
        self.findings.push(Finding { seq: None, place: None, slot_offset_bytes, what });
    }
}

/// Why a whole batch doesn't belong where it stands.
fn misfit(
    batch: &BatchView<'_>,
    header: &SegmentHeader,
    last: ChainPoint,
    after_gap: bool,
) -> Option<&'static str> {
    let link = batch.link();
    let follows = if batch.is_local() { batch.first_seq() >= last.seq } else { batch.first_seq() > last.seq };
    if link.journal_id != header.journal_id {
        Some("a batch of another journal")
    } else if !follows || link.open_count > header.open_count {
        Some("a batch of an earlier time")
    } else if !after_gap && link.prev_batch_crc != last.batch_crc {
        Some("a batch that does not follow the one before it")
    } else {
        None
    }
}
