//! A vCenter that means harm gets an error, within bounds of memory and time.

#[path = "common/hostile.rs"]
mod hostile;

use std::time::{Duration, Instant};

use hostile::{Hostile, Reply, envelope, update_set};
use zvm::inventory::vcenter::{SettingsError, Trust, VCenter};
use zvm::inventory::{Inventory, InventoryError, Provider, Reading};

/// The most memory that a test's process has had, bytes.
fn peak_memory_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("procfs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("peak");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("number") << 10
}

/// Reads what a script answers, everything anew after the first reading.
async fn read(
    script: impl Fn(&str, &str, usize) -> Option<Reply> + Send + Sync + 'static,
) -> Result<Option<Inventory>, InventoryError> {
    let mut provider = VCenter::new(Hostile::start(script).await.settings()).expect("good settings");
    let begun = Instant::now();
    provider.read(Reading::News).await?;
    let result = provider.read(Reading::Whole).await;
    eprintln!("{:?}, {} MiB at most: {result:?}", begun.elapsed(), peak_memory_bytes() >> 20);
    result
}

/// The words of a refusal to use the answer.
fn protocol(result: Result<Option<Inventory>, InventoryError>) -> String {
    match result {
        Err(InventoryError::Protocol { reason, .. }) => reason,
        other => panic!("{other:?}"),
    }
}

fn only(method: &'static str, reply: Reply) -> impl Fn(&str, &str, usize) -> Option<Reply> + Send + Sync {
    move |called, _, _| (called == method).then(|| reply.clone())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_without_an_end_is_not_kept() {
    let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
    let again = format!("10000\r\n{}\r\n", "<a>aaaaaaaaa</a>".repeat(1 << 12));
    let reason = protocol(read(only("RetrievePropertiesEx", Reply::Endless { head, again })).await);
    assert!(reason.contains("longer than"), "{reason}");
    assert!(peak_memory_bytes() < 300 << 20, "{} bytes", peak_memory_bytes());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_length_of_4_gib_is_not_waited_for() {
    let head = "HTTP/1.1 200 OK\r\nContent-Length: 4294967296\r\n\r\n";
    let begun = Instant::now();
    let reason =
        protocol(read(only("RetrieveServiceContent", Reply::Endless { head, again: "<a>".into() })).await);
    assert!(reason.contains("longer than"), "{reason}");
    assert!(begun.elapsed() < Duration::from_secs(5));
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_that_go_round_in_a_circle_end() {
    let page = |called: &str, _: &str, _| {
        let is_page = called.ends_with("RetrievePropertiesEx");
        is_page.then(|| Reply::Result("<returnval><token>again</token></returnval>".into()))
    };
    let reason = protocol(read(page).await);
    assert!(reason.contains("circle"), "{reason}");
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_without_an_end_end_with_the_time_for_a_reading() {
    let page = |called: &str, _: &str, count: usize| {
        let is_page = called.ends_with("RetrievePropertiesEx");
        is_page.then(|| Reply::Result(format!("<returnval><token>{count}</token></returnval>")))
    };
    let mut settings = Hostile::start(page).await.settings();
    settings.timing.reading = Duration::from_secs(2);
    let mut provider = VCenter::new(settings).expect("good settings");
    provider.read(Reading::News).await.expect("a good reading");
    let begun = Instant::now();
    match provider.read(Reading::Whole).await {
        Err(InventoryError::Read { .. }) => assert!(begun.elapsed() < Duration::from_secs(4)),
        // A fast machine comes to the last page that is read.
        Err(InventoryError::Protocol { reason, .. }) => assert!(reason.contains("pages"), "{reason}"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn news_in_parts_without_an_end_end() {
    let parts = |called: &str, request: &str, count: usize| {
        let is_news = called == "WaitForUpdatesEx" && !request.contains("<version></version>");
        is_news.then(|| Reply::Result(update_set(&count.to_string(), "", true)))
    };
    let mut settings = Hostile::start(parts).await.settings();
    settings.timing.reading = Duration::from_secs(2);
    let mut provider = VCenter::new(settings).expect("good settings");
    provider.read(Reading::News).await.expect("a good reading");
    let begun = Instant::now();
    provider.read(Reading::News).await.expect_err("no end");
    assert!(begun.elapsed() < Duration::from_secs(4));
}

#[tokio::test(flavor = "multi_thread")]
async fn elements_within_elements_are_not_followed_for_ever() {
    let deep = envelope(&format!("<RetrievePropertiesExResponse>{}", "<a>".repeat(1 << 20)));
    let reason = protocol(read(only("RetrievePropertiesEx", Reply::Body(deep))).await);
    assert!(reason.contains("nested deeper"), "{reason}");
}

#[tokio::test(flavor = "multi_thread")]
async fn elements_without_number_are_not_kept() {
    let many = envelope(&format!(
        "<RetrievePropertiesExResponse>{}</RetrievePropertiesExResponse>",
        "<a/>".repeat(15 << 20)
    ));
    let reason = protocol(read(only("RetrievePropertiesEx", Reply::Body(many))).await);
    assert!(reason.contains("elements and attributes"), "{reason}");
    assert!(peak_memory_bytes() < 1 << 30, "{} bytes", peak_memory_bytes());
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_that_are_within_one_another_are_read() {
    let object = |kind: &str, id: &str, parent: &str| {
        format!(
            "<objects><obj type='{kind}'>{id}</obj><propSet><name>name</name><val>same</val></propSet>\
             <propSet><name>parent</name><val type='Folder'>{parent}</val></propSet></objects>"
        )
    };
    let objects = [
        object("Folder", "group-1", "group-2"),
        object("Folder", "group-2", "group-1"),
        object("ClusterComputeResource", "domain-1", "domain-2"),
        object("ClusterComputeResource", "domain-2", "domain-1"),
        object("HostSystem", "host-1", "host-1"),
        object("HostSystem", "host-2", "domain-1"),
        object("Network", "network-1", "group-1"),
        object("Network", "network-2", "network-1"),
    ];
    let page = format!("<returnval>{}</returnval>", objects.concat());
    let inventory =
        read(only("RetrievePropertiesEx", Reply::Result(page))).await.expect("a reading").expect("news");
    let names: Vec<&str> = inventory.networks.iter().map(|network| network.name.as_str()).collect();
    assert_eq!(names, ["same (network-1)", "same (network-2)"]);
    assert_eq!(inventory.hosts[0].cluster, None);
    assert_eq!(inventory.hosts[1].cluster.as_deref(), Some("same (domain-1)"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_never_comes_is_an_error() {
    for (method, reply) in [
        ("RetrieveServiceContent", Reply::Silence),
        ("Login", Reply::Drops),
        ("CreateFilter", Reply::Silence),
        ("WaitForUpdatesEx", Reply::Drops),
    ] {
        let mut settings = Hostile::start(only(method, reply)).await.settings();
        settings.timing.call = Duration::from_secs(1);
        let begun = Instant::now();
        let error =
            VCenter::new(settings).expect("good settings").read(Reading::Whole).await.expect_err("no answer");
        let InventoryError::Read { source, .. } = &error else { panic!("{method}: {error:?}") };
        assert!(source.to_string().starts_with(method), "{source}");
        assert!(begun.elapsed() < Duration::from_secs(5), "{method}: {:?}", begun.elapsed());
    }
    // A socket that takes connections and says nothing, not even a handshake.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("socket");
    let mut settings = Hostile::start(|_, _, _| None).await.settings();
    settings.url = format!("https://{}", silent.local_addr().expect("address"));
    settings.timing.call = Duration::from_secs(1);
    let error = VCenter::new(settings).expect("good settings").read(Reading::Whole).await;
    assert!(matches!(error, Err(InventoryError::Read { .. })), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wait_for_news_that_is_never_answered_is_a_lost_session() {
    let mut settings = Hostile::start(|_, _, _| None).await.settings();
    settings.timing.call = Duration::from_secs(1);
    let mut provider = VCenter::new(settings).expect("good settings");
    provider.read(Reading::News).await.expect("a good reading");
    let told = tokio::time::timeout(Duration::from_secs(5), provider.changed()).await;
    told.expect("the loss is told of after the time for the wait and the call");
    assert_eq!(provider.read(Reading::News).await.expect("a new session"), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_vcenter_is_said() {
    for (reply, words) in [
        (Reply::Body("<html>a web server</html>".into()), "not a SOAP envelope"),
        (Reply::Body("\u{0}\u{1}".into()), "well-formed"),
        (
            Reply::Result("<returnval><about><apiType>HostAgent</apiType></about></returnval>".into()),
            "not a vCenter",
        ),
        (Reply::Result(String::new()), "nothing in it"),
    ] {
        let reason = protocol(read(only("RetrieveServiceContent", reply)).await);
        assert!(reason.contains(words), "{reason}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_is_taken_from_its_authority_for_its_host_alone() {
    let (own, other) = (Hostile::start(|_, _, _| None).await, Hostile::start(|_, _, _| None).await);
    let file = std::env::temp_dir().join(format!("zvm-authority-{}.pem", std::process::id()));
    std::fs::write(&file, &own.pem).expect("file");
    let mut settings = own.settings();
    settings.trust = Trust::Authorities(file.clone());
    let mut provider = VCenter::new(settings.clone()).expect("good settings");
    provider.read(Reading::Whole).await.expect("a good reading");

    let elsewhere = other.settings().url;
    let by_another_name = settings.url.replace("127.0.0.1", "localhost");
    for (url, shown) in [(elsewhere, other.certificate), (by_another_name, own.certificate)] {
        settings.url = url;
        let error = VCenter::new(settings.clone()).expect("good settings").read(Reading::Whole).await;
        let Err(InventoryError::Refused { reason, .. }) = error else { panic!("{error:?}") };
        assert!(reason.ends_with(&shown.to_string()), "{reason}");
    }
    std::fs::write(&file, "no certificate").expect("file");
    assert!(matches!(VCenter::new(settings), Err(SettingsError::Authorities { .. })));
    std::fs::remove_file(file).expect("file");
}
