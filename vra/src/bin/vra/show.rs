//! Answers as tables.

use vra::api::status::{CheckState, SourceVmStatus, TargetVmStatus};
use vra::api::volume::SharedState;
use vra::api::{CheckpointPage, DoctorReport, TimeUs, ViewInfo, VolumeInfo, VraStatus};

use crate::table::{bytes, duration, print, word};

pub(crate) fn volumes(volumes: &[VolumeInfo]) {
    let rows: Vec<_> = volumes
        .iter()
        .map(|volume| {
            vec![
                volume.vm_name.clone(),
                volume.number.to_string(),
                volume.volume.to_string(),
                bytes(volume.size_bytes),
                volume.path.display().to_string(),
                match (&volume.door, &volume.problem) {
                    (Some(door), _) => match volume.shared {
                        Some(state) => format!("{door} ({})", shared(state)),
                        None => door.to_string(),
                    },
                    (None, Some(problem)) => format!("NOT SERVED: {problem}"),
                    (None, None) => "-".to_owned(),
                },
                if volume.vpg.is_some() { "yes" } else { "no" }.to_owned(),
            ]
        })
        .collect();
    print(&["VM", "NO", "VOLUME", "SIZE", "DISK", "DOOR", "PROTECTED"], &rows);
}

fn shared(state: SharedState) -> &'static str {
    match state {
        SharedState::Owner => "shared, owned here",
        SharedState::Standby => "shared, standby",
        SharedState::Waiting => "shared, writes wait",
        SharedState::Other => "shared",
    }
}

pub(crate) fn status(status: &VraStatus) {
    println!("vra {} ({}), version {}", status.name, status.vra, status.version);
    let ublk = if status.host.ublk_features.is_some() { "ublk" } else { "no ublk" };
    println!(
        "host {}, kernel {}, {ublk}, up {}",
        status.host.hostname,
        status.host.kernel,
        duration(status.now_us.0.saturating_sub(status.started_us.0))
    );
    match &status.site {
        Some(site) => println!("site: zvm {}, certificate until {}", site.zvm, site.certificate_ends_us),
        None if status.alerts.iter().any(|alert| alert.code == "link-down") => {
            println!("site: the certificate can't be used, as the alert says");
        }
        None => println!("site: not enrolled (`vra enroll`)"),
    }
    if !status.volumes.is_empty() {
        println!();
        volumes(&status.volumes);
    }
    if !status.vpgs.is_empty() {
        println!();
        let rows: Vec<_> = status
            .vpgs
            .iter()
            .map(|vpg| {
                let last = vpg.last_checkpoint.as_ref();
                vec![
                    vpg.name.clone(),
                    vpg.vpg.to_string(),
                    last.map_or("-".to_owned(), |last| last.time_us.to_string()),
                    vpg.checkpoint_count.to_string(),
                    vpg.aborted_epochs.to_string(),
                    match vpg.coordinator {
                        Some(vra) if vra == status.vra => "this VRA".to_owned(),
                        Some(vra) => vra.to_string(),
                        None => "-".to_owned(),
                    },
                ]
            })
            .collect();
        print(&["VPG", "ID", "LAST CHECKPOINT", "CHECKPOINTS", "ABORTED", "COORDINATOR"], &rows);
    }
    if !status.source_vms.is_empty() {
        println!();
        let header = ["SOURCE VM", "MODE", "LINK", "RPO", "DURABLE", "SYNC", "RETAINED", "HOLD MAX"];
        print(&header, &status.source_vms.iter().map(source_row).collect::<Vec<_>>());
    }
    if !status.target_vms.is_empty() {
        println!();
        let header = [
            "TARGET VM",
            "STATE",
            "LINK",
            "DURABLE",
            "HISTORY FROM",
            "CHECKPOINTS",
            "JOURNAL",
            "WRITES",
            "REACHES",
            "LIMIT IN",
        ];
        print(&header, &status.target_vms.iter().map(target_row).collect::<Vec<_>>());
    }
    if !status.views.is_empty() {
        println!();
        views(&status.views);
    }
    for alert in &status.alerts {
        println!();
        println!("{}: {} (since {})", word(&alert.severity).to_uppercase(), alert.message, alert.since_us);
        if let Some(remedy) = &alert.remedy {
            println!("  remedy: {remedy}");
        }
    }
}

fn source_row(vm: &SourceVmStatus) -> Vec<String> {
    vec![
        vm.name.clone(),
        word(&vm.mode),
        link(vm.connected),
        duration(vm.rpo.total_us),
        format!("{}/{}", vm.durable_through, vm.last_sequence),
        vm.sync
            .map_or("-".to_owned(), |sync| format!("{}/{}", bytes(sync.done_bytes), bytes(sync.total_bytes))),
        format!("{}/{}", bytes(vm.retained_bytes), bytes(vm.retained_limit_bytes)),
        duration(vm.hold.max_us),
    ]
}

fn target_row(vm: &TargetVmStatus) -> Vec<String> {
    vec![
        vm.name.clone(),
        word(&vm.state),
        link(vm.connected),
        vm.durable_through.to_string(),
        time(vm.history_from_us),
        vm.checkpoint_count.to_string(),
        format!("{}/{}", bytes(vm.journal_used_bytes), bytes(vm.journal_limit_bytes)),
        format!("{}/s", bytes(vm.write_rate_bytes_per_s)),
        vm.reachable_history_s.map_or("-".to_owned(), |seconds| duration(seconds.saturating_mul(1_000_000))),
        vm.limit_reached_in_s.map_or("-".to_owned(), |seconds| duration(seconds.saturating_mul(1_000_000))),
    ]
}

pub(crate) fn checkpoints(page: &CheckpointPage) {
    let rows: Vec<_> = page
        .checkpoints
        .iter()
        .map(|checkpoint| {
            vec![
                checkpoint.time_us.to_string(),
                checkpoint.id.to_string(),
                checkpoint.kind.name().to_owned(),
                if checkpoint.complete { "yes" } else { "no" }.to_owned(),
                checkpoint.lock_name().to_owned(),
                checkpoint.tag.clone().unwrap_or_default(),
            ]
        })
        .collect();
    print(&["TIME", "CHECKPOINT", "KIND", "COMPLETE", "LOCKED", "TAG"], &rows);
    println!("{} of {}", rows.len(), page.total);
}

pub(crate) fn views(views: &[ViewInfo]) {
    let mut rows = Vec::new();
    for view in views {
        for disk in &view.disks {
            rows.push(vec![
                view.view.to_string(),
                view.checkpoint.as_ref().map_or_else(
                    || format!("seq {}", disk.sequence),
                    |checkpoint| checkpoint.time_us.to_string(),
                ),
                word(&view.mode),
                disk.vm_name.clone(),
                disk.number.to_string(),
                bytes(disk.size_bytes),
                disk.door.to_string(),
            ]);
        }
    }
    print(&["VIEW", "AT", "MODE", "VM", "NO", "SIZE", "DOOR"], &rows);
    for view in views {
        if let Some(problem) = &view.problem {
            println!("view {}: NOT SERVED: {problem}", view.view);
        }
    }
}

pub(crate) fn doctor(report: &DoctorReport) {
    for check in &report.checks {
        let mark = match check.state {
            CheckState::Ok => "ok     ",
            CheckState::Warning => "warning",
            CheckState::Missing => "MISSING",
        };
        println!("{mark}  {:14}  {}", check.name, check.found);
        if let Some(remedy) = &check.remedy {
            println!("{:9}{:14}  remedy: {remedy}", "", "");
        }
    }
}

fn link(connected: bool) -> String {
    if connected { "up" } else { "down" }.to_owned()
}

fn time(time: Option<TimeUs>) -> String {
    time.map_or("-".to_owned(), |time| time.to_string())
}
