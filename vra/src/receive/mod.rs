//! The target's end of a VM's stream: checks what comes, puts it into the journal or, during a base sync, onto the recovery disks, and
//! acknowledges what is durable.

mod intake;

pub use intake::{Intake, IntakeError};
