//! How a group's VMs are to be made where they are recovered or tested. It takes effect with the operations that create VMs; until then it is
//! kept. The same words in the database, in exports, in group files and in what VRAs keep for the manager.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// What goes for a whole group.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupRecovery {
    /// Where VMs go that don't say it themselves.
    #[serde(default, skip_serializing_if = "RecoveryPlace::is_empty")]
    pub place: RecoveryPlace,
    /// The order in which VMs are started.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub boot_groups: Vec<BootGroup>,
    /// Run before the first VM is made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pre_script: Option<Script>,
    /// Run after the last VM was started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub post_script: Option<Script>,
}

/// What goes for one VM of a group.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmRecovery {
    /// Where it goes; what isn't said is as the group has it.
    #[serde(default, skip_serializing_if = "RecoveryPlace::is_empty")]
    pub place: RecoveryPlace,
    /// Name of the boot group that it is started with; without, the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_group: Option<String>,
    /// Its network cards; one that isn't here goes to the place's network as it is.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nics: Vec<NicRecovery>,
}

/// Where a recovered VM goes, besides the datastore that its disks are on. Names of the inventory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecoveryPlace {
    /// The host that runs it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// The network of its cards in a failover.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
    /// The network of its cards in a test.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub test_network: Option<String>,
    /// The folder that it is listed in, `a/b`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub folder: Option<String>,
}

/// VMs that are started together. The groups follow each other in their order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootGroup {
    /// Its name in the VPG.
    pub name: String,
    /// How long the next group waits after this one was started, seconds.
    #[serde(default)]
    pub delay_s: u32,
}

/// A program that the manager runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Script {
    /// Absolute path of the program, at the manager.
    pub command: PathBuf,
    /// Its arguments, as they are: no shell reads them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub arguments: Vec<String>,
    /// How long it may take, seconds.
    #[serde(default = "default_timeout_s")]
    pub timeout_s: u32,
}

/// 5 minutes.
pub fn default_timeout_s() -> u32 {
    300
}

/// A network card of a VM, where the VM is recovered and where it is tested.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NicRecovery {
    /// The MAC address that it has in the inventory.
    pub mac: String,
    /// In a failover.
    #[serde(default)]
    pub failover: NicPlace,
    /// In a test.
    #[serde(default)]
    pub test: NicPlace,
}

/// What becomes of a network card.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NicPlace {
    /// Its network; without, that of the VM's place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
    /// Its MAC address.
    #[serde(default)]
    pub mac: MacChoice,
    /// Its IP settings; without, they stay as the guest has them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ip: Option<IpChoice>,
}

/// A recovered card's MAC address: `keep`, `new`, or the address.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum MacChoice {
    /// The one that it has.
    #[default]
    Keep,
    /// A new one.
    New,
    /// This one, lower-case.
    Given(String),
}

/// A recovered card's IP settings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum IpChoice {
    /// From the network.
    Dhcp,
    /// These.
    Static(StaticIp),
}

/// Fixed IP settings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StaticIp {
    /// The address.
    pub address: IpAddr,
    /// How many of its bits are the network's.
    pub prefix: u8,
    /// The way out of that network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
    /// Name servers, the first one first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dns: Vec<IpAddr>,
}

/// A text that is no [`MacChoice`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no MAC address: write keep, new, or one of a single card such as 52:54:00:12:34:56")]
pub struct BadMac(pub String);

impl GroupRecovery {
    /// Whether nothing is said.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl VmRecovery {
    /// Whether nothing is said.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl RecoveryPlace {
    /// Whether nothing is said.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Takes from `other` what is not said here.
    #[must_use]
    pub fn or(&self, other: &Self) -> Self {
        let first = |own: &Option<String>, other: &Option<String>| own.clone().or_else(|| other.clone());
        Self {
            host: first(&self.host, &other.host),
            network: first(&self.network, &other.network),
            test_network: first(&self.test_network, &other.test_network),
            folder: first(&self.folder, &other.folder),
        }
    }
}

impl NicRecovery {
    /// Its places, with a word for when each goes.
    pub fn places(&self) -> [(&'static str, &NicPlace); 2] {
        [("failover", &self.failover), ("test", &self.test)]
    }
}

impl FromStr for MacChoice {
    type Err = BadMac;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bytes: Option<Vec<u8>> = text
            .split(':')
            .map(|part| {
                let is_byte = part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_hexdigit());
                u8::from_str_radix(part, 16).ok().filter(|_| is_byte)
            })
            .collect();
        match (text, bytes.as_deref()) {
            ("keep", _) => Ok(Self::Keep),
            ("new", _) => Ok(Self::New),
            // The lowest bit of the first byte is set in those of many cards.
            (_, Some(bytes @ [first, ..]))
                if bytes.len() == 6 && first & 1 == 0 && bytes.iter().any(|byte| *byte != 0) =>
            {
                Ok(Self::Given(text.to_ascii_lowercase()))
            }
            _ => Err(BadMac(text.to_owned())),
        }
    }
}

impl TryFrom<String> for MacChoice {
    type Error = BadMac;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<MacChoice> for String {
    fn from(choice: MacChoice) -> Self {
        choice.to_string()
    }
}

impl fmt::Display for MacChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::New => "new",
            Self::Keep => "keep",
            Self::Given(mac) => mac,
        })
    }
}

impl fmt::Display for IpChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::Static(ip) = self else { return f.write_str("DHCP") };
        write!(f, "{}/{}", ip.address, ip.prefix)?;
        if let Some(gateway) = ip.gateway {
            write!(f, ", gateway {gateway}")?;
        }
        match ip.dns.iter().map(IpAddr::to_string).collect::<Vec<_>>() {
            dns if dns.is_empty() => Ok(()),
            dns => write!(f, ", DNS {}", dns.join(" ")),
        }
    }
}

impl fmt::Display for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.command.display())?;
        self.arguments.iter().try_for_each(|argument| write!(f, " {argument:?}"))?;
        write!(f, " (at most {} s)", self.timeout_s)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mac_addresses_are_kept_new_or_one_that_a_card_can_have() {
        assert_eq!("keep".parse(), Ok(MacChoice::Keep));
        assert_eq!("52:54:00:AB:CD:EF".parse(), Ok(MacChoice::Given("52:54:00:ab:cd:ef".into())));
        for wrong in
            ["", "Keep", "52:54:00:12:34", "01:00:5e:00:00:01", "00:00:00:00:00:00", "52:54:00:12:34:+5"]
        {
            assert_eq!(wrong.parse::<MacChoice>(), Err(BadMac(wrong.into())));
        }
        assert_eq!(serde_json::to_string(&MacChoice::Keep).expect("JSON"), "\"keep\"");
    }
}
