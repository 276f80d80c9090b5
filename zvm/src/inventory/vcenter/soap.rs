//! Envelopes of SOAP 1.1 as the vSphere API uses them ("vSphere Web Services SDK Programming Guide", namespace `urn:vim25`): requests out,
//! answers and faults in.

use zeroize::Zeroizing;

use crate::inventory::xml::Element;

/// Longest answer that is taken, bytes.
pub const MAX_ANSWER_BYTES: usize = 64 << 20;

/// Longest text of a vCenter that is shown in a message, characters.
const MAX_SHOWN_CHARS: usize = 300;

/// Room of a request from the start: one with a password in it must not move while it grows.
const REQUEST_BYTES: usize = 16 << 10;

const HEAD: &str = concat!(
    r#"<?xml version="1.0" encoding="UTF-8"?>"#,
    r#"<soapenv:Envelope xmlns:soapenv="http://schemas.xmlsoap.org/soap/envelope/" "#,
    r#"xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"><soapenv:Body>"#
);

/// A managed object reference: what a vCenter knows an object by.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Moref {
    /// Its type, such as `VirtualMachine`.
    pub kind: String,
    /// Its id, such as `vm-42`.
    pub id: String,
}

/// A request that is being written.
pub(super) struct Call {
    method: &'static str,
    text: Zeroizing<String>,
}

/// A fault that was answered instead of a result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Its type, such as `NotAuthenticated`; empty if there is none.
    pub name: String,
    /// The vCenter's words, shortened; may be empty.
    pub message: String,
}

/// Why there is no result in an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AnswerError {
    /// There is a fault in it.
    Fault(Fault),
    /// It is not an answer to what was asked.
    Unusable(String),
}

impl Moref {
    pub(super) fn new(kind: &str, id: &str) -> Self {
        Self { kind: kind.into(), id: id.into() }
    }

    /// The reference in an element `<obj type="VirtualMachine">vm-42</obj>`.
    pub(super) fn of(element: &Element) -> Option<Self> {
        let kind = element.attribute("type")?;
        (!element.text.is_empty()).then(|| Self::new(kind, &element.text))
    }
}

impl Call {
    /// A call of a method of an object.
    pub(super) fn new(method: &'static str, this: &Moref) -> Self {
        let mut call = Self { method, text: Zeroizing::new(String::with_capacity(REQUEST_BYTES)) };
        call.text.push_str(HEAD);
        call.text.push('<');
        call.text.push_str(method);
        call.text.push_str(" xmlns=\"urn:vim25\">");
        call.reference("_this", this)
    }

    /// The method's name.
    pub(super) fn method(&self) -> &'static str {
        self.method
    }

    /// An element with a reference.
    pub(super) fn reference(mut self, name: &str, to: &Moref) -> Self {
        self.text.push('<');
        self.text.push_str(name);
        self.text.push_str(" type=\"");
        self.escape(&to.kind);
        self.text.push_str("\">");
        self.escape(&to.id);
        self.close(name)
    }

    /// An element with a text.
    pub(super) fn text(mut self, name: &str, value: &str) -> Self {
        self = self.open(name);
        self.escape(value);
        self.close(name)
    }

    /// The start of an element.
    pub(super) fn open(mut self, name: &str) -> Self {
        self.text.push('<');
        self.text.push_str(name);
        self.text.push('>');
        self
    }

    /// The start of an element whose type says more than its name.
    pub(super) fn open_typed(mut self, name: &str, kind: &str) -> Self {
        self.text.push('<');
        self.text.push_str(name);
        self.text.push_str(" xsi:type=\"");
        self.escape(kind);
        self.text.push_str("\">");
        self
    }

    /// The end of an element.
    pub(super) fn close(mut self, name: &str) -> Self {
        self.text.push_str("</");
        self.text.push_str(name);
        self.text.push('>');
        self
    }

    /// The whole request.
    pub(super) fn finish(self) -> Zeroizing<String> {
        let method = self.method;
        let mut text = self.close(method).text;
        text.push_str("</soapenv:Body></soapenv:Envelope>");
        text
    }

    fn escape(&mut self, value: &str) {
        for character in value.chars() {
            match character {
                '<' => self.text.push_str("&lt;"),
                '>' => self.text.push_str("&gt;"),
                '&' => self.text.push_str("&amp;"),
                '"' => self.text.push_str("&quot;"),
                // Readers make a line feed of it.
                '\r' => self.text.push_str("&#13;"),
                other => self.text.push(other),
            }
        }
    }
}

/// The element `METHODResponse` of an answer's body.
pub fn answer(method: &str, body: &[u8]) -> Result<Element, AnswerError> {
    let unusable = |reason: String| AnswerError::Unusable(format!("{method}: {reason}"));
    let text = std::str::from_utf8(body).map_err(|error| unusable(format!("it is not UTF-8: {error}")))?;
    let envelope = Element::parse(text, MAX_ANSWER_BYTES).map_err(|error| unusable(error.to_string()))?;
    let inner = envelope.children.into_iter().find(|child| child.name == "Body");
    let Some(inner) = inner.filter(|_| envelope.name == "Envelope") else {
        return Err(unusable("it is not a SOAP envelope".into()));
    };
    let wanted = format!("{method}Response");
    match inner.children.into_iter().next() {
        Some(response) if response.name == wanted => Ok(response),
        Some(fault) if fault.name == "Fault" => Err(AnswerError::Fault(Fault::of(&fault))),
        Some(other) => Err(unusable(format!("it is a {:?}", shown(&other.name)))),
        None => Err(unusable("it is empty".into())),
    }
}

impl Fault {
    fn of(fault: &Element) -> Self {
        let detail = fault.child("detail").and_then(|detail| detail.children.first());
        let name = detail.map_or("", |detail| {
            let kind = detail.attribute("type").unwrap_or(detail.name.trim_end_matches("Fault"));
            without_prefix(kind)
        });
        Self { name: shown(name), message: shown(fault.text_at(&["faultstring"]).unwrap_or_default()) }
    }
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.name.as_str(), self.message.as_str()) {
            ("", "") => f.write_str("a fault without a name"),
            (one, "") | ("", one) => f.write_str(one),
            (name, message) => write!(f, "{message} ({name})"),
        }
    }
}

/// A qualified name without its namespace's prefix.
pub(super) fn without_prefix(name: &str) -> &str {
    name.rsplit(':').next().unwrap_or(name)
}

/// A vCenter's text as it goes into a message: short, on one line.
pub(super) fn shown(text: &str) -> String {
    text.chars()
        .take(MAX_SHOWN_CHARS)
        .map(|character| if character.is_control() { ' ' } else { character })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_says_what_it_was_given() {
        let this = Moref::new("SessionManager", "SessionManager");
        let hostile = "</password>&\"'<x>\r\n]]>ä";
        let text = Call::new("Login", &this).text("userName", "u").text("password", hostile).finish();
        let tree = Element::parse(&text, 1 << 20).unwrap();
        let login = tree.at(&["Body", "Login"]).unwrap();
        assert_eq!(login.attribute("xmlns"), Some("urn:vim25"));
        assert_eq!(login.child("_this").and_then(Moref::of), Some(this));
        assert_eq!(login.text_at(&["password"]), Some(hostile));
        assert_eq!(login.children.len(), 3, "{}", *text);
    }

    #[test]
    fn the_longest_password_does_not_move_the_request() {
        let this = Moref::new("SessionManager", "SessionManager");
        let longest = "\"".repeat(1024);
        let call = Call::new("Login", &this).text("userName", &longest).text("password", &longest);
        assert!(call.finish().capacity() == REQUEST_BYTES);
    }

    #[test]
    fn faults_are_read_as_the_simulator_and_a_vcenter_write_them() {
        let simulator = r#"<?xml version="1.0" encoding="UTF-8"?>
<soapenv:Envelope xmlns:soapenv="http://schemas.xmlsoap.org/soap/envelope/" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"><soapenv:Body><soapenv:Fault><faultcode>ServerFaultCode</faultcode><faultstring>Login failure</faultstring><detail><InvalidLoginFault xmlns="urn:vim25" xsi:type="InvalidLogin"></InvalidLoginFault></detail></soapenv:Fault></soapenv:Body></soapenv:Envelope>"#;
        let fault = Fault { name: "InvalidLogin".into(), message: "Login failure".into() };
        assert_eq!(answer("Login", simulator.as_bytes()), Err(AnswerError::Fault(fault.clone())));
        assert_eq!(fault.to_string(), "Login failure (InvalidLogin)");

        let vcenter = r#"<soapenv:Envelope xmlns:soapenv="http://schemas.xmlsoap.org/soap/envelope/"><soapenv:Body>
<soapenv:Fault><faultcode>ServerFaultCode</faultcode><faultstring>The session is not authenticated.</faultstring><detail><NotAuthenticatedFault xmlns="urn:vim25"><object type="PropertyCollector">propertyCollector</object><privilegeId>System.View</privilegeId></NotAuthenticatedFault></detail></soapenv:Fault>
</soapenv:Body></soapenv:Envelope>"#;
        let Err(AnswerError::Fault(fault)) = answer("CreateFilter", vcenter.as_bytes()) else { panic!() };
        assert_eq!(fault.name, "NotAuthenticated");
    }

    #[test]
    fn what_is_no_answer_is_told() {
        for (body, words) in [
            (&b"<html><body>503</body></html>"[..], "not a SOAP envelope"),
            (b"<e:Envelope xmlns:e='x'><e:Body/></e:Envelope>", "empty"),
            (b"<Envelope><Body><LogoutResponse/></Body></Envelope>", "LogoutResponse"),
            (b"\xff\xfe", "UTF-8"),
        ] {
            let Err(AnswerError::Unusable(reason)) = answer("Login", body) else { panic!("{words}") };
            assert!(reason.starts_with("Login: ") && reason.contains(words), "{reason}");
        }
    }
}
