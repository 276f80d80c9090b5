//! The manager's nouns. What crosses to a VRA is made from them by [`crate::reconcile`].

pub mod alert;
pub mod event;
pub mod kept;
pub mod recovery;
pub mod source;
pub mod status;
pub mod task;
pub mod test_run;
pub mod vpg;
pub mod vra;

/// A text that names none of an enumeration's values.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not one of: {known}")]
pub struct UnknownName {
    /// The text.
    pub text: String,
    /// The names there are.
    pub known: String,
}

/// An enumeration whose values have names: in JSON, in the database, on the command line.
macro_rules! named {
    ($(#[$doc:meta])* $name:ident { $($(#[$value_doc:meta])* $value:ident = $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
        pub enum $name {
            $($(#[$value_doc])* #[serde(rename = $text)] $value,)*
        }

        impl $name {
            /// The value's name.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$value => $text,)* }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.as_str())
            }
        }

        impl std::str::FromStr for $name {
            type Err = $crate::model::UnknownName;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                $(if text.eq_ignore_ascii_case($text) { return Ok(Self::$value); })*
                Err($crate::model::UnknownName { text: text.into(), known: [$($text),*].join(", ") })
            }
        }
    };
}
pub(crate) use named;
