//! A UDP relay between two VRAs that can cut, lose and delay: the network's faults where the kernel has no netem.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rand::{RngExt, SeedableRng, rngs::StdRng};

/// A running relay. Datagrams to [`Relay::address`] reach the server, answers go back to who asked.
pub struct Relay {
    address: SocketAddr,
    faults: Arc<Faults>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Relay {
    /// Starts a relay on loopback to `server`; `seed` decides which datagrams are lost and delayed.
    ///
    /// # Errors
    /// When no socket can be had.
    pub fn start(server: SocketAddr, seed: u64) -> Result<Self> {
        Self::start_at(Ipv4Addr::LOCALHOST.into(), server, seed)
    }

    /// Starts one on another address of this machine.
    ///
    /// # Errors
    /// When no socket can be had on it.
    pub fn start_at(ip: IpAddr, server: SocketAddr, seed: u64) -> Result<Self> {
        let front = socket(ip)?;
        let address = front.local_addr().context("address of the relay")?;
        let faults = Arc::new(Faults::default());
        let stop = Arc::new(AtomicBool::new(false));
        let clients: Clients = Arc::default();
        let thread = std::thread::spawn({
            let (faults, stop) = (Arc::clone(&faults), Arc::clone(&stop));
            move || {
                let mut backs: HashMap<SocketAddr, UdpSocket> = HashMap::new();
                let mut line = Line::new(seed);
                let mut datagram = [0; MAX_DATAGRAM_BYTES];
                while !stop.load(Ordering::Acquire) {
                    if let Ok((len_bytes, client)) = front.recv_from(&mut datagram) {
                        if !backs.contains_key(&client)
                            && backs.len() < MAX_CLIENTS
                            && let Some(back) =
                                open_back(server, client, &front, &faults, &stop, &clients, seed)
                        {
                            backs.insert(client, back);
                        }
                        line.offer(&faults, client, &datagram[..len_bytes]);
                    }
                    while let Some((client, due)) = line.due() {
                        if let Some(back) = backs.get(&client) {
                            // A datagram that the socket refuses is a lost one, which is this relay's trade.
                            let _ = back.send(&due);
                        }
                    }
                }
            }
        });
        Ok(Self { address, faults, stop, threads: vec![thread] })
    }

    /// Where clients send to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Cuts the line (`true`) or joins it again.
    pub fn cut(&self, cut: bool) {
        self.faults.cut.store(cut, Ordering::Release);
    }

    /// Loses this many of a thousand datagrams.
    pub fn lose_permille(&self, permille: u32) {
        self.faults.loss_permille.store(permille, Ordering::Release);
    }

    /// Delays each datagram by a random time up to `max`: later ones may overtake.
    pub fn delay_up_to(&self, max: Duration) {
        self.faults.delay_max_us.store(max.as_micros() as u64, Ordering::Release);
    }

    /// Datagrams that went through, both ways.
    pub fn passed(&self) -> u64 {
        self.faults.passed.load(Ordering::Relaxed)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Largest datagram, with room for jumbo frames.
const MAX_DATAGRAM_BYTES: usize = 16 * 1024;
/// Clients at once: a VRA that reconnects comes from a new port.
const MAX_CLIENTS: usize = 256;
/// How long a socket waits before its thread looks at the delayed datagrams and the stop flag.
const POLL: Duration = Duration::from_millis(1);

type Clients = Arc<Mutex<Vec<JoinHandle<()>>>>;

#[derive(Default)]
struct Faults {
    cut: AtomicBool,
    loss_permille: AtomicU32,
    delay_max_us: AtomicU64,
    passed: AtomicU64,
}

/// One direction: the datagrams under way, by the time they are due.
struct Line {
    random: StdRng,
    under_way: BTreeMap<(Instant, u64), (SocketAddr, Vec<u8>)>,
    count: u64,
}

impl Line {
    fn new(seed: u64) -> Self {
        Self { random: StdRng::seed_from_u64(seed), under_way: BTreeMap::new(), count: 0 }
    }

    fn offer(&mut self, faults: &Faults, peer: SocketAddr, datagram: &[u8]) {
        let lost = self.random.random_range(0..1000) < faults.loss_permille.load(Ordering::Acquire);
        if lost || faults.cut.load(Ordering::Acquire) {
            return;
        }
        let delay_max_us = faults.delay_max_us.load(Ordering::Acquire);
        let delay_us = if delay_max_us == 0 { 0 } else { self.random.random_range(0..=delay_max_us) };
        self.count += 1;
        faults.passed.fetch_add(1, Ordering::Relaxed);
        self.under_way.insert(
            (Instant::now() + Duration::from_micros(delay_us), self.count),
            (peer, datagram.to_vec()),
        );
    }

    fn due(&mut self) -> Option<(SocketAddr, Vec<u8>)> {
        let first = self.under_way.first_entry()?;
        (first.key().0 <= Instant::now()).then(|| first.remove())
    }
}

fn socket(ip: IpAddr) -> Result<UdpSocket> {
    let socket = UdpSocket::bind((ip, 0)).with_context(|| format!("open a socket on {ip}"))?;
    socket.set_read_timeout(Some(POLL)).context("set the socket's time-out")?;
    Ok(socket)
}

fn open_back(
    server: SocketAddr,
    client: SocketAddr,
    front: &UdpSocket,
    faults: &Arc<Faults>,
    stop: &Arc<AtomicBool>,
    clients: &Clients,
    seed: u64,
) -> Option<UdpSocket> {
    let back = socket(Ipv4Addr::UNSPECIFIED.into()).ok()?;
    back.connect(server).ok()?;
    let (receive, answer) = (back.try_clone().ok()?, front.try_clone().ok()?);
    let (faults, stop) = (Arc::clone(faults), Arc::clone(stop));
    let thread = std::thread::spawn(move || {
        let mut line = Line::new(seed ^ u64::from(client.port()));
        let mut datagram = [0; MAX_DATAGRAM_BYTES];
        while !stop.load(Ordering::Acquire) {
            if let Ok(len_bytes) = receive.recv(&mut datagram) {
                line.offer(&faults, client, &datagram[..len_bytes]);
            }
            while let Some((client, due)) = line.due() {
                let _ = answer.send_to(&due, client);
            }
        }
    });
    clients.lock().ok()?.push(thread);
    Some(back)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (UdpSocket, UdpSocket, Relay) {
        let server = socket(Ipv4Addr::LOCALHOST.into()).expect("server");
        server.set_read_timeout(Some(Duration::from_secs(2))).expect("time-out");
        let relay = Relay::start(server.local_addr().expect("address"), 7).expect("relay");
        let client = socket(Ipv4Addr::LOCALHOST.into()).expect("client");
        client.set_read_timeout(Some(Duration::from_millis(300))).expect("time-out");
        client.connect(relay.address()).expect("connect");
        (client, server, relay)
    }

    #[test]
    fn passes_both_ways() {
        let (client, server, relay) = pair();
        client.send(b"ask").expect("send");
        let mut buffer = [0; 16];
        let (len, from) = server.recv_from(&mut buffer).expect("reaches the server");
        assert_eq!(&buffer[..len], b"ask");
        server.send_to(b"answer", from).expect("send");
        let len = client.recv(&mut buffer).expect("reaches the client");
        assert_eq!(&buffer[..len], b"answer");
        assert_eq!(relay.passed(), 2);
    }

    #[test]
    fn a_cut_line_passes_nothing_until_joined() {
        let (client, server, relay) = pair();
        relay.cut(true);
        client.send(b"lost").expect("send");
        let mut buffer = [0; 16];
        server.set_read_timeout(Some(Duration::from_millis(200))).expect("time-out");
        assert!(server.recv_from(&mut buffer).is_err());
        relay.cut(false);
        client.send(b"through").expect("send");
        let (len, _) = server.recv_from(&mut buffer).expect("joined again");
        assert_eq!(&buffer[..len], b"through");
    }
}
