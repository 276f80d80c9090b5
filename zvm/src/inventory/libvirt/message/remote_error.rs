//! What a daemon answers instead of a result.

use super::MAX_TEXT_BYTES;
use super::reply::{DomainRef, NetworkRef};
use crate::inventory::libvirt::xdr::{Reader, XdrError};

/// Longer messages are cut: they go to logs and alerts.
const MAX_MESSAGE_CHARS: usize = 500;

/// Codes of `virErrorNumber` (`virterror.h`) that are told apart.
pub mod code {
    /// The daemon has no such call, or no driver for it.
    pub const NO_SUPPORT: i32 = 3;
    /// The daemon has no connection to a driver.
    pub const NO_CONNECT: i32 = 5;
    /// The connection is read-only.
    pub const OPERATION_DENIED: i32 = 29;
    /// The system refused something; the error's first number is its `errno`.
    pub const SYSTEM_ERROR: i32 = 38;
    /// There is no such domain (any more).
    pub const NO_DOMAIN: i32 = 42;
    /// Authentication failed.
    pub const AUTH_FAILED: i32 = 45;
    /// There is no such pool (any more).
    pub const NO_STORAGE_POOL: i32 = 49;
    /// There is no such volume (any more).
    pub const NO_STORAGE_VOL: i32 = 50;
    /// It can't be done in the object's state, such as off.
    pub const OPERATION_INVALID: i32 = 55;
    /// Authentication was cancelled.
    pub const AUTH_CANCELLED: i32 = 79;
    /// A block copy is under way already.
    pub const BLOCK_COPY_ACTIVE: i32 = 83;
    /// The daemon's access control says no.
    pub const ACCESS_DENIED: i32 = 88;
    /// An XML document doesn't follow its schema.
    pub const XML_INVALID_SCHEMA: i32 = 92;
    /// There is no way to authenticate.
    pub const AUTH_UNAVAILABLE: i32 = 94;
}

/// `ENOENT`.
const NO_SUCH_FILE: i32 = 2;

/// `remote_error`: the daemon's words for why a call failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message} (libvirt error {code})")]
pub struct RemoteError {
    /// `virErrorNumber`, see [`code`].
    pub code: i32,
    /// Its message, one line.
    pub message: String,
    /// Its first number, whose meaning depends on the code.
    pub number: i32,
}

impl RemoteError {
    /// Reads the body of a failed reply.
    pub fn parse(body: &[u8]) -> Result<Self, XdrError> {
        let text = |reader: &mut Reader<'_>| reader.text(MAX_TEXT_BYTES).map(one_line);
        let mut reader = Reader::new(body);
        let code = reader.i32()?;
        let _domain = reader.i32()?;
        let message = reader.optional(text)?.unwrap_or_else(|| "it says no more".into());
        let _level = reader.i32()?;
        reader.optional(DomainRef::read)?;
        for _ in 0..3 {
            reader.optional(text)?;
        }
        let number = reader.i32()?;
        let _second = reader.i32()?;
        reader.optional(NetworkRef::read)?;
        reader.finish()?;
        Ok(Self { code, message, number })
    }

    /// Whether it says that the caller may not do this, or isn't let in.
    pub fn is_refusal(&self) -> bool {
        matches!(
            self.code,
            code::OPERATION_DENIED
                | code::AUTH_FAILED
                | code::AUTH_CANCELLED
                | code::AUTH_UNAVAILABLE
                | code::ACCESS_DENIED
        )
    }

    /// Whether it says that the daemon has no driver for such objects: it was built without, or the driver's own daemon isn't installed (its
    /// socket isn't there).
    pub fn is_no_driver(&self) -> bool {
        matches!(self.code, code::NO_SUPPORT | code::NO_CONNECT)
            || (self.code, self.number) == (code::SYSTEM_ERROR, NO_SUCH_FILE)
    }
}

/// A text of the other side as it may stand in a log.
fn one_line(text: &str) -> String {
    text.chars()
        .take(MAX_MESSAGE_CHARS)
        .map(|character| if character.is_control() { ' ' } else { character })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inventory::libvirt::xdr::Writer;

    fn body(code: i32, message: &str, number: i32) -> Vec<u8> {
        let mut writer = Writer::default().i32(code).i32(10).u32(1).text(message).i32(2).u32(0);
        for _ in 0..3 {
            writer = writer.u32(1).text("a detail");
        }
        writer.i32(number).i32(-1).u32(0).into_bytes()
    }

    #[test]
    fn an_error_is_one_short_line() {
        let long = format!("Domain not found:\n\u{1b}[2J{}", "x".repeat(1000));
        let error = RemoteError::parse(&body(code::NO_DOMAIN, &long, -1)).unwrap();
        assert!(error.message.starts_with("Domain not found:  [2Jxxx"), "{}", error.message);
        assert_eq!(error.message.chars().count(), MAX_MESSAGE_CHARS);
        assert!(!error.is_refusal() && !error.is_no_driver());
    }

    #[test]
    fn a_driver_that_isnt_there_is_no_failure() {
        let words = "Failed to connect socket to '/run/libvirt/virtnetworkd-sock': No such file or directory";
        assert!(RemoteError::parse(&body(code::SYSTEM_ERROR, words, 2)).unwrap().is_no_driver());
        assert!(
            !RemoteError::parse(&body(code::SYSTEM_ERROR, "Permission denied", 13)).unwrap().is_no_driver()
        );
    }
}
