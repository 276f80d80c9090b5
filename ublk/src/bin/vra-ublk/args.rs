//! The command line.

use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand};

/// Makes, lists, deletes and recovers ublk devices.
#[derive(Debug, Parser)]
#[command(name = "vra-ublk", version)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make a device and serve it until it is deleted, or until SIGINT or SIGTERM, which delete it, or SIGHUP, which leaves
    /// it for `vra-ublk recover`
    Add {
        #[command(subcommand)]
        target: Target,
        #[command(flatten)]
        options: AddOptions,
    },
    /// Show all ublk devices of this host
    List {
        /// One JSON object a line
        #[arg(long)]
        json: bool,
    },
    /// Delete devices, whoever serves them
    Del {
        /// Numbers of the devices
        ids: Vec<u32>,
        /// All that Holdfast made
        #[arg(long, required_unless_present = "ids")]
        ours: bool,
        /// Also those that are mounted
        #[arg(long)]
        force: bool,
    },
    /// Take over a device whose daemon is gone and serve it
    Recover {
        /// Number of the device
        id: u32,
        #[command(subcommand)]
        target: Target,
        #[command(flatten)]
        serve: ServeOptions,
    },
    /// Show what the kernel's ublk driver offers
    Features {
        /// One JSON object
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Target {
    /// Forget writes, read zeroes
    Null {
        /// Size, with an optional suffix K, M, G or T; a recovered device keeps its own
        #[arg(long, default_value = "1G", value_parser = parse_size)]
        size: u64,
    },
    /// A raw file or block device
    Loop {
        /// Its path
        path: PathBuf,
        /// Refuse writes
        #[arg(long)]
        read_only: bool,
    },
}

#[derive(Debug, ClapArgs)]
pub(crate) struct AddOptions {
    /// Number of the device; the kernel's choice if not given
    #[arg(long, global = true)]
    pub(crate) id: Option<u32>,
    /// Hardware queues, at most one for each CPU
    #[arg(long, global = true, default_value_t = 1)]
    pub(crate) queues: u16,
    /// Requests that each queue serves at once
    #[arg(long, global = true, default_value_t = 64)]
    pub(crate) depth: u16,
    /// Buffer of each request, in KiB: also its longest length
    #[arg(long, global = true, default_value_t = 64, value_parser = clap::value_parser!(u32).range(4..=32768))]
    pub(crate) buffer_kib: u32,
    /// Stored in the device, to know it again
    #[arg(long, global = true, default_value_t = 0)]
    pub(crate) disk_id: u32,
    #[command(flatten)]
    pub(crate) serve: ServeOptions,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct ServeOptions {
    /// Reactor threads
    #[arg(long, global = true)]
    pub(crate) threads: Option<usize>,
    /// Serve in the background; return when the device is there
    #[arg(long, global = true)]
    pub(crate) daemonize: bool,
    /// Append logs to this file instead of standard error
    #[arg(long, global = true)]
    pub(crate) log: Option<PathBuf>,
}

fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((place, 'K' | 'k')) => (&text[..place], 10),
        Some((place, 'M' | 'm')) => (&text[..place], 20),
        Some((place, 'G' | 'g')) => (&text[..place], 30),
        Some((place, 'T' | 't')) => (&text[..place], 40),
        _ => (text, 0),
    };
    let number: u64 = digits.parse().map_err(|_| format!("{text} is no size such as 512M or 1073741824"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text} is too large"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
        let args = Args::try_parse_from(["vra-ublk", "add", "loop", "/x", "--queues", "2", "--daemonize"]);
        let Ok(Args { command: Command::Add { target: Target::Loop { path, .. }, options } }) = args else {
            panic!("{args:?}");
        };
        assert_eq!((path, options.queues, options.serve.daemonize), (PathBuf::from("/x"), 2, true));
        assert!(Args::try_parse_from(["vra-ublk", "del"]).is_err(), "nothing to delete");
    }

    #[test]
    fn sizes_have_suffixes() {
        assert_eq!(parse_size("512"), Ok(512));
        assert_eq!(parse_size("3G"), Ok(3 << 30));
        assert!(parse_size("G").is_err());
        assert!(parse_size("99999999999T").is_err());
    }
}
