//! What the command lines have in common.

use std::error::Error;
use std::io::Write;

/// An error and its causes in one line; a cause that the text before it holds already is left out.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string().trim_end().to_owned();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let words = inner.to_string();
        if !text.contains(words.trim_end()) {
            text.push_str(": ");
            text.push_str(words.trim_end());
        }
        cause = inner.source();
    }
    text
}

/// Writes the script with which `shell` completes the arguments of `command`.
///
/// # Errors
/// Whatever `out` says.
pub fn write_completion(
    shell: clap_complete::Shell,
    mut command: clap::Command,
    out: &mut dyn Write,
) -> std::io::Result<()> {
    let name = command.get_name().to_owned();
    // The generator panics where it can't write.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, name, &mut script);
    out.write_all(&script)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot read /x: {source}; give another file")]
    struct Told {
        source: std::io::Error,
    }

    #[derive(Debug, thiserror::Error)]
    #[error("no start")]
    struct Outer {
        source: Told,
    }

    #[test]
    fn each_cause_is_told_once() {
        let told = Told { source: std::io::Error::other("not there") };
        assert_eq!(chain(&Outer { source: told }), "no start: cannot read /x: not there; give another file");
    }
}
