"""A client of a vCenter on pyvmomi, for comparison: reads a command as JSON from each line of standard input, and answers with a line.

    vcenter_peer.py HOST:PORT USER PASSWORD

It shares no code with the product. `read` gives the inventory in the product's own form, object by object under their ids.
"""

import collections
import json
import ssl
import sys
import urllib.parse
import urllib.request
import uuid

from pyVim.connect import SmartConnect
from pyVim.task import WaitForTask
from pyVmomi import vim

BUSES = [
    (vim.vm.device.VirtualSCSIController, "scsi"),
    (vim.vm.device.VirtualSATAController, "sata"),
    (vim.vm.device.VirtualNVMEController, "nvme"),
    (vim.vm.device.VirtualIDEController, "ide"),
]
POWER = {"poweredOn": "on", "poweredOff": "off", "suspended": "paused"}


class Peer:
    def __init__(self, address, user, password):
        self.address, self.user, self.password = address, user, password
        self.login()

    def login(self, _command=None):
        host, port = self.address.rsplit(":", 1)
        service = SmartConnect(
            host=host, port=int(port), user=self.user, pwd=self.password, disableSslCertValidation=True
        )
        self.stub = service._stub
        self.content = service.RetrieveContent()

    def all(self, kind):
        view = self.content.viewManager.CreateContainerView(self.content.rootFolder, [kind], True)
        return list(view.view)

    def object(self, kind, identity):
        return kind(identity, self.stub)

    def vm(self, command):
        return self.object(vim.VirtualMachine, command["id"])

    # What is there.

    def read(self, command):
        site, source = command["site"], command["source"]
        namespace = uuid.UUID(self.content.about.instanceUuid)
        origin = lambda entity: {"source": source, "id": entity._moId}
        hosts, clusters = self.all(vim.HostSystem), self.all(vim.ClusterComputeResource)
        networks, datastores = self.all(vim.Network), self.all(vim.Datastore)
        names = {}
        for kind in (hosts, clusters, networks, datastores):
            names.update(distinct(kind))

        def describe_host(host):
            state = "not-responding"
            if host.runtime.connectionState == "connected":
                state = "maintenance" if host.runtime.inMaintenanceMode else "connected"
            name = names[host._moId]
            return {
                "name": name,
                "site": site,
                "cluster": names.get(host.parent._moId),
                "vra": name,
                "state": state,
                "origin": origin(host),
            }

        def describe_datastore(datastore):
            summary = datastore.summary
            return {
                "name": names[datastore._moId],
                "hosts": sorted(names[mount.key._moId] for mount in datastore.host if mount.mountInfo.mounted),
                "path": summary.url or f"[{names[datastore._moId]}]",
                "capacity_bytes": summary.capacity,
                "free_bytes": summary.freeSpace,
                "origin": origin(datastore),
            }

        def describe_vm(vm, config):
            return {
                "uuid": str(uuid.uuid5(namespace, vm._moId)),
                "name": plain(vm.name),
                "host": names[vm.runtime.host._moId],
                "power": POWER[vm.runtime.powerState],
                "disks": disks_of(config),
                "nics": nics_of(vm, config, names, networks),
                "origin": origin(vm),
            }

        def simple(entity):
            return {"name": names[entity._moId], "site": site, "origin": origin(entity)}

        vms = [(vm, vm.config) for vm in self.all(vim.VirtualMachine)]
        return {
            "clusters": {entity._moId: simple(entity) for entity in clusters},
            "hosts": {host._moId: describe_host(host) for host in hosts},
            "networks": {entity._moId: simple(entity) for entity in networks if not is_uplink(entity)},
            "datastores": {datastore._moId: describe_datastore(datastore) for datastore in datastores},
            "vms": {vm._moId: describe_vm(vm, config) for vm, config in vms if not config.template},
        }

    # What is done to it.

    def rename(self, command):
        WaitForTask(self.vm(command).Rename_Task(command["to"]))

    def power(self, command):
        vm = self.vm(command)
        tasks = {"on": vm.PowerOnVM_Task, "off": vm.PowerOffVM_Task, "paused": vm.SuspendVM_Task}
        WaitForTask(tasks[command["to"]]())

    def reconfigure(self, vm, operation, device, file_operation=None):
        change = vim.vm.device.VirtualDeviceSpec(operation=operation, device=device)
        if file_operation:
            change.fileOperation = file_operation
        WaitForTask(vm.ReconfigVM_Task(vim.vm.ConfigSpec(deviceChange=[change])))

    def disk(self, vm, name):
        devices = vm.config.hardware.device
        for disk in devices:
            if isinstance(disk, vim.vm.device.VirtualDisk) and place_of(disk, devices) == name:
                return disk
        raise KeyError(name)

    def add_disk(self, command):
        vm = self.vm(command)
        disk = vim.vm.device.VirtualDisk()
        controllers = [
            device for device in vm.config.hardware.device if isinstance(device, vim.vm.device.VirtualSCSIController)
        ]
        disk.controllerKey, disk.unitNumber, disk.key = controllers[0].key, command["unit"], -1
        disk.capacityInKB = command["size_kb"]
        backing = vim.vm.device.VirtualDisk.FlatVer2BackingInfo()
        backing.diskMode, backing.thinProvisioned, backing.fileName = "persistent", True, ""
        if "sharing" in command:
            backing.sharing = command["sharing"]
        disk.backing = backing
        self.reconfigure(vm, "add", disk, "create")

    def resize_disk(self, command):
        vm = self.vm(command)
        disk = self.disk(vm, command["disk"])
        disk.capacityInKB = command["size_kb"]
        self.reconfigure(vm, "edit", disk)

    def remove_disk(self, command):
        vm = self.vm(command)
        self.reconfigure(vm, "remove", self.disk(vm, command["disk"]))

    def plug(self, command):
        vm = self.vm(command)
        cards = [
            device
            for device in vm.config.hardware.device
            if isinstance(device, vim.vm.device.VirtualEthernetCard)
        ]
        cards[0].backing = vim.vm.device.VirtualEthernetCard.NetworkBackingInfo(deviceName=command["network"])
        self.reconfigure(vm, "edit", cards[0])

    def relocate(self, command):
        host = self.object(vim.HostSystem, command["host"])
        WaitForTask(self.vm(command).RelocateVM_Task(vim.vm.RelocateSpec(host=host)))

    def destroy(self, command):
        WaitForTask(self.vm(command).Destroy_Task())

    def create(self, command):
        like = self.vm(command)
        host = like.runtime.host
        config = vim.vm.ConfigSpec(
            name=command["name"], guestId="otherGuest", files=vim.vm.FileInfo(vmPathName=command["datastore"])
        )
        task = like.parent.CreateVM_Task(config=config, pool=like.resourcePool, host=host)
        WaitForTask(task)
        return task.info.result._moId

    def mark_template(self, command):
        self.vm(command).MarkAsTemplate()

    def maintenance(self, command):
        WaitForTask(self.object(vim.HostSystem, command["id"]).EnterMaintenanceMode_Task(0))

    def hook(self, command):
        context = ssl._create_unverified_context()
        method = "POST" if command["path"] != "/test/calls" else "GET"
        request = urllib.request.Request(f"https://{self.address}{command['path']}", method=method)
        try:
            with urllib.request.urlopen(request, context=context) as answer:
                return json.loads(answer.read() or b"null")
        except OSError:
            # A hook that closes all connections closes its own.
            if command["path"] != "/test/cut":
                raise
            return None


def is_uplink(network):
    return any(tag.key == "SYSTEM/DVS.UPLINKPG" for tag in network.tag or [])


def plain(name):
    return urllib.parse.unquote(name)


def distinct(entities):
    """Names by ids: with the datacenter, or the id, where several share one."""
    names = {entity._moId: plain(entity.name) for entity in entities}
    counts = collections.Counter(names.values())
    for entity in entities:
        if counts[plain(entity.name)] > 1:
            datacenter = entity
            while datacenter is not None and not isinstance(datacenter, vim.Datacenter):
                datacenter = datacenter.parent
            if datacenter is not None:
                names[entity._moId] = f"{plain(datacenter.name)}/{plain(entity.name)}"
    counts = collections.Counter(names.values())
    for entity in entities:
        if counts[names[entity._moId]] > 1:
            names[entity._moId] = f"{plain(entity.name)} ({entity._moId})"
    return names


def place_of(disk, devices):
    controller = next(device for device in devices if device.key == disk.controllerKey)
    bus = next(name for kind, name in BUSES if isinstance(controller, kind))
    return f"{bus}{controller.busNumber}:{disk.unitNumber}"


def disks_of(config):
    devices = config.hardware.device
    disks = [device for device in devices if isinstance(device, vim.vm.device.VirtualDisk)]
    found = []
    for disk in disks:
        kind = "vmdk"
        if isinstance(disk.backing, vim.vm.device.VirtualDisk.RawDiskMappingVer1BackingInfo):
            kind = "network"
        controller = next(device for device in devices if device.key == disk.controllerKey)
        sharing = getattr(controller, "sharedBus", "noSharing")
        if getattr(disk.backing, "sharing", None) == "sharingMultiWriter" or sharing != "noSharing":
            kind = "shared"
        found.append(
            {
                "name": place_of(disk, devices),
                "path": disk.backing.fileName,
                "size_bytes": disk.capacityInBytes or disk.capacityInKB * 1024,
                "kind": kind,
            }
        )
    return sorted(found, key=lambda disk: disk["name"])


def nics_of(vm, config, names, networks):
    nics = []
    for card in config.hardware.device:
        if not isinstance(card, vim.vm.device.VirtualEthernetCard):
            continue
        backing = card.backing
        if isinstance(backing, vim.vm.device.VirtualEthernetCard.DistributedVirtualPortBackingInfo):
            key = backing.port.portgroupKey
            groups = [network for network in networks if isinstance(network, vim.dvs.DistributedVirtualPortgroup)]
            network = next(names[group._moId] for group in groups if group.key == key)
        elif backing.network is not None:
            network = names[backing.network._moId]
        else:
            network = next(names[own._moId] for own in vm.network if own.name == backing.deviceName)
        nics.append({"mac": card.macAddress.lower(), "network": network})
    return nics


def main():
    peer = Peer(*sys.argv[1:4])
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = {"result": getattr(peer, command.pop("do"))(command)}
        except Exception as error:  # whatever it is, it is the test's business
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


main()
