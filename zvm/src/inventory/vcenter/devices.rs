//! Disks and network cards of a VM from its virtual devices.

use std::collections::HashSet;
use std::path::PathBuf;

use super::filter::DEVICES;
use super::properties::Properties;
use crate::inventory::{Disk, DiskKind};

/// A virtual device.
struct Device<'a> {
    key: &'a str,
    kind: &'a str,
    properties: &'a Properties,
}

/// A network card, and what it says of its network.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Card<'a> {
    /// Its MAC address as the vCenter writes it.
    pub(super) mac: &'a str,
    /// What it is plugged into.
    pub(super) plugged: Plugged<'a>,
}

/// What a network card is plugged into.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Plugged<'a> {
    /// The network of this id.
    Network(&'a str),
    /// The distributed port group of this key.
    PortGroup(&'a str),
    /// The opaque network of this id, which is not an object's.
    Opaque(&'a str),
    /// That of the VM's networks which has this name.
    Named(&'a str),
    Nothing,
}

/// The disks of a VM in the order of their controllers.
pub(super) fn disks(vm: &Properties) -> Vec<Disk> {
    let mut found: Vec<_> = devices(vm)
        .filter(|device| device.kind == "VirtualDisk")
        .map(|device| (device.place(), device.number(), device))
        .collect();
    found.sort_by(|a, b| (&a.0, a.1).cmp(&(&b.0, b.1)));
    let mut taken = HashSet::new();
    let mut disks = Vec::with_capacity(found.len());
    for (place, _, device) in found {
        let plain = place.map_or_else(
            || format!("disk-{}", device.key),
            |(bus, number, unit)| format!("{bus}{number}:{unit}"),
        );
        // No two disks have one place, but in simulators.
        let name = if taken.insert(plain.clone()) { plain } else { format!("{plain}-{}", device.key) };
        disks.push(Disk {
            name,
            path: PathBuf::from(device.get("backing.fileName").unwrap_or_default()),
            size_bytes: device.size_bytes(),
            kind: device.disk_kind(),
            served: None,
            written_bytes: None,
        });
    }
    disks
}

/// The network cards of a VM in the order of their keys, which is that of their slots.
pub(super) fn cards(vm: &Properties) -> Vec<Card<'_>> {
    let mut found: Vec<_> = devices(vm).filter(|device| device.get("macAddress").is_some()).collect();
    found.sort_by_key(|device| (device.number(), device.key));
    found.iter().filter_map(Device::card).collect()
}

fn devices(vm: &Properties) -> impl Iterator<Item = Device<'_>> {
    vm.keys(DEVICES).into_iter().filter_map(move |key| Device::of(vm, key))
}

impl<'a> Device<'a> {
    fn of(properties: &'a Properties, key: &'a str) -> Option<Self> {
        let kind = properties.get(&format!("{DEVICES}[{key}]"))?;
        Some(Self { key, kind, properties })
    }

    fn get(&self, path: &str) -> Option<&'a str> {
        self.properties.get(&format!("{DEVICES}[{}].{path}", self.key))
    }

    fn number(&self) -> i64 {
        self.key.parse().unwrap_or(i64::MAX)
    }

    fn controller(&self) -> Option<Self> {
        Self::of(self.properties, self.get("controllerKey")?)
    }

    /// Bus, its number and the unit on it.
    fn place(&self) -> Option<(&'static str, u32, u32)> {
        let controller = self.controller()?;
        let bus = controller.get("busNumber")?.parse().ok()?;
        let unit = self.get("unitNumber")?.parse().ok()?;
        Some((bus_of(controller.kind)?, bus, unit))
    }

    fn size_bytes(&self) -> Option<u64> {
        let exact = self.get("capacityInBytes").and_then(|text| text.parse().ok());
        exact.or_else(|| self.get("capacityInKB")?.parse::<u64>().ok()?.checked_mul(1024))
    }

    fn disk_kind(&self) -> DiskKind {
        let is_on_shared_bus = self
            .controller()
            .and_then(|controller| controller.get("sharedBus"))
            .is_some_and(|sharing| sharing != "noSharing");
        if is_on_shared_bus || self.get("backing.sharing") == Some("sharingMultiWriter") {
            return DiskKind::Shared;
        }
        // Its file only maps a LUN of a storage system, where the guest's bytes are.
        if self.get("backing").is_some_and(|backing| backing.starts_with("VirtualDiskRawDisk")) {
            return DiskKind::Network;
        }
        DiskKind::Vmdk
    }

    fn card(&self) -> Option<Card<'a>> {
        let plugged = if let Some(key) = self.get("backing.port.portgroupKey") {
            Plugged::PortGroup(key)
        } else if let Some(id) = self.get("backing.opaqueNetworkId") {
            Plugged::Opaque(id)
        } else if let Some(id) = self.get("backing.network") {
            Plugged::Network(id)
        } else if let Some(name) = self.get("backing.deviceName") {
            Plugged::Named(name)
        } else {
            Plugged::Nothing
        };
        Some(Card { mac: self.get("macAddress")?, plugged })
    }
}

/// What the vSphere client calls the bus of a controller.
fn bus_of(controller: &str) -> Option<&'static str> {
    Some(match controller {
        "ParaVirtualSCSIController"
        | "VirtualBusLogicController"
        | "VirtualLsiLogicController"
        | "VirtualLsiLogicSASController" => "scsi",
        "VirtualAHCIController" | "VirtualSATAController" => "sata",
        "VirtualNVMEController" => "nvme",
        "VirtualIDEController" => "ide",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::super::answers::{Operation, PropertyChange};
    use super::*;
    use crate::inventory::xml::Element;

    fn vm(devices: &str) -> Properties {
        let value = Element::parse(&format!("<val>{devices}</val>"), 1 << 20).unwrap();
        let change =
            PropertyChange { path: DEVICES.into(), operation: Operation::Assign, value: Some(value) };
        let mut vm = Properties::default();
        vm.apply(&change).unwrap();
        vm
    }

    fn controller(kind: &str, key: u32, bus: u32, sharing: &str) -> String {
        format!(
            "<d type='{kind}'><key>{key}</key><busNumber>{bus}</busNumber><sharedBus>{sharing}</sharedBus></d>"
        )
    }

    fn disk(key: u32, controller: u32, unit: u32, more: &str) -> String {
        format!(
            "<d type='VirtualDisk'><key>{key}</key><controllerKey>{controller}</controllerKey><unitNumber>{unit}</unitNumber>{more}</d>"
        )
    }

    #[test]
    fn disks_are_named_as_the_vsphere_client_names_them() {
        let vm = vm(&[
            controller("ParaVirtualSCSIController", 1000, 0, "noSharing"),
            controller("VirtualLsiLogicSASController", 1001, 1, "physicalSharing"),
            controller("VirtualAHCIController", 15000, 0, "noSharing"),
            controller("VirtualNVMEController", 31000, 2, "noSharing"),
            disk(2010, 1000, 10, "<capacityInKB>1</capacityInKB><capacityInBytes>1536</capacityInBytes>"),
            disk(2001, 1000, 1, "<capacityInKB>2</capacityInKB>"),
            disk(2016, 1001, 0, ""),
            disk(16000, 15000, 3, "<backing type='VirtualDiskRawDiskMappingVer1BackingInfo'><fileName>[a] r.vmdk</fileName></backing>"),
            disk(32000, 31000, 0, "<backing type='VirtualDiskFlatVer2BackingInfo'><sharing>sharingMultiWriter</sharing></backing>"),
            disk(9, 77, 0, "<capacityInKB>99999999999999999999</capacityInKB>"),
            "<d type='VirtualCdrom'><key>3000</key><controllerKey>1000</controllerKey><unitNumber>2</unitNumber></d>".into(),
        ]
        .concat());
        let found: Vec<_> =
            disks(&vm).into_iter().map(|disk| (disk.name, disk.size_bytes, disk.kind)).collect();
        let expected = [
            ("disk-9", None, DiskKind::Vmdk),
            ("nvme2:0", None, DiskKind::Shared),
            ("sata0:3", None, DiskKind::Network),
            ("scsi0:1", Some(2048), DiskKind::Vmdk),
            ("scsi0:10", Some(1536), DiskKind::Vmdk),
            ("scsi1:0", None, DiskKind::Shared),
        ];
        assert_eq!(found, expected.map(|(name, size, kind)| (name.to_owned(), size, kind)));
    }

    #[test]
    fn no_two_disks_have_one_name() {
        let vm =
            vm(&[controller("VirtualIDEController", 200, 0, ""), disk(5, 200, 0, ""), disk(3, 200, 0, "")]
                .concat());
        let names: Vec<_> = disks(&vm).into_iter().map(|disk| disk.name).collect();
        assert_eq!(names, ["ide0:0", "ide0:0-5"]);
    }

    #[test]
    fn cards_say_what_they_are_plugged_into() {
        let card = |kind: &str, key: u32, backing: &str| {
            format!(
                "<d type='{kind}'><key>{key}</key><macAddress>00:50:56:AA:00:0{key}</macAddress><backing>{backing}</backing></d>"
            )
        };
        let vm = vm(&[
            card("VirtualVmxnet3", 4, "<port><portgroupKey>dvportgroup-3</portgroupKey></port>"),
            card(
                "VirtualE1000e",
                1,
                "<deviceName>VM Network</deviceName><network type='Network'>network-7</network>",
            ),
            card("VirtualE1000", 2, "<deviceName>VM Network</deviceName>"),
            card("VirtualSriovEthernetCard", 3, "<opaqueNetworkId>6a-7</opaqueNetworkId>"),
            card("VirtualVmxnet3", 5, ""),
        ]
        .concat());
        let plugged: Vec<_> = cards(&vm).into_iter().map(|card| card.plugged).collect();
        let expected = [
            Plugged::Network("network-7"),
            Plugged::Named("VM Network"),
            Plugged::Opaque("6a-7"),
            Plugged::PortGroup("dvportgroup-3"),
            Plugged::Nothing,
        ];
        assert_eq!(plugged, expected);
    }
}
