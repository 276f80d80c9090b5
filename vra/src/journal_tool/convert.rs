//! A disk as it was, converted by `qemu-img`, which reads it over NBD.

use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, bail};

use super::args::Format;
use super::disk::{DiskAt, remedy};
use super::export::{Exports, SocketFolder};
use super::image::Image;
use super::progress::Progress;
use super::signals::Signals;

/// What it is called.
const PROGRAM: &str = "qemu-img";
/// How often a signal is looked for.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How much of what it complains of is told, in bytes.
const COMPLAINT_BYTES: u64 = 4096;

/// The installed `qemu-img`, and a server that it reads from.
pub(super) struct Converter {
    format: Format,
    exports: Exports,
    folder: SocketFolder,
}

impl Converter {
    /// Finds out whether there will be one.
    pub(super) fn check() -> anyhow::Result<()> {
        check_program(PROGRAM)
    }

    /// Begins to serve it.
    pub(super) fn start(format: Format) -> anyhow::Result<Self> {
        let (exports, folder) = (Exports::new()?, SocketFolder::new()?);
        exports.listen(&folder.socket())?;
        Ok(Self { format, exports, folder })
    }

    /// Writes a disk into an image.
    pub(super) fn run(
        &self,
        from: DiskAt,
        image: &Image,
        progress: &mut Progress,
        signals: &mut Signals,
    ) -> anyhow::Result<()> {
        let (name, size_bytes) = (from.name(), from.size_bytes());
        let disk = from.served(None)?;
        self.exports.add(EXPORT, name.clone(), std::sync::Arc::clone(&disk))?;
        let ended = self.convert(image.partial(), |percent| progress.set(part(size_bytes, percent)), signals);
        self.exports.remove(EXPORT);
        if disk.is_gone() {
            bail!("the checkpoint of {name} went away while it was copied; choose a newer one");
        }
        if let Some((seq, offset_bytes)) = disk.first_damage() {
            let remedy = remedy(disk.is_lost(offset_bytes));
            bail!(
                "{name} cannot be read at {offset_bytes}: record {seq} is damaged; {remedy} (raw images only: qemu-img convert makes \
                 qcow2 of one)"
            );
        }
        ended.with_context(|| format!("cannot convert {name}"))
    }

    fn convert(&self, into: &Path, mut told: impl FnMut(f64), signals: &mut Signals) -> anyhow::Result<()> {
        let socket = self.folder.socket().display().to_string().replace(',', ",,");
        let source = format!(
            "driver=raw,file.driver=nbd,file.export={EXPORT},file.server.type=unix,file.server.path={socket}"
        );
        let mut command = Command::new(PROGRAM);
        let format = match self.format {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        };
        command.args(["convert", "-p", "-O", format, "--image-opts", &source]).arg(into);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = Ended(command.spawn().with_context(|| format!("cannot start {PROGRAM}"))?);
        let percents = percents(child.0.stdout.take().context("its output")?);
        let complaint = complaint(child.0.stderr.take().context("its errors")?);
        loop {
            signals.check()?;
            match percents.recv_timeout(LOOK_EVERY) {
                Ok(percent) => told(percent),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        let status = child.0.wait().with_context(|| format!("cannot wait for {PROGRAM}"))?;
        if !status.success() {
            let said = complaint.join().unwrap_or_default();
            bail!("{PROGRAM} failed ({status}): {}", said.trim());
        }
        Ok(())
    }
}

/// The one export.
const EXPORT: &str = "disk";

/// Ends with this, whatever happens.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Refuses with a remedy if a program isn't there.
fn check_program(program: &str) -> anyhow::Result<()> {
    let output = Command::new(program).arg("--version").stdin(Stdio::null()).output();
    match output {
        Ok(output) if output.status.success() => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => bail!(
            "{program} is not installed, and qcow2 is written by it: install the package qemu-utils (Debian, Ubuntu) or qemu-img \
             (Fedora, RHEL, SUSE qemu-tools), or leave out --format for a raw image"
        ),
        Ok(output) => bail!("{program} --version failed ({}): mend its installation", output.status),
        Err(error) => Err(error).with_context(|| format!("cannot start {program}")),
    }
}

fn part(size_bytes: u64, percent: f64) -> u64 {
    (size_bytes as f64 * (percent / 100.0).clamp(0.0, 1.0)) as u64
}

/// What it tells of its progress, `(12.34/100%)` again and again, until it ends.
fn percents(mut output: impl Read + Send + 'static) -> Receiver<f64> {
    let (tell, told) = channel();
    std::thread::spawn(move || {
        let (mut buffer, mut rest) = ([0; 256], String::new());
        while let Ok(len @ 1..) = output.read(&mut buffer) {
            rest.push_str(&String::from_utf8_lossy(&buffer[..len]));
            while let Some(end) = rest.find("/100%)") {
                let number = rest[..end].rsplit('(').next().and_then(|number| number.trim().parse().ok());
                rest.drain(..end + 1);
                if let Some(percent) = number
                    && tell.send(percent).is_err()
                {
                    return;
                }
            }
            // It writes nothing else; what grows is not to be kept.
            if rest.len() > 4096 {
                rest.clear();
            }
        }
    });
    told
}

/// The beginning of what it complains of.
fn complaint(errors: impl Read + Send + 'static) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut said = Vec::new();
        let mut errors = errors;
        let _ = errors.by_ref().take(COMPLAINT_BYTES).read_to_end(&mut said);
        // Or it would wait for somebody to read the rest.
        let _ = std::io::copy(&mut errors, &mut std::io::sink());
        String::from_utf8_lossy(&said).into_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_program_is_told_with_the_package() {
        let error = check_program("qemu-img-that-is-nowhere").expect_err("not there").to_string();
        assert!(error.contains("qemu-utils"), "{error}");
        check_program("true").expect("there");
        let error = check_program("false").expect_err("broken").to_string();
        assert!(error.contains("mend"), "{error}");
    }

    #[test]
    fn progress_is_understood_in_whatever_pieces_it_comes() {
        struct Slow(&'static [u8]);
        impl Read for Slow {
            fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
                let len = self.0.len().min(5);
                into[..len].copy_from_slice(&self.0[..len]);
                self.0 = &self.0[len..];
                Ok(len)
            }
        }
        let told =
            percents(Slow(b"    (0.00/100%)\r    (12.34/100%)\r    (100.00/100%)\r    (100.00/100%)\n"));
        assert_eq!(told.iter().collect::<Vec<f64>>(), [0.0, 12.34, 100.0, 100.0]);
        assert_eq!((part(4096, 50.0), part(4096, 1000.0), part(4096, f64::NAN)), (2048, 4096, 0));
    }
}
