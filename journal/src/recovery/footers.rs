//! The footers of many segments: some are read while those before them are decoded by another thread.

use super::survey::{Content, Segment, SegmentError};
use crate::format::{Footer, FooterError, Superblock, slot_offset_bytes};
use crate::storage::{AlignedBuf, Blocking, Op, Storage, StorageError};

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
    mut take: impl FnMut(Footer),
) -> Result<(), SegmentError> {
    let mut again = |segment: &Segment, io: &mut Blocking<'_, S>, decoded| match decoded {
        Ok(footer) => {
            take(footer);
            Ok(())
        }
        // The other way: an unsealed one, or one whose batches must tell.
        Err(_) => segment.footer(io, superblock).map(&mut take),
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
