//! The application that the demo protects: numbered transactions over the disks of two VMs.
//!
//! Step `n` appends line `n` to a log on one VM's disk and makes it durable, then commits transaction `n` to a SQLite
//! database on the other VM's disk. Each step starts after the one before is durable, so any moment that is consistent
//! across both VMs holds the log through `n` or `n + 1` when it holds transactions through `n`.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};

use crate::interrupt;

/// File name of the log on the application's data disk.
pub(super) const LOG_NAME: &str = "steps.log";
/// File name of the database on the database VM's disk.
pub(super) const DATABASE_NAME: &str = "orders.db";

/// One finished step, with the times between which it became durable.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step {
    /// Its number, from 1.
    pub number: u64,
    /// When its transaction was sent to SQLite, µs since the Unix epoch.
    pub started_us: u64,
    /// When SQLite said that it is committed, µs since the Unix epoch.
    pub committed_us: u64,
}

/// The running application; stops when told or when its disks go away.
pub(super) struct Workload {
    steps: Arc<Mutex<Vec<Step>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Workload {
    /// Starts the application with its log below `log_mount` and its database below `database_mount`.
    ///
    /// # Errors
    /// When the log or the database cannot be created.
    pub(super) fn start(log_mount: &Path, database_mount: &Path) -> Result<Self> {
        let log = OpenOptions::new()
            .create_new(true)
            .append(true)
            .open(log_mount.join(LOG_NAME))
            .with_context(|| format!("create {LOG_NAME} in {}", log_mount.display()))?;
        let database = Database::create(&database_mount.join(DATABASE_NAME))?;
        let steps = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let steps = Arc::clone(&steps);
            let stop = Arc::clone(&stop);
            move || run(log, database, &steps, &stop)
        });
        Ok(Self { steps, stop, thread: Some(thread) })
    }

    /// The steps finished so far.
    pub(super) fn steps(&self) -> Vec<Step> {
        self.steps.lock().expect("no step panics while it holds the list").clone()
    }

    /// Number of the last finished step, or zero.
    pub(super) fn last_number(&self) -> u64 {
        self.steps
            .lock()
            .expect("no step panics while it holds the list")
            .last()
            .map_or(0, |step| step.number)
    }

    /// Waits until `count` more steps have finished.
    ///
    /// # Errors
    /// When the application died or `seconds` have passed.
    pub(super) fn wait_for_more(&self, count: u64, seconds: u64) -> Result<()> {
        let target = self.last_number() + count;
        let deadline = Instant::now() + Duration::from_secs(seconds);
        while self.last_number() < target {
            interrupt::check()?;
            ensure!(
                self.thread.as_ref().is_some_and(|thread| !thread.is_finished()),
                "the application stopped at transaction {}",
                self.last_number()
            );
            ensure!(
                Instant::now() < deadline,
                "the application made no {count} transactions in {seconds} s, it stands at {}",
                self.last_number()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Asks the application to stop after its current step and doesn't wait: after a disaster that step may hang
    /// on a disk that is gone.
    pub(super) fn ask_to_stop(&self) {
        self.stop.store(true, Ordering::Release);
    }

    /// Asks the application to stop and waits for its last step, but no longer than `limit`.
    pub(super) fn stop_within(&self, limit: Duration) {
        self.ask_to_stop();
        let deadline = Instant::now() + limit;
        while self.thread.as_ref().is_some_and(|thread| !thread.is_finished()) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits for the application's end. An error of its own is returned: after a disaster the caller expects one.
    pub(super) fn join(mut self) -> Result<()> {
        self.ask_to_stop();
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(_)) => bail!("the application's thread panicked"),
            None => Ok(()),
        }
    }
}

/// What a recovered pair of disks holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recovered {
    /// Lines of the log.
    pub log_lines: u64,
    /// Highest transaction in the database.
    pub transactions: u64,
}

/// Reads what recovered disks hold, and checks that neither has a gap and that both are of one moment.
///
/// # Errors
/// Says what is missing, doubled or damaged.
pub(super) fn inspect(log_mount: &Path, database_mount: &Path) -> Result<Recovered> {
    let log =
        File::open(log_mount.join(LOG_NAME)).with_context(|| format!("open the recovered {LOG_NAME}"))?;
    let mut log_lines = 0_u64;
    for line in BufReader::new(log).lines() {
        let line = line.with_context(|| format!("read the recovered {LOG_NAME}"))?;
        let number = line.split_whitespace().nth(1).and_then(|word| word.parse::<u64>().ok());
        // The last line may be half written: the guest had not been told that it is durable.
        match number {
            Some(number) if number == log_lines + 1 && line.ends_with("done") => log_lines = number,
            _ if line.trim_matches('\0').is_empty() || !line.ends_with("done") => break,
            _ => bail!("{LOG_NAME}: after line {log_lines} comes \"{line}\""),
        }
    }
    let database = database_mount.join(DATABASE_NAME);
    let integrity = query(&database, "PRAGMA integrity_check;")?;
    ensure!(integrity == "ok", "SQLite integrity_check of {}: {integrity}", database.display());
    let row = query(&database, "SELECT count(*) || ' ' || coalesce(max(n), 0) FROM orders;")?;
    let (count, highest) = row
        .split_once(' ')
        .and_then(|(count, highest)| Some((count.parse::<u64>().ok()?, highest.parse::<u64>().ok()?)))
        .with_context(|| format!("SQLite answered \"{row}\""))?;
    ensure!(
        count == highest,
        "{DATABASE_NAME} holds {count} transactions but the highest is {highest}: a gap"
    );
    ensure!(
        log_lines == highest || log_lines == highest + 1,
        "the disks are of different moments: the log of one VM ends at {log_lines}, the database of the other at {highest}"
    );
    Ok(Recovered { log_lines, transactions: highest })
}

/// Now, µs since the Unix epoch.
pub(super) fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
}

fn run(mut log: File, mut database: Database, steps: &Mutex<Vec<Step>>, stop: &AtomicBool) -> Result<()> {
    for number in 1.. {
        if stop.load(Ordering::Acquire) {
            break;
        }
        writeln!(log, "step {number} done").with_context(|| format!("append step {number}"))?;
        log.sync_data().with_context(|| format!("sync step {number}"))?;
        let started_us = now_us();
        database.commit(number, started_us)?;
        let committed_us = now_us();
        steps.lock().expect("no step panics while it holds the list").push(Step {
            number,
            started_us,
            committed_us,
        });
    }
    Ok(())
}

/// A `sqlite3` process that commits one transaction for each line it is given.
struct Database {
    process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Database {
    fn create(path: &Path) -> Result<Self> {
        let mut process = Command::new("sqlite3")
            .arg("-batch")
            // Without it the shell goes on after a failed statement and would report a commit that was none.
            .arg("-bail")
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            // Out of reach of the terminal's Ctrl-C: it ends with the application.
            .process_group(0)
            .spawn()
            .context("start sqlite3 (Debian package sqlite3)")?;
        let input = process.stdin.take().context("sqlite3 has no standard input")?;
        let output = BufReader::new(process.stdout.take().context("sqlite3 has no standard output")?);
        let mut database = Self { process, input, output };
        database.ask(
            "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; \
             CREATE TABLE orders(n INTEGER PRIMARY KEY, at_us INTEGER NOT NULL, payload BLOB NOT NULL); SELECT 'ready';",
            "ready",
        )?;
        Ok(database)
    }

    fn commit(&mut self, number: u64, at_us: u64) -> Result<()> {
        let answer = format!("committed {number}");
        self.ask(
            &format!("INSERT INTO orders VALUES({number}, {at_us}, randomblob(1500)); SELECT '{answer}';"),
            &answer,
        )
    }

    fn ask(&mut self, statement: &str, answer: &str) -> Result<()> {
        writeln!(self.input, "{statement}").and_then(|()| self.input.flush()).context("write to sqlite3")?;
        let mut line = String::new();
        loop {
            line.clear();
            ensure!(self.output.read_line(&mut line).context("read from sqlite3")? > 0, "sqlite3 ended");
            if line.trim_end() == answer {
                return Ok(());
            }
        }
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        // A sqlite3 that waits for a disk that is gone cannot be reaped yet; it ends with its device.
        let _ = self.process.kill();
        let _ = self.process.try_wait();
    }
}

fn query(database: &Path, sql: &str) -> Result<String> {
    let output = Command::new("sqlite3")
        .arg("-batch")
        .arg(database)
        .arg(sql)
        .output()
        .context("start sqlite3 (Debian package sqlite3)")?;
    ensure!(
        output.status.success(),
        "sqlite3 {}: {}",
        database.display(),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
