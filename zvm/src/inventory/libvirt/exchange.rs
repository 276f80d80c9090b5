//! Calls under way and their replies, sans-I/O: which reply belongs to which call, and where events go.

use std::collections::HashMap;

use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};

use super::error::LibvirtError;
use super::message::event::Event;
use super::message::procedure::Procedure;
use super::message::{FrameBuffer, Message, MessageError, encode_call};

/// A call that somebody waits for.
#[derive(Debug)]
pub(super) struct Call {
    /// What is called.
    pub(super) procedure: Procedure,
    /// With what, in XDR.
    pub(super) arguments: Vec<u8>,
    /// Where its reply goes.
    pub(super) reply: oneshot::Sender<Result<Vec<u8>, LibvirtError>>,
    /// Its place among the calls under way: given back with the reply, also when nobody waits any more.
    pub(super) place: OwnedSemaphorePermit,
}

/// What waits for a reply.
#[derive(Debug)]
enum Waiting {
    Call {
        procedure: Procedure,
        reply: oneshot::Sender<Result<Vec<u8>, LibvirtError>>,
        _place: OwnedSemaphorePermit,
    },
    Ping,
}

/// One connection's calls.
#[derive(Debug)]
pub(super) struct Exchange {
    frames: FrameBuffer,
    waiting: HashMap<u32, Waiting>,
    last_serial: u32,
    events: mpsc::Sender<Event>,
}

impl Exchange {
    /// Gives events to `events`. When that gets full, [`Event::Missed`] takes its last place and others are dropped.
    pub(super) fn new(events: mpsc::Sender<Event>) -> Self {
        Self { frames: FrameBuffer::default(), waiting: HashMap::new(), last_serial: 0, events }
    }

    /// Begins a call; gives what is to be sent.
    pub(super) fn call(&mut self, call: Call) -> Vec<u8> {
        let Call { procedure, arguments, reply, place } = call;
        let serial = self.next_serial();
        self.waiting.insert(serial, Waiting::Call { procedure, reply, _place: place });
        encode_call(procedure, serial, &arguments)
    }

    /// Begins the cheapest call, to see whether the daemon is there; gives what is to be sent.
    pub(super) fn ping(&mut self) -> Vec<u8> {
        let serial = self.next_serial();
        self.waiting.insert(serial, Waiting::Ping);
        encode_call(Procedure::GetLibVersion, serial, &[])
    }

    /// Whether a ping was not answered yet.
    pub(super) fn pings(&self) -> bool {
        self.waiting.values().any(|waiting| matches!(waiting, Waiting::Ping))
    }

    /// The call that ends the connection, whose reply nobody waits for.
    pub(super) fn farewell(&mut self) -> Vec<u8> {
        let serial = self.next_serial();
        self.waiting.insert(serial, Waiting::Ping);
        encode_call(Procedure::Close, serial, &[])
    }

    /// Takes what came. After an error the connection is of no use.
    pub(super) fn received(&mut self, bytes: &[u8]) -> Result<(), MessageError> {
        self.frames.push(bytes);
        while let Some(message) = self.frames.next_message()? {
            match message {
                Message::Reply { serial, procedure, outcome } => self.replied(serial, procedure, outcome)?,
                Message::Event { procedure, body } => {
                    if let Some(event) = Event::parse(procedure, &body)? {
                        self.happened(event);
                    }
                }
                Message::KeepAlive => {}
            }
        }
        Ok(())
    }

    /// Tells all that wait that nothing will come.
    pub(super) fn end(&mut self, mut error: impl FnMut() -> LibvirtError) {
        for (_, waiting) in self.waiting.drain() {
            if let Waiting::Call { reply, .. } = waiting {
                let _ = reply.send(Err(error()));
            }
        }
    }

    fn next_serial(&mut self) -> u32 {
        loop {
            self.last_serial = self.last_serial.wrapping_add(1);
            if !self.waiting.contains_key(&self.last_serial) {
                return self.last_serial;
            }
        }
    }

    fn replied(
        &mut self,
        serial: u32,
        number: i32,
        outcome: Result<Vec<u8>, super::message::remote_error::RemoteError>,
    ) -> Result<(), MessageError> {
        match self.waiting.remove(&serial) {
            None => Err(MessageError::NotAsked { what: "serial", value: serial.into() }),
            Some(Waiting::Ping) => Ok(()),
            Some(Waiting::Call { procedure, .. }) if procedure.number() != number => {
                Err(MessageError::NotAsked { what: "procedure", value: number.into() })
            }
            Some(Waiting::Call { procedure, reply, _place }) => {
                // Whoever waited may have given up.
                let _ = reply.send(outcome.map_err(|error| LibvirtError::Remote { procedure, error }));
                Ok(())
            }
        }
    }

    fn happened(&self, event: Event) {
        let event = if self.events.capacity() == 1 { Event::Missed } else { event };
        let _ = self.events.try_send(event);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::sync::Semaphore;

    use super::*;
    use crate::inventory::libvirt::message::reply;
    use crate::inventory::libvirt::xdr::Writer;

    type Answer = oneshot::Receiver<Result<Vec<u8>, LibvirtError>>;

    fn exchange(events: usize) -> (Exchange, mpsc::Receiver<Event>) {
        let (sender, receiver) = mpsc::channel(events);
        (Exchange::new(sender), receiver)
    }

    fn call(exchange: &mut Exchange, places: &Arc<Semaphore>) -> Answer {
        let (reply, answer) = oneshot::channel();
        let place = places.clone().try_acquire_owned().unwrap();
        exchange.call(Call { procedure: Procedure::GetHostname, arguments: Vec::new(), reply, place });
        answer
    }

    fn frame(procedure: i32, kind: i32, serial: u32, body: &[u8]) -> Vec<u8> {
        let header = Writer::default().u32(28 + body.len() as u32).u32(0x2000_8086).u32(1);
        let mut frame = header.i32(procedure).i32(kind).u32(serial).i32(0).into_bytes();
        frame.extend(body);
        frame
    }

    fn hostname(serial: u32, name: &str) -> Vec<u8> {
        frame(59, 1, serial, &Writer::default().text(name).into_bytes())
    }

    #[test]
    fn replies_find_their_calls_in_any_order() {
        let (mut exchange, _events) = exchange(4);
        let places = Arc::new(Semaphore::new(3));
        let mut answers = [(); 3].map(|()| call(&mut exchange, &places));
        assert_eq!(places.available_permits(), 0);
        for serial in [2, 3, 1] {
            exchange.received(&hostname(serial, &format!("host-{serial}"))).unwrap();
        }
        for (answer, serial) in answers.iter_mut().zip(1..) {
            let body = answer.try_recv().unwrap().unwrap();
            assert_eq!(reply::text(&body), Ok(format!("host-{serial}")));
        }
        assert_eq!(places.available_permits(), 3);
    }

    #[test]
    fn a_call_that_was_given_up_keeps_its_place_until_its_reply_comes() {
        let (mut exchange, _events) = exchange(4);
        let places = Arc::new(Semaphore::new(1));
        drop(call(&mut exchange, &places));
        assert_eq!(places.available_permits(), 0);
        exchange.received(&hostname(1, "late")).unwrap();
        assert_eq!(places.available_permits(), 1);
        assert_eq!(
            exchange.received(&hostname(1, "twice")),
            Err(MessageError::NotAsked { what: "serial", value: 1 })
        );
    }

    #[test]
    fn a_reply_of_another_procedure_is_none() {
        let (mut exchange, _events) = exchange(4);
        let _answer = call(&mut exchange, &Arc::new(Semaphore::new(1)));
        let found = exchange.received(&frame(157, 1, 1, &[0; 8]));
        assert_eq!(found, Err(MessageError::NotAsked { what: "procedure", value: 157 }));
    }

    #[test]
    fn too_many_events_become_one_that_says_so() {
        let (mut exchange, mut events) = exchange(4);
        let network = Writer::default().i32(1).text("n").array(&[7; 16]).i32(2).i32(0).into_bytes();
        for _ in 0..1000 {
            exchange.received(&frame(315, 2, 0, &network)).unwrap();
        }
        let kept: Vec<Event> = std::iter::from_fn(|| events.try_recv().ok()).collect();
        let network_event = Event::Network { network: uuid::Uuid::from_bytes([7; 16]) };
        assert_eq!(kept[..3], [network_event.clone(), network_event.clone(), network_event.clone()]);
        assert_eq!(kept[3..], [Event::Missed]);
        exchange.received(&frame(315, 2, 0, &network)).unwrap();
        assert_eq!(events.try_recv(), Ok(network_event));
        exchange.received(&frame(9999, 2, 0, &[])).unwrap_err();
        assert!(exchange.received(&frame(9999, 2, 0, &[0; 4])).is_ok(), "other kinds are passed over");
    }
}
