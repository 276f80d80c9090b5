//! Answers as tables or JSON.

mod settings;

use std::fmt::Write as _;
use std::io::{self, Write as _};

use serde::Serialize;
use vra::api::{CheckpointInfo, TimeUs};

use super::table::Table;
use crate::api::{
    ImportOutcome, ImportedVpg, NewToken, PlannedVm, Response, SiteKeyList, SourceShown, Status,
    TaggedCheckpoint, TestShown, VmProtected, VmUnprotected, VpgDetails, VraDetails, VraState,
};
use crate::model::alert::Alert;
use crate::model::event::Event;
use crate::model::status::VpgReport;
use crate::model::task::{Task, TaskState};
use crate::units::{format_bytes, format_duration_us};

/// Writes an answer to standard output.
pub(super) fn response(response: &Response, json: bool) -> io::Result<()> {
    match response {
        Response::Status(status) => out(status, json, status_text),
        Response::Inventory(state) => out(state, json, super::inventory::tree),
        Response::Plan(vms) => out(vms, json, |vms| plan_table(vms)),
        Response::VmProtected(vm) => out(vm, json, protected_text),
        Response::VmUnprotected(vm) => out(vm, json, unprotected_text),
        Response::Sources(sources) => out(sources, json, |sources| sources_table(sources)),
        Response::Token(token) => out(token, json, token_text),
        Response::Vras(vras) => out(vras, json, |vras| vras_table(vras)),
        Response::Vra(details) => out(details, json, |details| vra_text(details)),
        Response::Vpg(details) => out(details, json, |details| vpg_text(details)),
        Response::Checkpoints(checkpoints) => out(checkpoints, json, |list| checkpoints_table(list)),
        Response::Tagged(tagged) => out(tagged, json, tagged_text),
        Response::Checkpoint(checkpoint) => {
            out(checkpoint, json, |checkpoint| checkpoints_table(std::slice::from_ref(checkpoint)))
        }
        // What a table would leave out is what it is for.
        Response::Export(export) => out(export, true, |_| String::new()),
        Response::Imported(imported) => out(imported, json, |imported| imported_table(imported)),
        Response::Test(test) => out(test, json, test_text),
        Response::Task(task) => out(task, json, |task| tasks_table(std::slice::from_ref(task))),
        Response::Tasks(tasks) => out(tasks, json, |tasks| tasks_table(tasks)),
        Response::Events(events) => out(events, json, |events| events_table(events)),
        Response::SiteKeys(list) => out(list, json, site_keys_text),
        Response::Alerts(alerts) => out(alerts, json, |alerts| alerts_table(alerts)),
    }
}

/// Writes groups to standard output.
pub(super) fn vpgs(reports: &[VpgReport], json: bool) -> io::Result<()> {
    out(&reports, json, |reports| vpgs_table(reports))
}

pub(super) fn out<T: Serialize>(value: &T, json: bool, text: impl Fn(&T) -> String) -> io::Result<()> {
    let text = if json {
        let mut text = serde_json::to_string_pretty(value).map_err(io::Error::other)?;
        text.push('\n');
        text
    } else {
        text(value)
    };
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

fn imported_table(imported: &[ImportedVpg]) -> String {
    let mut table = Table::new(["VPG", "VMS", "OUTCOME"]);
    for vpg in imported {
        let outcome = match &vpg.outcome {
            ImportOutcome::WouldBeCreated => "would be created".to_owned(),
            ImportOutcome::Created(task) => format!("created, task {task}"),
            ImportOutcome::Refused(error) => match &error.remedy {
                Some(remedy) => format!("refused: {}; {remedy}", error.message),
                None => format!("refused: {}", error.message),
            },
        };
        table.row([vpg.name.clone(), vpg.vms.to_string(), outcome]);
    }
    table.render()
}

fn site_keys_text(list: &SiteKeyList) -> String {
    let mut table = Table::new(["SITE KEY", "USE"]);
    for (at, id) in list.ids.iter().enumerate() {
        table.row([id.clone(), if at == 0 { "new segments" } else { "older history" }.to_owned()]);
    }
    format!(
        "{}\nThe keys are in {}: keep a copy away from the datastores.\n",
        table.render(),
        list.file.display()
    )
}

fn status_text(status: &Status) -> String {
    let mut text = format!("Site {}, manager {}, {}\n\n", status.site, status.version, status.now_us);
    if status.vpgs.is_empty() {
        text.push_str("No VPGs. `zvm vpg create` makes one.\n");
    } else {
        text.push_str(&vpgs_table(&status.vpgs));
    }
    for report in &status.vpgs {
        for problem in &report.problems {
            let _ = write!(text, "\n{}: {}\n  -> {}\n", report.name, problem.description, problem.remedy);
        }
    }
    let silent: Vec<&str> =
        status.vras.iter().filter(|vra| !vra.reachable).map(|vra| vra.vra.name.as_str()).collect();
    let _ = write!(text, "\n{} VRAs", status.vras.len());
    if !silent.is_empty() {
        let _ = write!(text, ", not answering: {}", silent.join(", "));
    }
    let _ = writeln!(
        text,
        ". {} alerts{}",
        status.alerts.len(),
        if status.alerts.is_empty() { "." } else { " (`zvm alert list`)." }
    );
    text
}

fn vpgs_table(reports: &[VpgReport]) -> String {
    let mut table = Table::new([
        "VPG",
        "STATUS",
        "SUBSTATUS",
        "RPO",
        "SLOWEST STAGE",
        "SYNC",
        "HISTORY",
        "CHECKPOINTS",
        "TEST",
    ]);
    for report in reports {
        let history = match (report.history_from_us, report.history_to_us) {
            (Some(from), Some(to)) => format_duration_us(to.0.saturating_sub(from.0)),
            _ => "-".into(),
        };
        let sync = report.sync_percent.map_or_else(
            || "-".into(),
            |percent| match report.sync_remaining_us {
                Some(us) => format!("{percent} %, {} left", format_duration_us(us)),
                None => format!("{percent} %"),
            },
        );
        table.row([
            report.name.clone(),
            report.status.to_string(),
            report.substatus.to_string(),
            report.rpo_us.map_or_else(|| "-".into(), format_duration_us),
            report
                .slowest_stage
                .map_or_else(|| "-".into(), |(stage, us)| format!("{stage} {}", format_duration_us(us))),
            sync,
            history,
            report.checkpoint_count.to_string(),
            report.test.map_or_else(|| "-".into(), |state| state.to_string()),
        ]);
    }
    table.render()
}

fn vpg_text(details: &VpgDetails) -> String {
    let mut text = String::new();
    if let Some(report) = &details.report {
        text.push_str(&vpgs_table(std::slice::from_ref(report)));
        for problem in &report.problems {
            let _ = write!(text, "\n{}\n  -> {}\n", problem.description, problem.remedy);
        }
        text.push('\n');
        let mut table = Table::new([
            "VM",
            "SOURCE",
            "TARGET",
            "SOURCE DOES",
            "TARGET DOES",
            "LINK",
            "BEHIND",
            "JOURNAL",
            "ROOM FOR",
            "SHORT IN",
        ]);
        let seconds = |s: Option<u64>| {
            s.map_or_else(|| "-".into(), |s| format_duration_us(s.saturating_mul(1_000_000)))
        };
        for vm in &report.vms {
            table.row([
                vm.name.clone(),
                vm.source.clone(),
                vm.target.clone(),
                vm.source_mode.map_or_else(|| "-".into(), |mode| json_word(&mode)),
                vm.target_state.map_or_else(|| "-".into(), |state| json_word(&state)),
                if vm.connected { "up" } else { "down" }.into(),
                vm.rpo.map_or_else(|| "-".into(), |rpo| format_duration_us(rpo.total_us)),
                match vm.journal_used_bytes {
                    Some(used) => {
                        format!("{} of {}", format_bytes(used), format_bytes(vm.journal_limit_bytes))
                    }
                    None => format!("limit {}", format_bytes(vm.journal_limit_bytes)),
                },
                seconds(vm.reachable_history_s),
                seconds(vm.limit_reached_in_s),
            ]);
        }
        text.push_str(&table.render());
        text.push('\n');
    }
    text.push_str(&settings::text(&details.vpg));
    text
}

fn vras_table(vras: &[VraState]) -> String {
    let mut table =
        Table::new(["VRA", "STATE", "ADDRESS", "VERSION", "PROTECTS", "KEEPS", "CERTIFICATE ENDS", "ID"]);
    for state in vras {
        let vra = &state.vra;
        let word = match (vra.state, state.reachable) {
            (crate::model::vra::VraState::Revoked, _) => "revoked",
            (_, true) => "up",
            (_, false) => "silent",
        };
        table.row([
            vra.name.clone(),
            word.into(),
            vra.address.clone(),
            vra.version.clone(),
            format!("{} VMs", state.source_vms),
            format!("{} journals", state.target_vms),
            vra.certificate_ends_us.to_string().chars().take(10).collect(),
            vra.id.to_string(),
        ]);
    }
    if table.is_empty() {
        return "No VRAs. `zvm vra token create --name NAME` lets one enrol.\n".into();
    }
    let mut text = table.render();
    for state in vras.iter().filter(|state| !state.reachable) {
        if let Some(error) = &state.error {
            let _ = write!(text, "\n{}: {error}\n", state.vra.name);
        }
    }
    text
}

fn vra_text(details: &VraDetails) -> String {
    let mut text = vras_table(std::slice::from_ref(&details.state));
    let Some(status) = &details.status else { return text };
    let _ = writeln!(text, "\nHost {}, kernel {}", status.host.hostname, status.host.kernel);
    let mut table = Table::new(["DISK", "VM", "SIZE", "DOOR"]);
    for volume in &status.volumes {
        table.row([
            volume.path.display().to_string(),
            format!("{}:{}", volume.vm_name, volume.number),
            format_bytes(volume.size_bytes),
            match (&volume.door, &volume.problem) {
                (Some(door), _) => door.to_string(),
                (None, Some(problem)) => problem.clone(),
                (None, None) => "-".into(),
            },
        ]);
    }
    if !table.is_empty() {
        let _ = write!(text, "\n{}", table.render());
    }
    for alert in &status.alerts {
        let _ = writeln!(text, "\n{}", alert.message);
        if let Some(remedy) = &alert.remedy {
            let _ = writeln!(text, "  -> {remedy}");
        }
    }
    text
}

fn plan_table(vms: &[PlannedVm]) -> String {
    let mut table = Table::new(["VM", "HOST", "DISKS", "WATCHED", "AVERAGE", "PEAK", "JOURNAL", "LINK"]);
    let rate = |bytes_per_s: u64| format!("{}/s", format_bytes(bytes_per_s));
    for vm in vms {
        let dash = || "-".to_owned();
        table.row([
            vm.vm.clone(),
            vm.host.clone(),
            format_bytes(vm.disks_bytes),
            vm.rate.map_or_else(dash, |rate| format_duration_us(rate.watched_us)),
            vm.rate.map_or_else(dash, |told| rate(told.average_bytes_per_s)),
            vm.rate.map_or_else(dash, |told| rate(told.peak_bytes_per_s)),
            vm.demand.map_or_else(dash, |demand| format_bytes(demand.journal_bytes)),
            vm.demand
                .map_or_else(dash, |demand| format!("{:.1} Mbit/s", demand.link_bits_per_s as f64 / 1e6)),
        ]);
    }
    if table.is_empty() {
        return "No VMs.\n".into();
    }
    let sum = |of: fn(&PlannedVm) -> Option<u64>| vms.iter().filter_map(of).fold(0, u64::saturating_add);
    let journals = sum(|vm| vm.demand.map(|demand| demand.journal_bytes));
    let link = sum(|vm| vm.demand.map(|demand| demand.link_bits_per_s));
    table.row([
        "all".into(),
        String::new(),
        format_bytes(sum(|vm| Some(vm.disks_bytes))),
        String::new(),
        rate(sum(|vm| vm.rate.map(|rate| rate.average_bytes_per_s))),
        String::new(),
        format_bytes(journals),
        format!("{:.1} Mbit/s", link as f64 / 1e6),
    ]);
    table.render()
}

fn protected_text(vm: &VmProtected) -> String {
    let mut table = Table::new(["DISK", "PATH", "DEVICE"]);
    for disk in &vm.disks {
        table.row([disk.disk.clone(), disk.path.display().to_string(), disk.device.clone()]);
    }
    let mut text = table.render();
    if !vm.also_on.is_empty() {
        let _ = writeln!(text, "Also served by VRA {}: it can be migrated there.", vm.also_on.join(", "));
    }
    if vm.at_next_start {
        let _ = writeln!(text, "VM {} runs: shut it down and start it again, then it uses them.", vm.vm);
        text += "A reboot from within the guest is not enough.\n";
    }
    text
}

fn unprotected_text(vm: &VmUnprotected) -> String {
    if vm.disks.is_empty() {
        return format!("VM {} has its own disks already.\n", vm.vm);
    }
    let disks = vm.disks.join(", ");
    if vm.at_next_start {
        format!("Disks {disks} are VM {}'s own from its next start on; until then they are served.\n", vm.vm)
    } else {
        format!("Disks {disks} are VM {}'s own again.\n", vm.vm)
    }
}

fn sources_table(sources: &[SourceShown]) -> String {
    let mut table = Table::new(["SOURCE", "KIND", "SITE", "ADDRESS", "HOSTS", "VMS", "READ", "PROBLEM"]);
    for shown in sources {
        let settings = &shown.source.settings;
        table.row([
            shown.source.name.clone(),
            settings.access.kind().into(),
            settings.site.clone(),
            settings.access.address().into(),
            shown.hosts.to_string(),
            shown.vms.to_string(),
            shown.read_us.map_or_else(|| "not yet".into(), |read_us| read_us.to_string()),
            shown.error.clone().unwrap_or_else(|| "-".into()),
        ]);
    }
    if table.is_empty() { "No sources but the inventory file.\n".into() } else { table.render() }
}

fn token_text(token: &NewToken) -> String {
    // The token alone goes to standard output, so that it can be piped into `vra enroll`.
    eprintln!("One-time token for VRA {}, good until {}; it is kept nowhere:", token.name, token.ends_us);
    format!("{}\n", token.token)
}

fn tagged_text(tagged: &TaggedCheckpoint) -> String {
    let mut text = checkpoints_table(std::slice::from_ref(&tagged.checkpoint));
    for vm in &tagged.without_agent {
        let _ = writeln!(
            text,
            "The guest of VM {vm} wasn't frozen: no agent is known at its host (`vra guest-agent {vm} --agent-socket PATH`)"
        );
    }
    text.push_str(
        "It is on its way to the journals: `zvm checkpoint list --tagged` says when it is complete.\n",
    );
    text
}

fn checkpoints_table(checkpoints: &[CheckpointInfo]) -> String {
    let mut table = Table::new(["TIME", "KIND", "COMPLETE", "LOCKED", "TAG", "ID"]);
    for checkpoint in checkpoints {
        table.row([
            checkpoint.time_us.to_string(),
            checkpoint.kind.name().into(),
            if checkpoint.complete { "yes" } else { "no" }.into(),
            checkpoint.lock_name().into(),
            checkpoint.tag.clone().unwrap_or_else(|| "-".into()),
            checkpoint.id.to_string(),
        ]);
    }
    if table.is_empty() { "No checkpoints.\n".into() } else { table.render() }
}

fn test_text(shown: &TestShown) -> String {
    let test = &shown.test;
    let tag = test.details.checkpoint_tag.as_ref().map(|tag| format!(" ({tag})")).unwrap_or_default();
    let mut text = format!(
        "Test {} of the checkpoint of {}{tag}, since {}\n\n",
        test.state, test.details.checkpoint_time_us, test.started_us
    );
    let mut table = Table::new(["VM", "DISK", "SIZE", "VRA", "DOOR"]);
    for shown in &shown.views {
        for disk in shown.view.iter().flat_map(|view| &view.disks) {
            table.row([
                disk.vm_name.clone(),
                disk.number.to_string(),
                format_bytes(disk.size_bytes),
                shown.vra.clone(),
                disk.door.to_string(),
            ]);
        }
    }
    text.push_str(&table.render());
    text
}

fn tasks_table(tasks: &[Task]) -> String {
    let mut table = Table::new(["STARTED", "TASK", "SUBJECT", "STATE", "STEP", "ID"]);
    for task in tasks {
        let state = match task.state {
            TaskState::InProgress => format!("{} %", task.progress_percent),
            state => state.to_string(),
        };
        table.row([
            task.started_us.to_string(),
            task.kind.to_string(),
            task.subject.clone(),
            state,
            task.step.clone(),
            task.id.to_string(),
        ]);
    }
    if table.is_empty() { "No tasks.\n".into() } else { table.render() }
}

fn events_table(events: &[Event]) -> String {
    let mut table = Table::new(["TIME", "EVENT", "", "DESCRIPTION"]);
    for event in events {
        let mark = if event.success { "" } else { "!" };
        table.row([event.at_us.to_string(), event.kind.to_string(), mark.into(), event.description.clone()]);
    }
    if table.is_empty() { "No events.\n".into() } else { table.render() }
}

fn alerts_table(alerts: &[Alert]) -> String {
    let mut text = String::new();
    for alert in alerts {
        let over = alert.turned_off_us.map(|off: TimeUs| format!(", over at {off}")).unwrap_or_default();
        let condition = &alert.condition;
        let _ = writeln!(text, "{} {} since {}{over}", condition.level, condition.code, alert.turned_on_us);
        let _ = writeln!(text, "  {}\n  -> {}", condition.description, condition.remedy);
    }
    if text.is_empty() { "No alerts.\n".into() } else { text }
}

fn json_word(value: &impl Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}
