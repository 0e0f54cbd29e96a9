//! The command line: parse, ask the daemon, show.
//!
//! Owns arguments, texts and exit codes. Never decides: commands that work without a daemon
//! (`init`, `join`, `run`) are handed to a [`Local`] that the binary brings.
//! Exit codes: 0 done or *moved*, 1 error, 2 wrong usage, 3 *stayed*, 4 *lost*, 130 left by Ctrl-C.

pub mod args;
mod cluster;
mod console;
pub mod human;
mod migrate;
mod progress;
mod show;
mod timeline;
mod wire_args;

use std::future::Future;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use godwit_protocol::id::MigrationId;
use serde_json::{Value, json};

use self::args::{Cli, Command, ImageCommand, MigrationsCommand, VmCommand};
pub use self::args::{InitOptions, JoinOptions, RunOptions};
use super::client;
use super::types::{ApiError, Migration, Request};

/// Longest path of a state directory, bytes: a socket's path has 107, and `/vm/ID/console.sock` takes 49 of them.
const STATE_BYTES: usize = 107 - 49;
/// Longest specification, bytes.
const SPEC_BYTES: u64 = 1 << 20;

/// What the command line cannot do itself: the admission adapter and the driver, brought by the
/// binary. Answers are shown: `{"done": "one line"}` as that line, anything else as JSON.
pub trait Local {
    /// Makes a swarm with this host as its first member.
    ///
    /// # Errors
    /// [`ApiError`]; nothing was made.
    fn init(&self, options: InitOptions) -> impl Future<Output = Result<Value, ApiError>>;

    /// Redeems a token: this host becomes a member.
    ///
    /// # Errors
    /// [`ApiError`]; this host is no member.
    fn join(&self, options: JoinOptions) -> impl Future<Output = Result<Value, ApiError>>;

    /// The daemon, until it is told to stop.
    ///
    /// # Errors
    /// [`ApiError`] if it cannot start or must end.
    fn run(&self, options: RunOptions) -> impl Future<Output = Result<Value, ApiError>>;
}

/// How a command ended when it did not fail.
pub(crate) enum Answer {
    /// Show this: the text for people, the value for programs.
    Show(String, Value),
    /// The same, with an exit code of its own.
    Code(u8, String, Value),
    /// Everything was shown.
    Shown(u8),
}

/// Parses the process's arguments and does what they say.
pub fn main(local: &impl Local) -> ExitCode {
    let json = std::env::args_os().any(|a| a == "--json");
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) if json && e.use_stderr() => {
            let text = e.to_string();
            let first = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
            return fail(&ApiError::new(first, "see godwit --help"), true);
        }
        Err(e) => e.exit(),
    };
    let daemon = matches!(cli.command, Command::Run(_));
    let mut builder = if daemon {
        tokio::runtime::Builder::new_multi_thread()
    } else {
        tokio::runtime::Builder::new_current_thread()
    };
    let runtime = match builder.enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => return fail(&ApiError::plain(format!("cannot start: {e}")), json),
    };
    let result = runtime.block_on(dispatch(&cli, local));
    // A blocked helper thread must not keep a finished command from ending.
    runtime.shutdown_background();
    match result {
        Ok(Answer::Show(text, value)) => show_answer(0, &text, &value, cli.json),
        Ok(Answer::Code(code, text, value)) => show_answer(code, &text, &value, cli.json),
        Ok(Answer::Shown(code)) => ExitCode::from(code),
        Err(error) => fail(&error, cli.json),
    }
}

fn show_answer(code: u8, text: &str, value: &Value, json: bool) -> ExitCode {
    let mut out = std::io::stdout().lock();
    // A reader that has gone (a closed pipe) is no error of ours.
    let _ = if json { writeln!(out, "{value}") } else { writeln!(out, "{}", text.trim_end()) };
    ExitCode::from(code)
}

fn fail(error: &ApiError, json: bool) -> ExitCode {
    if json {
        let mut out = std::io::stdout().lock();
        let _ = writeln!(out, "{}", json!({"error": error.message, "hint": error.hint}));
    } else {
        let mut err = std::io::stderr().lock();
        let _ = writeln!(err, "error: {}", error.message);
        if !error.hint.is_empty() {
            let _ = writeln!(err, "  next: {}", error.hint);
        }
    }
    ExitCode::from(1)
}

async fn dispatch(cli: &Cli, local: &impl Local) -> Result<Answer, ApiError> {
    let state = cli.state.as_path();
    match &cli.command {
        Command::Init(options) => {
            let options = InitOptions { state: state_dir(state)?, ..options.clone() };
            Ok(show::done(local.init(options).await?))
        }
        Command::Join(options) => {
            let options = JoinOptions { state: state_dir(state)?, ..options.clone() };
            Ok(show::done(local.join(options).await?))
        }
        Command::Run(options) => {
            need_root("run")?;
            start_log();
            let image_dir = options.image_dir.as_deref().map(absolute).transpose()?;
            let options = RunOptions { state: state_dir(state)?, image_dir, ..options.clone() };
            local.run(options).await?;
            Ok(Answer::Shown(0))
        }
        Command::Migrate(options) => migrate::run(state, options).await,
        Command::Migrations { command: Some(MigrationsCommand::Show { id }) } => {
            let id = find_migration(state, id).await?;
            timeline::show(state, call(state, Request::Migrations { id: Some(id) }).await?).await
        }
        Command::Abort { id } => {
            let id = find_migration(state, id).await?;
            Ok(show::done(call(state, Request::Abort { id }).await?))
        }
        Command::Vm { command: VmCommand::Console { vm } } => {
            console::run(state, vm, cli.json).await
        }
        other => {
            let request = request(other)?;
            show::answer(&request, call(state, request.clone()).await?)
        }
    }
}

/// The request of a command that is one question and one answer.
fn request(command: &Command) -> Result<Request, ApiError> {
    Ok(match command {
        Command::Token { ttl } => Request::Token { ttl_s: ttl.as_secs() },
        Command::Leave => Request::Leave {},
        Command::Hosts => Request::Hosts {},
        Command::Revoke { host, now } => Request::Revoke { host: host.clone(), now: *now },
        Command::Drain { undo } => Request::Drain { undo: *undo },
        Command::Cluster { command } => cluster::request(command)?,
        Command::Vm { command } => match command {
            VmCommand::Run { spec } => read_spec(spec)?,
            VmCommand::List => Request::VmList {},
            VmCommand::Show { vm } => Request::VmShow { vm: vm.clone() },
            VmCommand::Start { vm } => Request::VmStart { vm: vm.clone() },
            VmCommand::Stop { vm, kill } => Request::VmStop { vm: vm.clone(), kill: *kill },
            VmCommand::Console { vm } => Request::VmConsole { vm: vm.clone() },
        },
        Command::Image { command } => match command {
            ImageCommand::Add { path } => Request::ImageAdd { path: real(path)? },
            ImageCommand::List => Request::ImageList {},
            ImageCommand::Remove { path } => {
                // The file may be gone already.
                Request::ImageRemove { path: real(path).or_else(|_| absolute(path))? }
            }
        },
        Command::Migrations { .. } => Request::Migrations { id: None },
        Command::Routes => Request::Routes {},
        Command::Status => Request::Status {},
        Command::Wires => Request::WireInfo {},
        Command::Wire { command } => command.request(),
        Command::Init(_)
        | Command::Join(_)
        | Command::Run(_)
        | Command::Migrate(_)
        | Command::Abort { .. } => {
            return Err(ApiError::plain("this command is no plain request"));
        }
    })
}

async fn call(state: &Path, request: Request) -> Result<Value, ApiError> {
    client::call(state, &request, |_| {}).await
}

/// A migration by its id or by the first digits of it.
async fn find_migration(state: &Path, text: &str) -> Result<MigrationId, ApiError> {
    if let Ok(id) = text.parse() {
        return Ok(id);
    }
    let hint = "see godwit migrations";
    let digits = text.len() >= 4 && text.bytes().all(|b| b.is_ascii_hexdigit());
    if !digits {
        let text =
            format!("{text} is no id of a migration (32 hexadecimal digits, or the first of them)");
        return Err(ApiError::new(text, hint));
    }
    let all: Vec<Migration> = client::ask(state, &Request::Migrations { id: None }).await?;
    let text = text.to_ascii_lowercase();
    let mut found = all.iter().map(|m| m.status.id).filter(|id| id.to_string().starts_with(&text));
    match (found.next(), found.next()) {
        (Some(id), None) => Ok(id),
        (None, _) => Err(ApiError::new(format!("no migration begins with {text}"), hint)),
        (Some(_), Some(_)) => {
            Err(ApiError::new(format!("several migrations begin with {text}"), "write more digits"))
        }
    }
}

fn read_spec(path: &Path) -> Result<Request, ApiError> {
    let bad = |e: std::io::Error| ApiError::plain(format!("cannot read {}: {e}", path.display()));
    let meta = std::fs::metadata(path).map_err(bad)?;
    if meta.len() > SPEC_BYTES {
        let path = path.display();
        return Err(ApiError::plain(format!(
            "{path} is over {SPEC_BYTES} bytes: no specification"
        )));
    }
    let spec_toml = std::fs::read_to_string(path).map_err(bad)?;
    let spec_dir = real(path)?.parent().map(Path::to_owned).unwrap_or_default();
    Ok(Request::VmRun { spec_toml, spec_dir })
}

fn real(path: &Path) -> Result<PathBuf, ApiError> {
    path.canonicalize().map_err(|e| ApiError::plain(format!("{}: {e}", path.display())))
}

fn absolute(path: &Path) -> Result<PathBuf, ApiError> {
    std::path::absolute(path).map_err(|e| ApiError::plain(format!("{}: {e}", path.display())))
}

/// The state directory of a daemon: unix sockets are made in it, whose paths are short.
fn state_dir(path: &Path) -> Result<PathBuf, ApiError> {
    let path = absolute(path)?;
    let bytes = path.as_os_str().len();
    if bytes <= STATE_BYTES {
        return Ok(path);
    }
    Err(ApiError::new(
        format!(
            "the path of the state directory is too long: {bytes} bytes, {STATE_BYTES} are possible"
        ),
        "choose a shorter one with --state",
    ))
}

fn need_root(command: &str) -> Result<(), ApiError> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    Err(ApiError::new(
        format!(
            "godwit {command} needs root: it makes network devices and starts virtual machines"
        ),
        format!("sudo godwit {command} ..."),
    ))
}

/// The daemon's log: standard error, `GODWIT_LOG` as filter, `info` without it.
fn start_log() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("GODWIT_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    // A second initialisation (a test that starts two daemons) keeps the first.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .try_init();
}
