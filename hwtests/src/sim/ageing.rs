//! Whether history is promoted no earlier than it may be (C6).

use std::collections::VecDeque;

use vra::receive::ReceiverEvent;

/// What a target's process has received, and when by a clock that doesn't jump.
#[derive(Debug, Default)]
pub(super) struct Ageing {
    /// Last number and time in microseconds of each batch, in the order of the numbers; of batches that came again the first time.
    arrivals: VecDeque<(u64, u64)>,
    /// History is given up for lack of room.
    shortened: bool,
    /// An earlier process announced a promotion through here: when that was due, only that one knew.
    inherited_seq: u64,
}

impl Ageing {
    pub(super) fn new(inherited_seq: u64) -> Self {
        Self { inherited_seq, ..Self::default() }
    }

    pub(super) fn received(&mut self, last_seq: u64, mono_us: u64) {
        if self.arrivals.back().is_none_or(|(seq, _)| *seq < last_seq) {
            self.arrivals.push_back((last_seq, mono_us));
        }
    }

    pub(super) fn told(
        &mut self,
        event: &ReceiverEvent,
        history_us: u64,
        mono_us: u64,
    ) -> Result<(), String> {
        match event {
            ReceiverEvent::HistoryShortened { .. } => self.shortened = true,
            ReceiverEvent::HistoryFits => self.shortened = false,
            ReceiverEvent::Promoted { through_seq, .. } => {
                let newest = self.arrivals.iter().rev().find(|(seq, _)| seq <= through_seq).copied();
                self.arrivals.retain(|(seq, _)| seq > through_seq);
                let Some((seq, came_us)) = newest else { return Ok(()) };
                let age_us = mono_us - came_us;
                if age_us < history_us && !self.shortened && *through_seq > self.inherited_seq {
                    return Err(format!(
                        "record {seq} was promoted {age_us} us after it came, with a history of {history_us} us and room left"
                    ));
                }
            }
            _ => {}
        }
        Ok(())
    }
}
