//! `vra`: the daemon of a host, and the command that talks to it.

mod args;
mod commands;
mod show;
mod table;

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::CommandFactory;
use vra::config::Config;
use vra::control::ClientError;
use vra::report::{chain, write_completion};

use crate::args::{Cli, Command};

/// The VRA doesn't answer.
const EXIT_UNREACHABLE: u8 = 3;

fn main() -> ExitCode {
    let cli = Cli::read();
    match run(&cli) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {}", chain(error.as_ref()));
            if let Some(remedy) = remedy(&error) {
                eprintln!("remedy: {remedy}");
            }
            match error.downcast_ref::<ClientError>() {
                Some(ClientError::Connect { .. }) => ExitCode::from(EXIT_UNREACHABLE),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

fn run(cli: &Cli) -> anyhow::Result<ExitCode> {
    if let Command::GuestGuard { agent_socket, limit_ms } = &cli.command {
        vra::guest::run_guard(agent_socket, limit_ms.map(Duration::from_millis))?;
        return Ok(ExitCode::SUCCESS);
    }
    if let Command::Completion { shell } = cli.command {
        write_completion(shell, Cli::command(), &mut std::io::stdout())?;
        return Ok(ExitCode::SUCCESS);
    }
    let config = Config::load(cli.config.as_deref())?;
    if matches!(cli.command, Command::Serve) {
        log_to_stderr(&config)?;
        vra::daemon::run(&config)?;
        return Ok(ExitCode::SUCCESS);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(commands::run(cli, &config))
}

fn log_to_stderr(config: &Config) -> anyhow::Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_new(&config.log)
        .with_context(|| format!("`log` in the configuration is no filter: {:?}", config.log))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    Ok(())
}

fn remedy(error: &anyhow::Error) -> Option<&str> {
    match error.downcast_ref::<ClientError>()? {
        ClientError::Api(error) => error.remedy.as_deref(),
        ClientError::Connect { .. } => {
            Some("is `vra serve` running, and does this user have the right to it?")
        }
        _ => None,
    }
}
