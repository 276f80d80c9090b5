//! Protected disks: real VRAs and a ZVM replicate a ublk disk under load, and what comes back at the target is the source disk byte by byte.

mod changes;
mod load;
mod source;
mod stand;
mod target;
mod view;

use crate::suite::{Body, Case, MachineNeeds, Need};

/// The first disk takes the site's files, with room for the journal's limit: less is an alert. The second is a raw disk to protect.
const MACHINE: MachineNeeds =
    MachineNeeds { memory_mib: 2500, disks_mib: &[4000, 48], ..MachineNeeds::USUAL };
const NEEDS: &[Need] = &[Need::Tool("vra"), Need::Tool("zvm"), Need::Tool("vra-ublk")];
const NEEDS_NBD: &[Need] =
    &[Need::Tool("vra"), Need::Tool("zvm"), Need::Tool("vra-ublk"), Need::Tool("nbdcopy")];

pub(super) const CASES: &[Case] = &[
    Case::new(
        "replicate-fio-verify",
        "A load of 4k to 256k on two queues with FUA and fdatasync replicates; the view at a checkpoint, by ublk and by NBD, is the source disk.",
        Body::Inside(target::fio_verify),
    )
    .needs(NEEDS_NBD)
    .machine(MACHINE)
    .limit_s(600),
    Case::new(
        "replicate-target-killed",
        "kill -9 of the target under load and its restart: the stream goes on where it was, without a sync, and the view is the source disk.",
        Body::Inside(|context| target::killed(context, 1)),
    )
    .needs(NEEDS)
    .machine(MACHINE)
    .limit_s(600),
    Case::new(
        "replicate-target-killed-often",
        "The same, twelve times under one load.",
        Body::Inside(|context| target::killed(context, 12)),
    )
    .needs(NEEDS)
    .machine(MACHINE)
    .limit_s(1200)
    .long(),
    Case::new(
        "replicate-link-cut",
        "Ten seconds without a network under load: the guest notices nothing, the stream goes on without a sync, the view is the source disk.",
        Body::Inside(target::link_cut),
    )
    .needs(NEEDS)
    .machine(MACHINE)
    .limit_s(600)
    .once(),
    Case::new(
        "replicate-discard-zeroes",
        "Discards and write-zeroes arrive, in order with the writes around them.",
        Body::Inside(changes::discard_zeroes),
    )
    .needs(NEEDS)
    .machine(MACHINE)
    .limit_s(600),
    Case::new(
        "view-survives-restart",
        "kill -9 of the target under load on a test's disk and its restart: the same device goes on, all that it answered is there, flushed or not, and the test is shown as running.",
        Body::Inside(|context| view::survives(context, 1)),
    )
    .needs(NEEDS)
    .machine(MACHINE)
    .limit_s(600),
    Case::new(
        "view-survives-restart-often",
        "The same, eight times under one load.",
        Body::Inside(|context| view::survives(context, 8)),
    )
    .needs(NEEDS)
    .machine(MACHINE)
    .limit_s(1200)
    .long(),
    Case::new(
        "replicate-source-restart",
        "kill -9 of the source under load and its restart: the guest sees a pause; a full sync in a new generation is shown, and no checkpoint counts before its end.",
        Body::Inside(|context| source::restarted(context, source::End::Kill, 1)),
    )
    .needs(NEEDS)
    .machine(MACHINE)
    .limit_s(600),
    Case::new(
        "replicate-source-restart-often",
        "The same, eight times under one load.",
        Body::Inside(|context| source::restarted(context, source::End::Kill, 8)),
    )
    .needs(NEEDS)
    .machine(MACHINE)
    .limit_s(1200)
    .long(),
    Case::new(
        "replicate-source-stopped",
        "A source that is stopped in order (SIGTERM) and started again under load is only a pause for the guest, too.",
        Body::Inside(|context| source::restarted(context, source::End::Terminate, 1)),
    )
    .needs(NEEDS)
    .machine(MACHINE)
    .limit_s(600),
    Case::new(
        "replicate-grow",
        "A protected disk's file is made longer under load: its device grows without a full sync, what is written behind its former end is recovered, and the checkpoint from before is as it was.",
        Body::Inside(changes::grow),
    )
    .needs(&[Need::Tool("vra"), Need::Tool("zvm"), Need::UblkFeature("UPDATE_SIZE")])
    .machine(MACHINE)
    .limit_s(600),
    Case::new(
        "replicate-detach-attach-delete",
        "Detaching, attaching, deleting and protecting again leave no device, process or file behind, and the disk as the guest left it.",
        Body::Inside(changes::detach_attach_delete),
    )
    .needs(NEEDS)
    .machine(MACHINE)
    .limit_s(600),
];
