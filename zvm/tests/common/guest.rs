//! A guest that boots from its disk and counts on it: no kernel, one boot sector.

use std::path::Path;

use super::libvirt_host::TestFolder;

/// Where it counts: a 16-bit number at the begin of this sector.
const COUNTER_SECTOR: u64 = 8;
const SECTOR_BYTES: u64 = 512;

/// Reads the counter's sector, then adds one to it and writes it at each tick of the clock, 18 times a second. What was counted before goes on.
const BOOT_SECTOR: &[u8] = &[
    0xfa, // cli
    0x31,
    0xc0, // xor ax, ax
    0x8e,
    0xd8, // mov ds, ax
    0x8e,
    0xc0, // mov es, ax
    0x8e,
    0xd0, // mov ss, ax
    0xbc,
    0x00,
    0x7c, // mov sp, 0x7c00
    0xfb, // sti
    0x88,
    0x16,
    0x40,
    0x7c, // mov [0x7c40], dl: the drive that it was booted from
    0xbe,
    0x30,
    0x7c, // mov si, 0x7c30: the packet below
    0xb4,
    0x42, // mov ah, 0x42: extended read
    0xcd,
    0x13, // int 0x13
    0xff,
    0x06,
    0x00,
    0x80, // 0x7c18: inc word [0x8000]
    0xbe,
    0x30,
    0x7c, // mov si, 0x7c30
    0xb8,
    0x00,
    0x43, // mov ax, 0x4300: extended write
    0x8a,
    0x16,
    0x40,
    0x7c, // mov dl, [0x7c40]
    0xcd,
    0x13, // int 0x13
    0xf4, // hlt: until the next tick
    0xeb,
    0xed, // jmp 0x7c18
    0x90,
    0x90,
    0x90,
    0x90,
    0x90, // to 0x7c30
    0x10,
    0x00,
    0x01,
    0x00, // packet: 16 bytes, one sector,
    0x00,
    0x80,
    0x00,
    0x00, // from or to 0000:8000,
    COUNTER_SECTOR as u8,
    0,
    0,
    0,
    0,
    0,
    0,
    0,    // at this sector
    0x00, // 0x7c40
];

/// Makes a disk that a guest can boot from.
pub(crate) fn bootable_disk(folder: &TestFolder, name: &str, bytes: u64) -> std::path::PathBuf {
    let path = folder.disk(name, bytes);
    let mut sector = [0; SECTOR_BYTES as usize];
    sector[..BOOT_SECTOR.len()].copy_from_slice(BOOT_SECTOR);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    write_at(&path, &sector);
    path
}

/// How far a guest has counted on a disk.
pub(crate) fn counted(disk: &Path) -> u16 {
    use std::os::unix::fs::FileExt;
    let mut bytes = [0; 2];
    let file = std::fs::File::open(disk).expect("disk");
    file.read_exact_at(&mut bytes, COUNTER_SECTOR * SECTOR_BYTES).expect("the counter's sector");
    u16::from_le_bytes(bytes)
}

/// The same on a disk that is an NBD export.
pub(crate) fn counted_at(uri: &str, folder: &TestFolder) -> u16 {
    let copy = folder.path.join("copy.img");
    let mut convert = std::process::Command::new("qemu-img");
    convert.args(["convert", "-f", "raw", "-O", "raw", uri]).arg(&copy);
    assert!(convert.status().expect("qemu-img").success());
    counted(&copy)
}

fn write_at(path: &Path, bytes: &[u8]) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::options().write(true).open(path).expect("disk");
    file.write_all_at(bytes, 0).expect("boot sector");
}
