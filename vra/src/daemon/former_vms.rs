//! VMs that left their groups: once that is in force, what this VRA has of them as a target goes.

use super::definition::is_in_datastore;
use super::state::{Change, LettingGo, State};
use super::{Daemon, Finding, lock};
use crate::api::{ApiError, ErrorCode, FormerVm, Severity, VpgDefinition};
use crate::receive::FormerFiles;
use crate::report::chain;

impl Daemon {
    /// The VMs that a definition takes out of the one that is in force, if they can go.
    ///
    /// # Errors
    /// Views of such a VM are open.
    pub(super) fn leaving_with(
        &self,
        state: &State,
        definition: &VpgDefinition,
    ) -> Result<Vec<LettingGo>, ApiError> {
        let known = state.vpgs.get(&definition.id).map_or(0, |in_force| in_force.revision);
        let is_new = |former: &&FormerVm| former.target == self.vra && former.revision > known;
        let news: Vec<&FormerVm> = definition.former.iter().filter(is_new).collect();
        let is_shown = |former: &&&FormerVm| self.targets.has_open(former) && state.has_views_of(former.id);
        if let Some(former) = news.iter().find(is_shown) {
            let message = format!(
                "VM {} can't be taken out of VPG \"{}\": views of it are open",
                former.name, definition.name
            );
            return Err(ApiError::new(ErrorCode::Busy, message).remedy("close them first"));
        }
        let leaving = |former: &FormerVm| LettingGo {
            vpg: definition.id,
            vpg_name: definition.name.clone(),
            former: former.clone(),
        };
        Ok(news.into_iter().map(leaving).collect())
    }

    /// Lets go of the VMs that left their groups. What fails is noted, and tried again by itself.
    pub(super) async fn let_go_of_former(&self, change: &mut Change<'_>) {
        for leaving in change.get().letting_go.clone() {
            let vm = leaving.former.id;
            match self.let_go(&leaving).await {
                Ok(()) => {
                    lock(&self.former_problems).remove(&vm);
                    // Done again, it does no harm.
                    if let Err(error) = change.update(|state| state.letting_go.retain(|it| *it != leaving)) {
                        tracing::warn!(%vm, error = chain(&error), "can't note that a VM's files have gone");
                    }
                }
                Err(error) => {
                    if lock(&self.former_problems).insert(vm, error.clone()).is_none() {
                        tracing::warn!(%vm, name = leaving.former.name, %error, "can't let go of a VM's files: trying again");
                    }
                }
            }
        }
    }

    async fn let_go(&self, leaving: &LettingGo) -> Result<(), ApiError> {
        let LettingGo { vpg, vpg_name, former } = leaving;
        let datastore = former.datastore.display();
        if !self.targets.has_open(former) && !is_in_datastore(former, &self.config.datastores) {
            tracing::warn!(vm = former.name, %datastore, "not in a datastore of this VRA any more: the VM's files, if there are any, stay");
            return Ok(());
        }
        let files = self.targets.let_go((vpg_name, *vpg), former).await?;
        let told = match files {
            FormerFiles::Removed => "its files are removed",
            FormerFiles::Kept => "its files are set aside",
            FormerFiles::None => "it has no files here",
        };
        tracing::info!(vm = %former.id, name = former.name, vpg = vpg_name, %datastore, "no longer a member: {told}");
        Ok(())
    }

    /// Files that can't be let go of.
    pub(super) fn former_findings(&self, found: &mut Vec<Finding>) {
        let seen = self.seen();
        for (vm, error) in lock(&self.former_problems).iter() {
            let Some(leaving) = seen.letting_go.iter().find(|leaving| leaving.former.id == *vm) else {
                continue;
            };
            found.push(Finding {
                code: "former-files-stay",
                severity: Severity::Warning,
                vm: Some(*vm),
                vpg: Some(leaving.vpg),
                message: format!(
                    "VM {} left VPG \"{}\", and its files can't be let go of: {}",
                    leaving.former.name, leaving.vpg_name, error.message
                ),
                remedy: Some("the VRA tries again by itself once that is mended".to_owned()),
            });
        }
    }
}
