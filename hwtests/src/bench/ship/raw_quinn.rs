//! The peer: one quinn stream over loopback with the same certificates, sending the same bytes to a reader that drops them.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{
    AckFrequencyConfig, ClientConfig, Endpoint, EndpointConfig, ServerConfig, TransportConfig, VarInt,
};
use vra::link::{ALPN, SERVER_NAME, bind_udp};
use vra::pki::{Credentials, Identity, Trust, link_client_tls, link_server_tls};

use super::{Payload, runtime};
use crate::bench::site_ca::SiteCa;

/// Length of one write to the stream, and of one read.
const PIECE_BYTES: usize = 1 << 20;

/// One stream.
pub(super) struct Run<'a> {
    pub(super) ca: &'a SiteCa,
    pub(super) payload: &'a Payload,
    /// How much is sent, in bytes: whole pieces of [`PIECE_BYTES`].
    pub(super) len_bytes: u64,
    /// QUIC's parameters at both ends.
    pub(super) transport: Arc<TransportConfig>,
}

impl Run<'_> {
    /// Sends it to the place that `way` leads from to the other end, and gives the time until that end says that it has read all.
    pub(super) fn send(&self, way: impl FnOnce(SocketAddr) -> Result<SocketAddr>) -> Result<Duration> {
        let (server_id, server) = self.ca.enrol()?;
        let (_, client) = self.ca.enrol()?;
        let (server_runtime, client_runtime) = (runtime()?, runtime()?);
        let server = server_runtime.block_on(async { server_endpoint(&server, &self.transport) })?;
        let address = way(server.local_addr()?)?;
        let reader = server_runtime.spawn(read_and_drop(server, self.len_bytes));
        client_runtime.block_on(async {
            let elapsed = write(&client, Identity::vra(server_id), address, self).await?;
            reader.await??;
            Ok(elapsed)
        })
    }
}

async fn write(
    credentials: &Credentials,
    server: Identity,
    address: SocketAddr,
    run: &Run<'_>,
) -> Result<Duration> {
    let tls = link_client_tls(credentials, Some(server), &Trust::default(), ALPN)?;
    let mut config = ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
    config.transport_config(Arc::clone(&run.transport));
    let endpoint = endpoint(None)?;
    let connection = endpoint.connect_with(config, address, SERVER_NAME)?.await?;
    let (mut send, mut recv) = connection.open_bi().await?;
    let began = Instant::now();
    for offset_bytes in (0..run.len_bytes).step_by(PIECE_BYTES) {
        send.write_all_chunks(&mut [run.payload.part(offset_bytes, PIECE_BYTES)]).await?;
    }
    send.finish()?;
    recv.read_to_end(1).await.context("waiting for the other end")?;
    let elapsed = began.elapsed();
    connection.close(VarInt::from_u32(0), b"");
    endpoint.wait_idle().await;
    Ok(elapsed)
}

async fn read_and_drop(endpoint: Endpoint, len_bytes: u64) -> Result<()> {
    let connection = endpoint.accept().await.context("the endpoint is closed")?.await?;
    let (mut send, mut recv) = connection.accept_bi().await?;
    let mut piece = vec![0; PIECE_BYTES];
    for _ in 0..len_bytes / PIECE_BYTES as u64 {
        recv.read_exact(&mut piece).await?;
    }
    send.write_all(b"!").await?;
    send.finish()?;
    connection.closed().await;
    Ok(())
}

fn server_endpoint(credentials: &Credentials, transport: &Arc<TransportConfig>) -> Result<Endpoint> {
    let tls = link_server_tls(credentials, &Trust::default(), ALPN)?;
    let mut config = ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls)?));
    config.transport_config(Arc::clone(transport));
    endpoint(Some(config))
}

fn endpoint(server: Option<ServerConfig>) -> Result<Endpoint> {
    let socket = bind_udp((Ipv4Addr::LOCALHOST, 0).into())?;
    Ok(Endpoint::new(EndpointConfig::default(), server, socket, Arc::new(quinn::TokioRuntime))?)
}

/// The best that was found for quinn over loopback, written down apart from what the product uses.
pub(super) fn best_on_loopback() -> Arc<TransportConfig> {
    let mut ack = AckFrequencyConfig::default();
    ack.ack_eliciting_threshold(VarInt::from_u32(64));
    let mut config = TransportConfig::default();
    config
        .stream_receive_window(VarInt::from_u32(64 << 20))
        .receive_window(VarInt::from_u32(64 << 20))
        .send_window(128 << 20)
        .initial_mtu(1452)
        .ack_frequency_config(Some(ack));
    Arc::new(config)
}
