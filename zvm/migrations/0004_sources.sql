-- Sources of inventory beside the file.
CREATE TABLE source (
    name TEXT NOT NULL PRIMARY KEY,
    -- JSON: zvm::model::source::SourceSettings.
    settings TEXT NOT NULL,
    -- Sealed with the key in the state folder's file `credential-key`, lower-case hex; see zvm::credentials.
    password TEXT
);

-- The last good reading of each, so that a restarted manager sees what happened meanwhile.
CREATE TABLE source_reading (
    -- The empty name is the inventory file's.
    source TEXT NOT NULL PRIMARY KEY,
    read_us BIGINT NOT NULL,
    -- JSON: zvm::inventory::Inventory.
    inventory TEXT NOT NULL
);

-- Volumes of VMs whose definitions have the disks themselves again: served until the guests use them no more.
CREATE TABLE leaving_volume (
    volume_id TEXT NOT NULL PRIMARY KEY,
    vra_id TEXT NOT NULL,
    vm_id TEXT NOT NULL,
    -- The source that is asked whether a guest of its still uses it.
    source TEXT NOT NULL,
    -- The served device, as definitions name it.
    device TEXT NOT NULL
);
