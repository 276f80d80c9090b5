//! A real guest with a disk over NBD: frozen by its agent for a checkpoint it is recovered with a clean filesystem, and it goes on whoever
//! dies while it is frozen (D5).

use std::fs;
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hwtests::cache::Cache;
use hwtests::guest_agent::GuestAgent;
use hwtests::initramfs::Job;
use hwtests::kernel::{Kernel, Series};
use hwtests::machine::{AGENT_PORT, Disk, DiskContent, Machine};
use hwtests::mode::Accel;
use hwtests::qemu::Qemu;
use hwtests::site::{Binaries, DiskAt, Door, Side, Site, SiteSettings, Vm};
use hwtests::tool;
use serde_json::{Value, json};
use vra::api::{FreezeGuests, Request, Response, VpgId};
use vra::control::Client;

const VPG: &str = "shop";
const DISK_BYTES: u64 = 256 << 20;
const PATIENCE: Duration = Duration::from_secs(90);

/// Whoever freezes may die: the guest goes on within this time; on a machine that is busy with other tests within a longer one.
fn goes_on_within() -> Duration {
    let is_long = std::env::var_os("HOLDFAST_LONG").is_some();
    Duration::from_secs(if is_long { 10 } else { 40 })
}

/// Of ext4's superblock: its place, and the flag of its features that says that the journal must be replayed (`EXT4_FEATURE_INCOMPAT_RECOVER`).
const SUPERBLOCK_OFFSET_BYTES: u64 = 1024;
const FEATURE_INCOMPAT_OFFSET: usize = 0x60;
const NEEDS_RECOVERY: u32 = 0x4;

#[test]
fn a_guest_that_was_frozen_is_recovered_clean_and_goes_on_whoever_dies() -> Result<()> {
    let folder = Folder::new()?;
    let disk = folder.0.join("disk.raw");
    fs::File::create_new(&disk)?.set_len(DISK_BYTES)?;
    tool::run(Command::new("mkfs.ext4").args(["-q", "-E", "nodiscard"]).arg(&disk))?;
    let binaries = Path::new(env!("CARGO_BIN_EXE_durability")).parent().context("folder")?;
    let mut site = Site::start(Binaries::in_folder(binaries)?, &folder.0.join("site"), &SiteSettings::SMALL)?;
    let vm = Vm { name: "guest", uuid: "5a0e1d52-4a0b-4f5c-9a53-0f5d7b7d0c01".to_owned(), disks: vec![disk] };
    site.write_inventory(std::slice::from_ref(&vm))?;
    let attached = site.attach(&vm, 0, Door::Nbd)?;
    site.protect(VPG, std::slice::from_ref(&vm))?;
    site.wait_for_checkpoint(VPG, 0, PATIENCE.as_secs())?;
    let guest = Guest::start(&folder.0.join("agent.sock"), &attached)?;
    guest.wait_for_steps(20, PATIENCE)?;
    let agent = folder.0.join("agent.sock");
    site.vra(Side::Source, &["guest-agent", vm.name, "--agent-socket", &agent.to_string_lossy()])?;

    let before = guest.steps();
    site.zvm(&["checkpoint", "tag", VPG, "frozen", "--application"])?;
    guest.wait_for_steps(guest.steps() + 5, PATIENCE)?;
    site.zvm(&["checkpoint", "tag", VPG, "running"])?;
    let after = guest.steps() + 1;

    // The manager dies between freezing and thawing.
    kill_zvm_while_frozen(&mut site, &guest)?;
    println!("the guest went on {:?} after the manager's death", guest.goes_on()?);
    site.start_zvm()?;
    let deadline = Instant::now() + goes_on_within();
    while is_noted(&site) {
        ensure!(Instant::now() < deadline, "it stays noted as frozen");
        std::thread::sleep(Duration::from_millis(20));
    }

    // The VRA dies while it is frozen, and is started again as systemd does it.
    let vpg = site.zvm_json(&["vpg", "show", VPG])?;
    let vpg: VpgId = serde_json::from_value(vpg["vpg"]["id"].clone())?;
    freeze(&site, vpg)?;
    guest.stands_still()?;
    site.kill(Side::Source)?;
    let died = Instant::now();
    site.start_vra(Side::Source)?;
    guest.goes_on()?;
    let took = died.elapsed();
    println!("the guest went on {took:?} after the VRA's death");
    ensure!(took < goes_on_within(), "{took:?}");
    guest.stop()?;

    let frozen = Recovered::at(&site, "frozen", &folder.0)?;
    ensure!(!frozen.needs_recovery()?, "the journal of a frozen guest's filesystem must be replayed");
    frozen.check()?;
    let steps = frozen.steps()?;
    ensure!((before..=after).contains(&steps), "{steps} steps, not {before} to {after}");
    let running = Recovered::at(&site, "running", &folder.0)?;
    ensure!(
        running.needs_recovery()?,
        "a running guest's filesystem says that it is clean: the test shows nothing"
    );
    println!("recovered: {steps} steps, clean");
    site.stop()
}

/// Noted by the source VRA: it freezes nobody without.
fn is_noted(site: &Site) -> bool {
    let noted = fs::read_to_string(site.vra_folder(Side::Source).join("state/frozen-guests.json"));
    noted.is_ok_and(|noted| noted.contains("agent.sock"))
}

/// Kills the manager where it has had the guest frozen and not thawed yet.
fn kill_zvm_while_frozen(site: &mut Site, guest: &Guest) -> Result<()> {
    let mut command = site.begin_zvm(&["checkpoint", "tag", VPG, "without-manager", "--application"])?;
    while !is_noted(site) {
        ensure!(command.try_wait()?.is_none(), "the manager was too fast");
        std::thread::sleep(Duration::from_millis(1));
    }
    site.pause_zvm()?;
    guest.stands_still()?;
    site.kill_zvm()?;
    command.wait()?;
    Ok(())
}

/// As the manager asks for it, for as long as can be.
fn freeze(site: &Site, vpg: VpgId) -> Result<()> {
    let socket = site.vra_folder(Side::Source).join("run/vra.sock");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut client = Client::unix(&socket, "test").await?;
        match client.call(Request::FreezeGuests(FreezeGuests { vpg, limit_ms: 8_000 })).await? {
            Response::Guests(told) if told.frozen.len() == 1 => Ok(()),
            other => bail!("{other:?}"),
        }
    })
}

/// A machine under TCG that appends numbers to a file, each made durable before the next, until it is told to end.
struct Guest {
    machine: Option<JoinHandle<Result<()>>>,
    output: Arc<Mutex<Vec<u8>>>,
    agent: PathBuf,
}

impl Guest {
    fn start(agent: &Path, disk: &DiskAt) -> Result<Self> {
        let DiskAt::Nbd { socket, export } = disk else { bail!("not NBD") };
        let content = DiskContent::Nbd { socket: socket.clone(), export: export.clone() };
        let output = Arc::new(Mutex::new(Vec::new()));
        let machine = std::thread::spawn({
            let (agent, output) = (agent.to_path_buf(), Arc::clone(&output));
            move || {
                let cache = Cache::open(None)?;
                let (kernel, qemu) = (Kernel::get(&cache, Series::V6_12, false)?, Qemu::get(&cache)?);
                let package = GuestAgent::get(&cache)?;
                let mut machine = Machine::new(&cache, &qemu, Accel::Tcg, &kernel);
                machine.memory_mib = 768;
                machine.disks = vec![Disk { content, log_writes: false }];
                machine.agent = Some(agent);
                machine.limit = Duration::from_secs(400);
                let script = format!(
                    "mount /dev/vda /mnt\n\
                     qemu-ga --path {AGENT_PORT} --statedir /run &\n\
                     while [ ! -e /run/stop ]; do n=$((n + 1)); echo $n >> /mnt/steps; sync; echo step $n; done\n\
                     umount /mnt"
                );
                let job = Job {
                    argv: vec!["sh".into(), "-ec".into(), script],
                    programs: vec![package.program()],
                    packages: Some(package.packages()),
                    ..Job::default()
                };
                let finished = machine.run(&job, &mut |bytes| {
                    output.lock().expect("not poisoned").extend_from_slice(bytes);
                })?;
                ensure!(finished.exit == 0, "the guest ended with {}: {}", finished.exit, finished.output()?);
                Ok(())
            }
        });
        Ok(Self { machine: Some(machine), output, agent: agent.to_path_buf() })
    }

    /// How many steps it has done.
    fn steps(&self) -> u64 {
        let output = self.output.lock().expect("not poisoned");
        let text = String::from_utf8_lossy(&output);
        let done = text.lines().rev().find_map(|line| line.strip_prefix("step ")?.trim().parse().ok());
        done.unwrap_or(0)
    }

    fn wait_for_steps(&self, count: u64, within: Duration) -> Result<Duration> {
        let began = Instant::now();
        while self.steps() < count {
            let output = String::from_utf8_lossy(&self.output.lock().expect("not poisoned")).into_owned();
            ensure!(began.elapsed() < within, "the guest does nothing within {within:?}: {output}");
            if self.machine.as_ref().is_none_or(JoinHandle::is_finished) {
                bail!("the guest has ended: {output}");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(began.elapsed())
    }

    /// Two steps more: one may have been under way.
    fn goes_on(&self) -> Result<Duration> {
        self.wait_for_steps(self.steps() + 2, goes_on_within())
    }

    /// It is frozen.
    fn stands_still(&self) -> Result<()> {
        // The step that was under way.
        std::thread::sleep(Duration::from_millis(500));
        let before = self.steps();
        std::thread::sleep(Duration::from_millis(1_000));
        ensure!(self.steps() == before, "the guest goes on, from {before} to {}", self.steps());
        Ok(())
    }

    /// Tells it to end, by its agent, and waits for that.
    fn stop(mut self) -> Result<()> {
        let mut stream = UnixStream::connect(&self.agent).context("the agent's socket")?;
        let request = json!({"execute": "guest-exec", "arguments": {"path": "touch", "arg": ["/run/stop"]}});
        std::io::Write::write_all(&mut stream, format!("{request}\n").as_bytes())?;
        let mut answer = [0; 256];
        let len = stream.read(&mut answer)?;
        let answer: Value = serde_json::from_slice(&answer[..len])?;
        ensure!(answer.get("return").is_some(), "{answer}");
        self.machine.take().context("it runs")?.join().expect("no panic")
    }
}

/// A disk as it was at a checkpoint, copied out of a test.
struct Recovered {
    image: PathBuf,
}

impl Recovered {
    fn at(site: &Site, tag: &str, folder: &Path) -> Result<Self> {
        let disks = site.start_test(VPG, tag, Door::Nbd)?;
        let [disk] = disks.as_slice() else { bail!("{disks:?}") };
        let DiskAt::Nbd { socket, export } = &disk.at else { bail!("not NBD") };
        let image = folder.join(format!("{tag}.raw"));
        let uri = format!("nbd+unix:///{export}?socket={}", socket.display());
        tool::run(Command::new("nbdcopy").arg(uri).arg(&image))?;
        site.stop_test(VPG)?;
        Ok(Self { image })
    }

    fn needs_recovery(&self) -> Result<bool> {
        let mut superblock = [0; 1024];
        fs::File::open(&self.image)?.read_exact_at(&mut superblock, SUPERBLOCK_OFFSET_BYTES)?;
        let features = superblock[FEATURE_INCOMPAT_OFFSET..].first_chunk().context("four bytes")?;
        Ok(u32::from_le_bytes(*features) & NEEDS_RECOVERY != 0)
    }

    /// Without changing anything.
    fn check(&self) -> Result<()> {
        tool::run(Command::new("e2fsck").arg("-fn").arg(&self.image)).context("e2fsck")?;
        Ok(())
    }

    /// How many steps are in the file, from 1 on without a gap.
    fn steps(&self) -> Result<u64> {
        let text = tool::run(Command::new("debugfs").args(["-R", "cat /steps"]).arg(&self.image))?;
        for (line, number) in text.lines().zip(1_u64..) {
            ensure!(line == number.to_string(), "step {number} is {line:?}");
        }
        Ok(text.lines().count() as u64)
    }
}

struct Folder(PathBuf);

impl Folder {
    fn new() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("holdfast-real-guest-{}", std::process::id()));
        fs::create_dir_all(path.join("site"))?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
