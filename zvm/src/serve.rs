//! `zvm serve`: everything that runs, and the unix socket where the command line asks.

use std::fs::File;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use vra::api::{ApiError, ErrorCode};
use vra::control::{FrameError, read_frame, write_frame};
use vra::report::chain;

use crate::api::{MAX_MESSAGE_BYTES, Outcome, Request, RequestFrame, Response, ResponseFrame};
use crate::config::Config;
use crate::manager::{Manager, StartError};
use crate::site_key_file::LostSiteKeys;

/// Connections to the unix socket at once; more wait.
const MAX_CONNECTIONS: usize = 64;

/// A manager that is set up and has its sockets, but answers nobody yet.
#[derive(Debug)]
pub struct Server {
    manager: Arc<Manager>,
    enrolment: quinn::Endpoint,
    listener: UnixListener,
    socket: PathBuf,
    /// Locked for as long as the manager runs: two on one state would undo each other's work.
    _lock: File,
}

/// Locks the state folder for this process, if there is one.
///
/// # Errors
/// Another process has it.
pub fn lock_state(config: &Config) -> Result<std::io::Result<File>, StartError> {
    let path = config.state_dir.join("lock");
    let lock = std::fs::OpenOptions::new().create(true).append(true).mode(0o600).open(&path);
    if let Ok(lock) = &lock
        && lock.try_lock().is_err()
    {
        return Err(StartError::Locked { path });
    }
    Ok(lock)
}

impl Server {
    /// Opens the state and the sockets. Must run inside tokio.
    pub async fn open(config: Config, lost: LostSiteKeys) -> Result<Self, StartError> {
        let lock_path = config.state_dir.join("lock");
        let socket = config.socket.clone();
        let lock = lock_state(&config)?;
        let manager = Manager::open(config, lost).await?;
        // Without a state folder the missing keys are the better thing to tell.
        let lock = lock.map_err(|source| StartError::Socket { path: lock_path, source })?;
        let enrolment = manager.listen_for_enrolment()?;
        let listener =
            listen(&socket).await.map_err(|source| StartError::Socket { path: socket.clone(), source })?;
        Ok(Self { manager, enrolment, listener, socket, _lock: lock })
    }

    /// The UDP address that VRAs enrol at.
    pub fn enrolment_address(&self) -> std::io::Result<std::net::SocketAddr> {
        self.enrolment.local_addr()
    }

    /// Works until `ended` completes, then closes what is open.
    pub async fn run(self, ended: impl Future<Output = ()>) {
        let manager = self.manager.clone();
        if let Err(error) = manager.begin_inventory().await {
            tracing::error!(error = chain(&error), "the last readings of the inventory could not be read");
        }
        let mut parts = tokio::task::JoinSet::new();
        parts.spawn(manager.clone().watch_inventory());
        parts.spawn(manager.clone().end_volumes());
        parts.spawn(manager.clone().undo_locks());
        parts.spawn(manager.clone().follow_changes());
        parts.spawn(manager.clone().watch_vras());
        parts.spawn(manager.clone().run_engine());
        parts.spawn(manager.clone().serve_enrolments(self.enrolment.clone()));
        parts.spawn(accept(self.listener, manager.clone()));
        tokio::select! {
            () = ended => {}
            part = parts.join_next() => {
                tracing::error!(?part, "a part of the manager ended by itself; the manager ends");
            }
        }
        parts.shutdown().await;
        self.enrolment.close(0_u32.into(), b"the manager ends");
        let _ = tokio::time::timeout(Duration::from_secs(1), self.enrolment.wait_idle()).await;
        manager.close().await;
        let _ = std::fs::remove_file(&self.socket);
    }
}

async fn listen(path: &std::path::Path) -> std::io::Result<UnixListener> {
    if let Some(folder) = path.parent() {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    }
    if path.exists() {
        if UnixStream::connect(path).await.is_ok() {
            return Err(std::io::ErrorKind::AddrInUse.into());
        }
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    // Until here the socket has the umask's mode; who connects is checked by user id as well.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

async fn accept(listener: UnixListener, manager: Arc<Manager>) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let own_uid = own_uid();
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a local connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        match stream.peer_cred() {
            Ok(peer) if peer.uid() == 0 || Some(peer.uid()) == own_uid => {}
            _ => continue,
        }
        let manager = manager.clone();
        tokio::spawn(async move {
            // A client that goes away, or talks nonsense, is no event of the manager's.
            let _ = serve_stream(stream, &manager).await;
            drop(place);
        });
    }
}

/// The user that this process runs as, by the owner of its own entry in `/proc`.
fn own_uid() -> Option<u32> {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").map(|data| data.uid()).ok()
}

async fn serve_stream(mut stream: UnixStream, manager: &Manager) -> Result<(), FrameError> {
    loop {
        let response = match read_frame::<serde_json::Value>(&mut stream, MAX_MESSAGE_BYTES).await {
            Ok(None) => return Ok(()),
            Ok(Some(message)) => match RequestFrame::deserialize(&message) {
                Ok(frame) => {
                    let outcome = match answer(manager, frame.request).await {
                        Ok(response) => Outcome::Ok(Box::new(response)),
                        Err(error) => Outcome::Error(error),
                    };
                    ResponseFrame { id: frame.id, outcome }
                }
                Err(error) => refused(ErrorCode::BadRequest, format!("the request is not valid: {error}")),
            },
            Err(FrameError::Json(error)) => {
                refused(ErrorCode::BadRequest, format!("the message is not JSON: {error}"))
            }
            Err(error) => return Err(error),
        };
        match write_frame(&mut stream, &response, MAX_MESSAGE_BYTES).await {
            Err(FrameError::TooLong { len, .. }) => {
                let error = refused(
                    ErrorCode::Exhausted,
                    format!("the answer has {len} bytes: ask for less at once"),
                );
                write_frame(&mut stream, &error, MAX_MESSAGE_BYTES).await?;
            }
            written => written?,
        }
    }
}

fn refused(code: ErrorCode, message: String) -> ResponseFrame {
    let error = ApiError::new(code, message).remedy("use the `zvm` command of the running manager's version");
    ResponseFrame { id: 0, outcome: Outcome::Error(error) }
}

async fn answer(manager: &Manager, request: Request) -> Result<Response, ApiError> {
    Ok(match request {
        Request::Status => Response::Status(manager.status().await?),
        Request::Inventory => Response::Inventory(manager.show_inventory()),
        Request::VraTokenCreate { name, ttl_s } => Response::Token(manager.create_token(&name, ttl_s).await?),
        Request::VraList => Response::Vras(manager.list_vras().await?),
        Request::VraShow { vra } => Response::Vra(Box::new(manager.show_vra(&vra).await?)),
        Request::VraRevoke { vra, force } => Response::Task(manager.revoke_vra(&vra, force).await?),
        Request::VraSetAddress { vra, address } => {
            Response::Vra(Box::new(manager.set_vra_address(&vra, &address).await?))
        }
        Request::VpgCreate(spec) => Response::Task(manager.create_vpg(spec).await?),
        Request::VpgEdit { vpg, edit } => Response::Vpg(Box::new(manager.edit_vpg(&vpg, &edit).await?)),
        Request::VpgShow { vpg } => Response::Vpg(Box::new(manager.show_vpg(&vpg).await?)),
        Request::VpgPause { vpg, paused } => Response::Vpg(Box::new(manager.pause_vpg(&vpg, paused).await?)),
        Request::VpgAdopt { vpg } => Response::Vpg(Box::new(manager.adopt_vpg(&vpg).await?)),
        Request::VpgForceSync { vpg, vm, give_up_history } => {
            Response::Task(manager.force_sync(&vpg, vm.as_deref(), give_up_history).await?)
        }
        Request::VpgAddVms { vpg, vms } => Response::Task(manager.add_vms(&vpg, &vms).await?),
        Request::VpgAddDisks { vpg, vms, give_up_history } => {
            Response::Task(manager.add_disks(&vpg, &vms, give_up_history).await?)
        }
        Request::VpgRemoveDisks { vpg, disks, give_up_history } => {
            Response::Task(manager.remove_disks(&vpg, &disks, give_up_history).await?)
        }
        Request::VpgRemoveVms { vpg, vms, keep_disks } => {
            Response::Task(manager.remove_vms(&vpg, &vms, keep_disks).await?)
        }
        Request::VpgExport { vpgs } => Response::Export(manager.export_vpgs(&vpgs).await?),
        Request::VpgImport { export, dry_run } => {
            Response::Imported(manager.import_vpgs(export, dry_run).await?)
        }
        Request::VpgDelete { vpg, keep_disks, force } => {
            Response::Task(manager.delete_vpg(&vpg, keep_disks, force).await?)
        }
        Request::CheckpointList { vpg, tagged, from_us, to_us, limit } => {
            let limit = limit.min(crate::api::MAX_LIST);
            Response::Checkpoints(manager.list_checkpoints(&vpg, tagged, from_us, to_us, limit).await?)
        }
        Request::CheckpointTag { vpg, tag, application } => {
            Response::Tagged(manager.tag_checkpoint(&vpg, &tag, application).await?)
        }
        Request::CheckpointLock { vpg, at, locked } => {
            Response::Checkpoint(manager.lock_checkpoint(&vpg, &at, locked).await?)
        }
        Request::TestStart { vpg, at, door } => Response::Task(manager.start_test(&vpg, at, door).await?),
        Request::TestStop { vpg } => Response::Task(manager.stop_test(&vpg).await?),
        Request::TestShow { vpg } => Response::Test(manager.show_test(&vpg).await?),
        Request::TaskList { limit } => Response::Tasks(manager.list_tasks(limit).await?),
        Request::TaskShow { task } => Response::Task(manager.show_task(task).await?),
        Request::EventList { limit } => Response::Events(manager.list_events(limit).await?),
        Request::SiteKeyList => Response::SiteKeys(manager.list_site_keys()),
        Request::SiteKeyRotate => Response::SiteKeys(manager.rotate_site_key().await?),
        Request::Plan { vms, history_s } => Response::Plan(manager.plan(&vms, history_s)?),
        Request::VmProtect { vm, disks, exclude, door, also_on } => {
            Response::VmProtected(manager.protect_vm(&vm, &disks, &exclude, door, &also_on).await?)
        }
        Request::VmUnprotect { vm, disks } => {
            Response::VmUnprotected(manager.unprotect_vm(&vm, &disks).await?)
        }
        Request::SourceList => Response::Sources(manager.list_sources().await?),
        Request::SourceAdd { source, password, unchecked } => {
            Response::Sources(manager.add_source(source, password, unchecked).await?)
        }
        Request::SourceEdit { source, edit, unchecked } => {
            Response::Sources(manager.edit_source(&source, *edit, unchecked).await?)
        }
        Request::SourceRemove { source, force } => {
            Response::Sources(manager.remove_source(&source, force).await?)
        }
        Request::SourceRead { source } => Response::Sources(manager.read_sources(source.as_deref()).await?),
        Request::AlertList { all, limit } => Response::Alerts(manager.list_alerts(all, limit).await?),
    })
}
