//! Who may write to a shared disk: one VRA's view of it, and what it does next. No I/O, no clock.

/// What one VRA is to a shared disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It only reads.
    Standby,
    /// It has locked the mark, or found it locked, and waits for the disk's lock.
    Asking,
    /// It has the lock: writes go through.
    Owner,
    /// It has the lock, and gives it up as soon as the writes inside have ended.
    Leaving,
    /// It serves the disk no more.
    Ended,
}

/// What is so now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Clients have the disk open here.
    pub has_clients: bool,
    /// Writes wait at the gate.
    pub writes_wait: bool,
    /// Writes went through the gate since it was opened last.
    pub was_written: bool,
    /// The revision of the VM's definition that says that its source is here, if it does.
    pub source_by: Option<u64>,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing.
    Rest,
    /// Fail the writes that wait: their clients have gone, and later they would be old writes over new ones.
    TurnAway,
    /// Lock the mark.
    Ask,
    /// Unlock the mark.
    StopAsking,
    /// Try for the disk's lock; with it, unlock the mark and open the gate; without it, lock the mark if it is free now.
    TakeLock,
    /// See whether somebody else has locked the mark; if so, close the gate.
    LookForAsker,
    /// If no write is inside: end the capture, sync the file, give the lock up.
    GiveUp,
}

/// One VRA's part in a shared disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ownership {
    standing: Standing,
    /// The revision by which the source was here when the disk was given up last. Two VRAs that have different definitions may both be told that
    /// they are the source: they must not take the disk from each other by turns.
    given_up_by: Option<u64>,
}

impl Ownership {
    /// Of a VRA that has the lock and whose gate is open, or of one that hasn't.
    pub fn new(owner: bool) -> Self {
        Self { standing: if owner { Standing::Owner } else { Standing::Standby }, given_up_by: None }
    }

    /// What it is.
    pub fn standing(&self) -> Standing {
        self.standing
    }

    /// What to do now.
    ///
    /// The owner keeps the lock while a client of its own that has written is there: a guest that is migrated is gone here when it writes
    /// elsewhere. A client that has only read may be a guest on its way to this host, and doesn't count.
    pub fn next(&self, facts: &Facts) -> Step {
        let abandoned = facts.writes_wait && !facts.has_clients;
        let is_source = facts.source_by.is_some() && facts.source_by != self.given_up_by;
        let wants = facts.writes_wait || is_source;
        match self.standing {
            Standing::Standby | Standing::Asking if abandoned => Step::TurnAway,
            Standing::Standby if wants => Step::Ask,
            Standing::Asking if wants => Step::TakeLock,
            Standing::Asking => Step::StopAsking,
            Standing::Owner if !(facts.has_clients && facts.was_written) => Step::LookForAsker,
            Standing::Leaving => Step::GiveUp,
            Standing::Standby | Standing::Owner | Standing::Ended => Step::Rest,
        }
    }

    /// A step was taken with these facts; `so` says whether it came to what it is for: the disk is asked for, it was locked, somebody asks, the lock
    /// was given up.
    pub fn done(&mut self, step: Step, so: bool, facts: &Facts) {
        if (step, so) == (Step::GiveUp, true) {
            self.given_up_by = facts.source_by;
        }
        self.standing = match (step, so) {
            (Step::Ask, true) => Standing::Asking,
            (Step::StopAsking, true) => Standing::Standby,
            (Step::TakeLock, true) => Standing::Owner,
            (Step::LookForAsker, true) => Standing::Leaving,
            (Step::GiveUp, true) => Standing::Standby,
            _ => self.standing,
        };
    }

    /// The disk is served no more. What it was before.
    pub fn end(&mut self) -> Standing {
        std::mem::replace(&mut self.standing, Standing::Ended)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A VRA with its gate and clients, beside a disk and a mark that one of them can lock.
    struct Host {
        own: Ownership,
        facts: Facts,
        gate_open: bool,
        inside: u32,
    }

    #[derive(Default)]
    struct Storage {
        disk: Option<usize>,
        mark: Option<usize>,
    }

    #[derive(Clone, Copy, Debug)]
    enum Event {
        /// Takes the next step.
        Tick(usize),
        Connect(usize),
        Hangup(usize),
        /// A client writes.
        Write(usize),
        Land(usize),
        /// The VRA is killed and starts again; its client reconnects.
        Kill(usize),
        /// A definition moves the source here; the former one may not know.
        Source(usize),
        NoSource(usize),
    }

    const HOSTS: usize = 3;

    fn new_host(source_by: Option<u64>, has_clients: bool) -> Host {
        let facts = Facts { has_clients, writes_wait: false, was_written: false, source_by };
        Host { own: Ownership::new(false), facts, gate_open: false, inside: 0 }
    }

    fn tick(hosts: &mut [Host], at: usize, storage: &mut Storage) {
        let host = &mut hosts[at];
        let step = host.own.next(&host.facts);
        let mut take = |place: fn(&mut Storage) -> &mut Option<usize>| {
            let owner = place(storage);
            if owner.is_none() {
                *owner = Some(at);
            }
            *owner == Some(at)
        };
        let so = match step {
            Step::Rest => false,
            Step::TurnAway => {
                host.facts.writes_wait = false;
                true
            }
            Step::Ask => {
                take(|storage| &mut storage.mark);
                true
            }
            Step::StopAsking => {
                storage.mark = storage.mark.filter(|asker| *asker != at);
                true
            }
            Step::TakeLock => {
                let locked = take(|storage| &mut storage.disk);
                if locked {
                    storage.mark = storage.mark.filter(|asker| *asker != at);
                    host.gate_open = true;
                    host.facts.was_written = std::mem::take(&mut host.facts.writes_wait);
                    host.inside += u32::from(host.facts.was_written);
                } else {
                    take(|storage| &mut storage.mark);
                }
                locked
            }
            Step::LookForAsker => {
                let asked = storage.mark.is_some_and(|asker| asker != at);
                host.gate_open &= !asked;
                asked
            }
            Step::GiveUp => {
                if host.inside == 0 {
                    storage.disk = None;
                }
                host.inside == 0
            }
        };
        let facts = host.facts;
        host.own.done(step, so, &facts);
    }

    fn happen(hosts: &mut [Host], storage: &mut Storage, event: Event) {
        match event {
            Event::Tick(at) => tick(hosts, at, storage),
            Event::Connect(at) => hosts[at].facts.has_clients = true,
            Event::Hangup(at) => hosts[at].facts.has_clients = false,
            Event::Write(at) => {
                let host = &mut hosts[at];
                match (host.facts.has_clients, host.gate_open) {
                    (true, true) => (host.inside, host.facts.was_written) = (host.inside + 1, true),
                    (true, false) => host.facts.writes_wait = true,
                    (false, _) => {}
                }
            }
            Event::Land(at) => hosts[at].inside = hosts[at].inside.saturating_sub(1),
            Event::Kill(at) => {
                hosts[at] = new_host(hosts[at].facts.source_by, hosts[at].facts.has_clients);
                for place in [&mut storage.disk, &mut storage.mark] {
                    *place = place.filter(|owner| *owner != at);
                }
            }
            Event::Source(at) => {
                let newest = hosts.iter().filter_map(|host| host.facts.source_by).max();
                hosts[at].facts.source_by = Some(newest.unwrap_or_default() + 1);
            }
            Event::NoSource(at) => hosts[at].facts.source_by = None,
        }
    }

    fn events() -> impl Strategy<Value = Vec<Event>> {
        let host = 0..HOSTS;
        let event = prop_oneof![
            8 => host.clone().prop_map(Event::Tick),
            2 => host.clone().prop_map(Event::Write),
            2 => host.clone().prop_map(Event::Land),
            1 => host.clone().prop_map(Event::Connect),
            1 => host.clone().prop_map(Event::Hangup),
            1 => host.clone().prop_map(Event::Kill),
            1 => host.clone().prop_map(Event::Source),
            1 => host.prop_map(Event::NoSource),
        ];
        proptest::collection::vec(event, 0..200)
    }

    proptest! {
        #[test]
        fn one_at_a_time_writes_and_a_guest_that_is_alone_gets_through(events in events(), guest in 0..HOSTS) {
            let (mut hosts, mut storage) = ((0..HOSTS).map(|at| new_host((at == 0).then_some(1), false)).collect::<Vec<_>>(), Storage::default());
            for event in events {
                happen(&mut hosts, &mut storage, event);
                let writing: Vec<usize> = (0..HOSTS).filter(|at| hosts[*at].gate_open || hosts[*at].inside > 0).collect();
                prop_assert!(writing.len() <= 1, "{event:?} lets {writing:?} write");
                prop_assert!(writing.iter().all(|at| storage.disk == Some(*at)), "{event:?}: without the lock");
            }
            // By themselves they come to rest, whoever believes to be the source.
            let mut rounds = (0..60).map(|_| {
                for at in 0..HOSTS {
                    (0..64).for_each(|_| happen(&mut hosts, &mut storage, Event::Land(at)));
                    happen(&mut hosts, &mut storage, Event::Tick(at));
                }
                storage.disk
            });
            let owner = rounds.by_ref().nth(40).expect("a round");
            prop_assert!(rounds.all(|now| now == owner), "the disk goes to and fro");
            // Everybody else's guest has gone; what was in flight lands.
            for at in (0..HOSTS).filter(|at| *at != guest) {
                happen(&mut hosts, &mut storage, Event::Hangup(at));
            }
            happen(&mut hosts, &mut storage, Event::Connect(guest));
            happen(&mut hosts, &mut storage, Event::Write(guest));
            for _ in 0..20 {
                for at in 0..HOSTS {
                    (0..64).for_each(|_| happen(&mut hosts, &mut storage, Event::Land(at)));
                    happen(&mut hosts, &mut storage, Event::Tick(at));
                }
            }
            prop_assert!(hosts[guest].own.standing() == Standing::Owner && !hosts[guest].facts.writes_wait);
        }
    }

    #[test]
    fn a_guest_on_its_way_does_not_keep_the_disk_from_the_one_that_runs() {
        // This VRA has the lock; the guest that waits at it has only read.
        let incoming = Facts { has_clients: true, writes_wait: false, was_written: false, source_by: None };
        assert_eq!(Ownership::new(true).next(&incoming), Step::LookForAsker);
        // A guest that has written keeps it, whoever asks.
        let running = Facts { was_written: true, ..incoming };
        assert_eq!(Ownership::new(true).next(&running), Step::Rest);
        // What a client that is gone wanted to write never lands later.
        let gone = Facts { has_clients: false, writes_wait: true, was_written: false, source_by: Some(1) };
        assert_eq!(Ownership::new(false).next(&gone), Step::TurnAway);
    }
}
