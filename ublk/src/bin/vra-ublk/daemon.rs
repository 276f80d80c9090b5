//! The serving process: in the foreground, or in the background with its maker waiting for the first word.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::time::Duration;

use anyhow::{Context, bail};
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::{ForkResult, dup2_stderr, dup2_stdin, dup2_stdout, fork, pipe, setsid};

use crate::args::ServeOptions;
use crate::{Served, prepare_process};

/// How often a serving process looks whether its device is still there.
const LOOK_PERIOD: Duration = Duration::from_millis(200);
/// How long requests under way get to end before the device is left to a successor.
const LEAVE_LIMIT: Duration = Duration::from_secs(5);

/// Makes a device and serves it to its end.
pub(crate) fn serve(
    options: &ServeOptions,
    make: impl FnOnce() -> anyhow::Result<Served>,
) -> anyhow::Result<()> {
    if !options.daemonize {
        return serve_here(options, make, |device| {
            println!("{}", device.block_path().display());
            Ok(())
        });
    }
    let (reader, writer) = pipe().context("cannot make a pipe")?;
    // SAFETY: the process has one thread, so the child may do anything.
    match unsafe { fork() }.context("cannot start a background process")? {
        ForkResult::Parent { .. } => {
            drop(writer);
            wait_for_first_word(reader)
        }
        ForkResult::Child => {
            drop(reader);
            let mut writer = File::from(writer);
            let mut say = writer.try_clone().context("cannot copy the pipe")?;
            let served = detach().and_then(|()| {
                serve_here(options, make, move |device| {
                    Ok(writeln!(writer, "{}", device.block_path().display())?)
                })
            });
            if let Err(error) = &served {
                // The maker has gone if the device was there already; then the log has it.
                let _ = write!(say, "!{error:#}");
            }
            served
        }
    }
}

fn serve_here(
    options: &ServeOptions,
    make: impl FnOnce() -> anyhow::Result<Served>,
    started: impl FnOnce(&Served) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    start_log(options)?;
    prepare_process()?;
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGHUP);
    // Before any thread is made, so that the signals wait for `wait_for_signal`.
    signals.thread_block().context("cannot block signals")?;
    let mut device = make()?;
    started(&device)?;
    while !device.has_ended() {
        match wait_for_signal(&signals) {
            Some(libc::SIGHUP) => return Ok(device.leave(LEAVE_LIMIT)?),
            Some(_) => return Ok(device.delete()?),
            None => {}
        }
    }
    tracing::info!(device = device.id(), "the device was deleted");
    Ok(())
}

/// Waits one period for a signal.
fn wait_for_signal(signals: &SigSet) -> Option<libc::c_int> {
    let period = libc::timespec { tv_sec: 0, tv_nsec: LOOK_PERIOD.as_nanos() as libc::c_long };
    // SAFETY: both pointers are to live values; no information about the signal is wanted.
    let signal = unsafe { libc::sigtimedwait(signals.as_ref(), std::ptr::null_mut(), &raw const period) };
    (signal > 0).then_some(signal)
}

fn start_log(options: &ServeOptions) -> anyhow::Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false);
    match &options.log {
        None => log.with_writer(std::io::stderr).init(),
        Some(path) => {
            let file = File::options().append(true).create(true).open(path);
            let file = file.with_context(|| format!("cannot open the log {}", path.display()))?;
            log.with_writer(file).init();
        }
    }
    Ok(())
}

fn detach() -> anyhow::Result<()> {
    setsid().context("cannot leave the terminal")?;
    let null = File::options().read(true).write(true).open("/dev/null").context("cannot open /dev/null")?;
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    dup2_stderr(&null)?;
    Ok(())
}

/// A path and a newline, or an exclamation mark, an error and the end.
fn wait_for_first_word(reader: OwnedFd) -> anyhow::Result<()> {
    let mut reader = BufReader::new(File::from(reader));
    let mut word = String::new();
    reader.read_line(&mut word).context("cannot read from the background process")?;
    if word.is_empty() {
        bail!("the background process ended without a word: see dmesg");
    }
    if let Some(error) = word.strip_prefix('!') {
        let mut error = error.to_owned();
        reader.read_to_string(&mut error).context("cannot read from the background process")?;
        bail!("{error}");
    }
    print!("{word}");
    Ok(())
}
