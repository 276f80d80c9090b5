use std::os::unix::fs::FileExt;
use std::process::Command;

use super::*;

/// A path in a folder on a real filesystem (direct I/O), removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tmp");
        std::fs::create_dir_all(&folder).expect("folder");
        Self(folder.join(format!("backing-{name}-{}", std::process::id())))
    }

    fn with_len(name: &str, len_bytes: u64) -> Self {
        let scratch = Self::new(name);
        File::create(&scratch.0).and_then(|file| file.set_len(len_bytes)).expect("file");
        scratch
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn error_of(path: &Path) -> String {
    Backing::open(path, BackingSettings::FIRST_ATTACH).expect_err("refused").to_string()
}

#[test]
fn a_raw_file_tells_its_truth() {
    let scratch = Scratch::with_len("raw", 1 << 20);
    let backing = Backing::open(&scratch.0, BackingSettings::FIRST_ATTACH).expect("open");
    let geometry = backing.geometry();
    assert_eq!((geometry.size_bytes, backing.kind()), (1 << 20, BackingKind::File));
    assert!(geometry.volatile_cache && geometry.fua && !geometry.read_only);
    assert!(geometry.logical_block_bytes <= geometry.physical_block_bytes);
    assert!(geometry.discard.is_some(), "the build folder's filesystem punches holes");
    assert_eq!(std::fs::metadata(&scratch.0).expect("there").len(), 1 << 20, "probing changed nothing");
}

#[test]
fn a_read_only_backing_offers_no_changes_and_is_shared() {
    let scratch = Scratch::with_len("shared", 8192);
    let settings = BackingSettings { read_only: true, ..BackingSettings::FIRST_ATTACH };
    let first = Backing::open(&scratch.0, settings).expect("open");
    assert!(first.geometry().read_only && first.geometry().discard.is_none());
    Backing::open(&scratch.0, settings).expect("a second reader");
    assert!(error_of(&scratch.0).contains("is busy: process"), "no writer beside readers");
}

#[test]
fn what_is_no_disk_is_refused_with_the_remedy() {
    let missing = Scratch::new("missing");
    assert!(error_of(&missing.0).contains("does not exist: check the path"));
    assert!(error_of(Path::new("/proc")).contains("neither a regular file nor a block device"));
    let odd = Scratch::with_len("odd", 1000);
    assert!(error_of(&odd.0).contains("has 1000 bytes, which is not a multiple"));
    let empty = Scratch::with_len("empty", 0);
    assert!(error_of(&empty.0).contains("is empty: check the path"));
}

#[test]
fn a_shared_file_is_opened_by_all_and_locked_by_one_at_a_time() {
    let scratch = Scratch::with_len("handed", 8192);
    let open = || Backing::open(&scratch.0, BackingSettings::SHARED).expect("open");
    let (one, other) = (open(), open());
    assert!(one.try_lock().expect("lock") && one.try_lock().expect("again"));
    assert!(!other.try_lock().expect("lock"));
    assert!(error_of(&scratch.0).contains("is busy"), "one that is locked at once");
    // As a request in flight pins the file: the lock goes when it is given up, whoever has a descriptor.
    let pinned = one.file().try_clone().expect("clone");
    one.unlock().expect("unlock");
    assert!(other.try_lock().expect("lock") && !one.try_lock().expect("lock"));
    drop(other);
    assert!(one.try_lock().expect("lock"));
    drop(one);
    assert!(!open().try_lock().expect("lock"), "what is in flight has it still");
    drop(pinned);
    assert!(open().try_lock().expect("lock"));
}

#[test]
fn an_image_format_is_refused_unless_a_guest_may_have_written_it() {
    let scratch = Scratch::with_len("qcow2", 1 << 20);
    let file = File::options().write(true).open(&scratch.0).expect("open");
    file.write_all_at(b"QFI\xfb\0\0\0\x03", 0).expect("write");
    let error = error_of(&scratch.0);
    assert!(error.contains("is a qcow2 image") && error.contains("qemu-img convert -O raw"), "{error}");
    Backing::open(&scratch.0, BackingSettings::RECOVERY).expect("its own guest's");
}

#[test]
fn a_locked_disk_names_its_holder_and_can_be_waited_for() {
    let scratch = Scratch::with_len("locked", 8192);
    let first = Backing::open(&scratch.0, BackingSettings::FIRST_ATTACH).expect("open");
    let error = error_of(&scratch.0);
    assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
    let waiting = {
        let path = scratch.0.clone();
        std::thread::spawn(move || Backing::open(&path, BackingSettings::RECOVERY).map(drop))
    };
    std::thread::sleep(Duration::from_millis(50));
    drop(first);
    waiting.join().expect("no panic").expect("had after the holder let go");
}

/// Needs a free loop device, which hosts without the right to make one don't have.
#[test]
fn a_block_device_is_measured_and_claimed() {
    let scratch = Scratch::with_len("loop", 1 << 20);
    let losetup =
        Command::new("losetup").args(["--find", "--show", "--sector-size", "4096"]).arg(&scratch.0).output();
    let Ok(made) = losetup else {
        return;
    };
    if !made.status.success() {
        return;
    }
    let device = PathBuf::from(String::from_utf8_lossy(&made.stdout).trim());
    let opened = Backing::open(&device, BackingSettings::FIRST_ATTACH);
    let second = Backing::open(&device, BackingSettings::FIRST_ATTACH).map(drop);
    let facts = opened.as_ref().map(|backing| (backing.kind(), backing.geometry().clone())).ok();
    drop(opened);
    let freed = Command::new("losetup").arg("--detach").arg(&device).status().expect("losetup");
    assert!(freed.success());
    let (kind, geometry) = facts.expect("opened");
    assert_eq!((kind, geometry.size_bytes), (BackingKind::BlockDevice, 1 << 20));
    assert_eq!(geometry.logical_block_bytes, 4096);
    assert!(geometry.discard.is_some(), "loop devices write zeroes by punching holes");
    assert!(matches!(second, Err(BackingError::Busy { .. })), "one opener only");
}
