//! What a user says of a vCenter.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

/// Longest user name or password, bytes.
const MAX_CREDENTIAL_BYTES: usize = 1024;

/// A vCenter and how to log in to it.
#[derive(Clone)]
pub struct Settings {
    /// Name of the source, for [`Origin::source`](crate::inventory::Origin).
    pub name: String,
    /// `https://host[:port]`; a path other than `/sdk` is refused.
    pub url: String,
    /// Name of the site that everything in it belongs to.
    pub site: String,
    /// Who logs in, such as `holdfast@vsphere.local`.
    pub user: String,
    /// With which password.
    pub password: Zeroizing<String>,
    /// By what the vCenter is known.
    pub trust: Trust,
    /// How long things may take.
    pub timing: Timing,
}

/// By what a vCenter is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trust {
    /// Nothing: no connection is made, and the error shows the certificate's fingerprint.
    Nothing,
    /// It shows exactly the certificate with this fingerprint, whatever its names and dates.
    Pin(Fingerprint),
    /// Its certificate is of one of the authorities in this PEM file, and is for the host of the URL.
    Authorities(PathBuf),
}

/// How long things may take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timing {
    /// An answer from its request to its end.
    pub call: Duration,
    /// How long the vCenter is asked to hold an answer back until there is news; whole seconds. The call's limit is added to it.
    pub news_wait: Duration,
    /// A reading with all its calls.
    pub reading: Duration,
    /// Between two logins after one was refused: accounts get locked.
    pub login_pause: Duration,
}

/// SHA-256 of a certificate in DER. Its text is 64 hexadecimal digits, with or without colons.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint(pub [u8; 32]);

/// Why settings cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SettingsError {
    /// Not the address of a vCenter.
    #[error("{url:?} is not the address of a vCenter: {reason}; it is https://HOST or https://HOST:PORT")]
    Url {
        /// What was given.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Empty or too long.
    #[error("the {key} has {len_bytes} bytes; 1 to {MAX_CREDENTIAL_BYTES} are taken")]
    Length {
        /// What of the settings.
        key: &'static str,
        /// How long it is.
        len_bytes: usize,
    },
    /// Not a fingerprint.
    #[error("{0:?} is not a SHA-256 fingerprint: give 64 hexadecimal digits, with or without colons")]
    Fingerprint(String),
    /// The file with the authorities cannot be used.
    #[error(
        "cannot use the certificate authorities in {path}: {reason}; give a PEM file with at least one certificate"
    )]
    Authorities {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            call: Duration::from_secs(60),
            news_wait: Duration::from_secs(30),
            reading: Duration::from_secs(600),
            login_pause: Duration::from_secs(60),
        }
    }
}

impl Settings {
    /// The address that calls go to.
    pub(super) fn endpoint(&self) -> Result<String, SettingsError> {
        let bad =
            |reason: &str| SettingsError::Url { url: without_credentials(&self.url), reason: reason.into() };
        let url = reqwest::Url::parse(&self.url).map_err(|error| bad(&error.to_string()))?;
        if url.scheme() != "https" {
            return Err(bad("it does not begin with https://"));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(bad("user and password do not belong into it"));
        }
        if !matches!(url.path(), "/" | "/sdk" | "/sdk/") || url.query().is_some() || url.fragment().is_some()
        {
            return Err(bad("there is something behind the host"));
        }
        let host = url.host_str().ok_or_else(|| bad("it has no host"))?;
        let port = url.port().map_or(String::new(), |port| format!(":{port}"));
        Ok(format!("https://{host}{port}/sdk"))
    }

    /// Checks what can be checked without the vCenter.
    pub(super) fn check_credentials(&self) -> Result<(), SettingsError> {
        for (key, text) in [("user", self.user.as_str()), ("password", self.password.as_str())] {
            if text.is_empty() || text.len() > MAX_CREDENTIAL_BYTES {
                return Err(SettingsError::Length { key, len_bytes: text.len() });
            }
        }
        Ok(())
    }
}

/// The address as it may be shown: a password may stand before an `@`.
fn without_credentials(url: &str) -> String {
    url.rsplit_once('@').map_or_else(|| url.to_owned(), |(_, host)| format!("…@{host}"))
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings")
            .field("name", &self.name)
            .field("url", &without_credentials(&self.url))
            .field("site", &self.site)
            .field("user", &self.user)
            .field("trust", &self.trust)
            .field("timing", &self.timing)
            .finish_non_exhaustive()
    }
}

impl Fingerprint {
    /// That of a certificate in DER.
    pub fn of(der: &[u8]) -> Self {
        Self(Sha256::digest(der).into())
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            write!(f, "{}{byte:02X}", if index == 0 { "" } else { ":" })?;
        }
        Ok(())
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Fingerprint {
    type Err = SettingsError;

    fn from_str(text: &str) -> Result<Self, SettingsError> {
        let bad = || SettingsError::Fingerprint(text.into());
        let digits: Option<Vec<u8>> = text
            .trim()
            .chars()
            .filter(|character| *character != ':')
            .map(|character| character.to_digit(16).and_then(|digit| u8::try_from(digit).ok()))
            .collect();
        let bytes: Vec<u8> = match digits {
            Some(digits) if digits.len() == 64 => {
                digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
            }
            _ => return Err(bad()),
        };
        bytes.try_into().map(Self).map_err(|_| bad())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(url: &str) -> Settings {
        Settings {
            name: "v".into(),
            url: url.into(),
            site: "s".into(),
            user: "u".into(),
            password: Zeroizing::new("hush-hush".into()),
            trust: Trust::Nothing,
            timing: Timing::default(),
        }
    }

    #[test]
    fn an_address_is_a_host_and_perhaps_a_port() {
        for (url, endpoint) in [
            ("https://vc.example", "https://vc.example/sdk"),
            ("https://vc.example:8443/", "https://vc.example:8443/sdk"),
            ("https://[2001:db8::1]:8443/sdk", "https://[2001:db8::1]:8443/sdk"),
        ] {
            assert_eq!(settings(url).endpoint().as_deref(), Ok(endpoint));
        }
        for url in [
            "vc.example",
            "http://vc.example",
            "https://u:p@vc.example",
            "https://u:p@vc example",
            "https://vc.example/ui",
            "https://vc/?a",
        ] {
            let error = settings(url).endpoint().expect_err(url);
            assert!(
                matches!(error, SettingsError::Url { .. }) && !error.to_string().contains("u:p"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_fingerprint_is_read_as_it_is_written_and_as_tools_print_it() {
        let own = Fingerprint::of(b"certificate");
        let text = own.to_string();
        assert_eq!(text.len(), 95);
        for form in [text.clone(), text.replace(':', ""), text.to_lowercase()] {
            assert_eq!(form.parse(), Ok(own));
        }
        for bad in ["", "AB", &text[..text.len() - 1], &text.replace('A', "G").replace('1', "ä")] {
            assert!(bad.parse::<Fingerprint>().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_password_is_not_shown() {
        let settings = settings("https://vc.example");
        assert!(!format!("{settings:?}").contains("hush"));
    }
}
