//! A group's replication: paused, resumed.

use vra::api::{ApiError, ErrorCode};

use super::Manager;
use crate::api::VpgDetails;
use crate::model::event::EventKind;
use crate::model::vpg::{VpgSettings, VpgState};

impl Manager {
    /// Pauses a group's replication, or lets it go on; the engine tells its VRAs. Again is harmless.
    pub async fn pause_vpg(&self, name: &str, paused: bool) -> Result<VpgDetails, ApiError> {
        let vpg = self.find_vpg(name).await?;
        if vpg.state != VpgState::Active {
            return Err(ApiError::new(ErrorCode::Conflict, format!("VPG {name} is being deleted")));
        }
        let (kind, what) = match paused {
            true => (EventKind::PauseProtectionGroup, "was paused"),
            false => (EventKind::ResumeProtectionGroup, "goes on"),
        };
        let settings = VpgSettings { paused, ..vpg.settings.clone() };
        self.save_settings(&vpg, &settings, kind, format!("replication of VPG {} {what}", vpg.name)).await?;
        self.show_vpg(name).await
    }
}
