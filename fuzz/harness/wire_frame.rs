//! A frame of the data stream as a hostile peer gives it.

use vra::wire::{FRAME_HEADER_BYTES, Frame, frame_len_bytes};

pub fn run(data: &[u8]) {
    if let Some(header) = data.first_chunk::<FRAME_HEADER_BYTES>()
        && let Ok(len) = frame_len_bytes(header)
    {
        assert!(len >= FRAME_HEADER_BYTES);
        assert!(len <= 1 << 20, "a small header makes its reader wait for {len} bytes");
    }
    if let Ok(frame) = Frame::parse(data) {
        let bytes = frame.encode();
        let again = Frame::parse(&bytes).expect("what was written can be read");
        assert_eq!(again, frame, "a frame has one meaning");
    }
}
