//! The libvirt provider against daemons that lie, flood or say nothing: an error in time, never memory or a panic.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::{sleep, timeout};
use uuid::Uuid;
use vra::report::chain;
use zvm::inventory::libvirt::message::procedure::Procedure;
use zvm::inventory::libvirt::xdr::Writer;
use zvm::inventory::libvirt::{Address, HostSettings, LibvirtHost, Timeouts, TlsFiles};
use zvm::inventory::{InventoryError, Provider, Reading};

/// What a daemon does with a call.
enum Answer {
    /// What a real one would.
    Honest,
    /// This body.
    Body(Vec<u8>),
    /// This body, as an error.
    Error(Vec<u8>),
    /// These bytes, whatever they are.
    Raw(Vec<u8>),
    /// Events without an end.
    Flood,
    /// The honest one, after a while.
    Late(Duration),
    Nothing,
}

/// What a daemon answers to a procedure that is called with a serial.
type Behaviour = dyn Fn(i32, u32) -> Answer + Send + Sync;

/// A daemon with one domain, as far as it behaves.
struct Daemon {
    socket: PathBuf,
    _task: tokio::task::JoinHandle<()>,
}

impl Daemon {
    fn start(behaviour: impl Fn(i32, u32) -> Answer + Send + Sync + 'static) -> Self {
        let socket = std::env::temp_dir().join(format!("zvm-hostile-{}", Uuid::new_v4().simple()));
        let listener = UnixListener::bind(&socket).expect("socket");
        let behaviour: Arc<Behaviour> = Arc::new(behaviour);
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, behaviour.clone()));
            }
        });
        Self { socket, _task: task }
    }

    fn provider(&self) -> LibvirtHost {
        LibvirtHost::new(settings(&self.socket))
    }

    /// The error of a first reading, which has to come soon.
    async fn error(&self) -> InventoryError {
        let started = Instant::now();
        let error = self.provider().read(Reading::Whole).await.expect_err("it is not to be believed");
        assert!(started.elapsed() < Duration::from_secs(5), "{error:?} after {:?}", started.elapsed());
        assert!(chain(&error).contains(&self.socket.display().to_string()), "it names the daemon: {error:?}");
        error
    }

    /// The same, of a daemon that behaves so.
    async fn refused(
        words: &str,
        behaviour: impl Fn(i32, u32) -> Answer + Send + Sync + 'static,
    ) -> InventoryError {
        let error = Self::start(behaviour).error().await;
        assert!(chain(&error).contains(words), "{words}: {error:?}");
        error
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.socket);
    }
}

async fn serve(mut stream: UnixStream, behaviour: Arc<Behaviour>) {
    let mut header = [0; 28];
    while stream.read_exact(&mut header).await.is_ok() {
        let word = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().expect("four bytes"));
        let mut arguments = vec![0; word(0) as usize - header.len()];
        stream.read_exact(&mut arguments).await.expect("arguments");
        let (procedure, serial) = (i32::from_be_bytes(word(12).to_be_bytes()), word(20));
        let bytes = match behaviour(procedure, serial) {
            Answer::Honest => frame(procedure, 1, serial, 0, &honest(procedure)),
            Answer::Body(body) => frame(procedure, 1, serial, 0, &body),
            Answer::Error(body) => frame(procedure, 1, serial, 1, &body),
            Answer::Raw(bytes) => bytes,
            Answer::Flood => {
                let events = network_event().repeat(1000);
                while stream.write_all(&events).await.is_ok() {}
                return;
            }
            Answer::Late(delay) => {
                sleep(delay).await;
                frame(procedure, 1, serial, 0, &honest(procedure))
            }
            Answer::Nothing => continue,
        };
        if stream.write_all(&bytes).await.is_err() {
            return;
        }
    }
}

fn frame(procedure: i32, kind: i32, serial: u32, status: i32, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(28 + body.len()).expect("a frame's length");
    let header = Writer::default().u32(length).u32(0x2000_8086).u32(1);
    let mut frame = header.i32(procedure).i32(kind).u32(serial).i32(status).into_bytes();
    frame.extend(body);
    frame
}

fn network_event() -> Vec<u8> {
    frame(315, 2, 0, 0, &Writer::default().i32(0).text("prod").array(&[7; 16]).i32(2).i32(0).into_bytes())
}

const DOMAIN: Uuid = Uuid::from_u128(7);

fn domain_list(count: u32) -> Vec<u8> {
    let domain = |list: Writer, number: u32| {
        list.text("db").array(Uuid::from_u128(DOMAIN.as_u128() + u128::from(number)).as_bytes()).i32(-1)
    };
    (0..count).fold(Writer::default().u32(count), domain).u32(count).into_bytes()
}

fn domain_xml(uuid: Uuid, more: &str) -> Vec<u8> {
    Writer::default().text(&format!("<domain><name>db</name><uuid>{uuid}</uuid>{more}</domain>")).into_bytes()
}

/// What a daemon with one domain answers.
fn honest(procedure: i32) -> Vec<u8> {
    let is = |of: Procedure| of.number() == procedure;
    if is(Procedure::AuthList) {
        Writer::default().u32(1).i32(0).into_bytes()
    } else if is(Procedure::Open) || is(Procedure::Close) {
        Vec::new()
    } else if is(Procedure::GetCapabilities) {
        Writer::default()
            .text(&format!("<capabilities><host><uuid>{DOMAIN}</uuid></host></capabilities>"))
            .into_bytes()
    } else if is(Procedure::GetHostname) {
        Writer::default().text("kvm-a").into_bytes()
    } else if is(Procedure::ListAllDomains) {
        domain_list(1)
    } else if is(Procedure::ListAllNetworks) || is(Procedure::ListAllStoragePools) {
        Writer::default().u32(0).u32(0).into_bytes()
    } else if is(Procedure::DomainGetXmlDesc) {
        domain_xml(DOMAIN, "")
    } else if is(Procedure::GetAllDomainStats) {
        Writer::default().u32(0).into_bytes()
    } else if is(Procedure::GetLibVersion) {
        Writer::default().u64(9_000_000).into_bytes()
    } else {
        Writer::default().i32(1).into_bytes()
    }
}

/// Honest but in one call.
fn but(
    procedure: Procedure,
    answer: impl Fn(u32) -> Answer + Send + Sync + 'static,
) -> impl Fn(i32, u32) -> Answer + Send + Sync + 'static {
    move |called, serial| if called == procedure.number() { answer(serial) } else { Answer::Honest }
}

#[tokio::test]
async fn one_that_behaves_is_read() {
    let daemon = Daemon::start(|_, _| Answer::Honest);
    let inventory = daemon.provider().read(Reading::Whole).await.expect("a reading").expect("it is new");
    assert_eq!((inventory.vms.len(), inventory.vms[0].uuid), (1, DOMAIN), "the others lie about this one");
}

#[tokio::test]
async fn what_is_no_libvirt_is_said_to_be_none() {
    for bytes in [
        vec![0; 64],
        27_u32.to_be_bytes().repeat(9),
        vec![0xff; 64],
        b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3\r\n".to_vec(),
        b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n".to_vec(),
    ] {
        let error = Daemon::refused("no libvirt does", move |_, _| Answer::Raw(bytes.clone())).await;
        assert!(matches!(error, InventoryError::Protocol { .. }), "{error:?}");
    }
    let mut other_program = frame(66, 1, 1, 0, &[]);
    other_program[4] ^= 1;
    Daemon::refused("instead of libvirt's", move |_, _| Answer::Raw(other_program.clone())).await;
}

#[tokio::test]
async fn replies_that_nobody_asked_for_end_the_connection() {
    let list = Procedure::ListAllDomains;
    Daemon::refused("serial 77", but(list, |_| Answer::Raw(frame(273, 1, 77, 0, &domain_list(1))))).await;
    Daemon::refused(
        "procedure 14",
        but(list, |serial| Answer::Raw(frame(14, 1, serial, 0, &domain_list(1)))),
    )
    .await;
    Daemon::refused("kind 3", but(list, |serial| Answer::Raw(frame(273, 3, serial, 0, &[])))).await;
    Daemon::refused("status 2", but(list, |serial| Answer::Raw(frame(273, 1, serial, 2, &[])))).await;
}

#[tokio::test]
async fn counts_and_lengths_that_lie_are_refused() {
    let endless = || Answer::Body(vec![0xff; 64]);
    let lists = [
        Procedure::AuthList,
        Procedure::ListAllDomains,
        Procedure::ListAllNetworks,
        Procedure::ListAllStoragePools,
        Procedure::GetAllDomainStats,
    ];
    for procedure in lists {
        Daemon::refused("a list of length 4294967295", but(procedure, move |_| endless())).await;
    }
    for procedure in [Procedure::GetHostname, Procedure::GetCapabilities, Procedure::DomainGetXmlDesc] {
        Daemon::refused("a text of length 4294967295", but(procedure, move |_| endless())).await;
    }
    Daemon::refused("its error cannot be read", but(Procedure::Open, |_| Answer::Error(vec![0xff; 64])))
        .await;
    Daemon::refused("too early", but(Procedure::ListAllDomains, |_| Answer::Body(vec![0, 0, 0, 9]))).await;
    let longer = || Answer::Body([domain_list(1), vec![0; 4]].concat());
    Daemon::refused("left behind its end", but(Procedure::ListAllDomains, move |_| longer())).await;
}

#[tokio::test]
async fn definitions_that_cant_be_are_refused() {
    let of_domain = |xml: Vec<u8>| but(Procedure::DomainGetXmlDesc, move |_| Answer::Body(xml.clone()));
    let text = |text: &str| Writer::default().text(text).into_bytes();
    Daemon::refused("not well-formed", of_domain(text("<domain><name>"))).await;
    Daemon::refused("nested deeper", of_domain(text(&"<a>".repeat(100)))).await;
    Daemon::refused("more than 1048576", of_domain(text(&"x".repeat(2 << 20)))).await;
    Daemon::refused("there is no entity", of_domain(text("<domain>&lol;</domain>"))).await;
    Daemon::refused("it is that of domain", of_domain(domain_xml(Uuid::from_u128(1), ""))).await;
    // The count, a domain of 28 bytes twice, the count.
    let twice = [&[0, 0, 0, 2], &domain_list(1)[4..32].repeat(2)[..], &[0, 0, 0, 2]].concat();
    Daemon::refused("one UUID", but(Procedure::ListAllDomains, move |_| Answer::Body(twice.clone()))).await;
    let no_uuid = || Answer::Body(Writer::default().text("<capabilities/>").into_bytes());
    Daemon::refused("set host_uuid", but(Procedure::GetCapabilities, move |_| no_uuid())).await;
}

#[tokio::test]
async fn definitions_together_have_a_limit() {
    let before_mib = resident_mib();
    let padding = format!("<metadata>{}</metadata>", "x".repeat(900 << 10));
    let next = std::sync::atomic::AtomicU32::new(0);
    let daemon = Daemon::start(move |called, _| {
        if called == Procedure::ListAllDomains.number() {
            Answer::Body(domain_list(16_384))
        } else if called == Procedure::DomainGetXmlDesc.number() {
            let number = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            Answer::Body(domain_xml(Uuid::from_u128(DOMAIN.as_u128() + u128::from(number)), &padding))
        } else {
            Answer::Honest
        }
    });
    let mut patient = settings(&daemon.socket);
    patient.timeouts = Timeouts { call_ms: 10_000, inventory_ms: 20_000, ..patient.timeouts };
    let error = LibvirtHost::new(patient).read(Reading::Whole).await.expect_err("it has no end");
    assert!(chain(&error).contains("more than 268435456 bytes together"), "{error:?}");
    assert!(resident_mib() < before_mib + 200, "{} MiB, before {before_mib}", resident_mib());
}

#[tokio::test]
async fn silence_is_an_error_in_time() {
    for procedure in [Procedure::AuthList, Procedure::Open] {
        let error =
            Daemon::refused("no answer to a connection within 300 ms", but(procedure, |_| Answer::Nothing));
        assert!(matches!(error.await, InventoryError::Read { .. }));
    }
    Daemon::refused(
        "no answer to ListAllDomains (273) within 400 ms",
        but(Procedure::ListAllDomains, |_| Answer::Nothing),
    )
    .await;
    let slow = |called: i32, _| {
        if called < 200 { Answer::Honest } else { Answer::Late(Duration::from_millis(300)) }
    };
    Daemon::refused("no answer to all that was asked within 1500 ms", slow).await;

    let mut nobody = LibvirtHost::new(settings(Path::new("/nowhere/libvirt-sock")));
    let error = nobody.read(Reading::Whole).await.expect_err("nobody is there");
    assert!(chain(&error).contains("/nowhere/libvirt-sock: No such file"), "{error:?}");
}

#[tokio::test]
async fn a_daemon_that_dies_without_a_word_is_noticed_when_idle() {
    let silent = Daemon::start(but(Procedure::GetLibVersion, |_| Answer::Nothing));
    let mut provider = silent.provider();
    provider.read(Reading::Whole).await.expect("a reading");
    let started = Instant::now();
    timeout(Duration::from_secs(3), provider.changed()).await.expect("its silence is noticed");
    assert!(started.elapsed() >= Duration::from_millis(400), "it had time to answer");
    let error = provider.read(Reading::News).await.expect_err("it is dead");
    assert!(chain(&error).contains("no answer to a sign of life"), "{error:?}");
    assert!(provider.read(Reading::News).await.expect("a new connection").is_some());

    let alive = Daemon::start(|_, _| Answer::Honest);
    let mut provider = alive.provider();
    provider.read(Reading::Whole).await.expect("a reading");
    let told = timeout(Duration::from_millis(900), provider.changed()).await;
    assert!(told.is_err(), "one that answers is not taken for dead");
}

#[tokio::test]
async fn events_without_an_end_take_no_memory() {
    let before_mib = resident_mib();
    let flood = Daemon::start(but(Procedure::GetCapabilities, |_| Answer::Flood));
    let error = flood.error().await;
    assert!(
        chain(&error).contains("within 1500 ms"),
        "what it can do may take as long as all else: {error:?}"
    );
    let honest_but_loud = Daemon::start(but(Procedure::GetHostname, |serial| {
        Answer::Raw([network_event().repeat(100_000), frame(59, 1, serial, 0, &honest(59))].concat())
    }));
    let mut provider = honest_but_loud.provider();
    assert!(provider.read(Reading::Whole).await.expect("a reading").is_some());
    timeout(Duration::from_secs(1), provider.changed()).await.expect("something happened");
    assert!(resident_mib() < before_mib + 64, "{} MiB, before {before_mib}", resident_mib());
}

fn settings(socket: &Path) -> HostSettings {
    HostSettings {
        source: "kvm".into(),
        address: Address::Unix { socket: socket.into() },
        site: "london".into(),
        vra: None,
        tls: TlsFiles::default(),
        timeouts: Timeouts { connect_ms: 300, call_ms: 400, idle_ms: 100, inventory_ms: 1500 },
    }
}

/// What the process has in memory now.
fn resident_mib() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").expect("statm");
    let pages: u64 = pages.split(' ').nth(1).and_then(|pages| pages.parse().ok()).expect("pages");
    (pages * 4096) >> 20
}
