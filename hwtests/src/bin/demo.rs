//! `demo`: protects two VMs, kills their source, recovers them at checkpoints and checks everything.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use hwtests::demo::{Size, run};
use hwtests::interrupt;
use hwtests::site::Door;

/// The main job from start to end, on this machine.
#[derive(Debug, Parser)]
struct Arguments {
    /// Disks over NBD instead of ublk
    #[arg(long)]
    nbd: bool,
    /// Sizes for an emulated machine
    #[arg(long)]
    small: bool,
    /// Work in this folder and leave it there [default: a temporary one, removed at the end]
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
}

/// As a shell has it for a program that SIGINT ended.
const EXIT_INTERRUPTED: u8 = 130;

fn main() -> ExitCode {
    match demo(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) if interrupt::came() => {
            eprintln!("interrupted: everything that was made is gone again");
            ExitCode::from(EXIT_INTERRUPTED)
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn demo(arguments: &Arguments) -> Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "the demo mounts filesystems: run it as root");
    let door = if arguments.nbd { Door::Nbd } else { Door::Ublk };
    let size = if arguments.small { SMALL } else { LARGE };
    let folder = match &arguments.keep {
        Some(folder) => folder.clone(),
        None => std::env::temp_dir().join(format!("holdfast-demo-{}", std::process::id())),
    };
    std::fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
    interrupt::catch()?;
    let result = run(door, size, &folder);
    match (&result, &arguments.keep) {
        (_, Some(_)) => {}
        (result, None) if result.is_ok() || interrupt::came() => {
            std::fs::remove_dir_all(&folder).with_context(|| format!("remove {}", folder.display()))?;
        }
        (_, None) => eprintln!("logs and disks are left in {}", folder.display()),
    }
    println!("{}", result?);
    Ok(())
}

const LARGE: Size = Size { disk_bytes: 512 << 20, files_bytes: 250 << 20, transactions: 300, patience: 1 };
const SMALL: Size = Size { disk_bytes: 64 << 20, files_bytes: 20 << 20, transactions: 20, patience: 10 };
