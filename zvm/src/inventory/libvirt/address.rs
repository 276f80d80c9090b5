//! Where a libvirt daemon is, as `virsh -c` takes it.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// `LIBVIRTD_TCP_PORT`.
const TCP_PORT: u16 = 16509;
/// `LIBVIRTD_TLS_PORT`.
const TLS_PORT: u16 = 16514;
/// The URI by which the daemon itself knows its hypervisor, wherever the client is.
pub(super) const HYPERVISOR_URI: &str = "qemu:///system";
/// Longer ones are no addresses.
const MAX_ADDRESS_BYTES: usize = 4096;

/// Where a libvirt daemon is and how it is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// `qemu:///system`: on this machine, at the socket that libvirt listens at by itself.
    Local,
    /// `qemu+unix:///system?socket=PATH`: on this machine, at this socket.
    Unix {
        /// The socket.
        socket: PathBuf,
    },
    /// `qemu+tcp://HOST[:16509]/system`: neither encrypted nor authenticated.
    Tcp {
        /// Name or IP address, one of version 6 without brackets.
        host: String,
        /// The port.
        port: u16,
    },
    /// `qemu+tls://HOST[:16514]/system`, and `qemu://HOST/system`, which means the same.
    Tls {
        /// Name or IP address that the daemon's certificate must have, one of version 6 without brackets.
        host: String,
        /// The port.
        port: u16,
        /// `?pkipath=FOLDER`: a folder with `cacert.pem`, `clientcert.pem` and `clientkey.pem` instead of the usual places.
        pki_folder: Option<PathBuf>,
    },
}

/// A text that is no address of a libvirt daemon.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{address:?} is no address of a libvirt daemon: {reason}")]
pub struct AddressError {
    /// The text.
    pub address: String,
    /// What is wrong with it and what would be right.
    pub reason: String,
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        parse(text).map_err(|reason| AddressError { address: text.chars().take(200).collect(), reason })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bracketed = |host: &str| if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
        match self {
            Self::Local => f.write_str(HYPERVISOR_URI),
            Self::Unix { socket } => write!(f, "qemu+unix:///system?socket={}", socket.display()),
            Self::Tcp { host, port } => write!(f, "qemu+tcp://{}:{port}/system", bracketed(host)),
            Self::Tls { host, port, pki_folder: None } => {
                write!(f, "qemu+tls://{}:{port}/system", bracketed(host))
            }
            Self::Tls { host, port, pki_folder: Some(folder) } => {
                write!(f, "qemu+tls://{}:{port}/system?pkipath={}", bracketed(host), folder.display())
            }
        }
    }
}

fn parse(text: &str) -> Result<Address, String> {
    if text.len() > MAX_ADDRESS_BYTES {
        return Err(format!("it has more than {MAX_ADDRESS_BYTES} bytes"));
    }
    let (scheme, rest) =
        text.split_once("://").ok_or("give a URI such as qemu:///system or qemu+tls://HOST/system")?;
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, path) = rest.split_once('/').ok_or("it has no path: end it with /system")?;
    let (driver, transport) =
        scheme.split_once('+').map_or((scheme, None), |(driver, transport)| (driver, Some(transport)));
    if driver != "qemu" {
        return Err(format!("the hypervisor is {driver:?}; only qemu is known"));
    }
    if path != "system" {
        return Err(format!("it asks for {path:?}; only the machine's own daemon, /system, can be read"));
    }
    if authority.contains('@') {
        return Err("it has a user's name; nobody logs in by name and password here (SASL): use TLS with a \
                    client certificate"
            .into());
    }
    let query = Query::parse(query)?;
    match (transport, authority) {
        (None, "") => query.none().map(|()| Address::Local),
        (Some("unix"), "") => {
            let [socket] = query.paths(["socket"])?;
            Ok(socket.map_or(Address::Local, |socket| Address::Unix { socket }))
        }
        (Some("unix"), _) => Err("a unix socket is on this machine: leave the host out".into()),
        (Some("tcp"), _) => {
            query.none()?;
            let (host, port) = host_and_port(authority, TCP_PORT)?;
            Ok(Address::Tcp { host, port })
        }
        (None | Some("tls"), _) => {
            let [pki_folder] = query.paths(["pkipath"])?;
            let (host, port) = host_and_port(authority, TLS_PORT)?;
            Ok(Address::Tls { host, port, pki_folder })
        }
        (Some("ssh" | "libssh" | "libssh2"), _) => {
            Err("ssh is not spoken here: use qemu+tls://, or tunnel the \
             socket (ssh -N -L /run/holdfast/HOST.sock:/run/libvirt/libvirt-sock HOST) and give \
             qemu+unix:///system?socket=/run/holdfast/HOST.sock"
                .into())
        }
        (Some(other), _) => Err(format!("it goes over {other:?}; known are unix, tcp and tls")),
    }
}

fn host_and_port(authority: &str, default_port: u16) -> Result<(String, u16), String> {
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, after) = rest.split_once(']').ok_or("its [ has no ]")?;
            (
                host,
                if after.is_empty() {
                    None
                } else {
                    Some(after.strip_prefix(':').ok_or("what follows ] is no port")?)
                },
            )
        }
        None => authority.split_once(':').map_or((authority, None), |(host, port)| (host, Some(port))),
    };
    if host.is_empty() {
        return Err("it names no host".into());
    }
    let port =
        match port {
            None => default_port,
            Some(port) => port.parse().ok().filter(|port| *port > 0).ok_or_else(|| {
                format!("{port:?} is no port (an address of IP version 6 goes in brackets)")
            })?,
        };
    Ok((host.to_owned(), port))
}

/// What stands behind the question mark.
struct Query(Vec<(String, String)>);

impl Query {
    fn parse(text: &str) -> Result<Self, String> {
        let pairs = text.split(['&', ';']).filter(|pair| !pair.is_empty());
        let pairs = pairs.map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            Ok((percent_decoded(key)?, percent_decoded(value)?))
        });
        pairs.collect::<Result<_, String>>().map(Self)
    }

    fn none(self) -> Result<(), String> {
        self.paths([]).map(|[]| ())
    }

    /// The absolute paths under these keys; others than these are errors.
    fn paths<const N: usize>(self, known: [&str; N]) -> Result<[Option<PathBuf>; N], String> {
        let mut paths = [const { None }; N];
        for (key, value) in self.0 {
            let Some(place) =
                known.iter().zip(&mut paths).find_map(|(name, path)| (*name == key).then_some(path))
            else {
                return Err(match key.as_str() {
                    "no_verify" => {
                        "no_verify is not taken: without a look at its certificate the daemon could be anyone"
                            .into()
                    }
                    _ if N == 0 => format!("it takes no parameter, and has {key:?}"),
                    _ => format!("parameter {key:?} is not known; there is {}", known.join(", ")),
                });
            };
            let path = PathBuf::from(value);
            if !path.is_absolute() {
                return Err(format!("{key} must be an absolute path"));
            }
            *place = Some(path);
        }
        Ok(paths)
    }
}

fn percent_decoded(text: &str) -> Result<String, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digit = |byte: Option<u8>| char::from(byte.unwrap_or_default()).to_digit(16);
        let decoded = digit(rest.next()).zip(digit(rest.next())).map(|(high, low)| high * 16 + low);
        let decoded = decoded.and_then(|value| u8::try_from(value).ok());
        bytes.push(decoded.ok_or("its % is not followed by two hexadecimal digits")?);
    }
    String::from_utf8(bytes).map_err(|_| "it is no UTF-8".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tls(host: &str, port: u16, folder: Option<&str>) -> Address {
        Address::Tls { host: host.into(), port, pki_folder: folder.map(PathBuf::from) }
    }

    #[test]
    fn what_virsh_users_know_is_taken() {
        let cases = [
            ("qemu:///system", Address::Local),
            ("qemu+unix:///system", Address::Local),
            (
                "qemu+unix:///system?socket=/run/a%20b/libvirt-sock",
                Address::Unix { socket: "/run/a b/libvirt-sock".into() },
            ),
            ("qemu+tcp://kvm-a/system", Address::Tcp { host: "kvm-a".into(), port: 16509 }),
            ("qemu+tcp://[fe80::1]:7/system", Address::Tcp { host: "fe80::1".into(), port: 7 }),
            ("qemu+tls://kvm-a/system", tls("kvm-a", 16514, None)),
            ("qemu://10.0.0.1/system", tls("10.0.0.1", 16514, None)),
            ("qemu+tls://[::1]/system", tls("::1", 16514, None)),
            ("qemu+tls://kvm-a:99/system?pkipath=/etc/pki/hf", tls("kvm-a", 99, Some("/etc/pki/hf"))),
        ];
        for (text, address) in cases {
            assert_eq!(text.parse(), Ok(address.clone()), "{text}");
            if !text.contains('%') {
                assert_eq!(address.to_string().parse(), Ok(address), "{text}");
            }
        }
    }

    #[test]
    fn others_are_refused_with_the_way_out() {
        let cases = [
            ("kvm-a", "give a URI such as"),
            ("qemu+ssh://root@kvm-a/system", "(SASL): use TLS"),
            ("qemu+ssh://kvm-a/system", "tunnel the socket (ssh -N -L"),
            ("qemu+ext://kvm-a/system", "known are unix, tcp and tls"),
            ("qemu:///session", "only the machine's own daemon"),
            ("qemu+tls://kvm-a", "end it with /system"),
            ("qemu+tls:///system", "it names no host"),
            ("qemu+tls://kvm-a:x/system", "\"x\" is no port"),
            ("qemu+tls://fe80::1/system", "goes in brackets"),
            ("qemu+tls://[fe80::1/system", "[ has no ]"),
            ("qemu+tls://kvm-a/system?no_verify=1", "could be anyone"),
            ("qemu+tcp://kvm-a/system?mode=legacy", "takes no parameter"),
            ("qemu+unix:///system?socket=run", "absolute path"),
            ("qemu+unix:///system?socket=%zz", "hexadecimal"),
            ("qemu+unix://kvm-a/system", "leave the host out"),
            ("xen:///system", "only qemu is known"),
        ];
        for (text, words) in cases {
            let error = text.parse::<Address>().expect_err(text).to_string();
            assert!(error.contains(words) && error.contains(text), "{text}: {error}");
        }
    }
}
