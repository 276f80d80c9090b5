//! The checkpoints of a group: the lists of its VMs merged, as far as a question needs.

use std::collections::BTreeSet;

use crate::api::vpg::CheckpointPlace;
use crate::api::{
    CheckpointId, CheckpointInfo, CheckpointPage, ListCheckpoints, MAX_PAGE_BYTES, MemberSince, TimeUs, VmId,
    message_bytes,
};
use crate::planted::{Planted, is_planted};
use crate::receive::{CheckpointKey, CheckpointList, ListedCheckpoint};

/// What the journal of a VM lists.
#[derive(Clone, Debug)]
pub struct MemberJournal {
    /// The VM.
    pub vm: VmId,
    /// Which checkpoints it has to have.
    pub since: MemberSince,
    /// Those that it has.
    pub list: CheckpointList,
}

/// What each of a group's journals at this VRA lists.
pub struct GroupCheckpoints {
    journals: Vec<MemberJournal>,
    /// Checkpoints, and the VMs whose journals have them locked.
    locked: BTreeSet<(CheckpointId, VmId)>,
}

/// Before all, and behind all, checkpoints of a time.
const fn first_of(time_us: TimeUs) -> CheckpointKey {
    (time_us, CheckpointId { nonce: 0, counter: 0 })
}

impl GroupCheckpoints {
    /// Of these journals, with the checkpoints that each of them has locked.
    pub fn new(journals: Vec<MemberJournal>, locked: BTreeSet<(CheckpointId, VmId)>) -> Self {
        Self { journals, locked }
    }

    /// How many are complete.
    pub(super) fn complete_count(&self) -> u64 {
        match &self.journals[..] {
            [] => 0,
            [only] => only.list.len() as u64,
            _ => self.merged(None, None, false).filter(|keyed| self.is_complete(keyed)).count() as u64,
        }
    }

    /// The newest complete one: that with the largest cuts, whatever its coordinator's clock said.
    pub(super) fn newest(&self) -> Option<CheckpointInfo> {
        if !self.is_disordered() {
            return self.newest_until(TimeUs(u64::MAX));
        }
        let complete = self.merged(None, None, false).filter(|keyed| self.is_complete(keyed));
        complete.max_by_key(Keyed::age).map(|keyed| self.info(&keyed))
    }

    /// The newest complete one at or before a time.
    pub(super) fn newest_until(&self, until: TimeUs) -> Option<CheckpointInfo> {
        let to = until.0.checked_add(1).map(|end| first_of(TimeUs(end)));
        let found = self.merged(None, to, true).find(|keyed| self.is_complete(keyed))?;
        Some(self.info(&found))
    }

    /// The one with this id.
    pub(super) fn find(&self, id: CheckpointId) -> Option<CheckpointInfo> {
        self.keyed(id).map(|keyed| self.info(&keyed))
    }

    /// A page.
    pub fn page(&self, asked: &ListCheckpoints) -> CheckpointPage {
        let from = asked.from_us.map(first_of);
        let to = asked.to_us.and_then(|to| Some(first_of(TimeUs(to.0.checked_add(1)?))));
        // Mostly both orders are one, and then one by time costs less.
        if asked.newest_first && asked.by_cut && self.is_disordered() {
            return self.page_by_cut(asked, from, to);
        }
        let matches = |keyed: &Keyed<'_>| !asked.tagged || keyed.listed.tag.is_some();
        let total = match &self.journals[..] {
            [MemberJournal { list: only, .. }] if !asked.tagged => {
                let end = to.map_or(only.len(), |to| only.count_before(to));
                end.saturating_sub(from.map_or(0, |from| only.count_before(from))) as u64
            }
            _ => self.merged(from, to, false).filter(matches).count() as u64,
        };
        // One that was given up since the last page: the page begins anew.
        let after = asked.after.and_then(|after| self.keyed(after)).map(|keyed| keyed.listed.key());
        let (from, to) = match after {
            Some(after) if asked.newest_first => (from, Some(to.map_or(after, |to| to.min(after)))),
            Some(after) => (from.max(Some(next_key(after))), to),
            None => (from, to),
        };
        let rest = self.merged(from, to, asked.newest_first).filter(matches);
        self.first_of_page(rest, asked.limit, total)
    }

    /// A page in the order of cuts, those with the largest first.
    fn page_by_cut(
        &self,
        asked: &ListCheckpoints,
        from: Option<CheckpointKey>,
        to: Option<CheckpointKey>,
    ) -> CheckpointPage {
        let matches = |keyed: &Keyed<'_>| !asked.tagged || keyed.listed.tag.is_some();
        let mut all: Vec<Keyed<'_>> = self.merged(from, to, false).filter(matches).collect();
        all.sort_by_key(|keyed| std::cmp::Reverse(keyed.age()));
        let total = all.len() as u64;
        let after = asked.after.and_then(|after| all.iter().position(|keyed| keyed.listed.id == after));
        self.first_of_page(all.into_iter().skip(after.map_or(0, |after| after + 1)), asked.limit, total)
    }

    fn first_of_page<'a>(
        &self,
        mut rest: impl Iterator<Item = Keyed<'a>>,
        limit: u32,
        total: u64,
    ) -> CheckpointPage {
        let mut page = Vec::<CheckpointInfo>::new();
        let mut bytes = 0;
        let next = loop {
            let Some(keyed) = rest.next() else { break None };
            if page.len() == limit as usize {
                break page.last();
            }
            let info = self.info(&keyed);
            bytes += message_bytes(&info) + 1;
            // With many VMs far fewer than the limit fit into a message.
            if bytes > MAX_PAGE_BYTES && !page.is_empty() {
                break page.last();
            }
            page.push(info);
        };
        let next = next.map(|last| last.id);
        CheckpointPage { checkpoints: page, total, next }
    }

    fn keyed(&self, id: CheckpointId) -> Option<Keyed<'_>> {
        let key = self.journals.iter().find_map(|journal| journal.list.find(id))?.key();
        self.merged(Some(key), None, false).next()
    }

    /// Whether the order of times may not be that of cuts.
    fn is_disordered(&self) -> bool {
        self.journals.iter().any(|journal| journal.list.is_disordered())
    }

    fn is_complete(&self, keyed: &Keyed<'_>) -> bool {
        let version = keyed.listed.member_set_version;
        let needed = self.journals.iter().filter(|journal| journal.since.is_in(version)).count();
        needed > 0 && keyed.holders == needed || is_planted(Planted::MemberSubstituted)
    }

    fn info(&self, keyed: &Keyed<'_>) -> CheckpointInfo {
        let key = keyed.listed.key();
        let version = keyed.listed.member_set_version;
        let members = self.journals.iter().filter(|journal| journal.since.is_in(version));
        let places = members.filter_map(|MemberJournal { vm, list, .. }| {
            // The planted bug: an older one of the journal stands for the one that it lacks.
            let substitute =
                || is_planted(Planted::MemberSubstituted).then(|| list.newest_until(key.0)).flatten();
            let listed = list.get(key).or_else(substitute)?;
            Some(CheckpointPlace { vm: *vm, cut: listed.cut })
        });
        let is_locked = |vm: VmId| self.locked.contains(&(keyed.listed.id, vm));
        let mut needed = self.journals.iter().filter(|journal| journal.since.is_in(version)).peekable();
        let locked = needed.peek().is_some() && needed.all(|journal| is_locked(journal.vm));
        let is_locked_somewhere = self.journals.iter().any(|journal| is_locked(journal.vm));
        CheckpointInfo {
            id: keyed.listed.id,
            time_us: keyed.listed.time_us,
            kind: keyed.listed.kind,
            tag: keyed.listed.tag.as_deref().map(str::to_owned),
            member_set_version: version,
            complete: self.is_complete(keyed),
            locked,
            partly_locked: is_locked_somewhere && !locked,
            vms: places.collect(),
        }
    }

    /// All that any journal has, each once, from one key to before another one.
    fn merged(
        &self,
        from: Option<CheckpointKey>,
        to: Option<CheckpointKey>,
        newest_first: bool,
    ) -> impl Iterator<Item = Keyed<'_>> {
        type Listed<'a> = Box<dyn Iterator<Item = &'a ListedCheckpoint> + 'a>;
        let mut sources: Vec<std::iter::Peekable<Listed<'_>>> = Vec::with_capacity(self.journals.len());
        for MemberJournal { list, .. } in &self.journals {
            let begin = from.map_or(0, |from| list.count_before(from));
            let end = to.map_or(list.len(), |to| list.count_before(to)).max(begin);
            let listed: Listed<'_> = if newest_first {
                Box::new(list.iter_back_from(end).take(end - begin))
            } else {
                Box::new(list.iter_from(begin).take(end - begin))
            };
            sources.push(listed.peekable());
        }
        std::iter::from_fn(move || {
            let heads = sources.iter_mut().filter_map(|source| source.peek().map(|listed| listed.key()));
            let key = if newest_first { heads.max() } else { heads.min() }?;
            let mut found: Option<Keyed<'_>> = None;
            for (journal, source) in self.journals.iter().zip(&mut sources) {
                if let Some(listed) = source.next_if(|listed| listed.key() == key) {
                    let keyed = found.get_or_insert(Keyed { listed, holders: 0, cuts: 0 });
                    keyed.holders += usize::from(journal.since.is_in(listed.member_set_version));
                    keyed.cuts += u128::from(listed.cut);
                }
            }
            found
        })
    }
}

/// A checkpoint, and how many journals of those that need it have it.
struct Keyed<'a> {
    listed: &'a ListedCheckpoint,
    holders: usize,
    /// The sum of its cuts: each of a later complete one's is larger, and that is of the same VMs and maybe more.
    cuts: u128,
}

impl Keyed<'_> {
    fn age(&self) -> (u128, CheckpointKey) {
        (self.cuts, self.listed.key())
    }
}

fn next_key((time_us, id): CheckpointKey) -> CheckpointKey {
    (time_us, CheckpointId { nonce: id.nonce, counter: id.counter.saturating_add(1) })
}

#[cfg(test)]
mod tests {
    use journal::batch::{Checkpoint, CheckpointKind, Epoch};
    use uuid::Uuid;

    use super::*;
    use crate::api::{MAX_MESSAGE_BYTES, VpgId};

    fn list(counters: &[u64]) -> MemberJournal {
        list_since(0, counters.iter().map(|counter| (*counter, 1)))
    }

    /// Of checkpoints with these member sets.
    fn list_since(since: u32, taken: impl IntoIterator<Item = (u64, u64)>) -> MemberJournal {
        let mut list = CheckpointList::default();
        for (counter, member_set_version) in taken {
            list.push(ListedCheckpoint::of(&Checkpoint {
                epoch: Epoch { nonce: Uuid::from_u128(5), counter },
                cut: counter * 10,
                member_set_version,
                time_us: counter * 1000,
                kind: CheckpointKind::Automatic,
                tag: if counter == 3 { "three".to_owned() } else { String::new() },
            }));
        }
        MemberJournal { vm: VmId::random(), since: MemberSince(since), list }
    }

    fn ask(limit: u32) -> ListCheckpoints {
        ListCheckpoints {
            vpg: VpgId::random(),
            vm: None,
            from_us: None,
            to_us: None,
            tagged: false,
            newest_first: false,
            by_cut: false,
            after: None,
            limit,
        }
    }

    /// The counters of all pages, one after the other.
    fn all_pages(group: &GroupCheckpoints, mut asked: ListCheckpoints, total: u64) -> Vec<u64> {
        let mut seen = Vec::new();
        loop {
            let page = group.page(&asked);
            assert_eq!(page.total, total);
            seen.extend(page.checkpoints.iter().map(|info| info.id.counter));
            let Some(next) = page.next else { return seen };
            assert_eq!(page.checkpoints.len(), asked.limit as usize);
            asked.after = Some(next);
        }
    }

    #[test]
    fn only_what_every_journal_holds_is_complete() {
        let group = GroupCheckpoints::new(vec![list(&[1, 2, 3, 5]), list(&[1, 2, 4, 5])], BTreeSet::new());
        let page = group.page(&ask(10));
        let told: Vec<_> = page.checkpoints.iter().map(|info| (info.id.counter, info.complete)).collect();
        assert_eq!(told, [(1, true), (2, true), (3, false), (4, false), (5, true)]);
        assert_eq!(page.checkpoints[3].vms.iter().map(|place| place.cut).collect::<Vec<_>>(), [40]);
        assert_eq!(group.complete_count(), 3);
        let newest = |until| group.newest_until(TimeUs(until)).map(|info| info.id.counter);
        assert_eq!(
            [newest(u64::MAX), newest(4999), newest(2000), newest(1999)],
            [Some(5), Some(2), Some(2), Some(1)]
        );
        assert_eq!(newest(999), None);
        assert_eq!(group.find(CheckpointId { nonce: 5, counter: 4 }).map(|info| info.complete), Some(false));
        assert_eq!(group.find(CheckpointId { nonce: 6, counter: 4 }), None);
    }

    #[test]
    fn the_newest_has_the_largest_cuts_though_a_coordinators_clock_was_ahead() {
        let jumped = |counter: u64| ListedCheckpoint {
            time_us: TimeUs(if counter == 3 { 1_000_000 } else { counter * 1000 }),
            id: CheckpointId { nonce: 5, counter },
            cut: counter * 10,
            member_set_version: 1,
            kind: CheckpointKind::Automatic.into(),
            tag: None,
        };
        let list = |counters: &[u64]| {
            let mut list = CheckpointList::default();
            counters.iter().for_each(|counter| list.push(jumped(*counter)));
            MemberJournal { vm: VmId::random(), since: MemberSince::default(), list }
        };
        let group =
            GroupCheckpoints::new(vec![list(&[1, 2, 3, 4, 5]), list(&[1, 2, 3, 4, 5, 6])], BTreeSet::new());
        assert_eq!(group.newest().map(|info| info.id.counter), Some(5));
        assert_eq!(group.newest_until(TimeUs(u64::MAX)).map(|info| info.id.counter), Some(3));
        // By its time it is where its time says.
        assert_eq!(group.newest_until(TimeUs(4500)).map(|info| info.id.counter), Some(4));
        for limit in 1..8 {
            let by_time = ListCheckpoints { newest_first: true, ..ask(limit) };
            assert_eq!(all_pages(&group, by_time.clone(), 6), [3, 6, 5, 4, 2, 1]);
            let page = ListCheckpoints { by_cut: true, ..by_time };
            // One that lies in one journal alone has its place by that journal's cut.
            let seen = all_pages(&group, page, 6);
            assert_eq!(
                seen.iter().copied().filter(|counter| *counter != 6).collect::<Vec<_>>(),
                [5, 4, 3, 2, 1]
            );
        }
        let ordered = GroupCheckpoints::new(vec![list(&[1, 2, 3]), list(&[2, 3])], BTreeSet::new());
        assert_eq!(ordered.newest().map(|info| info.id.counter), Some(3));
    }

    #[test]
    fn a_checkpoint_is_of_those_that_had_joined_by_then() {
        // The second came with the member set 2, the third with 3: until its first sync ended, there were no checkpoints.
        let old = list_since(1, [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (6, 3)]);
        let second = list_since(2, [(3, 2), (5, 3), (6, 3)]);
        let third = list_since(3, [(6, 3)]);
        let vms = [&old, &second, &third].map(|journal| journal.vm);
        let group = GroupCheckpoints::new(vec![third.clone(), old, second.clone()], BTreeSet::new());
        let told: Vec<_> = group.page(&ask(10)).checkpoints;
        let complete: Vec<_> = told.iter().map(|info| (info.id.counter, info.complete)).collect();
        assert_eq!(complete, [(1, true), (2, true), (3, true), (4, false), (5, false), (6, true)]);
        let of = |at: usize| told[at].vms.iter().map(|place| place.vm).collect::<BTreeSet<_>>();
        assert_eq!(of(0), BTreeSet::from([vms[0]]));
        assert_eq!(of(2), BTreeSet::from([vms[0], vms[1]]));
        assert_eq!(of(5), BTreeSet::from(vms));
        assert_eq!(group.complete_count(), 4);
        assert_eq!(group.newest_until(TimeUs(5999)).map(|info| info.id.counter), Some(3));
        assert_eq!(group.newest().map(|info| info.id.counter), Some(6));
        // The first is taken out: what the others have of their own time stays.
        let rest = GroupCheckpoints::new(vec![second, third], BTreeSet::new());
        let told: Vec<_> = rest.page(&ask(10)).checkpoints;
        let complete: Vec<_> = told.iter().map(|info| (info.id.counter, info.complete)).collect();
        assert_eq!(complete, [(3, true), (5, false), (6, true)]);
        // None of those that are here had joined by then.
        let strange = list_since(7, [(1, 1)]);
        let late = GroupCheckpoints::new(vec![strange, list_since(7, [])], BTreeSet::new());
        assert_eq!((late.complete_count(), late.newest()), (0, None));
    }

    #[test]
    fn a_checkpoint_is_locked_if_every_journal_that_it_is_of_has_it_locked_and_else_partly() {
        let journals = [list(&[1, 2, 3]), list(&[1, 2, 3]), list_since(2, [(3, 2)])];
        let [first, second, _] = journals.each_ref().map(|journal| journal.vm);
        let id = |counter| CheckpointId { nonce: 5, counter };
        // The third joined later.
        let locked = BTreeSet::from([(id(1), first), (id(1), second), (id(2), second)]);
        let group = GroupCheckpoints::new(journals.into(), locked);
        let told: Vec<_> = group.page(&ask(10)).checkpoints;
        let told: Vec<_> =
            told.iter().map(|info| (info.id.counter, info.locked, info.partly_locked)).collect();
        assert_eq!(told, [(1, true, false), (2, false, true), (3, false, false)]);
    }

    #[test]
    fn pages_cover_the_list_once_in_either_order() {
        for members in 1..=3 {
            let lists = [list(&[1, 2, 3, 4, 5]), list(&[2, 3, 4]), list(&[])];
            let group = GroupCheckpoints::new(lists.into_iter().take(members).collect(), BTreeSet::new());
            for limit in 1..7 {
                assert_eq!(all_pages(&group, ask(limit), 5), [1, 2, 3, 4, 5]);
                let newest_first = ListCheckpoints { newest_first: true, ..ask(limit) };
                assert_eq!(all_pages(&group, newest_first, 5), [5, 4, 3, 2, 1]);
                let part = ListCheckpoints {
                    from_us: Some(TimeUs(2000)),
                    to_us: Some(TimeUs(4000)),
                    newest_first: limit % 2 == 0,
                    ..ask(limit)
                };
                let expected = if part.newest_first { [4, 3, 2] } else { [2, 3, 4] };
                assert_eq!(all_pages(&group, part, 3), expected);
            }
            let tagged = group.page(&ListCheckpoints { tagged: true, ..ask(10) });
            assert_eq!(
                tagged.checkpoints.iter().filter_map(|info| info.tag.as_deref()).collect::<Vec<_>>(),
                ["three"]
            );
            assert_eq!(tagged.total, 1);
        }
    }

    #[test]
    fn pages_of_a_group_with_many_vms_fit_into_a_message_and_cover_the_list() {
        let counters: Vec<u64> = (1..=1_000).collect();
        let journals = (0..256).map(|_| list(&counters)).collect();
        let group = GroupCheckpoints::new(journals, BTreeSet::new());
        let orders = [(false, false), (true, false), (true, true)];
        for (newest_first, by_cut) in orders {
            let mut asked = ListCheckpoints { newest_first, by_cut, ..ask(1_000) };
            let mut seen = Vec::new();
            loop {
                let page = group.page(&asked);
                assert!(message_bytes(&page) < MAX_MESSAGE_BYTES as usize);
                assert!(page.next.is_none() || page.checkpoints.len() > 50);
                assert_eq!(page.total, 1_000);
                seen.extend(page.checkpoints.iter().map(|info| info.id.counter));
                let Some(next) = page.next else { break };
                asked.after = Some(next);
            }
            if newest_first {
                seen.reverse();
            }
            assert_eq!(seen, counters);
        }
    }

    /// 30 days at one in five seconds (issue: any page within milliseconds). The limit is held to by `./test --long` alone.
    #[test]
    fn any_page_of_half_a_million_comes_at_once() {
        const COUNT: u64 = 518_400;
        let all: Vec<u64> = (1..=COUNT).collect();
        let part: Vec<u64> = (COUNT / 3..=COUNT).collect();
        let group = GroupCheckpoints::new(vec![list(&all), list(&all), list(&part)], BTreeSet::new());
        let mut slowest = std::time::Duration::ZERO;
        let mut timed = |what: &str, ask: &dyn Fn() -> u64, expected: u64| {
            let began = std::time::Instant::now();
            assert_eq!(ask(), expected, "{what}");
            slowest = slowest.max(began.elapsed());
            println!("{what}: {:?}", began.elapsed());
        };
        let first_of = |page: CheckpointPage| page.checkpoints[0].id.counter;
        for after in [None, Some(1), Some(COUNT / 2), Some(COUNT - 1001)] {
            let id = |counter| CheckpointId { nonce: 5, counter };
            let asked = ListCheckpoints { after: after.map(id), ..ask(1000) };
            timed("a page", &|| first_of(group.page(&asked)), after.unwrap_or_default() + 1);
        }
        let newest_first = ListCheckpoints { newest_first: true, ..ask(1000) };
        timed("the newest page", &|| first_of(group.page(&newest_first)), COUNT);
        let tagged = ListCheckpoints { tagged: true, ..ask(1000) };
        timed("the tagged ones", &|| first_of(group.page(&tagged)), 3);
        let until = || group.newest_until(TimeUs(COUNT * 500)).map_or(0, |info| info.id.counter);
        timed("one by its time", &until, COUNT / 2);
        let oldest = || group.find(CheckpointId { nonce: 5, counter: 2 }).map_or(0, |info| info.id.counter);
        timed("one by its id", &oldest, 2);
        timed("how many are complete", &|| group.complete_count(), COUNT - COUNT / 3 + 1);
        let limit_ms = if std::env::var_os("HOLDFAST_LONG").is_some() { 250 } else { 5_000 };
        assert!(slowest.as_millis() < limit_ms, "{slowest:?}");
    }
}
