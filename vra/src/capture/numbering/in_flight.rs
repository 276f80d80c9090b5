//! Writes that the guest has sent and that it doesn't know to be completed, with the order among those that overlap.
//!
//! A later write's local issue waits for one earlier overlapping write at a time, the latest of them; when that one
//! lands, the search is repeated. Searches are linear over the volume's writes in flight, which are bounded by the queue
//! depths; memory is preallocated.

/// A byte range of a volume: `start` inclusive, `end` exclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByteRange {
    /// First byte.
    pub start: u64,
    /// First byte after it.
    pub end: u64,
}

impl ByteRange {
    /// From an offset and a length in bytes.
    pub fn new(offset_bytes: u64, len_bytes: u64) -> Self {
        Self { start: offset_bytes, end: offset_bytes.saturating_add(len_bytes) }
    }

    /// Whether the two share a byte.
    pub fn overlaps(&self, other: &ByteRange) -> bool {
        self.start < other.end && other.start < self.end
    }

    /// Length in bytes.
    pub fn len_bytes(&self) -> u64 {
        self.end - self.start
    }
}

/// A write in the set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket {
    index: u32,
    /// Tells this use of the place from earlier ones.
    order: u64,
}

/// What the set knows about a write.
#[derive(Clone, Copy, Debug)]
pub(super) struct InFlightWrite {
    /// The volume's number within the VM.
    pub volume: u16,
    /// The lane that it came through.
    pub lane: u32,
    /// The lane's name for it.
    pub token: u64,
    /// Its last number, or zero when it wasn't captured.
    pub last_seq: u64,
    /// Where it goes.
    pub range: ByteRange,
}

/// All writes in flight of one VM.
pub(super) struct InFlight {
    nodes: Vec<Node>,
    free: u32,
    count: usize,
    capacity: usize,
    next_order: u64,
    volumes: Vec<Vec<Interval>>,
}

impl InFlight {
    /// A set for at most `capacity` writes.
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            nodes: Vec::with_capacity(capacity),
            free: NONE,
            count: 0,
            capacity,
            next_order: 1,
            volumes: Vec::new(),
        }
    }

    /// Adds a volume; volumes are numbered in the order of these calls.
    pub(super) fn add_volume(&mut self) {
        self.volumes.push(Vec::with_capacity(self.capacity.min(64)));
    }

    /// Whether no further write fits.
    pub(super) fn is_full(&self) -> bool {
        self.count == self.capacity
    }

    /// Adds a write, and says whether its local issue must wait for an earlier overlapping one.
    ///
    /// # Panics
    /// When the set is full.
    pub(super) fn insert(&mut self, write: InFlightWrite, ignore_overlap: bool) -> (Ticket, bool) {
        assert!(!self.is_full(), "the caller asks first");
        let order = self.next_order;
        self.next_order += 1;
        let index = self.place(Node { write, order, state: State::Issued, first_waiter: NONE, next: NONE });
        self.count += 1;
        let blocker = if ignore_overlap { None } else { self.blocker(write.volume, write.range, order) };
        self.volumes[usize::from(write.volume)].push(Interval { range: write.range, order, index });
        if let Some(blocker) = blocker {
            self.wait(index, blocker);
        }
        (Ticket { index, order }, blocker.is_some())
    }

    /// The write that `ticket` names.
    pub(super) fn get(&self, ticket: Ticket) -> InFlightWrite {
        self.node(ticket).write
    }

    /// The local disk is done with the write: calls `ready` with each write that may now be issued.
    pub(super) fn land(&mut self, ticket: Ticket, mut ready: impl FnMut(Ticket, InFlightWrite)) {
        let node = self.node_mut(ticket);
        debug_assert_eq!(node.state, State::Issued, "a write lands once, and after its issue");
        node.state = State::Landed;
        let mut waiter = std::mem::replace(&mut node.first_waiter, NONE);
        while waiter != NONE {
            let index = waiter;
            let node = &mut self.nodes[index as usize];
            waiter = std::mem::replace(&mut node.next, NONE);
            let (write, order) = (node.write, node.order);
            match self.blocker(write.volume, write.range, order) {
                Some(blocker) => self.wait(index, blocker),
                None => {
                    self.nodes[index as usize].state = State::Issued;
                    ready(Ticket { index, order }, write);
                }
            }
        }
    }

    /// Takes a landed write out of the set: the guest is told about it now.
    pub(super) fn remove(&mut self, ticket: Ticket) -> InFlightWrite {
        let node = self.node(ticket);
        debug_assert_eq!(node.state, State::Landed, "a write leaves the set after it has landed");
        let write = node.write;
        let intervals = &mut self.volumes[usize::from(write.volume)];
        if let Some(at) = intervals.iter().position(|interval| interval.order == ticket.order) {
            intervals.swap_remove(at);
        }
        let node = &mut self.nodes[ticket.index as usize];
        node.state = State::Free;
        node.next = self.free;
        self.free = ticket.index;
        self.count -= 1;
        write
    }

    /// Whether a write that the local disk isn't done with overlaps the range.
    pub(super) fn has_unlanded(&self, volume: u16, range: ByteRange) -> bool {
        self.volumes[usize::from(volume)].iter().any(|interval| {
            interval.range.overlaps(&range) && self.nodes[interval.index as usize].state != State::Landed
        })
    }

    /// Whether a write with a number above `seq` overlaps the range.
    pub(super) fn has_above(&self, volume: u16, range: ByteRange, seq: u64) -> bool {
        self.volumes[usize::from(volume)].iter().any(|interval| {
            interval.range.overlaps(&range) && self.nodes[interval.index as usize].write.last_seq > seq
        })
    }

    /// How many writes of a volume are in the set.
    pub(super) fn count_of(&self, volume: u16) -> usize {
        self.volumes[usize::from(volume)].len()
    }

    fn place(&mut self, node: Node) -> u32 {
        if self.free == NONE {
            self.nodes.push(node);
            return (self.nodes.len() - 1) as u32;
        }
        let index = self.free;
        let place = &mut self.nodes[index as usize];
        self.free = place.next;
        *place = node;
        index
    }

    /// The latest write before `order` that overlaps the range and isn't done.
    fn blocker(&self, volume: u16, range: ByteRange, order: u64) -> Option<u32> {
        self.volumes[usize::from(volume)]
            .iter()
            .filter(|interval| {
                interval.order < order
                    && interval.range.overlaps(&range)
                    && self.nodes[interval.index as usize].state != State::Landed
            })
            .max_by_key(|interval| interval.order)
            .map(|interval| interval.index)
    }

    fn wait(&mut self, index: u32, blocker: u32) {
        let next = std::mem::replace(&mut self.nodes[blocker as usize].first_waiter, index);
        let node = &mut self.nodes[index as usize];
        node.state = State::Waiting;
        node.next = next;
    }

    fn node(&self, ticket: Ticket) -> &Node {
        let node = &self.nodes[ticket.index as usize];
        assert_eq!(node.order, ticket.order, "a ticket is used until its write leaves the set");
        node
    }

    fn node_mut(&mut self, ticket: Ticket) -> &mut Node {
        let node = &mut self.nodes[ticket.index as usize];
        assert_eq!(node.order, ticket.order, "a ticket is used until its write leaves the set");
        node
    }
}

/// End of a list.
const NONE: u32 = u32::MAX;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    /// Its local issue waits for an earlier write.
    Waiting,
    /// Its local issue may be under way.
    Issued,
    /// The local disk is done with it; the guest doesn't know yet.
    Landed,
}

struct Node {
    write: InFlightWrite,
    order: u64,
    state: State,
    /// Head of the list of writes that wait for this one.
    first_waiter: u32,
    /// Link in the list of waiters that this one is in, or in the free list.
    next: u32,
}

struct Interval {
    range: ByteRange,
    order: u64,
    index: u32,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn write(volume: u16, start: u64, end: u64) -> InFlightWrite {
        InFlightWrite { volume, lane: 0, token: 0, last_seq: 0, range: ByteRange { start, end } }
    }

    #[test]
    fn a_chain_of_overlaps_lands_in_order() {
        let mut set = InFlight::new(8);
        set.add_volume();
        let (first, waits) = set.insert(write(0, 0, 8), false);
        assert!(!waits);
        let (second, waits) = set.insert(write(0, 4, 12), false);
        assert!(waits);
        let (third, waits) = set.insert(write(0, 0, 16), false);
        assert!(waits);
        let (_, waits) = set.insert(write(0, 16, 20), false);
        assert!(!waits, "touching is not overlapping");
        let mut ready = Vec::new();
        set.land(first, |ticket, _| ready.push(ticket));
        set.remove(first);
        assert_eq!(ready, [second], "the third waits for the second too");
        set.land(second, |ticket, _| ready.push(ticket));
        assert_eq!(ready, [second, third]);
    }

    proptest! {
        /// Whatever lands in whatever order: a write is let go exactly when no earlier overlapping one is under way, and
        /// none is forgotten.
        #[test]
        fn nothing_overtakes_and_nothing_is_forgotten(
            ranges in prop::collection::vec((0_u16..2, 0_u64..24, 1_u64..8), 1..60),
            choices in prop::collection::vec(any::<prop::sample::Index>(), 200),
        ) {
            let mut set = InFlight::new(16);
            set.add_volume();
            set.add_volume();
            let mut incoming = ranges.into_iter();
            // (ticket, volume, range, order, may be issued)
            let mut live: Vec<(Ticket, u16, ByteRange, usize, bool)> = Vec::new();
            let mut order = 0;
            for choice in choices {
                let issued: Vec<usize> = (0..live.len()).filter(|&at| live[at].4).collect();
                let arrives = !set.is_full() && (issued.is_empty() || choice.index(3) > 0);
                if let Some((volume, start, len)) = arrives.then(|| incoming.next()).flatten() {
                    let range = ByteRange::new(start, len);
                    let blocked = live.iter().any(|w| w.1 == volume && w.2.overlaps(&range));
                    let (ticket, waits) = set.insert(write(volume, range.start, range.end), false);
                    prop_assert_eq!(waits, blocked);
                    live.push((ticket, volume, range, order, !waits));
                    order += 1;
                } else if !issued.is_empty() {
                    let at = issued[choice.index(issued.len())];
                    let (ticket, ..) = live.remove(at);
                    let mut ready = Vec::new();
                    set.land(ticket, |ticket, _| ready.push(ticket));
                    set.remove(ticket);
                    for ticket in ready {
                        let at = live.iter().position(|w| w.0 == ticket).expect("a live write");
                        prop_assert!(!live[at].4, "let go once");
                        live[at].4 = true;
                    }
                }
                for one in &live {
                    let blocked = live.iter().any(|w| w.1 == one.1 && w.3 < one.3 && w.2.overlaps(&one.2));
                    prop_assert_eq!(one.4, !blocked);
                }
            }
        }
    }
}
