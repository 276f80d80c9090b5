//! A manifest slot as a damaged disk gives it, and one that holds any text.

use journal::format::manifest::Manifest;
use uuid::Uuid;

pub fn run(data: &[u8]) {
    if let Ok((manifest, crc)) = Manifest::decode(data) {
        let (bytes, encoded_crc) = manifest.encode().expect("it was in a slot");
        assert_eq!(Manifest::decode(&bytes), Ok((manifest, encoded_crc)));
        assert_eq!(crc, encoded_crc);
    }
    let text = String::from_utf8_lossy(data).into_owned();
    let manifest = Manifest { journal_id: Uuid::from_u128(7), sequence: data.len() as u64, text };
    if let Ok((bytes, crc)) = manifest.encode() {
        assert_eq!(Manifest::decode(&bytes), Ok((manifest, crc)), "what was written can be read");
    }
}
