//! A guest of libvirt's whose disk a VRA serves as a ublk device because of `zvm protect`, from its first boot on it to the way back.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use super::ublk::Mount;
use crate::counting_guest::{counted_on, make_bootable};
use crate::site::{Binaries, DiskAt, Door, Side, Site, SiteSettings, time_of};
use crate::suite::context::{Background, Context};
use crate::suite::ublk::list;
use crate::suite::{Body, Case, MachineNeeds, Need};

/// The disk takes the site's files, with room for the journal's limit.
const MACHINE: MachineNeeds = MachineNeeds { memory_mib: 3000, disks_mib: &[4000], runs_guests: true };

pub(super) const CASES: &[Case] = &[Case::new(
    "protect-guest-by-ublk",
    "A guest boots from the ublk device that `zvm protect` gave it, is recovered at two checkpoints, and has its plain disk again after `zvm unprotect`.",
    Body::Inside(protect),
)
.needs(&[Need::Tool("vra"), Need::Tool("zvm"), Need::Tool("libvirtd"), Need::Tool("virsh"), Need::Tool("qemu-system-x86_64")])
.machine(MACHINE)
.once()
.limit_s(900)];

/// How long libvirt and a guest may take for anything, emulated on an emulated machine.
const PATIENCE_S: u64 = 300;

const DISK_BYTES: u64 = 16 << 20;
const VPG: &str = "shop";

/// The first process of a host's namespaces; its end is that of all guests. It is bash, as that takes leave of orphans that have ended, which
/// libvirtd waits for.
const HOST: &str = r#"
set -eu
dir=$1
ip link set lo up
hostname kvm
for place in etc:/etc/libvirt lib:/var/lib/libvirt run:/run/libvirt cache:/var/cache/libvirt log:/var/log/libvirt; do
    mkdir -p "${place#*:}"
    mount --bind "$dir/${place%%:*}" "${place#*:}"
done
libvirtd -f /etc/libvirt/libvirtd.conf -p /run/libvirt/libvirtd.pid &
wait
"#;

const QEMU_CONF: &str = r#"
user = "+0"
group = "+0"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
namespaces = []
cgroup_controllers = []
stdio_handler = "file"
"#;

const LIBVIRTD_CONF: &str = r#"
host_uuid = "3f1f9e0c-6a55-4a3e-8d0e-0f3c5d0a6b02"
unix_sock_dir = "/run/libvirt"
auth_unix_rw = "none"
auth_unix_ro = "none"
"#;

fn protect(context: &mut Context) -> Result<()> {
    let folder = context.path("site");
    // Direct I/O needs a real filesystem below disks and journals, which the machine's own root is not.
    context.run(&["mkfs.ext4", "-q", "-F", context.disk(0)])?;
    let place = folder.to_string_lossy();
    let _mount = Mount::new(context, context.disk(0), &place)?;
    let mut lab = Lab::start(context, &folder)?;
    let outcome = lab.protect_and_unprotect().and_then(|()| lab.site.stop());
    if outcome.is_err() {
        for name in ["host-a.log", "host-b.log", "zvm.log"] {
            let text = fs::read_to_string(folder.join(name)).unwrap_or_default();
            context.note(format_args!("end of {name}:\n{}", crate::tool::tail(&text, 30)));
        }
        context.note(format_args!("libvirtd:\n{}", lab.host.output()));
    }
    outcome
}

/// A host with a guest called db that is off, its VRA, another one that keeps journals, and the manager.
struct Lab<'a> {
    context: &'a Context,
    site: Site,
    host: Background,
    uri: String,
    disk: PathBuf,
}

impl<'a> Lab<'a> {
    fn start(context: &'a Context, folder: &Path) -> Result<Self> {
        let (host, uri) = start_host(context, &folder.join("kvm"))?;
        let settings = SiteSettings { scratch_mib: 64, ..SiteSettings::SMALL };
        let site = Site::start(Binaries::beside_this_one()?, folder, &settings)?;
        site.write_inventory(&[])?;
        let disk = folder.join("db.img");
        File::create_new(&disk)?.set_len(DISK_BYTES)?;
        make_bootable(&disk)?;
        let lab = Self { context, site, host, uri, disk };
        let xml = format!(
            "<domain type='qemu'><name>db</name><memory unit='MiB'>16</memory>\
             <os><type arch='x86_64' machine='pc'>hvm</type></os><features><acpi/></features>\
             <devices><disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{}'/>\
             <target dev='vda' bus='virtio'/><boot order='1'/></disk><video><model type='none'/></video></devices></domain>",
            lab.disk.display()
        );
        let file = folder.join("db.xml");
        fs::write(&file, xml)?;
        lab.virsh(&["define", &file.to_string_lossy()])?;
        lab.site.zvm(&[
            "source",
            "add",
            "libvirt",
            "kvm",
            "--site",
            "production",
            "--address",
            &lab.uri,
            "--vra",
            "host-a",
            "--reread",
            "1s",
        ])?;
        context.wait_for("the VM", PATIENCE_S, || Ok(lab.vm().ok()))?;
        Ok(lab)
    }

    fn protect_and_unprotect(&self) -> Result<()> {
        let before = self.definition()?;
        let told = self.site.zvm(&["protect", "db"])?;
        ensure!(told.contains("/dev/"), "it was told: {told}");
        self.context.note(told);
        ensure!(list()?.len() == 1, "instead of one device there are {:?}", list()?);
        self.virsh(&["start", "db"])?;
        self.counts_on(0)?;
        let source = self.virsh(&["domblklist", "db"])?;
        ensure!(source.contains("/dev/holdfast/"), "the guest has {source}");
        self.context.wait_for("the inventory to know who serves the guest", PATIENCE_S, || {
            Ok((self.vm()?["disks"][0]["served"] == true).then_some(()))
        })?;

        let group = [
            "vpg",
            "create",
            VPG,
            "--vm",
            "db",
            "--target",
            Side::Target.name(),
            "--datastore",
            "recovery-store",
        ];
        let limits = ["--journal-limit", "1GiB", "--checkpoint-interval", "1s"];
        self.site.zvm(&[&group[..], &limits].concat())?;
        self.site.wait_for_checkpoint(VPG, 0, PATIENCE_S)?;
        let first = self.tag("first")?;
        self.counts_on(20)?;
        let second = self.tag("second")?;
        for (tag, [from, until]) in [("first", first), ("second", second)] {
            let count = self.recovered(tag)?;
            self.context.note(format_args!("{tag}: {count}, between {from} and {until}"));
            ensure!((from..=until).contains(&count), "{tag} has {count}, not between {from} and {until}");
        }

        self.site.zvm(&["vpg", "delete", VPG])?;
        self.site.zvm(&["unprotect", "db"])?;
        self.counts_on(0)?;
        ensure!(list()?.len() == 1, "the guest still uses its device");
        self.virsh(&["destroy", "db"])?;
        self.context
            .wait_for("the end of the serving", PATIENCE_S, || Ok(list()?.is_empty().then_some(())))?;
        let after = self.definition()?;
        ensure!(after == before, "the definition was\n{before}\nand is\n{after}");
        self.virsh(&["start", "db"])?;
        self.counts_on(0)?;
        self.virsh(&["destroy", "db"]).map(drop)
    }

    /// Takes a checkpoint: how far the guest had counted before and after it.
    fn tag(&self, tag: &str) -> Result<[u16; 2]> {
        let before = counted_on(&self.disk)?;
        let tagged = self.site.zvm_json(&["checkpoint", "tag", VPG, tag])?;
        let after = counted_on(&self.disk)?;
        // Checkpoints arrive in their order.
        self.site.wait_for_checkpoint(VPG, time_of(&tagged)? - 1, PATIENCE_S)?;
        Ok([before, after])
    }

    /// How far the guest had counted at a checkpoint.
    fn recovered(&self, tag: &str) -> Result<u16> {
        let disks = self.site.start_test(VPG, tag, Door::Ublk)?;
        let [disk] = disks.as_slice() else { bail!("the test shows {} disks instead of one", disks.len()) };
        let DiskAt::Ublk { path, .. } = &disk.at else { bail!("not a ublk device") };
        let count = counted_on(path)?;
        self.site.stop_test(VPG)?;
        Ok(count)
    }

    /// Waits until the guest has written so much more.
    fn counts_on(&self, more: u16) -> Result<()> {
        let so_far = counted_on(&self.disk)?;
        self.context.wait_for("the guest to count on", PATIENCE_S, || {
            Ok((counted_on(&self.disk)? > so_far + more).then_some(()))
        })
    }

    fn definition(&self) -> Result<String> {
        self.virsh(&["dumpxml", "db", "--inactive", "--security-info"])
    }

    fn vm(&self) -> Result<serde_json::Value> {
        let shown = self.site.zvm_json(&["inventory"])?;
        let vms = shown["inventory"]["vms"].as_array().context("a list of VMs")?;
        vms.iter().find(|vm| vm["name"] == "db").cloned().context("the VM isn't there")
    }

    fn virsh(&self, arguments: &[&str]) -> Result<String> {
        self.context.run(&[&["virsh", "-q", "-c", &self.uri], arguments].concat())
    }
}

/// libvirtd in namespaces of its own, and the way to it.
fn start_host(context: &Context, dir: &Path) -> Result<(Background, String)> {
    for place in ["etc", "lib", "run", "cache", "log"] {
        fs::create_dir_all(dir.join(place))?;
    }
    fs::write(dir.join("etc/qemu.conf"), QEMU_CONF)?;
    fs::write(dir.join("etc/libvirtd.conf"), LIBVIRTD_CONF)?;
    let dir = dir.to_string_lossy();
    let unshare = ["unshare", "--mount", "--uts", "--pid", "--net", "--fork", "--kill-child", "--mount-proc"];
    let mut host = context.spawn(&[&unshare[..], &["bash", "-c", HOST, "host", &dir]].concat())?;
    let uri = format!("qemu+unix:///system?socket={dir}/run/libvirt-sock");
    context.wait_for("libvirtd", PATIENCE_S, || {
        if let Some(status) = host.ended()? {
            bail!("the host ended with {status}:\n{}", host.output());
        }
        let answers = Command::new("virsh").args(["-q", "-c", &uri, "version"]).output()?;
        Ok(answers.status.success().then_some(()))
    })?;
    Ok((host, uri))
}
