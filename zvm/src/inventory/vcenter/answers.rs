//! Results of the property collector as values: `RetrieveResult` and `UpdateSet` of the vSphere API.

use super::soap::{Moref, shown};
use crate::inventory::xml::Element;

/// A page of what `RetrievePropertiesEx` or `ContinueRetrievePropertiesEx` gave.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Page {
    /// Objects with all that was asked of them.
    pub objects: Vec<Change>,
    /// Asks for the next page; none behind the last one.
    pub token: Option<String>,
}

/// What `WaitForUpdatesEx` told.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UpdateSet {
    /// What the next call is to say that it knows.
    pub version: String,
    /// Whether the next call has more of it at once.
    pub is_truncated: bool,
    /// What became of objects, in order.
    pub changes: Vec<Change>,
    /// Whether an object that the filter begins at is gone.
    pub has_lost_its_view: bool,
}

/// What became of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Which object.
    pub object: Moref,
    /// Whether it came, changed or went.
    pub kind: ChangeKind,
    /// What became of its properties, in order.
    pub properties: Vec<PropertyChange>,
    /// Properties that were not to be had, with the fault's name.
    pub missing: Vec<(String, String)>,
}

/// `ObjectUpdateKind`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChangeKind {
    /// It is new to the filter, with all of its properties.
    Enter,
    /// Some of its properties changed.
    Modify,
    /// It is no longer there.
    Leave,
}

/// What became of a property.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PropertyChange {
    /// Its path, such as `config.hardware.device[2000].capacityInKB`.
    pub path: String,
    /// What was done to it.
    pub operation: Operation,
    /// Its value; none when it has been removed or unset.
    pub value: Option<Element>,
}

/// `PropertyChangeOp`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// It has this value and no other.
    Assign,
    /// An array has one element more.
    Add,
    /// It, or the array's element, is gone; `indirectRemove` too.
    Remove,
}

impl Page {
    /// From a `RetrievePropertiesExResponse` or `ContinueRetrievePropertiesExResponse`; an empty result has no `returnval`.
    pub fn of(response: Element) -> Result<Self, String> {
        let Some(result) = only(response, "returnval") else { return Ok(Self::default()) };
        let mut page = Self::default();
        for child in result.children {
            match child.name.as_str() {
                "token" if !child.text.is_empty() => page.token = Some(child.text),
                "objects" => page.objects.push(content_of(child)?),
                _ => {}
            }
        }
        Ok(page)
    }
}

impl UpdateSet {
    /// From a `WaitForUpdatesExResponse`; none when the time was up without news.
    pub fn of(response: Element) -> Result<Option<Self>, String> {
        let Some(result) = only(response, "returnval") else { return Ok(None) };
        let mut set = Self::default();
        for child in result.children {
            match child.name.as_str() {
                "version" => set.version = child.text,
                "truncated" => set.is_truncated = child.text == "true",
                "filterSet" => {
                    for part in child.children {
                        match part.name.as_str() {
                            "objectSet" => set.changes.push(change_of(part)?),
                            "missingObjects" => set.has_lost_its_view = true,
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        if set.version.is_empty() {
            return Err("an update set without a version".to_owned());
        }
        Ok(Some(set))
    }
}

/// The one child of that name, taken out of its parent.
pub(super) fn only(parent: Element, name: &str) -> Option<Element> {
    parent.children.into_iter().find(|child| child.name == name)
}

/// An `ObjectContent`.
fn content_of(element: Element) -> Result<Change, String> {
    let mut object = None;
    let mut properties = Vec::new();
    let mut missing = Vec::new();
    for child in element.children {
        match child.name.as_str() {
            "obj" => object = Moref::of(&child),
            "propSet" => properties.push(property_of(child)?),
            "missingSet" => missing.extend(missing_of(&child)),
            _ => {}
        }
    }
    let object = object.ok_or("an object without a reference")?;
    Ok(Change { object, kind: ChangeKind::Enter, properties, missing })
}

/// An `ObjectUpdate`.
fn change_of(element: Element) -> Result<Change, String> {
    let mut kind = None;
    let mut object = None;
    let mut properties = Vec::new();
    let mut missing = Vec::new();
    for child in element.children {
        match child.name.as_str() {
            "kind" => {
                kind = Some(match child.text.as_str() {
                    "enter" => ChangeKind::Enter,
                    "modify" => ChangeKind::Modify,
                    "leave" => ChangeKind::Leave,
                    other => return Err(format!("an update of the kind {:?}", shown(other))),
                });
            }
            "obj" => object = Moref::of(&child),
            "changeSet" => properties.push(property_of(child)?),
            "missingSet" => missing.extend(missing_of(&child)),
            _ => {}
        }
    }
    let object = object.ok_or("an update without a reference")?;
    let kind = kind.ok_or("an update without a kind")?;
    Ok(Change { object, kind, properties, missing })
}

/// A `DynamicProperty` or a `PropertyChange`.
fn property_of(element: Element) -> Result<PropertyChange, String> {
    let mut path = String::new();
    let mut operation = Operation::Assign;
    let mut value = None;
    for child in element.children {
        match child.name.as_str() {
            "name" => path = child.text,
            "op" => {
                operation = match child.text.as_str() {
                    "assign" => Operation::Assign,
                    "add" => Operation::Add,
                    "remove" | "indirectRemove" => Operation::Remove,
                    other => return Err(format!("an operation {:?}", shown(other))),
                }
            }
            "val" => value = Some(child),
            _ => {}
        }
    }
    if path.is_empty() {
        return Err("a property without a name".to_owned());
    }
    Ok(PropertyChange { path, operation, value })
}

/// A `MissingProperty`: its path and its fault's name.
fn missing_of(element: &Element) -> Option<(String, String)> {
    let path = element.text_at(&["path"])?;
    let fault = element.at(&["fault", "fault"]).and_then(|fault| fault.attribute("type")).unwrap_or_default();
    Some((shown(path), shown(super::soap::without_prefix(fault))))
}

#[cfg(test)]
mod tests {
    use super::super::soap::answer;
    use super::*;

    /// As govmomi's simulator answered.
    const RENAMED: &str = r#"<?xml version="1.0" encoding="UTF-8"?>
<soapenv:Envelope xmlns:soapenc="http://schemas.xmlsoap.org/soap/encoding/" xmlns:soapenv="http://schemas.xmlsoap.org/soap/envelope/" xmlns:xsd="http://www.w3.org/2001/XMLSchema" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"><soapenv:Body><WaitForUpdatesExResponse xmlns="urn:vim25"><returnval><version>-</version><filterSet><filter type="PropertyFilter">session[a846]c620</filter><objectSet><kind>modify</kind><obj type="VirtualMachine">vm-39</obj><changeSet><name>name</name><op>assign</op><val xmlns:XMLSchema-instance="http://www.w3.org/2001/XMLSchema-instance" XMLSchema-instance:type="xsd:string">a%2fb</val></changeSet></objectSet></filterSet></returnval></WaitForUpdatesExResponse></soapenv:Body></soapenv:Envelope>"#;

    fn updates(body: &str) -> Result<Option<UpdateSet>, String> {
        UpdateSet::of(answer("WaitForUpdatesEx", body.as_bytes()).unwrap())
    }

    fn in_envelope(inner: &str) -> String {
        format!(
            "<Envelope><Body><WaitForUpdatesExResponse>{inner}</WaitForUpdatesExResponse></Body></Envelope>"
        )
    }

    #[test]
    fn an_update_set_is_read() {
        let set = updates(RENAMED).unwrap().unwrap();
        assert_eq!((set.version.as_str(), set.is_truncated, set.has_lost_its_view), ("-", false, false));
        let [change] = &set.changes[..] else { panic!() };
        assert_eq!(
            (&change.object, change.kind),
            (&Moref::new("VirtualMachine", "vm-39"), ChangeKind::Modify)
        );
        let [property] = &change.properties[..] else { panic!() };
        assert_eq!((property.path.as_str(), property.operation), ("name", Operation::Assign));
        assert_eq!(property.value.as_ref().unwrap().text, "a%2fb");
    }

    #[test]
    fn no_news_is_no_update_set() {
        assert_eq!(updates(&in_envelope("")), Ok(None));
    }

    #[test]
    fn what_a_vcenter_does_and_the_simulator_does_not() {
        let set = updates(&in_envelope(
            "<returnval><version>7</version><filterSet><objectSet><kind>leave</kind><obj type='VirtualMachine'>vm-1</obj></objectSet>\
             <objectSet><kind>modify</kind><obj type='VirtualMachine'>vm-2</obj><changeSet><name>config.hardware.device</name><op>indirectRemove</op></changeSet>\
             <missingSet><path>config.template</path><fault><fault xsi:type='NoPermission'/><localizedMessage/></fault></missingSet></objectSet>\
             <missingObjects><obj type='ContainerView'>v</obj></missingObjects></filterSet><truncated>true</truncated></returnval>",
        ))
        .unwrap()
        .unwrap();
        assert!(set.is_truncated && set.has_lost_its_view);
        assert_eq!(set.changes[0].kind, ChangeKind::Leave);
        assert_eq!(set.changes[1].properties[0].operation, Operation::Remove);
        assert_eq!(set.changes[1].missing, [("config.template".to_owned(), "NoPermission".to_owned())]);
    }

    #[test]
    fn what_is_incomplete_is_refused() {
        for inner in [
            "<returnval/>",
            "<returnval><version>1</version><filterSet><objectSet><kind>enter</kind></objectSet></filterSet></returnval>",
            "<returnval><version>1</version><filterSet><objectSet><kind>explode</kind><obj type='A'>b</obj></objectSet></filterSet></returnval>",
            "<returnval><version>1</version><filterSet><objectSet><kind>enter</kind><obj type='A'>b</obj><changeSet><op>assign</op></changeSet></objectSet></filterSet></returnval>",
        ] {
            assert!(updates(&in_envelope(inner)).is_err(), "{inner}");
        }
    }
}
