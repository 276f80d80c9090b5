//! How far a long command is, on standard error: a bar on a terminal, else a line for each tenth.

use std::io::{IsTerminal, Write};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::text;

/// How far a copy of several disks is.
pub(super) struct Progress {
    shown: Shown,
    total_bytes: u64,
    /// Of the disks before the current one.
    before_bytes: u64,
    /// Of the current one.
    disk_bytes: u64,
}

enum Shown {
    Nothing,
    Bar(ProgressBar),
    Lines(Lines),
}

struct Lines {
    out: Box<dyn Write>,
    /// Tenths that were told.
    told: u64,
    disk: String,
}

impl Progress {
    /// Of a copy of `total_bytes` in all.
    pub(super) fn new(total_bytes: u64, quiet: bool) -> Self {
        let shown = if quiet {
            Shown::Nothing
        } else if std::io::stderr().is_terminal() {
            let template = "{msg} {bar:40} {percent:>3}% {binary_bytes_per_sec:>12} {eta:>4} left";
            let style =
                ProgressStyle::with_template(template).expect("the template is a constant that is right");
            let target = ProgressDrawTarget::stderr();
            Shown::Bar(ProgressBar::with_draw_target(Some(total_bytes), target).with_style(style))
        } else {
            Shown::Lines(Lines { out: Box::new(std::io::stderr()), told: 0, disk: String::new() })
        };
        Self { shown, total_bytes, before_bytes: 0, disk_bytes: 0 }
    }

    /// The next disk, in words, of this length.
    pub(super) fn begin(&mut self, disk: &str, disk_bytes: u64) {
        self.before_bytes += self.disk_bytes;
        self.disk_bytes = disk_bytes;
        match &mut self.shown {
            Shown::Nothing => {}
            Shown::Bar(bar) => bar.set_message(disk.to_owned()),
            Shown::Lines(lines) => disk.clone_into(&mut lines.disk),
        }
    }

    /// The current disk is copied up to here, in bytes.
    pub(super) fn set(&mut self, at_bytes: u64) {
        let at_bytes = self.before_bytes + at_bytes;
        match &mut self.shown {
            Shown::Nothing => {}
            Shown::Bar(bar) => bar.set_position(at_bytes),
            Shown::Lines(lines) => lines.tell(at_bytes, self.total_bytes),
        }
    }

    /// Takes the bar away.
    pub(super) fn end(&mut self) {
        if let Shown::Bar(bar) = &self.shown {
            bar.finish_and_clear();
        }
    }
}

impl Lines {
    fn tell(&mut self, at_bytes: u64, total_bytes: u64) {
        let tenths = (u128::from(at_bytes) * 10 / u128::from(total_bytes.max(1))) as u64;
        if tenths <= self.told {
            return;
        }
        self.told = tenths;
        let (at, total) = (text::bytes(at_bytes), text::bytes(total_bytes));
        // Nobody may be listening.
        let _ = writeln!(self.out, "{}%: {at} of {total}, {}", tenths * 10, self.disk);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Heard(Arc<Mutex<Vec<u8>>>);

    impl Write for Heard {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().expect("whole").extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn without_a_terminal_each_tenth_is_a_line() {
        let heard = Heard::default();
        let lines = Lines { out: Box::new(heard.clone()), told: 0, disk: String::new() };
        let mut progress =
            Progress { shown: Shown::Lines(lines), total_bytes: 4096, before_bytes: 0, disk_bytes: 0 };
        for disk in ["disk 0 of db", "disk 0 of web"] {
            progress.begin(disk, 2048);
            (0..=2048).for_each(|at_bytes| progress.set(at_bytes));
        }
        let text = String::from_utf8(heard.0.lock().expect("whole").clone()).expect("text");
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 10, "{text}");
        assert_eq!(lines[0], "10%: 410 B of 4.0 KiB, disk 0 of db");
        assert_eq!(lines[9], "100%: 4.0 KiB of 4.0 KiB, disk 0 of web");
    }
}
