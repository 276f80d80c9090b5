//! The server against clients that others wrote: qemu, libnbd, fio.

mod support;

use std::process::{Command, Output};
use std::sync::Arc;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use support::memory_disk::MemoryDisk;
use support::server::TestServer;

const SIZE: usize = 64 << 20;

/// Runs a tool of Debian's, or none with a word about it if it isn't installed.
fn run(package: &str, program: &str, arguments: &[&str]) -> Option<Output> {
    match Command::new(program).args(arguments).output() {
        Ok(output) => Some(output),
        Err(error) => {
            eprintln!("skipped: {program}: {error} (package {package})");
            None
        }
    }
}

fn text(output: &Output) -> String {
    assert!(
        output.status.success(),
        "{}\n{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    StdRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    bytes
}

#[test]
fn qemu_io_reads_and_writes_in_all_ways() {
    let disk = MemoryDisk::new(SIZE, false);
    let server = TestServer::start(Arc::clone(&disk) as _, 32);
    let script = [
        "write -P 17 0 32M",
        "write -f -P 18 4k 8k",
        "write -z 1M 1M",
        "write -z -u 3M 4608",
        "discard 5M 1M",
        "aio_write -P 19 8M 1M",
        "aio_write -P 20 9M 1M",
        "aio_flush",
        "flush",
        "read -P 17 0 4k",
        "read -P 18 4k 8k",
        "read -P 0 1M 1M",
        "read -P 0 3M 4608",
        "read -P 17 3150336 512",
        "read -P 0 5M 1M",
        "read -P 19 8M 1M",
        "read -P 20 9M 1M",
        "read -P 17 10M 22M",
        "read -P 0 32M 32M",
    ];
    let uri = server.uri();
    let mut arguments = vec!["-f", "raw"];
    for command in &script {
        arguments.extend(["-c", command]);
    }
    arguments.push(&uri);
    let Some(output) = run("qemu-utils", "qemu-io", &arguments) else { return };
    let text = text(&output);
    assert!(!text.contains("verification failed") && !text.contains("failed"), "{text}");
    assert!(disk.flushes() > 0);
}

#[test]
fn qemu_img_copies_in_and_out() {
    let disk = MemoryDisk::new(SIZE, false);
    let server = TestServer::start(Arc::clone(&disk) as _, 32);
    let (image, back) = (server.path("in.raw"), server.path("out.raw"));
    let mut content = vec![0; SIZE];
    content[1 << 20..9 << 20].copy_from_slice(&noise(1, 8 << 20));
    content[SIZE - 4096..].copy_from_slice(&noise(2, 4096));
    std::fs::write(&image, &content).expect("image");
    let (image, back) = (image.to_string_lossy().into_owned(), back.to_string_lossy().into_owned());
    let uri = server.uri();
    let convert = ["convert", "-n", "-f", "raw", "-O", "raw"];
    let Some(output) = run("qemu-utils", "qemu-img", &[&convert[..], &[&image, &uri]].concat()) else {
        return;
    };
    text(&output);
    assert!(disk.bytes(0, SIZE) == content);
    let copy = ["convert", "-f", "raw", "-O", "raw", &uri, &back];
    text(&run("qemu-utils", "qemu-img", &copy).expect("installed"));
    assert!(std::fs::read(&back).expect("copy") == content);
    let compare = ["compare", "-f", "raw", "-F", "raw", &image, &uri];
    text(&run("qemu-utils", "qemu-img", &compare).expect("installed"));
    let map = text(
        &run("qemu-utils", "qemu-img", &["map", "--output=json", "-f", "raw", &uri]).expect("installed"),
    );
    assert!(map.contains("\"zero\": true") && map.contains("\"zero\": false"), "{map}");
}

#[test]
fn libnbd_describes_and_copies() {
    let disk = MemoryDisk::new(SIZE, false);
    let content = noise(3, SIZE);
    disk.fill(0, &content);
    let server = TestServer::start(Arc::clone(&disk) as _, 32);
    let uri = server.uri();
    let Some(output) = run("libnbd-bin", "nbdinfo", &["--json", &uri]) else { return };
    let info = text(&output);
    for expected in [
        "\"protocol\": \"newstyle-fixed\"",
        "\"structured\": true",
        "\"export-size\": 67108864",
        "\"base:allocation\"",
        "\"can_multi_conn\": true",
        "\"can_fua\": true",
        "\"can_trim\": true",
        "\"can_zero\": true",
        "\"can_df\": true",
        "\"is_read_only\": false",
        "\"block_size_minimum\": 512",
        "\"block_size_maximum\": 33554432",
    ] {
        assert!(info.contains(expected), "no {expected} in {info}");
    }
    let list = text(&run("libnbd-bin", "nbdinfo", &["--list", &uri]).expect("installed"));
    assert!(list.contains("disk"), "{list}");
    let back = server.path("out.raw");
    let back_name = back.to_string_lossy().into_owned();
    std::fs::write(&back, vec![0; SIZE]).expect("file");
    text(&run("libnbd-bin", "nbdcopy", &[&uri, &back_name]).expect("installed"));
    assert!(std::fs::read(&back).expect("copy") == content);
    let other = noise(4, SIZE);
    std::fs::write(&back, &other).expect("file");
    text(
        &run("libnbd-bin", "nbdcopy", &["--flush", "--connections=4", &back_name, &uri]).expect("installed"),
    );
    assert!(disk.bytes(0, SIZE) == other);
}

#[test]
fn fio_verifies_its_own_writes() {
    let Some(engines) = run("fio", "fio", &["--enghelp"]) else { return };
    if !text(&engines).contains("nbd") {
        eprintln!("skipped: this fio has no nbd engine");
        return;
    }
    let disk = MemoryDisk::new(SIZE, false);
    let server = TestServer::start(Arc::clone(&disk) as _, 32);
    let uri = format!("--uri={}", server.uri());
    let arguments = [
        "--name=verify",
        "--ioengine=nbd",
        &uri,
        "--rw=randwrite",
        "--bsrange=4k-256k",
        "--size=64M",
        "--iodepth=32",
        "--verify=crc32c",
        "--do_verify=1",
        "--verify_fatal=1",
        "--fsync=64",
    ];
    text(&run("fio", "fio", &arguments).expect("installed"));
}

/// Clients without structured replies: the Linux kernel's, and old ones.
#[test]
fn qemu_nbd_reconnects_are_new_sessions() {
    let disk = MemoryDisk::new(SIZE, false);
    let server = TestServer::start(Arc::clone(&disk) as _, 32);
    let uri = server.uri();
    for round in 1..=5_u8 {
        let write = format!("write -P {round} 0 1M");
        let read = format!("read -P {round} 0 1M");
        let arguments = ["-f", "raw", "-c", &write, "-c", &read, &uri];
        let Some(output) = run("qemu-utils", "qemu-io", &arguments) else { return };
        assert!(!text(&output).contains("failed"));
    }
}
