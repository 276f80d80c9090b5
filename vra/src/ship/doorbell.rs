use std::sync::atomic::{AtomicBool, Ordering, fence};

use tokio::sync::Notify;

/// Wakes a shipper that has nothing to do. Ringing costs a fence and a load while the shipper is awake.
///
/// Order of use: the shipper arms, looks for published records once more, and waits; the capturing thread publishes, then rings.
/// Each side's fence lies between its store and its load, so at least one of them sees the other.
#[derive(Debug, Default)]
pub struct Doorbell {
    armed: AtomicBool,
    notify: Notify,
}

impl Doorbell {
    /// One that nobody waits for.
    pub fn new() -> Self {
        Self::default()
    }

    /// Wakes the shipper if it is armed; called after each publication, from a reactor thread.
    pub fn ring(&self) {
        fence(Ordering::SeqCst);
        if self.armed.load(Ordering::Relaxed) && self.armed.swap(false, Ordering::Relaxed) {
            self.notify.notify_one();
        }
    }

    /// From now on a ring wakes. The caller must look for records again before it waits.
    pub fn arm(&self) {
        self.armed.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// Rings are ignored again.
    pub fn disarm(&self) {
        self.armed.store(false, Ordering::Relaxed);
    }

    /// Ends when it was rung since it was armed. Cancel-safe: a ring that met no waiter is kept for the next one.
    pub async fn rung(&self) {
        self.notify.notified().await;
    }
}

/// What the numbering core calls after a publication.
impl ublk::serve::Wake for Doorbell {
    fn wake(&self) {
        self.ring();
    }
}
