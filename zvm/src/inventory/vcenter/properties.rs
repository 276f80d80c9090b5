//! What is kept of an object's properties: texts by their paths, changed as a property collector tells it.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::LazyLock;

use super::answers::{Operation, PropertyChange};
use super::filter::{KEPT, Keep};
use super::soap::without_prefix;
use crate::inventory::xml::Element;

/// Longest text that is kept, bytes. Names have 80 characters, paths of disks some hundred.
const MAX_TEXT_BYTES: usize = 4096;

/// Longest key of an array's element, bytes.
const MAX_KEY_BYTES: usize = 256;

/// Longest path, in its parts.
const MAX_PATH_PARTS: usize = 32;

/// Texts by their paths, such as `config.hardware.device[2000].backing.fileName`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Properties {
    texts: BTreeMap<String, String>,
}

/// Why a change cannot be applied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum PropertyError {
    #[error("a path of a property that cannot be read")]
    Path,
    #[error("a text of {0} bytes, where {MAX_TEXT_BYTES} are taken")]
    Text(usize),
    #[error("an element of an array without a key, or with one longer than {MAX_KEY_BYTES} bytes")]
    Key,
}

/// Where in the tree of kept paths one is.
#[derive(Default)]
struct Node {
    keep: Option<Keep>,
    fields: BTreeMap<&'static str, Node>,
    /// What is kept of each element, if it is an array.
    element: Option<Box<Node>>,
}

static ROOT: LazyLock<Node> = LazyLock::new(|| {
    let mut root = Node::default();
    for (path, keep) in KEPT {
        let mut node = &mut root;
        for part in path.split('.') {
            node = node.fields.entry(part.trim_end_matches("[]")).or_default();
            if part.ends_with("[]") {
                node = &mut **node.element.get_or_insert_default();
            }
        }
        node.keep = Some(*keep);
    }
    root
});

impl Properties {
    /// The text at a path.
    pub(super) fn get(&self, path: &str) -> Option<&str> {
        self.texts.get(path).map(String::as_str)
    }

    /// Keys of an array's elements, in no particular order, each once.
    pub(super) fn keys<'a>(&'a self, array: &'a str) -> Vec<&'a str> {
        let mut keys: Vec<&str> = self
            .under(array)
            .filter_map(|(path, _)| path.get(array.len() + 1..)?.split(']').next())
            .collect();
        keys.dedup();
        keys
    }

    /// How much memory its texts take, roughly, bytes.
    pub(super) fn len_bytes(&self) -> usize {
        self.texts.iter().map(|(path, text)| path.len() + text.len() + 64).sum()
    }

    /// Applies a change; whether anything that is kept is different now.
    pub(super) fn apply(&mut self, change: &PropertyChange) -> Result<bool, PropertyError> {
        let Some((node, path)) = resolve(&change.path)? else { return Ok(false) };
        let is_addition = change.operation == Operation::Add && node.element.is_some();
        let before: Vec<(String, String)> =
            self.under(&path).map(|(path, text)| (path.to_owned(), text.to_owned())).collect();
        if !is_addition {
            for (path, _) in &before {
                self.texts.remove(path);
            }
        }
        if change.operation != Operation::Remove
            && let Some(value) = &change.value
        {
            self.insert(node, &path, value, true)?;
        }
        let after = self.under(&path);
        Ok(!after.eq(before.iter().map(|(path, text)| (path.as_str(), text.as_str()))))
    }

    /// What is at a path or within it.
    fn under<'a>(&'a self, path: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.texts
            .range::<str, _>((Bound::Included(path), Bound::Unbounded))
            .take_while(move |(own, _)| own.starts_with(path))
            .filter(move |(own, _)| own.len() == path.len() || own[path.len()..].starts_with(['.', '[']))
            .map(|(path, text)| (path.as_str(), text.as_str()))
    }

    /// Keeps of a value what is kept at its node. `is_whole` for a value that stands for itself: an array is then one element with all of its own
    /// in it, while as a field it is as many elements of one name.
    fn insert(
        &mut self,
        node: &Node,
        path: &str,
        value: &Element,
        is_whole: bool,
    ) -> Result<(), PropertyError> {
        let text = match node.keep {
            Some(Keep::Text) => Some(value.text.as_str()),
            Some(Keep::Type) => Some(without_prefix(value.attribute("type").unwrap_or_default())),
            None => None,
        };
        if let Some(text) = text {
            if text.len() > MAX_TEXT_BYTES {
                return Err(PropertyError::Text(text.len()));
            }
            self.texts.insert(path.to_owned(), text.to_owned());
        }
        if let Some(element) = &node.element {
            let elements = if is_whole { &value.children[..] } else { std::slice::from_ref(value) };
            for value in elements {
                let key = value.text_at(&["key"]).unwrap_or(&value.text);
                if key.is_empty() || key.len() > MAX_KEY_BYTES || key.contains(['[', ']', '"']) {
                    return Err(PropertyError::Key);
                }
                self.insert(element, &format!("{path}[{key}]"), value, false)?;
            }
            return Ok(());
        }
        for child in &value.children {
            if let Some(field) = node.fields.get(child.name.as_str()) {
                let inner =
                    if path.is_empty() { child.name.clone() } else { format!("{path}.{}", child.name) };
                self.insert(field, &inner, child, false)?;
            }
        }
        Ok(())
    }
}

/// The node of a path as a vCenter writes it, and the path as it is kept; none if nothing is kept there.
fn resolve(path: &str) -> Result<Option<(&'static Node, String)>, PropertyError> {
    let mut node: &'static Node = &ROOT;
    let mut kept = String::with_capacity(path.len());
    let mut rest = path;
    for _ in 0..MAX_PATH_PARTS {
        let end = rest.find(['.', '[']).unwrap_or(rest.len());
        let (name, behind) = rest.split_at(end);
        if name.is_empty() {
            return Err(PropertyError::Path);
        }
        let Some(field) = node.fields.get(name) else { return Ok(None) };
        node = field;
        kept.push_str(name);
        rest = behind;
        if let Some(inner) = rest.strip_prefix('[') {
            let (key, behind) = split_key(inner).ok_or(PropertyError::Path)?;
            let Some(element) = &node.element else { return Ok(None) };
            node = element;
            kept.push('[');
            kept.push_str(key);
            kept.push(']');
            rest = behind;
        }
        if rest.is_empty() {
            return Ok(Some((node, kept)));
        }
        rest = rest.strip_prefix('.').ok_or(PropertyError::Path)?;
        kept.push('.');
    }
    Err(PropertyError::Path)
}

/// The key before `]` and what is behind that. A key may be in quotes, and a reference's may have its type before a colon.
fn split_key(text: &str) -> Option<(&str, &str)> {
    let (key, behind) = match text.strip_prefix('"') {
        Some(quoted) => quoted.split_once("\"]")?,
        None => text.split_once(']')?,
    };
    let key = key.rsplit(':').next()?;
    let is_good = !key.is_empty() && key.len() <= MAX_KEY_BYTES && !key.contains(['[', ']', '"']);
    is_good.then_some((key, behind))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(path: &str, operation: Operation, value: &str) -> PropertyChange {
        let value = (!value.is_empty()).then(|| Element::parse(value, 1 << 20).unwrap());
        PropertyChange { path: path.into(), operation, value }
    }

    fn assign(path: &str, value: &str) -> PropertyChange {
        change(path, Operation::Assign, value)
    }

    const DISKS: &str = "<val type='ArrayOfVirtualDevice'>
        <VirtualDevice type='VirtualDisk'><key>2000</key><capacityInKB>1024</capacityInKB><backing type='VirtualDiskFlatVer2BackingInfo'><fileName>[a] b.vmdk</fileName></backing></VirtualDevice>
        <VirtualDevice type='VirtualDisk'><key>20001</key><capacityInKB>7</capacityInKB><shares/></VirtualDevice></val>";

    fn with_disks() -> Properties {
        let mut properties = Properties::default();
        assert_eq!(properties.apply(&assign("config.hardware.device", DISKS)), Ok(true));
        properties
    }

    #[test]
    fn a_whole_array_replaces_the_one_before() {
        let mut properties = with_disks();
        assert_eq!(properties.keys("config.hardware.device"), ["20001", "2000"]);
        assert_eq!(properties.get("config.hardware.device[2000]"), Some("VirtualDisk"));
        assert_eq!(properties.get("config.hardware.device[2000].backing.fileName"), Some("[a] b.vmdk"));
        assert_eq!(
            properties.apply(&assign("config.hardware.device", DISKS)),
            Ok(false),
            "nothing is different"
        );
        assert_eq!(properties.apply(&assign("config.hardware.device", "<val/>")), Ok(true));
        assert_eq!(properties, Properties::default());
    }

    #[test]
    fn parts_of_an_array_are_changed_as_a_vcenter_tells_it() {
        let mut properties = with_disks();
        let device = "config.hardware.device";
        assert_eq!(
            properties.apply(&assign(&format!("{device}[2000].capacityInKB"), "<val>2048</val>")),
            Ok(true)
        );
        assert_eq!(properties.get("config.hardware.device[2000].capacityInKB"), Some("2048"));
        let backing =
            "<val type='x:VirtualDiskFlatVer2BackingInfo'><fileName>[a] b-000001.vmdk</fileName></val>";
        assert_eq!(properties.apply(&assign(&format!("{device}[2000].backing"), backing)), Ok(true));
        assert_eq!(
            properties.get("config.hardware.device[2000].backing"),
            Some("VirtualDiskFlatVer2BackingInfo")
        );
        let added = "<val type='VirtualDisk'><key>2001</key><unitNumber>3</unitNumber></val>";
        assert_eq!(properties.apply(&change(&format!("{device}[2001]"), Operation::Add, added)), Ok(true));
        assert_eq!(properties.get("config.hardware.device[2001].unitNumber"), Some("3"));
        assert_eq!(
            properties.apply(&change(&format!("{device}[\"2000\"]"), Operation::Remove, "")),
            Ok(true)
        );
        assert_eq!(properties.keys(device), ["20001", "2001"], "2000 went, 20001 did not");
        assert_eq!(properties.apply(&change("config", Operation::Remove, "")), Ok(true));
        assert_eq!(properties, Properties::default());
    }

    #[test]
    fn a_structure_above_brings_the_parts_within() {
        let mut properties = Properties::default();
        let config = "<val><template>true</template><hardware><numCPU>1</numCPU><device type='VirtualDisk'><key>1</key></device>\
                      <device type='VirtualE1000'><key>2</key></device></hardware></val>";
        assert_eq!(properties.apply(&assign("config", config)), Ok(true));
        assert_eq!(properties.get("config.template"), Some("true"));
        assert_eq!(properties.get("config.hardware.device[2]"), Some("VirtualE1000"));
    }

    #[test]
    fn arrays_of_references_are_keyed_by_them() {
        let mut properties = Properties::default();
        let networks = "<val><ManagedObjectReference type='Network'>network-7</ManagedObjectReference></val>";
        assert_eq!(properties.apply(&assign("network", networks)), Ok(true));
        assert_eq!(properties.keys("network"), ["network-7"]);
        assert_eq!(
            properties.apply(&change("network[\"Network:network-7\"]", Operation::Remove, "")),
            Ok(true)
        );
        assert!(properties.keys("network").is_empty());
    }

    #[test]
    fn what_is_not_kept_changes_nothing() {
        let mut properties = with_disks();
        for path in
            ["guest.net", "config.hardware.device[2000].deviceInfo.label", "name[3]", "config.hardware"]
        {
            let change = assign(path, "<val><x>1</x></val>");
            let is_above = path == "config.hardware";
            assert_eq!(properties.apply(&change), Ok(is_above), "{path}");
        }
    }

    #[test]
    fn hostile_changes_are_refused() {
        let mut properties = Properties::default();
        let long = "x".repeat(MAX_TEXT_BYTES + 1);
        assert_eq!(
            properties.apply(&assign("name", &format!("<v>{long}</v>"))),
            Err(PropertyError::Text(long.len()))
        );
        for path in [
            "",
            ".",
            "name.",
            "config.hardware.device[",
            "config.hardware.device[]",
            "config..x",
            "config.hardware.device[1]x",
        ] {
            assert_eq!(properties.apply(&assign(path, "<v/>")), Err(PropertyError::Path), "{path:?}");
        }
        for key in ["", "]", &"k".repeat(MAX_KEY_BYTES + 1)] {
            let value = format!("<v><d type='VirtualDisk'><key>{key}</key></d></v>");
            assert_eq!(
                properties.apply(&assign("config.hardware.device", &value)),
                Err(PropertyError::Key),
                "{key:?}"
            );
        }
    }
}
