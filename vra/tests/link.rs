//! Links, trust and enrolment between real endpoints on loopback.

mod common;
#[path = "../../hwtests/src/relay.rs"]
#[allow(unreachable_pub, reason = "shared with the rig")]
#[allow(dead_code, reason = "a part of it is used here")]
mod relay;

use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::Duration;

use common::{Folder, TestCa};
use quinn::crypto::rustls::QuicServerConfig;
use relay::Relay;
use tokio::sync::mpsc;
use vra::api::enroll::{EnrollError, EnrollErrorCode, EnrollOutcome, EnrollRequest, MAX_MESSAGE_BYTES};
use vra::api::vpg::VraEndpoint;
use vra::api::{ApiError, HelloReply, Request, Response, SetTrust, VraId};
use vra::control::{Caller, Client, ClientError, Handler, read_frame, serve_stream, write_frame};
use vra::link::{Accepted, Link, LinkError, LinkSettings, Peer, StreamKind, open_stream};
use vra::pki::{Credentials, EnrollClientError, Identity, PkiDir, Trust, enroll, enroll_server_tls};

fn bind_at(listen: SocketAddr, credentials: Credentials) -> (Link, mpsc::Receiver<Accepted>) {
    Link::bind(&LinkSettings { listen }, credentials, Trust::default()).expect("bind")
}

fn bind(credentials: Credentials) -> (Link, mpsc::Receiver<Accepted>) {
    bind_at("127.0.0.1:0".parse().expect("address"), credentials)
}

fn peer(link: &Link, id: VraId, to: &Link) -> Peer {
    link.peer(&VraEndpoint { id, address: to.local_address().to_string() })
}

struct OnlyHello(VraId);

impl Handler for OnlyHello {
    async fn handle(&self, _: Caller, request: Request) -> Result<Response, ApiError> {
        assert!(matches!(request, Request::Hello(_)));
        Ok(Response::Hello(HelloReply {
            protocol: 1,
            vra: self.0,
            name: "b".to_owned(),
            version: "1".to_owned(),
            features: vec![],
        }))
    }
}

#[tokio::test]
async fn data_flows_between_vras_and_control_only_from_the_zvm() {
    let ca = TestCa::new();
    let (_, a) = ca.vra();
    let (b_id, b) = ca.vra();
    let a_identity = a.own.identity;
    let (a, _) = bind(a);
    let (b, mut accepted) = bind(b);
    let (zvm, _) = bind(ca.zvm());

    let to_b = peer(&a, b_id, &b);
    let (_, mut send, mut recv) = to_b.open(&a, StreamKind::Data).await.expect("open");
    send.write_all(b"batch").await.expect("send");
    let mut stream = accepted.recv().await.expect("accepted");
    assert_eq!((stream.kind, stream.peer.identity), (StreamKind::Data, a_identity));
    let mut got = [0; 5];
    stream.recv.read_exact(&mut got).await.expect("read");
    stream.send.write_all(&got).await.expect("echo");
    recv.read_exact(&mut got).await.expect("echoed");
    assert_eq!(&got, b"batch");

    let (_, _, mut refused) = to_b.open(&a, StreamKind::Control).await.expect("opens");
    let reset = refused.read(&mut [0; 1]).await.expect_err("a VRA may not control");
    assert!(matches!(reset, quinn::ReadError::Reset(code) if code.into_inner() == 3), "{reset}");

    let server = tokio::spawn(async move {
        let mut stream = accepted.recv().await.expect("accepted");
        assert_eq!(stream.kind, StreamKind::Control);
        serve_stream(&mut stream.recv, &mut stream.send, Caller::Local, &OnlyHello(b_id)).await
    });
    let connection = zvm.connect(Identity::vra(b_id), &b.local_address().to_string()).await.expect("connect");
    let (_send, mut refused) = open_stream(&connection, StreamKind::Group, "b").await.expect("opens");
    let reset = refused.read(&mut [0; 1]).await.expect_err("a ZVM has no checkpoints with VRAs");
    assert!(matches!(reset, quinn::ReadError::Reset(code) if code.into_inner() == 3), "{reset}");
    let client = Client::quic(&connection, "test").await.expect("hello");
    assert_eq!(client.hello().vra, b_id);
    drop(client);
    server.await.expect("no panic").expect("the stream ended well");
}

#[tokio::test]
async fn a_revoked_peer_is_refused_and_its_connections_are_closed() {
    let ca = TestCa::new();
    let (a_id, a) = ca.vra();
    let (b_id, b) = ca.vra();
    let serial = a.own.serial.clone();
    let (a, _) = bind(a);
    let (b, mut accepted) = bind(b);
    let to_b = peer(&a, b_id, &b);
    let (connection, _send, _recv) = to_b.open(&a, StreamKind::Data).await.expect("open");
    let _stream = accepted.recv().await.expect("accepted");

    b.set_trust(SetTrust { version: 1, revoked_serials: vec![serial], revoked_vras: vec![] });
    let closed = LinkError::from_connection("b", connection.closed().await).to_string();
    assert_eq!(closed, "b closed the connection: the certificate is revoked");

    // The handshake may end for the client before the server has seen its certificate.
    let error = match to_b.open(&a, StreamKind::Data).await {
        Ok((connection, _, _)) => LinkError::from_connection("b", connection.closed().await),
        Err(error) => error,
    };
    assert!(matches!(error, LinkError::NotAcceptedByPeer { .. }), "{error:?}");
    assert!(error.to_string().contains("it is revoked; enrol this VRA again"), "{error}");

    let error = b.connect(Identity::vra(a_id), &a.local_address().to_string()).await.expect_err("revoked");
    assert!(error.to_string().ends_with("is not accepted here: it is revoked"), "{error}");
}

#[tokio::test]
async fn certificates_that_are_wrong_are_named_with_a_remedy() {
    let ca = TestCa::new();
    let (a_id, a) = ca.vra();
    let (a, _) = bind(a);
    let at_a = a.local_address().to_string();
    let refusal = async |credentials: Credentials| {
        let (link, _) = bind(credentials);
        let connection = match link.connect(Identity::vra(a_id), &at_a).await {
            Ok(connection) => connection,
            Err(error) => return error.to_string(),
        };
        match Client::quic(&connection, "test").await.expect_err("refused") {
            ClientError::Link(error) => error.to_string(),
            other => format!("{other:?}"),
        }
    };
    let expired = refusal(ca.credentials_with(Identity::zvm(ca.zvm), 7, -10)).await;
    assert!(expired.contains("expired or is not valid yet; compare the clocks"), "{expired}");
    let stranger = refusal(TestCa::new().zvm()).await;
    assert!(stranger.contains("not issued by this site's CA"), "{stranger}");

    let (b, _) = bind(ca.zvm());
    let error = b.connect(Identity::vra(VraId::random()), &at_a).await.expect_err("somebody else");
    assert!(error.to_string().contains("it names somebody else"), "{error}");
    let error = b.connect(Identity::vra(a_id), "127.0.0.1:1").await.expect_err("nobody");
    assert!(error.to_string().contains("no answer from"), "{error}");
}

#[tokio::test]
async fn a_peer_that_comes_back_is_reached_again() {
    let ca = TestCa::new();
    let (_, a) = ca.vra();
    let (b_id, b_credentials) = ca.vra();
    let (a, _) = bind(a);
    let (b, mut accepted) = bind(b_credentials.clone());
    let listen = b.local_address();
    let to_b = peer(&a, b_id, &b);
    let (connection, _, _) = to_b.open(&a, StreamKind::Data).await.expect("open");
    accepted.recv().await.expect("accepted");
    b.close().await;
    connection.closed().await;
    drop((b, accepted));
    // The socket is free once the driver of the old endpoint has gone.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let (_b, mut accepted) = bind_at(listen, b_credentials);
    let opened = tokio::time::timeout(Duration::from_secs(30), async {
        loop {
            if let Ok(opened) = to_b.open(&a, StreamKind::Data).await {
                return opened;
            }
        }
    });
    let _opened = opened.await.expect("in time");
    accepted.recv().await.expect("accepted again");
}

/// The ZVM's side of enrolment, for as many requests as come; a token works once.
#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_takes_over_tells_peers_that_the_connections_before_it_are_gone() {
    let ca = TestCa::new();
    let (_, a) = ca.vra();
    let (b_id, b) = ca.vra();
    let (a, _) = bind(a);
    let (first, mut accepted) = bind(b.clone());
    let listen = first.local_address();
    let relay = Relay::start(listen, 1).expect("relay");
    let endpoint = VraEndpoint { id: b_id, address: relay.address().to_string() };
    let (connection, mut send, _recv) = a.peer(&endpoint).open(&a, StreamKind::Data).await.expect("open");
    let stream = accepted.recv().await.expect("accepted");

    // Killed: nobody hears that it ends.
    relay.cut(true);
    first.close().await;
    drop((first, stream, accepted));
    let second = loop {
        match Link::bind(&LinkSettings { listen }, b.clone(), Trust::default()) {
            Ok(link) => break link,
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    };
    relay.cut(false);
    send.write_all(b"more").await.expect("the connection is thought to stand");
    let reason = connection.closed().await;
    assert!(matches!(reason, quinn::ConnectionError::Reset), "{reason}, not by the silence of the other end");
    drop(second);
}

async fn serve_enrolment(endpoint: quinn::Endpoint, ca: Arc<TestCa>) {
    let mut used = false;
    while let Some(incoming) = endpoint.accept().await {
        let Ok(connection) = incoming.await else { continue };
        let Ok((mut send, mut recv)) = connection.accept_bi().await else { continue };
        let request: EnrollRequest =
            read_frame(&mut recv, MAX_MESSAGE_BYTES).await.expect("frame").expect("request");
        let outcome = if used {
            EnrollOutcome::Error(EnrollError {
                code: EnrollErrorCode::TokenUsed,
                message: "the token was used already".to_owned(),
                remedy: Some("make another token".to_owned()),
            })
        } else {
            EnrollOutcome::Ok(ca.sign(&request.csr_pem, request.vra))
        };
        used = true;
        write_frame(&mut send, &outcome, MAX_MESSAGE_BYTES).await.expect("answer");
        let _ = send.finish();
        connection.closed().await;
    }
}

#[tokio::test]
async fn enrolment_gives_a_certificate_once_and_only_to_the_right_zvm() {
    let ca = Arc::new(TestCa::new());
    let crypto = QuicServerConfig::try_from(enroll_server_tls(&ca.zvm()).expect("TLS")).expect("QUIC");
    let config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    let endpoint =
        quinn::Endpoint::server(config, "127.0.0.1:0".parse().expect("address")).expect("endpoint");
    let address = endpoint.local_addr().expect("address").to_string();
    let server = tokio::spawn(serve_enrolment(endpoint, ca.clone()));

    let folder = Folder::new("enroll");
    let pki = PkiDir::open(&folder.0.join("pki")).expect("folder");
    let vra = VraId::random();
    let stranger = TestCa::new().token();
    let error = enroll(&pki, &address, &stranger, vra, "a", None).await.expect_err("another CA");
    assert!(matches!(error, EnrollClientError::NotTheTokensZvm { .. }), "{error:?}");
    assert!(!pki.is_enrolled());

    let token = ca.token();
    let (credentials, reply) = enroll(&pki, &address, &token, vra, "a", None).await.expect("enrolled");
    assert_eq!((credentials.own.identity, reply.zvm), (Identity::vra(vra), ca.zvm));
    assert_eq!(pki.load().expect("load").own, credentials.own);
    let key = folder.0.join("pki/key.pem");
    assert_eq!(std::fs::metadata(&key).expect("key").mode() & 0o777, 0o600);

    let error = enroll(&pki, &address, &token, vra, "a", None).await.expect_err("used");
    assert_eq!(error.to_string(), "the ZVM refused: the token was used already; make another token");
    server.abort();

    std::fs::set_permissions(&key, std::os::unix::fs::PermissionsExt::from_mode(0o644)).expect("chmod");
    let error = pki.load().expect_err("readable").to_string();
    assert!(error.contains("key.pem can be read by others (mode 0644)"), "{error}");
}
