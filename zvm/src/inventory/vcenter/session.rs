//! A login at a vCenter, with a view of all that is read and a filter that tells what becomes of it.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use uuid::Uuid;

use super::answers::{Change, Page, UpdateSet, only};
use super::client::{CallError, Client};
use super::objects::Objects;
use super::settings::{Settings, Timing};
use super::soap::{Call, Fault, Moref, shown};
use crate::inventory::xml::Element;

/// Objects that are asked for at once: some megabytes of VMs.
const PAGE_OBJECTS: &str = "200";

/// Most pages of one retrieval.
const MAX_PAGES: usize = 10_000;

/// How long a logout may take.
const LOGOUT_LIMIT: Duration = Duration::from_secs(5);

/// What is asked with no login.
const SERVICE_INSTANCE: &str = "ServiceInstance";

/// A login.
pub(super) struct Session {
    client: Arc<Client>,
    timing: Timing,
    /// The vCenter's own UUID.
    pub(super) instance: Uuid,
    session_manager: Moref,
    property_collector: Moref,
    view: Moref,
    /// A collector of its own, that has the filter.
    news_collector: Moref,
    /// What the collector said last.
    version: String,
    /// The call under way for news. It runs by itself: what it brings is told only once, so that it must not be lost.
    waiting: Option<Waiting>,
    is_logged_in: bool,
}

/// A call that is given up with its owner.
struct Waiting(JoinHandle<Result<Option<UpdateSet>, CallError>>);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Session {
    /// Logs in, and lets the vCenter watch all that is read.
    pub(super) async fn open(client: Client, settings: &Settings) -> Result<Self, CallError> {
        let timing = settings.timing.clone();
        let service = Moref::new(SERVICE_INSTANCE, SERVICE_INSTANCE);
        let response = client.call(Call::new("RetrieveServiceContent", &service), timing.call).await?;
        let content = only(response, "returnval")
            .ok_or_else(|| CallError::Unusable("RetrieveServiceContent: there is nothing in it".into()))?;
        let instance = instance_of(&content)?;
        let manager = |name: &str| {
            let missing = || CallError::Unusable(format!("RetrieveServiceContent: there is no {name} in it"));
            content.child(name).and_then(Moref::of).ok_or_else(missing)
        };
        let root_folder = manager("rootFolder")?;
        let view_manager = manager("viewManager")?;
        let mut session = Self {
            session_manager: manager("sessionManager")?,
            property_collector: manager("propertyCollector")?,
            view: root_folder.clone(),
            news_collector: root_folder.clone(),
            client: Arc::new(client),
            timing,
            instance,
            version: String::new(),
            waiting: None,
            is_logged_in: false,
        };
        let login = Call::new("Login", &session.session_manager)
            .text("userName", &settings.user)
            .text("password", &settings.password);
        session.call(login).await?;
        session.is_logged_in = true;

        let view = Call::new("CreateContainerView", &view_manager).reference("container", &root_folder);
        session.view = session.call_for_object(view.view_types().text("recursive", "true")).await?;
        let collector = Call::new("CreatePropertyCollector", &session.property_collector);
        session.news_collector = session.call_for_object(collector).await?;
        let filter = Call::new("CreateFilter", &session.news_collector)
            .filter_spec("spec", &session.view)
            .text("partialUpdates", "false");
        session.call(filter).await?;
        Ok(session)
    }

    /// All objects as they are now. News that come later may tell of some of it again.
    pub(super) async fn retrieve(&self) -> Result<Objects, CallError> {
        let mut call = Call::new("RetrievePropertiesEx", &self.property_collector)
            .filter_spec("specSet", &self.view)
            .open("options")
            .text("maxObjects", PAGE_OBJECTS)
            .close("options");
        let mut objects = Objects::default();
        let mut tokens = HashSet::new();
        for _ in 0..MAX_PAGES {
            let page = Page::of(self.call(call).await?).map_err(CallError::Unusable)?;
            check_login("RetrievePropertiesEx", &page.objects)?;
            for change in &page.objects {
                objects.apply(change).map_err(|error| CallError::Unusable(error.to_string()))?;
            }
            let Some(token) = page.token else { return Ok(objects) };
            call = Call::new("ContinueRetrievePropertiesEx", &self.property_collector).text("token", &token);
            if !tokens.insert(token) {
                return Err(CallError::Unusable(
                    "RetrievePropertiesEx: its pages go round in a circle".into(),
                ));
            }
        }
        Err(CallError::Unusable(format!("RetrievePropertiesEx: more than {MAX_PAGES} pages")))
    }

    /// The next news: what there is at once, or, with `is_patient`, what comes within the time for that. None if there is nothing.
    /// The first news are all objects. The rest of a truncated set is there at once, and is to be waited for with `is_patient`.
    ///
    /// Cancel safe: what a dropped call would have brought, the next one brings.
    pub(super) async fn news(&mut self, is_patient: bool) -> Result<Option<UpdateSet>, CallError> {
        let waiting = match &mut self.waiting {
            Some(waiting) if !is_patient && !waiting.0.is_finished() => return Ok(None),
            Some(waiting) => waiting,
            None => {
                let started =
                    self.start_waiting(if is_patient { self.timing.news_wait } else { Duration::ZERO });
                self.waiting.insert(started)
            }
        };
        let result = (&mut waiting.0).await;
        self.waiting = None;
        let set = result.map_err(|error| CallError::Unusable(format!("WaitForUpdatesEx: {error}")))??;
        if let Some(set) = &set {
            if set.has_lost_its_view {
                return Err(lost("WaitForUpdatesEx", "ManagedObjectNotFound"));
            }
            check_login("WaitForUpdatesEx", &set.changes)?;
            self.version.clone_from(&set.version);
        }
        Ok(set)
    }

    /// Notes that nobody is logged in any more.
    pub(super) fn note_logout(&mut self) {
        self.is_logged_in = false;
    }

    fn start_waiting(&self, patience: Duration) -> Waiting {
        let call = Call::new("WaitForUpdatesEx", &self.news_collector)
            .text("version", &self.version)
            .open("options")
            .text("maxWaitSeconds", &patience.as_secs().to_string())
            .text("maxObjectUpdates", PAGE_OBJECTS)
            .close("options");
        let (client, limit) = (self.client.clone(), patience + self.timing.call);
        Waiting(tokio::spawn(async move {
            UpdateSet::of(client.call(call, limit).await?).map_err(CallError::Unusable)
        }))
    }

    async fn call(&self, call: Call) -> Result<Element, CallError> {
        self.client.call(call, self.timing.call).await
    }

    async fn call_for_object(&self, call: Call) -> Result<Moref, CallError> {
        let method = call.method();
        let response = self.call(call).await?;
        let object = response.child("returnval").and_then(Moref::of);
        object.ok_or_else(|| CallError::Unusable(format!("{method}: there is no object in the answer")))
    }
}

impl Drop for Session {
    /// Logs out if that can still be done: vCenters keep a limited number of sessions for half an hour.
    fn drop(&mut self) {
        if !self.is_logged_in {
            return;
        }
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let (client, manager) = (self.client.clone(), self.session_manager.clone());
            runtime.spawn(async move {
                if let Err(error) = client.call(Call::new("Logout", &manager), LOGOUT_LIMIT).await {
                    tracing::debug!(%error, "a vCenter's session could not be ended; it ends by itself");
                }
            });
        }
    }
}

/// The UUID of the vCenter that a `ServiceContent` is of.
fn instance_of(content: &Element) -> Result<Uuid, CallError> {
    let kind = content.text_at(&["about", "apiType"]).unwrap_or_default();
    if kind != "VirtualCenter" {
        let reason = format!("it is a {:?}, not a vCenter; hosts of their own are not read", shown(kind));
        return Err(CallError::Unusable(reason));
    }
    let instance = content.text_at(&["about", "instanceUuid"]).and_then(|text| text.parse().ok());
    instance.ok_or_else(|| CallError::Unusable("it has no UUID of its own (about.instanceUuid)".into()))
}

/// Some vCenters answer a session that has ended with objects that have no properties.
fn check_login(method: &'static str, changes: &[Change]) -> Result<(), CallError> {
    let is_ended =
        changes.iter().flat_map(|change| &change.missing).any(|(_, fault)| fault == "NotAuthenticated");
    if is_ended { Err(lost(method, "NotAuthenticated")) } else { Ok(()) }
}

fn lost(method: &'static str, name: &str) -> CallError {
    CallError::Fault { method, fault: Fault { name: name.into(), message: String::new() } }
}
