//! Names of objects: as users see them, and such that no two objects of a kind share one.

use std::collections::{BTreeMap, HashMap};

use super::filter::Kind;
use super::objects::Objects;
use super::properties::Properties;

/// Most steps from an object to its datacenter. A hostile vCenter's folders may lie within one another.
const MAX_FOLDERS: usize = 64;

/// A name for each object of a kind, no two the same.
pub(super) fn distinct_names(objects: &Objects, kind: Kind) -> HashMap<&str, String> {
    let plain: BTreeMap<&str, String> =
        objects.of_kind(kind).map(|(id, properties)| (id, plain_name(id, properties))).collect();
    let with_datacenter = qualified(&plain, |id, name| {
        datacenter_of(objects, id).map(|datacenter| format!("{datacenter}/{name}"))
    });
    let with_id = qualified(&with_datacenter, |id, _| plain.get(id).map(|name| format!("{name} ({id})")));
    with_id.into_iter().collect()
}

/// The names with those replaced that more than one has.
fn qualified<'a>(
    names: &BTreeMap<&'a str, String>,
    replace: impl Fn(&str, &str) -> Option<String>,
) -> BTreeMap<&'a str, String> {
    let mut counts: HashMap<&str, usize> = HashMap::new();
    for name in names.values() {
        *counts.entry(name).or_default() += 1;
    }
    let is_shared = |name: &str| counts.get(name).is_some_and(|count| *count > 1);
    names
        .iter()
        .map(|(id, name)| {
            let other = if is_shared(name) { replace(id, name) } else { None };
            (*id, other.unwrap_or_else(|| name.clone()))
        })
        .collect()
}

fn datacenter_of(objects: &Objects, id: &str) -> Option<String> {
    let mut at = objects.get(id)?;
    for _ in 0..MAX_FOLDERS {
        let parent = at.properties.get("parent")?;
        at = objects.get(parent)?;
        if at.kind == Kind::Datacenter {
            return Some(plain_name(parent, &at.properties));
        }
    }
    None
}

/// An object's name as users see it, or its id if it may not be read. The API writes slashes and percent signs in names as `%2f`, `%5c` and
/// `%25` (`ManagedEntity.name`).
pub(super) fn plain_name(id: &str, properties: &Properties) -> String {
    let Some(name) = properties.get("name").filter(|name| !name.is_empty()) else { return id.into() };
    let mut plain = String::with_capacity(name.len());
    let mut rest = name;
    while let Some(at) = rest.find('%') {
        let (before, escape) = rest.split_at(at);
        plain.push_str(before);
        let character = match escape.get(..3).map(str::to_ascii_lowercase).as_deref() {
            Some("%2f") => '/',
            Some("%5c") => '\\',
            Some("%25") => '%',
            _ => {
                plain.push('%');
                rest = &escape[1..];
                continue;
            }
        };
        plain.push(character);
        rest = &escape[3..];
    }
    plain.push_str(rest);
    // Terminals would obey them.
    plain.replace(char::is_control, "\u{fffd}")
}

#[cfg(test)]
mod tests {
    use super::super::objects::Described;
    use super::*;

    fn names(kind: Kind, all: &[Described<'_>]) -> BTreeMap<String, String> {
        let objects = Objects::described(all);
        distinct_names(&objects, kind).into_iter().map(|(id, name)| (id.to_owned(), name)).collect()
    }

    fn expected<const N: usize>(names: [(&str, &str); N]) -> BTreeMap<String, String> {
        names.map(|(id, name)| (id.to_owned(), name.to_owned())).into()
    }

    #[test]
    fn names_that_are_shared_get_their_datacenter_or_id() {
        let all = [
            ("Datacenter", "dc-1", &[("name", "north")][..]),
            ("Datacenter", "dc-2", &[("name", "south")]),
            ("Folder", "f-1", &[("name", "network"), ("parent", "dc-1")]),
            ("Folder", "f-2", &[("name", "network"), ("parent", "dc-2")]),
            ("Network", "n-1", &[("name", "VM Network"), ("parent", "f-1")]),
            ("Network", "n-2", &[("name", "VM Network"), ("parent", "f-2")]),
            ("DistributedVirtualPortgroup", "p-1", &[("name", "VM Network"), ("parent", "f-2")]),
            ("Network", "n-3", &[("name", "only"), ("parent", "f-2")]),
            ("Network", "n-4", &[("parent", "f-2")]),
        ];
        let expected = expected([
            ("n-1", "north/VM Network"),
            ("n-2", "VM Network (n-2)"),
            ("n-3", "only"),
            ("n-4", "n-4"),
            ("p-1", "VM Network (p-1)"),
        ]);
        assert_eq!(names(Kind::Network, &all), expected);
    }

    #[test]
    fn folders_within_one_another_end() {
        let all = [
            ("Folder", "f-1", &[("name", "a"), ("parent", "f-2")][..]),
            ("Folder", "f-2", &[("name", "b"), ("parent", "f-1")]),
            ("Datastore", "d-1", &[("name", "ds"), ("parent", "f-1")]),
            ("Datastore", "d-2", &[("name", "ds"), ("parent", "d-2")]),
        ];
        assert_eq!(names(Kind::Datastore, &all), expected([("d-1", "ds (d-1)"), ("d-2", "ds (d-2)")]));
    }

    #[test]
    fn names_are_as_users_see_them() {
        let all = [("Network", "n-1", &[("name", "x%2fy%25%5C%z%2&#27;ä")][..])];
        assert_eq!(names(Kind::Network, &all), expected([("n-1", "x/y%\\%z%2\u{fffd}ä")]));
    }
}
