//! Enrolment: how a VRA gets its certificate from the ZVM with a one-time token.
//!
//! The VRA makes its key and opens a QUIC connection to the ZVM with ALPN [`ALPN`] and no certificate of its own. The ZVM shows its
//! certificate and the site CA's; the VRA trusts it only if the CA's SHA-256 is the one in the token. On one bidirectional stream
//! the VRA then sends an [`EnrollRequest`] and gets an [`EnrollOutcome`], both framed as all control messages are.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{VraId, ZvmId};

/// ALPN of enrolment.
pub const ALPN: &[u8] = b"holdfast-enroll/1";

/// Longest enrolment message, in bytes.
pub const MAX_MESSAGE_BYTES: u32 = 64 << 10;

/// What the VRA sends.
#[derive(Clone, Serialize, Deserialize)]
pub struct EnrollRequest {
    /// The token's secret, 64 hex digits.
    pub secret: String,
    /// The id that the VRA made for itself; the request below asks for it as `urn:holdfast:vra:<uuid>`.
    pub vra: VraId,
    /// The VRA's name.
    pub name: String,
    /// `host:port` at which it listens, if it knows how others reach it.
    pub address: Option<String>,
    /// The VRA's version.
    pub version: String,
    /// Certificate signing request (PKCS #10, PEM), signed with the VRA's key.
    pub csr_pem: String,
}

impl fmt::Debug for EnrollRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EnrollRequest")
            .field("vra", &self.vra)
            .field("name", &self.name)
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

/// What the ZVM answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EnrollOutcome {
    /// A certificate was issued.
    Ok(EnrollReply),
    /// None was.
    Error(EnrollError),
}

/// An issued certificate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnrollReply {
    /// The VRA's certificate (PEM), for the key of the request, with the SAN URI asked for and both extended key usages.
    pub certificate_pem: String,
    /// The site CA's certificate (PEM): the one whose SHA-256 is in the token.
    pub ca_pem: String,
    /// The ZVM that may control the VRA from now on.
    pub zvm: ZvmId,
    /// What the ZVM calls the VRA; an older one doesn't say.
    #[serde(default)]
    pub name: Option<String>,
}

/// Why no certificate was issued.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct EnrollError {
    /// For programs.
    pub code: EnrollErrorCode,
    /// For people.
    pub message: String,
    /// What to do.
    pub remedy: Option<String>,
}

/// What kind of refusal it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EnrollErrorCode {
    /// No such token.
    UnknownToken,
    /// The token was used already.
    TokenUsed,
    /// The token's time is over.
    TokenExpired,
    /// The signing request is not valid, or asks for what it may not have.
    BadRequest,
    /// The VRA's id is revoked.
    Revoked,
    /// The ZVM failed.
    Internal,
    /// A code of a newer ZVM.
    #[serde(other)]
    Other,
}

/// A one-time token: `hfe1-<secret: 64 hex digits>-<SHA-256 of the site CA's certificate in DER: 64 hex digits>`.
///
/// Never shown by `Debug`; [`Token::reveal`] gives the text.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    /// What proves the right to enrol; the ZVM keeps only its SHA-256.
    pub secret: [u8; 32],
    /// Which CA the ZVM must have.
    pub ca_sha256: [u8; 32],
}

impl Token {
    /// The text to hand to the VRA's operator.
    pub fn reveal(&self) -> String {
        format!("{PREFIX}{}-{}", hex(&self.secret), hex(&self.ca_sha256))
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token").field("ca_sha256", &hex(&self.ca_sha256)).finish_non_exhaustive()
    }
}

/// A text that is no token. Doesn't show the text.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "this is no enrolment token: a token begins with \"hfe1-\" and has {TOKEN_LEN} characters, this text has {len}"
)]
pub struct TokenError {
    /// Length of the text, in bytes.
    pub len: usize,
}

impl FromStr for Token {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let parse = || {
            let (secret, ca) = text.trim().strip_prefix(PREFIX)?.split_once('-')?;
            Some(Self { secret: unhex32(secret)?, ca_sha256: unhex32(ca)? })
        };
        parse().ok_or(TokenError { len: text.trim().len() })
    }
}

/// Lower-case hex, two digits a byte.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Exactly 64 hex digits as 32 bytes.
pub fn unhex32(text: &str) -> Option<[u8; 32]> {
    let digits = text.as_bytes();
    if digits.len() != 64 {
        return None;
    }
    let mut bytes = [0; 32];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let high = char::from(pair[0]).to_digit(16)?;
        let low = char::from(pair[1]).to_digit(16)?;
        *byte = u8::try_from(high << 4 | low).ok()?;
    }
    Some(bytes)
}

const PREFIX: &str = "hfe1-";
const TOKEN_LEN: usize = PREFIX.len() + 64 + 1 + 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_reads_back_and_hides_its_secret() {
        let token = Token { secret: [0xab; 32], ca_sha256: [7; 32] };
        assert_eq!(token.reveal().len(), TOKEN_LEN);
        assert_eq!(format!(" {}\n", token.reveal()).parse::<Token>().expect("own form"), token);
        assert!(!format!("{token:?}").contains("abab"));
    }

    #[test]
    fn other_texts_are_refused_without_being_shown() {
        let token = Token { secret: [1; 32], ca_sha256: [2; 32] }.reveal();
        for text in ["", "secret", &token[1..], &token[..token.len() - 1], &token.replace("01", "0g")] {
            let error = text.parse::<Token>().expect_err("no token").to_string();
            assert!(text.is_empty() || !error.contains(text), "{error}");
        }
    }
}
