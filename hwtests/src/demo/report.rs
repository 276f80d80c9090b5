//! What the demo tells while it runs and at its end.

use std::fmt;
use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::workload::Recovered;
use crate::interrupt;

/// The lines that the demo prints as it goes, with the time since its start.
pub(super) struct Story {
    start: Instant,
}

impl Story {
    /// Starts the clock.
    pub(super) fn start() -> Self {
        Self { start: Instant::now() }
    }

    /// Prints what happens now.
    ///
    /// # Errors
    /// When it is not to happen any more, because the demo was interrupted.
    pub(super) fn tell(&mut self, what: &str) -> Result<()> {
        interrupt::check()?;
        println!("[{:6.1} s] {what}", self.elapsed().as_secs_f64());
        Ok(())
    }

    /// Prints what a command of the product said, indented.
    pub(super) fn show(&mut self, text: &str) {
        for line in text.trim_end().lines() {
            println!("             {line}");
        }
    }

    /// Time since the start.
    pub(super) fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }
}

/// One recovered checkpoint.
#[derive(Debug)]
pub struct Recovery {
    /// Its tag, or `latest`.
    pub name: String,
    /// Transactions that it must hold.
    pub expected: RangeInclusive<u64>,
    /// What it held.
    pub found: Recovered,
    /// From the command to all disks open.
    pub opened_in: Duration,
    /// From the command to all filesystems mounted.
    pub usable_in: Duration,
}

/// The table at the end.
#[derive(Debug)]
pub struct Report {
    /// How disks were offered.
    pub door: &'static str,
    /// Files copied onto the protected disk.
    pub files: u64,
    /// Their bytes.
    pub files_bytes: u64,
    /// Bytes allocated by the production disks.
    pub source_bytes: u64,
    /// Bytes allocated by journals and recovery disks.
    pub target_bytes: u64,
    /// Transactions that the application finished.
    pub transactions: u64,
    /// From the latest checkpoint to the disaster.
    pub rpo: Duration,
    /// Both recoveries.
    pub recoveries: Vec<Recovery>,
    /// The whole demo.
    pub took: Duration,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
        writeln!(f)?;
        writeln!(f, "  disks as                   {}", self.door)?;
        writeln!(f, "  files checked              {} ({})", self.files, mib(self.files_bytes))?;
        writeln!(f, "  production disks           {}", mib(self.source_bytes))?;
        writeln!(f, "  journals + recovery disks  {}", mib(self.target_bytes))?;
        writeln!(f, "  transactions made          {}", self.transactions)?;
        writeln!(f, "  RPO at the disaster        {:.2} s", self.rpo.as_secs_f64())?;
        writeln!(f)?;
        writeln!(f, "  checkpoint       transactions    must hold        disks open  mounted")?;
        for recovery in &self.recoveries {
            writeln!(
                f,
                "  {:<15}  {:>12}    {:<15}  {:>7.2} s   {:>6.2} s",
                recovery.name,
                recovery.found.transactions,
                format!("{} to {}", recovery.expected.start(), recovery.expected.end()),
                recovery.opened_in.as_secs_f64(),
                recovery.usable_in.as_secs_f64()
            )?;
        }
        writeln!(f)?;
        write!(f, "  all checks passed, {:.0} s in all", self.took.as_secs_f64())
    }
}
