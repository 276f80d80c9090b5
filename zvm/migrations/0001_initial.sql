-- Times are microseconds since the Unix epoch. Ids are UUIDs in their hyphenated lower-case form.
-- Only what SQLite and PostgreSQL both understand.

CREATE TABLE site (
    -- Always 1: a manager has one site authority.
    id BIGINT NOT NULL PRIMARY KEY,
    name TEXT NOT NULL,
    zvm_id TEXT NOT NULL,
    -- Raised at each change of what is revoked; VRAs refuse an older list.
    trust_version BIGINT NOT NULL
);

CREATE TABLE vra (
    id TEXT NOT NULL PRIMARY KEY,
    name TEXT NOT NULL,
    -- host:port of its UDP port.
    address TEXT NOT NULL,
    version TEXT NOT NULL,
    -- enrolled | revoked
    state TEXT NOT NULL,
    enrolled_us BIGINT NOT NULL,
    revoked_us BIGINT
);

-- A name belongs to one VRA at a time; a revoked one gives it free.
CREATE UNIQUE INDEX vra_name ON vra (name) WHERE state = 'enrolled';

CREATE TABLE vra_certificate (
    -- Lower-case hex without leading zeroes.
    serial TEXT NOT NULL PRIMARY KEY,
    vra_id TEXT NOT NULL REFERENCES vra (id),
    issued_us BIGINT NOT NULL,
    ends_us BIGINT NOT NULL,
    revoked_us BIGINT
);

CREATE TABLE enrol_token (
    -- SHA-256 of the secret, lower-case hex. The secret itself is kept nowhere.
    secret_sha256 TEXT NOT NULL PRIMARY KEY,
    vra_name TEXT NOT NULL,
    created_us BIGINT NOT NULL,
    ends_us BIGINT NOT NULL,
    used_us BIGINT,
    used_by TEXT
);

CREATE TABLE vpg (
    id TEXT NOT NULL PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    -- active | deleting
    state TEXT NOT NULL,
    -- Raised at every change of the definition.
    revision BIGINT NOT NULL,
    -- The newest revision that every VRA of the group has taken; 0 before the first.
    applied_revision BIGINT NOT NULL,
    created_us BIGINT NOT NULL,
    -- JSON: zvm::model::vpg::VpgSettings.
    settings TEXT NOT NULL,
    -- JSON: zvm::model::vpg::Removal, while it is being deleted.
    removal TEXT
);

-- VRAs that could not be reached when a group was deleted by force: they are told when they come back.
CREATE TABLE leftover (
    vpg_id TEXT NOT NULL,
    vra_id TEXT NOT NULL,
    -- 1: journals and recovery disks stay in the datastore.
    keep_files BIGINT NOT NULL,
    PRIMARY KEY (vpg_id, vra_id)
);

CREATE TABLE test_run (
    id TEXT NOT NULL PRIMARY KEY,
    vpg_id TEXT NOT NULL,
    -- starting | running | stopping
    state TEXT NOT NULL,
    started_us BIGINT NOT NULL,
    -- JSON: zvm::model::test_run::TestDetails.
    details TEXT NOT NULL
);

-- A group is tested once at a time.
CREATE UNIQUE INDEX test_run_vpg ON test_run (vpg_id);

CREATE TABLE task (
    id TEXT NOT NULL PRIMARY KEY,
    kind TEXT NOT NULL,
    state TEXT NOT NULL,
    -- 0 to 100.
    progress_percent BIGINT NOT NULL,
    -- What it is doing or waiting for; at the end, how it ended.
    step TEXT NOT NULL,
    -- What it is about, for people.
    subject TEXT NOT NULL,
    vpg_id TEXT,
    started_us BIGINT NOT NULL,
    completed_us BIGINT
);

CREATE INDEX task_started ON task (started_us);

CREATE TABLE event (
    id TEXT NOT NULL PRIMARY KEY,
    at_us BIGINT NOT NULL,
    kind TEXT NOT NULL,
    -- 1: as intended, 0: a failure.
    success BIGINT NOT NULL,
    description TEXT NOT NULL,
    -- vpg | vra | vm | zvm
    entity_kind TEXT NOT NULL,
    entity_id TEXT NOT NULL,
    task_id TEXT
);

CREATE INDEX event_at ON event (at_us);

CREATE TABLE alert (
    id TEXT NOT NULL PRIMARY KEY,
    code TEXT NOT NULL,
    -- Warning | Error
    level TEXT NOT NULL,
    entity_kind TEXT NOT NULL,
    entity_id TEXT NOT NULL,
    description TEXT NOT NULL,
    remedy TEXT NOT NULL,
    turned_on_us BIGINT NOT NULL,
    turned_off_us BIGINT
);

-- One alert of a kind at a time for each thing it is about.
CREATE UNIQUE INDEX alert_open ON alert (code, entity_kind, entity_id) WHERE turned_off_us IS NULL;
CREATE INDEX alert_turned_on ON alert (turned_on_us);
