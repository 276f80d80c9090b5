//! Writes the archive that the kernel takes as its first root: cpio, "newc" format
//! (kernel: Documentation/driver-api/early-userspace/buffer-format.rst).

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::path::{Component, Path};

/// An archive being written. All owners are root and all times are zero, so that equal content gives equal bytes.
#[derive(Debug)]
pub struct CpioWriter<W> {
    out: W,
    inode: u32,
    folders: BTreeSet<String>,
}

const MODE_FOLDER: u32 = 0o040_755;
const MODE_LINK: u32 = 0o120_777;
const MODE_FILE: u32 = 0o100_000;
const MODE_CHARACTER_DEVICE: u32 = 0o020_600;

impl<W: Write> CpioWriter<W> {
    /// Begins an archive.
    pub fn new(out: W) -> Self {
        Self { out, inode: 0, folders: BTreeSet::new() }
    }

    /// Adds a folder, with those above it, once.
    pub fn folder(&mut self, path: &str) -> io::Result<()> {
        let mut so_far = String::new();
        for component in Path::new(path).components() {
            let Component::Normal(name) = component else { continue };
            if !so_far.is_empty() {
                so_far.push('/');
            }
            so_far.push_str(&name.to_string_lossy());
            if self.folders.insert(so_far.clone()) {
                self.entry(&so_far, MODE_FOLDER, (0, 0), &[])?;
            }
        }
        Ok(())
    }

    /// Adds a regular file with the given permission bits.
    pub fn file(&mut self, path: &str, permissions: u32, content: &[u8]) -> io::Result<()> {
        self.parents(path)?;
        self.entry(path, MODE_FILE | permissions, (0, 0), content)
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, path: &str, target: &str) -> io::Result<()> {
        self.parents(path)?;
        self.entry(path, MODE_LINK, (0, 0), target.as_bytes())
    }

    /// Adds a character device.
    pub fn character_device(&mut self, path: &str, major: u32, minor: u32) -> io::Result<()> {
        self.parents(path)?;
        self.entry(path, MODE_CHARACTER_DEVICE, (major, minor), &[])
    }

    /// Ends the archive. Another one may follow in the same stream.
    pub fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn parents(&mut self, path: &str) -> io::Result<()> {
        match path.rsplit_once('/') {
            Some((folder, _)) => self.folder(folder),
            None => Ok(()),
        }
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) -> io::Result<()> {
        self.inode += 1;
        let name = path.trim_start_matches('/');
        let len_bytes = u32::try_from(content.len())
            .map_err(|_| io::Error::new(io::ErrorKind::FileTooLarge, format!("{name} is over 4 GiB")))?;
        let name_bytes = u32::try_from(name.len() + 1).map_err(io::Error::other)?;
        // The fields in order: inode, mode, uid, gid, links, mtime, size, device of the file system (major, minor),
        // device of the node (major, minor), length of the name with its NUL, check (unused in newc).
        let fields = [self.inode, mode, 0, 0, 1, 0, len_bytes, 0, 0, device.0, device.1, name_bytes, 0];
        let mut head = String::from("070701");
        for field in fields {
            head.push_str(&format!("{field:08x}"));
        }
        self.out.write_all(head.as_bytes())?;
        self.out.write_all(name.as_bytes())?;
        self.out.write_all(&[0])?;
        self.pad(head.len() + name.len() + 1)?;
        self.out.write_all(content)?;
        self.pad(content.len())
    }

    fn pad(&mut self, written_bytes: usize) -> io::Result<()> {
        self.out.write_all(&[0; 3][..written_bytes.next_multiple_of(4) - written_bytes])
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn the_cpio_tool_reads_back_what_was_written() {
        let mut archive = CpioWriter::new(Vec::new());
        archive.file("a/b/five", 0o755, b"12345").expect("writes to memory");
        archive.link("a/link", "b/five").expect("writes to memory");
        archive.character_device("dev/console", 5, 1).expect("writes to memory");
        let bytes = archive.finish().expect("writes to memory");
        let Some(cpio) = crate::tool::find("cpio").or_else(|| crate::tool::find("busybox")) else {
            return;
        };
        let mut command = Command::new(&cpio);
        if cpio.ends_with("busybox") {
            command.arg("cpio");
        }
        let mut child =
            command.arg("-tv").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("the tool starts");
        child.stdin.take().expect("piped").write_all(&bytes).expect("the tool reads");
        let listing =
            String::from_utf8(child.wait_with_output().expect("the tool ends").stdout).expect("UTF-8");
        let lines: Vec<&str> = listing.lines().collect();
        assert_eq!(lines.len(), 6, "{listing}");
        assert!(lines[2].starts_with("-rwxr-xr-x") && lines[2].ends_with("a/b/five"), "{listing}");
        assert!(lines[2].contains(" 5 "), "{listing}");
        assert!(lines[3].ends_with("a/link -> b/five"), "{listing}");
        assert!(lines[5].starts_with("crw-------") && lines[5].ends_with("dev/console"), "{listing}");
    }
}
