-- When all disks of a test of the group were last open. What was tested before isn't known: such groups count from their creation.
ALTER TABLE vpg ADD COLUMN last_test_us BIGINT;
