//! Groups as files.

use std::path::{Path, PathBuf};

use vra::config::read_text;

use super::ask::Ask;
use super::{Failure, show};
use crate::api::{Client, ImportOutcome, Request, Response, VpgExport};

/// Longest file that is read, in bytes: what the manager takes in one message.
const MAX_EXPORT_BYTES: u64 = crate::api::MAX_MESSAGE_BYTES as u64 / 2;

/// An export to read.
#[derive(Debug, clap::Args)]
pub(super) struct Import {
    /// The file that `zvm vpg export` wrote.
    file: PathBuf,
    /// Tell what would be done, and do nothing.
    #[arg(long)]
    dry_run: bool,
}

impl Ask<'_> {
    /// Writes definitions of groups to standard output.
    pub(super) async fn export(&self, vpgs: Vec<String>) -> Result<(), Failure> {
        let mut client = Client::connect(&self.config.socket).await?;
        let response = client.call(Request::VpgExport { vpgs }).await?;
        Ok(show::response(&response, self.json)?)
    }

    /// Creates the groups of a file, and tells what became of each.
    pub(super) async fn import(&self, import: Import) -> Result<(), Failure> {
        let export = read(&import.file).map_err(Failure::Usage)?;
        let mut client = Client::connect(&self.config.socket).await?;
        let response = client.call(Request::VpgImport { export, dry_run: import.dry_run }).await?;
        let Response::Imported(imported) = &response else { return Err(Failure::Unexpected) };
        show::response(&response, self.json)?;
        let refused = imported.iter().filter(|vpg| matches!(vpg.outcome, ImportOutcome::Refused(_))).count();
        if refused > 0 {
            return Err(Failure::NotImported { refused, all: imported.len() });
        }
        Ok(())
    }
}

fn read(path: &Path) -> Result<VpgExport, String> {
    let text = read_text(path, MAX_EXPORT_BYTES)
        .map_err(|error| format!("cannot read {}: {error}", path.display()))?;
    serde_json::from_str(&text)
        .map_err(|error| format!("{} is not what `zvm vpg export` writes: {error}", path.display()))
}
