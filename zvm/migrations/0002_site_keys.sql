-- The names of the keys in the file of site keys: a file that lacks one was lost, or is older than the database.
CREATE TABLE site_key (
    -- 16 lower-case hex digits. The key itself is only in the file.
    id TEXT NOT NULL PRIMARY KEY,
    noted_us BIGINT NOT NULL
);
