//! Looks at every enrolled VRA, again and again, each at its own pace so that a dead one holds up none.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use vra::api::{Request, Response, VraId};
use vra::report::chain;

use super::{Manager, check_name};
use crate::model::event::{Entity, EventKind};
use crate::model::vra::{Vra, VraState};
use crate::reconcile::{LastStatus, Seen};
use crate::remote::CallError;
use crate::store::{self, StoreError};

impl Manager {
    /// Keeps a watcher running for each enrolled VRA, until cancelled.
    pub async fn watch_vras(self: Arc<Self>) {
        let mut watchers: HashMap<VraId, Watcher> = HashMap::new();
        let interval = Duration::from_millis(self.config.reconcile.interval_ms.max(50));
        loop {
            match self.enrolled_vras().await {
                Ok(vras) => {
                    let stays = |id: &VraId, watcher: &Watcher| {
                        vras.iter().any(|vra| vra.id == *id && vra.address == watcher.address)
                    };
                    watchers.retain(|id, watcher| stays(id, watcher));
                    let mut observed = self.observed.lock().expect("no code panics while it holds this lock");
                    observed.retain(|id, _| vras.iter().any(|vra| vra.id == *id));
                    drop(observed);
                    for vra in vras {
                        watchers.entry(vra.id).or_insert_with(|| Watcher {
                            address: vra.address.clone(),
                            task: tokio::spawn(self.clone().watch_one(vra, interval)),
                        });
                    }
                }
                Err(error) => tracing::error!(error = chain(&error), "the database failed"),
            }
            tokio::time::sleep(interval).await;
        }
    }

    async fn enrolled_vras(&self) -> Result<Vec<Vra>, StoreError> {
        let mut vras = store::vras::list(&mut *self.store.read().await?).await?;
        vras.retain(|vra| vra.state == VraState::Enrolled);
        Ok(vras)
    }

    async fn watch_one(self: Arc<Self>, mut vra: Vra, interval: Duration) {
        let endpoint = vra.endpoint();
        loop {
            let asked_us = self.clock.now_us();
            let answer = self.remote.call(&endpoint, Request::Status, self.request_timeout()).await;
            if vra.is_known_by_id_alone()
                && let Ok(Response::Status(status)) = &answer
            {
                match self.recognise(&vra, &status.name).await {
                    Ok(known) => vra = known,
                    Err(error) => tracing::error!(error = chain(&error), "the database failed"),
                }
            }
            self.take_in(&vra, asked_us, answer);
            tokio::time::sleep(interval).await;
        }
    }

    /// Notes what a VRA calls itself, and its certificate, if it was known by its id alone until now; gives what is known of it then.
    async fn recognise(&self, vra: &Vra, name: &str) -> Result<Vra, StoreError> {
        let Some(certificate) = self.remote.certificate(&vra.endpoint()).await else {
            return Ok(vra.clone());
        };
        let mut tx = self.store.begin().await?;
        let vras = store::vras::list(&mut tx).await?;
        let mut known = vras.iter().find(|known| known.id == vra.id).unwrap_or(vra).clone();
        if !known.is_known_by_id_alone() {
            return Ok(known);
        }
        store::certificates::recognise(&mut tx, vra.id, &known.certificate_serial, &certificate).await?;
        (known.certificate_serial, known.certificate_ends_us) = (certificate.serial, certificate.ends_us);
        let is_taken = |name: &str| vras.iter().any(|other| other.id != vra.id && other.name == name);
        if check_name("VRA", name).is_ok() && !is_taken(name) {
            let description = format!("VRA {} answers and is called {name}", known.name);
            name.clone_into(&mut known.name);
            store::vras::set_name(&mut tx, vra.id, name).await?;
            self.note(&mut tx, EventKind::VraNamed, true, Entity::vra(vra.id), description, None).await?;
        }
        tx.commit().await?;
        Ok(known)
    }

    fn take_in(&self, vra: &Vra, asked_us: u64, answer: Result<Response, CallError>) {
        let mut observed = self.observed.lock().expect("no code panics while it holds this lock");
        let seen = observed.entry(vra.id).or_insert_with(|| Seen { since_us: asked_us, ..Seen::default() });
        let was_reachable = seen.reachable;
        match answer {
            Ok(Response::Status(status)) => {
                seen.reachable = true;
                seen.error = None;
                seen.last = Some(LastStatus { asked_us, status: *status });
            }
            Ok(_) => {
                seen.reachable = false;
                seen.error = Some("it answered with something that wasn't asked for".into());
            }
            Err(error) => {
                seen.reachable = false;
                seen.error = Some(error.to_string());
            }
        }
        if seen.reachable != was_reachable {
            seen.since_us = asked_us;
            match &seen.error {
                None => tracing::info!(vra = %vra.id, name = vra.name, "the VRA answers"),
                Some(error) => {
                    tracing::warn!(vra = %vra.id, name = vra.name, error, "the VRA does not answer");
                }
            }
        }
        drop(observed);
        self.wake.notify_one();
    }
}

#[derive(Debug)]
struct Watcher {
    address: String,
    task: JoinHandle<()>,
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.task.abort();
    }
}
