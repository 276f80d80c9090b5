//! Makes, lists, deletes and recovers ublk devices by hand: for rigs and benchmarks.

mod args;
mod daemon;
mod show;

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, bail};
use clap::Parser;
use ublk::arena::Arena;
use ublk::backing::{Backing, BackingSettings};
use ublk::control::Control;
use ublk::cookie::Cookie;
use ublk::device::{self, Device, DeviceSettings, Driver};
use ublk::process::{self, ProcessSettings};
use ublk::reactor::{ReactorSettings, Reactors};
use ublk::serve::Disk;
use ublk::targets::{FileDisk, NullDisk};

use crate::args::{AddOptions, Args, Command, ServeOptions, Target};

fn main() -> ExitCode {
    let args = Args::parse();
    match run(args.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Add { target, options } => add(&target, &options),
        Command::Recover { id, target, serve } => recover(id, &target, &serve),
        Command::List { json } => {
            show::devices(&device::list(&Control::open()?)?, json);
            Ok(())
        }
        Command::Features { json } => {
            show::features(Control::open()?.features(), json);
            Ok(())
        }
        Command::Del { ids, ours, force } => delete(&ids, ours, force),
    }
}

fn add(target: &Target, options: &AddOptions) -> anyhow::Result<()> {
    daemon::serve(&options.serve, || {
        let disk = open_disk(target, None)?;
        let driver = open_driver(&options.serve)?;
        let slots = u32::from(options.queues) * u32::from(options.depth);
        let arena = make_arena(options.buffer_kib as usize * 1024, slots)?;
        let settings = DeviceSettings {
            id: options.id,
            queues: options.queues,
            depth: options.depth,
            cookie: Cookie { disk_id: options.disk_id },
        };
        Ok(driver.add(disk, &arena, settings)?)
    })
}

fn recover(id: u32, target: &Target, options: &ServeOptions) -> anyhow::Result<()> {
    daemon::serve(options, || {
        let driver = open_driver(options)?;
        let info = driver.list()?.into_iter().find(|info| info.id == id);
        let Some(info) = info else { bail!("there is no ublk device {id}: see `vra-ublk list`") };
        let disk = open_disk(target, Some(info.size_bytes))?;
        let slots = u32::from(info.queues) * u32::from(info.depth);
        let arena = make_arena(info.io_bytes_max as usize, slots)?;
        Ok(driver.recover(id, disk, &arena)?)
    })
}

fn delete(ids: &[u32], ours: bool, force: bool) -> anyhow::Result<()> {
    let control = Control::open()?;
    let mut ids = ids.to_vec();
    if ours {
        let devices = device::list(&control)?;
        ids.extend(devices.iter().filter(|info| info.cookie.is_some()).map(|info| info.id));
    }
    for id in ids {
        device::delete(&control, id, force)?;
    }
    Ok(())
}

/// `recovered_size_bytes` is that of the device which the disk had before.
fn open_disk(target: &Target, recovered_size_bytes: Option<u64>) -> anyhow::Result<Arc<dyn Disk>> {
    Ok(match target {
        Target::Null { size } => Arc::new(NullDisk::new(recovered_size_bytes.unwrap_or(*size))),
        Target::Loop { path, read_only } => {
            let settings = match recovered_size_bytes {
                None => BackingSettings::FIRST_ATTACH,
                Some(_) => BackingSettings::RECOVERY,
            };
            Arc::new(open_file(path, BackingSettings { read_only: *read_only, ..settings })?)
        }
    })
}

fn open_file(path: &Path, settings: BackingSettings) -> anyhow::Result<FileDisk> {
    Ok(FileDisk::new(Backing::open(path, settings)?))
}

fn open_driver(options: &ServeOptions) -> anyhow::Result<Driver> {
    let mut settings = ReactorSettings::for_this_host();
    if let Some(threads) = options.threads {
        settings.thread_count = threads;
    }
    Ok(Driver::open(Arc::new(Reactors::start(settings)?))?)
}

fn make_arena(slot_len_bytes: usize, slots: u32) -> anyhow::Result<Arena> {
    Arena::new(slot_len_bytes, slots).with_context(|| {
        format!("cannot have {slots} buffers of {slot_len_bytes} bytes: fewer queues, less depth or smaller buffers")
    })
}

/// Prepares the process before it has any thread.
fn prepare_process() -> anyhow::Result<()> {
    Ok(process::prepare(ProcessSettings::FOR_UBLK)?)
}

/// What a serving process holds.
type Served = Device;
