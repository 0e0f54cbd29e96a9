//! The one binary: daemon and command line.

fn main() -> std::process::ExitCode {
    godwit::cli::main()
}
