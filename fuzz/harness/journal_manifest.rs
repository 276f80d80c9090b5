//! A manifest slot as a damaged disk gives it, and one that holds any text.

use journal::format::manifest::Manifest;
use uuid::Uuid;

pub fn run(data: &[u8]) {
    // What was reserved is written as zeroes: the checksum may be another one.
    if let Ok((manifest, _)) = Manifest::decode(data) {
        let (bytes, crc) = manifest.encode().expect("it was in a slot");
        assert_eq!(Manifest::decode(&bytes), Ok((manifest, crc)));
    }
    let text = String::from_utf8_lossy(data).into_owned();
    let manifest = Manifest { journal_id: Uuid::from_u128(7), sequence: data.len() as u64, text };
    if let Ok((bytes, crc)) = manifest.encode() {
        assert_eq!(Manifest::decode(&bytes), Ok((manifest, crc)), "what was written can be read");
    }
}
