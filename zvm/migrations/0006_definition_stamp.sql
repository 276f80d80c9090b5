-- Another one for each revision of a group's definition: VRAs tell that of the definition that they have. Revisions from before have none.
ALTER TABLE vpg ADD COLUMN stamp TEXT;
