//! Real files for a protected disk: a part of the machine's own tree, with a checksum of each file.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

/// The files that were copied: path below the root, with length and CRC32C.
pub(super) type Manifest = BTreeMap<PathBuf, (u64, u32)>;

/// Copies regular files from `sources` into `target` until `limit_bytes` are reached, syncs the filesystem, and returns
/// what was copied.
///
/// # Errors
/// When a file cannot be written, or the sources hold nothing to copy.
pub(super) fn copy(sources: &[&Path], target: &Path, limit_bytes: u64) -> Result<Manifest> {
    let mut manifest = Manifest::new();
    let mut copied_bytes = 0;
    for source in sources {
        let mut folders = vec![source.to_path_buf()];
        while let Some(folder) = folders.pop() {
            let Ok(entries) = fs::read_dir(&folder) else { continue };
            let mut entries: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
            entries.sort();
            for path in entries {
                let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
                if metadata.is_dir() {
                    folders.push(path);
                } else if metadata.is_file()
                    && metadata.len() > 0
                    && copied_bytes + metadata.len() <= limit_bytes
                {
                    let relative = path.strip_prefix("/").unwrap_or(&path).to_path_buf();
                    let copy = target.join(&relative);
                    if let Some(parent) = copy.parent() {
                        fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
                    }
                    let Ok(mut input) = File::open(&path) else { continue };
                    let mut output =
                        File::create(&copy).with_context(|| format!("create {}", copy.display()))?;
                    let sum = pump(&mut input, Some(&mut output))
                        .with_context(|| format!("copy {}", path.display()))?;
                    copied_bytes += sum.0;
                    manifest.insert(relative, sum);
                }
            }
            if copied_bytes * 100 >= limit_bytes * 97 {
                folders.clear();
            }
        }
    }
    ensure!(!manifest.is_empty(), "no files to copy below {sources:?}");
    let root = File::open(target).with_context(|| format!("open {}", target.display()))?;
    nix::unistd::syncfs(&root).with_context(|| format!("sync {}", target.display()))?;
    Ok(manifest)
}

/// Bytes in all files of a manifest.
pub(super) fn total_bytes(manifest: &Manifest) -> u64 {
    manifest.values().map(|(len_bytes, _)| len_bytes).sum()
}

/// Compares every file of `manifest` below `root`.
///
/// # Errors
/// Names the first files that are missing or differ.
pub(super) fn verify(manifest: &Manifest, root: &Path) -> Result<()> {
    let mut wrong = Vec::new();
    for (relative, expected) in manifest {
        let found = File::open(root.join(relative)).and_then(|mut file| pump(&mut file, None));
        match found {
            Ok(found) if found == *expected => {}
            Ok(_) => wrong.push(format!("{} differs", relative.display())),
            Err(error) => wrong.push(format!("{}: {error}", relative.display())),
        }
    }
    if wrong.is_empty() {
        return Ok(());
    }
    let shown = wrong.iter().take(5).cloned().collect::<Vec<_>>().join("; ");
    bail!("{} of {} files are not as they were: {shown}", wrong.len(), manifest.len())
}

fn pump(input: &mut File, mut output: Option<&mut File>) -> std::io::Result<(u64, u32)> {
    let mut buffer = vec![0; 256 * 1024];
    let mut sum = (0, 0);
    loop {
        let count = input.read(&mut buffer)?;
        if count == 0 {
            return Ok(sum);
        }
        if let Some(output) = output.as_mut() {
            output.write_all(&buffer[..count])?;
        }
        sum = (sum.0 + count as u64, crc32c::crc32c_append(sum.1, &buffer[..count]));
    }
}
