//! A list of bad ranges as a damaged disk gives it.

use journal::format::bad_list::BadList;

pub fn run(data: &[u8]) {
    let Ok((list, _)) = BadList::decode(data) else { return };
    let (bytes, crc) = list.encode().expect("no more than were read");
    assert_eq!(BadList::decode(&bytes), Ok((list.clone(), crc)), "what was read can be written and read");
    for bad in list.ranges.iter() {
        let found = list.ranges.first_in(bad.volume, bad.offset_bytes..bad.offset_bytes + bad.len_bytes);
        assert_eq!(found, Some(bad), "each is found");
    }
}
