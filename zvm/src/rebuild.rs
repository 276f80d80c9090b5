//! `zvm rebuild`: a lost database is made again from what the VRAs know. The state folder's keys must still be there: they make it the manager
//! that the VRAs obey.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use vra::api::vpg::VraEndpoint;
use vra::api::{
    Hello, HelloReply, ListDefinitions, PROTOCOL_VERSION, Request, Response, SetTrust, TimeUs, VpgDefinition,
    VpgId, VraId,
};
use vra::control::{Client, ClientError};
use vra::link::{Link, LinkError, LinkSettings};
use vra::pki::{PeerCertificate, Trust};
use vra::report::chain;

use crate::api::defaults;
use crate::authority::{Authority, Issued};
use crate::clock::Clock;
use crate::config::Config;
use crate::manager::StartError;
use crate::model::vpg::{JournalBounds, Member, Vpg, VpgSettings, VpgState};
use crate::model::vra::{Vra, VraState};
use crate::serve::lock_state;
use crate::store::{self, Store, StoreError};

/// How long a VRA may take to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// What came of it.
#[derive(Debug, Default)]
pub struct Rebuilt {
    /// The groups' names.
    pub vpgs: Vec<String>,
    /// The VRAs' names.
    pub vras: Vec<String>,
    /// VRAs that groups name and that didn't answer, with the reason: they are known by their ids until they do.
    pub silent: Vec<(VraEndpoint, String)>,
}

/// Why the database could not be made again.
#[derive(Debug, thiserror::Error)]
pub enum RebuildError {
    /// The state folder.
    #[error(transparent)]
    Start(#[from] StartError),
    /// There is one.
    #[error("the database in {} knows VRAs or groups: nothing is rebuilt over it; move zvm.db away first, if it is the wrong one", path.display())]
    NotEmpty {
        /// The state folder.
        path: std::path::PathBuf,
    },
    /// Nobody answered.
    #[error("VRA at {address} doesn't answer: {reason}")]
    NoVra {
        /// Where it should be.
        address: String,
        /// Why not.
        reason: String,
    },
    /// The database could not be written.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A VRA that answered.
struct Found {
    address: String,
    hello: HelloReply,
    certificate: PeerCertificate,
    vpgs: Vec<VpgDefinition>,
    trust: SetTrust,
}

/// Asks the VRAs at these addresses (`host:port`), and those that their groups name, and writes the database of a site of this name.
///
/// # Errors
/// [`RebuildError`]; the database is as it was then.
pub async fn rebuild(
    config: &Config,
    site_name: &str,
    addresses: &[String],
) -> Result<Rebuilt, RebuildError> {
    let clock = Clock::new();
    // Held to the end.
    let _lock = lock_state(config)?;
    let authority = Authority::open(&config.pki_dir()).map_err(StartError::from)?;
    let credentials = authority.open_identity(&config.pki_dir(), clock.now_us()).map_err(StartError::from)?;
    let Some(zvm) = credentials.own.identity.as_zvm() else {
        return Err(StartError::Mixed { state_dir: config.state_dir.clone() }.into());
    };
    let store = Store::open(&config.database_path()).await?;
    if !is_empty(&store).await? {
        return Err(RebuildError::NotEmpty { path: config.state_dir.clone() });
    }
    let settings = LinkSettings { listen: std::net::SocketAddr::new(config.listen.ip(), 0) };
    let (link, _) = Link::bind(&settings, credentials, Trust::default()).map_err(StartError::from)?;
    let (found, silent) = ask_all(&link, addresses).await?;
    link.close().await;
    let now_us = TimeUs(clock.now_us());
    let world = World::of(found, silent, now_us);
    let mut tx = store.begin().await?;
    let site = store::site::Site { name: site_name.into(), zvm, trust_version: world.trust_version };
    if store::site::get(&mut tx).await?.is_none() {
        store::site::insert(&mut tx, &site).await?;
    }
    for (vra, issued) in &world.vras {
        store::vras::save_enrolled(&mut tx, vra).await?;
        store::certificates::insert(&mut tx, vra.id, issued, now_us).await?;
        if vra.state == VraState::Revoked {
            store::vras::revoke(&mut tx, vra.id, now_us).await?;
            store::certificates::revoke_all(&mut tx, vra.id, now_us).await?;
        }
    }
    for vpg in &world.vpgs {
        store::vpgs::insert(&mut tx, vpg).await?;
    }
    tx.commit().await.map_err(StoreError::from)?;
    store.close().await;
    let is_enrolled = |vra: &&Vra| vra.state == VraState::Enrolled;
    Ok(Rebuilt {
        vpgs: world.vpgs.into_iter().map(|vpg| vpg.name).collect(),
        vras: world.vras.iter().map(|(vra, _)| vra).filter(is_enrolled).map(|vra| vra.name.clone()).collect(),
        silent: world.silent,
    })
}

async fn is_empty(store: &Store) -> Result<bool, StoreError> {
    let mut db = store.read().await?;
    Ok(store::vras::list(&mut db).await?.is_empty() && store::vpgs::list(&mut db).await?.is_empty())
}

/// Asks the first ones, which must answer, then all that they name.
async fn ask_all(
    link: &Link,
    addresses: &[String],
) -> Result<(Vec<Found>, Vec<(VraEndpoint, String)>), RebuildError> {
    let (mut found, mut silent) = (Vec::<Found>::new(), Vec::new());
    let mut asked = BTreeSet::new();
    let mut named = VecDeque::new();
    for address in addresses {
        let first = ask(link, None, address).await;
        let first = first.map_err(|reason| RebuildError::NoVra { address: address.clone(), reason })?;
        if asked.insert(first.hello.vra) {
            named.extend(endpoints(&first.vpgs));
            found.push(first);
        }
    }
    while let Some(endpoint) = named.pop_front() {
        if !asked.insert(endpoint.id) {
            continue;
        }
        match ask(link, Some(endpoint.id), &endpoint.address).await {
            Ok(next) => {
                named.extend(endpoints(&next.vpgs));
                found.push(next);
            }
            Err(reason) => silent.push((endpoint, reason)),
        }
    }
    Ok((found, silent))
}

fn endpoints(vpgs: &[VpgDefinition]) -> Vec<VraEndpoint> {
    let vms = vpgs.iter().flat_map(|vpg| &vpg.vms);
    vms.flat_map(|vm| [vm.source.clone(), vm.target.clone()]).collect()
}

async fn ask(link: &Link, expected: Option<VraId>, address: &str) -> Result<Found, String> {
    let answer = async {
        let (connection, certificate) = link.connect_vra(expected, address).await?;
        let mut client = Client::quic(&connection, concat!("zvm ", env!("CARGO_PKG_VERSION"))).await?;
        let hello = Hello { protocol: PROTOCOL_VERSION, client: "zvm rebuild".into(), features: Vec::new() };
        let Response::Hello(hello) = client.call(Request::Hello(hello)).await? else {
            return Err(AskError::Unexpected);
        };
        let (mut vpgs, mut after) = (Vec::new(), None);
        let trust = loop {
            let Response::Definitions(page) =
                client.call(Request::ListDefinitions(ListDefinitions { after })).await?
            else {
                return Err(AskError::Unexpected);
            };
            vpgs.extend(page.vpgs);
            after = page.next;
            if after.is_none() {
                break page.trust;
            }
        };
        if certificate.identity.as_vra() != Some(hello.vra) {
            return Err(AskError::Unexpected);
        }
        Ok(Found { address: address.to_owned(), hello, certificate, vpgs, trust })
    };
    match tokio::time::timeout(ANSWER_WITHIN, answer).await {
        Ok(answered) => answered.map_err(|error| chain(&error)),
        Err(_) => Err(format!("no answer within {ANSWER_WITHIN:?}")),
    }
}

#[derive(Debug, thiserror::Error)]
enum AskError {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("it gave a wrong answer: is it of another version?")]
    Unexpected,
}

/// All that was told, put together.
struct World {
    vras: Vec<(Vra, Issued)>,
    vpgs: Vec<Vpg>,
    trust_version: u64,
    silent: Vec<(VraEndpoint, String)>,
}

impl World {
    fn of(found: Vec<Found>, silent: Vec<(VraEndpoint, String)>, now_us: TimeUs) -> Self {
        let mut definitions: BTreeMap<VpgId, Vec<&VpgDefinition>> = BTreeMap::new();
        for vpg in found.iter().flat_map(|vra| &vra.vpgs) {
            definitions.entry(vpg.id).or_default().push(vpg);
        }
        let vpgs: Vec<Vpg> = definitions.into_values().filter_map(|known| vpg_of(&known, now_us)).collect();
        // The addresses by which groups know them: those that were asked first may be others.
        let named: BTreeMap<VraId, String> = found
            .iter()
            .flat_map(|vra| endpoints(&vra.vpgs))
            .map(|endpoint| (endpoint.id, endpoint.address))
            .collect();
        let mut vras: Vec<(Vra, Issued)> = Vec::new();
        for vra in &found {
            let id = vra.hello.vra;
            let address = named.get(&id).unwrap_or(&vra.address);
            let (serial, not_after_us) = (vra.certificate.serial.clone(), vra.certificate.ends_us.0);
            let issued = Issued { pem: String::new(), serial, not_after_us };
            vras.push((vra_of(id, address, &vra.hello.name, VraState::Enrolled, &issued, now_us), issued));
        }
        for (endpoint, _) in &silent {
            let (id, issued) = (endpoint.id, unknown_certificate(endpoint.id));
            let name = format!("vra-{}", short(id));
            vras.push((vra_of(id, &endpoint.address, &name, VraState::Enrolled, &issued, now_us), issued));
        }
        let revoked: BTreeSet<VraId> =
            found.iter().flat_map(|vra| vra.trust.revoked_vras.iter().copied()).collect();
        for id in revoked {
            let issued = unknown_certificate(id);
            let name = format!("revoked-{}", short(id));
            vras.push((vra_of(id, "unknown:9710", &name, VraState::Revoked, &issued, now_us), issued));
        }
        tell_apart(&mut vras);
        let trust_version = found.iter().map(|vra| vra.trust.version).max().unwrap_or_default().max(1);
        Self { vras, vpgs, trust_version, silent }
    }
}

/// Two VRAs may call themselves the same: here a name means one.
fn tell_apart(vras: &mut [(Vra, Issued)]) {
    let mut names = BTreeSet::new();
    for (vra, _) in vras {
        if !names.insert(vra.name.clone()) {
            vra.name = format!("{}-{}", vra.name, short(vra.id));
            names.insert(vra.name.clone());
        }
    }
}

fn vra_of(id: VraId, address: &str, name: &str, state: VraState, issued: &Issued, now_us: TimeUs) -> Vra {
    Vra {
        id,
        name: name.to_owned(),
        address: address.to_owned(),
        version: "unknown".to_owned(),
        state,
        enrolled_us: now_us,
        revoked_us: (state == VraState::Revoked).then_some(now_us),
        certificate_serial: issued.serial.clone(),
        certificate_ends_us: TimeUs(issued.not_after_us),
    }
}

/// Stands for one that isn't known: its VRA is known by its id.
fn unknown_certificate(id: VraId) -> Issued {
    Issued { pem: String::new(), serial: format!("unknown-{id}"), not_after_us: 0 }
}

fn short(id: VraId) -> String {
    id.to_string().chars().take(8).collect()
}

/// The newest definition of a group, as settings.
fn vpg_of(known: &[&VpgDefinition], now_us: TimeUs) -> Option<Vpg> {
    let newest = known.iter().max_by_key(|vpg| vpg.revision)?;
    let applied_revision = known.iter().map(|vpg| vpg.revision).min()?;
    let first = newest.vms.first()?;
    let notes = newest.notes.clone().unwrap_or_default();
    let vms = newest.vms.iter().map(|vm| Member {
        vm: vm.id,
        name: vm.name.clone(),
        journal: vm.journal,
        source: vm.source.id,
        target: vm.target.id,
        datastore: vm.datastore.clone(),
        journal_size: JournalBounds {
            limit_bytes: vm.journal_limit_bytes,
            limit_percent: vm.journal_limit_percent,
            warning: vm.journal_warning,
            minimum_bytes: vm.journal_minimum_bytes,
        },
        volumes: vm.volumes.clone(),
    });
    Some(Vpg {
        id: newest.id,
        name: newest.name.clone(),
        state: VpgState::Active,
        revision: newest.revision,
        applied_revision,
        created_us: notes.created_us.unwrap_or(now_us),
        settings: VpgSettings {
            description: notes.description,
            priority: notes.priority.parse().unwrap_or_else(|_| defaults::priority()),
            member_set_version: newest.member_set_version,
            checkpoint_interval_ms: newest.checkpoint_interval_ms,
            hold_deadline_ms: newest.hold_deadline_ms,
            history_s: first.history_s,
            rpo_target_s: notes.rpo_target_s.unwrap_or_else(defaults::rpo_target_s),
            give_up_history: first.give_up_history,
            encrypt: newest.encrypt,
            vms: vms.collect(),
        },
        removal: None,
    })
}
