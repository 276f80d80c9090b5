//! The footers of many segments: some are read while those before them are decoded by another thread.

use super::survey::{Content, Segment, SegmentError};
use crate::format::{Footer, FooterError, Superblock, slot_offset_bytes};
use crate::storage::{AlignedBuf, Blocking, Op, Purpose, Storage, StorageError};

/// Lost footers that one opening writes again: a disk that has lost more has lost more than those, and the next opening goes on.
const MENDED_AT_ONCE: usize = 16;

/// Segments whose footers are read together.
const SEGMENTS_AT_ONCE: usize = 32;

/// A read that has ended, of a sealed segment.
type Read = Result<Option<AlignedBuf>, StorageError>;

/// What was decoded, and memory to read into again.
type Decoded = (Vec<Result<Footer, FooterError>>, Vec<AlignedBuf>);

/// Gives each segment's footer to `take`, in order, as [`Segment::footer`] does for one.
///
/// # Errors
/// The file failed, or neither a footer nor its batches can be believed.
pub fn each_footer<S: Storage>(
    segments: &[Segment],
    io: &mut Blocking<'_, S>,
    superblock: &Superblock,
    take: impl FnMut(Footer),
) -> Result<(), SegmentError> {
    each_footer_by(segments, io, superblock, take, |_, _| {})
}

/// The same for the journal's owner: a lost footer is written again if the batches give the very bytes that the trailer vouches for. A power
/// cut can take a footer and leave its trailer, since one sync covers both. Says how many were.
///
/// # Errors
/// As for [`each_footer`]; also if what was written can't be made durable.
pub fn each_footer_mended<S: Storage>(
    segments: &[Segment],
    io: &mut Blocking<'_, S>,
    superblock: &Superblock,
    take: impl FnMut(Footer),
) -> Result<usize, SegmentError> {
    let mut lost: Vec<Op> = Vec::new();
    let note = |segment: &Segment, footer: &Footer| {
        let Content::Sealed(trailer) = &segment.content else { return };
        let mut bytes = footer.encode();
        let is_the_same = bytes.len() as u64 == trailer.footer_len_bytes
            && crc32c::crc32c(&bytes) == trailer.footer_crc
            && footer.gaps.is_empty();
        if lost.len() < MENDED_AT_ONCE && is_the_same {
            segment.cipher.encrypt(trailer.data_end_bytes, &mut bytes);
            let mut page = AlignedBuf::zeroed(bytes.len());
            page.copy_from_slice(&bytes);
            let slot_offset = slot_offset_bytes(segment.header.slot, superblock.slot_len_bytes);
            let offset_bytes = slot_offset + trailer.data_end_bytes;
            lost.push(Op::Write { offset_bytes, pieces: vec![page.into_bytes()] });
        }
    };
    each_footer_by(segments, io, superblock, take, note)?;
    // A place that can't be written stays as it was: the batches tell the same.
    let written = io.purpose(Purpose::Seal).run_all(lost);
    let mended = written.iter().filter(|result| result.is_ok()).count();
    if mended > 0 {
        io.sync()?;
    }
    Ok(mended)
}

/// `restored` is given each sealed segment and the footer that its batches gave, where its own is lost.
fn each_footer_by<S: Storage>(
    segments: &[Segment],
    io: &mut Blocking<'_, S>,
    superblock: &Superblock,
    mut take: impl FnMut(Footer),
    mut restored: impl FnMut(&Segment, &Footer),
) -> Result<(), SegmentError> {
    let mut again = |segment: &Segment, io: &mut Blocking<'_, S>, decoded| match decoded {
        Ok(footer) => {
            take(footer);
            Ok(())
        }
        // The other way: an unsealed one, or one whose batches must tell.
        Err(_) => segment.footer(io, superblock).map(|footer| {
            restored(segment, &footer);
            take(footer);
        }),
    };
    let mut chunks = segments.chunks(SEGMENTS_AT_ONCE).peekable();
    std::thread::scope(|scope| {
        let (mut decoding, mut memory) = (None, Vec::new());
        loop {
            let chunk = chunks.next();
            let read = chunk.map(|chunk| (chunk, io.run_all(reads(chunk, superblock, &mut memory))));
            let former = match read {
                Some((chunk, read)) if chunks.peek().is_some() || decoding.is_some() => {
                    decoding.replace((chunk, scope.spawn(move || decode(chunk, read))))
                }
                Some((chunk, read)) => {
                    // The only ones: no thread is worth it.
                    let (decoded, _) = decode(chunk, read);
                    return chunk
                        .iter()
                        .zip(decoded)
                        .try_for_each(|(segment, decoded)| again(segment, io, decoded));
                }
                None => decoding.take(),
            };
            if let Some((chunk, thread)) = former {
                let (decoded, spare): Decoded = thread.join().expect("decoding doesn't panic");
                memory = spare;
                chunk.iter().zip(decoded).try_for_each(|(segment, decoded)| again(segment, io, decoded))?;
            }
            if chunk.is_none() && decoding.is_none() {
                return Ok(());
            }
        }
    })
}

/// A read for each sealed segment, into memory that is there already if some is long enough: fresh memory costs as much as the read.
fn reads(chunk: &[Segment], superblock: &Superblock, memory: &mut Vec<AlignedBuf>) -> Vec<Op> {
    let mut buffer = |len_bytes: usize| match memory.iter().rposition(|spare| spare.len() == len_bytes) {
        Some(found) => memory.swap_remove(found),
        None => AlignedBuf::zeroed(len_bytes),
    };
    let read = |segment: &Segment| match &segment.content {
        Content::Scanned(_) => None,
        Content::Sealed(trailer) => Some(Op::Read {
            offset_bytes: slot_offset_bytes(segment.header.slot, superblock.slot_len_bytes)
                + trailer.data_end_bytes,
            buffer: buffer(trailer.footer_len_bytes as usize),
        }),
    };
    chunk.iter().filter_map(read).collect()
}

/// One result for each segment: an error where the footer can't be had like this.
fn decode(chunk: &[Segment], reads: Vec<Read>) -> Decoded {
    let (mut reads, mut spare) = (reads.into_iter(), Vec::with_capacity(chunk.len()));
    let decode = |segment: &Segment| {
        let Content::Sealed(trailer) = &segment.content else { return Err(FooterError::Length) };
        let mut bytes = reads.next().and_then(Result::ok).flatten().ok_or(FooterError::Length)?;
        segment.cipher.decrypt(trailer.data_end_bytes, &mut bytes);
        let footer = Footer::decode(&bytes, trailer.footer_crc, trailer.data_end_bytes);
        spare.push(bytes);
        footer
    };
    let decoded = chunk.iter().map(decode).collect();
    (decoded, spare)
}
