//! `vra-journal`: looks into a journal, checks it, and gets disks out of it, from the datastore's files alone.

use std::process::ExitCode;

fn main() -> ExitCode {
    vra::journal_tool::main()
}
