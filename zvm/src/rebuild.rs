//! `zvm rebuild`: a lost database is made again from what the VRAs know. The state folder's keys must still be there: they make it the manager
//! that the VRAs obey.

mod restored;
mod world;

use std::collections::{BTreeMap, BTreeSet};
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

use self::world::{World, endpoints, newest_definitions};
use crate::authority::Authority;
use crate::clock::Clock;
use crate::config::Config;
use crate::manager::StartError;
use crate::model::vra::{Vra, VraState};
use crate::serve::lock_state;
use crate::store::{self, Store, StoreError};
pub use restored::vpg_of;

/// How long a VRA may take to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// Largest version or revision that is believed: a manager counts them from one, and goes on counting.
const MAX_VERSION: u64 = i64::MAX as u64 / 2;

/// What came of it.
#[derive(Debug, Default)]
pub struct Rebuilt {
    /// The groups' names.
    pub vpgs: Vec<String>,
    /// The VRAs' names.
    pub vras: Vec<String>,
    /// VRAs that groups name and that didn't answer, with the reason: they are known by their ids until they do.
    pub silent: Vec<(VraEndpoint, String)>,
    /// Groups that another one had the name of: that, and their new one.
    pub renamed: Vec<(String, String)>,
    /// Groups that weren't restored.
    pub unrestored: Vec<Unrestored>,
    /// Groups that were restored though VRAs that answered don't know them, and the names of these: they are told.
    pub incomplete: Vec<(String, Vec<String>)>,
    /// Groups that were restored without recovery settings, exclusions and test reminder, since these can't be read, with the reason.
    pub unread: Vec<(String, String)>,
}

/// A group that some of its VRAs know, and others that answered and were in it from the first don't: it was deleted, or is only half there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unrestored {
    /// The group's id.
    pub id: VpgId,
    /// Its name.
    pub name: String,
    /// The names of the VRAs that know it.
    pub known_at: Vec<String>,
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
    #[error(
        "VRA at {address} doesn't answer: {reason}; start it, or leave it out and name another VRA of the site by --vra"
    )]
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
/// Groups of `restore` are restored even if members of them that answer don't know them.
///
/// # Errors
/// [`RebuildError`]; the database is as it was then.
pub async fn rebuild(
    config: &Config,
    site_name: &str,
    addresses: &[String],
    restore: &[VpgId],
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
    let asked = ask_all(&link, addresses).await;
    link.close().await;
    let (found, silent) = asked?;
    let now_us = TimeUs(clock.now_us());
    let world = World::of(&found, silent, now_us, restore);
    let mut tx = store.begin().await?;
    match store::site::get(&mut tx).await? {
        None => {
            let site = store::site::Site { name: site_name.into(), zvm, trust_version: world.trust_version };
            store::site::insert(&mut tx, &site).await?;
        }
        Some(site) if site.zvm != zvm => {
            return Err(StartError::Mixed { state_dir: config.state_dir.clone() }.into());
        }
        Some(site) => {
            let version = world.trust_version.max(site.trust_version);
            store::site::set_trust_version(&mut tx, version).await?;
        }
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
    for leftover in &world.leftovers {
        store::leftovers::insert(&mut tx, leftover).await?;
    }
    tx.commit().await.map_err(StoreError::from)?;
    store.close().await;
    let is_enrolled = |vra: &&Vra| vra.state == VraState::Enrolled;
    Ok(Rebuilt {
        vpgs: world.vpgs.into_iter().map(|vpg| vpg.name).collect(),
        vras: world.vras.iter().map(|(vra, _)| vra).filter(is_enrolled).map(|vra| vra.name.clone()).collect(),
        silent: world.silent,
        renamed: world.renamed,
        unrestored: world.unrestored,
        incomplete: world.incomplete,
        unread: world.unread,
    })
}

async fn is_empty(store: &Store) -> Result<bool, StoreError> {
    let mut db = store.read().await?;
    Ok(store::vras::list(&mut db).await?.is_empty() && store::vpgs::list(&mut db).await?.is_empty())
}

/// Asks the first ones, which must answer, then all that they name, but none that one of them knows to be revoked.
async fn ask_all(
    link: &Link,
    addresses: &[String],
) -> Result<(Vec<Found>, Vec<(VraEndpoint, String)>), RebuildError> {
    let mut found = Vec::<Found>::new();
    for address in addresses {
        let first = ask(link, None, address).await;
        let first = first.map_err(|reason| RebuildError::NoVra { address: address.clone(), reason })?;
        believe(link, &mut found, first);
    }
    let (mut asked, mut silent) = (BTreeSet::new(), BTreeMap::new());
    while let Some(endpoint) = next_to_ask(&found, &asked) {
        asked.insert((endpoint.id, endpoint.address.clone()));
        match ask(link, Some(endpoint.id), &endpoint.address).await {
            Ok(next) => believe(link, &mut found, next),
            Err(reason) => _ = silent.insert(endpoint.id, (endpoint, reason)),
        }
    }
    let trust = trust_of(&found);
    silent.retain(|id, _| !trust.revoked_vras.contains(id) && found.iter().all(|vra| vra.hello.vra != *id));
    Ok((found, silent.into_values().collect()))
}

/// A VRA that the newest definitions name and that wasn't asked there yet.
fn next_to_ask(found: &[Found], asked: &BTreeSet<(VraId, String)>) -> Option<VraEndpoint> {
    let trust = trust_of(found);
    newest_definitions(found).into_values().flat_map(endpoints).find(|endpoint| {
        !trust.revoked_vras.contains(&endpoint.id)
            && found.iter().all(|vra| vra.hello.vra != endpoint.id)
            && !asked.contains(&(endpoint.id, endpoint.address.clone()))
    })
}

/// Takes in what one answered. Whoever is revoked by that isn't believed any more, and can't be connected to.
fn believe(link: &Link, found: &mut Vec<Found>, next: Found) {
    if found.iter().all(|vra| vra.hello.vra != next.hello.vra) {
        let revoked = next.trust.clone();
        found.retain(|vra| {
            !revoked.revoked_vras.contains(&vra.hello.vra)
                && !revoked.revoked_serials.contains(&vra.certificate.serial)
        });
        found.push(next);
        link.set_trust(trust_of(found));
    }
}

/// All that any of them knows to be revoked.
fn trust_of(found: &[Found]) -> SetTrust {
    let all = |list: fn(&SetTrust) -> &Vec<String>| -> BTreeSet<String> {
        found.iter().flat_map(|vra| list(&vra.trust)).cloned().collect()
    };
    let vras: BTreeSet<VraId> = found.iter().flat_map(|vra| &vra.trust.revoked_vras).copied().collect();
    SetTrust {
        version: found.iter().map(|vra| vra.trust.version).max().unwrap_or_default(),
        revoked_serials: all(|trust| &trust.revoked_serials).into_iter().collect(),
        revoked_vras: vras.into_iter().collect(),
    }
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
        let is_former = |vpg: &VpgDefinition| vpg.former.iter().any(|former| former.target == hello.vra);
        vpgs.retain(|vpg| vpg.has_member_at(hello.vra) || is_former(vpg));
        if trust.version > MAX_VERSION || vpgs.iter().any(|vpg| vpg.revision > MAX_VERSION) {
            return Err(AskError::Absurd);
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
    #[error("it tells of a version that no manager has given: revoke it if it isn't to be trusted")]
    Absurd,
}
