//! Which disks of a VM a VRA is to serve. No I/O.

use vra::api::{ApiError, ErrorCode};

use crate::inventory::{Disk, Vm};

/// The disks of `vm` that are named, or all but those that are excluded.
///
/// # Errors
/// A name that the VM doesn't have, a disk that can't be protected and isn't excluded, or none left.
pub(super) fn of(vm: &Vm, named: &[String], excluded: &[String]) -> Result<Vec<Disk>, ApiError> {
    for name in named.iter().chain(excluded) {
        if vm.disk(name).is_none() {
            let known: Vec<&str> = vm.disks.iter().map(|disk| disk.name.as_str()).collect();
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            return Err(ApiError::new(ErrorCode::NotFound, format!("VM {:?} has no disk {name:?}", vm.name))
                .remedy(format!("it has {known}")));
        }
    }
    let is_chosen =
        |disk: &&Disk| !excluded.contains(&disk.name) && (named.is_empty() || named.contains(&disk.name));
    let disks: Vec<Disk> = vm.disks.iter().filter(is_chosen).cloned().collect();
    for disk in &disks {
        if let Some((reason, way_out)) = disk.kind.obstacle() {
            let message = format!(
                "disk {} ({}) of VM {:?} can't be protected: it {reason}",
                disk.name,
                disk.path.display(),
                vm.name
            );
            return Err(ApiError::new(ErrorCode::Unsupported, message)
                .remedy(format!("{way_out}; or leave it out with `--exclude {}`", disk.name)));
        }
    }
    if disks.is_empty() {
        return Err(ApiError::new(ErrorCode::BadRequest, format!("VM {:?} has no disk to protect", vm.name))
            .remedy("`zvm inventory` shows its disks"));
    }
    Ok(disks)
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::inventory::{DiskKind, Origin, Power};

    fn vm() -> Vm {
        let disk = |name: &str, kind| Disk {
            name: name.into(),
            path: format!("/images/{name}").into(),
            size_bytes: Some(1 << 30),
            kind,
            served: Some(false),
            written_bytes: None,
        };
        Vm {
            uuid: Uuid::from_u128(1),
            name: "db".into(),
            host: "h1".into(),
            power: Power::Off,
            disks: vec![disk("vda", DiskKind::Raw), disk("vdb", DiskKind::Image), disk("vdc", DiskKind::Raw)],
            nics: Vec::new(),
            origin: Origin::default(),
        }
    }

    #[test]
    fn what_cannot_be_protected_is_refused_unless_it_is_left_out() {
        let names = |named: &[&str], excluded: &[&str]| {
            let own = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
            of(&vm(), &own(named), &own(excluded))
                .map(|disks| disks.into_iter().map(|disk| disk.name).collect::<Vec<_>>())
                .map_err(|error| (error.message, error.remedy.unwrap_or_default()))
        };
        let (message, remedy) = names(&[], &[]).unwrap_err();
        assert!(message.contains("vdb") && message.contains("qcow2"), "{message}");
        assert!(remedy.contains("qemu-img convert") && remedy.contains("--exclude vdb"), "{remedy}");
        assert_eq!(names(&[], &["vdb"]).unwrap(), ["vda", "vdc"]);
        assert_eq!(names(&["vdc"], &[]).unwrap(), ["vdc"]);
        let (message, remedy) = names(&["vdz"], &[]).unwrap_err();
        assert!(message.contains("vdz") && remedy.contains("vda, vdb, vdc"));
        assert!(names(&["vda"], &["vda"]).unwrap_err().0.contains("no disk to protect"));
    }
}
