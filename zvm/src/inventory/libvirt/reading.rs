//! One reading of a host's whole inventory: few rounds, each of many calls at once.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::task::JoinSet;
use uuid::Uuid;

use super::client::Client;
use super::connection::MAX_CALLS;
use super::domain::{Domain, DomainFacts, HostFacts};
use super::error::LibvirtError;
use super::message::remote_error::code;
use super::message::reply::{DomainRef, PoolRef};
use super::pool::Pool;
use super::provider::HostSettings;
use super::volume::Volume;
use crate::inventory::{Datastore, Host, HostState, Inventory, Network, Origin, Power, Site, Vm};

/// Definitions of one reading together, at most: 16,384 domains of 16 KiB. What is told of disks' sizes counts, too.
const MAX_DEFINITIONS_BYTES: usize = 256 << 20;
/// Domains whose states and disks are asked for in one call.
const STATS_AT_ONCE: usize = 64;

/// Reads it. `last` is the reading before, if there was one.
pub(super) async fn read(
    client: &Client,
    settings: &HostSettings,
    host_uuid: Uuid,
    last: Option<&Inventory>,
) -> Result<Inventory, LibvirtError> {
    let (host, refs, networks, pools) =
        tokio::try_join!(client.hostname(), client.domains(), client.networks(), client.folder_pools())?;
    if refs.iter().map(|domain| domain.uuid).collect::<HashSet<_>>().len() < refs.len() {
        return Err(LibvirtError::definition(host, &"two of its domains have one UUID"));
    }
    let budget = Budget::default();
    let (domains, stats, pools) = tokio::try_join!(
        gather(refs.clone(), |domain| read_domain(client.clone(), domain, budget.clone())),
        gather(chunks(&refs), |domains| domain_stats(client.clone(), domains, budget.clone())),
        gather(pools, |pool| read_pool(client.clone(), pool, budget.clone())),
    )?;
    let domains: Vec<Domain> = domains.into_iter().flatten().collect();
    let volumes = read_volumes(client, &domains, &budget).await?;
    let mut stats: HashMap<Uuid, DomainFacts> = stats.into_iter().flatten().collect();

    let mut networks: Vec<Network> = networks
        .into_iter()
        .map(|network| settings.network(&host, network.name, network.uuid.to_string()))
        .collect();
    let names: HashSet<String> = networks.iter().map(|network| network.name.clone()).collect();
    // A bridge that is named as a network is taken for that network's: names are all that a card tells.
    let bridges: BTreeSet<&str> =
        domains.iter().flat_map(Domain::bridges).filter(|name| !names.contains(*name)).collect();
    networks.extend(bridges.into_iter().map(|name| settings.network(&host, name.to_owned(), String::new())));

    let facts = HostFacts { source: &settings.source, host: &host, networks: &names, volumes: &volumes };
    let mut vms: Vec<Vm> = domains
        .into_iter()
        .map(|domain| {
            let stats = stats.remove(&domain.uuid).unwrap_or_default();
            domain.into_vm(&stats, facts)
        })
        .collect();
    if let Some(last) = last {
        keep_sizes(&mut vms, last);
    }
    let datastores: Vec<Datastore> =
        pools.into_iter().flatten().map(|pool| pool.into_datastore(&settings.source, &host)).collect();
    let mut inventory = Inventory {
        sites: vec![Site { name: settings.site.clone() }],
        clusters: Vec::new(),
        hosts: vec![Host {
            vra: settings.vra.clone().unwrap_or_else(|| host.clone()),
            name: host,
            site: settings.site.clone(),
            cluster: None,
            state: HostState::Connected,
            origin: Origin { source: settings.source.clone(), id: host_uuid.to_string() },
        }],
        networks,
        datastores,
        vms,
    };
    // A daemon lists in no order; two readings of the same things are to be the same.
    inventory.networks.sort_by(|a, b| a.name.cmp(&b.name));
    inventory.datastores.sort_by(|a, b| a.name.cmp(&b.name));
    inventory.vms.sort_by(|a, b| (&a.name, a.uuid).cmp(&(&b.name, b.uuid)));
    Ok(inventory)
}

/// None for a domain that is gone by now.
async fn read_domain(
    client: Client,
    domain: DomainRef,
    budget: Budget,
) -> Result<Option<Domain>, LibvirtError> {
    let Some(xml) = unless_gone(client.domain_xml(&domain).await, &[code::NO_DOMAIN])? else {
        return Ok(None);
    };
    budget.take(xml.len())?;
    let what = || format!("domain {}", domain.uuid);
    let read = Domain::parse(&xml).map_err(|error| LibvirtError::definition(what(), &error))?;
    if read.uuid != domain.uuid {
        return Err(LibvirtError::definition(what(), &format!("it is that of domain {}", read.uuid)));
    }
    Ok(Some(read))
}

async fn domain_stats(
    client: Client,
    domains: Vec<DomainRef>,
    budget: Budget,
) -> Result<Vec<(Uuid, DomainFacts)>, LibvirtError> {
    /// What a size takes in memory besides its disk's name, roughly.
    const SIZE_BYTES: usize = 64;
    let stats = client.domain_stats(&domains).await?;
    let disks = stats.iter().flat_map(|stats| stats.capacity_bytes.keys());
    budget.take(disks.map(|name| name.len() + SIZE_BYTES).sum())?;
    Ok(stats
        .into_iter()
        .map(|stats| {
            let (state, capacity_bytes) = (stats.state, stats.capacity_bytes);
            (stats.domain, DomainFacts { state, capacity_bytes, written_bytes: stats.written_bytes })
        })
        .collect())
}

/// None for a pool that is gone by now.
async fn read_pool(client: Client, pool: PoolRef, budget: Budget) -> Result<Option<Pool>, LibvirtError> {
    let Some(xml) = unless_gone(client.pool_xml(&pool).await, &[code::NO_STORAGE_POOL])? else {
        return Ok(None);
    };
    budget.take(xml.len())?;
    let what = || format!("storage pool {}", pool.uuid);
    Pool::parse(&xml).map(Some).map_err(|error| LibvirtError::definition(what(), &error))
}

/// Those volumes that disks are in, as far as their pools are active.
async fn read_volumes(
    client: &Client,
    domains: &[Domain],
    budget: &Budget,
) -> Result<HashMap<(String, String), Volume>, LibvirtError> {
    let wanted: HashSet<(&str, &str)> = domains.iter().flat_map(Domain::volumes).collect();
    if wanted.is_empty() {
        return Ok(HashMap::new());
    }
    let pools: HashMap<String, PoolRef> =
        client.pools().await?.into_iter().map(|pool| (pool.name.clone(), pool)).collect();
    let wanted: Vec<(PoolRef, String)> = wanted
        .into_iter()
        .filter_map(|(pool, volume)| Some((pools.get(pool)?.clone(), volume.to_owned())))
        .collect();
    let volumes =
        gather(wanted, |(pool, volume)| read_volume(client.clone(), pool, volume, budget.clone())).await?;
    Ok(volumes.into_iter().flatten().collect())
}

/// None for a volume that can't be looked up now: it is gone, or its pool is off.
async fn read_volume(
    client: Client,
    pool: PoolRef,
    name: String,
    budget: Budget,
) -> Result<Option<((String, String), Volume)>, LibvirtError> {
    const GONE: [i32; 3] = [code::NO_STORAGE_VOL, code::NO_STORAGE_POOL, code::OPERATION_INVALID];
    let Some(volume) = unless_gone(client.volume(&pool, &name).await, &GONE)? else { return Ok(None) };
    let Some(xml) = unless_gone(client.volume_xml(&volume).await, &GONE)? else { return Ok(None) };
    budget.take(xml.len())?;
    let read = Volume::parse(&xml).map_err(|error| {
        LibvirtError::definition(format!("volume {name} of storage pool {}", pool.name), &error)
    })?;
    Ok(read.map(|volume| ((pool.name, name), volume)))
}

/// Sizes that running guests were too busy to tell this time.
fn keep_sizes(vms: &mut [Vm], last: &Inventory) {
    let last: HashMap<Uuid, &Vm> = last.vms.iter().map(|vm| (vm.uuid, vm)).collect();
    for vm in vms.iter_mut().filter(|vm| matches!(vm.power, Power::On | Power::Paused)) {
        let Some(before) = last.get(&vm.uuid) else { continue };
        for disk in vm.disks.iter_mut().filter(|disk| disk.size_bytes.is_none()) {
            let same = before.disk(&disk.name).filter(|before| before.path == disk.path);
            disk.size_bytes = same.and_then(|before| before.size_bytes);
        }
    }
}

/// Asks for each of `items`, many at once; the answers are in no order. The first error ends it.
async fn gather<T, R, F>(items: Vec<T>, ask: impl Fn(T) -> F) -> Result<Vec<R>, LibvirtError>
where
    R: Send + 'static,
    F: Future<Output = Result<R, LibvirtError>> + Send + 'static,
{
    let mut asked = JoinSet::new();
    let mut answers = Vec::new();
    let mut items = items.into_iter();
    loop {
        while asked.len() < MAX_CALLS
            && let Some(item) = items.next()
        {
            asked.spawn(ask(item));
        }
        match asked.join_next().await {
            None => return Ok(answers),
            Some(Ok(answer)) => answers.push(answer?),
            Some(Err(error)) => std::panic::resume_unwind(error.into_panic()),
        }
    }
}

fn chunks(domains: &[DomainRef]) -> Vec<Vec<DomainRef>> {
    domains.chunks(STATS_AT_ONCE).map(<[_]>::to_vec).collect()
}

/// None if the daemon says that what was asked for is gone.
fn unless_gone<T>(answer: Result<T, LibvirtError>, gone: &[i32]) -> Result<Option<T>, LibvirtError> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.remote().is_some_and(|remote| gone.contains(&remote.code)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// What definitions of one reading take together.
#[derive(Debug, Clone, Default)]
struct Budget(Arc<AtomicUsize>);

impl Budget {
    fn take(&self, len_bytes: usize) -> Result<(), LibvirtError> {
        if self.0.fetch_add(len_bytes, Ordering::Relaxed) + len_bytes > MAX_DEFINITIONS_BYTES {
            let reason = format!("they have more than {MAX_DEFINITIONS_BYTES} bytes together");
            return Err(LibvirtError::definition("all domains", &reason));
        }
        Ok(())
    }
}
