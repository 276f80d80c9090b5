//! An application that spans VMs: it writes a chain of links, each after the answer to the one before, to one VM after the other, and goes on
//! when a disk's server dies and comes back.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use ::vra::api::{CheckpointId, CloseView, DoorAddress, PointInTime, Request, ViewMode};

use super::super::nbd::NbdClient;
use super::super::pair::{open, open_view};
use super::Site;

/// Each link has the next sector of its VM's disk, which begins with its number.
const LINK_BYTES: u64 = 512;

/// How much is read at once.
const READ_BYTES: u64 = 256 << 10;

/// The VM that has a link, of so many.
fn vm_of(link: u64, vms: usize) -> usize {
    (link as usize * 7 + link as usize / 5) % vms
}

pub struct Chain {
    vms: usize,
    /// The last link that was asked to be written; all before it are answered.
    asked: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    writing: Option<JoinHandle<()>>,
}

impl Chain {
    /// Begins to write to these doors, a VM's disk each.
    pub fn start(doors: Vec<DoorAddress>, pause: Duration) -> Self {
        let (asked, stop) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let vms = doors.len();
        let writing = std::thread::spawn({
            let (asked, stop) = (Arc::clone(&asked), Arc::clone(&stop));
            move || {
                let mut disks: Vec<Disk> =
                    doors.into_iter().map(|door| Disk { door, client: None, links: 0 }).collect();
                for link in 1.. {
                    asked.store(link, Ordering::Release);
                    let disk = &mut disks[vm_of(link, vms)];
                    while let Err(error) = disk.append(link) {
                        assert!(error.raw_os_error().is_none_or(|errno| errno != nix::libc::EIO), "{error}");
                        disk.client = None;
                        std::thread::sleep(Duration::from_millis(20));
                        if stop.load(Ordering::Acquire) {
                            return;
                        }
                    }
                    disk.links += 1;
                    if stop.load(Ordering::Acquire) {
                        return;
                    }
                    std::thread::sleep(pause);
                }
            }
        });
        Self { vms, asked, stop, writing: Some(writing) }
    }

    /// Writes no more.
    pub fn stop(mut self) -> Self {
        self.stop.store(true, Ordering::Release);
        self.writing.take().expect("runs").join().expect("the chain was written");
        self
    }

    /// Links that were asked for.
    pub fn count(&self) -> u64 {
        self.asked.load(Ordering::Acquire)
    }

    /// How far the chain has come at a checkpoint, which must hold every link before that one, and none out of its order.
    pub async fn newest_at(&self, site: &Site, checkpoint: CheckpointId) -> u64 {
        // All of them may be there that were asked for by now; a checkpoint isn't newer than that.
        let mut expected: Vec<Vec<u64>> = vec![Vec::new(); self.vms];
        (1..=self.count()).for_each(|link| expected[vm_of(link, self.vms)].push(link));
        let mut shown = BTreeMap::new();
        for target in &site.targets {
            let at = PointInTime::Checkpoint { checkpoint };
            let view = open_view(target, &open(site.definition.id, at, ViewMode::ReadOnly)).await;
            for disk in &view.disks {
                let vm = site.vms.iter().position(|vm| *vm == disk.vm).expect("a VM of the site");
                let links = expected[vm].len();
                shown.insert(vm, links_of(&disk.door, links).expect("a view can be read"));
            }
            target.ask(Request::CloseView(CloseView { view: view.view })).await;
        }
        assert_eq!(shown.len(), self.vms, "checkpoint {checkpoint} shows every VM");
        let newest = shown.values().flatten().copied().max().unwrap_or_default();
        for (vm, shown) in shown {
            let there = expected[vm].iter().take_while(|link| **link <= newest).count();
            let (there, later) = shown.split_at(there);
            let differs = there.iter().zip(&expected[vm]).find(|(shown, expected)| shown != expected);
            assert_eq!(differs, None, "checkpoint {checkpoint} has link {newest}, but VM {vm} lacks one");
            assert!(later.iter().all(|link| *link == 0), "checkpoint {checkpoint}: VM {vm} is out of order");
        }
        newest
    }
}

impl Drop for Chain {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
    }
}

struct Disk {
    door: DoorAddress,
    client: Option<NbdClient>,
    links: u64,
}

impl Disk {
    fn append(&mut self, link: u64) -> io::Result<()> {
        let client = match &mut self.client {
            Some(client) => client,
            None => self.client.insert(NbdClient::connect(&self.door)?),
        };
        let mut sector = [0; LINK_BYTES as usize];
        sector[..8].copy_from_slice(&link.to_le_bytes());
        client.write(self.links * LINK_BYTES, &sector)
    }
}

/// The numbers in a disk's first so many sectors.
fn links_of(door: &DoorAddress, count: usize) -> io::Result<Vec<u64>> {
    let mut client = NbdClient::connect(door)?;
    let mut links = Vec::with_capacity(count);
    let len_bytes = count as u64 * LINK_BYTES;
    for offset_bytes in (0..len_bytes).step_by(READ_BYTES as usize) {
        let data = client.read(offset_bytes, READ_BYTES.min(len_bytes - offset_bytes) as usize)?;
        let sectors = data.chunks_exact(LINK_BYTES as usize);
        links.extend(sectors.map(|sector| u64::from_le_bytes(sector[..8].try_into().expect("8 bytes"))));
    }
    Ok(links)
}
