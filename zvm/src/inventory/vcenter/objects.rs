//! What a vCenter has told, object by object: changes in, one consistent state out.

use std::collections::BTreeMap;

use super::answers::{Change, ChangeKind};
use super::filter::Kind;
use super::properties::{Properties, PropertyError};
use super::soap::shown;

/// Most objects that are kept. A vCenter has at most 40,000 VMs that are registered.
const MAX_OBJECTS: usize = 200_000;

/// Most memory that all objects together take, roughly, bytes.
const MAX_TOTAL_BYTES: usize = 512 << 20;

/// Longest id of an object, bytes.
const MAX_ID_BYTES: usize = 1024;

/// The objects of a vCenter by their ids, with what is kept of their properties.
#[derive(Debug, Clone, Default)]
pub struct Objects {
    by_id: BTreeMap<String, Object>,
    total_bytes: usize,
    unreadable: Unreadable,
}

/// One object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Object {
    pub(super) kind: Kind,
    pub(super) properties: Properties,
}

/// Properties that the account may not read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Unreadable {
    /// How many.
    pub(super) count: usize,
    /// The first of them, as `vm-42 config.template`.
    pub(super) example: String,
}

/// Why a change cannot be applied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ApplyError {
    /// What it says of a property isn't taken.
    #[error("object {id}: property {path:?}: {reason}")]
    Property {
        /// The object's id.
        id: String,
        /// The property's path.
        path: String,
        /// What is wrong.
        reason: String,
    },
    /// More than is kept.
    #[error("more than {MAX_OBJECTS} objects, or {MAX_TOTAL_BYTES} bytes of them")]
    TooMuch,
    /// Not an id.
    #[error("an object's id of {0} bytes, where 1 to {MAX_ID_BYTES} are taken")]
    Id(usize),
}

impl Objects {
    /// Applies a change; whether anything that is kept is different now. After an error the objects are in no known state.
    pub fn apply(&mut self, change: &Change) -> Result<bool, ApplyError> {
        let id = &change.object.id;
        if id.is_empty() || id.len() > MAX_ID_BYTES {
            return Err(ApplyError::Id(id.len()));
        }
        let Some(kind) = Kind::of(&change.object.kind) else { return Ok(false) };
        self.note_missing(change);
        match change.kind {
            ChangeKind::Enter => {
                let mut object = Object { kind, properties: Properties::default() };
                object.apply(change)?;
                let before = self.remove(id);
                let is_different = before.is_none_or(|before| before != object);
                self.insert(id.clone(), object)?;
                Ok(is_different)
            }
            // What it is a part of may have been read anew since: then it has gone, and its leaving follows.
            ChangeKind::Modify => {
                let Some(mut object) = self.remove(id) else { return Ok(false) };
                let is_different = object.apply(change)?;
                self.insert(id.clone(), object)?;
                Ok(is_different)
            }
            ChangeKind::Leave => Ok(self.remove(id).is_some()),
        }
    }

    /// The objects of a kind with their ids, in the ids' order.
    pub(super) fn of_kind(&self, kind: Kind) -> impl Iterator<Item = (&str, &Properties)> {
        let all = self.by_id.iter().filter(move |(_, object)| object.kind == kind);
        all.map(|(id, object)| (id.as_str(), &object.properties))
    }

    /// The object of an id.
    pub(super) fn get(&self, id: &str) -> Option<&Object> {
        self.by_id.get(id)
    }

    /// Takes what was noted of properties that could not be read.
    pub(super) fn take_unreadable(&mut self) -> Unreadable {
        std::mem::take(&mut self.unreadable)
    }

    fn insert(&mut self, id: String, object: Object) -> Result<(), ApplyError> {
        self.total_bytes += id.len() + object.properties.len_bytes();
        if self.by_id.len() >= MAX_OBJECTS || self.total_bytes > MAX_TOTAL_BYTES {
            return Err(ApplyError::TooMuch);
        }
        self.by_id.insert(id, object);
        Ok(())
    }

    fn remove(&mut self, id: &str) -> Option<Object> {
        let object = self.by_id.remove(id)?;
        self.total_bytes -= id.len() + object.properties.len_bytes();
        Some(object)
    }

    fn note_missing(&mut self, change: &Change) {
        for (path, fault) in &change.missing {
            // Others are of what isn't set, such as the configuration of a VM that is being made.
            if fault == "NoPermission" {
                if self.unreadable.count == 0 {
                    self.unreadable.example = format!("{} {path}", shown(&change.object.id));
                }
                self.unreadable.count += 1;
            }
        }
    }
}

impl Object {
    fn apply(&mut self, change: &Change) -> Result<bool, ApplyError> {
        let mut is_different = false;
        for property in &change.properties {
            is_different |=
                self.properties.apply(property).map_err(|error: PropertyError| ApplyError::Property {
                    id: shown(&change.object.id),
                    path: shown(&property.path),
                    reason: error.to_string(),
                })?;
        }
        Ok(is_different)
    }
}

/// An object for tests: type, id, and the inside of its properties' values.
#[cfg(test)]
pub(super) type Described<'a> = (&'a str, &'a str, &'a [(&'a str, &'a str)]);

#[cfg(test)]
impl Objects {
    pub(super) fn described(all: &[Described<'_>]) -> Self {
        use super::answers::{Operation, PropertyChange};
        let mut objects = Self::default();
        for (kind, id, properties) in all {
            let properties = properties.iter().map(|(path, inner)| PropertyChange {
                path: (*path).into(),
                operation: Operation::Assign,
                value: Some(
                    crate::inventory::xml::Element::parse(&format!("<val>{inner}</val>"), 1 << 20).unwrap(),
                ),
            });
            let (object, properties) = (super::soap::Moref::new(kind, id), properties.collect());
            let change = Change { object, kind: ChangeKind::Enter, properties, missing: vec![] };
            objects.apply(&change).unwrap();
        }
        objects
    }
}

#[cfg(test)]
mod tests {
    use super::super::answers::{Operation, PropertyChange};
    use super::super::soap::Moref;
    use super::*;
    use crate::inventory::xml::Element;

    fn named(kind: ChangeKind, moref: (&str, &str), name: &str) -> Change {
        let value = Element { name: "val".into(), text: name.into(), ..Element::default() };
        let name = PropertyChange { path: "name".into(), operation: Operation::Assign, value: Some(value) };
        Change { object: Moref::new(moref.0, moref.1), kind, properties: vec![name], missing: vec![] }
    }

    fn names(objects: &Objects) -> Vec<&str> {
        objects.of_kind(Kind::Vm).filter_map(|(_, properties)| properties.get("name")).collect()
    }

    #[test]
    fn objects_come_change_and_go() {
        let vm = ("VirtualMachine", "vm-1");
        let mut objects = Objects::default();
        assert_eq!(objects.apply(&named(ChangeKind::Modify, vm, "early")), Ok(false));
        assert_eq!(objects.apply(&named(ChangeKind::Enter, vm, "a")), Ok(true));
        assert_eq!(objects.apply(&named(ChangeKind::Enter, vm, "a")), Ok(false), "it was told twice");
        assert_eq!(objects.apply(&named(ChangeKind::Modify, vm, "b")), Ok(true));
        assert_eq!(objects.apply(&named(ChangeKind::Enter, ("Task", "task-1"), "c")), Ok(false));
        assert_eq!(names(&objects), ["b"]);
        assert_eq!(objects.apply(&named(ChangeKind::Leave, vm, "")), Ok(true));
        assert_eq!(objects.apply(&named(ChangeKind::Leave, vm, "")), Ok(false));
        assert_eq!((names(&objects).len(), objects.total_bytes), (0, 0));
    }

    #[test]
    fn there_is_an_end_to_what_is_kept() {
        let mut objects = Objects::default();
        let error = (0..=MAX_OBJECTS)
            .map(|number| {
                objects.apply(&named(ChangeKind::Enter, ("Folder", &format!("group-{number}")), "x"))
            })
            .find_map(Result::err);
        assert_eq!(error, Some(ApplyError::TooMuch));
        assert_eq!(objects.by_id.len(), MAX_OBJECTS);
        let long = "i".repeat(MAX_ID_BYTES + 1);
        assert_eq!(
            objects.apply(&named(ChangeKind::Leave, ("Folder", &long), "")),
            Err(ApplyError::Id(long.len()))
        );
    }

    #[test]
    fn what_may_not_be_read_is_counted() {
        let mut objects = Objects::default();
        let mut change = named(ChangeKind::Enter, ("VirtualMachine", "vm-1"), "a");
        change.missing = vec![
            ("config.template".into(), "NoPermission".into()),
            ("network".into(), "NoPermission".into()),
            ("runtime.host".into(), "ManagedObjectNotFound".into()),
        ];
        objects.apply(&change).unwrap();
        let unreadable = Unreadable { count: 2, example: "vm-1 config.template".into() };
        assert_eq!((objects.take_unreadable(), objects.take_unreadable().count), (unreadable, 0));
    }
}
