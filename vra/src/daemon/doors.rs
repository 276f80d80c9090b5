//! Opens and closes the doors of disks: ublk devices and NBD exports.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ublk::arena::Arena;
use ublk::control::ControlError;
use ublk::cookie::Cookie;
use ublk::device::{Device, DeviceError, DeviceSettings, DeviceSize, Driver};
use ublk::features::Features;
use ublk::nbd::{Address, ExportSettings, NbdServer};
use ublk::reactor::Reactors;
use ublk::serve::Disk;

use super::lock;
use crate::api::door::NbdListen;
use crate::api::{ApiError, DoorAddress, DoorRequest, ErrorCode};
use crate::config::{Config, DoorConfig};
use crate::report::chain;

/// How long the requests of a door that is closed may take to end.
const CLOSE_LIMIT: Duration = Duration::from_secs(30);

/// How long the ublk driver may take to answer at the daemon's start.
const OPEN_LIMIT: Duration = Duration::from_secs(60);

/// How long NBD clients get at the daemon's end.
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// All that doors are made of.
pub(super) struct Doors {
    reactors: Arc<Reactors>,
    arena: Arena,
    driver: Mutex<Result<Driver, ApiError>>,
    /// Exports without an address of their own.
    nbd: NbdServer,
    nbd_socket: PathBuf,
    defaults: DoorConfig,
}

/// An open door. Dropping it doesn't close it: see [`Doors::close`].
pub(super) enum Door {
    /// A block device.
    Ublk(Device),
    /// An export of the common server.
    Shared {
        /// Its name.
        export: String,
        /// The common socket.
        path: PathBuf,
    },
    /// An export with a server for its own address.
    Own {
        /// Its name.
        export: String,
        /// The server.
        server: NbdServer,
        /// Where.
        address: Address,
    },
}

impl Doors {
    /// Looks for the ublk driver and listens on the common NBD socket.
    ///
    /// # Errors
    /// When the socket can't be made. A missing ublk driver is none: then ublk doors are refused, with the reason.
    pub(super) fn open(
        config: &Config,
        reactors: Arc<Reactors>,
        arena: Arena,
    ) -> Result<Self, ublk::nbd::ListenError> {
        let driver = Mutex::new(open_driver(&reactors).map_err(|error| no_driver(&error)));
        let nbd = NbdServer::new(Arc::clone(&reactors));
        let nbd_socket = config.run_dir.join("nbd.sock");
        let group = config.doors.nbd_group.as_deref();
        let mode = if group.is_some() { 0o660 } else { 0o600 };
        let address = Address::Unix { path: nbd_socket.clone(), mode };
        nbd.listen(&address)?;
        if let Some(group) = group {
            // Without it guests are kept out; without the daemon those that run would lose their disks.
            if let Err(error) = give_to_group(&nbd_socket, group) {
                tracing::error!(group, %error, socket = %nbd_socket.display(), "the NBD socket stays root's alone");
            }
        }
        Ok(Self { reactors, arena, driver, nbd, nbd_socket, defaults: config.doors.clone() })
    }

    /// The ublk driver's features, if there is a driver.
    pub(super) fn ublk_features(&self) -> Option<Features> {
        lock(&self.driver).as_ref().ok().map(Driver::features)
    }

    /// The ublk driver.
    pub(super) fn driver(&self) -> Result<Driver, ApiError> {
        lock(&self.driver).clone()
    }

    /// Looks again for the ublk driver if it wasn't there or didn't answer: it may have been loaded meanwhile.
    pub(super) fn look_for_driver(&self) {
        if self.driver().is_err() {
            let opened = Driver::open(Arc::clone(&self.reactors)).map_err(|error| no_driver(&error));
            *lock(&self.driver) = opened;
        }
    }

    /// Opens a door to a disk. `export` names it as an NBD export, `cookie` marks it as a ublk device, `device` is the number that
    /// it should have.
    ///
    /// # Errors
    /// [`ApiError`] with the remedy.
    pub(super) fn open_door(
        &self,
        disk: Arc<dyn Disk>,
        request: &DoorRequest,
        export: &str,
        cookie: u32,
        device: Option<u32>,
    ) -> Result<Door, ApiError> {
        match request {
            DoorRequest::Ublk { queues, depth } => {
                let settings = DeviceSettings {
                    id: device,
                    queues: queues.unwrap_or(self.defaults.queues),
                    depth: depth.unwrap_or(self.defaults.depth),
                    cookie: Cookie { disk_id: cookie },
                };
                Ok(Door::Ublk(self.driver()?.add(disk, &self.arena, settings)?))
            }
            DoorRequest::Nbd { listen: None } => {
                self.nbd.add_export(settings_of(export), disk, self.arena.clone())?;
                Ok(Door::Shared { export: export.to_owned(), path: self.nbd_socket.clone() })
            }
            DoorRequest::Nbd { listen: Some(listen) } => {
                let address = address_of(listen)?;
                let server = NbdServer::new(Arc::clone(&self.reactors));
                server.add_export(settings_of(export), disk, self.arena.clone())?;
                let address = server.listen(&address)?;
                Ok(Door::Own { export: export.to_owned(), server, address })
            }
        }
    }

    /// Takes over the ublk device that a former daemon served.
    ///
    /// # Errors
    /// [`ApiError`]; the device stays as it was.
    pub(super) fn recover(&self, device: u32, disk: Arc<dyn Disk>) -> Result<Door, ApiError> {
        Ok(Door::Ublk(self.driver()?.recover(device, disk, &self.arena)?))
    }

    /// Closes a door: its users are cut off, requests in flight end first.
    ///
    /// # Errors
    /// [`ErrorCode::Busy`] when somebody doesn't let go of it.
    pub(super) fn close(&self, door: Door) -> Result<(), ApiError> {
        let ended = match door {
            Door::Ublk(device) => {
                deleted(device.delete())?;
                true
            }
            Door::Shared { export, .. } => self.nbd.remove_export(&export, CLOSE_LIMIT),
            Door::Own { export, server, .. } => {
                server.remove_export(&export, CLOSE_LIMIT) && server.stop(CLOSE_LIMIT)
            }
        };
        if ended {
            return Ok(());
        }
        Err(ApiError::new(
            ErrorCode::Busy,
            format!("requests in flight did not end within {} s", CLOSE_LIMIT.as_secs()),
        )
        .remedy("look at the local disk: does it answer?"))
    }

    /// Whether clients have a door open that may write through it. Of NBD doors only; a ublk device doesn't tell.
    pub(super) fn has_writers(&self, door: &Door) -> bool {
        match door {
            Door::Ublk(_) => true,
            Door::Shared { export, .. } => self.nbd.live_writers(export) > 0,
            Door::Own { export, server, .. } => server.live_writers(export) > 0,
        }
    }

    /// Hangs up on all clients of the common NBD server.
    pub(super) fn stop_nbd(&self) {
        self.nbd.stop(STOP_LIMIT);
    }
}

impl Door {
    /// Where it is.
    pub(super) fn address(&self) -> DoorAddress {
        match self {
            Self::Ublk(device) => DoorAddress::Ublk { device: device.id(), path: device.block_path() },
            Self::Shared { export, path } => {
                DoorAddress::NbdUnix { path: path.clone(), export: export.clone() }
            }
            Self::Own { export, address: Address::Unix { path, .. }, .. } => {
                DoorAddress::NbdUnix { path: path.clone(), export: export.clone() }
            }
            Self::Own { export, address: Address::Tcp(address), .. } => {
                DoorAddress::NbdTcp { address: *address, export: export.clone() }
            }
        }
    }

    /// The size of a device, which is told when it grows. NBD clients learn it by themselves, when they connect.
    pub(super) fn device_size(&self) -> Option<DeviceSize> {
        match self {
            Self::Ublk(device) => Some(device.size()),
            Self::Shared { .. } | Self::Own { .. } => None,
        }
    }

    /// The number of the ublk device.
    pub(super) fn device(&self) -> Option<u32> {
        match self {
            Self::Ublk(device) => Some(device.id()),
            _ => None,
        }
    }

    /// Lets go of the disk at the daemon's end: a ublk device stays for the next daemon, its requests wait.
    pub(super) fn leave(self) {
        match self {
            Self::Ublk(mut device) => {
                if let Err(error) = device.leave(STOP_LIMIT) {
                    tracing::warn!(
                        device = device.id(),
                        error = chain(&error),
                        "could not let go of a device: the next daemon recovers it with reissued requests"
                    );
                }
            }
            Self::Own { server, .. } => {
                server.stop(STOP_LIMIT);
            }
            Self::Shared { .. } => {}
        }
    }
}

fn no_driver(error: &ControlError) -> ApiError {
    ApiError::new(ErrorCode::Unsupported, chain(error))
        .remedy("see `vra doctor`; on a host without ublk use the NBD door (--door nbd)")
}

/// A driver that still takes leave of a killed daemon may not answer for a while.
fn open_driver(reactors: &Arc<Reactors>) -> Result<Driver, ControlError> {
    let deadline = Instant::now() + OPEN_LIMIT;
    loop {
        match Driver::open(Arc::clone(reactors)) {
            Err(error @ ControlError::Deadline { .. }) if Instant::now() < deadline => {
                tracing::warn!(error = chain(&error), "the ublk driver doesn't answer yet");
            }
            opened => return opened,
        }
    }
}

fn settings_of(export: &str) -> ExportSettings {
    ExportSettings {
        name: export.to_owned(),
        description: String::new(),
        slots_per_connection: ExportSettings::SLOTS_PER_CONNECTION,
    }
}

fn address_of(listen: &NbdListen) -> Result<Address, ApiError> {
    match listen {
        NbdListen::Unix { path } if path.is_absolute() => {
            Ok(Address::Unix { path: path.clone(), mode: 0o600 })
        }
        NbdListen::Unix { path } => Err(ApiError::new(
            ErrorCode::BadRequest,
            format!("the socket {} is not an absolute path", path.display()),
        )),
        NbdListen::Tcp { address } if is_loopback(*address) => Ok(Address::Tcp(*address)),
        NbdListen::Tcp { address } => Err(ApiError::new(
            ErrorCode::Forbidden,
            format!("{address} is not a loopback address: NBD is not encrypted here"),
        )
        .remedy("use a unix socket, or a loopback address and a tunnel")),
    }
}

/// Until here the socket's group is the process's own, which is root's.
fn give_to_group(socket: &Path, name: &str) -> io::Result<()> {
    let group = nix::unistd::Group::from_name(name)?.ok_or_else(|| {
        io::Error::other(format!("there is no group {name:?}: correct nbd_group in [doors]"))
    })?;
    Ok(nix::unistd::chown(socket, None, Some(group.gid))?)
}

fn is_loopback(address: SocketAddr) -> bool {
    address.ip().is_loopback()
}

/// The end of a device. One that somebody has open is out of service all the same: the driver frees its number after the last close.
pub(super) fn deleted(result: Result<(), DeviceError>) -> Result<(), DeviceError> {
    match result {
        Err(DeviceError::HeldOpen { device }) => {
            tracing::warn!(
                device,
                "the device was deleted, but somebody has it open: its number stays taken until they close it"
            );
            Ok(())
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_socket_is_given_to_a_group_that_there_is() {
        let path = std::env::temp_dir().join(format!("nbd-group-{}", std::process::id()));
        let _socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let own = nix::unistd::Group::from_gid(nix::unistd::getgid()).unwrap().unwrap();
        give_to_group(&path, &own.name).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().gid(), own.gid.as_raw());
        let error = give_to_group(&path, "no-such-group").unwrap_err().to_string();
        assert!(error.contains("no-such-group") && error.contains("nbd_group"), "{error}");
        std::fs::remove_file(&path).unwrap();
    }
}
