//! Hosts with libvirt: its wire protocol spoken directly, without its library.
//!
//! The layers, from the bytes up: [`xdr`] and [`message`] (frames, calls, replies, events; sans-I/O), `exchange` (which reply belongs to which
//! call), `stream`, [`tls`] and `connection` (bytes over sockets), [`client`] (calls with types), `reading` and [`provider`] (the inventory).
//! Needs libvirt 4.5 or newer at the other end.

pub mod address;
pub mod client;
mod connection;
pub mod domain;
pub mod error;
mod exchange;
pub mod host;
pub mod message;
pub mod pool;
pub mod provider;
mod reading;
pub mod served;
mod stream;
pub mod tls;
pub mod volume;
pub mod xdr;

pub use address::{Address, AddressError};
pub use client::{BlockCopy, Client};
pub use connection::Timeouts;
pub use error::LibvirtError;
pub use provider::{HostSettings, LibvirtHost};
pub use tls::TlsFiles;
