//! Three source VRAs on hosts of their own, over a network that delays and loses, while one is killed now and then: every checkpoint that
//! is offered holds a beginning of what an application wrote to one host after the other.

mod common;
#[path = "../../hwtests/src/relay.rs"]
#[allow(unreachable_pub, reason = "shared with the rig")]
#[allow(dead_code, reason = "a part of it is used here")]
mod relay;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use ::vra::api::{CheckpointId, VpgDefinition};
use common::TestCa;
use common::network::{BETWEEN, Host, is_between_hosts};
use common::pair::DISK_BYTES;
use common::spanning::Site;
use common::spanning::chain::Chain;
use common::vra::Vra;
use relay::Relay;

/// Links between two checkpoints at least; where the machine is busy with other tests, between most of them.
const LEAST_LINKS: u64 = 20;

/// Between two links. With the answers' own time some 80 links come in a second.
const PAUSE: Duration = Duration::from_millis(10);

/// How long it lasts, and how often a VRA is killed.
struct Effort {
    lasts: Duration,
    kill_every: Duration,
    /// Percent of the seconds that must have a checkpoint: with delays, losses and kills, and then without. A busy machine says little in a
    /// minute.
    least_percent: (u64, u64),
    calm: Duration,
}

fn effort() -> Effort {
    if is_long() {
        Effort {
            lasts: Duration::from_secs(600),
            kill_every: Duration::from_secs(75),
            least_percent: (60, 99),
            calm: Duration::from_secs(100),
        }
    } else {
        Effort {
            lasts: Duration::from_secs(45),
            kill_every: Duration::from_secs(25),
            least_percent: (20, 50),
            calm: Duration::from_secs(10),
        }
    }
}

fn is_long() -> bool {
    std::env::var_os("HOLDFAST_LONG").is_some()
}

struct Network {
    _hosts: Vec<Host>,
    relays: Vec<Relay>,
}

impl Network {
    /// Three sources on hosts, two targets between them, and a relay in front of each. Disks and datastores are in memory: one that stalls stops
    /// the chain, whatever checkpoints do.
    fn new(ca: &TestCa) -> (Self, Vec<Vra>, Vec<Vra>) {
        let hosts: Vec<Host> = (1..=3).map(Host::new).collect();
        let sources = hosts.iter().enumerate().map(|(number, host)| {
            let listen = SocketAddr::new(host.ip, 9710);
            Vra::start_in(&format!("ns-s{number}"), ca, host.namespace(), listen)
        });
        let sources: Vec<Vra> = sources.collect();
        let targets: Vec<Vra> =
            (0..2).map(|number| Vra::start_in_memory(&format!("ns-t{number}"), ca, BETWEEN)).collect();
        let relay_to = |(seed, vra): (u64, &Vra)| {
            let server = vra.endpoint.address.parse().expect("an address");
            Relay::start_at(BETWEEN, server, seed).expect("relay")
        };
        let relays = (60..).zip(sources.iter().chain(&targets)).map(relay_to).collect();
        (Self { _hosts: hosts, relays }, sources, targets)
    }

    /// Everybody knows everybody by the relays' addresses.
    fn lead(&self, definition: &mut VpgDefinition, sources: &[Vra]) {
        for (number, vm) in definition.vms.iter_mut().enumerate() {
            let target = &self.relays[sources.len() + number % (self.relays.len() - sources.len())];
            vm.source.address = self.relays[number].address().to_string();
            vm.target.address = target.address().to_string();
        }
    }

    fn be_bad(&self, is_bad: bool) {
        for relay in &self.relays {
            relay.delay_up_to(if is_bad { Duration::from_millis(50) } else { Duration::ZERO });
            relay.lose_permille(if is_bad { 10 } else { 0 });
        }
    }
}

/// How far the chain has come at the checkpoints that were looked at.
#[derive(Default)]
struct Seen {
    newest: BTreeMap<CheckpointId, (u64, u64)>,
}

impl Seen {
    /// Looks at those that are offered and weren't looked at.
    async fn look(&mut self, site: &Site, chain: &Chain) {
        for info in site.offered().await {
            if let Entry::Vacant(unseen) = self.newest.entry(info.id) {
                let newest = chain.newest_at(site, info.id).await;
                unseen.insert((info.time_us.0, newest));
            }
        }
    }

    /// Those since a time, in order.
    fn since(&self, time_us: u64) -> Vec<(u64, u64)> {
        let mut since: Vec<_> = self.newest.values().copied().filter(|(at, _)| *at > time_us).collect();
        since.sort_unstable();
        since
    }
}

fn now_us() -> u64 {
    let since = std::time::UNIX_EPOCH.elapsed().expect("a time after 1970");
    u64::try_from(since.as_micros()).expect("microseconds")
}

#[test]
fn every_checkpoint_is_one_moment_on_hosts_that_are_delayed_cut_short_and_killed() {
    let name = "every_checkpoint_is_one_moment_on_hosts_that_are_delayed_cut_short_and_killed";
    if is_between_hosts(name) {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("runtime");
        runtime.block_on(run());
    }
}

async fn run() {
    let effort = effort();
    let ca = TestCa::new();
    let (network, sources, targets) = Network::new(&ca);
    assert_reached_by_relays_alone(&network, &sources);
    let mut site = Site::of(sources, targets, |definition, sources| {
        definition.hold_deadline_ms = 100;
        network.lead(definition, sources);
    })
    .await;
    site.wait_for_newer(0).await;
    let chain = Chain::start(site.doors.clone(), PAUSE);
    let mut seen = Seen::default();

    network.be_bad(true);
    let (began, began_us) = (Instant::now(), now_us());
    let (mut killed_s, mut victim) = (0.0, 0);
    let mut next_kill = effort.kill_every / 2;
    while began.elapsed() < effort.lasts {
        seen.look(&site, &chain).await;
        if began.elapsed() >= next_kill {
            next_kill += effort.kill_every;
            let died = Instant::now();
            assert_held_no_longer(&site, victim).await;
            site.sources[victim].kill();
            tokio::time::sleep(Duration::from_millis(300)).await;
            site.sources[victim].serve();
            let offered_us = site.offered().await.pop().map_or(0, |info| info.time_us.0);
            site.wait_for_newer(offered_us.max(now_us())).await;
            killed_s += died.elapsed().as_secs_f64();
            victim = (victim + 1) % site.sources.len();
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let (ended, ended_us) = (began.elapsed(), now_us());
    for number in 0..site.sources.len() {
        assert_held_no_longer(&site, number).await;
    }

    network.be_bad(false);
    tokio::time::sleep(Duration::from_secs(3)).await;
    let calm_us = now_us();
    tokio::time::sleep(effort.calm).await;
    let calm_ended_us = now_us();
    site.wait_for_newer(calm_ended_us).await;
    let links = chain.stop();
    seen.look(&site, &links).await;

    let rough: Vec<_> = seen.since(began_us).into_iter().filter(|(at, _)| *at <= ended_us).collect();
    let calm: Vec<_> = seen.since(calm_us).into_iter().filter(|(at, _)| *at <= calm_ended_us).collect();
    let steps: Vec<u64> = seen.since(began_us).windows(2).map(|pair| pair[1].1 - pair[0].1).collect();
    println!(
        "{} links; {} checkpoints in {:.0} s with delays, losses and kills ({killed_s:.0} s of it without a VRA or until the next \
         checkpoint); {} in {:.0} s without; at least {} links between two",
        links.count(),
        rough.len(),
        ended.as_secs_f64(),
        calm.len(),
        effort.calm.as_secs_f64(),
        steps.iter().min().expect("two checkpoints"),
    );
    let short = steps.iter().filter(|links| **links < LEAST_LINKS).count();
    let most_short = if is_long() { 0 } else { steps.len() / 2 };
    assert!(short <= most_short, "links between two checkpoints: {steps:?}");
    let (least_rough, least_calm) = effort.least_percent;
    assert!(rough.len() as u64 * 100 >= ended.as_secs() * least_rough, "{} with delays", rough.len());
    // The second in which it begins or ends may have its checkpoint outside.
    assert!((calm.len() as u64 + 1) * 100 >= effort.calm.as_secs() * least_calm, "{} without", calm.len());
    assert!(links.count() * 512 / 3 < DISK_BYTES, "the disks are large enough");
}

/// The hosts have no way to each other but the relays.
fn assert_reached_by_relays_alone(network: &Network, sources: &[Vra]) {
    let ips: Vec<IpAddr> = network.relays.iter().map(|relay| relay.address().ip()).collect();
    assert!(ips.iter().all(|ip| *ip == BETWEEN));
    let own: Vec<&str> = sources.iter().map(|vra| vra.endpoint.address.as_str()).collect();
    assert_eq!(own, ["10.77.1.2:9710", "10.77.2.2:9710", "10.77.3.2:9710"]);
    let forwards = std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward").expect("a setting");
    assert_eq!(forwards.trim(), "0");
}

/// No guest's write was held longer than the deadline by this source, since it was started.
async fn assert_held_no_longer(site: &Site, source: usize) {
    let hold = site.sources[source].status().await.source_vms[0].hold;
    println!("source {source} held: {hold:?}");
    let most_us = u64::from(site.definition.hold_deadline_ms) * 1000;
    // A machine that is busy with other tests wakes threads late.
    let late_us = if is_long() { 5_000 } else { 200_000 };
    assert!(hold.max_us <= most_us + late_us, "{hold:?}");
}
