//! Sockets and QUIC parameters for fast links.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::sockopt::{RcvBuf, RcvBufForce, SndBuf, SndBufForce};
use nix::sys::socket::{GetSockOpt, SetSockOpt, getsockopt, setsockopt};
use quinn::{AckFrequencyConfig, EndpointConfig, IdleTimeout, TransportConfig, VarInt};
use quinn_proto::HashedConnectionIdGenerator;
use ring::hmac;
use rustls::pki_types::PrivateKeyDer;

use super::LinkError;
use super::congestion::FlooredCubic;

/// Kernel memory asked for each direction of a socket, in bytes.
const SOCKET_BUFFER_BYTES: usize = 32 << 20;

/// UDP payload of a packet: 1500 less IPv6 and UDP headers. Larger ones collapse on loopback with segmentation offload.
const PACKET_BYTES: u16 = 1452;

/// Most bytes in flight on one stream: 10 Gbit/s over 50 ms.
const STREAM_WINDOW_BYTES: u32 = 64 << 20;

/// Most bytes received on one connection and not yet read. Streams that a target has paused stay within it together.
const CONNECTION_WINDOW_BYTES: u32 = 512 << 20;

/// Most streams that a peer may have open: one for each VM, and control.
const MAX_STREAMS: u32 = 4096;

/// Packets between two acknowledgements.
const ACK_THRESHOLD: u32 = 64;

/// Packets that may overtake one before it counts as lost, as many as Linux lets TCP adapt to (`tcp_max_reordering`).
const REORDERED_PACKETS: u32 = 300;

/// The same in round trips. RFC 9002's 9/8 takes each packet that is later than that for a loss. Where delays vary between nothing and twice
/// the mean, and the receiver's delay of its acknowledgement comes on top, three are needed (measured: `./bench link-late`).
const REORDERED_ROUND_TRIPS: f32 = 3.0;

/// Without a packet for so long a connection is lost.
pub(super) const IDLE_TIMEOUT_MS: u32 = 8_000;

/// Time between probes of an idle connection: three can be lost.
const KEEP_ALIVE: Duration = Duration::from_millis(2_000);

/// The QUIC parameters that both sides of a link use.
pub fn transport_config() -> Arc<TransportConfig> {
    let mut ack = AckFrequencyConfig::default();
    ack.ack_eliciting_threshold(VarInt::from_u32(ACK_THRESHOLD));
    let mut config = TransportConfig::default();
    config
        .max_concurrent_bidi_streams(VarInt::from_u32(MAX_STREAMS))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW_BYTES))
        .receive_window(VarInt::from_u32(CONNECTION_WINDOW_BYTES))
        .send_window(u64::from(STREAM_WINDOW_BYTES) * 2)
        .datagram_receive_buffer_size(None)
        .initial_mtu(PACKET_BYTES)
        .ack_frequency_config(Some(ack))
        .packet_threshold(REORDERED_PACKETS)
        .time_threshold(REORDERED_ROUND_TRIPS)
        .congestion_controller_factory(Arc::new(FlooredCubic::default()))
        .max_idle_timeout(Some(IdleTimeout::from(VarInt::from_u32(IDLE_TIMEOUT_MS))))
        .keep_alive_interval(Some(KEEP_ALIVE));
    Arc::new(config)
}

/// An endpoint's parameters for the holder of a private key. A process that takes over its predecessor's socket answers what peers send on the
/// predecessor's connections so that they give those up at once (RFC 9000, section 10.3), not after [`IDLE_TIMEOUT_MS`]: for that its connection
/// ids and reset tokens come from the key, which both have.
pub(super) fn endpoint_config(key: &PrivateKeyDer<'_>) -> EndpointConfig {
    let root = hmac::Key::new(hmac::HMAC_SHA256, key.secret_der());
    let derived = |label: &[u8]| hmac::sign(&root, label);
    let resets = hmac::Key::new(hmac::HMAC_SHA256, derived(b"holdfast/1 stateless reset").as_ref());
    let ids = derived(b"holdfast/1 connection ids");
    let ids = u64::from_le_bytes(*ids.as_ref().first_chunk().expect("SHA-256 has 32 bytes"));
    let mut config = EndpointConfig::new(Arc::new(resets));
    config.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(ids)));
    config
}

/// A UDP socket with large buffers, beyond the host's limits where the process may (`SO_RCVBUFFORCE`, CAP_NET_ADMIN); smaller ones are
/// logged.
///
/// # Errors
/// The operating system's.
pub fn bind_udp(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind(address)?;
    grow(&socket, RcvBufForce, RcvBuf, "receive", "net.core.rmem_max");
    grow(&socket, SndBufForce, SndBuf, "send", "net.core.wmem_max");
    Ok(socket)
}

/// The first address of a `host:port`, preferring the family that `local` can reach.
///
/// # Errors
/// [`LinkError::Resolve`].
pub async fn resolve(host_port: &str, local: SocketAddr) -> Result<SocketAddr, LinkError> {
    let failed = |source| LinkError::Resolve { address: host_port.to_owned(), source };
    let found: Vec<SocketAddr> = tokio::net::lookup_host(host_port).await.map_err(failed)?.collect();
    let reachable = found.iter().find(|address| address.is_ipv4() == local.is_ipv4());
    match (reachable, found.first()) {
        (Some(address), _) => Ok(*address),
        // A socket bound to [::] reaches IPv4 by mapped addresses.
        (None, Some(SocketAddr::V4(address))) if local.is_ipv6() => {
            Ok(SocketAddr::new(address.ip().to_ipv6_mapped().into(), address.port()))
        }
        _ => Err(failed(io::Error::new(
            io::ErrorKind::NotFound,
            "no address of the family that this VRA listens on",
        ))),
    }
}

fn grow<F, P>(socket: &UdpSocket, forced: F, plain: P, direction: &str, limit: &str)
where
    F: SetSockOpt<Val = usize>,
    P: SetSockOpt<Val = usize> + GetSockOpt<Val = usize> + Copy,
{
    if setsockopt(socket, forced, &SOCKET_BUFFER_BYTES).is_ok() {
        return;
    }
    let _ = setsockopt(socket, plain, &SOCKET_BUFFER_BYTES);
    // The kernel doubles what is asked for and tells the double.
    let got = getsockopt(socket, plain).unwrap_or(0) / 2;
    if got < SOCKET_BUFFER_BYTES {
        tracing::warn!(
            got_bytes = got,
            wanted_bytes = SOCKET_BUFFER_BYTES,
            "the UDP {direction} buffer is small: run with CAP_NET_ADMIN, or raise {limit}"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_probes_fit_into_the_idle_time() {
        assert!(KEEP_ALIVE * 3 < Duration::from_millis(IDLE_TIMEOUT_MS.into()));
    }

    #[tokio::test]
    async fn names_resolve_to_the_family_of_the_socket() {
        let v4 = "0.0.0.0:0".parse().expect("address");
        let v6 = "[::]:0".parse().expect("address");
        assert_eq!(resolve("127.0.0.1:5", v4).await.expect("v4").to_string(), "127.0.0.1:5");
        assert_eq!(resolve("127.0.0.1:5", v6).await.expect("mapped").to_string(), "[::ffff:127.0.0.1]:5");
        resolve("[::1]:5", v4).await.expect_err("not reachable");
        let error = resolve("no such host:1", v4).await.expect_err("no host").to_string();
        assert!(error.contains("no such host:1"), "{error}");
    }
}
