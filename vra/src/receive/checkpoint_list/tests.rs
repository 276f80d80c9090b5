use proptest::prelude::*;

use super::*;

fn checkpoint(time_us: u64, cut: u64) -> ListedCheckpoint {
    let id = CheckpointId { nonce: 7, counter: cut };
    let kind = CheckpointKind::Automatic;
    ListedCheckpoint { time_us: TimeUs(time_us), id, cut, member_set_version: 1, kind, tag: None }
}

/// What the list must hold.
fn sorted(mut entries: Vec<ListedCheckpoint>) -> Vec<ListedCheckpoint> {
    entries.sort_by_key(ListedCheckpoint::key);
    entries
}

proptest! {
    #[test]
    fn it_agrees_with_a_sorted_vector(
        steps in prop::collection::vec((0_u64..40, 0_u32..30), 1..2500),
        goes_back in any::<bool>(),
    ) {
        let (mut list, mut model) = (CheckpointList::default(), Vec::new());
        let (mut time_us, mut oldest) = (1000, 0);
        for (cut, (step, what)) in (1..).zip(steps) {
            time_us = if goes_back && what == 1 { time_us - step.min(time_us) } else { time_us + step };
            if what == 0 && cut % 5 == 0 {
                oldest = (oldest + step * 8).min(cut);
                list.forget_below(oldest);
                model.retain(|entry: &ListedCheckpoint| entry.cut >= oldest);
            }
            list.push(checkpoint(time_us, cut));
            model.push(checkpoint(time_us, cut));
        }
        let model = sorted(model);
        prop_assert_eq!(list.len(), model.len());
        prop_assert!(list.is_disordered() || list.iter_from(0).is_sorted_by_key(|entry| entry.cut));
        prop_assert_eq!(list.iter_from(0).cloned().collect::<Vec<_>>(), model.clone());
        for place in [0, 1, model.len() / 2, model.len() - 1] {
            let Some(entry) = model.get(place) else { continue };
            prop_assert_eq!(list.count_before(entry.key()), place);
            prop_assert_eq!(list.get(entry.key()), Some(entry));
            prop_assert_eq!(list.find(entry.id), Some(entry));
            prop_assert_eq!(list.iter_from(place).count(), model.len() - place);
            prop_assert!(list.iter_back_from(place).eq(model[..place].iter().rev()));
        }
        let between = (TimeUs(u64::MAX), CheckpointId { nonce: 0, counter: 0 });
        prop_assert_eq!(list.count_before(between), model.len());
        prop_assert_eq!(list.get(between), None);
    }
}

#[test]
fn a_copy_stays_as_it_was() {
    let mut list = CheckpointList::default();
    for number in 0..1000 {
        list.push(checkpoint(number, number));
    }
    let copy = list.clone();
    list.forget_below(700);
    list.push(checkpoint(1000, 1000));
    assert_eq!((copy.len(), list.len()), (1000, 301));
    assert_eq!(copy.first().map(|entry| entry.cut), Some(0));
    assert_eq!(list.first().map(|entry| entry.cut), Some(700));
}

#[test]
fn the_newest_one_sent_again_leaves_the_list_in_order() {
    let mut list = CheckpointList::default();
    for number in 0..10 {
        list.push(checkpoint(number, number));
    }
    list.push(checkpoint(9, 9));
    assert_eq!((list.len(), list.is_disordered), (10, false));
    list.push(checkpoint(4, 4));
    assert_eq!((list.len(), list.is_disordered), (10, false));
    list.push(ListedCheckpoint { cut: 20, ..checkpoint(4, 4) });
    assert_eq!((list.len(), list.is_disordered), (10, true));
}

#[test]
fn older_ones_that_are_listed_again_leave_it_in_order_and_can_be_forgotten_again() {
    let mut list = CheckpointList::default();
    for number in 0..2000 {
        list.push(checkpoint(number, number));
    }
    list.forget_below(700);
    for number in [3, 600, 9] {
        list.push(checkpoint(number, number));
    }
    assert_eq!((list.len(), list.is_disordered), (1303, false));
    assert_eq!(list.iter_from(0).take(4).map(|entry| entry.cut).collect::<Vec<_>>(), [3, 9, 600, 700]);
    list.forget_below(600);
    assert_eq!((list.len(), list.first().map(|entry| entry.cut)), (1301, Some(600)));
}

#[test]
fn the_newest_one_has_the_largest_cut_whatever_its_time() {
    let mut list = CheckpointList::default();
    assert_eq!(list.newest(), None);
    let cut = |list: &CheckpointList| list.newest().map(|entry| entry.cut);
    for (time_us, number) in [(10, 1), (20, 2), (90_000, 3), (30, 4), (40, 5)] {
        list.push(checkpoint(time_us, number));
        assert_eq!(cut(&list), Some(number));
    }
    assert_eq!(list.last().map(|entry| entry.cut), Some(3));
    list.forget_below(4);
    assert_eq!((cut(&list), list.is_disordered()), (Some(5), false));
}

#[test]
fn the_newest_one_until_a_time_is_that_of_the_time_itself_if_there_is_one() {
    let mut list = CheckpointList::default();
    for number in [10, 20, 30] {
        list.push(checkpoint(number, number));
    }
    let cut = |time_us| list.newest_until(TimeUs(time_us)).map(|entry| entry.cut);
    assert_eq!([cut(9), cut(10), cut(29), cut(30)], [None, Some(10), Some(20), Some(30)]);
    assert_eq!(cut(u64::MAX), Some(30));
}
