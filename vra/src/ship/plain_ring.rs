use std::collections::VecDeque;

use journal::batch::Record;

use super::Retained;

/// The plainest [`Retained`]: a queue. For tests and simulations, which check with it what must not happen (a record freed and asked for
/// again).
#[derive(Clone, Debug)]
pub struct PlainRing {
    first_seq: u64,
    records: VecDeque<Record>,
}

impl PlainRing {
    /// An empty one whose first record will have number `first_seq`.
    pub fn new(first_seq: u64) -> Self {
        Self { first_seq, records: VecDeque::new() }
    }

    /// Publishes the next record.
    ///
    /// # Panics
    /// When its number is not the next one.
    pub fn publish(&mut self, record: Record) {
        assert_eq!(record.seq, self.published_through() + 1, "numbers have no gaps");
        self.records.push_back(record);
    }

    /// The highest number that was freed, or the one before the first.
    pub fn freed_through(&self) -> u64 {
        self.first_seq - 1
    }
}

impl Retained for PlainRing {
    fn take_ready(&mut self, from_seq: u64, max_bytes: usize, max_records: usize, out: &mut Vec<Record>) {
        assert!(from_seq >= self.first_seq, "record {from_seq} was freed");
        let mut taken_bytes = 0;
        for record in self.records.iter().skip((from_seq - self.first_seq) as usize).take(max_records) {
            if taken_bytes >= max_bytes {
                break;
            }
            taken_bytes += record.payload.len();
            out.push(record.clone());
        }
    }

    fn free_through(&mut self, seq: u64) {
        assert!(seq <= self.published_through(), "record {seq} was never published");
        while self.first_seq <= seq {
            self.records.pop_front();
            self.first_seq += 1;
        }
    }

    fn published_through(&self) -> u64 {
        self.first_seq + self.records.len() as u64 - 1
    }
}
