//! What a user chose for a group, as text.

use std::fmt::Write as _;

use crate::model::recovery::{MacChoice, NicPlace, RecoveryPlace, VmRecovery};
use crate::model::vpg::Vpg;
use crate::units::{format_bytes, format_duration_us};

/// One setting on each line.
pub(super) fn text(vpg: &Vpg) -> String {
    let settings = &vpg.settings;
    let interval_us = u64::from(settings.checkpoint_interval_ms) * 1_000;
    let mut lines = Lines::default();
    lines.add("Id", vpg.id);
    lines.add("Revision", format!("{} ({} in force everywhere)", vpg.revision, vpg.applied_revision));
    lines.add("Created", vpg.created_us);
    lines.add("Priority", settings.priority);
    lines.add("Checkpoint interval", format_duration_us(interval_us));
    lines.add("History wanted", format_duration_us(settings.history_s * 1_000_000));
    lines.add("RPO target", format_duration_us(settings.rpo_target_s * 1_000_000));
    lines.add(
        "Test reminder",
        settings.test_reminder_days.map_or_else(|| "off".into(), |days| format!("after {days} days")),
    );
    lines.add("New disks", settings.new_disks);
    lines.add("Last test", vpg.last_test_us.map_or_else(|| "-".into(), |last_us| last_us.to_string()));
    if !settings.description.is_empty() {
        lines.add("Description", settings.description.replace(char::is_control, "?"));
    }
    for member in &settings.vms {
        for volume in &member.volumes {
            let (path, size) = (volume.source_path.display(), format_bytes(volume.size_bytes));
            let label = match (volume.left, volume.swap) {
                (true, _) => "Left disk",
                (false, true) => "Swap disk",
                (false, false) => "Disk",
            };
            lines.add(label, format!("{} {}: {path} ({size})", member.name, volume.number));
        }
        for disk in &member.excluded {
            lines.add("Not protected", format!("{} {}: {}", member.name, disk.name, disk.path.display()));
        }
    }
    recovery(vpg, &mut lines);
    lines.0
}

/// How its VMs are to be recovered, if something was said of it.
fn recovery(vpg: &Vpg, lines: &mut Lines) {
    let settings = &vpg.settings;
    let group = &settings.recovery;
    let names = |boot_group: Option<&str>| {
        let vms = settings.vms.iter().filter(|member| member.recovery.boot_group.as_deref() == boot_group);
        vms.map(|member| member.name.as_str()).collect::<Vec<_>>()
    };
    for (at, boot_group) in group.boot_groups.iter().enumerate() {
        let mut vms = names(Some(&boot_group.name));
        if at == 0 {
            vms.extend(names(None));
        }
        let vms = if vms.is_empty() { "no VMs".to_owned() } else { vms.join(", ") };
        let delay = match boot_group.delay_s {
            0 => String::new(),
            seconds => format!(", then {} wait", format_duration_us(u64::from(seconds) * 1_000_000)),
        };
        lines.add("Boot group", format!("{}: {vms}{delay}", boot_group.name));
    }
    for (label, script) in [("Pre-script", &group.pre_script), ("Post-script", &group.post_script)] {
        if let Some(script) = script {
            lines.add(label, script);
        }
    }
    for member in &settings.vms {
        let VmRecovery { place, nics, .. } = &member.recovery;
        let place = place.or(&group.place);
        if !place.is_empty() {
            lines.add("Recovered", format!("{}: {}", member.name, place_text(&place)));
        }
        for nic in nics {
            for (when, nic_place) in nic.places() {
                let of_place = if when == "test" { &place.test_network } else { &place.network };
                let text = nic_text(nic_place, of_place.as_deref());
                lines.add("Network card", format!("{} {} in a {when}: {text}", member.name, nic.mac));
            }
        }
    }
}

fn place_text(place: &RecoveryPlace) -> String {
    let parts = [
        ("host", &place.host),
        ("network", &place.network),
        ("test network", &place.test_network),
        ("folder", &place.folder),
    ];
    let said = parts.into_iter().filter_map(|(what, name)| Some(format!("{what} {}", name.as_ref()?)));
    said.collect::<Vec<_>>().join(", ")
}

fn nic_text(nic: &NicPlace, of_place: Option<&str>) -> String {
    let network = nic.network.as_deref().or(of_place).unwrap_or("-");
    let mac = match &nic.mac {
        MacChoice::Keep => "its MAC".to_owned(),
        MacChoice::New => "a new MAC".to_owned(),
        MacChoice::Given(mac) => format!("MAC {mac}"),
    };
    match &nic.ip {
        None => format!("network {network}, {mac}"),
        Some(ip) => format!("network {network}, {mac}, {ip}"),
    }
}

#[derive(Default)]
struct Lines(String);

impl Lines {
    fn add(&mut self, label: &str, value: impl std::fmt::Display) {
        let _ = writeln!(self.0, "{label:<21}{value}");
    }
}
