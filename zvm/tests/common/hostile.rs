//! A vCenter that means harm: a TLS server that answers each method as it is told.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rustls::ServerConfig;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use zeroize::Zeroizing;
use zvm::inventory::vcenter::{Fingerprint, Settings, Timing, Trust};

/// What is sent for a call.
#[derive(Debug, Clone)]
pub(crate) enum Reply {
    /// The inside of `METHODResponse`.
    Result(String),
    /// A body as it is.
    Body(String),
    /// Bytes of the whole HTTP answer, again and again after the head.
    Endless { head: &'static str, again: String },
    /// One byte a second.
    Drops,
    /// Nothing, and the connection stays open.
    Silence,
}

/// Says what is sent for which call: method and request, and how many calls were there before.
pub(crate) type Script = dyn Fn(&str, &str, usize) -> Option<Reply> + Send + Sync;

/// A hostile vCenter that listens for as long as the test's runtime lives.
pub(crate) struct Hostile {
    address: SocketAddr,
    pub(crate) certificate: Fingerprint,
    /// The same, as PEM. It is its own authority.
    pub(crate) pem: String,
}

impl Hostile {
    /// Starts one. What the script doesn't say is answered as a small vCenter would.
    pub(crate) async fn start(
        script: impl Fn(&str, &str, usize) -> Option<Reply> + Send + Sync + 'static,
    ) -> Self {
        let key = rcgen::KeyPair::generate().expect("key");
        let params = rcgen::CertificateParams::new(["127.0.0.1".to_owned()]).expect("parameters");
        let certificate = params.self_signed(&key).expect("certificate");
        let (pem, certificate) = (certificate.pem(), certificate.der().clone());
        let fingerprint = Fingerprint::of(&certificate);
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .and_then(|builder| builder.with_no_client_auth().with_single_cert(vec![certificate], key))
            .expect("TLS");
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("socket");
        let address = listener.local_addr().expect("address");
        let script: Arc<Script> = Arc::new(script);
        tokio::spawn(async move {
            let calls = Arc::new(std::sync::atomic::AtomicUsize::new(0));
            while let Ok((socket, _)) = listener.accept().await {
                let (acceptor, script, calls) = (acceptor.clone(), script.clone(), calls.clone());
                tokio::spawn(async move {
                    let _ = serve(socket, acceptor, &*script, &calls).await;
                });
            }
        });
        Self { address, certificate: fingerprint, pem }
    }

    /// Settings for it, with short limits.
    pub(crate) fn settings(&self) -> Settings {
        Settings {
            name: "hostile".into(),
            url: format!("https://{}", self.address),
            site: "nowhere".into(),
            user: "u".into(),
            password: Zeroizing::new("p".into()),
            trust: Trust::Pin(self.certificate),
            timing: Timing {
                call: Duration::from_secs(10),
                news_wait: Duration::from_secs(1),
                reading: Duration::from_secs(20),
                login_pause: Duration::from_secs(1),
            },
        }
    }
}

async fn serve(
    socket: TcpStream,
    acceptor: TlsAcceptor,
    script: &Script,
    calls: &std::sync::atomic::AtomicUsize,
) -> std::io::Result<Infallible> {
    let mut stream = acceptor.accept(socket).await?;
    loop {
        let request = request(&mut stream).await?;
        let method = method_of(&request);
        let count = calls.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let reply = script(&method, &request, count).unwrap_or_else(|| usual(&method, &request));
        send(&mut stream, &method, reply).await?;
    }
}

async fn send(stream: &mut TlsStream<TcpStream>, method: &str, reply: Reply) -> std::io::Result<()> {
    let body = match reply {
        Reply::Result(inner) => {
            envelope(&format!("<{method}Response xmlns=\"urn:vim25\">{inner}</{method}Response>"))
        }
        Reply::Body(body) => body,
        Reply::Endless { head, again } => {
            stream.write_all(head.as_bytes()).await?;
            loop {
                stream.write_all(again.as_bytes()).await?;
            }
        }
        Reply::Drops => {
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n").await?;
            loop {
                stream.write_all(b"<").await?;
                stream.flush().await?;
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
        Reply::Silence => std::future::pending().await,
    };
    let head = format!("HTTP/1.1 200 OK\r\nContent-Type: text/xml\r\nContent-Length: {}\r\n\r\n", body.len());
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.flush().await
}

/// A whole request with its body.
async fn request(stream: &mut TlsStream<TcpStream>) -> std::io::Result<String> {
    let mut bytes = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head
                .lines()
                .find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok());
            if body.len() >= length.unwrap_or(0) {
                return Ok(body.to_owned());
            }
        }
        let mut chunk = [0; 4096];
        match stream.read(&mut chunk).await? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            count => bytes.extend_from_slice(&chunk[..count]),
        }
    }
}

fn method_of(request: &str) -> String {
    let inner = request.split("Body><").nth(1).unwrap_or_default();
    inner.split([' ', '>']).next().unwrap_or_default().to_owned()
}

pub(crate) fn envelope(inner: &str) -> String {
    format!(
        "<soapenv:Envelope xmlns:soapenv=\"http://schemas.xmlsoap.org/soap/envelope/\" xmlns:xsi=\"http://www.w3.org/2001/XMLSchema-instance\">\
         <soapenv:Body>{inner}</soapenv:Body></soapenv:Envelope>"
    )
}

/// As a vCenter with one folder, which holds its answer back when there is no news.
fn usual(method: &str, request: &str) -> Reply {
    Reply::Result(match method {
        "RetrieveServiceContent" => "<returnval><rootFolder type='Folder'>group-d1</rootFolder>\
             <propertyCollector type='PropertyCollector'>pc</propertyCollector><viewManager type='ViewManager'>vm</viewManager>\
             <about><apiType>VirtualCenter</apiType><instanceUuid>dbed6e0c-bd88-4ef6-b594-21283e1c677f</instanceUuid></about>\
             <sessionManager type='SessionManager'>sm</sessionManager></returnval>"
            .into(),
        "Login" => "<returnval/>".into(),
        "CreateContainerView" | "CreatePropertyCollector" | "CreateFilter" => {
            "<returnval type='Thing'>thing-1</returnval>".into()
        }
        "WaitForUpdatesEx" if request.contains("<version></version>") => update_set(
            "1",
            "<objectSet><kind>enter</kind><obj type='Folder'>group-1</obj><changeSet><name>name</name><op>assign</op><val>f</val></changeSet></objectSet>",
            false,
        ),
        "WaitForUpdatesEx" if request.contains("<maxWaitSeconds>0<") => String::new(),
        "RetrievePropertiesEx" => "<returnval/>".into(),
        _ => return Reply::Silence,
    })
}

pub(crate) fn update_set(version: &str, objects: &str, is_truncated: bool) -> String {
    format!(
        "<returnval><version>{version}</version><filterSet><filter type='PropertyFilter'>f</filter>{objects}</filterSet>\
         <truncated>{is_truncated}</truncated></returnval>"
    )
}
