//! What is asked of a vCenter and kept: kinds of objects, their properties, and of those that are structures the parts.

use super::soap::{Call, Moref};

/// A kind of object that is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Folders, which are between an object and its datacenter.
    Folder,
    Datacenter,
    Cluster,
    Host,
    Vm,
    Datastore,
    /// Standard networks, distributed port groups and opaque networks.
    Network,
}

/// What is asked of the objects of a type.
pub(super) struct Asked {
    /// The type's name in the vSphere API.
    pub(super) kind: &'static str,
    /// Paths of the properties.
    pub(super) paths: &'static [&'static str],
}

/// How much of a value is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Keep {
    /// Its text: a simple value, or a reference's id.
    Text,
    /// The name of its type.
    Type,
}

pub(super) const DEVICES: &str = "config.hardware.device";

/// What is asked. A property that an old vCenter doesn't know would fail the whole filter: all of these are in API 6.5. Of a distributed port
/// group more than of a network, and behind it: some versions take the last that fits an object, some take all.
pub(super) const ASKED: &[Asked] = &[
    Asked { kind: "Folder", paths: &["name", "parent"] },
    Asked { kind: "Datacenter", paths: &["name"] },
    Asked { kind: "ClusterComputeResource", paths: &["name", "parent"] },
    Asked {
        kind: "HostSystem",
        paths: &["name", "parent", "runtime.connectionState", "runtime.inMaintenanceMode"],
    },
    Asked {
        kind: "VirtualMachine",
        paths: &["name", "runtime.host", "runtime.powerState", "config.template", DEVICES, "network"],
    },
    Asked {
        kind: "Datastore",
        paths: &["name", "parent", "summary.url", "summary.capacity", "summary.freeSpace", "host"],
    },
    Asked { kind: "Network", paths: &["name", "parent", "summary", "tag"] },
    Asked { kind: "DistributedVirtualPortgroup", paths: &["name", "parent", "summary", "tag", "key"] },
];

/// What is kept of that; `[]` stands for the key of an array's element. Paths of all kinds together: none has two meanings.
pub(super) const KEPT: &[(&str, Keep)] = &[
    ("name", Keep::Text),
    ("parent", Keep::Text),
    ("key", Keep::Text),
    ("runtime.connectionState", Keep::Text),
    ("runtime.inMaintenanceMode", Keep::Text),
    ("runtime.host", Keep::Text),
    ("runtime.powerState", Keep::Text),
    ("config.template", Keep::Text),
    ("config.hardware.device[]", Keep::Type),
    ("config.hardware.device[].controllerKey", Keep::Text),
    ("config.hardware.device[].unitNumber", Keep::Text),
    ("config.hardware.device[].busNumber", Keep::Text),
    ("config.hardware.device[].sharedBus", Keep::Text),
    ("config.hardware.device[].macAddress", Keep::Text),
    ("config.hardware.device[].capacityInKB", Keep::Text),
    ("config.hardware.device[].capacityInBytes", Keep::Text),
    ("config.hardware.device[].backing", Keep::Type),
    ("config.hardware.device[].backing.fileName", Keep::Text),
    ("config.hardware.device[].backing.sharing", Keep::Text),
    ("config.hardware.device[].backing.network", Keep::Text),
    ("config.hardware.device[].backing.deviceName", Keep::Text),
    ("config.hardware.device[].backing.port.portgroupKey", Keep::Text),
    ("config.hardware.device[].backing.opaqueNetworkId", Keep::Text),
    ("network[]", Keep::Text),
    ("summary.url", Keep::Text),
    ("summary.capacity", Keep::Text),
    ("summary.freeSpace", Keep::Text),
    ("summary.opaqueNetworkId", Keep::Text),
    ("host[].key", Keep::Text),
    ("host[].mountInfo.mounted", Keep::Text),
    ("tag[].key", Keep::Text),
];

impl Kind {
    /// Of a type of the vSphere API, its subtypes included; none for what isn't read.
    pub(super) fn of(name: &str) -> Option<Self> {
        Some(match name {
            "Folder" | "StoragePod" => Self::Folder,
            "Datacenter" => Self::Datacenter,
            "ClusterComputeResource" => Self::Cluster,
            "HostSystem" => Self::Host,
            "VirtualMachine" => Self::Vm,
            "Datastore" => Self::Datastore,
            "Network" | "DistributedVirtualPortgroup" | "OpaqueNetwork" => Self::Network,
            _ => return None,
        })
    }
}

impl Call {
    /// The types of a `ContainerView` over all that is asked.
    pub(super) fn view_types(self) -> Self {
        ASKED.iter().fold(self, |call, asked| call.text("type", asked.kind))
    }

    /// A `PropertyFilterSpec` over the objects of a `ContainerView`. The order of its elements is that of the schema.
    pub(super) fn filter_spec(mut self, name: &str, view: &Moref) -> Self {
        self = self.open(name);
        for asked in ASKED {
            self = self.open("propSet").text("type", asked.kind);
            self = asked.paths.iter().fold(self, |call, path| call.text("pathSet", path));
            self = self.close("propSet");
        }
        self.open("objectSet")
            .reference("obj", view)
            .text("skip", "true")
            .open_typed("selectSet", "TraversalSpec")
            .text("name", "view")
            .text("type", "ContainerView")
            .text("path", "view")
            .text("skip", "false")
            .close("selectSet")
            .close("objectSet")
            .close(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_is_asked_is_kept_and_all_that_is_kept_is_asked() {
        let begins = |path: &str, with: &str| {
            path.strip_prefix(with).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
        };
        for asked in ASKED {
            assert!(Kind::of(asked.kind).is_some(), "{}", asked.kind);
            for path in asked.paths {
                assert!(KEPT.iter().any(|(kept, _)| begins(kept, path)), "{path} is asked in vain");
            }
        }
        for (kept, _) in KEPT {
            assert!(
                ASKED.iter().flat_map(|asked| asked.paths).any(|path| begins(kept, path)),
                "{kept} never comes"
            );
        }
    }
}
