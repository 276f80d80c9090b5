//! Guests that are frozen for a checkpoint. Their VRAs thaw them even if this manager ends in between (D5).

use std::collections::BTreeMap;
use std::task::Poll;
use std::time::Duration;

use vra::api::{ApiError, ErrorCode, FreezeGuests, GuestsFrozen, Request, Response, ThawGuests, VraId};

use super::Manager;
use crate::model::vpg::{Member, Vpg};
use crate::model::vra::Vra;

/// How long guests stay frozen at most, in milliseconds.
const LIMIT_MS: u32 = 8_000;

/// A guest may take some seconds to write out what is dirty, and those frozen with it are thawed again if it can't be.
const ANSWER_WITHIN: Duration = Duration::from_secs(15);

impl Manager {
    /// Freezes the guests of a group at all of its sources at the same time, or none of them. Gives the names of the VMs that have no agent.
    pub(super) async fn freeze_guests(
        &self,
        vpg: &Vpg,
        vras: &BTreeMap<VraId, Vra>,
    ) -> Result<Vec<String>, ApiError> {
        let freeze = Request::FreezeGuests(FreezeGuests { vpg: vpg.id, limit_ms: LIMIT_MS });
        let (mut told, mut frozen_at, mut result) = (GuestsFrozen::default(), Vec::new(), Ok(()));
        for (source, answer) in self.guests_at_all(sources(vpg, vras), &freeze).await {
            match answer {
                Ok(here) => {
                    told.frozen.extend(here.frozen);
                    told.without_agent.extend(here.without_agent);
                    frozen_at.push(source);
                }
                Err(error) => result = result.and(Err(error)),
            }
        }
        if result.is_ok() && told.frozen.is_empty() {
            let message = format!("no VM of VPG {} has a guest agent", vpg.name);
            result = Err(ApiError::new(ErrorCode::BadRequest, message)
                .remedy("name their sockets on their hosts with `vra guest-agent`"));
        }
        if result.is_err() {
            // The others' guests may be frozen for somebody else.
            self.thaw_guests_at(vpg, frozen_at).await;
        }
        let is_without = |member: &&Member| told.without_agent.contains(&member.vm);
        let without = vpg.settings.vms.iter().filter(is_without).map(|member| member.name.clone());
        result.map(|()| without.collect())
    }

    /// Thaws those that [`Manager::freeze_guests`] has frozen. A VRA that doesn't answer thaws its guests by itself.
    pub(super) async fn thaw_guests(&self, vpg: &Vpg, vras: &BTreeMap<VraId, Vra>) {
        self.thaw_guests_at(vpg, sources(vpg, vras)).await;
    }

    async fn thaw_guests_at(&self, vpg: &Vpg, sources: Vec<Vra>) {
        let thaw = Request::ThawGuests(ThawGuests { vpg: vpg.id });
        for (source, answer) in self.guests_at_all(sources, &thaw).await {
            if let Err(error) = answer {
                tracing::warn!(vra = source.name, %error, "the VRA will thaw its guests by itself");
            }
        }
    }

    /// Asks all of them at the same time.
    async fn guests_at_all(
        &self,
        sources: Vec<Vra>,
        request: &Request,
    ) -> Vec<(Vra, Result<GuestsFrozen, ApiError>)> {
        let answers = join_all(sources.iter().map(|source| self.guests_at(source, request.clone()))).await;
        sources.into_iter().zip(answers).collect()
    }

    async fn guests_at(&self, source: &Vra, request: Request) -> Result<GuestsFrozen, ApiError> {
        let timeout = self.request_timeout().max(ANSWER_WITHIN);
        match self.remote.call(&source.endpoint(), request, timeout).await {
            Ok(Response::Guests(guests)) => Ok(guests),
            Ok(_) => Err(ApiError::new(ErrorCode::Other, format!("VRA {} gave a wrong answer", source.name))),
            Err(error) => Err(error.into_api_error(&source.name)),
        }
    }
}

fn sources(vpg: &Vpg, vras: &BTreeMap<VraId, Vra>) -> Vec<Vra> {
    vpg.sources().into_iter().filter_map(|vra| vras.get(&vra).cloned()).collect()
}

/// The results of all, which run at the same time, in their order.
async fn join_all<F: Future>(all: impl Iterator<Item = F>) -> Vec<F::Output> {
    let mut running: Vec<_> = all.map(|future| (Box::pin(future), None)).collect();
    std::future::poll_fn(|context| {
        for (future, result) in running.iter_mut().filter(|(_, result)| result.is_none()) {
            if let Poll::Ready(ready) = future.as_mut().poll(context) {
                *result = Some(ready);
            }
        }
        if running.iter().all(|(_, result)| result.is_some()) { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    running.into_iter().filter_map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn all_run_at_the_same_time_and_come_in_order() {
        let (first, second) = (tokio::sync::Notify::new(), tokio::sync::Notify::new());
        // Each waits for another one that runs.
        let wait = async |number: u32| {
            if number == 0 {
                first.notified().await;
                second.notify_one();
            } else {
                first.notify_one();
                second.notified().await;
            }
            number
        };
        let waited = tokio::time::timeout(Duration::from_secs(5), join_all((0..2).map(wait))).await;
        assert_eq!(waited.expect("none waits for the end of another"), [0, 1]);
    }
}
