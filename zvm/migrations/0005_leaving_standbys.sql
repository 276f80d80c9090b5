-- Several VRAs may serve one volume: each of them ends that for itself.
CREATE TABLE leaving_volume_at (
    volume_id TEXT NOT NULL,
    vra_id TEXT NOT NULL,
    vm_id TEXT NOT NULL,
    -- The source that is asked whether a guest of its still uses it.
    source TEXT NOT NULL,
    -- The served device, as definitions name it.
    device TEXT NOT NULL,
    PRIMARY KEY (volume_id, vra_id)
);
INSERT INTO leaving_volume_at SELECT volume_id, vra_id, vm_id, source, device FROM leaving_volume;
DROP TABLE leaving_volume;
ALTER TABLE leaving_volume_at RENAME TO leaving_volume;
