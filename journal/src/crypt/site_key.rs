//! Keys of a site, which wrap the keys of its journals.

use std::fmt;
use std::sync::Arc;

use ring::hkdf;
use zeroize::Zeroizing;

use super::NoRandom;

/// Names a site key without telling it: the first bytes of a hash of it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SiteKeyId(pub [u8; Self::LEN_BYTES]);

impl SiteKeyId {
    /// Length, in bytes.
    pub const LEN_BYTES: usize = 8;
}

impl fmt::Display for SiteKeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for SiteKeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A site key.
#[derive(Clone)]
pub struct SiteKey {
    id: SiteKeyId,
    secret: Zeroizing<[u8; Self::LEN_BYTES]>,
}

impl SiteKey {
    /// Length of the secret, in bytes.
    pub const LEN_BYTES: usize = 32;

    /// Of this secret.
    pub fn new(secret: Zeroizing<[u8; Self::LEN_BYTES]>) -> Self {
        let mut id = [0; SiteKeyId::LEN_BYTES];
        derive(&*secret, &[], &[b"holdfast site key id 1"], &mut id);
        Self { id: SiteKeyId(id), secret }
    }

    /// A new one.
    ///
    /// # Errors
    /// The system gives no random numbers.
    pub fn random() -> Result<Self, NoRandom> {
        let mut secret = Zeroizing::new([0; Self::LEN_BYTES]);
        let filled = ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), &mut *secret);
        filled.map_err(|_| NoRandom)?;
        Ok(Self::new(secret))
    }

    /// Its name.
    pub fn id(&self) -> SiteKeyId {
        self.id
    }

    pub(super) fn secret(&self) -> &[u8; Self::LEN_BYTES] {
        &self.secret
    }

    /// As a line of a key file. To be kept secret.
    pub fn to_line(&self) -> Zeroizing<String> {
        let mut line = Zeroizing::new(String::with_capacity(LINE_BEGIN.len() + 2 * Self::LEN_BYTES + 1));
        line.push_str(LINE_BEGIN);
        for byte in self.secret.iter() {
            for digit in [byte >> 4, byte & 15] {
                line.push(char::from_digit(u32::from(digit), 16).expect("less than 16"));
            }
        }
        line
    }

    fn from_line(line: &str) -> Option<Self> {
        let digits = line.strip_prefix(LINE_BEGIN)?;
        if digits.len() != 2 * Self::LEN_BYTES || !digits.is_ascii() {
            return None;
        }
        let mut secret = Zeroizing::new([0; Self::LEN_BYTES]);
        for (byte, pair) in secret.iter_mut().zip(digits.as_bytes().chunks(2)) {
            let digit = |at: usize| char::from(pair[at]).to_digit(16);
            *byte = (digit(0)? << 4 | digit(1)?) as u8;
        }
        Some(Self::new(secret))
    }
}

impl fmt::Debug for SiteKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SiteKey({})", self.id)
    }
}

/// How a line of a key file begins; 64 hexadecimal digits follow.
const LINE_BEGIN: &str = "holdfast-site-key-1 ";

/// The site's keys: the first one wraps, any of them opens. Cheap to clone; empty by default.
#[derive(Clone, Debug, Default)]
pub struct SiteKeys(Arc<[SiteKey]>);

/// Why a text is not a key file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyFileError {
    /// A line is no key.
    #[error("line {0} is not a site key: each is `{LINE_BEGIN}` and 64 hexadecimal digits")]
    Line(usize),
    /// There is none.
    #[error("it has no site key")]
    Empty,
}

impl SiteKeys {
    /// These, the one that wraps first.
    pub fn new(keys: Vec<SiteKey>) -> Self {
        Self(keys.into())
    }

    /// A key file: a key in each line, the one that wraps first. Empty lines and those that begin with `#` are passed over.
    ///
    /// # Errors
    /// A line is no key, or there is none. The line itself is not in the error.
    pub fn parse(text: &str) -> Result<Self, KeyFileError> {
        let mut keys = Vec::new();
        for (number, line) in (1..).zip(text.lines().map(str::trim)) {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            keys.push(SiteKey::from_line(line).ok_or(KeyFileError::Line(number))?);
        }
        if keys.is_empty() { Err(KeyFileError::Empty) } else { Ok(Self::new(keys)) }
    }

    /// The key that wraps new journal keys.
    pub fn current(&self) -> Option<&SiteKey> {
        self.0.first()
    }

    /// The one with that name.
    pub fn find(&self, id: SiteKeyId) -> Option<&SiteKey> {
        self.0.iter().find(|key| key.id == id)
    }

    /// All, the one that wraps first.
    pub fn iter(&self) -> impl Iterator<Item = &SiteKey> {
        self.0.iter()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// HKDF-SHA256 (RFC 5869).
pub(super) fn derive(secret: &[u8], salt: &[u8], info: &[&[u8]], into: &mut [u8]) {
    struct Len(usize);
    impl hkdf::KeyType for Len {
        fn len(&self) -> usize {
            self.0
        }
    }
    let key = hkdf::Salt::new(hkdf::HKDF_SHA256, salt).extract(secret);
    let filled = key.expand(info, Len(into.len())).and_then(|okm| okm.fill(into));
    filled.expect("fewer than 255 hashes are asked for");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_file_is_read_back() {
        let keys = [SiteKey::new(Zeroizing::new([1; 32])), SiteKey::random().expect("random")];
        let text = format!("# ours\n{}\n\n  {}\n", *keys[0].to_line(), *keys[1].to_line());
        let read = SiteKeys::parse(&text).expect("two keys");
        assert_eq!(read.iter().map(SiteKey::id).collect::<Vec<_>>(), [keys[0].id(), keys[1].id()]);
        assert_eq!(read.current().map(SiteKey::secret), Some(keys[0].secret()));
    }

    #[test]
    fn a_bad_line_is_named_and_not_shown() {
        for bad in ["holdfast-site-key-1 abc", "0123", "holdfast-site-key-1 zz"] {
            let error = SiteKeys::parse(&format!("#\n{bad}")).expect_err("no key");
            assert_eq!(error, KeyFileError::Line(2));
            assert!(!error.to_string().contains("abc") && !error.to_string().contains("0123"));
        }
        assert_eq!(SiteKeys::parse("# none\n").expect_err("empty"), KeyFileError::Empty);
    }

    #[test]
    fn a_key_is_not_in_its_debug_output() {
        let key = SiteKey::new(Zeroizing::new([0x42; 32]));
        assert!(!format!("{key:?} {}", key.id()).contains("4242"));
    }
}
