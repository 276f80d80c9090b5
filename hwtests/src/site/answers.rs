//! What the product's commands answer: JSON, looked through for what a test needs.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use vra::api::VraStatus;

use super::Side;
use super::setup::Site;
use crate::interrupt;

impl Site {
    /// What a VRA tells of itself.
    ///
    /// # Errors
    /// What `vra status` said.
    pub fn vra_status(&self, side: Side) -> Result<VraStatus> {
        let status = self.vra_json(side, &["status"])?;
        serde_json::from_value(status).with_context(|| format!("read the status of {}", side.name()))
    }

    /// Waits for a checkpoint of a VPG that is younger than `after_us` (µs since the Unix epoch) and returns it.
    ///
    /// # Errors
    /// When there is none within `seconds`, with what `zvm status` says.
    pub fn wait_for_checkpoint(&self, vpg: &str, after_us: u64, seconds: u64) -> Result<Value> {
        let deadline = Instant::now() + Duration::from_secs(seconds);
        loop {
            interrupt::check()?;
            let newest = self.newest_checkpoint(vpg);
            if let Some(newest) = newest
                && time_of(&newest)? > after_us
            {
                return Ok(newest);
            }
            if Instant::now() >= deadline {
                let status = self.zvm(&["status"])?;
                bail!("no new checkpoint within {seconds} s; `zvm status` says:\n{status}");
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// The newest checkpoint of a VPG; none as long as its journals don't exist, when there is nothing to list from.
    pub fn newest_checkpoint(&self, vpg: &str) -> Option<Value> {
        let listed = self.zvm_json(&["checkpoint", "list", vpg, "--limit", "1"]).ok()?;
        listed.as_array()?.first().cloned()
    }
}

/// When a checkpoint was taken, µs since the Unix epoch.
///
/// # Errors
/// When the answer holds no time.
pub fn time_of(checkpoint: &Value) -> Result<u64> {
    find(checkpoint, "time_us")
        .and_then(Value::as_u64)
        .with_context(|| format!("a checkpoint without a time: {checkpoint}"))
}

/// The first value of `key`, however deep.
pub fn find<'a>(value: &'a Value, key: &str) -> Option<&'a Value> {
    match value {
        Value::Object(fields) => {
            fields.get(key).or_else(|| fields.values().find_map(|field| find(field, key)))
        }
        Value::Array(items) => items.iter().find_map(|item| find(item, key)),
        _ => None,
    }
}
