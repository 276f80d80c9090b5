//! Guests that are frozen for a checkpoint. Their VRAs thaw them even if this manager ends in between (D5).

use std::collections::BTreeMap;
use std::time::Duration;

use vra::api::{ApiError, ErrorCode, FreezeGuests, GuestsFrozen, Request, Response, ThawGuests, VraId};

use super::Manager;
use crate::model::vpg::Vpg;
use crate::model::vra::Vra;

/// How long guests stay frozen at most, in milliseconds.
const LIMIT_MS: u32 = 8_000;

/// A guest may take that long to write out what is dirty.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

impl Manager {
    /// Freezes the guests of a group at all of its sources, or none of them.
    pub(super) async fn freeze_guests(&self, vpg: &Vpg, vras: &BTreeMap<VraId, Vra>) -> Result<(), ApiError> {
        let mut told = GuestsFrozen::default();
        let mut result = Ok(());
        for source in sources(vpg, vras) {
            let freeze = Request::FreezeGuests(FreezeGuests { vpg: vpg.id, limit_ms: LIMIT_MS });
            match self.guests_at(source, freeze).await {
                Ok(here) => {
                    told.frozen.extend(here.frozen);
                    told.without_agent.extend(here.without_agent);
                }
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
        }
        if result.is_ok() && told.frozen.is_empty() {
            let message = format!("no VM of VPG {} has a guest agent", vpg.name);
            result = Err(ApiError::new(ErrorCode::BadRequest, message)
                .remedy("name their sockets on their hosts with `vra guest-agent`"));
        }
        if result.is_err() {
            self.thaw_guests(vpg, vras).await;
        }
        result
    }

    /// Thaws them. A VRA that doesn't answer thaws its guests by itself.
    pub(super) async fn thaw_guests(&self, vpg: &Vpg, vras: &BTreeMap<VraId, Vra>) {
        for source in sources(vpg, vras) {
            let thawed = self.guests_at(source, Request::ThawGuests(ThawGuests { vpg: vpg.id })).await;
            if let Err(error) = thawed {
                tracing::warn!(vra = source.name, %error, "the VRA will thaw its guests by itself");
            }
        }
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

fn sources<'a>(vpg: &Vpg, vras: &'a BTreeMap<VraId, Vra>) -> Vec<&'a Vra> {
    vpg.sources().into_iter().filter_map(|vra| vras.get(&vra)).collect()
}
