//! What the inside of a machine tells the outside, and what the outside tells the reader.

use std::time::Duration;

use super::Verdict;

const EVENT_MARK: &str = "@rig@ ";

/// A line of the job's output that is meant for the runner.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) enum Event {
    /// A case starts; what follows is its log.
    Begin {
        /// Its name.
        case: String,
    },
    /// It ended.
    End {
        /// Its name.
        case: String,
        /// How.
        verdict: Verdict,
        /// How long it took.
        took_ms: u64,
    },
}

impl Event {
    pub(super) fn print(&self) {
        let json = serde_json::to_string(self).expect("an event is plain data");
        println!("\n{EVENT_MARK}{json}");
    }

    pub(super) fn parse(line: &str) -> Option<Self> {
        serde_json::from_str(line.strip_prefix(EVENT_MARK)?).ok()
    }
}

/// Cuts a stream of bytes into lines.
#[derive(Debug, Default)]
pub(super) struct Lines {
    rest: Vec<u8>,
}

impl Lines {
    pub(super) fn feed(&mut self, chunk: &[u8]) -> Vec<String> {
        self.rest.extend_from_slice(chunk);
        let Some(end) = self.rest.iter().rposition(|&byte| byte == b'\n') else { return Vec::new() };
        let whole: Vec<u8> = self.rest.drain(..=end).collect();
        String::from_utf8_lossy(&whole).lines().map(|line| line.trim_end_matches('\r').to_owned()).collect()
    }
}

/// How the cases of a run ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Cases that passed.
    pub passed: u32,
    /// Cases that failed.
    pub failed: u32,
    /// Cases that could not run.
    pub skipped: u32,
    /// Each case with its verdict, in the order in which they ended.
    pub verdicts: Vec<(String, Verdict)>,
}

impl Report {
    /// Counts one case.
    pub(super) fn record(&mut self, case: &str, verdict: &Verdict) {
        *match verdict {
            Verdict::Passed => &mut self.passed,
            Verdict::Failed { .. } => &mut self.failed,
            Verdict::Skipped { .. } => &mut self.skipped,
        } += 1;
        self.verdicts.push((case.to_owned(), verdict.clone()));
    }

    /// Adds another run.
    pub fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
        self.verdicts.extend(other.verdicts);
    }

    /// Prints the closing lines.
    pub fn print_totals(&self) {
        if self.skipped > 0 {
            println!("{} skipped", self.skipped);
        }
        println!("{} passed, {} failed", self.passed, self.failed);
    }
}

/// Prints the line of one case; below a failed one the reason and what it said.
pub(super) fn print_case(place: &str, case: &str, verdict: &Verdict, took: Duration, log: &[String]) {
    let took_s = took.as_secs_f64();
    match verdict {
        Verdict::Passed => println!("PASS {place:<5} {case:<44} {took_s:>6.1} s"),
        Verdict::Skipped { reason } => println!("SKIP {place:<5} {case:<44} {reason}"),
        Verdict::Failed { reason } => {
            println!("FAIL {place:<5} {case:<44} {took_s:>6.1} s");
            for line in reason.lines().chain(log.iter().map(String::as_str)).filter(|line| !line.is_empty()) {
                println!("     | {line}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_survive_output_that_comes_in_pieces() {
        let event = Event::End {
            case: "a-b".into(),
            verdict: Verdict::Failed { reason: "line 1\nline 2".into() },
            took_ms: 7,
        };
        let text = format!("noise\n{EVENT_MARK}{}\ntail", serde_json::to_string(&event).expect("plain data"));
        let mut lines = Lines::default();
        let found: Vec<String> = text.as_bytes().chunks(5).flat_map(|chunk| lines.feed(chunk)).collect();
        assert_eq!(found.len(), 2);
        assert_eq!(Event::parse(&found[0]), None);
        assert_eq!(Event::parse(&found[1]), Some(event));
    }
}
