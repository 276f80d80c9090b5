use journal::batch::Record;

/// What the sender needs of the place where captured writes wait.
///
/// Numbers begin at the generation's first and have no gaps. A published record stays until it is freed, so that it can be sent
/// again after a reconnect.
pub trait Retained {
    /// Appends handles of published records to `out`, from number `from_seq` on, in order and without gaps, until none is published
    /// or their payloads have reached `max_bytes` together. The first one is always given, whatever its length; at most `max_records`.
    fn take_ready(&mut self, from_seq: u64, max_bytes: usize, max_records: usize, out: &mut Vec<Record>);

    /// Forgets all records up to `seq`.
    fn free_through(&mut self, seq: u64);

    /// The highest number below which all are published; the one before the generation's first while there is none.
    fn published_through(&self) -> u64;
}
