//! A guest that boots from its disk and counts on it: no kernel, one boot sector. Included by the manager's tests, too.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

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

/// Makes a disk one that such a guest can boot from.
///
/// # Errors
/// It can't be written.
pub fn make_bootable(disk: &Path) -> io::Result<()> {
    let mut sector = [0; SECTOR_BYTES as usize];
    sector[..BOOT_SECTOR.len()].copy_from_slice(BOOT_SECTOR);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    File::options().write(true).open(disk)?.write_all_at(&sector, 0)
}

/// How far a guest has counted on a disk.
///
/// # Errors
/// It can't be read.
pub fn counted_on(disk: &Path) -> io::Result<u16> {
    let mut bytes = [0; 2];
    File::open(disk)?.read_exact_at(&mut bytes, COUNTER_SECTOR * SECTOR_BYTES)?;
    Ok(u16::from_le_bytes(bytes))
}
