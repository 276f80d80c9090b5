//! The XML of hypervisors as a tree: bounded in size, depth and count, without namespaces, entities of its own or document types.

use quick_xml::Reader;
use quick_xml::events::{BytesStart, Event};

/// Elements within elements, at most.
pub const MAX_DEPTH: usize = 64;
/// Elements and attributes of one document together, at most.
pub const MAX_NODES: usize = 2 << 20;

/// An element with what is in it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Element {
    /// Its name without the namespace's prefix.
    pub name: String,
    /// Its attributes, names without prefix, in their order.
    pub attributes: Vec<(String, String)>,
    /// The text in it, without that of elements within, outer blanks cut.
    pub text: String,
    /// Elements in it, in their order.
    pub children: Vec<Element>,
}

/// Why a text is no XML that is taken.
#[derive(Debug, thiserror::Error)]
pub enum XmlError {
    /// Longer than the caller takes.
    #[error("it has {len_bytes} bytes, more than {max_bytes}")]
    TooLong {
        /// Its length.
        len_bytes: usize,
        /// The most that is taken.
        max_bytes: usize,
    },
    /// Elements within elements beyond [`MAX_DEPTH`].
    #[error("its elements are nested deeper than {MAX_DEPTH}")]
    TooDeep,
    /// More elements and attributes than [`MAX_NODES`].
    #[error("it has more than {MAX_NODES} elements and attributes")]
    TooMany,
    /// Not well-formed.
    #[error("it is not well-formed near byte {at_byte}: {reason}")]
    Syntax {
        /// Where, roughly.
        at_byte: u64,
        /// What is wrong.
        reason: String,
    },
}

impl Element {
    /// Reads a document of at most `max_bytes`.
    pub fn parse(text: &str, max_bytes: usize) -> Result<Self, XmlError> {
        if text.len() > max_bytes {
            return Err(XmlError::TooLong { len_bytes: text.len(), max_bytes });
        }
        let mut reader = Reader::from_str(text);
        let mut tree = Tree::default();
        loop {
            let event = reader.read_event();
            let at_byte = reader.buffer_position();
            let syntax = |reason: String| XmlError::Syntax { at_byte, reason };
            match event.map_err(|error| syntax(error.to_string()))? {
                Event::Start(start) => tree.open(&start, at_byte)?,
                Event::Empty(start) => {
                    tree.open(&start, at_byte)?;
                    tree.close();
                }
                // The reader refuses an end that has no start or another name.
                Event::End(_) => tree.close(),
                Event::Text(text) => tree.text(&text),
                Event::CData(text) => tree.text(&text),
                Event::GeneralRef(reference) => {
                    let character =
                        match reference.resolve_char_ref().map_err(|error| syntax(error.to_string()))? {
                            Some(character) => character.to_string(),
                            None => quick_xml::escape::resolve_predefined_entity(&reference)
                                .ok_or_else(|| syntax(format!("there is no entity {:?}", &*reference)))?
                                .to_owned(),
                        };
                    tree.text(&character);
                }
                Event::DocType(_) => return Err(syntax("document types are not taken".into())),
                Event::Decl(_) | Event::PI(_) | Event::Comment(_) => {}
                Event::Eof => return tree.finish().ok_or_else(|| syntax("it ends too early".into())),
            }
        }
    }

    /// The first element in it of that name.
    pub fn child(&self, name: &str) -> Option<&Element> {
        self.children.iter().find(|child| child.name == name)
    }

    /// The elements in it of that name.
    pub fn children_named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Element> {
        self.children.iter().filter(move |child| child.name == name)
    }

    /// The element at the end of a path of names, each the first of its name.
    pub fn at(&self, path: &[&str]) -> Option<&Element> {
        path.iter().try_fold(self, |element, name| element.child(name))
    }

    /// The text at the end of a path of names; none if it is empty.
    pub fn text_at(&self, path: &[&str]) -> Option<&str> {
        self.at(path).map(|element| element.text.as_str()).filter(|text| !text.is_empty())
    }

    /// An attribute's value.
    pub fn attribute(&self, name: &str) -> Option<&str> {
        self.attributes.iter().find(|(own, _)| own == name).map(|(_, value)| value.as_str())
    }
}

/// A document that is being read.
#[derive(Default)]
struct Tree {
    open: Vec<Element>,
    root: Option<Element>,
    nodes: usize,
}

impl Tree {
    fn open(&mut self, start: &BytesStart<'_>, at_byte: u64) -> Result<(), XmlError> {
        if self.open.len() == MAX_DEPTH {
            return Err(XmlError::TooDeep);
        }
        if self.root.is_some() {
            return Err(XmlError::Syntax {
                at_byte,
                reason: "there is a second document behind the first".into(),
            });
        }
        let mut element = Element { name: start.local_name().as_ref().to_owned(), ..Element::default() };
        self.nodes += 1;
        for attribute in start.attributes() {
            let attribute =
                attribute.map_err(|error| XmlError::Syntax { at_byte, reason: error.to_string() })?;
            let value = attribute
                .normalized_value(quick_xml::XmlVersion::Implicit1_0)
                .map_err(|error| XmlError::Syntax { at_byte, reason: error.to_string() })?;
            element.attributes.push((attribute.key.local_name().as_ref().to_owned(), value.into_owned()));
            self.nodes += 1;
        }
        if self.nodes > MAX_NODES {
            return Err(XmlError::TooMany);
        }
        self.open.push(element);
        Ok(())
    }

    fn close(&mut self) {
        let Some(mut element) = self.open.pop() else { return };
        let trimmed = element.text.trim();
        if trimmed.len() < element.text.len() {
            element.text = trimmed.to_owned();
        }
        match self.open.last_mut() {
            Some(parent) => parent.children.push(element),
            None => self.root = Some(element),
        }
    }

    fn text(&mut self, text: &str) {
        if let Some(element) = self.open.last_mut() {
            element.text.push_str(text);
        }
    }

    fn finish(self) -> Option<Element> {
        if self.open.is_empty() { self.root } else { None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Element, XmlError> {
        Element::parse(text, 1 << 20)
    }

    #[test]
    fn a_tree_has_names_without_prefixes_and_text_without_entities() {
        let text = "<?xml version='1.0'?><a:x xmlns:a='u' a:type='q&amp;r'> <y>1 &lt; &#50;</y><!-- n --><y/><z><![CDATA[<&>]]></z> </a:x>";
        let root = parse(text).unwrap();
        assert_eq!((root.name.as_str(), root.attribute("type")), ("x", Some("q&r")));
        assert_eq!(root.text_at(&["y"]), Some("1 < 2"));
        assert_eq!(root.text_at(&["z"]), Some("<&>"));
        assert_eq!(root.children_named("y").count(), 2);
        assert_eq!(root.text_at(&["y", "none"]), None);
    }

    #[test]
    fn what_is_too_much_or_broken_is_refused() {
        let deep = "<a>".repeat(MAX_DEPTH + 1);
        assert!(matches!(parse(&deep), Err(XmlError::TooDeep)));
        assert!(matches!(
            Element::parse("<a></a>", 6),
            Err(XmlError::TooLong { len_bytes: 7, max_bytes: 6 })
        ));
        for broken in [
            "",
            "<a>",
            "<a></b>",
            "</a>",
            "<a/><b/>",
            "<a>&no;</a>",
            "<a x=1/>",
            "<!DOCTYPE a [<!ENTITY b 'c'>]><a/>",
        ] {
            assert!(matches!(parse(broken), Err(XmlError::Syntax { .. })), "{broken}");
        }
    }
}
