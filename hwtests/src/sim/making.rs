//! The making of a target's files where it may fail.

use journal::crypt::Encryption;
use journal::format::FIRST_SLOT_OFFSET_BYTES;
use journal::storage::{Blocking, Op, Purpose};

use super::env::Env;
use super::target::TargetSite;

impl TargetSite {
    /// Makes the journal and the recovery disks. Where that fails the next process begins anew, with files of its own.
    pub(super) fn create_somehow(&mut self, encryption: Encryption, env: &mut Env) -> Result<(), String> {
        if !env.rng.one_in(4) {
            return self.create(encryption);
        }
        let after_ops = env.rng.below(4);
        match env.rng.below(3) {
            0 => self.disk.set_capacity_bytes(FIRST_SLOT_OFFSET_BYTES),
            1 => {
                let verb = ["allocate", "write", "fdatasync"][env.any_index(3)];
                self.disk.arm_error(after_ops / 2, verb);
            }
            _ => {
                let crash = env.any_crash();
                self.disk.arm_crash(after_ops, crash);
            }
        }
        let done = self.create(encryption);
        self.disk.disarm();
        self.disk.set_capacity_bytes(u64::MAX);
        if done.is_ok() {
            return Ok(());
        }
        self.disk.fence();
        for file in self.recovery_disks.iter().chain([&self.journal]) {
            let mut storage = self.disk.storage();
            let mut io = Blocking::new(&mut storage, *file, Purpose::Create);
            io.run(Op::Truncate { len_bytes: 0 }).map_err(|error| error.to_string())?;
        }
        self.journal = self.disk.add_file();
        self.recovery_disks = self.recovery_disks.iter().map(|_| self.disk.add_file()).collect();
        self.create(encryption)
    }
}
