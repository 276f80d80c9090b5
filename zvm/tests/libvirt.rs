//! The libvirt provider against real daemons: what it reads is what `virsh` prints, after each change.

mod common;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use common::authority::Authority;
use common::libvirt_host::{HostOptions, TestFolder, TestHost, has_libvirt};
use common::virsh_view::View;
use tokio::sync::mpsc::Receiver;
use tokio::time::{sleep, timeout};
use zvm::inventory::libvirt::message::event::Event;
use zvm::inventory::libvirt::message::remote_error::RemoteError;
use zvm::inventory::libvirt::{Address, BlockCopy, Client, HostSettings, LibvirtHost, Timeouts, TlsFiles};
use zvm::inventory::{DiskKind, Inventory, InventoryError, Power, Provider, Reading};

const MIB: u64 = 1 << 20;

/// A test of this file needs libvirtd.
macro_rules! need_libvirt {
    () => {
        if !has_libvirt() {
            eprintln!("skipped: it takes root, libvirtd, virsh, QEMU and dnsmasq");
            return;
        }
    };
}

fn provider(uri: &str) -> LibvirtHost {
    LibvirtHost::new(settings(uri, TlsFiles::default()))
}

fn settings(uri: &str, tls: TlsFiles) -> HostSettings {
    HostSettings {
        source: "kvm".into(),
        address: uri.parse().expect("an address"),
        site: "london".into(),
        vra: None,
        tls,
        timeouts: Timeouts { connect_ms: 2000, call_ms: 10_000, idle_ms: 300, inventory_ms: 20_000 },
    }
}

async fn read(provider: &mut LibvirtHost) -> Option<Inventory> {
    provider.read(Reading::Whole).await.expect("a reading")
}

/// A domain of 16 MiB that runs nothing.
fn domain(name: &str, devices: &str) -> String {
    format!(
        "<domain type='qemu'><name>{name}</name><memory unit='MiB'>16</memory>\
         <os><type arch='x86_64' machine='pc'>hvm</type></os><features><acpi/></features>\
         <devices>{devices}<memballoon model='none'/></devices></domain>"
    )
}

fn disk(path: &Path, target: &str) -> String {
    format!(
        "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{}'/>\
         <target dev='{target}' bus='virtio'/></disk>",
        path.display()
    )
}

fn nic(mac: &str, network: &str) -> String {
    format!("<interface type='network'><mac address='{mac}'/><source network='{network}'/></interface>")
}

/// A host, what is read of it, and what was read last.
struct Watched {
    host: TestHost,
    provider: LibvirtHost,
    last: Inventory,
}

impl Watched {
    async fn new(host: TestHost) -> Self {
        let mut provider = provider(&host.uri());
        let last = read(&mut provider).await.expect("the first reading is new");
        assert_eq!(View::of_inventory(&last), View::of_virsh(&host));
        Self { host, provider, last }
    }

    /// Nothing is to come from what was before.
    async fn settle(&mut self) {
        while timeout(Duration::from_millis(60), self.provider.changed()).await.is_ok() {}
        self.read().await;
        assert_eq!(self.provider.read(Reading::News).await.expect("a reading"), None, "there was no news");
    }

    async fn read(&mut self) {
        if let Some(inventory) = read(&mut self.provider).await {
            self.last = inventory;
        }
    }

    /// Changes something by `virsh`; the provider tells of it by itself, and reads what virsh prints.
    async fn told(&mut self, virsh: &[&str]) {
        self.settle().await;
        self.host.virsh(virsh);
        self.must_tell(&virsh.join(" ")).await;
    }

    async fn must_tell(&mut self, what: &str) {
        let told = timeout(Duration::from_secs(5), self.provider.changed()).await;
        assert!(told.is_ok(), "nothing was told of: {what}");
        if let Some(inventory) = self.provider.read(Reading::News).await.expect("a reading") {
            self.last = inventory;
        }
        self.must_equal(what).await;
    }

    /// Changes something that libvirt has no event for; the next whole reading has it, and none before.
    async fn not_told(&mut self, virsh: &[&str]) {
        self.settle().await;
        self.host.virsh(virsh);
        let what = virsh.join(" ");
        let news = self.provider.read(Reading::News).await.expect("a reading");
        assert_eq!(news, None, "libvirt has got an event for: {what}");
        self.last = read(&mut self.provider).await.unwrap_or_else(|| panic!("nothing changed by: {what}"));
        assert_eq!(View::of_inventory(&self.last), View::of_virsh(&self.host), "{what}");
    }

    /// Some changes come in several steps.
    async fn must_equal(&mut self, what: &str) {
        let deadline = Instant::now() + Duration::from_secs(3);
        loop {
            let (own, virshs) = (View::of_inventory(&self.last), View::of_virsh(&self.host));
            if own == virshs {
                return;
            }
            assert!(Instant::now() < deadline, "{what}:\nread  {own:#?}\nvirsh {virshs:#?}");
            sleep(Duration::from_millis(50)).await;
            self.read().await;
        }
    }

    fn vm(&self, name: &str) -> &zvm::inventory::Vm {
        self.last.find_vm(name).expect("the VM")
    }
}

#[tokio::test]
async fn the_inventory_follows_what_happens_on_two_hosts() {
    need_libvirt!();
    let folder = TestFolder::new();
    let [host_a, host_b] = ["kvm-a", "kvm-b"].map(|name| TestHost::start(&folder, name));
    let mut a = Watched::new(host_a).await;
    let mut b = Watched::new(host_b).await;
    let (root, extra) = (folder.disk("db.img", 16 * MIB), folder.disk("extra.img", 8 * MIB));
    let network = |name: &str, bridge: &str| {
        let xml = format!("<network><name>{name}</name><bridge name='{bridge}'/></network>");
        folder.file(&format!("{name}.xml"), &xml)
    };
    let (prod, test) = (network("prod", "virbr7"), network("test", "virbr8"));

    a.told(&["net-define", &prod]).await;
    a.told(&["net-start", "prod"]).await;
    a.told(&["net-create", &test]).await;
    b.told(&["net-create", &prod]).await;

    let devices = disk(&root, "vda") + &nic("52:54:00:00:00:0A", "prod");
    a.told(&["define", &folder.file("db.xml", &domain("db", &devices))]).await;
    let vm = a.vm("db");
    assert_eq!((vm.power, vm.disks[0].size_bytes), (Power::Off, Some(16 * MIB)), "of one that is off, too");
    assert_eq!((vm.nics[0].mac.as_str(), vm.nics[0].network.as_str()), ("52:54:00:00:00:0a", "prod"));
    let uuid = vm.uuid;

    let extra_xml = folder.file("extra.xml", &disk(&extra, "vdb"));
    a.not_told(&["attach-device", "db", &extra_xml, "--config"]).await;
    assert_eq!(a.vm("db").disks.len(), 2);
    a.not_told(&["detach-disk", "db", "vdb", "--config"]).await;

    a.told(&["start", "db"]).await;
    a.told(&["suspend", "db"]).await;
    assert_eq!(a.vm("db").power, Power::Paused);
    a.told(&["resume", "db"]).await;
    a.told(&["attach-device", "db", &extra_xml, "--live"]).await;
    assert_eq!(a.vm("db").disks.len(), 2, "what runs counts, not what is defined");
    a.not_told(&["blockresize", "db", "vdb", "12M"]).await;
    assert_eq!(a.vm("db").disk("vdb").and_then(|disk| disk.size_bytes), Some(12 * MIB));
    let other_nic = folder.file("nic.xml", &nic("52:54:00:00:00:0a", "test"));
    a.not_told(&["update-device", "db", &other_nic, "--live"]).await;
    a.not_told(&[
        "update-device",
        "db",
        &folder.file("nic.xml", &nic("52:54:00:00:00:0a", "prod")),
        "--live",
    ])
    .await;

    a.settle().await;
    b.settle().await;
    let (to, through) = (b.host.uri(), format!("unix://{}", folder.path.join("migration").display()));
    let migrate = [
        "migrate",
        "--live",
        "--persistent",
        "--undefinesource",
        "--unsafe",
        "db",
        &to,
        "--migrateuri",
        &through,
    ];
    a.host.virsh(&migrate);
    a.must_tell("migration away").await;
    b.must_tell("migration here").await;
    assert_eq!((a.last.vms.len(), b.last.vms.len()), (0, 1));
    assert_eq!((b.vm("db").uuid, b.vm("db").host.as_str()), (uuid, "kvm-b"), "it is the same VM elsewhere");

    b.told(&["destroy", "db"]).await;
    b.told(&["domrename", "db", "database"]).await;
    assert_eq!(b.vm("database").uuid, uuid);
    b.told(&["undefine", "database"]).await;
    assert!(b.last.vms.is_empty());

    a.told(&["net-destroy", "test"]).await;
    a.told(&["net-destroy", "prod"]).await;
    assert_eq!(a.last.networks.len(), 1, "one that is off is still there");
    a.told(&["net-undefine", "prod"]).await;
    std::fs::create_dir(folder.path.join("images")).expect("folder");
    let target = folder.path.join("images").display().to_string();
    a.told(&["pool-define-as", "images", "dir", "--target", &target]).await;
    assert!(a.last.datastores.is_empty(), "one that is off can't be used");
    a.told(&["pool-start", "images"]).await;
    assert_eq!(
        (a.last.datastores[0].name.as_str(), a.last.datastores[0].path.display().to_string()),
        ("images@kvm-a", target)
    );
    a.told(&["pool-destroy", "images"]).await;
}

#[tokio::test]
async fn a_daemon_that_was_killed_is_read_again_whole() {
    need_libvirt!();
    let folder = TestFolder::new();
    let mut watched = Watched::new(TestHost::start(&folder, "kvm-a")).await;
    for (name, file) in [("db", "db.img"), ("web", "web.img")] {
        let devices = disk(&folder.disk(file, MIB), "vda");
        watched.told(&["define", &folder.file("vm.xml", &domain(name, &devices))]).await;
        watched.told(&["start", name]).await;
    }
    watched.settle().await;
    watched.host.kill_daemon();
    let told = timeout(Duration::from_secs(2), watched.provider.changed()).await;
    assert!(told.is_ok(), "the end of the connection wasn't told");
    let error = watched.provider.read(Reading::News).await.expect_err("it is lost");
    assert!(matches!(error, InventoryError::Read { .. }), "{error:?}");
    let error = watched.provider.read(Reading::News).await.expect_err("nobody is there");
    assert!(vra::report::chain(&error).contains("refused"), "{error:?}");
    watched.host.kill_guest("web");
    watched.host.start_daemon();
    let read = watched.provider.read(Reading::News).await.expect("it is there again");
    watched.last = read.expect("after an error all is new");
    watched.must_equal("the restart").await;
    assert_eq!((watched.vm("db").power, watched.vm("web").power), (Power::On, Power::Off));
    watched.told(&["suspend", "db"]).await;

    watched.settle().await;
    watched.host.stop_daemon();
    let started = Instant::now();
    let mut impatient = settings(&watched.host.uri(), TlsFiles::default());
    impatient.timeouts = Timeouts { connect_ms: 500, call_ms: 1000, idle_ms: 200, inventory_ms: 5000 };
    let error = LibvirtHost::new(impatient).read(Reading::Whole).await.expect_err("it stands still");
    assert!(vra::report::chain(&error).contains("no answer to a connection within 500 ms"), "{error:?}");
    assert!(started.elapsed() < Duration::from_secs(2));
}

#[tokio::test]
async fn disks_are_told_by_their_kinds_also_over_the_read_only_socket() {
    need_libvirt!();
    let folder = TestFolder::new();
    let host = TestHost::start(&folder, "kvm-a");
    let path = |name: &str| folder.path.join(name).display().to_string();
    std::fs::create_dir(folder.path.join("pool")).expect("folder");
    host.virsh(&["pool-create-as", "images", "dir", "--target", &path("pool")]);
    host.virsh(&["vol-create-as", "images", "raw-volume", "3M", "--format", "raw"]);
    host.virsh(&["vol-create-as", "images", "image-volume", "5M", "--format", "qcow2"]);
    let raw = folder.disk("raw.img", MIB);
    let made =
        Command::new("qemu-img").args(["create", "-q", "-f", "qcow2", &path("image.qcow2"), "2M"]).status();
    assert!(made.expect("qemu-img").success());
    let volume = |name: &str, target: &str| {
        format!(
            "<disk type='volume'><source pool='images' volume='{name}'/><target dev='{target}' bus='virtio'/></disk>"
        )
    };
    let devices = [
        disk(&raw, "vda"),
        format!(
            "<disk type='file'><driver name='qemu' type='qcow2'/><source file='{}'/><target dev='vdb' bus='virtio'/></disk>",
            path("image.qcow2")
        ),
        disk(&raw, "vdc").replace("</disk>", "<shareable/></disk>"),
        disk(&raw, "vdd").replace("</disk>", "<readonly/></disk>"),
        volume("raw-volume", "vde"),
        volume("image-volume", "vdf"),
        volume("no-volume", "vdg"),
        "<disk type='network'><driver name='qemu' type='raw'/><source protocol='nbd' name='x'>\
         <host name='10.0.0.7' port='10809'/></source><target dev='vdh' bus='virtio'/></disk>"
            .into(),
        "<disk type='file' device='cdrom'><target dev='hda' bus='ide'/></disk>".into(),
        "<disk type='file' device='floppy'><target dev='fda' bus='fdc'/></disk>".into(),
        "<interface type='bridge'><mac address='52:54:00:00:00:0b'/><source bridge='br-prod'/></interface>"
            .into(),
        "<interface type='user'><mac address='52:54:00:00:00:0c'/></interface>".into(),
        nic("52:54:00:00:00:0d", "nowhere"),
    ];
    host.virsh(&["define", &folder.file("vm.xml", &domain("kinds", &devices.concat()))]);
    let uri = host.uri().replace("libvirt-sock", "libvirt-sock-ro");
    let inventory = read(&mut provider(&uri)).await.expect("the first reading is new");
    let vm = inventory.find_vm("kinds").expect("the VM");
    let disks: Vec<(&str, String, Option<u64>, DiskKind)> = vm
        .disks
        .iter()
        .map(|disk| (disk.name.as_str(), disk.path.display().to_string(), disk.size_bytes, disk.kind))
        .collect();
    let raw = raw.display().to_string();
    assert_eq!(
        disks,
        [
            ("vda", raw.clone(), Some(MIB), DiskKind::Raw),
            ("vdb", path("image.qcow2"), Some(2 * MIB), DiskKind::Image),
            ("vdc", raw.clone(), Some(MIB), DiskKind::Shared),
            ("vdd", raw, Some(MIB), DiskKind::ReadOnly),
            ("vde", path("pool/raw-volume"), Some(3 * MIB), DiskKind::Raw),
            ("vdf", path("pool/image-volume"), Some(5 * MIB), DiskKind::Image),
            ("vdg", "volume:images/no-volume".into(), None, DiskKind::Network),
            ("vdh", "nbd://10.0.0.7:10809/x".into(), None, DiskKind::Network),
        ]
    );
    let networks: Vec<&str> = vm.nics.iter().map(|nic| nic.network.as_str()).collect();
    assert_eq!(networks, ["br-prod", "", ""], "what isn't a network of the inventory is none");
    assert_eq!(
        (inventory.networks[0].name.as_str(), inventory.networks[0].origin.id.as_str()),
        ("br-prod", "")
    );

    let address: Address = uri.parse().expect("an address");
    let (client, _events) =
        Client::connect(&address, &TlsFiles::default(), Timeouts::default()).await.expect("a client");
    let error = client.define_domain(&domain("new", "")).await.expect_err("it is read-only");
    assert!(error.remote().is_some_and(RemoteError::is_refusal), "{error:?}");
    client.close().await;
}

#[tokio::test]
async fn a_running_guests_disk_moves_by_block_copy() {
    need_libvirt!();
    let folder = TestFolder::new();
    let host = TestHost::start(&folder, "kvm-a");
    let (old, new) = (folder.disk("old.img", 4 * MIB), folder.disk("new.img", 4 * MIB));
    std::fs::write(&old, vec![0x5a; 4 << 20]).expect("disk");
    let address: Address = host.uri().parse().expect("an address");
    let (client, mut events) =
        Client::connect(&address, &TlsFiles::default(), Timeouts::default()).await.expect("a client");
    client.subscribe().await.expect("events");
    let vm = client.define_domain(&domain("db", &disk(&old, "vda"))).await.expect("a domain");
    let invalid = client.define_domain(&domain("db2", "<disk type='file'><nonsense/></disk>")).await;
    let error = invalid.expect_err("it doesn't follow the schema").to_string();
    assert!(error.contains("DomainDefineXmlFlags") && error.contains("XML"), "{error}");
    host.virsh(&["start", "db"]);
    let before = client.inactive_domain_xml(&vm).await.expect("its definition");
    assert_eq!(client.block_info(&vm, "vda").await.expect("sizes").capacity_bytes, 4 * MIB);
    assert_eq!(client.block_job(&vm, "vda").await.expect("no job"), None);

    let to_new = disk(&new, "vda");
    let how = BlockCopy { reuse_destination: true, transient_job: true };
    client.block_copy(&vm, "vda", &to_new, how).await.expect("a copy");
    let again = client.block_copy(&vm, "vda", &to_new, how).await.expect_err("one copy at a time");
    assert!(again.remote().is_some(), "{again:?}");
    client.abort_block_job(&vm, "vda").await.expect("the copy's end");
    assert_eq!(client.block_job(&vm, "vda").await.expect("no job"), None);

    client.block_copy(&vm, "vda", &to_new, how).await.expect("a copy");
    let job = client.block_job(&vm, "vda").await.expect("an answer").expect("a job");
    assert_eq!((job.kind, job.bandwidth_bytes_per_s), (2, 0));
    ready(&mut events).await;
    let job = client.block_job(&vm, "vda").await.expect("an answer").expect("a job");
    assert_eq!((job.done, job.end), (4 * MIB, 4 * MIB));
    client.pivot(&vm, "vda").await.expect("the guest on its new disk");
    let inventory = read(&mut provider(&host.uri())).await.expect("a reading");
    assert_eq!(inventory.vms[0].disks[0].path, new);
    assert_eq!(std::fs::read(&new).expect("disk"), vec![0x5a; 4 << 20]);

    let defined = before.replace(&old.display().to_string(), &new.display().to_string());
    assert_eq!(client.define_domain(&defined).await.expect("its definition").uuid, vm.uuid);
    let after = client.inactive_domain_xml(&vm).await.expect("its definition");
    assert!(after.contains("new.img") && !after.contains("old.img"), "{after}");
    client.close().await;
}

/// Waits until a copy has caught up.
async fn ready(events: &mut Receiver<Event>) {
    let wait = async {
        while let Some(event) = events.recv().await {
            if matches!(event, Event::BlockJob { kind: 2, status: 3, .. }) {
                return;
            }
        }
        panic!("the connection has ended");
    };
    timeout(Duration::from_secs(10), wait).await.expect("the copy catches up");
}

/// Runs the test of that name in a network namespace of its own, unless this is there.
fn is_in_own_network(test: &str) -> bool {
    const INSIDE: &str = "HOLDFAST_TEST_OWN_NETWORK";
    if std::env::var_os(INSIDE).is_some() {
        let up = Command::new("ip").args(["link", "set", "lo", "up"]).status();
        assert!(up.expect("ip, of iproute2").success());
        return true;
    }
    let mut command = Command::new("unshare");
    command.args(["--net", "--"]).arg(std::env::current_exe().expect("this test"));
    command.args(["--exact", test, "--nocapture"]).env(INSIDE, "1");
    let status = command.status().expect("unshare, of util-linux");
    assert!(status.success(), "{test} in a network namespace ended with {status}");
    false
}

#[tokio::test]
async fn over_tcp_and_tls_certificates_decide() {
    need_libvirt!();
    if !is_in_own_network("over_tcp_and_tls_certificates_decide") {
        return;
    }
    let folder = TestFolder::new();
    let (ours, others) = (Authority::new(), Authority::new());
    let pki = |name: &str| {
        let path = folder.path.join(name);
        std::fs::create_dir_all(&path).expect("folder");
        path
    };
    let server = pki("server");
    ours.issue(&server, "server", &["localhost"]);
    ours.issue(&pki("good"), "client", &["zvm"]);
    others.issue(&pki("stranger"), "client", &["zvm"]);
    std::fs::copy(pki("good").join("cacert.pem"), pki("stranger").join("cacert.pem")).expect("copy");
    ours.issue(&pki("distrustful"), "client", &["zvm"]);
    others.write_certificate(&pki("distrustful"));

    let config = format!(
        "listen_tcp = 1\nlisten_tls = 1\nlisten_addr = \"127.0.0.1\"\nauth_tcp = \"none\"\n\
         key_file = \"{server}/serverkey.pem\"\ncert_file = \"{server}/servercert.pem\"\nca_file = \"{server}/cacert.pem\"\n",
        server = server.display()
    );
    let host = TestHost::start_with(
        &folder,
        "kvm-a",
        &HostOptions { in_tests_network: true, config, ..HostOptions::default() },
    );
    let mut tcp =
        Watched { provider: provider("qemu+tcp://127.0.0.1/system"), last: Inventory::default(), host };
    tcp.read().await;
    tcp.told(&["define", &folder.file("vm.xml", &domain("db", &disk(&folder.disk("db.img", MIB), "vda")))])
        .await;

    let tls = |uri: &str, folder: &str| LibvirtHost::new(settings(uri, TlsFiles::in_folder(&pki(folder))));
    let mut good = tls("qemu+tls://localhost/system", "good");
    assert_eq!(read(&mut good).await.expect("a reading"), tcp.last);
    tcp.host.virsh(&["undefine", "db"]);
    timeout(Duration::from_secs(2), good.changed()).await.expect("events come over TLS, too");
    let by_folder = format!("qemu+tls://localhost:16514/system?pkipath={}", pki("good").display());
    assert!(read(&mut provider(&by_folder)).await.is_some());

    let refused = async |mut provider: LibvirtHost, words: &str| {
        let started = Instant::now();
        let error = provider.read(Reading::Whole).await.expect_err(words);
        assert!(matches!(error, InventoryError::Refused { .. }), "{error:?}");
        assert!(error.to_string().contains(words), "{words}: {error}");
        assert!(started.elapsed() < Duration::from_secs(3), "{words}");
    };
    refused(tls("qemu+tls://localhost/system", "stranger"), "doesn't accept the client's certificate").await;
    refused(tls("qemu+tls://localhost/system", "distrustful"), "the daemon's certificate is not accepted")
        .await;
    refused(tls("qemu+tls://127.0.0.1/system", "good"), "not valid for name").await;

    let error =
        tls("qemu+tls://localhost/system", "nowhere").read(Reading::Whole).await.expect_err("no files");
    assert!(vra::report::chain(&error).contains("nowhere/cacert.pem cannot be used for TLS"), "{error:?}");
    let error = tls("qemu+tls://localhost:16509/system", "good")
        .read(Reading::Whole)
        .await
        .expect_err("no TLS there");
    assert!(matches!(error, InventoryError::Read { .. }), "{error:?}");
}
