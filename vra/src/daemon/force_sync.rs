//! Full syncs that somebody asks for.

use std::sync::Arc;

use super::source_status::paused;
use super::sources::LiveSource;
use super::{Daemon, lock};
use crate::api::{ApiError, ErrorCode, ForceSync};
use crate::capture::modes::Mode;
use crate::ship::Phase;

impl Daemon {
    /// Begins full syncs of the VMs that this VRA is source of, of all that are meant or of none.
    pub(super) fn force_sync(&self, force: ForceSync) -> Result<(), ApiError> {
        let vpg = self.vpg(force.vpg)?;
        if vpg.paused {
            return Err(paused(&vpg));
        }
        let is_meant = |vm| force.vm.is_none_or(|meant| meant == vm);
        let here = vpg.vms.iter().filter(|vm| vm.source.id == self.vra && is_meant(vm.id));
        let live = lock(&self.sources).clone();
        let mut sources: Vec<Arc<LiveSource>> = Vec::new();
        for vm in here {
            let source = live.get(&vm.id).cloned().ok_or_else(|| {
                ApiError::new(ErrorCode::NotReady, format!("VM {} is not protected", vm.name))
                    .remedy("attach its volumes (`vra attach`)")
            })?;
            may_sync(&source)?;
            sources.push(source);
        }
        if sources.is_empty() {
            let message = format!("no such VM of VPG \"{}\" runs at this VRA", vpg.name);
            return Err(ApiError::new(ErrorCode::NotFound, message).remedy("ask the VM's source VRA"));
        }
        for source in sources {
            tracing::info!(vm = source.definition().name, "a full sync was asked for");
            source.vm().renew();
        }
        Ok(())
    }
}

fn may_sync(source: &LiveSource) -> Result<(), ApiError> {
    let name = &source.definition().name;
    let snapshot = source.vm().snapshot();
    match snapshot.mode {
        Mode::Streaming { .. } if snapshot.sync_id.is_some() => {
            Err(ApiError::new(ErrorCode::Busy, format!("a full sync of VM {name} runs"))
                .remedy("wait for its end"))
        }
        Mode::Overflow { .. } | Mode::Stopped => {
            Err(ApiError::new(ErrorCode::Busy, format!("a full sync of VM {name} follows by itself"))
                .remedy("wait for its end"))
        }
        Mode::Lost => Err(ApiError::new(ErrorCode::NotReady, format!("VM {name} is not captured"))
            .remedy("restart the VRA")),
        Mode::Streaming { .. } if source.sender().phase != Phase::Streaming => {
            Err(ApiError::new(ErrorCode::NotReady, format!("VM {name} has no stream to its target"))
                .remedy("`vra status` shows what is in the way"))
        }
        Mode::Streaming { .. } => Ok(()),
    }
}
