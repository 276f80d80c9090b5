//! Rule E1 by a scripted client: no byte of an old session reaches the disk once the new one's handshake is answered.

mod support;

use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use support::client::Client;
use support::memory_disk::MemoryDisk;
use support::server::TestServer;
use support::{request, write};
use ublk::nbd::wire::{command, transmission_flag};
use ublk::nbd::{Address, ExportSettings, ListenError};

const SLOTS: usize = 4;
/// More than the server takes while its slots are held, and less than fills the socket.
const BLOCKS: u64 = 24;

fn start(disk: &Arc<MemoryDisk>) -> TestServer {
    TestServer::start(Arc::clone(disk) as _, SLOTS)
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < deadline, "{what} never came");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn old_block(block: u64) -> Vec<u8> {
    write(0, block, block * 4096, &[0x0A; 4096])
}

#[test]
fn a_reconnect_is_answered_only_after_the_old_session_has_drained() {
    let disk = MemoryDisk::new(1 << 20, false);
    let server = start(&disk);
    let mut old = Client::connect(&server.address, "disk");
    disk.hold_writes();
    for block in 0..BLOCKS {
        old.send(&old_block(block));
    }
    disk.wait_for_held(SLOTS);
    drop(old);

    let released = Arc::new(AtomicBool::new(false));
    let mut new = Client::ask(&server.address, "disk");
    let seen = Arc::clone(&released);
    let entering = std::thread::spawn(move || {
        assert!(new.enter(), "the server hung up");
        assert!(seen.load(Ordering::SeqCst), "answered while old requests were in flight");
        new
    });
    std::thread::sleep(Duration::from_millis(50));
    released.store(true, Ordering::SeqCst);
    disk.release_writes();
    let mut new = entering.join().expect("new session");

    let at_answer = disk.written();
    assert_eq!(at_answer.len(), SLOTS, "what was received is done, what was unread is gone");
    for block in 0..BLOCKS {
        new.call(&write(0, block, block * 4096, &[0x0B; 4096]));
    }
    let bytes = disk.bytes(0, BLOCKS as usize * 4096);
    assert!(bytes.iter().all(|byte| *byte == 0x0B), "an old write landed over a new one");
    assert_eq!(
        disk.written().len(),
        SLOTS + BLOCKS as usize,
        "an old write came after the new session had begun"
    );
}

#[test]
fn bytes_of_a_socket_that_its_client_closed_are_stale_while_a_sibling_lives() {
    let disk = MemoryDisk::new(1 << 20, false);
    let server = start(&disk);
    let mut lost = Client::connect(&server.address, "disk");
    let mut sibling = Client::connect(&server.address, "disk");
    assert_ne!(sibling.flags & transmission_flag::CAN_MULTI_CONN, 0);
    disk.hold_writes();
    for block in 0..BLOCKS {
        lost.send(&old_block(block));
    }
    disk.wait_for_held(SLOTS);
    drop(lost);
    disk.release_writes();
    for block in 0..BLOCKS {
        sibling.call(&write(0, block, block * 4096, &[0x0B; 4096]));
    }
    wait_until("the lost socket's end", || server.server.status()[0].sockets == 1);
    let rest = disk.bytes(SLOTS * 4096, (BLOCKS as usize - SLOTS) * 4096);
    assert!(rest.iter().all(|byte| *byte == 0x0B), "an old write landed over a new one");
    assert_eq!(
        disk.written().len(),
        SLOTS + BLOCKS as usize,
        "writes that the closed socket held unread were done"
    );
}

#[test]
fn a_flush_on_one_socket_covers_writes_completed_on_another() {
    let disk = MemoryDisk::new(1 << 20, false);
    let server = start(&disk);
    let mut first = Client::connect(&server.address, "disk");
    let mut second = Client::connect(&server.address, "disk");
    first.call(&write(0, 1, 0, &[1; 512]));
    second.call(&request(command::FLUSH, 0, 2, 0, 0));
    assert_eq!(disk.flushes(), 1);
    assert_eq!(first.call(&request(command::READ, 0, 3, 0, 512)), [1; 512]);
}

#[test]
fn another_process_takes_the_session_over() {
    let disk = MemoryDisk::new(1 << 20, false);
    let server = start(&disk);
    let mut old = Client::connect(&server.address, "disk");
    let status = Command::new("qemu-io").args(["-f", "raw", "-c", "write -P 5 0 4k", &server.uri()]).output();
    let Ok(output) = status else {
        eprintln!("skipped: qemu-io is not installed (package qemu-utils)");
        return;
    };
    assert!(output.status.success(), "{output:?}");
    assert!(old.reply().is_none(), "the old session goes on");
    assert_eq!(disk.bytes(0, 4096), [5; 4096]);
}

#[test]
fn over_tcp_every_handshake_is_a_new_session() {
    let disk = MemoryDisk::new(1 << 20, false);
    let server = start(&disk);
    let any_port = Address::Tcp("127.0.0.1:0".parse().expect("address"));
    let address = server.server.listen(&any_port).expect("listen");
    let mut old = Client::connect(&address, "disk");
    assert_eq!(old.flags & transmission_flag::CAN_MULTI_CONN, 0);
    old.call(&write(0, 1, 0, &[1; 4096]));
    let mut new = Client::connect(&address, "disk");
    assert!(old.reply().is_none(), "the old session goes on");
    assert_eq!(new.call(&request(command::READ, 0, 1, 0, 4096)), [1; 4096]);
}

#[test]
fn readers_of_a_read_only_export_do_not_disturb_each_other() {
    let disk = MemoryDisk::new(1 << 20, true);
    let server = start(&disk);
    let any_port = Address::Tcp("127.0.0.1:0".parse().expect("address"));
    let address = server.server.listen(&any_port).expect("listen");
    let mut readers: Vec<Client> = (0..3).map(|_| Client::connect(&address, "disk")).collect();
    for reader in &mut readers {
        assert_ne!(reader.flags & transmission_flag::CAN_MULTI_CONN, 0);
        assert_ne!(reader.flags & transmission_flag::READ_ONLY, 0);
        assert_eq!(reader.call(&request(command::READ, 0, 1, 0, 4096)), [0; 4096]);
    }
    assert!(server.server.remove_export("disk", Duration::from_secs(30)));
    for reader in &mut readers {
        assert!(reader.reply().is_none());
    }
}

#[test]
fn a_withdrawn_export_lets_go_of_the_disk_and_its_slots() {
    let disk = MemoryDisk::new(1 << 20, false);
    let server = start(&disk);
    let mut client = Client::connect(&server.address, "disk");
    disk.hold_writes();
    client.send(&old_block(1));
    disk.wait_for_held(1);
    assert!(!server.server.remove_export("disk", Duration::from_millis(20)), "a request is in flight");
    disk.release_writes();
    wait_until("the end of the connection", || server.arena.free_count() == server.arena.slot_count());
    assert!(client.reply().is_none());
    assert!(server.server.status().is_empty());
    assert_eq!(Arc::strong_count(&disk), 1);
}

#[test]
fn stop_answers_what_was_received() {
    let disk = MemoryDisk::new(1 << 20, false);
    let server = start(&disk);
    let mut client = Client::connect(&server.address, "disk");
    disk.hold_writes();
    client.send(&old_block(1));
    disk.wait_for_held(1);
    assert!(!server.server.stop(Duration::from_millis(20)));
    disk.release_writes();
    assert!(client.reply().is_some(), "the write in flight was not answered");
    assert!(client.reply().is_none());
    assert!(!server.socket().exists());
}

#[test]
fn the_socket_is_its_owners_and_a_stale_one_is_replaced() {
    let disk = MemoryDisk::new(1 << 20, false);
    let server = start(&disk);
    let mode = std::fs::metadata(server.socket()).expect("socket").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let again = server.server.listen(&server.address);
    assert!(matches!(again, Err(ListenError::InUse { .. })), "{again:?}");

    let stale = server.path("stale.sock");
    drop(std::os::unix::net::UnixListener::bind(&stale).expect("bind"));
    let address = Address::Unix { path: stale, mode: 0o600 };
    server.server.listen(&address).expect("a stale socket is replaced");
    Client::connect(&address, "");

    let file = server.path("file");
    std::fs::write(&file, "precious").expect("file");
    let refused = server.server.listen(&Address::Unix { path: file.clone(), mode: 0o600 });
    assert!(matches!(refused, Err(ListenError::NotASocket { .. })));
    assert_eq!(std::fs::read(&file).expect("file"), b"precious");
}

#[test]
fn without_slots_a_client_is_refused_with_a_reason() {
    let disk = MemoryDisk::new(1 << 20, false);
    let server = start(&disk);
    let settings =
        ExportSettings { name: "starved".to_owned(), description: String::new(), slots_per_connection: 8 };
    let arena = ublk::arena::Arena::new(4096, 1).expect("arena");
    server.server.add_export(settings, Arc::clone(&disk) as _, arena).expect("export");
    let mut client = Client::ask(&server.address, "starved");
    let refused = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || client.enter()));
    let text = *refused.expect_err("let in").downcast::<String>().expect("text");
    assert!(text.contains("no buffers left"), "{text}");
}
