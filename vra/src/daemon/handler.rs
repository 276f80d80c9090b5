//! Answers the control protocol.

use journal::crypt::{SiteKey, SiteKeys};
use zeroize::Zeroizing;

use super::{Daemon, LocalIdentity, lock};
use crate::api::{
    ApiError, ErrorCode, Hello, HelloReply, MAX_SITE_KEYS, PROTOCOL_VERSION, Request, Response, SetSiteKeys,
    SetTrust,
};
use crate::control::{Caller, Handler};

impl Handler for Daemon {
    async fn handle(&self, caller: Caller, request: Request) -> Result<Response, ApiError> {
        self.authorise(caller)?;
        match request {
            Request::Hello(hello) => self.hello(&hello).map(Response::Hello),
            Request::Status => Ok(Response::Status(Box::new(self.status().await))),
            Request::Doctor => {
                let report = tokio::task::block_in_place(|| crate::doctor::examine(&self.config));
                Ok(Response::Doctor(report))
            }
            Request::Attach(attach) => self.attach(attach).await.map(Response::Volume),
            Request::Detach(detach) => self.detach(detach).await.map(|()| Response::Done),
            Request::List => Ok(Response::Volumes(self.volume_infos())),
            Request::ApplyVpg(definition) => self.apply_vpg(definition).await.map(Response::Vpg),
            Request::CheckVpg(definition) => self.check_vpg(&definition).await.map(|()| Response::Done),
            Request::RemoveVpg(remove) => self.remove_vpg(remove).await.map(|()| Response::Done),
            Request::ForceSync(force) => self.force_sync(force).map(|()| Response::Done),
            Request::TagCheckpoint(tag) => self.tag_checkpoint(tag).await.map(Response::Checkpoint),
            Request::SetGuestAgent(set) => self.set_guest_agent(set).await.map(|()| Response::Done),
            Request::FreezeGuests(freeze) => self.freeze_guests(freeze).await.map(Response::Guests),
            Request::ThawGuests(thaw) => Ok(Response::Guests(self.thaw_guests(thaw).await)),
            Request::LockCheckpoint(lock) => self.lock_checkpoint(lock).await.map(Response::Checkpoint),
            Request::SetTrust(list) => self.set_trust(list).await.map(|()| Response::Done),
            Request::SetSiteKeys(keys) => self.set_site_keys(&keys).await.map(|()| Response::Done),
            Request::ListDefinitions(list) => Ok(Response::Definitions(self.list_definitions(list))),
            Request::ListCheckpoints(list) => self.list_checkpoints(list).await.map(Response::Checkpoints),
            Request::OpenView(open) => self.open_view(open).await.map(Response::View),
            Request::CloseView(close) => self.close_view(close).await.map(|()| Response::Done),
            Request::ListViews => Ok(Response::Views(self.view_infos())),
        }
    }
}

impl Daemon {
    /// A ZVM may control only if it is the one that enrolled this VRA.
    fn authorise(&self, caller: Caller) -> Result<(), ApiError> {
        let Caller::Zvm(zvm) = caller else { return Ok(()) };
        let own = LocalIdentity::open(&self.config)?.zvm();
        if own == Some(zvm) {
            return Ok(());
        }
        Err(ApiError::new(
            ErrorCode::Forbidden,
            format!("ZVM {zvm} may not control VRA {}: it is not the one that enrolled it", self.vra),
        )
        .remedy("enrol the VRA at this ZVM, `vra enroll`"))
    }

    fn hello(&self, hello: &Hello) -> Result<HelloReply, ApiError> {
        if hello.protocol == 0 {
            return Err(ApiError::new(
                ErrorCode::VersionMismatch,
                format!("the client speaks protocol 0, this VRA speaks 1 to {PROTOCOL_VERSION}"),
            )
            .remedy("upgrade the client"));
        }
        Ok(HelloReply {
            protocol: hello.protocol.min(PROTOCOL_VERSION),
            vra: self.vra,
            name: self.name(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            features: Vec::new(),
        })
    }

    async fn set_site_keys(&self, given: &SetSiteKeys) -> Result<(), ApiError> {
        if given.keys.len() > MAX_SITE_KEYS {
            let message = format!("{} site keys are more than {MAX_SITE_KEYS}", given.keys.len());
            return Err(ApiError::new(ErrorCode::BadRequest, message));
        }
        let lines: Vec<&str> = given.keys.iter().map(|line| line.0.as_str()).collect();
        let text = Zeroizing::new(lines.join("\n"));
        let keys = SiteKeys::parse(&text)
            .map_err(|error| ApiError::new(ErrorCode::BadRequest, format!("not site keys: {error}")))?;
        let ids: Vec<_> = self.targets.keys().with_own(&keys).iter().map(SiteKey::id).collect();
        if ids != self.targets.keys().ids() {
            self.targets.set_keys(keys).await?;
            tracing::info!(?ids, "took the site's keys");
            self.retry_targets().await;
        }
        Ok(())
    }

    async fn set_trust(&self, list: SetTrust) -> Result<(), ApiError> {
        const MAX_ENTRIES: usize = 100_000;
        if list.revoked_serials.len() + list.revoked_vras.len() > MAX_ENTRIES {
            let message = format!("the list of revoked certificates has more than {MAX_ENTRIES} entries");
            return Err(ApiError::new(ErrorCode::BadRequest, message));
        }
        let mut change = self.state.change().await;
        let former = change.get().trust.version;
        if list.version < former {
            return Err(ApiError::new(
                ErrorCode::Stale,
                format!(
                    "version {} of the list of revoked certificates is older than {former}",
                    list.version
                ),
            ));
        }
        change.update(|state| state.trust = list.clone())?;
        let link = lock(&self.link).link();
        match link {
            Some(link) => link.set_trust(list),
            None => self.trust.set(list),
        }
        Ok(())
    }
}
